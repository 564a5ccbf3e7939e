"""Where one arm is to go: the goal that commands move, the set-point on the way there, and what to do for it now."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from vla_core.robot import Arm

from vla_control import kernels
from vla_control.command import ArmCommand, CommandRefused
from vla_control.ik import ArmTask
from vla_control.limits import RETURN_SPEED, hull

#: Rotations are told apart up to half a turn; a goal never leads by more than this, rad.
_MOST_ROTATION = 3.0


@dataclass(frozen=True)
class MotionLimits:
    """What a motion keeps beside the robot description's limits.

    max_lead, max_lead_rotation: the goal may run ahead of the commanded tool by this, m and rad, beside the part of
        the newest command that is not due yet.
    max_jump: a delta larger than this many times what the tool's speed limit allows is refused.
    max_joint_jump: a joint target farther than this from the commanded joints is refused, rad.
    tool_acceleration: with which the tool slows before the workspace's walls, and links before each other and
        obstacles, m/s^2.
    gain: of the feedback that removes the lag behind the set-point, 1/s.
    """

    max_lead: float = 0.1
    max_lead_rotation: float = 0.5
    max_jump: float = 5.0
    max_joint_jump: float = 0.5
    tool_acceleration: float = 1.0
    gain: float = 20.0


class Wish(NamedTuple):
    """What an arm is to do in this period: a quadratic cost of its joint velocities, and what limited it already.

    hessian (n, n), linear (n,). twist (6,): the tool velocity meant, m/s and rad/s.
    """

    hessian: np.ndarray
    linear: np.ndarray
    twist: np.ndarray
    limited: list[str]


class ArmGoal:
    """One arm's goal. `at` tells it where the arm is commanded to be.

    q, v (n,) commanded joints, rad (m), and their velocity; T: the tool there, T_base_tool (4, 4). goal: where commands
    want the tool,
    T_base_tool. The set-point goes from goal to goal evenly in time.
    """

    def __init__(self, arm: Arm, limits: MotionLimits, period: float):
        self.arm, self._limits, self._period = arm, limits, period
        # Half of the acceleration limits is left for the motion itself.
        self._brakes = 0.5 * arm.limits.acceleration, period, limits.gain
        self._task = ArmTask(*self._brakes)

    def start(self, q: np.ndarray, T: np.ndarray, gripper: float) -> None:
        """Stand at joint positions q (n,) and `gripper` (NaN: open)."""
        self.gripper = 1.0 if math.isnan(gripper) else min(max(float(gripper), 0.0), 1.0)
        self.at(q, np.zeros(len(q)), T)
        self.release()

    def at(self, q: np.ndarray, v: np.ndarray, T: np.ndarray) -> None:
        self.q, self.v, self.T = q, v, T

    def release(self) -> None:
        """Drop the goal: it is where the command is."""
        self.aim_here()
        self._cut = False  # the newest delta was, for the goal's lead
        self._joint_goal: np.ndarray | None = None
        self._joint_setpoint = self.q
        self._gripper_goal = self.gripper

    @property
    def in_joints(self) -> bool:
        """Whether the newest command named joints."""
        return self._joint_goal is not None

    @property
    def arrived(self) -> bool:
        """Whether the arm is commanded to be at its goal (within 0.1 mrad or mm)."""
        if self._joint_goal is not None:
            return bool(np.abs(self._joint_goal - self.q).max() < 1e-4)
        return bool(np.abs(kernels.change(self.T, self.goal)).max() < 1e-4)

    def aim_here(self) -> None:
        self.goal = self.setpoint = self.T
        self._end = -math.inf

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
            self._joint_goal = np.clip(command.joints, *hull(self.arm.limits.lower, self.arm.limits.upper, self.q))
        else:
            if self._joint_goal is not None:
                self._joint_goal = None
                self.aim_here()
            # What the goal leads by already stays as it is, so an arm that is pushed where it cannot go does not forget
            # the other axes; across that it goes on, and so glides.
            box, most = self.arm.workspace, self._most_lead(end - now)
            delta = np.array(command.delta, float)
            self.goal, self._cut = kernels.led_on(self.T, self.goal, delta, *most, box.lower, box.upper)
        self._end = end
        if not math.isnan(command.gripper):
            self._gripper_goal = min(max(float(command.gripper), 0.0), 1.0)

    def wish(self, now: float, jacobian: np.ndarray, bend: Callable[[np.ndarray], np.ndarray]) -> Wish:
        """What to do in this period to be at the goal in time.

        Args:
            jacobian: (6, n) base-frame axes at the tool point. bend: see `ArmTask.twist`.
        """
        left = self._end - now
        share = self._period / left if left > self._period else 1.0
        if self._joint_goal is None:
            twist, names = self._tool_twist(share, jacobian)
            home = np.minimum(np.maximum(self.arm.home - self.q, -1.0), 1.0)
            hessian, linear, slowed = self._task.twist(twist, home, bend)
        else:
            wanted, twist, names = self._joint_velocity(share, jacobian)
            hessian, linear, slowed = self._task.joints(wanted)
        if slowed:
            names.append("singularity")
        return Wish(hessian, linear, twist, names)

    def moved(self, now: float) -> list[str]:
        """After a period of motion: bring the gripper on, keep the goal's lead; returns the limits that were active."""
        self.move_gripper()
        if self._joint_goal is None:
            return self._limit_lead(now)
        self.goal = self.T
        return []

    def move_gripper(self) -> None:
        if self.arm.gripper is not None:
            change = self.arm.gripper.speed * self._period
            self.gripper += min(max(self._gripper_goal - self.gripper, -change), change)

    # ------------------------------------------------------------------------------------------------- private
    def _joint_velocity(self, share: float, jacobian: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Joint velocity (n,) that keeps up with the set-point within the tool's speed, and its twist (6,)."""
        setpoint = self._joint_setpoint + share * (self._joint_goal - self._joint_setpoint)
        forward = (setpoint - self._joint_setpoint) / self._period
        lag = self._joint_setpoint - self.q
        self._joint_setpoint = setpoint
        wanted = forward + kernels.correction_rates(lag, *self._brakes) * lag
        twist, tool = jacobian @ wanted, self.arm.tool_limits
        scale = min(1.0, tool.speed / max(_length(twist[:3]), 1e-9), tool.rotation / max(_length(twist[3:]), 1e-9))
        wanted *= scale
        if not kernels.inside(self.T[:3, 3], self.arm.workspace.lower, self.arm.workspace.upper):
            # Joints that acceleration holds up one by one may go along the wall instead, and never come back inside.
            wanted = kernels.straight(wanted, self.v, self.arm.limits.acceleration, self._period)
        return wanted, scale * twist, ["tool_speed"] if scale < 1.0 else []

    def _tool_twist(self, share: float, jacobian: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Tool twist (6,) that keeps up with the set-point within the tool's speed."""
        self.setpoint, step, lag = kernels.setpoint_on(self.T, self.goal, self.setpoint, share)
        twist = step / self._period + self._task.correction(jacobian, lag)
        tool = self.arm.tool_limits
        twist, slowed = kernels.slowed_twist(twist, tool.speed, tool.rotation)
        return twist, ["tool_speed"] if slowed else []

    def _most_lead(self, left: float) -> tuple[float, float]:
        """How far the goal may lead, m and rad, when its motion is due in `left` s."""
        limits, tool = self._limits, self.arm.tool_limits
        due = max(left - self._period, 0.0)
        rotation = min(limits.max_lead_rotation + tool.rotation * due, _MOST_ROTATION)
        return limits.max_lead + tool.speed * due, rotation

    def _limit_lead(self, now: float) -> list[str]:
        box, most = self.arm.workspace, self._most_lead(self._end - now)
        goal, setpoint, cut, changed = kernels.lead_cut(
            self.T, self.goal, self.setpoint, *most, box.lower, box.upper, RETURN_SPEED * self._period
        )
        if changed:
            self.goal, self.setpoint = goal, setpoint
        return ["lead"] if cut or self._cut else []


def _length(x: np.ndarray) -> float:
    return math.hypot(*x.tolist())
