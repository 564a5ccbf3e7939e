"""Timelines: the newest values of one stream with their stamps, read at any time between them.

Clock policy: a stamp older than the newest one is refused with `ClockJump`; the caller decides (after a
simulation reset or a clock set back: `clear()`, then add again). A stamp equal to the newest replaces its
value. A jump forwards is no error: the values on both sides are kept, and reading between them interpolates.

Not thread-safe: one thread, or a lock of the caller's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from vla_core import se3

KINDS = ("vector", "pose", "object")


class TimelineError(ValueError):
    """A value that cannot be added or a time that cannot be read; the message names expected and found."""


class ClockJump(TimelineError):
    """A stamp older than the newest one: the clock, or the stream, went backwards."""


class OutOfRange(TimelineError):
    """A time outside the values by more than the tolerance, or a timeline that is empty."""


class Stamped(NamedTuple):
    """A value and its stamp, s."""

    stamp: float
    value: Any


class Timeline:
    """The newest `capacity` values of one stream.

    Kinds: "vector" (arrays of one shape, interpolated linearly), "pose" (transforms (4, 4), interpolated on
    SE(3): translation linear, rotation geodesic), "object" (anything, such as an image message; `nearest`
    only).

    Adding costs a constant amortised time and no allocation: entries lie in order in arrays of twice the
    capacity, and the newer half moves to the front when they are full. Reading is a bisection.
    """

    def __init__(self, capacity: int, kind: str = "vector"):
        if kind not in KINDS:
            raise TimelineError(f"kind of a timeline: expected one of {KINDS}, found {kind!r}")
        if capacity < 1:
            raise TimelineError(f"capacity of a timeline: expected 1 or more, found {capacity}")
        self.capacity, self.kind = int(capacity), kind
        self._stamps = np.empty(2 * self.capacity)
        self._values: np.ndarray | list = []
        self.clear()

    def __len__(self) -> int:
        return self._end - self._first

    @property
    def oldest(self) -> float:
        """Stamp of the oldest value, s. Raises OutOfRange when empty."""
        self._need_values()
        return float(self._stamps[self._first])

    @property
    def newest(self) -> float:
        """Stamp of the newest value, s. Raises OutOfRange when empty."""
        self._need_values()
        return float(self._stamps[self._end - 1])

    def clear(self) -> None:
        """Forget every value (and the shape of vectors)."""
        self._first = self._end = 0
        self._values = [None] * (2 * self.capacity) if self.kind == "object" else []

    def add(self, stamp: float, value: Any) -> None:
        """Append a value, or replace the newest one when the stamp is the same.

        Raises:
            ClockJump: the stamp is older than the newest.
            TimelineError: the stamp or a number is not finite, or the value has another shape than those
            before.
        """
        stamp = float(stamp)
        if not np.isfinite(stamp):
            raise TimelineError(f"stamp: expected finite seconds, found {stamp}")
        if len(self) and stamp < self._stamps[self._end - 1]:
            raise ClockJump(f"stamp: expected {self.newest:.9f} s or later, found {stamp:.9f} s")
        if self.kind != "object":
            value = self._checked(value)
        if len(self) and stamp == self._stamps[self._end - 1]:
            self._values[self._end - 1] = value
            return
        if self._end == len(self._stamps):
            self._move_to_front()
        self._stamps[self._end] = stamp
        self._values[self._end] = value
        self._end += 1
        if len(self) > self.capacity:
            if self.kind == "object":
                self._values[self._first] = None
            self._first += 1

    def sample(self, stamp: ArrayLike, tolerance: float = 0.0) -> np.ndarray:
        """Value at a time, interpolated; stamps of shape (...) give values (..., *shape).

        Up to `tolerance` seconds before the oldest and after the newest value that value is held; there is no
        extrapolation.

        Raises:
            OutOfRange: a stamp further outside, or no values.
        """
        if self.kind == "object":
            raise TimelineError("sample: expected a timeline of vectors or poses, found objects (use nearest)")
        self._need_values()
        stamp = np.asarray(stamp, float)
        stamps, values = self._stamps[self._first : self._end], self._values[self._first : self._end]
        if not np.all((stamp >= stamps[0] - tolerance) & (stamp <= stamps[-1] + tolerance)):
            raise OutOfRange(
                f"sample: expected a time in [{stamps[0]:.6f}, {stamps[-1]:.6f}] s (tolerance {tolerance} s), "
                f"found {stamp}"
            )
        if len(stamps) == 1:
            return np.broadcast_to(values[0], (*stamp.shape, *values.shape[1:])).copy()
        left = np.clip(np.searchsorted(stamps, stamp, side="right") - 1, 0, len(stamps) - 2)
        u = np.clip((stamp - stamps[left]) / (stamps[left + 1] - stamps[left]), 0.0, 1.0)
        if self.kind == "pose":
            return se3.interpolate(values[left], values[left + 1], u)
        u = u.reshape(*u.shape, *(1,) * (values.ndim - 1))
        return (1 - u) * values[left] + u * values[left + 1]

    def nearest(self, stamp: float) -> Stamped:
        """The value whose stamp is nearest (of two as near the older one), with its stamp.

        Raises:
            OutOfRange: no values, or a time that is not finite.
        """
        self._need_values()
        if not np.isfinite(stamp):
            raise OutOfRange(f"nearest: expected finite seconds, found {stamp}")
        stamps = self._stamps[self._first : self._end]
        right = int(np.searchsorted(stamps, stamp))
        if right == len(stamps) or (right > 0 and stamp - stamps[right - 1] <= stamps[right] - stamp):
            right -= 1
        value = self._values[self._first + right]
        return Stamped(float(stamps[right]), value if self.kind == "object" else value.copy())

    def _checked(self, value: ArrayLike) -> np.ndarray:
        value = np.asarray(value, float)
        if self.kind == "pose" and value.shape != (4, 4):
            raise TimelineError(f"pose: expected shape (4, 4), found {value.shape}")
        if not len(self._values):
            self._values = np.empty((2 * self.capacity, *value.shape))
        if value.shape != self._values.shape[1:]:
            raise TimelineError(f"value: expected shape {self._values.shape[1:]}, found {value.shape}")
        if not np.isfinite(value).all():
            raise TimelineError(f"value: expected finite numbers, found {value}")
        return value

    def _move_to_front(self) -> None:
        count = len(self)
        self._stamps[:count] = self._stamps[self._first : self._end]
        self._values[:count] = self._values[self._first : self._end]
        if self.kind == "object":
            self._values[count:] = [None] * (2 * self.capacity - count)
        self._first, self._end = 0, count

    def _need_values(self) -> None:
        if not len(self):
            raise OutOfRange("timeline: expected at least one value, found none")
