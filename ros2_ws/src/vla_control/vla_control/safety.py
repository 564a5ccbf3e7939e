"""The safety controller: turns commands into limited joint targets. Pure: no ROS, the clock is passed in.

It integrates tool deltas from its own last command, follows the resulting goal with differential inverse kinematics
(or joint goals directly) inside position, velocity, acceleration and workspace limits, and comes to a smooth stop
whenever something is not right. All arms share one state, one decision, one stop. It is no certified safety function.

    disarmed, stopped, fault --arm--> holding <--command, hold--> running
    holding, running, stopping --stale command or joint states, clock jump--> stopping --> holding
                               --stop, tracking error-----------------------> stopping --> stopped (latched)
                               --disarm-------------------------------------> stopping --> disarmed
                               --no solution--------------------------------> stopping --> fault (latched)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from vla_core.kinematics import Kinematics
from vla_core.robot import Robot

from vla_control.command import Command, CommandRefused, check
from vla_control.motion import ArmMotion, JointTarget, MotionLimits

__all__ = ["JointTarget", "Measured", "SafetyController", "SafetyDecision", "SafetyLimits", "State"]


class State(IntEnum):
    """As in vla_msgs/SafetyStatus."""

    DISARMED = 0
    HOLDING = 1
    RUNNING = 2
    STOPPING = 3
    STOPPED = 4
    FAULT = 5


@dataclass(frozen=True)
class SafetyLimits(MotionLimits):
    """What the controller allows beyond the robot description's limits; see MotionLimits for those of the motion.

    command_timeout: without a command for this long (or one and a half periods of the newest one, when that is longer)
        the arms brake and hold, s. No older command is taken.
    command_slack: commands that come unevenly are drawn out by at most this, s.
    joint_state_timeout: without joint states for this long they do too, s.
    clock_jump: a longer time between two steps is a fault of the clock, s.
    tracking_time: a measured joint farther from its command than the robot description's `tracking` stops the robot
        when that lasts this long, s.
    """

    command_timeout: float = 0.1
    command_slack: float = 0.05
    joint_state_timeout: float = 0.1
    clock_jump: float = 0.5
    tracking_time: float = 0.2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"safety limit {name}: expected a number above zero, found {value}")


@dataclass(frozen=True)
class Measured:
    """Joint states at `stamp` (s): arm -> (n,) positions, rad; arm -> opening, 0 to 1."""

    stamp: float
    position: Mapping[str, np.ndarray]
    gripper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SafetyDecision:
    """One control period. sent: arm -> target, empty while nothing may be sent. goal, commanded: T_base_tool."""

    state: State
    reason: str
    sent: Mapping[str, JointTarget]
    goal: Mapping[str, np.ndarray]
    commanded: Mapping[str, np.ndarray]
    limited: Mapping[str, tuple[str, ...]]
    source: str
    sequence: int
    command_age: float
    refused: str = ""


#: A command is late by more than this, s (rounding of times); time in which the lateness of commands is forgotten, s.
_LATE, _SLACK_TIME = 1e-6, 60.0
_ARMED = (State.HOLDING, State.RUNNING, State.STOPPING)
#: What STOPPING may end in; a stop never gives way to one further up in this list.
_LATCHES = (State.HOLDING, State.DISARMED, State.STOPPED, State.FAULT)


class SafetyController:
    """The controller of one robot. Call `step` once each control period of `1 / robot.rates.control`.

    refusals, limitations, stops: what was refused, limited (per arm and period) and stopped since it was made, by name.
    """

    def __init__(self, robot: Robot, limits: SafetyLimits | None = None):
        self.robot = robot
        self.limits = limits or SafetyLimits()
        self.period = 1.0 / robot.rates.control
        self.refusals: Counter[str] = Counter()
        self.limitations: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        kinematics = Kinematics(robot)
        self._arms = {arm.name: ArmMotion(arm, kinematics, self.limits, self.period) for arm in robot.arms}
        self._state, self._reason = State.DISARMED, "not armed"
        self._latch = State.HOLDING  # what STOPPING ends in
        self._silent = False  # once STOPPED, send nothing
        self._trouble = ""  # with the joint states
        self._last = math.nan
        self._begin()

    @property
    def state(self) -> State:
        return self._state

    @property
    def reason(self) -> str:
        return self._reason

    def target(self, arm: str) -> JointTarget:
        """The joint target of `arm` as commanded now, whether or not it is sent."""
        return self._arms[arm].target()

    def arm(self, measured: Measured) -> None:
        """Be ready to follow commands from where the arms are now: goal and command become the measured state.

        Raises:
            CommandRefused: the arms are moving, or joint states are missing or not finite.
        """
        if self._state in (State.RUNNING, State.STOPPING):
            raise CommandRefused("state", f"expected arms at rest, found them {self._state.name.lower()}")
        problem = self._problem(measured)
        if problem:
            raise CommandRefused("joint_states", problem)
        for name, motion in self._arms.items():
            motion.start(np.array(measured.position[name], float), measured.gripper.get(name, math.nan))
        self._begin()
        self._enter(State.HOLDING, "")

    def disarm(self) -> None:
        """Brake, then send nothing more."""
        if self._state in _ARMED:
            self._stop_in(State.DISARMED, "disarm", "disarmed")
        else:
            self._enter(State.DISARMED, "disarmed")

    def stop(self, category: int, reason: str) -> None:
        """Emergency stop, latched until `arm`: 2 brake and hold, 1 brake then send nothing, 0 send nothing at once.

        Stop categories as in ISO 13850 / IEC 60204-1; no rating is claimed. A later stop of a lower category adds to
        an earlier one, never the other way round.
        """
        if category not in (0, 1, 2):
            raise ValueError(f"stop category: expected 0, 1 or 2, found {category!r}")
        self._silent |= category < 2
        if category == 0:
            for motion in self._arms.values():
                motion.halt()
        if self._state in _ARMED:
            self._stop_in(State.STOPPED, "stop", reason)
        elif self._state != State.STOPPED:
            self._silent = True  # nothing was sent before, and a stop must not begin to
            self._enter(State.STOPPED, reason)

    def offer(self, command: Command, now: float) -> str:
        """Take a command, or refuse it: the reason is returned and counted. `step` does so with its own."""
        try:
            self._accept(command, now)
        except CommandRefused as refusal:
            self.refusals[refusal.code] += 1
            return str(refusal)
        return ""

    def step(self, command: Command | None, measured: Measured | None, now: float) -> SafetyDecision:
        """Decide one control period.

        Args:
            command: the newest command, or None when none has come since the last step. Those before it, if any, were
                given to `offer`.
            measured: the newest joint states, None when there never were any.
            now: s of the ROS clock.

        Returns:
            The decision; `sent` holds the targets for the end of this period.
        """
        self._watch_clock(now)
        self._watch_joints(measured, now)
        refused = self.offer(command, now) if command is not None else ""
        self._watch_command(now)
        limited = self._move(now)
        silent = self._state in (State.DISARMED, State.FAULT) or (self._state == State.STOPPED and self._silent)
        return SafetyDecision(
            state=self._state,
            reason=self._reason,
            sent={} if silent else {name: m.target() for name, m in self._arms.items()},
            goal={name: m.goal for name, m in self._arms.items()},
            commanded={name: m.T for name, m in self._arms.items()},
            limited=limited,
            source=self._command.source if self._command else "",
            sequence=self._command.sequence if self._command else 0,
            command_age=now - self._command.stamp if self._command else math.nan,
            refused=refused,
        )

    # ------------------------------------------------------------------------------------------------- states
    def _begin(self) -> None:
        self._command: Command | None = None  # the newest one taken
        self._taken = -math.inf  # when, s
        self._due = -math.inf  # when its motion ends, s
        self._slack = 0.0  # by which commands may be drawn out, s
        self._lagging_since = math.nan
        self._silent = False
        self._started = False

    def _enter(self, state: State, reason: str) -> None:
        self._state, self._reason = state, reason

    def _stop_in(self, latch: State, code: str, reason: str) -> None:
        """Come to a stop inside the limits, all arms together, then be in `latch`."""
        if self._state == State.STOPPING and _LATCHES.index(latch) <= _LATCHES.index(self._latch):
            return
        self.stops[code] += 1
        self._latch = latch
        self._enter(State.STOPPING, reason)
        for motion in self._arms.values():
            motion.release()
        self._settle()

    def _hold(self, code: str, reason: str) -> None:
        if self._state == State.RUNNING:
            self._stop_in(State.HOLDING, code, reason)

    def _settle(self) -> None:
        if self._state == State.STOPPING and all(m.still for m in self._arms.values()):
            self._enter(self._latch, self._reason)

    # ------------------------------------------------------------------------------------------------ watching
    def _watch_clock(self, now: float) -> None:
        jump, self._last = now - self._last, now
        if jump < 0.0 or jump > self.limits.clock_jump:
            self._taken = -math.inf
            self._lagging_since = math.nan
            reason = f"the clock jumped by {jump:.3f} s"
            self._hold("clock", reason)
            if self._state == State.HOLDING or (self._state == State.STOPPING and self._latch == State.HOLDING):
                self._reason = reason  # commands that grow stale while a clock stands still tell less

    def _watch_joints(self, measured: Measured | None, now: float) -> None:
        self._trouble = ""
        if self._state not in _ARMED:
            return
        age = math.inf if measured is None else now - measured.stamp
        if not abs(age) <= self.limits.joint_state_timeout:
            self._trouble = f"stale joint states: {age:.3f} s old"
        else:
            self._trouble = self._problem(measured)
        if self._trouble:
            self._hold("joint_states", self._trouble)
            return
        worst, detail = 1.0, ""
        for name, motion in self._arms.items():
            error = np.abs(measured.position[name] - motion.q)
            share = error / motion.arm.limits.tracking
            k = int(share.argmax())
            if share[k] > worst:
                worst = float(share[k])
                detail = f"arm {name}: joint {motion.arm.joints[k]} is {error[k]:.2f} rad away from its command"
        if not detail:
            self._lagging_since = math.nan
        elif math.isnan(self._lagging_since):
            self._lagging_since = now
        elif now - self._lagging_since > self.limits.tracking_time:
            self._stop_in(State.STOPPED, "tracking", detail)

    def _problem(self, measured: Measured) -> str:
        """What is wrong with joint states, or nothing."""
        for name, motion in self._arms.items():
            position = measured.position.get(name)
            if position is None or np.shape(position) != motion.q.shape or not np.isfinite(position).all():
                return f"arm {name}: expected {len(motion.q)} finite joint positions, found {position}"
        return ""

    def _watch_command(self, now: float) -> None:
        period = self._command.period if self._command else 0.0
        if now - self._taken > max(self.limits.command_timeout, 1.5 * period):
            self._hold("command", f"stale command: none for {now - self._taken:.3f} s")

    def _accept(self, command: Command, now: float) -> None:
        if self._state not in _ARMED or (self._state == State.STOPPING and self._latch != State.HOLDING):
            raise CommandRefused("state", f"the controller is {self._state.name.lower()}: {self._reason}")
        check(command, self.robot)
        age = now - command.stamp
        if abs(age) > self.limits.command_timeout:
            raise CommandRefused("stale", f"the command is {age:.3f} s old, at most {self.limits.command_timeout} s")
        previous = self._command
        if previous and previous.source == command.source and command.sequence <= previous.sequence:
            # A sender that was started again counts from the beginning; by then the old one has timed out.
            if now - self._taken <= self.limits.command_timeout:
                raise CommandRefused("order", f"sequence {command.sequence} after {previous.sequence}")
        if command.hold:
            self._command, self._taken = command, now
            self._hold("hold", f"{command.source} asks to hold")
            return
        if self._trouble:
            raise CommandRefused("joint_states", self._trouble)
        for name, motion in self._arms.items():
            motion.check_jump(command.arms[name], command.period)
        self._due = self._schedule(command.period, now)
        for name, motion in self._arms.items():
            motion.take(command.arms[name], now, self._due)
        self._command, self._taken = command, now
        self._enter(State.RUNNING, "")

    def _schedule(self, period: float, now: float) -> float:
        """When the motion of a command taken now is due, s.

        Each command goes on for one period where the one before ends. When that one had ended already, commands come
        unevenly, and by the time lost all later ones may be drawn out: so late and early ones, and rates that are no
        whole number of control periods, make one even motion. A steady sender is followed with no delay.
        """
        if self._state == State.RUNNING:
            late = now - self._due
            if late > _LATE:
                self._slack = min(self._slack + late, self.limits.command_slack)
            self._slack *= max(0.0, 1.0 - period / _SLACK_TIME)
            return min(max(self._due, now), now + self._slack) + period
        return now + self._slack + period

    # -------------------------------------------------------------------------------------------------- moving
    def _move(self, now: float) -> dict[str, tuple[str, ...]]:
        limited: dict[str, tuple[str, ...]] = dict.fromkeys(self._arms, ())
        if not self._started:
            self._started = True  # the first targets after arming are where the arms are
        elif self._state == State.RUNNING:
            for name, motion in self._arms.items():
                followed = motion.follow(now)
                limited[name] = ("unsolved",) if followed is None else followed
                self.limitations.update(limited[name])
            unsolved = [name for name, names in limited.items() if "unsolved" in names]
            if unsolved:
                self._stop_in(State.FAULT, "unsolved", f"arm {unsolved[0]}: no joint velocities were found")
        elif self._state == State.STOPPING:
            for motion in self._arms.values():
                motion.brake()
            self._settle()
        return limited
