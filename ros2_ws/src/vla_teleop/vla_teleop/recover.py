"""Finishes bags that were cut off: by kill -9, a power cut, a full disk.

A bag folder that holds an .mcap file but no metadata.yaml was cut off, unless a live process holds the lock
of its file. Every whole chunk of it is read from the front, up to the first record that is incomplete or
broken, and written into a new bag beside it, which then takes its place; killed in the middle, the next
recovery begins again. A recovered bag carries `recovered: true` in its facts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mcap.records import Channel, McapRecord, Message, Metadata, Schema
from mcap.stream_reader import StreamReader

from vla_teleop.bag_metadata import FILE_NAME, qos_from_text
from vla_teleop.bag_writer import BagError, BagWriter
from vla_teleop.reserved_file import RESERVE_NAME, is_locked

_WORK_FOLDER = ".recovering"
#: A file that holds no whole chunk and is no larger than this was cut off within its first one.
_FIRST_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Recovery:
    """What became of one bag that was cut off: `messages` kept; `error` says why it was left as it was."""

    folder: Path
    messages: int = 0
    error: str = ""


def recover_all(parent: str | os.PathLike) -> list[Recovery]:
    """Recover every bag directly below `parent` that was cut off and is written by no one any more."""
    results = []
    for folder in unfinished(parent):
        try:
            results.append(Recovery(folder, recover(folder)))
        except (BagError, OSError) as error:
            results.append(Recovery(folder, error=str(error)))
    return results


def unfinished(parent: str | os.PathLike) -> list[Path]:
    """The bag folders directly below `parent` that were cut off, sorted by name."""
    parent = Path(parent).expanduser()
    if not parent.is_dir():
        return []
    folders = sorted(f for f in parent.iterdir() if f.is_dir() and not f.name.startswith("."))
    return [f for f in folders if _cut_off(f)]


def recover(folder: str | os.PathLike) -> int:
    """Finish one bag that was cut off; a bag cut off within its first chunk is removed.

    Returns:
        The number of messages kept.

    Raises:
        BagError: it is no bag that was cut off, or nothing in it can be read; it is left as it is.
    """
    folder = Path(folder)
    if not _cut_off(folder):
        raise BagError(f"bag {folder}: expected one that was cut off, found it finished, in use or empty")
    source = _recording(folder)
    work = folder.parent / _WORK_FOLDER
    shutil.rmtree(work, ignore_errors=True)
    try:
        writer = BagWriter(work / folder.name, sync_period=None)
        _copy(source, writer)
        writer.close()
        count = sum(writer.counts.values())
        if count:
            os.replace(writer.path, source)
            os.replace(writer.folder / FILE_NAME, folder / FILE_NAME)
            (folder / RESERVE_NAME).unlink(missing_ok=True)
        elif source.stat().st_size <= _FIRST_CHUNK_BYTES:
            shutil.rmtree(folder)
        else:
            raise BagError(f"bag {folder}: expected messages in {source.name}, found none that can be read")
        return count
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _cut_off(folder: Path) -> bool:
    source = _recording(folder)
    return source is not None and not (folder / FILE_NAME).exists() and not is_locked(source)


def _recording(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*_0.mcap"))), None)


def _copy(source: Path, writer: BagWriter) -> None:
    schemas: dict[int, Schema] = {}
    channels: dict[int, Channel] = {}
    for record in readable_records(source):
        if isinstance(record, Schema):
            schemas[record.id] = record
        elif isinstance(record, Channel):
            schema = schemas[record.schema_id]
            channels[record.id] = record
            writer.add_topic(
                record.topic,
                schema.name,
                schema.data.decode(),
                record.metadata.get("topic_type_hash", ""),
                qos_from_text(record.metadata.get("offered_qos_profiles", "")),
            )
        elif isinstance(record, Metadata) and record.name == "episode":
            writer.facts |= record.metadata
        elif isinstance(record, Metadata) and record.name == "lost":
            writer.lost = {topic: int(count) for topic, count in record.metadata.items()}
        elif isinstance(record, Message):
            channel = channels[record.channel_id]
            writer.write_serialized(
                channel.topic,
                schemas[channel.schema_id].name,
                record.data,
                record.publish_time,
                record.log_time,
                record.sequence,
            )
    writer.facts["recovered"] = "true"


def readable_records(path: Path) -> Iterator[McapRecord]:
    """The records of an MCAP file from the front, chunks opened, up to the first broken one."""
    with open(path, "rb") as stream:
        reader = StreamReader(stream, validate_crcs=True, record_size_limit=max(1, path.stat().st_size))
        records = reader.records
        while True:
            try:
                record = next(records)
            except Exception:  # its end, or whatever the reader makes of half a record: nothing more to read
                return
            yield record
