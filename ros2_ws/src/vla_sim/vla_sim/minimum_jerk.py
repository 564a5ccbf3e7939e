"""Minimum-jerk motion through way-points (Flash and Hogan 1985): at rest at every way-point, smooth between."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def minimum_jerk(u: float) -> float:
    """Progress 0..1 at time fraction u: 10 u^3 - 15 u^4 + 6 u^5, with u clipped to 0..1."""
    u = min(max(u, 0.0), 1.0)
    return u * u * u * (10.0 + u * (6.0 * u - 15.0))


class Track:
    """A value (K,) over time: way-points as (start time s, end time s, value reached), one after the other."""

    def __init__(self, start: Sequence[float] | float, legs: Sequence[tuple[float, float, Sequence[float] | float]]):
        self._start = np.atleast_1d(np.asarray(start, float))
        self._legs = [(t0, t1, np.atleast_1d(np.asarray(value, float))) for t0, t1, value in legs]

    @property
    def end(self) -> float:
        """Time at which the last way-point is reached, s."""
        return self._legs[-1][1] if self._legs else 0.0

    def __call__(self, time: float) -> np.ndarray:
        value = self._start
        for t0, t1, goal in self._legs:
            if time <= t0:
                break
            value = value + minimum_jerk((time - t0) / (t1 - t0)) * (goal - value)
        return value
