"""Blending of targets: translations and joints linearly, rotations on SO(3), grippers by decision.

A gripper opening is a decision more than a quantity: the mean of "open" and "closed" is a half-open hand that drops
the object. The rule, used wherever predictions meet (`choose_opening`):

1. Predictions on different sides of 0.5 disagree: the side with the larger sum of weights wins (a tie: the side of
   the newest prediction), the other side is not heard.
2. On the winning side, predictions within `SAME_DECISION` of each other are one decision: their weighted mean.
   Wider apart, the newest of them is taken as it is.
"""

from __future__ import annotations

import numpy as np
from vla_core import se3

from vla_execution.layout import Layout

#: Openings (0..1) that lie wider apart than this are different decisions.
SAME_DECISION = 0.25


def choose_opening(openings: np.ndarray, weights: np.ndarray) -> float:
    """One opening of predictions (n,), oldest first, with weights (n,) >= 0 of sum above zero."""
    openings, weights = np.asarray(openings, float), np.asarray(weights, float)
    heard = weights > 0
    openings, weights = openings[heard], weights[heard]
    side = openings >= 0.5
    difference = weights[side].sum() - weights[~side].sum()
    tie = abs(difference) <= 1e-9 * weights.sum()
    winners = side == (side[-1] if tie else difference > 0)
    openings, weights = openings[winners], weights[winners]
    if np.ptp(openings) > SAME_DECISION:
        return float(openings[-1])
    # The mean of equal numbers may round beyond them.
    return float(np.clip(openings @ weights / weights.sum(), openings.min(), openings.max()))


def between(layout: Layout, first: np.ndarray, second: np.ndarray, u: np.ndarray | float) -> np.ndarray:
    """Targets (..., D) at u (...) in [0, 1] between two actions of a chunk; grippers hold the first's decision."""
    out = _mixed(layout, first, second, u)
    out[..., layout.grippers] = first[..., layout.grippers]
    return out


def cross_fade(layout: Layout, old: np.ndarray, new: np.ndarray, u: float) -> np.ndarray:
    """Target (D,) at u in [0, 1] of the way from the old plan's target to the new one's."""
    out = _mixed(layout, old, new, u)
    weights = np.array([1.0 - u, u])
    for g in layout.grippers:
        out[g] = choose_opening(np.array([old[g], new[g]]), weights)
    return out


def average(layout: Layout, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean (D,) of predictions (n, D), oldest first: on SE(3) for poses, decisions for grippers."""
    predictions, weights = np.asarray(predictions, float), np.asarray(weights, float)
    if len(predictions) == 1:
        return predictions[0].copy()
    out = np.empty(predictions.shape[1])
    out[layout.linear] = weights @ predictions[:, layout.linear] / weights.sum()
    if len(layout.quaternions):
        R = se3.quat_to_matrix(predictions[:, layout.quaternions])  # (n, A, 3, 3)
        T = se3.transform(np.swapaxes(R, 0, 1), np.zeros(3))
        out[layout.quaternions] = se3.matrix_to_quat(se3.mean(T, weights)[:, :3, :3])
    for g in layout.grippers:
        out[g] = choose_opening(predictions[:, g], weights)
    return out


def _mixed(layout: Layout, first: np.ndarray, second: np.ndarray, u: np.ndarray | float) -> np.ndarray:
    """Both ways (..., D) at u (...), grippers left undefined."""
    u = np.asarray(u, float)[..., None]
    out = (1.0 - u) * first + u * second
    if len(layout.quaternions):
        out[..., layout.quaternions] = se3.slerp(first[..., layout.quaternions], second[..., layout.quaternions], u)
    return out
