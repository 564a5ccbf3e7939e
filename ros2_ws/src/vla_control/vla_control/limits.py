"""Velocity bounds that keep joint position, velocity and acceleration limits, always feasible together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from vla_core.robot import Limits

#: What may bound a joint's velocity.
LIMIT_NAMES = ("velocity", "acceleration", "position")
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


class VelocityBounds(NamedTuple):
    """Bounds on the joint velocity of the next period, lower <= upper, and what makes them; all (n,), rad/s (m/s).

    most: by velocity. slowest, fastest: by acceleration. back, on: by position, towards the lower and upper limit.
    """

    lower: np.ndarray
    upper: np.ndarray
    most: np.ndarray
    slowest: np.ndarray
    fastest: np.ndarray
    back: np.ndarray
    on: np.ndarray

    def made_by(self, at_lower: np.ndarray, at_upper: np.ndarray) -> list[str]:
        """What made the bounds of the joints `at_lower` and `at_upper` (n,) bool, of LIMIT_NAMES."""
        lower_by = np.argmax([-self.most, self.slowest, self.back], axis=0)
        upper_by = np.argmin([self.most, self.fastest, self.on], axis=0)
        return [LIMIT_NAMES[k] for k in sorted({*lower_by[at_lower], *upper_by[at_upper]})]


def velocity_bounds(q: np.ndarray, v: np.ndarray, limits: Limits, period: float) -> VelocityBounds:
    """The bounds at commanded joint positions q (n,), rad (m), and velocities v (n,), rad/s (m/s)."""
    change = limits.acceleration * period
    slowest, fastest = v - change, v + change
    distance = np.array([q - limits.lower, limits.upper - q])
    back, on = approach_speed(distance, limits.acceleration, period)
    back = -back
    # Coming back from outside a limit asks for more than acceleration allows: acceleration has the last word.
    upper = np.maximum(np.minimum(np.minimum(limits.velocity, fastest), on), slowest)
    lower = np.minimum(np.maximum(np.maximum(-limits.velocity, slowest), back), fastest)
    return VelocityBounds(np.minimum(lower, upper), upper, limits.velocity, slowest, fastest, back, on)
