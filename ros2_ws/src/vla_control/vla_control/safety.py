"""The safety controller: turns commands into limited joint targets. Pure: no ROS, the clock is passed in.

It integrates tool deltas from its own last command, follows the resulting goal with differential inverse kinematics
(or joint goals directly) inside position, velocity, acceleration and workspace limits, and comes to a smooth stop
whenever something is not right. All arms share one state, one decision, one stop. It is no certified safety function.

    disarmed --arm--> holding <--> running --> stopping --> holding (stale command, hold) or stopped (latched)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from vla_core import se3
from vla_core.kinematics import Kinematics
from vla_core.robot import Arm, Robot

from vla_control.command import ArmCommand, Command, CommandRefused, check
from vla_control.ik import DifferentialIk
from vla_control.limits import braking_speed, velocity_bounds

LIMIT_NAMES = ("velocity", "acceleration", "position")
#: A bound counts as active within this of it, rad/s.
_ACTIVE = 1e-9


class State(IntEnum):
    """As in vla_msgs/SafetyStatus."""

    DISARMED = 0
    HOLDING = 1
    RUNNING = 2
    STOPPING = 3
    STOPPED = 4
    FAULT = 5


@dataclass(frozen=True)
class SafetyLimits:
    """What the controller allows beyond the robot description's limits.

    command_timeout: without a command for this long the arms brake and hold, s.
    joint_state_timeout: without joint states for this long they do too, s.
    clock_jump: a longer time between two steps is a fault of the clock, s.
    max_lead, max_lead_rotation: the goal may run ahead of the commanded tool by this, m and rad.
    max_jump: a delta larger than this many times what the tool's speed limit allows is refused.
    max_joint_jump: a joint target farther than this from the commanded joints is refused, rad.
    max_tracking_error: a measured joint farther than this from the commanded one stops the robot, rad.
    tracking_time: but only when it lasts this long, s.
    tool_acceleration, tool_rotation_acceleration: used to brake in front of the goal and the workspace's walls,
        m/s^2 and rad/s^2.
    gain: of the feedback that removes the lag behind the set-point, 1/s.
    """

    command_timeout: float = 0.1
    joint_state_timeout: float = 0.1
    clock_jump: float = 0.5
    max_lead: float = 0.1
    max_lead_rotation: float = 0.5
    max_jump: float = 5.0
    max_joint_jump: float = 0.5
    max_tracking_error: float = 0.5
    tracking_time: float = 0.2
    tool_acceleration: float = 1.0
    tool_rotation_acceleration: float = 4.0
    gain: float = 20.0


@dataclass(frozen=True)
class Measured:
    """Joint states at `stamp` (s): arm -> (n,) positions, rad; arm -> opening, 0 to 1."""

    stamp: float
    position: Mapping[str, np.ndarray]
    gripper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class JointTarget:
    """What is sent to one arm for the end of this period: position and velocity (n,), opening 0 to 1."""

    position: np.ndarray
    velocity: np.ndarray
    gripper: float


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


class SafetyController:
    """The controller of one robot. Call `step` once each control period of `1 / robot.rates.control`."""

    def __init__(self, robot: Robot, limits: SafetyLimits | None = None):
        self.robot = robot
        self.limits = limits or SafetyLimits()
        self.period = 1.0 / robot.rates.control
        self.refusals: Counter[str] = Counter()
        self.limitations: Counter[str] = Counter()
        kinematics = Kinematics(robot)
        self._arms = {arm.name: _ArmMotion(arm, kinematics, self.limits, self.period) for arm in robot.arms}
        self._state, self._reason = State.DISARMED, "not armed"
        self._latch = State.HOLDING  # what STOPPING ends in
        self._command: Command | None = None
        self._taken = -math.inf  # when the newest command was taken, s
        self._last = math.nan
        self._lagging_since = math.nan

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
            CommandRefused: joint states are missing or not finite.
        """
        for name, motion in self._arms.items():
            position = measured.position.get(name)
            if position is None or np.shape(position) != motion.q.shape or not np.isfinite(position).all():
                raise CommandRefused("joint_states", f"arm {name}: expected {len(motion.q)} finite joint positions")
            motion.start(np.array(position, float), measured.gripper.get(name, math.nan))
        self._command, self._taken = None, -math.inf
        self._lagging_since = math.nan
        self._enter(State.HOLDING, "")

    def disarm(self) -> None:
        """Send nothing more."""
        self._enter(State.DISARMED, "disarmed")

    def stop(self, category: int, reason: str) -> None:
        """Emergency stop, latched until `arm`: 2 brake and hold, 1 brake then send nothing, 0 send nothing at once.

        Stop categories as in ISO 13850 / IEC 60204-1; no rating is claimed.
        """
        if category not in (0, 1, 2):
            raise ValueError(f"stop category: expected 0, 1 or 2, found {category!r}")
        if self._state == State.DISARMED or (category == 0 and self._state != State.STOPPED):
            self._enter(State.STOPPED, reason)
            self._silent = True
            return
        self._silent = category < 2
        self._brake(State.STOPPED, reason)

    def step(self, command: Command | None, measured: Measured | None, now: float) -> SafetyDecision:
        """Decide one control period.

        Args:
            command: a new command, or None when none has come since the last step.
            measured: the newest joint states, None when there never were any.
            now: s of the ROS clock.

        Returns:
            The decision; `sent` holds the targets for the end of this period.
        """
        self._watch_clock(now)
        refused = self._take(command, now) if command is not None else ""
        if self._state in (State.HOLDING, State.RUNNING, State.STOPPING):
            self._watch_joints(measured, now)
            self._watch_command(now)
        limited = self._move(now)
        self._last = now
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

    # ------------------------------------------------------------------------------------------------ watching
    _silent = False

    def _enter(self, state: State, reason: str) -> None:
        self._state, self._reason = state, reason

    def _brake(self, latch: State, reason: str) -> None:
        """Come to a stop inside the limits, then be in `latch`."""
        if self._state == State.STOPPING and self._latch == State.STOPPED:
            return
        if self._state in (State.HOLDING, State.RUNNING, State.STOPPING, State.STOPPED):
            self._latch = latch
            self._enter(State.STOPPING, reason)
            for motion in self._arms.values():
                motion.release()

    def _watch_clock(self, now: float) -> None:
        if math.isnan(self._last):
            return
        jump = now - self._last
        if jump < 0.0 or jump > self.limits.clock_jump:
            self._taken = -math.inf
            if self._state == State.RUNNING:
                self._brake(State.HOLDING, f"the clock jumped by {jump:.3f} s")

    def _watch_joints(self, measured: Measured | None, now: float) -> None:
        age = math.inf if measured is None else now - measured.stamp
        if not age <= self.limits.joint_state_timeout:
            if self._state == State.RUNNING:
                self._brake(State.HOLDING, f"stale joint states: {age:.3f} s old")
            return
        worst, name, joint = 0.0, "", ""
        for arm, motion in self._arms.items():
            error = np.abs(np.asarray(measured.position[arm]) - motion.q)
            if not np.isfinite(error).all():
                self._brake(State.STOPPED, f"joint states of arm {arm} are not finite")
                return
            k = int(error.argmax())
            if error[k] > worst:
                worst, name, joint = float(error[k]), arm, motion.arm.joints[k]
        if worst <= self.limits.max_tracking_error:
            self._lagging_since = math.nan
        elif math.isnan(self._lagging_since):
            self._lagging_since = now
        elif now - self._lagging_since > self.limits.tracking_time:
            self._brake(State.STOPPED, f"arm {name}: joint {joint} is {worst:.2f} rad away from its command")

    def _watch_command(self, now: float) -> None:
        if self._state == State.RUNNING and now - self._taken > self.limits.command_timeout:
            self._brake(State.HOLDING, f"stale command: none for {now - self._taken:.3f} s")

    def _take(self, command: Command, now: float) -> str:
        """Take a command; returns the reason when it is refused."""
        try:
            self._accept(command, now)
        except CommandRefused as refusal:
            self.refusals[refusal.code] += 1
            return str(refusal)
        return ""

    def _accept(self, command: Command, now: float) -> None:
        if self._state not in (State.HOLDING, State.RUNNING, State.STOPPING) or (
            self._state == State.STOPPING and self._latch == State.STOPPED
        ):
            raise CommandRefused("state", f"the controller is {self._state.name.lower()}: {self._reason}")
        check(command, self.robot)
        age = now - command.stamp
        if abs(age) > self.limits.command_timeout:
            raise CommandRefused("stale", f"the command is {age:.3f} s old, at most {self.limits.command_timeout} s")
        previous = self._command
        if previous and previous.source == command.source and command.sequence <= previous.sequence:
            if now - self._taken <= self.limits.command_timeout:
                raise CommandRefused("order", f"sequence {command.sequence} after {previous.sequence}")
        if command.hold:
            self._command, self._taken = command, now
            if self._state == State.RUNNING:
                self._brake(State.HOLDING, f"{command.source} asks to hold")
            return
        for name, motion in self._arms.items():
            motion.check_jump(command.arms[name], command.period)
        for name, motion in self._arms.items():
            motion.take(command.arms[name], command.period, now)
        self._command, self._taken = command, now
        self._enter(State.RUNNING, "")

    # -------------------------------------------------------------------------------------------------- moving
    def _move(self, now: float) -> dict[str, tuple[str, ...]]:
        if self._state in (State.DISARMED, State.FAULT):
            return {name: () for name in self._arms}
        limited = {}
        for name, motion in self._arms.items():
            if self._state == State.RUNNING:
                limited[name] = motion.follow(now)
            else:
                motion.brake()
                limited[name] = ()
            self.limitations.update(limited[name])
        if self._state == State.STOPPING and all(m.still for m in self._arms.values()):
            self._enter(self._latch, self._reason)
            for motion in self._arms.values():
                motion.release()
        return limited


