"""Joint velocities for a wanted motion, as a small quadratic program with bounds and workspace walls.

    tool motion     minimise |W (J qd - twist)|^2 + damping |qd|^2 + posture |qd - N (home - q)|^2
    joint motion    minimise |qd - wanted|^2
    subject to      lower <= qd <= upper             hard: joint position, velocity, acceleration
                    inward <= J_linear qd <= outward the workspace's walls

W weighs rotation against translation, N projects on what the tool does not feel. The bounds come from
vla_control.limits and are never empty; the walls give way just as far as braking needs. So braking solves the
problem always. daqp solves it in about 30 us for 7 joints, MuJoCo's kinematics and Jacobian take 13 us (2-core
machine, medians). Rows for collisions belong beside the walls.
"""

from __future__ import annotations

import daqp
import numpy as np

#: Weight of a radian per second against a metre per second.
ROTATION_WEIGHT = 0.3
DAMPING = 1e-5
#: Pull towards the home posture, in the tool's null space.
POSTURE = 1e-4


class DifferentialIk:
    """The program of one arm with `joints` joints; arrays are allocated once."""

    def __init__(self, joints: int):
        self._weights = np.array([1.0, 1.0, 1.0, *[ROTATION_WEIGHT] * 3])
        self._eye = np.eye(joints)
        self._regular = (DAMPING + POSTURE) * self._eye
        self._task_damping = DAMPING * np.eye(6)
        self._sense = np.zeros(joints + 3, np.int32)
        self._lower, self._upper = np.zeros(joints + 3), np.zeros(joints + 3)
        self._rows = np.zeros((3, joints))
        self._joints = joints

    def bound(
        self,
        jacobian: np.ndarray,
        lower: np.ndarray,
        upper: np.ndarray,
        inward: np.ndarray,
        outward: np.ndarray,
        braked: np.ndarray,
    ) -> None:
        """Set the constraints of the next solution.

        Args:
            jacobian: (6, n) base-frame axes at the tool point, linear first.
            lower, upper: (n,) bounds, rad/s. inward, outward: (3,) bounds of the tool's velocity, m/s.
            braked: (n,) joint velocities of braking, inside the bounds, which the walls must allow.
        """
        n = self._joints
        self._lower[:n], self._upper[:n] = lower, upper
        self._rows[:] = jacobian[:3]
        tool = self._rows @ braked
        np.minimum(inward, tool, out=self._lower[n:])
        np.maximum(outward, tool, out=self._upper[n:])

    def follow_twist(self, jacobian: np.ndarray, twist: np.ndarray, posture: np.ndarray) -> np.ndarray | None:
        """Joint velocities (n,), or None when the solver found none (the caller brakes).

        Args:
            jacobian: as given to `bound`. twist: (6,) wanted tool velocity, m/s and rad/s.
            posture: (n,) velocity towards the home posture, rad/s.
        """
        weighted = self._weights[:, None] * jacobian
        if self._joints > 6:
            gram = weighted @ weighted.T + self._task_damping
            free = posture - weighted.T @ np.linalg.solve(gram, weighted @ posture)
        else:
            free = np.zeros(self._joints)
        hessian = weighted.T @ weighted + self._regular
        return self._solve(hessian, -(weighted.T @ (self._weights * twist)) - POSTURE * free)

    def follow_joints(self, wanted: np.ndarray) -> np.ndarray | None:
        """As near to joint velocities `wanted` (n,) as may be, or None when the solver found none."""
        return self._solve(self._eye, -wanted)

    def _solve(self, hessian: np.ndarray, linear: np.ndarray) -> np.ndarray | None:
        self._sense[:] = 0  # the solver may leave its active set there
        solution, _, flag, _ = daqp.solve(hessian, linear, self._rows, self._upper, self._lower, self._sense)
        if flag < 1 or not np.isfinite(solution).all():
            return None
        # The solver keeps bounds to its tolerance, the limits are kept exactly.
        n = self._joints
        return np.clip(solution, self._lower[:n], self._upper[:n])
