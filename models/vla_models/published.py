"""Checkpoints that others published, under their own names of tensors and settings: `vla_models.load(path or hub name)`.

A recipe states what it can read: `TorchPolicy.published` lists rules from published names to its own, and
`TorchPolicy.read_published` makes specification, settings and normalisers of the files beside the weights. Every
tensor is used or a rule says why not; none is dropped silently. Safetensors only, whole or sharded, any float type:
nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_models.policy import CheckpointError

#: `type` (LeRobot) or `model_type` (transformers) in a published config.json -> recipe.
FORMATS = {"act": "act"}
WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Rule:
    r"""Names that match the whole of `pattern` (a regular expression) become `name` (with \1 for its groups).

    name None: the tensors are left out, for the reason `why`. change: from the published tensor to ours.
    """

    pattern: str
    name: str | None
    why: str = ""
    change: Callable[[Tensor], Tensor] | None = None


class TensorFiles:
    """The tensors of a safetensors file, or of a folder with one or with a sharded index; read one by one.

    Raises CheckpointError when there is none, when it is cut short, or when a shard is missing.
    """

    def __init__(self, path: str | Path):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        self._files: dict[str, Any] = {}
        for file in self._found():
            try:
                handle = safe_open(file, "pt")
                self._files |= dict.fromkeys(handle.keys(), handle)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: cut short or not a safetensors file: {error}") from error

    def _found(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        for name in WEIGHTS:
            if (self.path / name).is_file():
                return [self.path / name]
            index = self.path / f"{name}.index.json"
            if index.is_file():
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                if missing := [shard for shard in shards if not (self.path / Path(shard).name).is_file()]:
                    raise CheckpointError(f"{index}: expected {len(shards)} files, found no {missing[0]!r}")
                return [self.path / Path(shard).name for shard in shards]
        pickled = sorted(p.name for p in self.path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        hint = f"; {pickled[0]} is a pickle, which is never read: convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{self.path}: expected {' or '.join(WEIGHTS)} or an index of shards, found none{hint}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Published name -> shape."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def translate(names: Iterable[str], rules: Sequence[Rule]) -> tuple[dict[str, list[tuple[str, Rule]]], dict[str, str]]:
    """(our name -> published names with their rules, published name -> why it is left out).

    Raises CheckpointError for a name that no rule explains; the first rule that matches counts.
    """
    ours: dict[str, list[tuple[str, Rule]]] = {}
    left: dict[str, str] = {}
    for name in names:
        for rule in rules:
            match = re.fullmatch(rule.pattern, name)
            if match is None:
                continue
            if rule.name is None:
                left[name] = rule.why
            else:
                ours.setdefault(match.expand(rule.name), []).append((name, rule))
            break
        else:
            raise CheckpointError(f"tensor {name!r}: unknown; no rule of the recipe explains it")
    return ours, left


def fill(network: nn.Module, files: TensorFiles, rules: Sequence[Rule], finite: bool = True) -> dict[str, str]:
    """Fill `network` from published tensors; returns what was left out and why.

    Several names of one of ours are copies of it (tied weights) and must be equal. Raises CheckpointError, naming the
    tensor, for one that is missing, unknown, of another shape, or (with `finite`) not finite.
    """
    try:
        ours, left = translate(files.shapes, rules)
    except CheckpointError as error:
        raise CheckpointError(f"{files.path}: {error}") from None
    state = network.state_dict()
    if missing := sorted(set(state) - set(ours)):
        raise CheckpointError(f"{files.path}: {len(missing)} tensors missing, first {missing[0]!r} (our name)")
    if extra := sorted(set(ours) - set(state)):
        raise CheckpointError(f"{files.path}: {len(extra)} unknown tensors, first {ours[extra[0]][0][0]!r}")
    for name, sources in ours.items():
        value: Tensor | None = None
        for published, rule in sources:
            found = files[published]
            found = rule.change(found) if rule.change else found
            if found.shape != state[name].shape:
                raise CheckpointError(
                    f"{files.path}: {published}: expected shape {tuple(state[name].shape)}, found {tuple(found.shape)}"
                )
            if value is not None and not torch.equal(value, found):
                raise CheckpointError(f"{files.path}: {published}: expected a copy of {sources[0][0]}, found another")
            value = found
        if finite and value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{files.path}: {sources[0][0]}: holds numbers that are not finite")
        if not state[name].is_meta:
            with torch.no_grad():
                state[name].copy_(value)
    return left


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a published checkpoint. Raises CheckpointError."""
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not readable as JSON: {error}") from error
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{folder / 'config.json'}: expected settings, found {type(values).__name__}")
    return dict(values)


def find_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint: a local one, or a hub name (owner/name), which is downloaded.

    Raises CheckpointError when it is neither.
    """
    folder = Path(path).expanduser()
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return folder
    from huggingface_hub import snapshot_download

    try:
        kept = ["*.json", "*.safetensors", "*.model", "*.txt"]
        return Path(snapshot_download(str(path), allow_patterns=kept))
    except Exception as error:  # many kinds, of several packages
        raise CheckpointError(f"checkpoint {path}: no folder of that name, and the hub says: {error}") from error


def load_published(folder: Path, device: str = "cpu", steps: int | None = None, finite: bool = True) -> Any:
    """The policy of a published checkpoint. Raises CheckpointError."""
    from vla_models import policy_class

    config = read_config(folder)
    said = config.get("type") or config.get("model_type")
    if said not in FORMATS:
        raise CheckpointError(f"{folder / 'config.json'}: expected a type among {sorted(FORMATS)}, found {said!r}")
    kind = policy_class(FORMATS[said])
    files = TensorFiles(folder)
    spec, network, normalizers = kind.read_published(folder, config, files)
    policy = kind(spec, normalizers, network, device, steps, folder)
    policy.left_out = fill(policy.network, files, kind.published, finite)
    return policy
