"""Counts messages that never arrived, from the sequence numbers that DDS publishers give their messages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class _Publisher:
    first: int
    last: int
    received: int


class LossCounter:
    """Lost messages per topic: the gaps between the first and the newest number seen of each publisher.

    A message counts as lost when its publisher sent it after the first one seen of that publisher and before
    the newest one, and it did not arrive. Messages that come late or out of order are taken back out. What a
    publisher sent before the first or after the last message that arrived cannot be known and is not counted,
    nor is a publisher whose middleware gives no numbers.
    """

    def __init__(self) -> None:
        self._publishers: dict[tuple[str, bytes], _Publisher] = {}

    def saw(self, topic: str, publisher: bytes, sequence: int | None) -> None:
        """Note a message of `publisher` (its GID) with the publisher's `sequence` number."""
        if sequence is None:
            return
        known = self._publishers.get((topic, publisher))
        if known is None:
            self._publishers[topic, publisher] = _Publisher(sequence, sequence, 1)
        elif sequence >= known.first:
            known.last = max(known.last, sequence)
            known.received += 1

    def lost(self) -> dict[str, int]:
        """Lost messages per topic, zeros left out."""
        totals: dict[str, int] = {}
        for (topic, _), seen in self._publishers.items():
            missing = seen.last - seen.first + 1 - seen.received
            if missing > 0:
                totals[topic] = totals.get(topic, 0) + missing
        return totals
