"""The plan in force: the newest chunk, and what was executed before it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vla_execution.blending import cross_fade
from vla_execution.chunk import ON_TIME, Chunk

#: Past of the plan that is kept, and the part of it that a request's remainder carries, s. An observation that a
#: policy uses is younger than that; before it the remainder's first target is held.
KEPT = 1.0
REMAINDER_PAST = 0.3


@dataclass(frozen=True)
class _Segment:
    since: float  # in force from this time on, s
    window: float  # cross-faded from the segment before over this time, s
    chunk: Chunk


class Plan:
    """Chunks, each in force from a time on. `at` gives the past as it was executed, the future as planned."""

    def __init__(self, chunk: Chunk, now: float):
        self._segments = [_Segment(now, 0.0, chunk)]

    @property
    def chunk(self) -> Chunk:
        """The newest chunk."""
        return self._segments[-1].chunk

    def switch(self, chunk: Chunk, now: float, window: float = 0.0) -> None:
        """Put `chunk` in force at `now` (s), cross-fading over `window` (s)."""
        self._segments.append(_Segment(now, window, chunk))
        while len(self._segments) > 1 and self._segments[1].since + self._segments[1].window < now - KEPT:
            self._segments.pop(0)

    def covers(self, time: float) -> bool:
        """Whether an action is planned for `time` (s)."""
        return time <= self.chunk.end + ON_TIME

    def at(self, time: float) -> np.ndarray:
        """Target (D,) at `time` (s)."""
        last = len(self._segments) - 1
        while last > 0 and time < self._segments[last].since:
            last -= 1
        return self._blended(time, last)

    def _blended(self, time: float, index: int) -> np.ndarray:
        segment = self._segments[index]
        target = segment.chunk.at(time)
        if index == 0 or time >= segment.since + segment.window:
            return target
        u = (time - segment.since) / segment.window
        return cross_fade(segment.chunk.layout, self._blended(time, index - 1), target, u)

    def remainder(self, now: float) -> Chunk:
        """The plan on the newest chunk's due times from `REMAINDER_PAST` before `now` (s) to its end."""
        chunk = self.chunk
        oldest = self._segments[0].chunk.start
        first = chunk.index(max(now - REMAINDER_PAST, oldest))
        first = min(first, chunk.horizon - 1)
        if chunk.due(first) < oldest - ON_TIME:
            first += 1
        targets = np.array([self.at(chunk.due(k)) for k in range(first, chunk.horizon)])
        return replace(chunk, targets=targets, start=chunk.due(first))
