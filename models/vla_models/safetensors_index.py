"""Where each tensor lies in a safetensors file, and the file's fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass

from vla_models.policy import CheckpointError


@dataclass(frozen=True)
class TensorPlace:
    """Bytes [offset, offset + length) of the file hold one tensor, row by row, little endian."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def index_tensors(path: str | os.PathLike) -> dict[str, TensorPlace]:
    """Tensor name -> place. Raises CheckpointError when the file is missing, cut short or not of the format."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else None
        if header is None:
            raise CheckpointError(f"{path}: cut short: its header needs {length + 8} bytes, found {size}")
        header.pop("__metadata__", None)
        places = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            places[name] = TensorPlace(entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cut short or not a safetensors file: {error}") from error
    end = max((place.offset + place.length for place in places.values()), default=8 + length)
    if size != end:
        raise CheckpointError(f"{path}: cut short or overlong: expected {end} bytes, found {size}")
    return places


def fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 of the whole file, in hex. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
