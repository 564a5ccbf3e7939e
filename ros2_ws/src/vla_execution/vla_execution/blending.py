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


def along(layout: Layout, actions: np.ndarray, step: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Targets (N, D) on the way from action `step` to the next one, in each of N chunks.

    A Catmull-Rom spline goes through the actions with continuous velocity: on straight lines between them the arm
    would change its velocity at every action at once. Quaternions go along it by their components, normalised:
    neighbouring actions are near. Grippers hold the decision of action `step`.

    Args:
        actions: (N, H, D). step: (N,) in 0 .. H - 1; the last action is held. u: (N,) part of the way, in [0, 1].
    """
    rows, last = np.arange(len(actions)), actions.shape[1] - 1
    a, b, c, d = (actions[rows, np.clip(step + k, 0, last)] for k in (-1, 0, 1, 2))
    for near in (a, c, d):
        for q in layout.quaternions:  # q and -q are the same rotation
            near[:, q] *= np.where(np.sum(near[:, q] * b[:, q], -1, keepdims=True) < 0.0, -1.0, 1.0)
    # At the ends as if the outermost step went on.
    a = np.where((step == 0)[:, None], 2.0 * b - c, a)
    d = np.where((step >= last - 1)[:, None], 2.0 * c - b, d)
    u = np.where(step >= last, 0.0, u)[:, None]
    out = b + 0.5 * u * ((c - a) + u * (2.0 * a - 5.0 * b + 4.0 * c - d + u * (3.0 * (b - c) + d - a)))
    for q in layout.quaternions:
        out[:, q] /= np.linalg.norm(out[:, q], axis=-1, keepdims=True)
    out[:, layout.grippers] = b[:, layout.grippers]
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
