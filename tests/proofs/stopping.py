"""Proofs 3 and 5: a policy that dies in mid-motion; going on after a hand has moved the arms; arms that lag."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from vla_control.command import ArmCommand
from vla_control.safety import State
from vla_core.kinematics import Kinematics

from proofs.cells import LIMIT_KINDS, Rig, at_rest, judge_paths, load_cell, load_oracle, needed, random_start

#: Where motion may begin at most from where the arm is measured, rad and m (issue: "First command and resume guards").
JOINT, TOOL = 0.01, 1e-3
#: A joint that moves less than this in a period is at rest, rad.
STILL = 1e-9


class Wander:
    """Smooth motion of all arms, in tool deltas or joint targets: a policy that behaves."""

    def __init__(self, rig: Rig, rng: np.random.Generator, joints: bool = False):
        self.rig, self.joints = rig, joints
        self._start = {a.name: rig.controller.target(a.name).position for a in rig.robot.arms}
        self._begin = rig.now
        self._waves = {
            a.name: (
                rng.uniform(0.2, 0.8, 6),
                rng.uniform(0, 2 * np.pi, 6),
                0.6 * min(0.5, a.tool_limits.speed) * rng.normal(size=3) / np.sqrt(3),
                0.3 * a.tool_limits.rotation * rng.normal(size=3) / np.sqrt(3),
                0.2 * rng.normal(size=len(a.joints)),
                rng.uniform(0.2, 0.6, len(a.joints)),
            )
            for a in rig.robot.arms
        }

    def command(self) -> dict[str, ArmCommand]:
        t = self.rig.now + self.rig.period - self._begin
        parts = {}
        for arm in self.rig.robot.arms:
            rate, phase, speed, turn, size, pace = self._waves[arm.name]
            if self.joints:
                q = self._start[arm.name] + size * (1.0 - np.cos(2 * np.pi * pace * t))
                at = self.rig.controller.target(arm.name).position  # an arm that is held up is waited for
                q = np.clip(q, np.maximum(arm.limits.lower, at - 0.4), np.minimum(arm.limits.upper, at + 0.4))
                parts[arm.name] = ArmCommand(joints=q)
            else:
                rising = min(1.0, 2.0 * t)
                twist = rising * np.concatenate([speed, turn]) * np.sin(2 * np.pi * rate * t + phase)
                parts[arm.name] = ArmCommand(delta=twist * self.rig.period)
        return parts


@dataclass(frozen=True)
class KillVerdict:
    """late: s from the time-out to the decision (within one control period is due); apart: periods between the arms'
    coming to rest; speed: of the fastest joint when the stop was decided, rad/s."""

    run: int
    late: float
    in_time: bool
    apart: int
    violations: dict[str, int]
    brake_time: float
    speed: float
    moving_on: bool

    @property
    def passed(self) -> bool:
        return self.in_time and self.apart == 0 and not any(self.violations.values()) and not self.moving_on


def run_kill(robot_name: str, run: int) -> KillVerdict:
    """A policy that dies while the arms move: no command comes any more."""
    robot, oracle = load_cell(robot_name), load_oracle(robot_name)
    rng = np.random.default_rng([3, run])
    rig = Rig(robot, start=random_start(oracle, rng))
    policy, newest = Wander(rig, rng, joints=run % 2 == 1), 0.0
    for k in range(int(rng.integers(40, 160)) + 200):
        decision = rig.step(rig.command(policy.command()))
        if not decision.refused:
            newest = rig.now - rig.period
        moving = all(np.abs(t.velocity).max() > 0.02 for t in decision.sent.values())
        if k > 40 and moving and decision.state == State.RUNNING and rng.random() < 0.05:
            break
    timeout = rig.controller.limits.command_timeout
    decided = None
    for _ in range(round((timeout + 3.0) / rig.period)):
        now = rig.now
        decision = rig.step()
        if decided is None and decision.state != State.RUNNING:
            decided, first = now, len(rig.history) - 1
        if decided is not None and decision.state not in (State.RUNNING, State.STOPPING):
            break
    counts, _ = judge_paths(rig)
    if decided is None:
        return KillVerdict(run, np.inf, False, 0, counts, np.inf, 0.0, True)
    late = decided - newest - timeout
    rest = []
    for arm in robot.arms:
        sent = np.array([d.sent[arm.name].position for d in rig.history[first - 1 :]])
        moving = (np.abs(np.diff(sent, axis=0)) > STILL).any(1)
        rest.append(max((k + 1 for k, m in enumerate(moving) if m), default=0))
    speed = max(float(np.abs(t.velocity).max()) for t in rig.history[first - 1].sent.values())
    return KillVerdict(
        run, late, -1e-6 <= late <= rig.period + 1e-6, max(rest) - min(rest), {k: counts[k] for k in LIMIT_KINDS},
        max(rest) * rig.period, speed, bool(moving[-1]),
    )  # fmt: skip


@dataclass(frozen=True)
class ResumeVerdict:
    """moved: how far the hand moved the arms, rad, and the tools, m. began: motion began; step, tool_step: of the
    first moving target from the measured, rad and m; refused: the command was, and the arms stayed."""

    run: int
    rearmed: bool
    moved: float
    tool_moved: float
    began: bool
    step: float
    tool_step: float
    refused: str

    @property
    def passed(self) -> bool:
        good = self.step <= JOINT + 1e-9 and self.tool_step <= TOOL + 1e-9 if self.began else not self.rearmed
        return good


def run_resume(robot_name: str, run: int) -> ResumeVerdict:
    """Hold, be moved by hand, be commanded again; every second run is armed again in between.

    Without arming, motion may begin only where the arm is measured; else the commands are refused and the arms stay.
    After arming the commands must be followed.
    """
    robot, oracle = load_cell(robot_name), load_oracle(robot_name)
    rng = np.random.default_rng([5, run])
    rearm = run % 2 == 1
    rig = Rig(robot, start=random_start(oracle, rng))
    policy = Wander(rig, rng)
    for _ in range(80):
        rig.step(rig.command(policy.command()))
    for _ in range(round(3.0 / rig.period)):
        if at_rest(rig.step()) and rig.controller.state == State.HOLDING:
            break
    sent = {a.name: rig.controller.target(a.name).position for a in robot.arms}
    for _ in range(100):
        size = 10.0 ** rng.uniform(-4.0, -0.3)
        moved = {}
        for arm in robot.arms:
            way = rng.normal(size=len(arm.joints))
            q = sent[arm.name] + size * way / np.abs(way).max()
            moved[arm.name] = np.clip(q, arm.limits.lower, arm.limits.upper)
        if (oracle.distances(moved) > needed(oracle)).all():
            break
    kinematics = Kinematics(robot)
    frames = {a.name: kinematics.forward(a.name, sent[a.name])[:3, 3] for a in robot.arms}
    frames = [np.linalg.norm(kinematics.forward(n, moved[n])[:3, 3] - p) for n, p in frames.items()]
    for _ in range(5):
        _hold_moved(rig, moved, None)
    if rearm:
        if rig.controller.state not in (State.HOLDING, State.STOPPED, State.FAULT):
            raise RuntimeError(f"expected arms at rest, found {rig.controller.state.name}")
        rig.move_by_hand(moved)
        rig.arm()
    start = {a.name: rig.controller.target(a.name).position for a in robot.arms}
    policy, refused, began, step, tool_step = Wander(rig, rng, joints=run % 4 > 1), "", False, 0.0, 0.0
    for _ in range(60):
        decision = _hold_moved(rig, moved, rig.command(policy.command()))
        refused = refused or decision.refused
        changed = [n for n, t in decision.sent.items() if np.abs(t.position - start[n]).max() > 1e-12]
        if changed and not all(np.array_equal(decision.sent[n].position, moved[n]) for n in changed):
            began = True
            for name, target in decision.sent.items():
                step = max(step, float(np.abs(target.position - moved[name]).max()))
                ways = (kinematics.forward(name, target.position), kinematics.forward(name, moved[name]))
                tool_step = max(tool_step, float(np.linalg.norm(ways[0][:3, 3] - ways[1][:3, 3])))
            break
    share = max(float(np.abs(moved[n] - sent[n]).max()) for n in moved)
    return ResumeVerdict(run, rearm, share, max(map(float, frames)), began, step, tool_step, refused)


def _hold_moved(rig: Rig, moved, command):
    """A step in which the arms are measured where a hand holds them, whatever they are sent."""
    rig.move_by_hand(moved)
    return rig.step(command)


@dataclass(frozen=True)
class LagVerdict:
    """difference: largest between what is sent with and without lag, rad; stops: of the lagging run."""

    run: int
    difference: float
    stops: int
    refused: int

    @property
    def passed(self) -> bool:
        return self.difference == 0.0 and self.stops == 0 and self.refused == 0


def run_lag(robot_name: str, run: int, lag: float = 0.1, seconds: float = 4.0) -> LagVerdict:
    """The same motion of arms that follow at once, and of arms that follow `lag` (s) late."""
    robot, oracle = load_cell(robot_name), load_oracle(robot_name)
    start = random_start(oracle, np.random.default_rng([6, run]))
    sent, stops, refused = [], 0, 0
    for late in (0, round(lag * robot.rates.control)):
        rig = Rig(robot, start=start, lag=late)
        policy = Wander(rig, np.random.default_rng([7, run]), joints=run % 2 == 1)
        for _ in range(round(seconds / rig.period)):
            refused += bool(rig.step(rig.command(policy.command())).refused)
        sent.append(np.concatenate([rig.paths[0].array(a.name) for a in robot.arms], axis=1))
        stops += rig.controller.stops.total()
    same = sent[0].shape == sent[1].shape
    return LagVerdict(run, float(np.abs(sent[0] - sent[1]).max()) if same else np.inf, stops, refused)
