"""Demonstrations of the scripted experts as rosbag2 folders, one per episode, with the topics of a live recording.

    python -m vla_sim.demonstrate --robot panda --task pick --episodes 300 --seed 1000 --out bags/pick

Seeds are taken from `--seed` on until so many episodes are there; a bag that is there already counts, so that an
interrupted run goes on where it was. An episode that fails is dropped and counted.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

#: A demonstration goes on this long after its success, s, so that its last actions are seen through.
TAIL = 0.5


@dataclass(frozen=True)
class Settings:
    """What to demonstrate. `start`: home, anywhere or mixed (table only); `noise`: rad; `camera_rate`: Hz or None."""

    robot: str
    task: str
    out: Path
    camera_rate: float | None = None
    noise: float = 0.0
    start: str = "home"
    options: tuple[tuple[str, str], ...] = ()

    def folder(self, seed: int) -> Path:
        return self.out / f"{self.task}_{seed:06d}"


@dataclass(frozen=True)
class Result:
    """What came of one seed: `detail` of the outcome, `duration` in simulated s."""

    seed: int
    success: bool
    detail: str
    duration: float


def demonstrate(world, seed: int, settings: Settings) -> Result:
    """Run the expert on one seed and write its bag; a bag of a failed episode is removed again."""
    from vla_msgs.msg import EpisodeEvent
    from vla_teleop.bag_writer import BagWriter

    from vla_sim.disturbance import Disturbance
    from vla_sim.episode_writer import EpisodeWriter
    from vla_sim.experts import make_expert
    from vla_sim.rollout import rollout

    options = dict(settings.options)
    draw = np.random.default_rng([seed, 300])
    start = settings.start if settings.start != "mixed" else str(draw.choice(["home", "anywhere"]))
    if start != "home":
        options["start"] = start
    # Some undisturbed episodes are kept among the disturbed.
    noise = settings.noise * draw.uniform(0.0, 1.0)
    episode = world.reset(settings.task, seed, options)
    expert = make_expert(world)
    disturbance = Disturbance(world.robot, expert, noise, seed, world.time) if noise > 0 else None
    cameras = tuple(camera.name for camera in world.robot.cameras)
    facts = {
        "robot": world.robot.name,
        "policy": "expert",
        "task": episode.task,
        "instruction": episode.instruction,
        "seed": seed,
        "noise": f"{noise:.4f}",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "outcome": "success",
    }
    bag = BagWriter(settings.folder(seed), facts=facts, flush_period=60.0, sync_period=None)
    try:
        writer = EpisodeWriter(bag, world)
        writer.begin()
        announced = False
        for period in rollout(world, expert.target, expert.kind, cameras, settings.camera_rate, disturbance, tail=TAIL):
            if world.outcome().success and not announced:
                writer.event(EpisodeEvent.SUCCESS)
                announced = True
            writer.write(period)
        outcome = world.outcome()
        if outcome.success:
            bag.close()
        else:
            bag.discard()
    except BaseException:
        bag.discard()
        raise
    return Result(seed, outcome.success, outcome.detail, world.elapsed)


def main() -> None:
    settings, episodes, first, workers = _arguments()
    settings.out.mkdir(parents=True, exist_ok=True)
    from tqdm import tqdm

    good, failed = 0, []
    begin = time.monotonic()
    with tqdm(total=episodes, unit="episode", desc=f"{settings.robot} {settings.task}") as bar:
        for result in _results(settings, episodes, first, workers):
            if result.success:
                good += 1
                bar.update()
            else:
                failed.append(result)
                tqdm.write(f"seed {result.seed} dropped: {result.detail}", file=sys.stderr)
            bar.set_postfix(dropped=len(failed))
    size = sum(f.stat().st_size for f in settings.out.rglob("*") if f.is_file())
    print(
        f"{good} episodes in {settings.out}, {len(failed)} dropped, {size / 1e6:.0f} MB, "
        f"{time.monotonic() - begin:.0f} s"
    )


def _results(settings: Settings, episodes: int, first: int, workers: int) -> Iterator[Result]:
    """Results of the seeds from `first` on until `episodes` are good, with no more begun than needed."""
    seeds = itertools.count(first)
    if workers <= 1:
        good = 0
        while good < episodes:
            result = _run(settings, next(seeds))
            good += result.success
            yield result
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running = {pool.submit(_run, settings, next(seeds)) for _ in range(episodes)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                if not result.success:
                    running.add(pool.submit(_run, settings, next(seeds)))
                yield result


_worlds: dict[str, object] = {}


def _run(settings: Settings, seed: int) -> Result:
    """One seed, in a process that keeps its world."""
    folder = settings.folder(seed)
    if (folder / "metadata.yaml").is_file():
        return Result(seed, True, "there already", 0.0)
    if folder.is_dir():  # cut off by an interruption
        shutil.rmtree(folder)
    if settings.robot not in _worlds:
        from vla_sim.world import make_world

        _worlds[settings.robot] = make_world(settings.robot, settings.task)
    return demonstrate(_worlds[settings.robot], seed, settings)


def _arguments() -> tuple[Settings, int, int, int]:
    parser = argparse.ArgumentParser(description="Write demonstrations of a scripted expert as rosbag2 folders.")
    parser.add_argument("--robot", default="panda", help="robot description, name or file")
    parser.add_argument("--task", default="pick", help="task of its world")
    parser.add_argument("--episodes", type=int, default=300, help="successful episodes to write")
    parser.add_argument("--seed", type=int, default=1000, help="first seed")
    parser.add_argument("--out", type=Path, required=True, help="folder for the bags")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--camera-rate", type=float, default=None, help="Hz; default: the cameras' own")
    parser.add_argument("--noise", type=float, default=0.0, help="largest disturbance of a joint, rad (std. dev.)")
    parser.add_argument("--start", default="home", choices=["home", "anywhere", "mixed"], help="start pose (table)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="task option")
    given = parser.parse_args()
    options = []
    for option in given.option:
        key, separator, value = option.partition("=")
        if not separator:
            parser.error(f"--option: expected KEY=VALUE, found {option!r}")
        options.append((key, value))
    settings = Settings(given.robot, given.task, given.out, given.camera_rate, given.noise, given.start, tuple(options))
    # With several processes each draws with one thread of software rendering.
    if given.workers > 1:
        os.environ.setdefault("LP_NUM_THREADS", "0")
    return settings, given.episodes, given.seed, given.workers


if __name__ == "__main__":
    main()
