"""Every execution strategy against every inference delay, in lock-step simulation.

    ./vla bench execution
    ./vla bench execution policy:=panda_pick episodes:=50 strategies:=naive,rtc_guided delays:=0,200,jitter

The world goes through the very safety controller and the very executor of the running graph; only the transport is
missing, so the delay is exactly the injected one, whatever this machine's speed. A chunk of an observation made at t
arrives at t + 30 ms (the observation's own age when it is used) + the injected delay.

Policies: a checkpoint of models/checkpoints/ (or a folder), run by ONNX Runtime; or `oracle`, which needs none: the
scripted expert followed from the measured state, that takes one of two ways round (+- 2.5 cm) anew in every chunk, as
a policy trained on demonstrations of both would. Its guidance is what a perfect guided sampler would give.

Columns: success; boundary step = jump of the target when a chunk replaces another (median, largest); peak speed,
acceleration, jerk of the commanded tool (largest of an episode, median over episodes; positions differentiated at the
control rate); empty ticks = control periods without a plan, per episode; command age = command minus observation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from vla_control import command as control
from vla_control.safety import SafetyController, SafetyDecision
from vla_core import se3
from vla_core.robot import load_robot
from vla_execution.chunk import Chunk, resampled
from vla_execution.executor import Executor, ExecutorCommand
from vla_execution.goal import ArmStatus, Status
from vla_execution.layout import Layout
from vla_execution.rtc import prefix_weights
from vla_execution.strategies import STRATEGIES, ExecutionConfig, RequestPlan
from vla_sim.experts import make_expert
from vla_sim.rollout import joint_targets, measure
from vla_sim.world import World, make_world

ROOT = Path(__file__).resolve().parents[2]
#: From an observation's reference time to its use, s.
OBSERVATION_AGE = 0.03
#: Injected delay of "jitter": uniform, anew for every inference, s.
JITTER = (0.05, 0.40)
DELAYS = "0,50,100,200,400,800,jitter"


# -------------------------------------------------------------------------------------------------------- policies


class Oracle:
    """The expert's way followed from the measured state, with two ways round. See the module's text."""

    period, horizon, guidance, kind = 0.05, 32, ("guided", "prefix"), ""
    SPREAD, SETTLE, GRID = 0.025, 0.5, 0.02  # m, s, s

    def start(self, world: World, seed: int) -> None:
        expert = make_expert(world)
        begin = world.time
        self.kind = expert.kind
        widths = widths_of(world.robot, self.kind) or (8,) * len(world.robot.arms)
        self._layout = Layout(self.kind, world.robot.arm_names, widths)
        self._times = np.arange(0.0, world.episode.time_limit + 2.0, self.GRID)
        self._way = np.array([expert.target(begin + t) for t in self._times])
        self._free = 1.0 - np.array([expert.steadiness(begin + t) for t in self._times])
        self._rng = np.random.default_rng([seed, 7])
        self._phase, self._seen = 0.0, begin

    def infer(self, world: World, decision: SafetyDecision | None, plan: RequestPlan) -> np.ndarray:
        now = world.time
        state = self._state(world, decision)
        self._advance(state, now)
        t = self.period * np.arange(self.horizon)
        index = np.minimum(np.round((self._phase + t) / self.GRID).astype(int), len(self._way) - 1)
        targets = self._way[index].copy()
        settled = np.clip(t / self.SETTLE, 0.0, 1.0)
        settled = settled**2 * (3 - 2 * settled)
        way = self._rng.choice([-1.0, 1.0])
        if self.kind == "pose":
            for part in self._layout.slices.values():
                y = part.start + 1
                away = state[part.start : y + 2] - targets[0, part.start : y + 2]
                targets[:, part.start : y + 2] += (1 - settled)[:, None] * away
                targets[:, y] += self._free[index] * settled * self.SPREAD * way
        if plan.remainder is None or not plan.guidance:
            return targets
        return self._guided(targets, plan, now)

    def _guided(self, targets: np.ndarray, plan: RequestPlan, now: float) -> np.ndarray:
        old = resampled(plan.remainder, now, self.period, self.horizon)
        if len(old) == 0:
            return targets
        if plan.guidance == "prefix":
            weights = (np.arange(self.horizon) < min(plan.delay, len(old))).astype(float)
        else:
            s = min(max(plan.execution_horizon, self.horizon - len(old)), self.horizon)
            weights = prefix_weights(self.horizon, plan.delay, s, plan.schedule)
        old = np.concatenate([old, np.repeat(old[-1:], self.horizon - len(old), axis=0)])
        layout, out = self._layout, targets.copy()
        out[:, layout.linear] += weights[:, None] * (old - targets)[:, layout.linear]
        for q in layout.quaternions:
            out[:, q] = se3.slerp(targets[:, q], old[:, q], weights)
        out[:, layout.grippers] = np.where(weights[:, None] > 0.5, old, targets)[:, layout.grippers]
        return out

    def _advance(self, state: np.ndarray, now: float) -> None:
        """The phase of the way nearest to the state, between the last one and what time allows."""
        first = round(self._phase / self.GRID)
        last = min(round((self._phase + now - self._seen + 0.1) / self.GRID), len(self._way) - 1)
        rows, layout = self._way[first : last + 1], self._layout
        unit = 0.02 if self.kind == "pose" else 0.05  # m, rad
        away = np.sum(((rows - state)[:, layout.linear] / unit) ** 2, axis=1)
        away += np.sum(((rows - state)[:, layout.grippers] / 0.5) ** 2, axis=1)
        for q in layout.quaternions:
            away += 50 * (1 - np.abs(rows[:, q] @ state[q]))
        nearest = first + np.flatnonzero(away <= away.min() + 0.01)[-1]
        self._phase, self._seen = nearest * self.GRID, now

    def _state(self, world: World, decision: SafetyDecision | None) -> np.ndarray:
        """The measured state in the target layout, with the commanded opening: what is held keeps fingers apart."""
        positions, parts = world.positions(), []
        for arm in world.robot.arms:
            pose = se3.matrix_to_pose(world.tool_pose(arm.name))
            parts.append(pose if self.kind == "pose" else [positions[j] for j in arm.joints])
            parts.append([decision.sent[arm.name].gripper if decision else arm.gripper.opening(positions)])
        return np.concatenate(parts)


class Learned:
    """A checkpoint on ONNX Runtime."""

    def __init__(self, path: Path, threads: int):
        import vla_models

        self._policy = vla_models.load(path, runtime="onnx", threads=threads)
        spec = self._policy.spec
        self.period, self.horizon, self.guidance = spec.period, spec.horizon, spec.guidance
        self.kind = spec.action_space.kind

    def start(self, world: World, seed: int) -> None:
        self._seed, self._count = seed, 0

    def infer(self, world: World, decision: SafetyDecision | None, plan: RequestPlan) -> np.ndarray:
        from vla_models.policy import ArmState, InferenceRequest, PolicyObservation

        spec, now, positions = self._policy.spec, world.time, world.positions()
        observation = PolicyObservation(
            images={name: world.render(name) for name in spec.cameras},
            state={
                arm.name: ArmState(
                    joints=np.array([positions[j] for j in arm.joints]),
                    tool=se3.matrix_to_pose(world.tool_pose(arm.name)),
                    gripper=arm.gripper.opening(positions),
                )
                for arm in world.robot.arms
            },
            instruction=world.episode.instruction,
            time=now,
        )
        remainder = None
        if plan.remainder is not None:
            sampled = resampled(plan.remainder, now, spec.period, spec.horizon)
            remainder = sampled if len(sampled) else None
        self._count += 1
        request = InferenceRequest(
            remainder=remainder, delay=plan.delay, execution_horizon=plan.execution_horizon,
            guidance=plan.guidance if remainder is not None else "", schedule=plan.schedule, beta=plan.beta,
            seed=1000 * self._seed + self._count,
        )  # fmt: skip
        return self._policy.infer(observation, request).targets


def make_policy(name: str, threads: int = 1) -> Oracle | Learned:
    if name == "oracle":
        return Oracle()
    path = Path(name)
    return Learned(path if path.is_dir() else ROOT / "models" / "checkpoints" / name, threads)


# -------------------------------------------------------------------------------------------------------- one episode


@dataclass(frozen=True)
class Case:
    """One episode to run. delay in s; None: jitter."""

    strategy: str
    delay: float | None
    seed: int


def run_episode(world: World, policy: Oracle | Learned, case: Case, config: ExecutionConfig, options: dict) -> dict:
    """Run one episode to its outcome; its numbers, series as lists."""
    world.reset(None, case.seed, options)
    policy.start(world, case.seed)
    robot = world.robot
    rng = np.random.default_rng([case.seed, 11])
    controller, executor = SafetyController(robot), Executor(robot, case.strategy, config)
    controller.arm(measure(world))
    decision, pending, commanded, limited = None, [], [], 0
    while not (world.outcome().failed or world.outcome().success):
        now = world.time
        while pending and pending[0][0] <= now + 1e-9:
            executor.on_chunk(pending.pop(0)[1], now)
        command = executor.tick(now, status_of(decision, now))
        request = executor.poll_request(now)
        if request is not None:
            targets = policy.infer(world, decision, request.plan)
            chunk = Chunk(targets, now, policy.period, policy.kind, robot.arm_names, widths_of(robot, policy.kind),
                          observed=now, frame=robot.base_frame, id=request.id)  # fmt: skip
            delay = rng.uniform(*JITTER) if case.delay is None else case.delay
            pending.append((now + OBSERVATION_AGE + delay, chunk))
        decision = controller.step(command_of(command), measure(world), now)
        commanded.append([decision.commanded[arm.name][:3, 3] for arm in robot.arms])
        limited += any(decision.limited.values())
        world.set_targets(joint_targets(robot, decision))
        world.step()
    metrics, way = executor.metrics, np.array(commanded)
    rates = {n: largest(np.diff(way, n=n, axis=0) / world.period**n) for n in (1, 2, 3)}
    return {
        "strategy": case.strategy, "delay_ms": "jitter" if case.delay is None else round(1e3 * case.delay),
        "seed": case.seed, "success": world.outcome().success, "detail": world.outcome().detail,
        "duration_s": world.elapsed, "boundary_m": metrics.boundary_translation,
        "boundary_rad": metrics.boundary_rotation, "peak_speed": rates[1], "peak_acceleration": rates[2],
        "peak_jerk": rates[3], "empty_ticks": metrics.empty_ticks, "command_age": metrics.command_age,
        "chunks": metrics.chunks, "refused": metrics.refused, "speed_limited_ticks": metrics.limited_ticks,
        "controller_limited_ticks": limited,
    }  # fmt: skip


def largest(vectors: np.ndarray) -> float:
    return float(np.linalg.norm(vectors, axis=-1).max()) if len(vectors) else 0.0


def widths_of(robot, kind: str) -> tuple[int, ...]:
    return tuple(len(arm.joints) + 1 for arm in robot.arms) if kind == "joint" else ()


def status_of(decision: SafetyDecision | None, now: float) -> Status | None:
    """The safety status of the period before, as the executor of the running graph has it."""
    if decision is None:
        return None
    arms = {
        name: ArmStatus(decision.goal[name], target.position, target.gripper) for name, target in decision.sent.items()
    }
    return Status(now, decision.state.name.lower(), decision.source, decision.sequence, arms)


def command_of(command: ExecutorCommand | None) -> control.Command | None:
    if command is None:
        return None
    arms = {name: control.ArmCommand(m.delta, m.joints, m.gripper) for name, m in command.arms.items()}
    return control.Command(command.stamp, command.sequence, "executor", command.period, command.hold, arms)


# ------------------------------------------------------------------------------------------------------- many episodes

_worker: dict[str, Any] = {}


def begin_worker(robot: str, task: str | None, policy: str, config: ExecutionConfig, options: dict) -> None:
    _worker["world"] = make_world(load_robot(robot), task)
    _worker["policy"] = make_policy(policy)
    _worker["config"], _worker["options"] = config, options


def work(case: Case) -> dict:
    return run_episode(_worker["world"], _worker["policy"], case, _worker["config"], _worker["options"])


def summary(episodes: list[dict]) -> dict:
    """One row of the table."""

    def series(name: str, scale: float) -> dict[str, float | None]:
        values = np.concatenate([np.atleast_1d(e[name]) for e in episodes]) * scale
        if len(values) == 0:
            return {"median": None, "p99": None, "max": None}
        return {"median": float(np.median(values)), "p99": float(np.percentile(values, 99)), "max": float(values.max())}

    return {
        "strategy": episodes[0]["strategy"], "delay_ms": episodes[0]["delay_ms"], "episodes": len(episodes),
        "success_rate": float(np.mean([e["success"] for e in episodes])),
        "boundary_step_mm": series("boundary_m", 1e3), "boundary_step_deg": series("boundary_rad", 180 / np.pi),
        "peak_speed_m_s": series("peak_speed", 1.0), "peak_acceleration_m_s2": series("peak_acceleration", 1.0),
        "peak_jerk_m_s3": series("peak_jerk", 1.0), "empty_ticks": float(np.mean([e["empty_ticks"] for e in episodes])),
        "command_age_ms": series("command_age", 1e3), "duration_s": float(np.mean([e["duration_s"] for e in episodes])),
        "refused": int(sum(e["refused"] for e in episodes)),
        "speed_limited_ticks": float(np.mean([e["speed_limited_ticks"] for e in episodes])),
        "seeds_failed": [e["seed"] for e in episodes if not e["success"]],
    }  # fmt: skip


HEADER = (
    f"{'strategy':18}{'delay':>7}{'success':>9}{'boundary mm':>15}{'deg':>13}{'speed':>8}{'acc':>8}{'jerk':>8}"
    f"{'empty':>7}{'age ms':>13}{'s':>7}\n"
    f"{'':18}{'ms':>7}{'%':>9}{'med / max':>15}{'med / max':>13}{'m/s':>8}{'m/s2':>8}{'m/s3':>8}"
    f"{'ticks':>7}{'med / max':>13}{'':>7}"
)


def line(row: dict) -> str:
    def pair(values: dict, digits: int) -> str:
        if values["median"] is None:
            return "-"
        return f"{values['median']:.{digits}f} / {values['max']:.{digits}f}"

    return (
        f"{row['strategy']:18}{row['delay_ms']:>7}{100 * row['success_rate']:>9.0f}"
        f"{pair(row['boundary_step_mm'], 1):>15}{pair(row['boundary_step_deg'], 1):>13}"
        f"{row['peak_speed_m_s']['median']:>8.2f}{row['peak_acceleration_m_s2']['median']:>8.1f}"
        f"{row['peak_jerk_m_s3']['median']:>8.0f}{row['empty_ticks']:>7.0f}{pair(row['command_age_ms'], 0):>13}"
        f"{row['duration_s']:>7.1f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robot", default="panda", help="robot description (default panda)")
    parser.add_argument("--task", default=None, help="task of its world (default the world's first)")
    parser.add_argument("--options", default="", help="task options, key=value,... (default none)")
    parser.add_argument("--policy", default="oracle", help="checkpoint name or folder, or oracle (default)")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="comma-separated (default all)")
    parser.add_argument("--delays", default=DELAYS, help=f"ms or jitter, comma-separated (default {DELAYS})")
    parser.add_argument("--episodes", type=int, default=10, help="per strategy and delay (default 10)")
    parser.add_argument("--seed", type=int, default=100_000, help="of the first episode (default 100000)")
    parser.add_argument("--execution_horizon", type=int, default=8, help="steps between inferences (default 8)")
    parser.add_argument("--schedule", default="exp", help="soft mask of rtc_guided (default exp)")
    parser.add_argument("--beta", type=float, default=5.0, help="largest guidance weight (default 5)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write (default none)")
    given = parser.parse_args()

    strategies = given.strategies.split(",")
    unknown = sorted(set(strategies) - set(STRATEGIES))
    if unknown:
        parser.error(f"strategies: expected some of {sorted(STRATEGIES)}, found {unknown}")
    delays = [None if d == "jitter" else float(d) / 1e3 for d in given.delays.split(",")]
    options = dict(o.split("=", 1) for o in given.options.split(",") if o)
    config = ExecutionConfig(given.execution_horizon, schedule=given.schedule, beta=given.beta)

    guidance = make_policy(given.policy).guidance
    for name in [s for s in strategies if STRATEGIES[s].guidance and STRATEGIES[s].guidance not in guidance]:
        print(f"{name}: left out, {given.policy} does not support {STRATEGIES[name].guidance!r}")
        strategies.remove(name)
    cases = [
        Case(s, d, given.seed + k) for s in strategies for d in delays for k in range(given.episodes)
    ]  # fmt: skip
    begin, rows, episodes = time.monotonic(), [], []
    print(HEADER)
    arguments = (given.robot, given.task, given.policy, config, options)
    with multiprocessing.get_context("spawn").Pool(given.workers, begin_worker, arguments) as pool:
        for done, episode in enumerate(pool.imap(work, cases), start=1):
            episodes.append(episode)
            if sys.stderr.isatty():
                left = (time.monotonic() - begin) / done * (len(cases) - done)
                print(f"\r{done}/{len(cases)} episodes, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
            if done % given.episodes == 0:
                rows.append(summary(episodes[-given.episodes :]))
                print(("\r\033[K" if sys.stderr.isatty() else "") + line(rows[-1]), flush=True)
    arms = load_robot(given.robot).arms
    report = {
        "benchmark": "execution", "robot": given.robot, "task": given.task, "policy": given.policy,
        "episodes": given.episodes, "seed": given.seed, "execution_horizon": given.execution_horizon,
        "schedule": given.schedule, "beta": given.beta, "observation_age_ms": 1e3 * OBSERVATION_AGE,
        "jitter_ms": [1e3 * j for j in JITTER], "tool_speed_limit_m_s": min(a.tool_limits.speed for a in arms),
        "wall_s": round(time.monotonic() - begin, 1), "rows": rows,
    }  # fmt: skip
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"written: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
