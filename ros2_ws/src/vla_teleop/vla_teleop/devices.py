"""What a teleoperation device gives: the interface between keyboards, gamepads and the teleop node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

#: Everything a device can ask for besides motion; sent once per press.
BUTTONS = (
    "arm",  # arm the safety controller
    "disarm",
    "stop",  # stop at once and stay stopped until armed again
    "gripper",  # open or close the gripper of the selected arm
    "next_arm",
    "faster",
    "slower",
    "record_start",
    "record_success",
    "record_failure",
    "record_discard",
    "quit",
)


class DeviceError(ValueError):
    """A device that cannot be opened or has gone away; the message names it, the expected and the found."""


@dataclass(frozen=True)
class TeleopInput:
    """What the operator asks for now.

    `twist` (6,): linear then angular, base-frame axes, each -1 .. 1 of the speed set; zero unless `deadman`.
    `deadman`: the operator holds on; false means stop. `buttons`: pressed since the last read, of BUTTONS.
    """

    twist: np.ndarray = field(default_factory=lambda: np.zeros(6))
    deadman: bool = False
    buttons: tuple[str, ...] = ()


class TeleopDevice(Protocol):
    """One input device. Not thread-safe."""

    help: str

    def read(self, now: float) -> TeleopInput:
        """The input at `now` (monotonic, s); never waits.

        Raises:
            DeviceError: the device has gone away.
        """
        ...

    def close(self) -> None:
        """Give the device back as it was found."""
        ...
