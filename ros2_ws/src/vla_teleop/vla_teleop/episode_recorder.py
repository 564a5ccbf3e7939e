"""EpisodeRecorder: takes serialized messages from a node and writes them to a bag in a thread of its own.

Threading: all methods are for one caller thread (the node's executor); it waits for the disk only in `start`,
`stop` and `discard`. Between caller and disk stands a queue bounded in bytes; a message that does not fit is
dropped and counted as lost. When the disk is full the bag is finished as it is, recording stops and
`take_failure` tells why, once.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vla_teleop.bag_metadata import Qos
from vla_teleop.bag_writer import BagError, BagWriter
from vla_teleop.losses import LossCounter

#: The writer thread looks for messages this often, s: cheaper than waking it for each of them.
_IDLE_SLEEP = 0.02


class RecorderError(ValueError):
    """A request that does not fit the recorder's state; the message names the request, expected and found."""


@dataclass(frozen=True)
class RawMessage:
    """A serialized message as it arrived: times in ns, publisher GID and sequence number where known."""

    topic: str
    type: str
    data: bytes
    stamp: int
    publisher: bytes = b""
    sequence: int | None = None


class EpisodeRecorder:
    """Records one episode after the other below `folder`.

    Args:
        folder: where the bags go, one folder per episode: `<date>_<time>_<robot>_<task>_<n>`.
        robot: name of the robot.
        qos: offered QoS per topic.
        compression: of the bags, see BagWriter.
        max_queue_bytes: most bytes that wait for the disk.
    """

    def __init__(
        self,
        folder: Path,
        robot: str,
        qos: Mapping[str, Qos],
        compression: str = "zstd",
        max_queue_bytes: int = 256 << 20,
    ):
        self.folder = folder.expanduser()
        self.robot = robot
        self._qos, self._compression, self._max_queue_bytes = qos, compression, max_queue_bytes
        self._lock = threading.Lock()
        self._queue: deque[tuple[RawMessage, int]] = deque()
        self._queued_bytes = 0
        self._overflow: dict[str, int] = {}
        self._losses = LossCounter()
        self._ending = False
        self._failure: str | None = None
        self._writer: BagWriter | None = None
        self._thread: threading.Thread | None = None
        self._log_time = _LogTime()

    # ---- state

    @property
    def recording(self) -> bool:
        """Whether messages are being recorded."""
        return self._thread is not None and self._failure is None

    @property
    def bag(self) -> Path | None:
        """Folder of the running recording."""
        return self._writer.folder if self._writer else None

    def lost(self) -> dict[str, int]:
        """Messages lost per topic so far: sequence gaps and queue overflow."""
        with self._lock:
            return self._all_lost()

    @property
    def received(self) -> int:
        """Messages written so far."""
        return sum(list(self._writer.counts.values())) if self._writer else 0

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for the disk."""
        return self._queued_bytes

    def take_failure(self) -> tuple[Path, str] | None:
        """Bag and reason when recording stopped by itself since the last call; the recorder is idle after."""
        if self._failure is None:
            return None
        failed = (self._writer.folder, self._failure)
        self._reset()
        return failed

    # ---- episodes

    def start(
        self, task: str, facts: Mapping[str, object], now: int, latched: Iterable[RawMessage] = ()
    ) -> Path:
        """Begin an episode at time `now` (ns); `latched` are messages that still hold from before.

        Raises:
            RecorderError: one is being recorded.
            BagError: the bag cannot be opened (BagFull: no room on the disk).
        """
        if self._thread is not None:
            raise RecorderError(f"start: expected no recording, found {self.bag} open")
        folder = self.folder / episode_name(self.folder, self.robot, task)
        self._writer = BagWriter(folder, self._compression, qos=self._qos, facts=facts)
        self._log_time = _LogTime()
        self._thread = threading.Thread(target=self._write_all, name="bag writer")
        self._thread.start()
        for message in latched:
            self.put(message, now)
        return folder

    def put(self, message: RawMessage, now: int) -> None:
        """Record a message that arrived at `now` (ns, ROS clock); ignored when not recording."""
        if not self.recording:
            return
        with self._lock:
            if message.publisher:
                self._losses.saw(message.topic, message.publisher, message.sequence)
            if self._queued_bytes + len(message.data) > self._max_queue_bytes:
                self._overflow[message.topic] = self._overflow.get(message.topic, 0) + 1
                return
            self._queue.append((message, self._log_time.at(now)))
            self._queued_bytes += len(message.data)

    def stop(self, facts: Mapping[str, object]) -> Path:
        """End the episode and keep it, with more `facts` (outcome, note).

        Raises:
            RecorderError: nothing is being recorded.
            BagError: the bag could not be finished; what was written can be recovered.
        """
        writer = self._end("stop")
        writer.facts |= facts | self._log_time.facts()
        writer.lost = self._all_lost()
        try:
            writer.close()
        finally:
            self._reset()
        return writer.folder

    def discard(self) -> Path:
        """End the episode and throw it away.

        Raises:
            RecorderError: nothing is being recorded.
        """
        writer = self._end("discard")
        writer.discard()
        self._reset()
        return writer.folder

    # ---- private

    def _end(self, request: str) -> BagWriter:
        if self._thread is None:
            raise RecorderError(f"{request}: expected a running recording, found none")
        if self._failure is not None:
            raise RecorderError(f"{request}: expected a running recording, found it ended: {self._failure}")
        self._ending = True
        self._thread.join()
        if self._failure is not None:
            raise RecorderError(f"{request}: expected a running recording, found it ended: {self._failure}")
        return self._writer

    def _reset(self) -> None:
        self._thread.join()
        self._thread = self._writer = self._failure = None
        self._ending = False
        self._queue.clear()
        self._queued_bytes = 0
        self._overflow = {}
        self._losses = LossCounter()

    def _all_lost(self) -> dict[str, int]:
        lost = self._losses.lost()
        for topic, count in self._overflow.items():
            lost[topic] = lost.get(topic, 0) + count
        return lost

    def _write_all(self) -> None:
        """Thread: write what is queued until told to end, and then the rest."""
        writer = self._writer
        try:
            while True:
                ending = self._ending
                with self._lock:
                    batch, self._queue = self._queue, deque()
                    writer.lost = self._all_lost()
                for message, log_time in batch:
                    sequence = message.sequence or 0
                    writer.write_serialized(
                        message.topic, message.type, message.data, message.stamp, log_time, sequence
                    )
                    with self._lock:
                        self._queued_bytes -= len(message.data)
                writer.poll()
                if ending:
                    return
                if not batch:
                    time.sleep(_IDLE_SLEEP)
        except Exception as error:  # a bag that cannot be written must not take the node with it
            self._fail(writer, error)

    def _fail(self, writer: BagWriter, error: Exception) -> None:
        reason = str(error)
        writer.facts |= {"outcome": "unknown", "note": f"recording ended early: {reason}"}
        try:
            writer.close()
        except BagError as second:
            reason = f"{reason}; {second}"
        self._failure = reason


class _LogTime:
    """Log times of one bag (ns): the clock's, never going backwards; a jump back continues where it was."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._offset = 0
        self._jumps = 0

    def at(self, now: int) -> int:
        time_ns = now + self._offset
        if self._last is not None and time_ns < self._last:
            self._offset += self._last - time_ns
            self._jumps += 1
            time_ns = self._last
        self._last = time_ns
        return time_ns

    def facts(self) -> dict[str, object]:
        return {"clock_jumps": self._jumps} if self._jumps else {}


def episode_name(parent: Path, robot: str, task: str) -> str:
    """Name of the next bag below `parent`: `<date>_<time>_<robot>_<task>_<n>`, n counting up there."""
    numbers = [0]
    if parent.is_dir():
        numbers += [int(m.group(1)) for f in parent.iterdir() if (m := re.search(r"_(\d+)$", f.name))]
    return f"{time.strftime('%Y%m%d_%H%M%S')}_{_word(robot)}_{_word(task or 'task')}_{max(numbers) + 1:04d}"


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "none"
