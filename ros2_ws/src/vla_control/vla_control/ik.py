"""Joint velocities for a wanted motion, as a small quadratic program with bounds and workspace walls.

    tool motion     minimise |W (J qd - twist)|^2 + |D qd|^2 + posture |qd - N (home - q)|^2
    joint motion    minimise |qd - wanted|^2
    subject to      lower <= qd <= upper             hard: joint position, velocity, acceleration
                    inward <= J_linear qd <= outward the workspace's walls

W weighs rotation against translation; N projects on what the tool does not feel; D damps, in each singular direction of
W J that fades, by what is left of the tool's error along it: at the end of its reach an arm then stands still, where
constant damping swings for ever (the curvature of the tool's path weighs in by that error; compare Sugihara,
"Solvability-unconcerned inverse kinematics by the Levenberg-Marquardt method", IEEE T-RO 2011, which damps all
directions). The bounds come from vla_control.limits and are never empty; the walls give way just as far as braking
needs. So braking solves the problem always. daqp solves it in about 30 us for 7 joints, MuJoCo's kinematics and
Jacobian take 13 us (2-core machine, medians). Rows for collisions belong beside the walls.
"""

from __future__ import annotations

from collections.abc import Callable

import daqp
import numpy as np

#: Weight of a radian per second against a metre per second.
ROTATION_WEIGHT = 0.3
#: Damping everywhere, against squared singular values of W J, (m/rad)^2.
DAMPING = 1e-5
#: A direction fades below this singular value of W J, m/rad, and is then damped by this much per m of error along it,
#: m: enough for a Panda stretched out to stand still, little enough for a ViperX to pass its wrist's singularity.
FADING, ERROR_DAMPING = 0.05, 0.1
#: Pull towards the home posture, in the tool's null space.
POSTURE = 1e-4


class DifferentialIk:
    """The program of one arm with `joints` joints; arrays are allocated once.

    correction_rate: displacements (..., n), rad, none negative -> rates, 1/s, at which each may be taken away.
    """

    def __init__(self, joints: int, correction_rate: Callable[[np.ndarray], np.ndarray]):
        self._weights = np.array([1.0, 1.0, 1.0, *[ROTATION_WEIGHT] * 3])
        self._eye = np.eye(joints)
        self._sense = np.zeros(joints + 3, np.int32)
        self._lower, self._upper = np.zeros(joints + 3), np.zeros(joints + 3)
        self._rows = np.zeros((3, joints))
        self._joints, self._correction_rate = joints, correction_rate

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

    def correction(self, jacobian: np.ndarray, error: np.ndarray) -> np.ndarray:
        """Tool velocity (6,) that takes away a tool error (6,), m and rad, as fast as the joints can brake again.

        Each singular direction is corrected at its own rate, so that a fading one holds up no other. Call it before
        `follow_twist`, which works in the same directions with the same damping.
        """
        self._U, self._sizes, self._directions = np.linalg.svd(self._weights[:, None] * jacobian, full_matrices=False)
        left = (self._weights * error) @ self._U
        self._squares = self._sizes**2 + DAMPING
        self._free_damping = POSTURE
        if self._sizes[-1] < FADING:
            fading = ERROR_DAMPING * np.abs(left) * np.maximum(1.0 - (self._sizes / FADING) ** 2, 0.0)
            self._squares += fading
            self._free_damping += float(fading.sum())
        away = np.abs((self._sizes / self._squares * left)[:, None] * self._directions)
        return self._U @ (self._correction_rate(away).min(axis=1) * left) / self._weights

    def follow_twist(self, twist: np.ndarray, posture: np.ndarray) -> np.ndarray | None:
        """Joint velocities (n,), or None when the solver found none (the caller brakes).

        Args:
            twist: (6,) wanted tool velocity, m/s and rad/s. posture: (n,) velocity towards the home posture, rad/s.
        """
        V = self._directions
        linear = -((self._weights * twist) @ self._U * self._sizes) @ V
        if self._joints <= 6:
            return self._solve((V.T * self._squares) @ V, linear)
        hessian = (V.T * (self._squares - self._free_damping)) @ V + self._free_damping * self._eye
        return self._solve(hessian, linear - POSTURE * (posture - (V @ posture) @ V))

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
        return np.minimum(np.maximum(solution, self._lower[:n]), self._upper[:n])
