"""Proof 6: what a step costs where it is hardest, with links of all arms close to each other."""

from __future__ import annotations

import gc
import time

import numpy as np
from vla_control.command import Command
from vla_control.safety import Measured, SafetyController

from proofs.cells import Rig, load_cell, load_oracle, random_start
from proofs.drives import Attacker

#: Drives that are replayed, and the steps of each that are not counted.
MANNERS = {1: ("links", "table", "wild"), 2: ("tools", "others", "wild")}
WARM_UP, DRIVE = 20, 220


def record_drive(robot_name: str, kind: str, run: int) -> tuple[dict, list[dict]]:
    """Start and commands of a drive, to be replayed without the oracle between the steps."""
    robot, oracle = load_cell(robot_name), load_oracle(robot_name)
    rng = np.random.default_rng([9, run])
    start = random_start(oracle, rng)
    rig = Rig(robot, start=start)
    attacker = Attacker(rig, oracle, kind, rng)
    parts = []
    for _ in range(DRIVE):
        parts.append(attacker.command())
        rig.step(rig.command(parts[-1]))
    return start, parts


def compute_something() -> None:
    """A fixed computation of some 0.5 ms of the same kind as a step: small arrays and plain Python."""
    matrix = 0.1 * np.eye(7)
    for _ in range(100):
        matrix = matrix @ matrix * 0.1 + 0.1
        sum(range(20))


def time_steps(robot_name: str, kind: str, steps: int) -> dict:
    """Wall time of a step in drives of one kind, its own processor time, and a yardstick between the steps, ms."""
    robot = load_cell(robot_name)
    times, owned, yardstick, near, limited, states = [], [], [], 0, 0, {}
    run = 0
    while len(times) < steps:
        start, drive = record_drive(robot_name, kind, run)
        run += 1
        controller = SafetyController(robot)
        gripper = {arm.name: 1.0 for arm in robot.arms if arm.gripper}
        position = start
        controller.arm(Measured(0.0, position, gripper))
        gc.collect()
        gc.freeze()
        for k, parts in enumerate(drive):
            now = k * controller.period
            command = Command(now, k + 1, "bench", controller.period, False, parts)
            measured = Measured(now, position, gripper)
            own = time.thread_time()
            begin = time.perf_counter()
            decision = controller.step(command, measured, now)
            end = time.perf_counter()
            own = time.thread_time() - own
            compute_something()
            position = position | {name: target.position for name, target in decision.sent.items()}
            if k < WARM_UP:
                continue
            times.append(end - begin)
            owned.append(own)
            yardstick.append(time.perf_counter() - end)
            near += bool(np.isfinite(getattr(decision, "distance", np.inf)))
            limited += any("collision" in names for names in decision.limited.values())
            states[decision.state.name] = states.get(decision.state.name, 0) + 1
        gc.unfreeze()
    used = np.percentile(np.array(owned) * 1e3, [50, 99])
    own = np.percentile(np.array(times) * 1e3, [50, 99, 100])
    bare = np.percentile(np.array(yardstick) * 1e3, [50, 99])
    return {
        "robot": robot_name, "joints": len(robot.joint_names), "drive": kind, "steps": len(times),
        "near": round(near / len(times), 3), "limited_by_collision": round(limited / len(times), 3), "states": states,
        "median_ms": round(float(own[0]), 3), "p99_ms": round(float(own[1]), 3), "max_ms": round(float(own[2]), 3),
        "own_median_ms": round(float(used[0]), 3), "own_p99_ms": round(float(used[1]), 3),
        "yardstick_median_ms": round(float(bare[0]), 3), "yardstick_p99_ms": round(float(bare[1]), 3),
    }  # fmt: skip
