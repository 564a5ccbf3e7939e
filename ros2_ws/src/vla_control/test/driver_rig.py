"""What the contract tests of the drivers need of a device, real in its protocol, that is not there."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from vla_control.drivers import ArmDriver, ArmTarget


class Rig(ABC):
    """One emulated device. It speaks its protocol on a pseudo-terminal, a virtual bus or loopback, or stands at the
    boundary of its vendor's library; `boundary` says which, for docs/. `time` gives the s that the driver is given.
    """

    #: Name of the driver, and what is emulated where.
    driver: str
    boundary: str
    #: Joints, whether there is a gripper, and the rounding of the protocol, rad.
    joints: int
    gripper: bool = False
    resolution: float = 1e-9

    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """Configuration for load_driver, the arm's keys included."""

    @abstractmethod
    def time(self) -> float:
        """The driver's clock, s."""

    @abstractmethod
    def wait(self, duration: float) -> None:
        """Let `duration` s pass for the device and the driver."""

    @abstractmethod
    def position(self) -> np.ndarray:
        """Where the device's joints truly are, rad (n,)."""

    @abstractmethod
    def place(self, position: np.ndarray) -> None:
        """Move the device's joints by hand, rad (n,)."""

    @abstractmethod
    def moved_by_commands(self) -> bool:
        """Whether a command since the rig was made asked the device for another place than where it was."""

    #: Whether it has a cable.
    cuttable: bool = True

    @abstractmethod
    def cut(self) -> None:
        """Pull the cable."""

    @abstractmethod
    def mend(self) -> None:
        """Plug it in again."""

    def powered(self) -> bool | None:
        """Whether the motors have power; None: this hardware cannot say."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of everything."""


class RealTimeRig(Rig):
    """A device in real time."""

    def time(self) -> float:
        return time.monotonic()

    def wait(self, duration: float) -> None:
        time.sleep(duration)


def target(position, opening: float | None = None) -> ArmTarget:
    """A target at rest."""
    return ArmTarget(np.array(position, float), np.zeros(len(position)), opening)


def drive(rig: Rig, driver: ArmDriver, goal, duration: float, opening: float | None = None, speed: float = 0.5) -> None:
    """Send targets on the way to `goal` (n,) as a controller does: one a period, at `speed`, rad/s, at most."""
    period = driver.arm.period
    at = driver.read().position
    for _ in range(int(duration / period)):
        at = at + np.clip(goal - at, -speed * period, speed * period)
        driver.send(target(at, opening))
        rig.wait(period)
        driver.read()


def move(rig: Rig, driver: ArmDriver, change: float = 0.1, duration: float = 0.4, speed: float = 0.5) -> None:
    """Drive every joint by `change`, rad."""
    drive(rig, driver, driver.read().position + change, duration, speed=speed)


def until(holds: Callable[[], object], limit: float = 30.0) -> None:
    """Wait until something holds; the limit, s, is a deadline, not an expectation: machines that run tests are busy."""
    end = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.005)
