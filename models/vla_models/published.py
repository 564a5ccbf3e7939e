"""Checkpoints that others published, under their own names of tensors and settings (`vla_models.load`).

A recipe states what it can read: `TorchPolicy.published` lists rules from published names to its own, and
`TorchPolicy.read_published` makes specification, settings and normalisers of the files beside the weights; a setting or
a tensor that it misses (KeyError, ...) becomes one CheckpointError here. Every tensor is used or a rule says why not;
none is dropped silently. Safetensors only, whole or sharded, any float type: nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_models.policy import CheckpointError

#: `type` (LeRobot) or `model_type` (transformers) in a published config.json -> recipe.
FORMATS = {
    "act": "act",
    "diffusion": "diffusion_policy",
    "fastwam": "fast_wam",
    "lingbot_va": "lingbot_va",
    "openvla": "openvla",
    "pi0": "pi0",
    "pi05": "pi05",
    "pi0_fast": "pi0_fast",
    "qwen2_5_vl": "wall_oss",
    "smolvla": "smolvla",
    "wall_x": "wall_oss",
}
WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
#: type -> ((file, recipe), ...): a checkpoint of that type that has such a file is of that recipe.
VARIANTS = {
    "openvla": (("action_head*", "openvla_oft"),),
    "qwen2_5_vl": (("fast", "wall_oss_fast"),),
    "wall_x": (("fast", "wall_oss_fast"),),
}
#: Recipe -> settings that only its config.json has, where it says no type.
SIGNS = {
    "octo": ("model", "window_size", "text_processor"),
    "rdt": ("pred_horizon", "img_cond_len", "lang_token_dim"),
}
#: Files of a checkpoint that are downloaded from a hub; the last is looked for and never read where it is a pickle.
KEPT = ("*.json", "*.safetensors", "*.model", "*.txt", "action_head*")


@dataclass(frozen=True)
class Rule:
    r"""Names that match the whole of `pattern` (a regular expression) become `name` (with \1 for its groups).

    name None: the tensors are left out, for the reason `why`. A name and `why`: they are left out for that reason where
    the network has no tensor of that name (layers that are never computed). Several names: the tensor is cut along its
    first axis into as many equal parts (fused projections). change: from the published tensor to ours, before it is
    cut.
    """

    pattern: str
    name: str | tuple[str, ...] | None
    why: str = ""
    change: Callable[[Tensor], Tensor] | None = None


class TensorFiles:
    """The tensors of a safetensors file, or of a folder with one or with a sharded index; read one by one.

    Raises CheckpointError when there is none, when it is cut short, or when a shard is missing.
    """

    def __init__(self, path: str | Path):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        self._files: dict[str, tuple[Any, str]] = {}
        for file in self._found():
            try:
                handle = safe_open(file, "pt")
                self._files |= {name: (handle, name) for name in handle.keys()}
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
                try:
                    shards = sorted({Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
                except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                    raise CheckpointError(f"{index}: expected an index of shards, found {error!r}") from error
                if missing := [shard for shard in shards if not (self.path / shard).is_file()]:
                    raise CheckpointError(f"{index}: expected {len(shards)} files, found no {missing[0]!r}")
                return [self.path / shard for shard in shards]
        pickled = sorted(p.name for p in self.path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        hint = f"; {pickled[0]} is a pickle, which is never read: convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{self.path}: expected {' or '.join(WEIGHTS)} or an index of shards, found none{hint}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Published name -> shape."""
        return {name: tuple(file.get_slice(own).get_shape()) for name, (file, own) in self._files.items()}

    def __getitem__(self, name: str) -> Tensor:
        file, own = self._files[name]
        return file.get_tensor(own)

    def alias(self, name: str, other: str) -> None:
        """Also hold the tensor `other` under `name`: tied weights that were saved once."""
        self._files[name] = self._files[other]

    def join(self, prefix: str, path: str | Path) -> None:
        """Also hold the tensors of another file or folder, with `prefix` before their names."""
        self._files |= {prefix + name: place for name, place in TensorFiles(path)._files.items()}


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
            elif isinstance(rule.name, str):
                ours.setdefault(match.expand(rule.name), []).append((name, rule))
            else:
                for i, part in enumerate(rule.name):
                    ours.setdefault(match.expand(part), []).append((name, replace(rule, change=_part(rule, i))))
            break
        else:
            raise CheckpointError(f"tensor {name!r}: unknown; no rule of the recipe explains it")
    return ours, left


