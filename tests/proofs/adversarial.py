"""Proof 1: drives into everything; what is sent is judged by the meshes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from vla_control.safety import State

from proofs.cells import LIMIT_KINDS, Rig, judge_paths, load_cell, load_oracle, random_start, watched
from proofs.drives import ONE_ARM, TWO_ARMS, Attacker

#: Length of a run, s.
SECONDS = 3.0
#: What a watched pair may be nearer than its margin, m.
SLACK = 1e-3
#: A pair was driven close when it came within this of its margin, m.
CLOSE = 0.01


@dataclass(frozen=True)
class Verdict:
    """Of one run. distance: smallest of all pairs, m, and its pair; short: most by which a watched pair was nearer than
    its margin, m (negative: by how much it stayed clear); violations: of limits, by kind; close: how many pairs that
    began farther off came within `CLOSE` of their margin; travel: of the joint that moved most, rad, arms summed."""

    run: int
    kind: str
    distance: float
    nearest: str
    penetrations: int
    short: float
    short_pair: str
    violations: dict[str, int]
    states: dict[str, int]
    refused: int
    travel: float
    configurations: int
    close: int

    @property
    def passed(self) -> bool:
        return self.penetrations == 0 and self.short <= SLACK and not any(self.violations.values())


def run_attack(robot_name: str, run: int, seconds: float = SECONDS, walls: bool = False) -> Verdict:
    """Run number `run`: its kind, start and drive follow from the number."""
    robot, oracle = load_cell(robot_name, walls), load_oracle(robot_name, walls)
    kinds = TWO_ARMS if len(robot.arms) > 1 else ONE_ARM
    kind, rng = kinds[run % len(kinds)], np.random.default_rng([1, run])
    rig = Rig(robot, start=random_start(oracle, rng))
    attacker = Attacker(rig, oracle, kind, rng)
    refused = 0
    for _ in range(round(seconds / rig.period)):
        if rig.controller.state in (State.STOPPED, State.FAULT):
            rig.arm()
        refused += bool(rig.step(rig.command(attacker.command())).refused)
    return judge_run(run, kind, rig, oracle, refused)


def judge_run(run: int, kind: str, rig: Rig, oracle, refused: int) -> Verdict:
    between = 0 if rig.period < 0.006 else 1
    nearest = np.full(len(oracle.pairs), np.inf)
    configurations, travel = 0, 0.0
    began = oracle.distances({arm.name: rig.paths[0].array(arm.name)[0] for arm in rig.robot.arms})
    for path in rig.paths:
        steps = {arm.name: path.array(arm.name) for arm in rig.robot.arms}
        distances = oracle.path_distances(steps, between=between)
        nearest = np.minimum(nearest, distances.min(axis=0))
        configurations += len(distances)
        travel += sum(float(np.abs(np.diff(q, axis=0)).sum(0).max()) for q in steps.values())
    counts, _ = judge_paths(rig)
    close = int(((nearest < oracle.margins() + CLOSE) & (began > oracle.margins() + CLOSE)).sum())
    short = np.where(watched(oracle), oracle.margins() - nearest, -np.inf)
    states = [decision.state.name for decision in rig.history]
    return Verdict(
        run, kind, float(nearest.min()), oracle.pairs[int(nearest.argmin())].name, int((nearest <= 0.0).sum()),
        float(short.max()), oracle.pairs[int(short.argmax())].name, {k: counts[k] for k in LIMIT_KINDS},
        {name: states.count(name) for name in sorted(set(states))}, refused, travel, configurations, close,
    )  # fmt: skip
