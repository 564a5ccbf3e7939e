"""Commands to the safety controller, and what makes one unusable. No ROS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from vla_core.robot import Robot


class CommandRefused(ValueError):
    """A command that is not followed. `code` is a short name for counting, the message tells a person."""

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True)
class ArmCommand:
    """One arm's part. Exactly one of `delta` and `joints` is given.

    delta: (6,) translation (m) and rotation vector (rad) of the tool over the command's period, base-frame axes.
    joints: (n,) joint targets at the end of the period, rad (m).
    gripper: target opening, 0 closed to 1 open; NaN keeps the present target.
    """

    delta: np.ndarray | None = None
    joints: np.ndarray | None = None
    gripper: float = math.nan


@dataclass(frozen=True)
class Command:
    """One period of motion for all arms of the robot.

    stamp: when it was made, s of the ROS clock. sequence: counts up per source. period: s. hold: brake smoothly and
    stay; `arms` is ignored. observation: time of the observation it rests on, s, NaN for none (teleoperation).
    """

    stamp: float
    sequence: int
    source: str
    period: float
    hold: bool = False
    arms: Mapping[str, ArmCommand] = field(default_factory=dict)
    frame: str = ""
    observation: float = math.nan


def check(command: Command, robot: Robot) -> None:
    """Raise CommandRefused unless `command` is whole and made for `robot`.

    Codes: stamp, period, frame, arms, size, not_finite, gripper.
    """
    if not math.isfinite(command.stamp):
        raise CommandRefused("stamp", f"expected a finite time, found {command.stamp}")
    if not (math.isfinite(command.period) and 0.0 < command.period <= 1.0):
        raise CommandRefused("period", f"expected 0 to 1 s, found {command.period}")
    if command.frame not in ("", robot.base_frame):
        raise CommandRefused("frame", f"expected {robot.base_frame!r}, found {command.frame!r}")
    if command.hold:
        return
    if command.arms.keys() != set(robot.arm_names):
        raise CommandRefused("arms", f"expected {sorted(robot.arm_names)}, found {sorted(command.arms)}")
    for arm in robot.arms:
        part = command.arms[arm.name]
        given = [v for v in (part.delta, part.joints) if v is not None]
        if len(given) != 1:
            raise CommandRefused("size", f"arm {arm.name}: expected a delta or joints, found {len(given)} of them")
        length = 6 if part.delta is not None else len(arm.joints)
        if np.shape(given[0]) != (length,):
            raise CommandRefused("size", f"arm {arm.name}: expected {length} numbers, found shape {np.shape(given[0])}")
        if not np.isfinite(given[0]).all():
            raise CommandRefused("not_finite", f"arm {arm.name}: expected finite numbers, found {list(given[0])}")
        if math.isinf(part.gripper):
            raise CommandRefused("not_finite", f"arm {arm.name}: gripper: expected 0 to 1, found {part.gripper}")
        if not math.isnan(part.gripper) and not -0.05 <= part.gripper <= 1.05:
            raise CommandRefused("gripper", f"arm {arm.name}: expected 0 to 1, found {part.gripper}")
