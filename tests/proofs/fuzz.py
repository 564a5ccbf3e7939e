"""Proof 2: whatever is commanded and measured, what is sent keeps every limit of every joint."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
from vla_control.command import ArmCommand, Command, CommandRefused
from vla_control.safety import Measured, State

from proofs.cells import LIMIT_KINDS, Rig, judge_paths, load_cell

#: Commands given in each control period: all but the last by `offer`, as commands that came together.
BURST = 4
#: Periods for which an attack goes on in one manner.
STRETCH = 120


@dataclass
class FuzzVerdict:
    """commands: how many were given; worst: the most that was used of a limit, by kind (position: rad outside)."""

    commands: int = 0
    periods: int = 0
    taken: int = 0
    histories: int = 0
    violations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMIT_KINDS, 0))
    not_finite: int = 0
    worst: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LIMIT_KINDS, 0.0))
    states: Counter = field(default_factory=Counter)
    refusals: Counter = field(default_factory=Counter)

    @property
    def passed(self) -> bool:
        return not any(self.violations.values()) and not self.not_finite

    def add(self, other: FuzzVerdict) -> None:
        for name in ("commands", "periods", "taken", "histories", "not_finite"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind in LIMIT_KINDS:
            self.violations[kind] += other.violations[kind]
            self.worst[kind] = max(self.worst[kind], other.worst[kind])
        self.states += other.states
        self.refusals += other.refusals


class Fuzzer:
    """Stretches of hard driving, strewn with commands that no sound sender makes, broken joint states, a clock that
    jumps, stops, and arming where the arms are or where a hand put them, sometimes beyond a limit."""

    def __init__(self, rig: Rig, rng: np.random.Generator):
        self.rig, self.rng = rig, rng
        self.commands = 0
        self._speed = {}

    def run(self, commands: int) -> None:
        rig, rng, k = self.rig, self.rng, 0
        while self.commands < commands:
            if k % STRETCH == 0:
                self._turn()
            k += 1
            if rig.controller.state in (State.DISARMED, State.STOPPED, State.FAULT) and rng.random() < 0.3:
                self._arm()
            draw = rng.random()
            if draw < 0.01:
                self._interfere()
            elif draw < 0.012:
                rig.now += rng.choice([-100.0, -0.3, -0.02, 0.015, 0.2, 0.7, 1e6, -1e6])
            for _ in range(BURST - 1):
                rig.controller.offer(self._any_command(), rig.now)
            self.commands += BURST
            rig.step(self._any_command(), self._measured())

    # ---------------------------------------------------------------------------------------------------- inside
    def _turn(self) -> None:
        rng = self.rng
        self._manner = rng.choice(["delta", "joints", "mixed", "slow"])
        for arm in self.rig.robot.arms:
            twist = rng.normal(size=6)
            twist[:3] *= rng.choice([0.3, 1.0, 4.0]) * arm.tool_limits.speed
            twist[3:] *= rng.choice([0.0, 0.3, 3.0]) * arm.tool_limits.rotation
            aim = rng.uniform(arm.limits.lower - 0.3, arm.limits.upper + 0.3)
            self._speed[arm.name] = twist, aim

    def _parts(self) -> dict[str, ArmCommand]:
        rng, parts = self.rng, {}
        for arm in self.rig.robot.arms:
            twist, aim = self._speed[arm.name]
            joints = self._manner == "joints" or (self._manner == "mixed" and rng.random() < 0.5)
            gripper = rng.choice([np.nan, rng.uniform(-0.05, 1.05)])
            if joints:
                q = self.rig.controller.target(arm.name).position
                reach = rng.choice([0.45, 0.05])
                parts[arm.name] = ArmCommand(joints=q + np.clip(aim - q, -reach, reach), gripper=gripper)
            else:
                share = 0.02 if self._manner == "slow" else 1.0
                noise = rng.normal(size=6) * 0.2 * np.abs(twist)
                parts[arm.name] = ArmCommand(delta=share * (twist + noise) * self.rig.period, gripper=gripper)
        return parts

    def _any_command(self) -> Command:
        rig, rng = self.rig, self.rng
        parts = self._parts()
        if rng.random() < 0.7:
            return rig.command(parts)
        name = rng.choice(rig.robot.arm_names)
        n = len(rig.robot.arm(name).joints)
        spoilt = parts[name]
        numbers = np.array(spoilt.delta if spoilt.delta is not None else spoilt.joints)
        numbers[rng.integers(len(numbers))] = rng.choice([np.nan, np.inf, -np.inf, 1e300, -1e9, 1e3])
        key = "delta" if spoilt.delta is not None else "joints"
        choices = (
            lambda: rig.command(parts | {name: replace(spoilt, **{key: numbers})}),
            lambda: rig.command(parts | {name: ArmCommand(delta=rng.normal(size=6) * 10.0)}),
            lambda: rig.command(parts | {name: ArmCommand(joints=rng.normal(size=n) * 10.0)}),
            lambda: rig.command(parts | {name: ArmCommand(delta=np.zeros(rng.choice([0, 5, 7])))}),
            lambda: rig.command(parts | {name: ArmCommand(joints=np.zeros(n + rng.choice([-1, 1])))}),
            lambda: rig.command(parts | {name: ArmCommand()}),
            lambda: rig.command(parts | {name: ArmCommand(delta=np.zeros(6), joints=np.zeros(n))}),
            lambda: rig.command(parts | {name: replace(spoilt, gripper=rng.choice([-9.0, np.inf, 3.0]))}),
            lambda: rig.command(parts | {"other": ArmCommand(delta=np.zeros(6))}),
            lambda: rig.command({}),
            lambda: rig.command({"other": ArmCommand(delta=np.zeros(6))}),
            lambda: rig.command(parts, frame="elsewhere"),
            lambda: rig.command(parts, stamp=rig.now - rng.choice([0.05, 0.5, -0.05, -0.5, 1e9, np.nan, np.inf])),
            lambda: rig.command(
                parts, period=rng.choice([1e-12, 1e-6, 1e-3, 0.05, 0.3, 1.0, 1e9, 0.0, -1.0, np.nan, np.inf])
            ),
            lambda: rig.command(parts, sequence=int(rng.integers(0, 5))),
            lambda: rig.command(parts, source="other"),
            lambda: rig.command({}, hold=True),
        )
        return choices[rng.integers(len(choices))]()

    def _measured(self) -> Measured | None:
        good, draw = self.rig.measured, self.rng.random()
        if draw > 0.01:
            return good
        name = self.rng.choice(self.rig.robot.arm_names)
        broken = good.position[name].copy()
        broken[self.rng.integers(len(broken))] = self.rng.choice([np.nan, np.inf, 1e6])
        choices = (
            None,
            replace(good, position=good.position | {name: broken}),
            replace(good, position=good.position | {name: broken[:-1]}),
            replace(good, position={}),
            replace(good, stamp=self.rng.choice([np.nan, good.stamp - 0.5, good.stamp + 0.5])),
        )
        return choices[self.rng.integers(len(choices))]

    def _interfere(self) -> None:
        controller = self.rig.controller
        choices = (
            lambda: controller.stop(int(self.rng.integers(3)), "fuzz"),
            controller.disarm,
            self._arm,
            self._put_elsewhere,
        )
        choices[self.rng.integers(len(choices))]()

    def _put_elsewhere(self) -> None:
        """A hand moves the arms, which are then armed anew."""
        rng, position = self.rng, {}
        for arm in self.rig.robot.arms:
            low, high = arm.limits.lower, arm.limits.upper
            beyond = 0.1 if rng.random() < 0.3 else 0.0
            position[arm.name] = rng.uniform(low - beyond, high + beyond)
        self.rig.controller.stop(0, "moved by hand")
        self.rig.move_by_hand(position)
        self._arm()

    def _arm(self) -> None:
        try:
            self.rig.arm()
        except CommandRefused:
            pass


def run_fuzz(robot_name: str, seed: int, commands: int) -> FuzzVerdict:
    """Fuzz one controller with this many commands."""
    rig = Rig(load_cell(robot_name, walls=bool(seed % 2)))
    fuzzer = Fuzzer(rig, np.random.default_rng([2, seed]))
    fuzzer.run(commands)
    counts, worst = judge_paths(rig)
    verdict = FuzzVerdict(fuzzer.commands, len(rig.history), histories=len(rig.paths))
    verdict.taken = sum(decision.state == State.RUNNING for decision in rig.history)
    verdict.violations, verdict.worst = counts, worst
    verdict.not_finite = sum(
        not (np.isfinite(t.position).all() and np.isfinite(t.velocity).all() and np.isfinite(t.gripper))
        for decision in rig.history
        for t in decision.sent.values()
    )
    verdict.states.update(decision.state.name for decision in rig.history)
    verdict.refusals.update(rig.controller.refusals)
    return verdict
