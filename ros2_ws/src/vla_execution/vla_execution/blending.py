"""Blending of targets: translations and joints linearly, rotations on SO(3), grippers by decision.

A gripper opening is a decision more than a quantity: the mean of "open" and "closed" is a half-open hand that drops
the object. The rule, used wherever predictions meet (`choose_opening`):

1. Predictions on different sides of 0.5 disagree: the side with the larger sum of weights wins (a tie: the side of
   the newest prediction), the other side is not heard.
2. On the winning side, predictions within `SAME_DECISION` of each other are one decision: their weighted mean.
   Wider apart, the newest of them is taken as it is.
"""

from __future__ import annotations

import math

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


def curve(layout: Layout, actions: np.ndarray) -> np.ndarray:
    """The smooth way through actions (H, D): for each one, the cubic (4, D) that leads to the next; see `along`.

    A Catmull-Rom spline goes through the actions with continuous velocity: on straight lines between them the arm
    would change its velocity at every action at once. Quaternions go along it by their components, normalised:
    neighbouring actions are near. Grippers hold the decision of the action before; the last action is held.
    """
    steps, last = np.arange(len(actions)), len(actions) - 1
    a, b, c, d = (actions[np.clip(steps + k, 0, last)] for k in (-1, 0, 1, 2))
    for near in (a, c, d):
        for q in layout.quaternions:  # q and -q are the same rotation
            near[:, q] *= np.where(np.sum(near[:, q] * b[:, q], -1, keepdims=True) < 0.0, -1.0, 1.0)
    # At the ends as if the outermost step went on.
    a[0] = 2.0 * b[0] - c[0]
    d[-2:] = 2.0 * c[-2:] - b[-2:]
    cubics = np.stack([b, 0.5 * (c - a), a - 2.5 * b + 2.0 * c - 0.5 * d, 0.5 * (3.0 * (b - c) + d - a)], axis=1)
    cubics[:, 1:, layout.grippers] = 0.0
    cubics[-1, 1:] = 0.0
    return cubics


def along(layout: Layout, cubic: np.ndarray, u: float) -> np.ndarray:
    """Target (D,) at u in [0, 1] of a cubic (4, D) of a `curve`."""
    out = cubic[0] + u * (cubic[1] + u * (cubic[2] + u * cubic[3]))
    for q in layout.quaternion_slices:
        out[q] /= math.sqrt(out[q] @ out[q])
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
