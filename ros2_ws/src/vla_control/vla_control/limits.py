"""Velocity bounds that keep joint position, velocity and acceleration limits, always feasible together."""

from __future__ import annotations

import numpy as np
from vla_core.robot import Limits

#: Speed at which a joint (tool) that starts outside its limits (workspace) comes back while driven, rad/s (m/s).
RETURN_SPEED = 0.05


def braking_speed(distance: np.ndarray, acceleration: np.ndarray, period: float) -> np.ndarray:
    """Largest speed for the next period from which one can still stop within `distance` after it.

    u period + u^2 / (2 a) <= d. Whoever obeys it in every period can always brake with `a`: after a period at u the
    distance left is at least u^2 / (2 a), which u - a period satisfies in the next one. So this bound never
    contradicts the acceleration bound, where a plain mix of the two demands more than `a` near a limit.

    Args:
        distance: to the limit, rad (m), any shape, not negative.
        acceleration: a, rad/s^2 (m/s^2).
        period: s.
    """
    step, room = acceleration * period, 2.0 * acceleration * distance
    return room / (np.sqrt(step * step + room) + step)


def approach_speed(distance: np.ndarray, acceleration: np.ndarray, period: float) -> np.ndarray:
    """Largest speed towards a limit: `braking_speed` inside; beyond it (distance < 0) a speed away from it.

    The way back is slow, and slower the nearer, so that rounding at the limit moves nothing.
    """
    speed = braking_speed(np.abs(distance), acceleration, period)
    return np.where(distance < 0.0, -np.minimum(speed, RETURN_SPEED), speed)


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
    fastest, slowest = v + change, v - change
    uppers = np.stack([limits.velocity, fastest, approach_speed(limits.upper - q, limits.acceleration, period)])
    lowers = -np.stack([limits.velocity, -slowest, approach_speed(q - limits.lower, limits.acceleration, period)])
    # Coming back from outside a limit asks for more than acceleration allows: acceleration has the last word.
    upper = np.maximum(uppers.min(axis=0), slowest)
    lower = np.minimum(lowers.max(axis=0), fastest)
    return np.minimum(lower, upper), upper, lowers.argmax(axis=0), uppers.argmin(axis=0)
