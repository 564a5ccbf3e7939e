"""When the arm was not executing anything: actions are consumed by execution, not by waiting."""

from __future__ import annotations

import math
from collections import deque


class Standstill:
    """Intervals in which no plan was executed, the newest `kept` of them. Standing still from the beginning."""

    def __init__(self, kept: int = 50):
        self._past: deque[tuple[float, float]] = deque(maxlen=kept)  # (begin, end), s
        self._since: float | None = -math.inf

    def update(self, now: float, still: bool) -> None:
        """What holds from `now` (s) on."""
        if still and self._since is None:
            self._since = now
        elif not still and self._since is not None:
            self._past.append((self._since, now))
            self._since = None

    def within(self, begin: float, end: float) -> float:
        """Time without execution between `begin` and `end`, s."""
        intervals = [*self._past, (math.inf if self._since is None else self._since, math.inf)]
        return sum(max(min(end, b) - max(begin, a), 0.0) for a, b in intervals)
