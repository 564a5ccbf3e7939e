"""The safety controller: turns commands into limited joint targets. Pure: no ROS, the clock is passed in.

It integrates tool deltas from its own last command and follows the resulting goals (or joint goals directly) with one
quadratic program for all arms, inside position, velocity, acceleration, jerk, workspace, cone and distance limits
(vla_control.motion), and comes to a smooth stop whenever something is not right. All arms share one state, one
decision, one stop. It is no certified safety function. The states and what changes them: TRANSITIONS.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
from vla_core.robot import Arm, Robot

from vla_control.command import Command, CommandRefused, check
from vla_control.motion import CellMotion, Followed, JointTarget, MotionLimits

__all__ = ["Event", "JointTarget", "Measured", "SafetyController", "SafetyDecision", "SafetyLimits", "State"]


class State(IntEnum):
    """As in vla_msgs/SafetyStatus."""

    DISARMED = 0
    ARMED = 1
    RUNNING = 2
    HOLDING = 3
    STOPPING = 4
    STOPPED = 5
    FAULT = 6


#: Every change of state, and by what; the controller makes no other. docs/safety.md draws this.
TRANSITIONS: dict[tuple[State, State], str] = {
    (State.DISARMED, State.ARMED): "arm",
    (State.ARMED, State.RUNNING): "first command",
    (State.HOLDING, State.RUNNING): "command",
    (State.RUNNING, State.STOPPING): "hold, watchdog, stop, disarm, fault",
    (State.STOPPING, State.RUNNING): "command, while braking to hold",
    (State.STOPPING, State.HOLDING): "at rest after a hold",
    (State.STOPPING, State.STOPPED): "at rest after a stop",
    (State.STOPPING, State.DISARMED): "at rest after disarm",
    (State.STOPPING, State.FAULT): "at rest after a fault",
    (State.ARMED, State.STOPPED): "stop",
    (State.HOLDING, State.STOPPED): "stop",
    (State.DISARMED, State.STOPPED): "stop",
    (State.FAULT, State.STOPPED): "stop",
    (State.ARMED, State.DISARMED): "disarm",
    (State.HOLDING, State.DISARMED): "disarm",
    (State.STOPPED, State.DISARMED): "disarm",
    (State.FAULT, State.DISARMED): "disarm",
    (State.HOLDING, State.ARMED): "arm",
    (State.STOPPED, State.ARMED): "arm",
    (State.FAULT, State.ARMED): "arm",
}


@dataclass(frozen=True)
class SafetyLimits(MotionLimits):
    """What the controller allows beyond the robot description's limits; see MotionLimits for those of the motion.

    Watchdogs, all in s:
    command_timeout: without a command for this long (or one and a half periods of the newest one, when that is longer)
        the arms brake and hold. No older command is taken.
    command_slack: commands that come unevenly are drawn out by at most this.
    chunk_timeout: no command is taken that rests on an observation older than this.
    joint_state_timeout: without joint states for this long the arms brake and hold.
    driver_timeout: without a sign of life of the drivers for this long they stop, latched.
    clock_jump: a longer time between two steps is a jump of the clock: they brake and hold.
    overrun: and so they do after a gap of this between two steps, in which nothing was sent.
    tracking_time: a measured joint farther from its command than the robot description's `tracking` stops the robot,
        latched, when that lasts this long.
    contact_time: and so does a force, torque or effort beyond the description's `contact`.
    """

    command_timeout: float = 0.1
    command_slack: float = 0.05
    chunk_timeout: float = 5.0
    joint_state_timeout: float = 0.1
    driver_timeout: float = 0.1
    clock_jump: float = 0.5
    overrun: float = 0.1
    tracking_time: float = 0.2
    contact_time: float = 0.02

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"safety limit {name}: expected a number above zero, found {value}")


@dataclass(frozen=True)
class Measured:
    """What the arms' sensors and drivers said by `stamp`, s. Mappings go from arm to its values.

    position: (n,) rad (m). gripper: opening, 0 to 1. effort: (n,) of the joints, in the driver's unit. wrench: (6,)
    force, N, and torque, N m, on the tool, in its frame. halted: why a driver's arm does not follow targets, "" when it
    does. drivers: when the drivers last gave a sign of life, s; NaN: no driver is watched.
    """

    stamp: float
    position: Mapping[str, np.ndarray]
    gripper: Mapping[str, float] = field(default_factory=dict)
    effort: Mapping[str, np.ndarray] = field(default_factory=dict)
    wrench: Mapping[str, np.ndarray] = field(default_factory=dict)
    halted: Mapping[str, str] = field(default_factory=dict)
    drivers: float = math.nan


@dataclass(frozen=True)
class Event:
    """Something that was not done as it was asked, or done without being asked; the words of vla_msgs/SafetyEvent.

    kind: limited, refused, stopped or state. arm: "" for all. before, after: numbers asked for and sent instead.
    """

    kind: str
    arm: str
    reasons: tuple[str, ...]
    text: str
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class SafetyDecision:
    """One control period.

    sent: arm -> target, empty while nothing may be sent. state, reason: a sentence, "" when all is well. reasons: codes
    of all that kept the arms from doing what was asked in this period. distance: the smallest of any watched pair of
    links, or of a link and an obstacle, m, infinity when none is near; nearest: that pair. stop_category: of the stop
    under way or latched, -1 for none. goal, commanded: T_base_tool (4, 4). limited: arm -> limits that were active.
    """

    sent: Mapping[str, JointTarget]
    state: State
    reasons: tuple[str, ...]
    distance: float
    reason: str
    nearest: str
    stop_category: int
    goal: Mapping[str, np.ndarray]
    commanded: Mapping[str, np.ndarray]
    limited: Mapping[str, tuple[str, ...]]
    source: str
    sequence: int
    command_age: float
    refused: str
    events: tuple[Event, ...]


#: A command is late by more than this, s (rounding of times); time in which the lateness of commands is forgotten, s.
_LATE, _SLACK_TIME = 1e-6, 60.0
#: At rest and ready for a command; able to move.
_READY = (State.ARMED, State.HOLDING)
_LIVE = (*_READY, State.RUNNING, State.STOPPING)
#: What STOPPING may end in; a stop never gives way to one further up in this list.
_LATCHES = (State.HOLDING, State.DISARMED, State.STOPPED, State.FAULT)
#: An arm backs off for at most this long, s.
_RETREAT_TIME = 2.0
_NOTHING = np.zeros(0)


class SafetyController:
    """The controller of one robot. Call `step` once each control period of `1 / robot.rates.control`.

    refusals, limitations, stops: what was refused, limited (per arm and period) and stopped since it was made, by name.

    Not thread-safe. Raises RobotError for a description without sound geometry.
    """

    def __init__(self, robot: Robot, limits: SafetyLimits | None = None):
        self.robot = robot
        self.limits = limits or SafetyLimits()
        self.period = 1.0 / robot.rates.control
        self.refusals: Counter[str] = Counter()
        self.limitations: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        self._motion = CellMotion(robot, self.limits, self.period)
        self._state, self._reason = State.DISARMED, "not armed"
        self._last = math.nan
        self._measured: Measured | None = None
        self._events: list[Event] = []
        self._begin()

    @property
    def state(self) -> State:
        return self._state

    @property
    def reason(self) -> str:
        return self._reason

    def target(self, arm: str) -> JointTarget:
        """The joint target of `arm` as commanded now, whether or not it is sent."""
        return self._motion.target(arm)

    def arm(self, measured: Measured) -> None:
        """Be ready to follow commands from where the arms are now: goal and command become the measured state.

        Raises:
            CommandRefused: the arms are moving, joint states are missing, stale or not finite, or a driver does not
                follow.
        """
        if self._state in (State.RUNNING, State.STOPPING):
            raise CommandRefused("state", f"expected arms at rest, found them {self._state.name.lower()}")
        age = self._last - measured.stamp if math.isfinite(self._last) else 0.0
        if age > self.limits.joint_state_timeout or math.isnan(measured.stamp):
            raise CommandRefused("joint_states", f"stale joint states: {age:.3f} s old")
        if problem := self._problem(measured):
            raise CommandRefused("joint_states", problem)
        if halted := _halted(measured):
            raise CommandRefused("driver", halted)
        self._motion.start(measured.position, measured.gripper)
        self._measured = measured
        self._begin()
        self._enter(State.ARMED, "")

    def disarm(self) -> None:
        """Brake, then send nothing more."""
        if self._state in _LIVE:
            self._stop_in(State.DISARMED, "disarm", "disarmed")
        else:
            self._enter(State.DISARMED, "disarmed")
            self._category = -1

    def stop(self, category: int, reason: str, code: str = "stop") -> None:
        """Emergency stop, latched until `arm`: 2 brake and hold, 1 brake then send nothing, 0 send nothing at once.

        Stop categories as in ISO 13850 / IEC 60204-1; no rating is claimed. A later stop of a lower category adds to
        an earlier one, never the other way round. code: for counting.
        """
        if category not in (0, 1, 2):
            raise ValueError(f"stop category: expected 0, 1 or 2, found {category!r}")
        self._silent |= category < 2
        if category == 0:
            self._motion.halt()
        if self._state in _LIVE:
            self._stop_in(State.STOPPED, code, reason, category)
        elif self._state != State.STOPPED:
            self._silent = True  # nothing was sent before, and a stop must not begin to
            self._category = category
            self._enter(State.STOPPED, reason)
        else:
            self._category = min(self._category, category)

    def offer(self, command: Command, now: float) -> str:
        """Take a command, or refuse it: the reason is returned and counted. `step` does so with its own."""
        try:
            self._accept(command, now)
        except CommandRefused as refusal:
            self.refusals[refusal.code] += 1
            parts = [v for p in command.arms.values() for v in (p.delta, p.joints) if v is not None]
            before = np.concatenate([np.ravel(v) for v in parts]) if parts else _NOTHING
            self._events.append(Event("refused", "", (refusal.code,), str(refusal), before, _NOTHING))
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
        self._watch_drivers(measured, now)
        self._watch_contact(measured, now)
        refused = self.offer(command, now) if command is not None else ""
        self._watch_command(now)
        limited = self._move(now)
        events = self._take_events(limited)
        silent = self._state in (State.DISARMED, State.FAULT) or (self._state == State.STOPPED and self._silent)
        motion, newest = self._motion, self._command
        distance, pair = motion.cell.nearest()
        commanded = motion.commanded()
        reasons = dict.fromkeys(r for event in events if event.kind != "state" for r in event.reasons)
        return SafetyDecision(
            sent={} if silent else {arm.name: motion.target(arm.name) for arm in self.robot.arms},
            state=self._state,
            reasons=tuple(reasons),
            distance=distance,
            reason=self._reason,
            nearest=motion.cell.describe(pair),
            stop_category=self._category,
            goal={name: commanded[name] if goal.in_joints else goal.goal for name, goal in motion.goals.items()},
            commanded=commanded,
            limited=limited,
            source=newest.source if newest else "",
            sequence=newest.sequence if newest else 0,
            command_age=now - newest.stamp if newest else math.nan,
            refused=refused,
            events=events,
        )

    # ------------------------------------------------------------------------------------------------- states
    def _begin(self) -> None:
        self._command: Command | None = None  # the newest one taken
        self._taken = -math.inf  # when, s
        self._due = -math.inf  # when its motion ends, s
        self._slack = 0.0  # by which commands may be drawn out, s
        self._lagging_since = self._touching_since = math.nan
        self._latch = State.HOLDING  # what STOPPING ends in
        self._category = -1  # of the stop under way or latched
        self._silent = False  # once STOPPED, send nothing
        self._trouble = ""  # with the joint states
        self._touched: str | None = None  # an arm that is to back off once it is at rest
        self._retreating_since = math.nan
        self._started = False

    def _enter(self, state: State, reason: str) -> None:
        if state != self._state:
            if (self._state, state) not in TRANSITIONS:
                raise RuntimeError(f"no way from {self._state.name} to {state.name}")
            self._events.append(Event("state", "", (state.name.lower(),), reason, _NOTHING, _NOTHING))
        self._state, self._reason = state, reason

    def _stop_in(self, latch: State, code: str, reason: str, category: int = 2) -> None:
        """Come to a stop inside the limits, all arms together, then be in `latch`."""
        if code != "contact":
            self._stay()
        if latch in (State.STOPPED, State.FAULT):
            self._category = category if self._category < 0 else min(category, self._category)
        if self._state == State.STOPPING and _LATCHES.index(latch) <= _LATCHES.index(self._latch):
            return
        self.stops[code] += 1
        self._events.append(Event("stopped", "", (code,), reason, self._motion.sent_velocity, _NOTHING))
        self._motion.release()
        if self._state in _READY:
            self._enter(latch, reason)
        else:
            self._latch = latch
            self._enter(State.STOPPING, reason)

    def _stay(self) -> None:
        """Back off no farther from a contact."""
        self._touched, self._retreating_since = None, math.nan

    def _hold(self, code: str, reason: str) -> None:
        if self._state == State.RUNNING:
            self._stop_in(State.HOLDING, code, reason)

    def _take_events(self, limited: Mapping[str, tuple[str, ...]]) -> tuple[Event, ...]:
        """The events of this period, complete."""
        events = [
            replace(event, after=self._motion.sent_velocity) if event.kind == "stopped" else event
            for event in self._events
        ]
        self._events.clear()
        if self._followed is not None:
            for name, names in limited.items():
                if names:
                    part = self._motion.slices[name]
                    before, after = self._followed.wanted[part], self._followed.velocity[part]
                    events.append(Event("limited", name, names, ", ".join(names), before, after))
        return tuple(events)

    # ------------------------------------------------------------------------------------------------ watching
    def _watch_clock(self, now: float) -> None:
        gap, self._last = now - self._last, now
        if gap < 0.0 or gap > self.limits.clock_jump:
            self._taken = -math.inf
            self._lagging_since = self._touching_since = math.nan
            reason = f"the clock jumped by {gap:.3f} s"
            self._hold("clock", reason)
            if self._state == State.HOLDING or (self._state == State.STOPPING and self._latch == State.HOLDING):
                self._reason = reason  # commands that grow stale while a clock stands still tell less
        elif gap > max(self.limits.overrun, 2.0 * self.period):
            self._hold("overrun", f"nothing was sent for {gap:.3f} s")

    def _watch_joints(self, measured: Measured | None, now: float) -> None:
        self._trouble = ""
        self._measured = measured
        if self._state not in _LIVE:
            return
        age = math.inf if measured is None else now - measured.stamp
        if not abs(age) <= self.limits.joint_state_timeout:
            self._trouble = f"stale joint states: {age:.3f} s old"
        else:
            self._trouble = self._problem(measured)
        if self._trouble:
            self._stay()
            self._hold("joint_states", self._trouble)
            return
        worst, detail = 1.0, ""
        for arm in self.robot.arms:
            share, k, away = self._motion.lag(arm.name, measured.position[arm.name])
            if share > worst:
                worst = share
                detail = f"arm {arm.name}: joint {arm.joints[k]} is {away:.2f} rad away from its command"
        if not detail:
            self._lagging_since = math.nan
        elif math.isnan(self._lagging_since):
            self._lagging_since = now
        elif now - self._lagging_since > self.limits.tracking_time:
            self._stop_in(State.STOPPED, "tracking", detail)

    def _watch_drivers(self, measured: Measured | None, now: float) -> None:
        """A driver that is gone or does not follow: all arms stop, and nothing is sent any more, so that no arm jumps
        to an old target when its driver follows again."""
        if measured is None or self._state not in _LIVE:
            return
        age = now - measured.drivers  # NaN: none is watched
        problem = _halted(measured)
        if not problem and age > self.limits.driver_timeout:
            problem = f"no sign of life of the drivers for {age:.3f} s"
        if problem:
            self._silent = True
            self._stop_in(State.STOPPED, "driver", problem)

    def _watch_contact(self, measured: Measured | None, now: float) -> None:
        if measured is None or self._state != State.RUNNING:
            self._touching_since = math.nan
            return
        arm, detail = self._contact(measured)
        if not detail:
            self._touching_since = math.nan
        elif math.isnan(self._touching_since):
            self._touching_since = now
        elif now - self._touching_since >= self.limits.contact_time:
            if arm.contact.retreat > 0.0:
                self._touched = arm.name
            self._stop_in(State.STOPPED, "contact", detail)

    def _contact(self, measured: Measured) -> tuple[Arm | None, str]:
        """An arm that touches something, and how much; None and "" when there is none."""
        for arm in self.robot.arms:
            if arm.contact is None:
                continue
            wrench, effort = measured.wrench.get(arm.name), measured.effort.get(arm.name)
            if wrench is not None:
                for part, most, unit in ((wrench[:3], arm.contact.force, "N"), (wrench[3:], arm.contact.torque, "N m")):
                    size = math.hypot(*part)
                    if not size <= most:  # NaN is no measurement of no force
                        return arm, f"contact: arm {arm.name}: {size:.1f} {unit} on the tool, at most {most} {unit}"
            if effort is not None and np.isfinite(arm.contact.effort).any():
                share = np.abs(effort) / arm.contact.effort
                k = int(share.argmax())
                if not share[k] <= 1.0:
                    return arm, (
                        f"contact: arm {arm.name}: effort {effort[k]:.2f} of {arm.joints[k]}, at most "
                        f"{arm.contact.effort[k]}"
                    )
        return None, ""

    def _problem(self, measured: Measured) -> str:
        """What is wrong with joint states, or nothing."""
        for arm in self.robot.arms:
            position = measured.position.get(arm.name)
            if position is None or np.shape(position) != (len(arm.joints),) or not np.isfinite(position).all():
                return f"arm {arm.name}: expected {len(arm.joints)} finite joint positions, found {position}"
        return ""

    def _watch_command(self, now: float) -> None:
        period = self._command.period if self._command else 0.0
        if now - self._taken > max(self.limits.command_timeout, 1.5 * period):
            self._hold("command", f"stale command: none for {now - self._taken:.3f} s")

    def _accept(self, command: Command, now: float) -> None:
        if self._state not in _LIVE or (self._state == State.STOPPING and self._latch != State.HOLDING):
            raise CommandRefused("state", f"the controller is {self._state.name.lower()}: {self._reason}")
        check(command, self.robot)
        age = now - command.stamp
        if abs(age) > self.limits.command_timeout:
            raise CommandRefused("stale", f"the command is {age:.3f} s old, at most {self.limits.command_timeout} s")
        if now - command.observation > self.limits.chunk_timeout:
            raise CommandRefused(
                "chunk",
                f"it rests on an observation {now - command.observation:.2f} s old, at most "
                f"{self.limits.chunk_timeout} s",
            )
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
        if self._state in _READY:
            self._check_start()
        for name, goal in self._motion.goals.items():
            goal.check_jump(command.arms[name], command.period)
        self._due = self._schedule(command.period, now)
        for name, goal in self._motion.goals.items():
            goal.take(command.arms[name], now, self._due)
        self._command, self._taken = command, now
        self._enter(State.RUNNING, "")

    def _check_start(self) -> None:
        """Raise CommandRefused (`start`) unless the arms are where their motion would begin."""
        sent, motion = self._motion.sent, self._motion
        measured = self._measured
        if measured is None:
            raise CommandRefused("joint_states", "there are none yet")
        there = np.concatenate([measured.position[arm.name] for arm in self.robot.arms])
        if np.array_equal(there, sent):
            return
        for arm in self.robot.arms:
            part, guard = motion.slices[arm.name], arm.start
            error = np.abs(there[part] - sent[part])
            k = int(error.argmax())
            if error[k] > guard.joint:
                raise CommandRefused(
                    "start",
                    f"arm {arm.name}: {arm.joints[k]} is {error[k]:.4f} rad away from where its motion would begin, at "
                    f"most {guard.joint} rad; arm again",
                )
            away = math.dist(motion.tool(arm.name, there)[:3, 3], motion.tool(arm.name, sent)[:3, 3])
            if away > guard.tool:
                raise CommandRefused(
                    "start",
                    f"arm {arm.name}: its tool is {away:.4f} m away from where its motion would begin, at most "
                    f"{guard.tool} m; arm again",
                )

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
        self._followed: Followed | None = None
        if not self._started:
            self._started = True  # the first targets after arming are where the arms are
        elif self._state == State.RUNNING:
            return self._follow(now)
        elif self._state == State.STOPPING:
            if not math.isnan(self._retreating_since):
                return self._back_off(now)
            if self._motion.still and self._touched is None:
                self._enter(self._latch, self._reason)  # a period after the target at rest was sent
            elif self._motion.still:
                self._retreating_since = now
                self._motion.retreat(self._touched, self.robot.arm(self._touched).contact.retreat, now)
            else:
                self._motion.brake()
        return {arm.name: () for arm in self.robot.arms}

    def _follow(self, now: float) -> dict[str, tuple[str, ...]]:
        followed = self._followed = self._motion.follow(now)
        for names in followed.limited.values():
            self.limitations.update(names)
        if not followed.solved:
            self._stop_in(State.FAULT, "unsolved", "no joint velocities were found that keep all limits")
        return followed.limited

    def _back_off(self, now: float) -> dict[str, tuple[str, ...]]:
        """A contact's retreat: along its own path, then brake and be stopped."""
        limited = self._follow(now)
        gone = now - self._retreating_since
        if self._touched is None:
            return limited
        if self._motion.goals[self._touched].arrived or not 0.0 <= gone <= _RETREAT_TIME:
            self._stay()
            self._motion.release()
        return limited


def _halted(measured: Measured) -> str:
    """Which arms' drivers do not follow, and why; "" when all do."""
    return "; ".join(f"arm {name}: its driver: {why}" for name, why in measured.halted.items() if why)
