"""What every arm driver does: connect, read the state, send targets, stop, close. No ROS here.

A driver turns one arm's native protocol into SI units and back, and nothing else: limits, watchdogs and decisions are
the safety controller's. It never invents a motion: until `send` is called the arm stays where it is, whatever targets
the hardware held before; after `stop`, or a fault, it stays so until `connect` is called again.

A fault ends in one DriverError that names the device, what was expected and what was found. After it the driver is of
no use until `connect` succeeds, which may be called again at any time and never moves the arm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from vla_core.robot import Arm, Robot


class DriverError(RuntimeError):
    """The device cannot be used: not there, cut off, refusing, or saying what makes no sense."""


@dataclass(frozen=True)
class Capabilities:
    """What an arm can do.

    stops: stop categories that the hardware has (words of ISO 10218; no rating is claimed): 2 controlled stop and
    hold, 1 controlled stop, then power off, 0 power off at once. effort, wrench: whether ArmState has them. gripper:
    whether it has one; gripper_force: whether its largest force can be set, gripper_newtons: in N, by ArmInfo, and not
    only by a setting of the driver in its own unit. rate: Hz, the fastest that targets are taken.
    """

    stops: frozenset[int]
    rate: float
    effort: bool = False
    wrench: bool = False
    gripper: bool = False
    gripper_force: bool = False
    gripper_newtons: bool = False


@dataclass(frozen=True)
class ArmInfo:
    """What a driver is told of its arm.

    joints: names in kinematic order. period: s between two targets. gripper_force: N, the most that it grips with.
    robot: the description that the arm, by its name, is part of, for drivers that compute with its model. node: an
    rclpy node that somebody spins, for drivers that speak by topics.
    """

    name: str
    joints: tuple[str, ...]
    period: float
    gripper: bool = False
    gripper_force: float | None = None
    robot: Robot | None = None
    node: Any = None

    def described(self) -> Arm | None:
        """This arm in its description."""
        return self.robot.arm(self.name) if self.robot is not None else None


@dataclass(frozen=True)
class ArmState:
    """What was measured at `stamp`, s, of the clock that the driver was given.

    position, velocity, effort (n,): rad, rad/s and N m (A where the hardware only knows its motors' currents) in the
    order of the joints. wrench (6,): force, N, and torque, N m, on the tool, in its frame. gripper: opening, 0 closed
    to 1 open. What is not measured is None. halted: why the hardware itself does not follow targets, "" if it does: a
    protective stop, its emergency stop, torque that is off, an overload.
    """

    stamp: float
    position: np.ndarray
    velocity: np.ndarray
    effort: np.ndarray | None = None
    wrench: np.ndarray | None = None
    gripper: float | None = None
    halted: str = ""


@dataclass(frozen=True)
class ArmTarget:
    """Where to be at the end of this period: position, rad, and velocity, rad/s, (n,); gripper: opening, None: as it
    is."""

    position: np.ndarray
    velocity: np.ndarray
    gripper: float | None = None


class ArmDriver(ABC):
    """One arm. No two methods are called at once.

    `read` and `send` return within a period: what the hardware makes wait longer has a thread of the driver's own.
    Config: frozen dataclass of a driver's settings, the rest of its section in the robot file. clock: gives s.
    """

    Config: ClassVar[type]
    capabilities: Capabilities

    def __init__(self, arm: ArmInfo, config: Any, clock: Callable[[], float]):
        self.arm, self.config, self.clock = arm, config, clock

    @abstractmethod
    def connect(self) -> None:
        """Open the device, check that it is the arm that the settings describe, and let it hold where it is.

        Nothing moves. Ends what an earlier stop or fault left, where the hardware allows. Raises DriverError.
        """

    @abstractmethod
    def read(self) -> ArmState:
        """The newest state. Raises DriverError when the device does not answer, or when its newest state is old."""

    @abstractmethod
    def send(self, target: ArmTarget) -> None:
        """Follow `target`. Raises ValueError for one that is not sound (see `check`), DriverError when it cannot be
        sent, also after `stop`; the arm then stays where it is."""

    @abstractmethod
    def stop(self, category: int) -> int:
        """Stop now. Returns the category that was done: the one asked for, or the next lower one that the hardware
        has, or else the lowest that it has. Never raises: a device that is cut off stops by its own watchdog, as its
        page in docs/ says."""

    @abstractmethod
    def close(self) -> None:
        """Hold, and let go of the device. May be called again. Never raises."""

    def stop_category(self, category: int) -> int:
        """The category that a stop of `category` becomes on this hardware."""
        lower = [own for own in self.capabilities.stops if own <= category]
        return max(lower, default=min(self.capabilities.stops))

    def check(self, target: ArmTarget) -> None:
        """Raises ValueError unless a target is finite and of this arm's size."""
        for name, value in (("position", target.position), ("velocity", target.velocity)):
            if np.shape(value) != (len(self.arm.joints),) or not np.all(np.isfinite(value)):
                raise ValueError(
                    f"arm {self.arm.name}: target {name}: expected {len(self.arm.joints)} finite numbers, found {value}"
                )
        if target.gripper is not None and not 0.0 <= target.gripper <= 1.0:
            raise ValueError(f"arm {self.arm.name}: target gripper: expected 0 to 1, found {target.gripper}")
