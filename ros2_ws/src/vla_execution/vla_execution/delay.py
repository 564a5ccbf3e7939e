"""How long a chunk takes from its observation to its first use, from what was measured."""

from __future__ import annotations

import math
from collections import deque


class DelayEstimator:
    """The largest of the newest measured delays (arXiv 2506.07339, algorithm 1).

    Only the `newest` measurements count, so a spike leaves after as many chunks. Delays of warm-up inferences say
    nothing about later ones and must not be recorded.
    """

    def __init__(self, newest: int = 10):
        self._delays: deque[float] = deque(maxlen=newest)

    def record(self, delay: float) -> None:
        """A delay (s) that was really measured: from the chunk's observation to its arrival."""
        if not (math.isfinite(delay) and delay >= 0):
            raise ValueError(f"delay: expected a finite time of at least 0 s, found {delay}")
        self._delays.append(delay)

    @property
    def seconds(self) -> float | None:
        """The expected delay, s; None before the first measurement."""
        return max(self._delays, default=None)

    def steps(self, period: float) -> int:
        """The expected delay in steps of `period` s: actions of a chunk that are consumed before it arrives.

        Before the first measurement: 1.
        """
        return 1 if not self._delays else math.ceil(self.seconds / period - 1e-6)

    def clear(self) -> None:
        """Forget everything, for example when another policy takes over."""
        self._delays.clear()
