"""What LeRobot's published checkpoints have in common: what they say of the robot, and the statistics of its data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vla_models.normalization import NormalizationError, Normalizer
from vla_models.policy import CheckpointError
from vla_models.published import Rule, TensorFiles

#: Statistics inside model.safetensors; `Statistics` reads them.
STATISTICS = Rule(r"(normalize_inputs|normalize_targets|unnormalize_outputs)\..*", None, "statistics, not weights")
#: LeRobot's kinds of normalisation -> ours, and the statistics that they need.
MODES = {
    "IDENTITY": ("mean_std", ()),
    "MEAN_STD": ("mean_std", ("mean", "std")),
    "MIN_MAX": ("min_max", ("min", "max")),
    "QUANTILES": ("quantile", ("q01", "q99")),
}


def arms_of(dim: int) -> dict[str, int]:
    """Arm -> joints for `dim` numbers, which say no more: an ALOHA pair for 14, one arm with a gripper otherwise."""
    return {"left": 6, "right": 6} if dim == 14 else {"arm": dim - 1}


class Statistics:
    """Statistics of a checkpoint's training data: feature ("observation.state", "action", ...) -> normaliser.

    They lie in model.safetensors (normalize_inputs.buffer_observation_state.mean, ..., unnormalize_outputs...) or, in
    newer checkpoints, beside it (policy_preprocessor_step_3_normalizer_processor.safetensors: observation.state.mean).
    """

    def __init__(self, folder: Path, files: TensorFiles):
        self.folder = folder
        self.found: dict[str, Tensor] = {}
        for name in files.shapes:
            part, _, rest = name.partition(".buffer_")
            if rest and part in ("normalize_inputs", "normalize_targets", "unnormalize_outputs"):
                self.found[rest.replace(".", "_")] = files[name]
        for path in sorted(folder.glob("policy_*processor*.safetensors")):
            tensors = TensorFiles(path)
            self.found |= {name.replace(".", "_"): tensors[name] for name in tensors.shapes}

    def normalizer(self, feature: str, mode: str, dim: int) -> Normalizer:
        """Of `dim` numbers. mode: one of MODES. Raises CheckpointError."""
        if mode not in MODES:
            raise CheckpointError(f"{self.folder}: {feature}: normalisation: expected {sorted(MODES)}, found {mode!r}")
        kind, names = MODES[mode]
        if not names:
            return Normalizer(kind, np.zeros(dim), np.ones(dim))
        values = []
        for name in names:
            value = self.found.get(f"{feature}.{name}".replace(".", "_"))
            if value is None:
                raise CheckpointError(
                    f"{self.folder}: expected {feature}.{name} in model.safetensors or beside it, in "
                    "policy_preprocessor*.safetensors, found no such statistics"
                )
            if value.numel() != dim:
                raise CheckpointError(
                    f"{self.folder}: statistics {feature}.{name}: expected {dim} numbers, found {value.numel()}"
                )
            values.append(value.flatten().double().numpy())
        first, second = values
        try:
            if kind == "mean_std":
                return Normalizer(kind, first, second + 1e-8)  # LeRobot's guard against zero
            return Normalizer(kind, (first + second) / 2, (second - first) / 2 + 5e-9)
        except NormalizationError as error:
            raise CheckpointError(f"{self.folder}: statistics of {feature}: {error}") from error


class LeRobotConfig:
    """What config.json says in the same words for every policy, with the statistics beside it.

    cameras: camera -> (height, width) of its recorded images, pixels; "observation.images.top" is "top". Those that
    LeRobot only fills up with ("observation.images.empty_camera_0") are left out. state, action: numbers of each.
    arms: arm -> joints (see arms_of).
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], files: TensorFiles, bare: bool = False, alike: bool = True
    ):
        """bare: a base model without statistics is not normalised. alike: a state has the numbers of an action.

        Raises CheckpointError, also for a policy that looks at anything but images and one state.
        """
        self.where, self.bare, self.statistics = folder / "config.json", bare, Statistics(folder, files)
        try:
            shapes = {name: tuple(map(int, value["shape"])) for name, value in config["input_features"].items()}
            (self.state,) = shapes.pop("observation.state")
            (self.action,) = config["output_features"]["action"]["shape"]
            self.modes = dict(config["normalization_mapping"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.where}: expected input_features with observation.state, output_features with action, and "
                f"normalization_mapping, as LeRobot writes them, found {error!r}"
            ) from error
        shapes = {name: shape for name, shape in shapes.items() if "empty_camera" not in name}
        others = [name for name in shapes if not name.startswith("observation.image")]
        if others or not shapes or (alike and self.state != self.action):
            raise CheckpointError(
                f"{self.where}: input_features: expected images and as many numbers in observation.state as in action "
                f"({self.action}), found {sorted(shapes)} and {self.state}"
            )
        self._names = {name.removeprefix("observation.").removeprefix("images."): name for name in shapes}
        self.cameras = {camera: shapes[name][1:] for camera, name in self._names.items()}
        self.arms = arms_of(self.action)

    def normalizers(self) -> dict[str, Normalizer]:
        """Of the state and the action. Raises CheckpointError."""
        modes = {} if self.bare and not self.statistics.found else self.modes
        return {
            "state": self.statistics.normalizer("observation.state", modes.get("STATE", "IDENTITY"), self.state),
            "action": self.statistics.normalizer("action", modes.get("ACTION", "IDENTITY"), self.action),
        }

    def image_numbers(self) -> dict[str, tuple[float, ...]]:
        """What images are normalised with: image_mean and image_std, three numbers a camera. Raises CheckpointError."""
        mode = self.modes.get("VISUAL", "IDENTITY")
        of = [self.statistics.normalizer(name, mode, 3) for name in self._names.values()]
        return {
            "image_mean": tuple(float(value) for one in of for value in one.offset),
            "image_std": tuple(float(value) for one in of for value in one.scale),
        }
