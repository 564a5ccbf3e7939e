"""`./vla demo`: a simulated robot under a learned policy through the whole graph, with a report.

Starts launch/sim.launch.yaml, the very file a person would start, runs episodes, and writes into `out`:
report.json, report.html, episode_*.mp4 and the bags.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from vla_bringup.launch_file import Launch, LaunchError, load, parse_arguments

#: What a robot runs when nothing else is asked: policy and task.
DEFAULTS = {"panda": ("panda_pick", "pick"), "aloha": ("aloha_transfer", "transfer_cube")}
HELP = """arguments, as name:=value
  robot     panda | aloha | a robot description with a simulation section   [panda]
  policy    a name in launch/policies                                       [the robot's]
  task      a task of the robot's simulated world                           [the robot's]
  strategy  synchronous | naive | temporal_ensemble | linear_blend | rtc_guided | rtc_trained
                                                                            [what the policy description says]
  runtime   onnx | torch                                                    [onnx]
  episodes  number of episodes                                              [3]
  seed      seed of the first scene; the next episodes count up from it     [100000]
  options   task options, comma separated, such as target=1                 [none]
  delay     seconds that each inference takes at least                      [0]
  out       folder of the report                                            [out/demo_<robot>]
  video     true | false                                                    [true]
"""


@dataclass(frozen=True)
class DemoConfig:
    robot: str = "panda"
    policy: str = ""
    task: str = ""
    strategy: str = ""
    runtime: str = "onnx"
    episodes: int = 3
    seed: int = 100_000
    options: tuple[str, ...] = ()
    delay: float = 0.0
    out: Path = Path("out/demo")
    video: bool = True

    @classmethod
    def parse(cls, words: list[str]) -> DemoConfig:
        given = parse_arguments(words)
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            raise LaunchError(f"demo: unknown argument {unknown[0]!r}\n{HELP}")
        robot = given.get("robot", cls.robot)
        policy, task = DEFAULTS.get(robot, ("", ""))
        try:
            config = cls(
                robot=robot,
                policy=given.get("policy", policy),
                task=given.get("task", task),
                strategy=given.get("strategy", ""),
                runtime=given.get("runtime", cls.runtime),
                episodes=int(given.get("episodes", cls.episodes)),
                seed=int(given.get("seed", cls.seed)),
                options=tuple(o for o in given.get("options", "").split(",") if o),
                delay=float(given.get("delay", 0.0)),
                out=Path(given.get("out", f"out/demo_{Path(robot).stem}")),
                video=given.get("video", "true") == "true",
            )
        except ValueError as error:
            raise LaunchError(f"demo: {error}\n{HELP}") from error
        if config.episodes < 1:
            raise LaunchError(f"demo: episodes: expected 1 or more, found {config.episodes}")
        if not config.policy:
            raise LaunchError(f"demo: policy: needed for robot {robot!r}; those with a default are {sorted(DEFAULTS)}")
        return config


def run(config: DemoConfig) -> dict:
    """Run the episodes and write the report; returns what report.json holds."""
    # ROS 2 is imported late: `./vla demo help` needs none of it.
    from vla_bringup.episodes import EpisodeRunner
    from vla_bringup.report import write_report

    out = config.out.resolve()
    bags = out / "bags"
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(bags, ignore_errors=True)
    for old in out.glob("episode_*.mp4"):
        old.unlink()
    share = Path(__file__).resolve().parent.parent
    # A domain of its own, so that a demo never talks to a robot on the same network.
    os.environ.setdefault("ROS_DOMAIN_ID", str(100 + os.getpid() % 100))
    processes = load(
        share / "sim.launch.yaml",
        {
            "robot": config.robot, "task": config.task, "seed": str(config.seed), "policy": config.policy,
            "runtime": config.runtime, "strategy": config.strategy, "record": "true", "bags": str(bags),
            "inject_delay": str(config.delay),
        },
    )  # fmt: skip
    log = open(out / "graph.log", "w", buffering=1)  # noqa: SIM115 (closed with the graph)

    def output(name: str, line: str) -> None:
        log.write(f"[{name}] {line}\n")
        if "[ERROR]" in line or "Traceback" in line:
            tqdm.write(f"[{name}] {line}", file=sys.stderr)

    print(f"starting {len(processes)} nodes: {', '.join(p.name for p in processes)}", file=sys.stderr)
    results = []
    began = time.monotonic()
    with Launch(processes, output) as graph:

        def alive() -> None:
            dead = graph.dead()
            if dead:
                raise RuntimeError(f"{dead[0].name} has ended (exit status {dead[0].popen.returncode}); see {log.name}")

        with EpisodeRunner(alive) as runner:
            runner.wait_ready()
            print(
                f"the graph is up after {time.monotonic() - began:.0f} s: policy {runner.policy.active} "
                f"({runner.policy.runtime} on {runner.policy.provider})",
                file=sys.stderr,
            )
            with tqdm(total=config.episodes, unit="episode", file=sys.stderr) as bar:
                for k in range(config.episodes):
                    result = runner.run(config.task, config.seed + k, config.options)
                    results.append(result)
                    outcome = "success" if result.success else f"failure ({result.detail})"
                    tqdm.write(f"  {result.instruction!r}: {outcome} after {result.duration:.1f} s", file=sys.stderr)
                    bar.update()
                    bar.set_postfix_str(f"{sum(r.success for r in results)}/{len(results)} succeeded")
            status = runner.policy
    log.close()
    print("measuring the recordings and writing the report", file=sys.stderr)
    return write_report(config, results, status, out)


def main() -> int:
    words = sys.argv[1:]
    if words and words[0] in ("help", "-h", "--help"):
        print(HELP)
        return 0
    try:
        config = DemoConfig.parse(words)
        run(config)
    except (LaunchError, RuntimeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
