"""Pacing of simulated time by the monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pacer:
    """Says when the next control period begins, so that simulated time never runs faster than `factor` real time.

    A period that came late by less than one period is made up for; more than that is lost, so that a stall slows
    simulated time down and is never followed by a burst.

    Args:
        period: control period in simulated time, s.
        factor: simulated per real time; 0 means as fast as the machine can.
        clock: monotonic time, s.
    """

    def __init__(self, period: float, factor: float = 1.0, clock: Callable[[], float] = time.monotonic):
        if not 0.0 <= factor < float("inf"):
            raise ValueError(f"realtime_factor: expected 0 (unpaced) or above, found {factor}")
        self._period = period
        self._wall = period / factor if factor > 0 else 0.0
        self._clock = clock
        self._due = clock()
        self._since, self._periods = self._due, 0

    def remaining(self) -> float:
        """Time until the next period begins, s; 0 when it is due."""
        return max(0.0, self._due - self._clock())

    def advance(self) -> None:
        """The period that was due has been done."""
        self._due = max(self._due + self._wall, self._clock())
        self._periods += 1

    def factor(self) -> float:
        """Simulated per real time since the last call."""
        now = self._clock()
        factor = self._periods * self._period / max(now - self._since, 1e-9)
        self._since, self._periods = now, 0
        return factor
