"""Where one arm is commanded to be and where it is going: goal, set-point, joint velocities inside the limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from vla_core import se3
from vla_core.kinematics import Kinematics
from vla_core.robot import Arm

from vla_control.command import ArmCommand, CommandRefused
from vla_control.ik import DifferentialIk
from vla_control.limits import RETURN_SPEED, approach_speed, braking_speed, velocity_bounds

#: A bound counts as active within this of it, rad/s.
_ACTIVE = 1e-9
#: Rotations are told apart up to half a turn; a goal never leads by more than this, rad.
_MOST_ROTATION = 3.0


@dataclass(frozen=True)
class MotionLimits:
    """What a motion keeps beside the robot description's limits.

    max_lead, max_lead_rotation: the goal may run ahead of the commanded tool by this, m and rad, beside the part of
        the newest command that is not due yet.
    max_jump: a delta larger than this many times what the tool's speed limit allows is refused.
    max_joint_jump: a joint target farther than this from the commanded joints is refused, rad.
    tool_acceleration: with which the tool brakes in front of the workspace's walls, m/s^2.
    gain: of the feedback that removes the lag behind the set-point, 1/s.
    """

    max_lead: float = 0.1
    max_lead_rotation: float = 0.5
    max_jump: float = 5.0
    max_joint_jump: float = 0.5
    tool_acceleration: float = 1.0
    gain: float = 20.0


@dataclass(frozen=True)
class JointTarget:
    """What is sent to one arm for the end of this period: position and velocity (n,), opening 0 to 1."""

    position: np.ndarray
    velocity: np.ndarray
    gripper: float


class ArmMotion:
    """One arm's commanded state and goal, moved one control period at a time.

    q, v: (n,) commanded joints, rad (m), and their velocity. T: the tool there, T_base_tool (4, 4).
    goal: where commands want the tool, T_base_tool. The set-point goes from goal to goal evenly in time.
    """

    def __init__(self, arm: Arm, kinematics: Kinematics, limits: MotionLimits, period: float):
        self.arm, self._kinematics, self._limits, self._period = arm, kinematics, limits, period
        self._ik = DifferentialIk(len(arm.joints), self._correction_rate)
        self._led: tuple = None, None, np.zeros(6)
        self.start(np.array(arm.home, float), math.nan)

    def start(self, q: np.ndarray, gripper: float) -> None:
        """Stand at joint positions q (n,) and `gripper` (NaN: open)."""
        self.q, self.v = q, np.zeros(len(q))
        self.gripper = 1.0 if math.isnan(gripper) else min(max(float(gripper), 0.0), 1.0)
        self.T = self._kinematics.forward(self.arm.name, q)
        self.release()

    def release(self) -> None:
        """Drop the goal: it is where the command is."""
        self._aim_here()
        self._cut = False  # the newest delta was, for the goal's lead
        self._joint_goal: np.ndarray | None = None
        self._joint_setpoint = self.q
        self._gripper_goal = self.gripper

    def halt(self) -> None:
        """Stand still from now on, for motors that are without power."""
        self.v = np.zeros(len(self.q))
        self.release()

    @property
    def still(self) -> bool:
        return not self.v.any()

    def target(self) -> JointTarget:
        return JointTarget(self.q.copy(), self.v.copy(), self.gripper)

    def check_jump(self, command: ArmCommand, period: float) -> None:
        """Raise CommandRefused (`jump`) when the command asks for more than any sound sender would."""
        name, tool, limits = self.arm.name, self.arm.tool_limits, self._limits
        if command.joints is not None:
            jump = np.abs(command.joints - self.q)
            k = int(jump.argmax())
            if jump[k] > limits.max_joint_jump:
                raise CommandRefused(
                    "jump",
                    f"arm {name}: {self.arm.joints[k]} {jump[k]:.3f} rad away, at most {limits.max_joint_jump} rad",
                )
            return
        reach = limits.max_jump * period
        for part, most, unit in (
            (command.delta[:3], reach * tool.speed, "m"),
            (command.delta[3:], min(reach * tool.rotation, _MOST_ROTATION), "rad"),
        ):
            length = math.hypot(*part)
            if length > most:
                raise CommandRefused("jump", f"arm {name}: {length:.4f} {unit} in {period} s, at most {most:.4f}")

    def take(self, command: ArmCommand, now: float, end: float) -> None:
        """Move the goal; the set-point is there at time `end`, s."""
        if command.joints is not None:
            if self._joint_goal is None:
                self._joint_setpoint = self.q
            self._joint_goal = np.clip(command.joints, *_hull(self.arm.limits.lower, self.arm.limits.upper, self.q))
        else:
            if self._joint_goal is not None:
                self._joint_goal = None
                self._aim_here()
            delta = self._within_lead(command.delta, end - now)
            self._cut = delta is not command.delta
            self.goal = se3.apply_delta(self.goal, delta)
            self._keep_in_workspace(self.goal)
        self._end = end
        if not math.isnan(command.gripper):
            self._gripper_goal = min(max(float(command.gripper), 0.0), 1.0)

    def follow(self, now: float) -> tuple[str, ...] | None:
        """One period towards the goal; returns the limits that were active, or None when it could only brake."""
        period, arm = self._period, self.arm
        left = self._end - now
        share = period / left if left > period else 1.0
        bounds = velocity_bounds(self.q, self.v, arm.limits, period)
        lower, upper = bounds.lower, bounds.upper
        jacobian = self._kinematics.jacobian(arm.name, self.q)
        p, box = self.T[:3, 3], arm.workspace
        inward, outward = approach_speed(
            np.array([p - box.lower, box.upper - p]), self._limits.tool_acceleration, period
        ) * [[-1.0], [1.0]]
        braked = self._braked(lower, upper)
        self._ik.bound(jacobian, lower, upper, inward, outward, braked)
        if self._joint_goal is None:
            twist, names = self._tool_twist(share, jacobian)
            velocity = self._ik.follow_twist(twist, np.clip(arm.home - self.q, -1.0, 1.0))
        else:
            wanted, twist, names = self._joint_velocity(share, jacobian)
            velocity = self._ik.follow_joints(wanted)
        if velocity is None:
            self.brake()
            return None
        if ((twist[:3] > outward + 1e-6) | (twist[:3] < inward - 1e-6)).any():
            names.append("workspace")
        velocity, held = self._keep_stop_inside(velocity, braked)
        if held and "workspace" not in names:
            names.append("workspace")
        at_lower, at_upper = velocity <= lower + _ACTIVE, velocity >= upper - _ACTIVE
        if (at_lower | at_upper).any():
            names += bounds.made_by(at_lower, at_upper)
        self._advance(velocity)
        if self._joint_goal is None:
            names += self._limit_lead(now)
        else:
            self.goal = self.T
        return tuple(names)

    def brake(self) -> None:
        """One period of braking as hard as the acceleration limits allow; the goal stays where the command is."""
        if not self.still:
            bounds = velocity_bounds(self.q, self.v, self.arm.limits, self._period)
            self._advance(self._braked(bounds.lower, bounds.upper))
            self._aim_here()
        else:
            self._move_gripper()

    # ------------------------------------------------------------------------------------------------- private
    def _aim_here(self) -> None:
        self.goal = self.setpoint = self.T
        self._end = -math.inf

    def _braked(self, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """Velocity (n,) after a period of braking: all joints come to rest together, so the arm keeps its way."""
        periods = float((np.abs(self.v) / self.arm.limits.acceleration).max()) / self._period
        slower = self.v * (1.0 - 1.0 / periods) if periods > 1.0 else np.zeros(len(self.v))
        return np.minimum(np.maximum(slower, lower), upper)  # a joint near its limit brakes harder

    def _advance(self, velocity: np.ndarray) -> None:
        self.q = self.q + velocity * self._period
        self.v = velocity
        self.T = self._kinematics.forward(self.arm.name, self.q)
        self._move_gripper()

    def _move_gripper(self) -> None:
        if self.arm.gripper is not None:
            change = self.arm.gripper.speed * self._period
            self.gripper += min(max(self._gripper_goal - self.gripper, -change), change)

    def _joint_velocity(self, share: float, jacobian: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Joint velocity (n,) that keeps up with the set-point within the tool's speed, and its twist (6,)."""
        setpoint = self._joint_setpoint + share * (self._joint_goal - self._joint_setpoint)
        forward = (setpoint - self._joint_setpoint) / self._period
        lag = self._joint_setpoint - self.q
        self._joint_setpoint = setpoint
        wanted = forward + self._correction_rate(np.abs(lag)) * lag
        twist, tool = jacobian @ wanted, self.arm.tool_limits
        scale = min(1.0, tool.speed / max(_length(twist[:3]), 1e-9), tool.rotation / max(_length(twist[3:]), 1e-9))
        return scale * wanted, scale * twist, ["tool_speed"] if scale < 1.0 else []

    def _tool_twist(self, share: float, jacobian: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Tool twist (6,) that keeps up with the set-point within the tool's speed."""
        step = share * se3.delta(self.setpoint, self.goal)
        lag = se3.delta(self.T, self.setpoint)
        self.setpoint = self.goal if share == 1.0 else se3.apply_delta(self.setpoint, step)
        twist = step / self._period + self._ik.correction(jacobian, lag)
        tool, names = self.arm.tool_limits, []
        for part, speed in ((slice(0, 3), tool.speed), (slice(3, 6), tool.rotation)):
            length = _length(twist[part])
            if length > speed:
                twist[part] *= speed / length
                names.append("tool_speed")
        return twist, names

    def _correction_rate(self, displacement: np.ndarray) -> np.ndarray:
        """Rate (..., n) at which each joint may take away a displacement (..., n) >= 0 and still brake in time, 1/s.

        Half of the acceleration limits is left for the motion itself.
        """
        away = np.maximum(displacement, 1e-9)
        speed = braking_speed(away, 0.5 * self.arm.limits.acceleration, self._period)
        return np.minimum(speed / away, self._limits.gain)

    def _keep_stop_inside(self, velocity: np.ndarray, braked: np.ndarray) -> tuple[np.ndarray, bool]:
        """The velocity, taken back towards braking where the tool could no longer stop inside its box."""
        if not self._leaves_workspace(velocity):
            return velocity, False
        slow, fast, best = 0.0, 1.0, braked
        for _ in range(4):
            middle = 0.5 * (slow + fast)
            tried = braked + middle * (velocity - braked)
            if self._leaves_workspace(tried):
                fast = middle
            else:
                slow, best = middle, tried
        return best, True

    def _leaves_workspace(self, velocity: np.ndarray) -> bool:
        """True when the tool would be outside its box and farther out than now, once braked to rest."""
        limits, box, p = self.arm.limits, self.arm.workspace, self.T[:3, 3]
        time = float((np.abs(velocity) / limits.acceleration).max())
        # A joint near its limit brakes harder than the others and stays inside.
        lower, upper = _hull(limits.lower, limits.upper, self.q)
        stop = np.minimum(np.maximum(self.q + velocity * (self._period + 0.5 * time), lower), upper)
        then = self._kinematics.forward(self.arm.name, stop)[:3, 3]
        if not ((then < box.lower) | (then > box.upper)).any():
            return False
        lower, upper = _hull(box.lower, box.upper, p)
        return bool(((then < lower) | (then > upper)).any())

    def _keep_in_workspace(self, T: np.ndarray, step: float = 0.0) -> None:
        """Move a pose (in place) into the workspace; while the tool is outside, only `step` (m) nearer than that."""
        box, p = self.arm.workspace, self.T[:3, 3]
        if not ((T[:3, 3] < box.lower) | (T[:3, 3] > box.upper)).any():
            return
        nearer = p + np.clip(np.clip(p, box.lower, box.upper) - p, -step, step)
        T[:3, 3] = np.clip(T[:3, 3], *_hull(box.lower, box.upper, nearer))

    def _most_lead(self, left: float) -> tuple[float, float]:
        """How far the goal may lead, m and rad, when its motion is due in `left` s."""
        limits, tool = self._limits, self.arm.tool_limits
        due = max(left - self._period, 0.0)
        rotation = min(limits.max_lead_rotation + tool.rotation * due, _MOST_ROTATION)
        return limits.max_lead + tool.speed * due, rotation

    def _within_lead(self, delta: np.ndarray, left: float) -> np.ndarray:
        """The delta (6,), or as much of it as the goal may lead. What the goal leads by already stays as it is: so an
        arm that is pushed where it cannot go does not forget the other axes."""
        lead = self._lead()
        moves, turns = self._most_lead(left)
        share = _share_within(lead[:3], delta[:3], moves), _share_within(lead[3:], delta[3:], turns)
        return delta if share == (1.0, 1.0) else np.repeat(share, 3) * delta

    def _lead(self) -> np.ndarray:
        """Change (6,) from the commanded tool to the goal; worked out once for each pair of them."""
        if self._led[0] is not self.T or self._led[1] is not self.goal:
            self._led = self.T, self.goal, se3.delta(self.T, self.goal)
        return self._led[2]

    def _limit_lead(self, now: float) -> list[str]:
        lead = self._lead()
        moves, turns = self._most_lead(self._end - now)
        shares = min(1.0, moves / max(_length(lead[:3]), 1e-9)), min(1.0, turns / max(_length(lead[3:]), 1e-9))
        cut = min(shares) < 1.0 - 1e-9
        if cut:
            scale = np.repeat(shares, 3)
            self.goal = se3.apply_delta(self.T, scale * lead)
            self.setpoint = se3.apply_delta(self.T, scale * se3.delta(self.T, self.setpoint))
        box, p = self.arm.workspace, self.T[:3, 3]
        if ((p < box.lower) | (p > box.upper)).any():
            self.goal, self.setpoint = self.goal.copy(), self.setpoint.copy()
            self._keep_in_workspace(self.goal, RETURN_SPEED * self._period)
            self._keep_in_workspace(self.setpoint)
        return ["lead"] if cut or self._cut else []


def _length(x: np.ndarray) -> float:
    return math.sqrt(x @ x)


def _share_within(lead: np.ndarray, step: np.ndarray, most: float) -> float:
    """Largest share (0 to 1) of a step (3,) that keeps |lead + share step| <= most, or does not lead farther."""
    a, b, c = float(step @ step), float(lead @ step), float(lead @ lead) - most * most
    if a + 2.0 * b + c <= 0.0:
        return 1.0
    if c >= 0.0:
        return 1.0 if b < 0.0 else 0.0
    return min(1.0, (math.sqrt(b * b - a * c) - b) / a)


def _hull(lower: np.ndarray, upper: np.ndarray, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The box widened to hold `point`."""
    return np.minimum(lower, point), np.maximum(upper, point)
