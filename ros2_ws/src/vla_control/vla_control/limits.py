"""Velocity bounds that keep joint position, velocity and acceleration limits, always feasible together."""

from __future__ import annotations

import numpy as np
from vla_core.robot import Limits

#: Speed at which a joint that starts outside its position limits comes back while it is being driven, rad/s.
RETURN_SPEED = 0.05


def braking_speed(distance: np.ndarray, acceleration: np.ndarray, period: float) -> np.ndarray:
    """Largest speed for the next period from which one can still stop within `distance` after it.

    u period + u^2 / (2 a) <= d. Whoever obeys it in every period can always brake with `a`: after a period at u the
    distance left is at least u^2 / (2 a), which u - a period satisfies in the next one. So this bound never
    contradicts the acceleration bound, where a plain mix of the two demands more than `a` near a limit.

    Args:
        distance: to the limit, rad (m), any shape; negative counts as zero.
        acceleration: a, rad/s^2 (m/s^2).
        period: s.
    """
    step = acceleration * period
    return np.sqrt(step * step + 2.0 * acceleration * np.maximum(distance, 0.0)) - step


def velocity_bounds(
    q: np.ndarray, v: np.ndarray, limits: Limits, period: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bounds (lower, upper) on the joint velocity of the next period, and what made each one.

    Args:
        q, v: (n,) commanded position and velocity, rad (m) and rad/s (m/s).

    Returns:
        lower, upper: (n,), lower <= upper. lower_by, upper_by: (n,) of 0 velocity, 1 acceleration, 2 position.
    """
    change = limits.acceleration * period
    room_up = braking_speed(limits.upper - q, limits.acceleration, period)
    room_down = -braking_speed(q - limits.lower, limits.acceleration, period)
    room_up = np.where(q > limits.upper, -RETURN_SPEED, room_up)
    room_down = np.where(q < limits.lower, RETURN_SPEED, room_down)
    uppers = np.stack([limits.velocity, v + change, room_up])
    lowers = np.stack([-limits.velocity, v - change, room_down])
    upper_by, lower_by = uppers.argmin(axis=0), lowers.argmax(axis=0)
    upper, lower = uppers.min(axis=0), lowers.max(axis=0)
    # From outside a limit, or at more than the allowed speed, acceleration has the last word: brake as hard as allowed.
    clash = lower > upper
    reachable_up, reachable_down = v + change, v - change
    upper = np.where(clash, np.clip(upper, reachable_down, reachable_up), upper)
    lower = np.where(clash, np.clip(lower, reachable_down, reachable_up), lower)
    middle = np.where(lower > upper, np.where(np.abs(lower) < np.abs(upper), lower, upper), 0.0)
    crossed = lower > upper
    return np.where(crossed, middle, lower), np.where(crossed, middle, upper), lower_by, upper_by
