"""Messages that all nodes make."""

from __future__ import annotations

from builtin_interfaces.msg import Time
from vla_core.time import to_msg


def time_message(seconds: float) -> Time:
    """A time in s of the ROS clock; ValueError as of `vla_core.time.to_msg`."""
    sec, nanosec = to_msg(seconds)
    return Time(sec=sec, nanosec=nanosec)
