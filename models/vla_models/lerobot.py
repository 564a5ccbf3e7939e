"""What LeRobot's published checkpoints have in common: where the statistics of their data lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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

    def normalizers(self, modes: Mapping[str, str], state: int, dim: int, bare: bool = False) -> dict[str, Normalizer]:
        """Of the state (`state` numbers) and the action (`dim`). modes: normalization_mapping of config.json.

        bare: a base model, which has no statistics at all, is not normalised. Raises CheckpointError.
        """
        wanted = {} if bare and not self.found else modes
        return {
            "state": self.normalizer("observation.state", wanted.get("STATE", "IDENTITY"), state),
            "action": self.normalizer("action", wanted.get("ACTION", "IDENTITY"), dim),
        }

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
