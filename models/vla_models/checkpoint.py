"""A checkpoint is a folder: policy.json (what the policy is) and model.safetensors (its weights). No pickle anywhere.

    policy.json             format, spec, normalizers, config of the network, facts about the training
    model.safetensors       weights in use (the moving average of training)
    train_state.safetensors only to go on training: raw weights and the optimiser's state
    onnx/                   exported graphs

Every file is written beside its place and renamed into it, so a checkpoint is never half of something. This module
needs no torch; weights are read as NumPy arrays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vla_core.actions import ActionSpaceError

from vla_models.normalization import NormalizationError, Normalizer
from vla_models.policy import CheckpointError, PolicyError, PolicySpec

FORMAT = "vla-policy/1"
POLICY_FILE = "policy.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What policy.json says. config: the network's settings; facts: about its training; folder: where it lies."""

    spec: PolicySpec
    normalizers: Mapping[str, Normalizer]
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path()


def read_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Read and check policy.json. Raises CheckpointError."""
    path = Path(folder) / POLICY_FILE
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {folder}: {POLICY_FILE} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise CheckpointError(f"{path}: expected a policy of format {FORMAT!r}, found {found!r}")
    if missing := {"spec", "normalizers", "config"} - set(values):
        raise CheckpointError(f"{path}: missing keys {sorted(missing)}")
    try:
        spec = PolicySpec.from_dict(values["spec"])
        normalizers = {name: Normalizer.from_dict(value) for name, value in values["normalizers"].items()}
    except (PolicyError, NormalizationError, ActionSpaceError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if missing := {"state", "action"} - set(normalizers):
        raise CheckpointError(f"{path}: normalizers: missing {sorted(missing)}")
    return Checkpoint(spec, normalizers, values["config"], values.get("facts", {}), Path(folder))


def write_checkpoint(checkpoint: Checkpoint, folder: str | os.PathLike) -> None:
    """Write policy.json into `folder` (made when it is not there)."""
    values = {
        "format": FORMAT,
        "spec": checkpoint.spec.to_dict(),
        "normalizers": {name: value.to_dict() for name, value in checkpoint.normalizers.items()},
        "config": dict(checkpoint.config),
        "facts": dict(checkpoint.facts),
    }
    write_atomically(Path(folder) / POLICY_FILE, (json.dumps(values, indent=1) + "\n").encode())


def read_tensors(
    path: str | os.PathLike, expected: Mapping[str, tuple[int, ...]] | None = None, finite: bool = True
) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file, checked against the names and shapes `expected`.

    Raises CheckpointError for a file that is missing or cut short, and for tensors that are missing, too many, of
    another shape or, if `finite`, not finite.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(Path(path).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cut short or not a safetensors file: {error}") from error
    if expected is not None:
        if missing := sorted(set(expected) - set(tensors)):
            raise CheckpointError(f"{path}: {len(missing)} tensors missing, first {missing[0]!r}")
        if extra := sorted(set(tensors) - set(expected)):
            raise CheckpointError(f"{path}: {len(extra)} unknown tensors, first {extra[0]!r}")
        for name, shape in expected.items():
            if tensors[name].shape != tuple(shape):
                raise CheckpointError(f"{path}: {name}: expected shape {tuple(shape)}, found {tensors[name].shape}")
    if finite:
        for name, tensor in tensors.items():
            if not np.all(np.isfinite(tensor)):
                raise CheckpointError(f"{path}: {name}: holds numbers that are not finite")
    return tensors


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    from safetensors.numpy import save

    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}  # 0-d stays 0-d
    write_atomically(Path(path), save(arrays, dict(metadata) if metadata else None))


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, sync, rename: after a crash there is the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
