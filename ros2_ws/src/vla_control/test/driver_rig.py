"""What the contract tests of the drivers need of a device, real in its protocol, that is not there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np


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
