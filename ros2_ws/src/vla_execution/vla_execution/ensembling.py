"""Temporal ensembling: every step is the weighted mean of all chunks that predicted it.

Zhao et al., "Learning fine-grained bimanual manipulation with low-cost hardware" (ACT), arXiv 2304.13705, section 4
and algorithm 2: w_i = exp(-m i), i = 0 is the OLDEST prediction for the step, so m > 0 favours old predictions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from vla_execution.blending import average
from vla_execution.layout import Layout


class EnsembleError(ValueError):
    """Nothing was predicted for a step, or a chunk cannot be used."""


def ensemble_weights(count: int, decay: float) -> np.ndarray:
    """Weights (count,) of sum 1, oldest prediction first. decay > 0 favours old predictions, < 0 new ones."""
    exponents = -decay * np.arange(count)
    weights = np.exp(exponents - exponents.max())
    return weights / weights.sum()


class TemporalEnsembler:
    """Ensembles chunks that are numbered by steps.

    decay: m, 1/step. layout: of the actions; None takes them as plain numbers (any trailing shape), else rotations
    are averaged on SO(3) and grippers by decision (vla_execution.blending).
    """

    def __init__(self, decay: float = 0.01, layout: Layout | None = None):
        if not np.isfinite(decay):
            raise EnsembleError(f"decay: expected a finite number, found {decay}")
        self.decay = decay
        self.layout = layout
        self._chunks: list[tuple[int, np.ndarray]] = []

    def add(self, first_step: int, chunk: ArrayLike) -> None:
        """Add the newest chunk: predictions (K, ...) for steps first_step .. first_step + K - 1.

        Raises:
            EnsembleError: a chunk that is empty, not finite, or of another action shape than the ones before.
        """
        chunk = np.array(chunk, float)
        if chunk.ndim == 0 or len(chunk) == 0 or not np.isfinite(chunk).all():
            raise EnsembleError(f"chunk: expected finite numbers (K, ...), K > 0, found shape {chunk.shape}")
        if self._chunks and self._chunks[-1][1].shape[1:] != chunk.shape[1:]:
            raise EnsembleError(
                f"chunk: expected actions of shape {self._chunks[-1][1].shape[1:]}, found {chunk.shape[1:]}"
            )
        self._chunks.append((first_step, chunk))

    def action(self, step: int) -> np.ndarray:
        """The ensembled action (...) of `step`. Chunks that end before `step` are forgotten.

        Raises:
            EnsembleError: no chunk predicted this step.
        """
        self._chunks = [(first, chunk) for first, chunk in self._chunks if first + len(chunk) > step]
        predictions = np.array([chunk[step - first] for first, chunk in self._chunks if first <= step])
        if len(predictions) == 0:
            raise EnsembleError(f"step {step}: expected a chunk that predicts it, found none")
        weights = ensemble_weights(len(predictions), self.decay)
        if self.layout is not None:
            return average(self.layout, predictions, weights)
        return np.tensordot(weights, predictions, axes=1)

    def reset(self) -> None:
        """Forget all chunks."""
        self._chunks.clear()