def _part(rule: Rule, index: int) -> Callable[[Tensor], Tensor]:
    """From the published tensor to the `index`-th of the equal parts that `rule` cuts it into."""

    def change(value: Tensor) -> Tensor:
        return (rule.change(value) if rule.change else value).tensor_split(len(rule.name))[index]

    return change


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
    for name in set(ours) - set(state):
        if all(rule.why for _, rule in ours[name]):
            left |= {published: rule.why for published, rule in ours.pop(name)}
    if extra := sorted(set(ours) - set(state)):
        raise CheckpointError(f"{files.path}: {len(extra)} unknown tensors, first {ours[extra[0]][0][0]!r}")
    for name, sources in ours.items():
        value: Tensor | None = None
        for published, rule in sources:
            found = files[published]
            with suppress(RuntimeError, IndexError):  # of more or fewer axes: judged by its shape
                found = rule.change(found) if rule.change else found
            if found.shape != state[name].shape:
                raise CheckpointError(
                    f"{files.path}: {published}: expected shape {tuple(state[name].shape)}, found {tuple(found.shape)}"
                )
            if value is not None and not (value.dtype == found.dtype and torch.equal(value, found)):
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


def require(where: Path, settings: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises CheckpointError, naming the file `where`, for a setting that says otherwise than the recipe knows.

    wanted: name -> the only known value, which is also taken where a setting is not there.
    """
    for name, value in wanted.items():
        if settings.get(name, value) != value:
            raise CheckpointError(f"{where}: {name}: expected {value!r}, found {settings[name]!r}")


def own_shapes(files: TensorFiles, rules: Sequence[Rule]) -> dict[str, tuple[int, ...]]:
    """Our name -> shape, of what `files` hold by `rules`. Raises CheckpointError for a tensor that none explains."""
    try:
        ours, _ = translate(files.shapes, rules)
    except CheckpointError as error:
        raise CheckpointError(f"{files.path}: {error}") from None
    published, shapes = files.shapes, {}
    for name, ((source, rule), *_) in ours.items():
        shapes[name] = published[source]
        with suppress(RuntimeError, IndexError):  # of more or fewer axes: judged when it is filled in
            if rule.change:
                shapes[name] = tuple(rule.change(torch.empty(published[source], device="meta")).shape)
    return shapes


def count_layers(names: Iterable[str], prefix: str) -> int:
    """How many layers are numbered behind `prefix`: 1 + the largest number."""
    return 1 + max(int(name[len(prefix) :].partition(".")[0]) for name in names if name.startswith(prefix))


def find_checkpoint(path: str | Path, kept: Sequence[str] = KEPT) -> Path:
    """The folder of a checkpoint: a local one, or a hub name (owner/name), which is downloaded.

    kept: patterns of the files to download. Raises CheckpointError when it is neither.
    """
    folder = Path(path).expanduser()
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(kept)))
    except Exception as error:  # many kinds, of several packages
        raise CheckpointError(f"checkpoint {path}: no folder of that name, and the hub says: {error}") from error


def recipe_of(folder: Path, config: Mapping[str, Any]) -> str:
    """The recipe that reads a published checkpoint. Raises CheckpointError when there is none."""
    said = config.get("type") or config.get("model_type")
    for recipe, signs in SIGNS.items():
        if said is None and set(signs) <= set(config):
            return recipe
    if said not in FORMATS:
        raise CheckpointError(f"{folder / 'config.json'}: expected a type among {sorted(FORMATS)}, found {said!r}")
    return next((recipe for file, recipe in VARIANTS.get(said, ()) if any(folder.glob(file))), FORMATS[said])


@dataclass(frozen=True)
class Published:
    """A published checkpoint but for its weights. kind: class of its recipe; network: its settings."""

    kind: Any
    spec: Any
    network: Any
    normalizers: Mapping[str, Any]
    files: TensorFiles
    folder: Path

    def fill(self, network: nn.Module, finite: bool = True) -> dict[str, str]:
        """Fill `network` with the weights; see `fill`."""
        return fill(network, self.files, self.kind.published, finite)


def open_published(path: Path, settings: Mapping[str, Any] | None = None) -> Published:
    """A published checkpoint: its folder, or the file of its weights, with the others beside it.

    settings: on top of its config.json. Raises CheckpointError.
    """
    from vla_models import policy_class

    folder = path.parent if path.is_file() else path
    config = read_config(folder) | dict(settings or {})
    kind = policy_class(recipe_of(folder, config))
    files = TensorFiles(path)
    spec, network, normalizers = _read(kind, folder, config, files)
    return Published(kind, spec, network, normalizers, files, folder)


def load_published(
    path: Path,
    device: str = "cpu",
    steps: int | None = None,
    finite: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """The policy of a published checkpoint; see `open_published`. Raises CheckpointError."""
    found = open_published(path, settings)
    policy = found.kind(found.spec, found.normalizers, found.network, device, steps, found.folder)
    policy.left_out = found.fill(policy.network, finite)
    return policy


def _read(kind: Any, folder: Path, config: Mapping[str, Any], files: TensorFiles) -> Any:
    """What `kind.read_published` says; a setting or a tensor that it misses is told in one way for all recipes."""
    try:
        return kind.read_published(folder, config, files)
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        found = f"no {error}" if isinstance(error, KeyError) else repr(error)
        raise CheckpointError(
            f"{folder}: expected settings and tensors of the recipe {kind.name()!r}, found {found}"
        ) from error
