"""Normalisation of states and actions; its numbers live beside the weights, in policy.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = ("mean_std", "quantile", "min_max")


class NormalizationError(ValueError):
    """Normaliser statistics that cannot be used."""


@dataclass(frozen=True)
class Normalizer:
    """y = (x - offset)/scale, element by element over the last axis (or over the last two, if the arrays have two).

    kind: "mean_std" (zero mean, unit deviation), "quantile" (1 % and 99 % to -1 and 1; not clipped, so that it can
    be undone), "min_max" (extremes to -1 and 1).
    """

    kind: str
    offset: np.ndarray
    scale: np.ndarray

    def __post_init__(self) -> None:
        offset, scale = np.asarray(self.offset, np.float64), np.asarray(self.scale, np.float64)
        if self.kind not in KINDS:
            raise NormalizationError(f"normaliser: kind must be one of {KINDS}, found {self.kind!r}")
        if offset.shape != scale.shape or offset.ndim == 0:
            raise NormalizationError(f"normaliser: shapes of offset {offset.shape} and scale {scale.shape} differ")
        if not (np.all(np.isfinite(offset)) and np.all(np.isfinite(scale)) and np.all(scale > 0)):
            raise NormalizationError("normaliser: offset must be finite and scale positive")
        object.__setattr__(self, "offset", offset)
        object.__setattr__(self, "scale", scale)

    @classmethod
    def fit(cls, kind: str, samples: np.ndarray, floor: float = 1e-2) -> Normalizer:
        """Statistics over all axes but the last of `samples` (..., D).

        floor: smallest scale, in the unit of the data: a quantity that hardly moves is not blown up (ACT clips the
        deviation at 1e-2 too).
        """
        flat = np.asarray(samples, np.float64).reshape(-1, np.shape(samples)[-1])
        if kind == "mean_std":
            offset, scale = flat.mean(0), flat.std(0)
        elif kind in ("quantile", "min_max"):
            low, high = np.quantile(flat, [0.01, 0.99] if kind == "quantile" else [0.0, 1.0], axis=0)
            offset, scale = (low + high) / 2, (high - low) / 2
        else:
            raise NormalizationError(f"normaliser: kind must be one of {KINDS}, found {kind!r}")
        return cls(kind, offset, np.maximum(scale, floor))

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """(..., D) -> (..., D) float32."""
        return ((values - self.offset) / self.scale).astype(np.float32)

    def denormalize(self, values: np.ndarray) -> np.ndarray:
        """The inverse, float64. Statistics of each step of a chunk are cut to the steps that there are."""
        offset, scale = (part if part.ndim == 1 else part[: np.shape(values)[-2]] for part in (self.offset, self.scale))
        return np.asarray(values, np.float64) * scale + offset

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"kind": self.kind, "offset": self.offset.tolist(), "scale": self.scale.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Normalizer:
        """Strict inverse of `to_dict`. Raises NormalizationError."""
        if not isinstance(values, Mapping) or set(values) != {"kind", "offset", "scale"}:
            raise NormalizationError(f"normaliser: expected the keys kind, offset, scale, found {values!r:.80}")
        try:
            return cls(values["kind"], np.asarray(values["offset"], float), np.asarray(values["scale"], float))
        except (TypeError, ValueError) as error:
            raise NormalizationError(f"normaliser: {error}") from error
