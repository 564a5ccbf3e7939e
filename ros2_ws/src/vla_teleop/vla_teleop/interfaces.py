"""Message interfaces by name: class, definition text and type hash of `package/msg/Type`.

The definition text and the RIHS01 hash come from the interface packages as they are installed
(`share/<package>/msg/*.msg` and `*.json` below the prefixes of AMENT_PREFIX_PATH), so what goes into a bag is
what the running nodes were built from.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from functools import cache
from pathlib import Path

#: Separates the definitions of a type and of those it uses, as rosbag2_storage_mcap writes them.
SEPARATOR = "=" * 80

_PRIMITIVES = frozenset(
    "bool byte char float32 float64 int8 uint8 int16 uint16 int32 uint32 int64 uint64 string wstring".split()
)


class InterfaceError(ValueError):
    """A message type that is not installed; the message names the type and the folders searched."""


def type_name(message_or_class: object) -> str:
    """`package/msg/Type` of a message or a message class of rosidl."""
    cls = message_or_class if isinstance(message_or_class, type) else type(message_or_class)
    parts = cls.__module__.split(".")
    if len(parts) < 3 or parts[1] != "msg":
        raise InterfaceError(f"expected a ROS message, found a {cls.__module__}.{cls.__name__}")
    return f"{parts[0]}/msg/{cls.__name__}"


def message_class(name: str) -> type:
    """The rosidl class of `package/msg/Type`."""
    package, type_ = _split(name)
    try:
        return getattr(importlib.import_module(f"{package}.msg"), type_)
    except (ImportError, AttributeError) as error:
        raise InterfaceError(f"message type {name}: expected a ROS message, found {error}") from error


@cache
def definition(name: str) -> str:
    """Text of `name` and, separated and headed by `MSG: package/Type`, of every type it uses (each once)."""
    text = _text(name)
    used: dict[str, str] = {}
    pending = _references(name, text)
    while pending:
        reference = pending.pop(0)
        if reference not in used:
            used[reference] = _text(reference)
            pending += _references(reference, used[reference])
    parts = [text]
    for reference, body in used.items():
        package, type_ = _split(reference)
        parts.append(f"{SEPARATOR}\nMSG: {package}/{type_}\n{body}")
    return "\n".join(part.rstrip("\n") for part in parts) + "\n"


@cache
def type_hash(name: str) -> str:
    """RIHS01 hash of the type (REP 2016), or "" where the package ships no type description."""
    path = _file(name).with_suffix(".json")
    if not path.is_file():
        return ""
    hashes = json.loads(path.read_text())["type_hashes"]
    return next((entry["hash_string"] for entry in hashes if entry["type_name"] == name), "")


@cache
def starts_with_header(name: str) -> bool:
    """Whether the first field is a std_msgs/Header, whose stamp then leads the serialized message."""
    for kind, _ in _fields(_text(name)):
        return kind in ("std_msgs/Header", "std_msgs/msg/Header", "Header")
    return False


def _split(name: str) -> tuple[str, str]:
    parts = name.split("/")
    if len(parts) != 3 or parts[1] != "msg":
        raise InterfaceError(f"message type {name!r}: expected package/msg/Type")
    return parts[0], parts[2]


def _file(name: str) -> Path:
    package, type_ = _split(name)
    prefixes = [p for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    for prefix in prefixes:
        path = Path(prefix) / "share" / package / "msg" / f"{type_}.msg"
        if path.is_file():
            return path
    raise InterfaceError(
        f"message type {name}: expected share/{package}/msg/{type_}.msg below AMENT_PREFIX_PATH, "
        f"found none in {prefixes}"
    )


def _text(name: str) -> str:
    return _file(name).read_text()


def _fields(text: str) -> list[tuple[str, str]]:
    """(type without array suffix, rest of the line) of every field or constant of a definition."""
    found = []
    for line in text.splitlines():
        kind, _, rest = line.split("#", 1)[0].strip().partition(" ")
        if rest:
            found.append((re.sub(r"(<=\d+)?(\[.*\])?$", "", kind), rest.strip()))
    return found


def _references(name: str, text: str) -> list[str]:
    package, _ = _split(name)
    references = []
    for kind, _ in _fields(text):
        if kind in _PRIMITIVES:
            continue
        parts = kind.split("/")
        home = "std_msgs" if kind == "Header" else package
        references.append(f"{home if len(parts) == 1 else parts[0]}/msg/{parts[-1]}")
    return references
