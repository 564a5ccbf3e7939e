"""Statistics of the data sets of Open X-Embodiment (arXiv 2310.08864), as checkpoints that learnt from them carry them.

dataset_statistics.json, or the setting `norm_stats` in config.json, has for each data set, or for the only one:

    {"action": {"mean": [...], "std": [...], "q01": [...], "q99": [...], "mask": [...]}, "proprio": {...}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_models.normalization import Normalizer
from vla_models.policy import CheckpointError

FILE = "dataset_statistics.json"
#: Kind of normalisation -> its two statistics.
KINDS = {"mean_std": ("mean", "std"), "quantile": ("q01", "q99"), "min_max": ("min", "max")}


@dataclass(frozen=True)
class DataSet:
    """Statistics of one data set, and the file where they lie."""

    where: Path
    name: str
    statistics: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any], setting: str, likely: Sequence[str] = ()) -> DataSet:
        """That which `setting` in config.json names; else the first that is known of `likely`, or the only one.

        Raises CheckpointError.
        """
        where = folder / FILE if (folder / FILE).is_file() else folder / "config.json"
        try:
            known = json.loads(where.read_text()) if where.name == FILE else config.get("norm_stats")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{where}: not readable as JSON: {error}") from error
        if not isinstance(known, Mapping) or not known:
            raise CheckpointError(f"{where}: expected statistics of a data set (norm_stats), found {known!r:.80}")
        if "action" in known:
            return cls(where, "", known)
        name = config.get(setting) or next((name for name in likely if name in known), None)
        name = next(iter(known)) if name is None and len(known) == 1 else name
        if name not in known:
            raise CheckpointError(
                f"{where}: data set, load(..., settings={{{setting!r}: name}}): expected one of {sorted(known)}, found "
                f"{name!r}"
            )
        return cls(where, name, known[name])

    def normalizer(self, part: str, kind: str, dim: int | None = None) -> Normalizer:
        """Of "action" or "proprio"; numbers outside of the statistics' mask stay as they are.

        dim: how many numbers there must be. Raises CheckpointError.
        """
        names = KINDS[kind]
        try:
            first, second = (np.asarray(self.statistics[part][name], float) for name in names)
            mask = np.asarray(self.statistics[part].get("mask", np.ones(len(first))), bool)
            if kind != "mean_std":
                first, second = (first + second) / 2, (second - first) / 2
            found = Normalizer(kind, np.where(mask, first, 0.0), np.where(mask, np.maximum(second, 1e-8), 1.0))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.where}: statistics of {self.name!r}: expected {part} with {', '.join(names)}, found {error!r}"
            ) from error
        if dim is not None and len(found.offset) != dim:
            raise CheckpointError(
                f"{self.where}: statistics of {self.name!r}: {part}: expected {dim} numbers, found {len(found.offset)}"
            )
        return found
