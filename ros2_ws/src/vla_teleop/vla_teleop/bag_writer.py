"""BagWriter: writes one episode as a rosbag2 folder that `ros2 bag`, Foxglove and `rosbags` open.

    <folder>/<name>_0.mcap        profile ros2, cdr messages, ros2msg schemas, indexed chunks
    <folder>/metadata.yaml        written last: a bag that has it is finished, one without it was cut off

Crash safety. Everything written is handed to the operating system at least every `flush_period` seconds as
whole chunks, so a killed process loses no more than that; a power cut loses what came after the last
`sync_period`. `recover.py` finishes a bag that was cut off. The writer locks its file for as long as it
lives, so recovery never touches a bag that is still being written.

Full disk. Some megabytes are set aside when the bag is opened. When a write finds the disk full, they are
given back, the chunk in hand is completed with them and `BagFull` is raised; `close` then has room for the
index and metadata.yaml, so the bag so far is finished and readable.

Not thread-safe: one thread writes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mcap.writer import CompressionType, Writer

from vla_teleop import interfaces
from vla_teleop.bag_metadata import BagMetadata, Qos, TopicEntry, qos_text, sync_folder
from vla_teleop.reserved_file import ReservedFile

_COMPRESSION = {"zstd": CompressionType.ZSTD, "lz4": CompressionType.LZ4, "none": CompressionType.NONE}


class BagError(ValueError):
    """A bag that cannot be written or read as asked; the message names it, the expected and the found."""


class BagFull(BagError):
    """The disk is full (or a size limit is reached): nothing more is taken, `close` finishes the bag."""


class BagWriter:
    """Writes messages into a new rosbag2 folder.

    Args:
        folder: the folder to make; must not exist. Its parents are made.
        compression: of the chunks: "zstd" (smallest), "lz4" or "none" (cheapest).
        chunk_size: uncompressed size at which a chunk is ended, bytes.
        qos: offered QoS per topic; topics not named get reliable, volatile, depth 10.
        facts: facts about the episode (robot, task, seed, ...) known at the start; they survive a crash. More
            can be put into the attribute `facts` until `close`.
        flush_period: longest time that a message waits before it is handed to the system, s, as long as
            messages or calls of `poll` come in.
        sync_period: time between two syncs to the medium, s; `None`: only at the end.

    Attributes:
        counts: messages written per topic.
        lost: messages known to be lost per topic, set by the caller.

    Raises:
        BagError: the folder exists, or `compression` is unknown.
        BagFull: not even the reserve fits on the disk.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        compression: str = "zstd",
        chunk_size: int = 1 << 20,
        qos: Mapping[str, Qos] | None = None,
        facts: Mapping[str, object] | None = None,
        flush_period: float = 0.2,
        sync_period: float | None = 1.0,
    ):
        if compression not in _COMPRESSION:
            raise BagError(f"compression: expected one of {sorted(_COMPRESSION)}, found {compression!r}")
        self.folder = Path(folder).expanduser()
        self.path = self.folder / f"{self.folder.name}_0.mcap"
        self.facts: dict[str, object] = dict(facts or {})
        self.counts: dict[str, int] = {}
        self.lost: dict[str, int] = {}
        self._qos = dict(qos or {})
        self._topics: dict[str, _Topic] = {}
        self._schemas: dict[str, int] = {}
        self._lost_written: dict[str, int] = {}
        self._start: int | None = None
        self._end = 0
        self._flush_period, self._sync_period = flush_period, sync_period
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            raise BagError(f"bag {self.folder}: expected a new folder, found one there") from None
        except OSError as error:
            raise BagError(f"bag {self.folder}: expected a folder that can be made, found {error}") from error
        try:
            self._file: ReservedFile | None = ReservedFile(self.path)
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise BagFull(f"bag {self.folder}: expected room to begin, found {error}") from error
        self._writer = Writer(self._file, chunk_size=chunk_size, compression=_COMPRESSION[compression])
        self._writer.start("ros2", "vla_teleop")
        self._writer.add_metadata("episode", _texts(self.facts))
        self._flushed = self._synced = time.monotonic()

    # ---- messages

    def write(self, topic: str, message: object, stamp_ns: int, log_time: int | None = None) -> None:
        """Write an rclpy message; see `write_serialized`."""
        from rclpy.serialization import serialize_message

        data = serialize_message(message)
        self.write_serialized(topic, interfaces.type_name(message), data, stamp_ns, log_time)

    def write_serialized(
        self,
        topic: str,
        type_name: str,
        data: bytes,
        stamp_ns: int,
        log_time: int | None = None,
        sequence: int = 0,
    ) -> None:
        """Write a message given as CDR bytes.

        Args:
            topic: absolute topic name.
            type_name: `package/msg/Type`.
            data: serialized message with its encapsulation header.
            stamp_ns: time of publication, ns.
            log_time: time by which it is sorted and replayed, ns; by default `stamp_ns`.
            sequence: sequence number of the publisher, 0 when unknown.

        Raises:
            BagFull: the disk is full. Raised first by the call that found it so, whose message is kept.
            BagError: the bag is closed, or the topic has another type in this bag.
        """
        self._check()
        time_ns = stamp_ns if log_time is None else log_time
        self.add_topic(topic, type_name)
        channel = self._topics[topic].channel
        self._writer.add_message(channel, time_ns, data, stamp_ns, sequence & 0xFFFFFFFF)
        self.counts[topic] += 1
        self._start = time_ns if self._start is None else min(self._start, time_ns)
        self._end = max(self._end, time_ns)
        self.poll()

    def add_topic(
        self,
        topic: str,
        type_name: str,
        definition: str | None = None,
        type_hash: str | None = None,
        qos: Qos | None = None,
    ) -> None:
        """Declare a topic, as its first message does too; the installed packages give what is not given."""
        if topic in self._topics:
            known = self._topics[topic].type
            if known != type_name:
                raise BagError(f"bag {self.folder}: topic {topic}: expected type {known}, found {type_name}")
            return
        self._check()
        if definition is None:
            definition = interfaces.definition(type_name)
        if type_hash is None:
            type_hash = interfaces.type_hash(type_name)
        qos = qos or self._qos.get(topic, Qos())
        if type_name not in self._schemas:
            self._schemas[type_name] = self._writer.register_schema(type_name, "ros2msg", definition.encode())
        metadata = {"offered_qos_profiles": qos_text(qos), "topic_type_hash": type_hash}
        channel = self._writer.register_channel(topic, "cdr", self._schemas[type_name], metadata)
        self._topics[topic] = _Topic(type_name, type_hash, qos, channel)
        self.counts[topic] = 0

    def poll(self) -> None:
        """Flush and sync when it is time; to be called now and then while no messages come.

        Raises:
            BagFull: the disk is full.
        """
        now = time.monotonic()
        if now - self._flushed >= self._flush_period:
            self._writer.flush()
            if self.lost != self._lost_written:
                self._writer.add_metadata("lost", _texts(self.lost))
                self._lost_written = dict(self.lost)
            self._flushed = now
        if self._sync_period is not None and now - self._synced >= self._sync_period:
            self._file.sync()
            self._synced = time.monotonic()
        self._check()

    # ---- end

    def close(self) -> None:
        """Finish the bag: index, facts, counts, metadata.yaml. Does nothing on a closed bag.

        Raises:
            BagFull: there was no room even for that; the bag stays cut off, its messages can be recovered.
        """
        if self._file is None:
            return
        try:
            self._writer.flush()
            metadata = self._metadata()
            self._writer.add_metadata("episode", _texts(self.facts))
            self._writer.add_metadata("received", _texts(self.counts))
            self._writer.add_metadata("lost", _texts(self._all_lost()))
            self._writer.add_metadata("rosbag2", {"serialized_metadata": metadata.text()})
            self._writer.finish()
            self._file.sync()
            self._file.release()
            metadata.save(self.folder)
            sync_folder(self.folder.parent)
        except OSError as error:
            raise BagFull(f"bag {self.folder}: expected room to finish it, found {error}") from error
        finally:
            self._file.close()
            self._file = None

    def discard(self) -> None:
        """Throw the bag away: remove its folder."""
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- private

    def _check(self) -> None:
        if self._file is None:
            raise BagError(f"bag {self.folder}: expected an open bag, found it closed")
        if self._file.full is not None:
            raise BagFull(f"bag {self.folder}: expected room on the disk, found {self._file.full}")

    def _all_lost(self) -> dict[str, int]:
        return {topic: self.lost.get(topic, 0) for topic in {**self.counts, **self.lost}}

    def _metadata(self) -> BagMetadata:
        topics = [
            TopicEntry(name, topic.type, topic.hash, topic.qos, self.counts[name])
            for name, topic in self._topics.items()
        ]
        custom = _texts(self.facts)
        custom |= {"received": json.dumps(self.counts), "lost": json.dumps(self._all_lost())}
        return BagMetadata(self.path.name, self._start or 0, self._end, topics, custom)


@dataclass(frozen=True)
class _Topic:
    type: str
    hash: str
    qos: Qos
    channel: int


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}
