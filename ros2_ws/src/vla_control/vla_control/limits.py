"""Velocity bounds that keep joint position, velocity and acceleration limits, always feasible together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from vla_core.robot import Limits

from vla_control import kernels

#: What may bound a joint's velocity.
LIMIT_NAMES = ("velocity", "acceleration", "position")
#: A bound counts as active within this of it, rad/s.
_ACTIVE = 1e-9
#: Speed at which a joint (tool) that starts outside its limits (workspace) comes back while driven, rad/s (m/s).
RETURN_SPEED = 0.05


class VelocityBounds(NamedTuple):
    """Bounds on the joint velocity of the next period, and what makes them.

    rows (6, n), rad/s (m/s): lower, upper with lower <= upper; what acceleration allows at least and at most; what
    position allows towards the lower and the upper limit. most (n,): what velocity allows.
    """

    rows: np.ndarray
    most: np.ndarray

    @property
    def lower(self) -> np.ndarray:
        return self.rows[0]

    @property
    def upper(self) -> np.ndarray:
        return self.rows[1]

    def made_by(self, velocity: np.ndarray, part: slice) -> list[str]:
        """What made the bounds that velocities (n,) of some joints are at, of LIMIT_NAMES."""
        found = kernels.makers(velocity, self.rows, self.most, part.start, part.stop, _ACTIVE)
        return [name for k, name in enumerate(LIMIT_NAMES) if found & 1 << k] if found else []


def velocity_bounds(q: np.ndarray, v: np.ndarray, limits: Limits, period: float, ahead: float = 0.0) -> VelocityBounds:
    """The bounds at commanded joint positions q (n,), rad (m), and velocities v (n,), rad/s (m/s).

    ahead: how long a joint would go on at its speed when all joints brake together, s. One that is slowed for the
    others' sake goes on for longer, so it has to be slower near its limit than its own brakes ask for.
    """
    most = limits.velocity
    rows = kernels.joint_bounds(
        q, v, limits.lower, limits.upper, most, limits.acceleration, period, ahead, RETURN_SPEED
    )
    return VelocityBounds(rows, most)


def hull(lower: np.ndarray, upper: np.ndarray, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The box widened to hold `point`."""
    return np.minimum(lower, point), np.maximum(upper, point)
