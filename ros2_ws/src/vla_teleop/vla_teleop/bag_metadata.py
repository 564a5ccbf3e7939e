"""The metadata.yaml of a rosbag2 folder (version 9: ROS 2 Jazzy and newer)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

VERSION = 9
FILE_NAME = "metadata.yaml"

# What rosbag2 writes for a duration that was left at its default (infinite).
_INFINITE = {"sec": 9223372036, "nsec": 854775807}


@dataclass(frozen=True)
class Qos:
    """Quality of service that a topic's publisher offers; what `ros2 bag play` publishes it with."""

    reliability: str = "reliable"
    durability: str = "volatile"
    depth: int = 10

    def to_dict(self) -> dict:
        """As one entry of `offered_qos_profiles`."""
        return {
            "history": "keep_last",
            "depth": self.depth,
            "reliability": self.reliability,
            "durability": self.durability,
            "deadline": dict(_INFINITE),
            "lifespan": dict(_INFINITE),
            "liveliness": "automatic",
            "liveliness_lease_duration": dict(_INFINITE),
            "avoid_ros_namespace_conventions": False,
        }


def qos_text(qos: Qos) -> str:
    """`offered_qos_profiles` as the YAML text that an MCAP channel carries."""
    return yaml.safe_dump([qos.to_dict()], sort_keys=False)


def qos_from_text(text: str) -> Qos:
    """The reverse of `qos_text`; the default where nothing usable is written."""
    profiles = yaml.safe_load(text) if text else None
    if not profiles:
        return Qos()
    first = profiles[0]
    return Qos(str(first["reliability"]), str(first["durability"]), int(first["depth"]))


@dataclass(frozen=True)
class TopicEntry:
    """One topic of a bag: name, `package/msg/Type`, RIHS01 hash, offered QoS and number of messages."""

    name: str
    type: str
    hash: str
    qos: Qos
    count: int


@dataclass(frozen=True)
class BagMetadata:
    """What metadata.yaml says of a bag of one MCAP file: times in ns, free facts under `custom_data`."""

    file: str
    start: int
    end: int
    topics: Sequence[TopicEntry]
    custom_data: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The content of `rosbag2_bagfile_information`."""
        count = sum(topic.count for topic in self.topics)
        start = {"nanoseconds_since_epoch": self.start}
        duration = {"nanoseconds": max(0, self.end - self.start)}
        return {
            "version": VERSION,
            "storage_identifier": "mcap",
            "duration": dict(duration),
            "starting_time": dict(start),
            "message_count": count,
            "topics_with_message_count": [
                {
                    "topic_metadata": {
                        "name": topic.name,
                        "type": topic.type,
                        "serialization_format": "cdr",
                        "offered_qos_profiles": [topic.qos.to_dict()],
                        "type_description_hash": topic.hash,
                    },
                    "message_count": topic.count,
                }
                for topic in self.topics
            ],
            # rosbag2's own words for "not compressed by rosbag2": MCAP compresses its chunks by itself.
            "compression_format": "",
            "compression_mode": "",
            "relative_file_paths": [self.file],
            "files": [
                {
                    "path": self.file,
                    "starting_time": dict(start),
                    "duration": dict(duration),
                    "message_count": count,
                }
            ],
            "custom_data": dict(self.custom_data) or None,
            "ros_distro": os.environ.get("ROS_DISTRO", "unknown"),
        }

    def text(self) -> str:
        """The information as YAML text (without the outer key)."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def save(self, folder: Path) -> None:
        """Write metadata.yaml so that it is there whole or not at all, even after a power cut."""
        temporary = folder / f".{FILE_NAME}.tmp"
        content = {"rosbag2_bagfile_information": self.to_dict()}
        with open(temporary, "w", encoding="utf-8") as stream:
            yaml.safe_dump(content, stream, sort_keys=False, allow_unicode=True)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, folder / FILE_NAME)
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
