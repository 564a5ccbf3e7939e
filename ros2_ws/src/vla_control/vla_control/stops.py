"""Where emergency stops come from. Pure: the clock is passed in.

Each source ends in one latched stop of the safety controller, which only arming ends: the topic /emergency_stop (a
person's program, a key, a button on a digital input that some node publishes), the service, and an enabling device that
is let go or falls silent. A stop that an arm's own hardware makes comes with the driver status (`Measured.halted`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Stop:
    """A stop to make: `category` 0, 1 or 2 (see SafetyController.stop), `reason` for a person, `code` for counting."""

    category: int
    reason: str
    code: str


class Stops:
    """What stops the arms from outside.

    Args:
        category: stop category of all of them, 0, 1 or 2.
        enabling_device: whether the arms may be armed and move only while an enabling device says so.
        enable_timeout: it has to say so at least this often, s.

    Raises:
        ValueError: another category, a time-out that is not above zero.
    """

    def __init__(self, category: int = 2, enabling_device: bool = False, enable_timeout: float = 0.2):
        if category not in (0, 1, 2):
            raise ValueError(f"stop_category: expected 0, 1 or 2, found {category}")
        if not (math.isfinite(enable_timeout) and enable_timeout > 0.0):
            raise ValueError(f"enable_timeout: expected a number above zero, found {enable_timeout}")
        self.category, self.enabling_device, self.enable_timeout = category, enabling_device, enable_timeout
        self._heard = (False, -math.inf)  # what the enabling device said last, and when; one reference, for threads

    def topic(self) -> Stop:
        """The stop that /emergency_stop asks for."""
        return Stop(self.category, "emergency stop", "emergency_stop")

    def service(self) -> Stop:
        """The stop that the service asks for."""
        return Stop(self.category, "stop service", "stop_service")

    def enable(self, on: bool, now: float) -> None:
        """What the enabling device says at `now`, s of a clock that never jumps."""
        self._heard = (on, now)

    def missing(self, now: float) -> str:
        """Why the enabling device does not allow motion at `now`, "" when it does or none is asked for."""
        if not self.enabling_device:
            return ""
        on, heard = self._heard
        if math.isinf(heard):
            return "enabling device: nothing heard"
        if not on:
            return "enabling device: released"
        age = now - heard
        return f"enabling device: silent for {age:.2f} s" if age > self.enable_timeout else ""

    def watch(self, now: float) -> Stop | None:
        """The stop to make at `now` if the arms are armed: None while the enabling device is held, or none is used."""
        reason = self.missing(now)
        return Stop(self.category, reason, "enabling_device") if reason else None
