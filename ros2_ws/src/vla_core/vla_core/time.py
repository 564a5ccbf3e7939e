"""ROS times as float seconds and back.

Logic counts in float seconds of the ROS clock. A double holds a present-day time (1.8e9 s) to 0.24 us, far
below any period here, but not to the nanosecond: compare stamps with a tolerance, or keep the message itself
for identity.
"""

from __future__ import annotations

import math
from typing import Protocol


class TimeMessage(Protocol):
    """builtin_interfaces/Time or Duration: whole seconds and nanoseconds in [0, 1e9)."""

    sec: int
    nanosec: int


def seconds(msg_time: TimeMessage) -> float:
    """Seconds of a builtin_interfaces/Time or Duration."""
    return msg_time.sec + msg_time.nanosec * 1e-9


def to_msg(seconds: float) -> tuple[int, int]:
    """(sec, nanosec) of a time in seconds, nanosec rounded and in [0, 1e9): Time(sec=..., nanosec=...).

    Raises:
        ValueError: a time that is not finite or outside the message's 32-bit seconds.
    """
    if not math.isfinite(seconds) or not -(2.0**31) <= seconds < 2.0**31:
        raise ValueError(f"time: expected finite seconds within 32 bits, found {seconds}")
    whole = math.floor(seconds)
    nanoseconds = round((seconds - whole) * 1e9)
    return (whole + 1, 0) if nanoseconds == 1_000_000_000 else (whole, nanoseconds)