class _ArmMotion:
    """Where one arm is commanded to be, and where it is going."""

    def __init__(self, arm: Arm, kinematics: Kinematics, limits: SafetyLimits, period: float):
        self.arm, self._kinematics, self._limits, self._period = arm, kinematics, limits, period
        self._ik = DifferentialIk(len(arm.joints))
        self.start(np.array(arm.home, float), math.nan)

    def start(self, q: np.ndarray, gripper: float) -> None:
        """Stand at joint positions q (n,) and `gripper` (NaN: open)."""
        self.q, self.v = q, np.zeros(len(q))
        self.gripper = self._gripper_goal = 1.0 if math.isnan(gripper) else float(np.clip(gripper, 0.0, 1.0))
        self.T = self._kinematics.forward(self.arm.name, q)
        self.release()

    def release(self) -> None:
        """Drop the goal: it is where the command is."""
        self.goal, self.setpoint = self.T, self.T
        self._from_T, self._begin, self._span = self.T, -math.inf, self._period
        self._joint_goal: np.ndarray | None = None
        self._from_q = self._joint_setpoint = self.q

    @property
    def still(self) -> bool:
        return not self.v.any()

    def target(self) -> JointTarget:
        return JointTarget(self.q.copy(), self.v.copy(), self.gripper)

    def check_jump(self, command: ArmCommand, period: float) -> None:
        """Raise CommandRefused when the command asks for more than any sound sender would."""
        name, tool = self.arm.name, self.arm.tool_limits
        if command.joints is not None:
            jump = np.abs(command.joints - self.q)
            allowed = self._limits.max_joint_jump
            if jump.max() > allowed:
                joint = self.arm.joints[int(jump.argmax())]
                raise CommandRefused("jump", f"arm {name}: {joint} {jump.max():.3f} rad away, at most {allowed} rad")
            return
        reach = self._limits.max_jump * period
        for part, speed, unit in ((command.delta[:3], tool.speed, "m"), (command.delta[3:], tool.rotation, "rad")):
            length = float(np.linalg.norm(part))
            if length > reach * speed:
                raise CommandRefused(
                    "jump", f"arm {name}: {length:.4f} {unit} in {period} s, at most {reach * speed:.4f}"
                )

    def take(self, command: ArmCommand, period: float, now: float) -> None:
        """Move the goal; the set-point goes there evenly within `period`."""
        self._begin, self._span = now, period
        if command.joints is not None:
            self._from_q = self._joint_setpoint if self._joint_goal is not None else self.q
            self._joint_goal = np.array(command.joints, float)
        else:
            if self._joint_goal is not None:
                self.release()
                self._begin, self._span = now, period
            self._from_T = self.setpoint
            goal = se3.apply_delta(self.goal, command.delta)
            box = self.arm.workspace
            goal[:3, 3] = np.clip(goal[:3, 3], *_including(box.lower, box.upper, self.T[:3, 3]))
            self.goal = goal
        if not math.isnan(command.gripper):
            self._gripper_goal = float(np.clip(command.gripper, 0.0, 1.0))

    def follow(self, now: float) -> tuple[str, ...]:
        """One period towards the goal; returns the limits that were active."""
        u = min(max((now + self._period - self._begin) / self._span, 0.0), 1.0)
        lower, upper, lower_by, upper_by = velocity_bounds(self.q, self.v, self.arm.limits, self._period)
        names: list[str] = []
        if self._joint_goal is not None:
            wanted = self._joint_velocity(u)
            velocity = np.clip(wanted, lower, upper)
            if self._leaves_workspace(velocity):
                names.append("workspace")
                velocity = np.clip(0.0, lower, upper)
        else:
            twist, reasons = self._tool_twist(u)
            names += reasons
            posture = np.clip(self.arm.home - self.q, -1.0, 1.0)
            jacobian = self._kinematics.jacobian(self.arm.name, self.q)
            velocity = self._ik.solve(jacobian, twist, posture, lower, upper)
            if velocity is None:
                names.append("unsolved")
                velocity = np.clip(0.0, lower, upper)
        names += [
            LIMIT_NAMES[k]
            for k in sorted({*upper_by[velocity >= upper - _ACTIVE], *lower_by[velocity <= lower + _ACTIVE]})
        ]
        self._advance(velocity)
        if self._joint_goal is None:
            names += self._limit_lead()
        else:
            self.goal = self.T
        return tuple(names)

    def brake(self) -> None:
        """One period of braking as hard as the acceleration limits allow."""
        if self.still:
            self._move_gripper()
            return
        change = self.arm.limits.acceleration * self._period
        self._advance(self.v - np.clip(self.v, -change, change))

    def _advance(self, velocity: np.ndarray) -> None:
        self.q = self.q + velocity * self._period
        self.v = velocity
        self.T = self._kinematics.forward(self.arm.name, self.q)
        self._move_gripper()

    def _move_gripper(self) -> None:
        if self.arm.gripper is not None:
            change = self.arm.gripper.speed * self._period
            self.gripper += float(np.clip(self._gripper_goal - self.gripper, -change, change))

    def _joint_velocity(self, u: float) -> np.ndarray:
        """Joint velocity that keeps up with the set-point and stops at the goal without overshoot."""
        setpoint = self._from_q + u * (self._joint_goal - self._from_q)
        setpoint = np.clip(setpoint, *_including(self.arm.limits.lower, self.arm.limits.upper, self.q))
        forward = (setpoint - self._joint_setpoint) / self._period
        lag = self._joint_setpoint - self.q
        self._joint_setpoint = setpoint
        most = braking_speed(np.abs(lag), self.arm.limits.acceleration, self._period)
        return forward + np.clip(self._limits.gain * lag, -most, most)

    def _tool_twist(self, u: float) -> tuple[np.ndarray, list[str]]:
        """Tool twist (6,) that keeps up with the set-point, within tool speed and workspace."""
        setpoint = se3.interpolate(self._from_T, self.goal, u)
        forward = se3.delta(self.setpoint, setpoint) / self._period
        lag = se3.delta(self.T, self.setpoint)
        self.setpoint = setpoint
        names: list[str] = []
        tool, limits = self.arm.tool_limits, self._limits
        twist = np.empty(6)
        parts = (
            (slice(0, 3), tool.speed, limits.tool_acceleration),
            (slice(3, 6), tool.rotation, limits.tool_rotation_acceleration),
        )
        for part, speed, acceleration in parts:
            distance = math.sqrt(lag[part] @ lag[part])
            most = float(braking_speed(distance, acceleration, self._period))
            back = limits.gain * lag[part]
            if limits.gain * distance > most:
                back *= most / (limits.gain * distance)
            wanted = forward[part] + back
            length = math.sqrt(wanted @ wanted)
            if length > speed:
                wanted = wanted * (speed / length)
                names.append("tool_speed")
            twist[part] = wanted
        box, p = self.arm.workspace, self.T[:3, 3]
        most_up = braking_speed(box.upper - p, limits.tool_acceleration, self._period)
        most_down = -braking_speed(p - box.lower, limits.tool_acceleration, self._period)
        inside = np.clip(twist[:3], most_down, most_up)
        if (np.abs(inside - twist[:3]) > 1e-6).any():
            names.append("workspace")
            twist[:3] = inside
        return twist, names

    def _leaves_workspace(self, velocity: np.ndarray) -> bool:
        """True when the tool would be outside its box and farther out than now, once braked to rest."""
        stop = self.q + velocity * self._period + velocity * np.abs(velocity) / (2.0 * self.arm.limits.acceleration)
        box = self.arm.workspace
        now, then = self.T[:3, 3], self._kinematics.forward(self.arm.name, stop)[:3, 3]
        outside_now = np.maximum(box.lower - now, now - box.upper).max()
        outside_then = np.maximum(box.lower - then, then - box.upper).max()
        return outside_then > 0.0 and outside_then > outside_now

    def _limit_lead(self) -> list[str]:
        lead = se3.delta(self.T, self.goal)
        limits = self._limits
        scale = 1.0
        for part, most in ((lead[:3], limits.max_lead), (lead[3:], limits.max_lead_rotation)):
            length = math.sqrt(part @ part)
            if length > most:
                scale = min(scale, most / length)
        if scale == 1.0:
            return []
        self.goal = se3.apply_delta(self.T, scale * lead)
        self._from_T = self.setpoint = se3.apply_delta(self.T, scale * se3.delta(self.T, self.setpoint))
        self._begin = -math.inf
        return ["lead"]


def _including(lower: np.ndarray, upper: np.ndarray, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The box widened to hold `point`: who starts outside is not torn inside."""
    return np.minimum(lower, point), np.maximum(upper, point)
