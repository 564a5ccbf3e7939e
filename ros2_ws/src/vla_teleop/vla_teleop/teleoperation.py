"""Teleoperation: turns what a device gives into one control period of motion after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from vla_core.robot import Robot

from vla_teleop.devices import TeleopInput

#: Speeds that `faster` and `slower` step through, fractions of the robot's largest tool speed.
SPEEDS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)

#: After the operator lets go, hold is asked for this long, s; then another sender may drive.
RELEASE_TIME = 0.5


@dataclass(frozen=True)
class ArmMotion:
    """One arm's part: `delta` (6,) over one period, m and rad, base axes; `gripper` target 0 .. 1 or NaN: keep."""

    delta: np.ndarray
    gripper: float


@dataclass(frozen=True)
class Motion:
    """One control period: `hold`, or a part for every arm of the robot."""

    hold: bool
    arms: Mapping[str, ArmMotion]


class Teleoperation:
    """Selected arm, speed and gripper targets; pure, with the clock passed in (monotonic, s)."""

    def __init__(self, robot: Robot, arm: str = "", speed: float = 0.2):
        if not 0 < speed <= 1:
            raise ValueError(f"speed: expected a fraction above 0 and at most 1, found {speed}")
        self._robot = robot
        self.arm = robot.arm(arm).name if arm else robot.arms[0].name
        self.speed = speed
        self._grippers: dict[str, float] = {}  # targets asked for, by arm
        self._active: float | None = None

    def press(self, button: str, openings: Mapping[str, float]) -> None:
        """Take a button that concerns the motion; `openings` are the gripper targets in force, by arm."""
        names = self._robot.arm_names
        if button == "next_arm":
            self.arm = names[(names.index(self.arm) + 1) % len(names)]
        elif button == "faster":
            self.speed = next((s for s in SPEEDS if s > self.speed + 1e-9), SPEEDS[-1])
        elif button == "slower":
            self.speed = next((s for s in reversed(SPEEDS) if s < self.speed - 1e-9), SPEEDS[0])
        elif button == "gripper":
            now = self._grippers.get(self.arm, openings.get(self.arm, 1.0))
            self._grippers[self.arm] = 0.0 if now > 0.5 else 1.0

    def motion(self, taken: TeleopInput, period: float, now: float) -> Motion | None:
        """The motion for the next `period` (s); None when the operator lets go and someone else may drive.

        Full deflection is `speed` times the tool's largest speed, on a diagonal too. Arms that are not selected
        get no motion. A gripper press moves the gripper without the deadman.
        """
        if taken.deadman or "gripper" in taken.buttons:
            self._active = now
        if self._active is None or now - self._active > RELEASE_TIME:
            self._grippers.clear()
            return None
        if not taken.deadman and not self._grippers:
            return Motion(True, {})
        arms = {}
        for arm in self._robot.arms:
            delta = np.zeros(6)
            if arm.name == self.arm and taken.deadman:
                delta[:3] = _unit(taken.twist[:3]) * arm.tool_limits.speed
                delta[3:] = _unit(taken.twist[3:]) * arm.tool_limits.rotation
            gripper = self._grippers.get(arm.name, float("nan"))
            arms[arm.name] = ArmMotion(delta * self.speed * period, gripper)
        return Motion(False, arms)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(1.0, float(np.linalg.norm(vector)))
