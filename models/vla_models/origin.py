"""What a training begins from, and how it comes to another robot: a published checkpoint, one of ours, or a preset.

What belongs to the network stays: its sizes, horizon and times, how it reads text, how large it sees images, how many
observations it looks at. Arms, joints and cameras are the robot's, normalisers those of the data. Weights must fit by
shape; systems that fill their numbers up (pi0, SmolVLA, RDT) therefore fit any robot that is small enough.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from vla_core.robot import Robot

from vla_models import policy_class
from vla_models.checkpoint import POLICY_FILE, WEIGHTS_FILE, read_checkpoint
from vla_models.policy import CheckpointError, PolicySpec
from vla_models.published import Published, find_checkpoint, open_published
from vla_models.torch_policy import load_weights

#: Fields of a specification that belong to the network and are no settings of a training.
KEPT = ("vocabulary", "context", "tokenizer", "padding", "prompt", "history", "shift", "future", "lead")
#: Likewise, but settings of a training: what is not set is the origin's.
SETTINGS = ("horizon", "period", "steps", "temperature", "guidance", "prefix_limit")


@dataclass(frozen=True)
class Origin:
    """Where a training begins. name: as it was given. spec, network: its specification and settings of its network.

    folder: of the checkpoint; None: a preset, which has no weights. published: set for one that others published.
    """

    name: str
    recipe: str
    spec: PolicySpec
    network: Mapping[str, Any]
    folder: Path | None = None
    published: Published | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a training (vla_models.train.TrainConfig) that are the origin's unless they are given.

        What a preset says of states and actions is only an example. Published policies were not trained with prefixes
        as ours are: that stays the recipe's.
        """
        values = {name: getattr(self.spec, name) for name in SETTINGS} | {"network": self.network, "cameras": {}}
        if self.spec.fit != "stretch":
            values["fit"] = self.spec.fit
        if self.published:
            del values["guidance"], values["prefix_limit"]
        if self.folder:
            space = self.spec.action_space
            values |= {"state": self.spec.state, "kind": space.kind, "reference": space.reference}
            values |= {"frame": space.frame, "gripper": space.gripper}
            values |= {"rotation": space.rotation} if space.kind == "pose" else {}
            values |= {"robot": self.spec.robot} if self.spec.robot else {}
        return values

    def fill(self, network: nn.Module) -> None:
        """Fill a network with the checkpoint's weights. Raises CheckpointError for one that they do not fit."""
        try:
            if self.published:
                self.published.fill(network)
            elif self.folder:
                load_weights(network, self.folder / WEIGHTS_FILE)
        except CheckpointError as error:
            raise CheckpointError(
                f"init {self.name}: its weights do not fit the robot and settings: {error}"
            ) from error

    def bring_text(self, spec: PolicySpec, out: Path) -> PolicySpec:
        """Copy the file of its tokeniser into the folder `out`; the specification that names it there."""
        if self.folder is None or spec.tokenizer in ("words", "bytes"):
            return spec
        return copy_tokenizer(spec, self.folder, out)


def copy_tokenizer(spec: PolicySpec, folder: Path | None, out: Path) -> PolicySpec:
    """Copy the file that the specification of a checkpoint in `folder` reads text with, beside new weights in `out`."""
    if spec.tokenizer in ("words", "bytes"):
        return spec
    source, name = Path(folder or "") / spec.tokenizer, Path(spec.tokenizer).name
    out.mkdir(parents=True, exist_ok=True)
    if source.resolve() != (out / name).resolve():
        try:
            shutil.copyfile(source, out / name)
        except OSError as error:
            raise CheckpointError(f"{source}: the tokeniser of {spec.name} cannot be copied: {error}") from error
    return dataclasses.replace(spec, tokenizer=name)


def find_origin(path: str | Path) -> Origin:
    """A checkpoint: one of ours, or a published one (a folder, the file of its weights, or its name on the hub).

    Raises CheckpointError.
    """
    found = find_checkpoint(path)
    folder = found.parent if found.is_file() else found
    if (folder / POLICY_FILE).is_file():
        saved = read_checkpoint(folder)
        return Origin(str(path), saved.spec.recipe, saved.spec, saved.config, folder)
    read = open_published(found)
    return Origin(str(path), read.kind.name(), read.spec, plain(read.network), folder, read)


def preset_origin(recipe: str, name: str) -> Origin:
    """A preset of a recipe. Raises PolicyError when there is none of that name."""
    spec, network = policy_class(recipe).preset(name)
    return Origin(name, recipe, dataclasses.replace(spec, vocabulary=()), plain(network))


def plain(network: Any) -> dict[str, Any]:
    """Settings of a network as a mapping."""
    return dataclasses.asdict(network) if dataclasses.is_dataclass(network) else dict(network)


def place_cameras(base: PolicySpec, robot: Robot) -> dict[str, tuple[int, int]]:
    """Camera -> (height, width) for a robot: its cameras in the places of those of `base`.

    A camera has the place of the same name, or else the first that is left; further ones come behind, as large as the
    last. Places that stay empty are kept under their own names where `base` can do without.
    """
    names = [camera.name for camera in robot.cameras] if base.cameras else []
    rest = iter([name for name in names if name not in base.cameras])
    placed: dict[str, tuple[int, int]] = {}
    for place, size in base.cameras.items():
        name = place if place in names else next(rest, None)
        if name or place in base.optional:
            placed[name or place] = size
    return placed | {name: size for name in rest}
