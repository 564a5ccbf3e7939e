"""Reads recorded bags, without ROS: which there are, what is in them, their messages.

    python -m vla_teleop.bags [FOLDER]      one line a bag
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.typesys import Stores, get_typestore

from vla_teleop.bag_metadata import FILE_NAME
from vla_teleop.bag_writer import BagError


@dataclass(frozen=True)
class BagInfo:
    """One finished bag: duration in s, messages per topic, types, losses per topic and the episode's facts."""

    folder: Path
    duration: float
    received: Mapping[str, int]
    types: Mapping[str, str]
    lost: Mapping[str, int]
    facts: Mapping[str, str]


def find(parent: str | os.PathLike) -> list[Path]:
    """The finished bags below `parent` (which may be one itself), sorted by path; hidden folders are left out."""
    parent = Path(parent).expanduser()
    found = (path.parent for path in parent.rglob(FILE_NAME))
    return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(parent).parts))


def info(folder: str | os.PathLike) -> BagInfo:
    """What metadata.yaml says of a bag.

    Raises:
        BagError: there is no finished bag.
    """
    path = Path(folder) / FILE_NAME
    try:
        tree = yaml.safe_load(path.read_text())["rosbag2_bagfile_information"]
        topics = tree["topics_with_message_count"]
        facts = dict(tree.get("custom_data") or {})
        facts.pop("received", None)
        return BagInfo(
            folder=Path(folder),
            duration=tree["duration"]["nanoseconds"] * 1e-9,
            received={t["topic_metadata"]["name"]: t["message_count"] for t in topics},
            types={t["topic_metadata"]["name"]: t["topic_metadata"]["type"] for t in topics},
            lost=json.loads(facts.pop("lost", "{}")),
            facts=facts,
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise BagError(f"bag {folder}: expected a readable {FILE_NAME}, found {error!r}") from error


def messages(folder: str | os.PathLike, topics: Iterable[str] | None = None) -> Iterator[tuple[str, float, Any]]:
    """The messages of a bag in the order they were recorded: (topic, time in s, message).

    The time is the header's stamp where the message has one that is set, else the log time. Messages have the
    fields of the ROS type, number arrays are NumPy arrays. The types come from the bag itself.

    Raises:
        BagError: there is no finished bag, or it is broken.
    """
    wanted = None if topics is None else set(topics)
    try:
        with AnyReader([Path(folder)], default_typestore=get_typestore(Stores.EMPTY)) as reader:
            chosen = [c for c in reader.connections if wanted is None or c.topic in wanted]
            if not chosen:
                return
            for connection, log_time, data in reader.messages(chosen):
                message = _message(reader, data, connection.msgtype)
                yield connection.topic, _stamp(message) or log_time * 1e-9, message
    except (OSError, EOFError) as error:
        raise BagError(f"bag {folder}: expected a finished bag, found {error}") from error
    except Exception as error:
        if type(error).__module__.startswith("rosbags"):
            raise BagError(f"bag {folder}: expected a readable bag, found {error}") from error
        raise


def _message(reader: AnyReader, data: bytes, kind: str) -> Any:
    """A message from its CDR bytes. rmw_serialize rounds sizes up, so some bytes may follow the last field."""
    try:
        return reader.deserialize(data, kind)
    except AnyReaderError as error:
        if "size mismatch" not in str(error):
            raise
        definition = reader.typestore.get_msgdef(kind)
        read = definition.deserialize_cdr_le if data[1] else definition.deserialize_cdr_be
        message, end = read(data[4:], 0, definition.cls, reader.typestore)
        if end + 4 + 8 < len(data):
            raise
        return message


def _stamp(message: Any) -> float:
    header = getattr(message, "header", None)
    return header.stamp.sec + header.stamp.nanosec * 1e-9 if header is not None else 0.0


def main(arguments: list[str]) -> int:
    """Print one line for every bag below the folder given."""
    parent = arguments[0] if arguments else "~/vla_bags"
    for folder in find(parent):
        bag = info(folder)
        lost = sum(bag.lost.values())
        words = [bag.facts.get(key, "") for key in ("outcome", "policy", "instruction")]
        mark = " recovered" if bag.facts.get("recovered") == "true" else ""
        count = sum(bag.received.values())
        print(f"{folder.name}  {bag.duration:.1f} s  {count} messages, {lost} lost{mark}  {'  '.join(words)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
