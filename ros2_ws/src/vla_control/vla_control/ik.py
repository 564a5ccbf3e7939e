"""Joint velocities of all arms of a cell for the motions wanted, as one small quadratic program.

    minimise    for each arm   tool motion:  |W (J qd - twist)|^2 + |D qd|^2 + posture |qd - N (home - q)|^2
                               joint motion: |qd - wanted|^2
    subject to  lower <= qd <= upper          joint position, velocity, acceleration
                least <= rows qd <= most      walls, cones, distances of links

Priorities: the constraints are hard, the motions wanted are soft, the posture counts only where the tool does not feel
it. W weighs rotation against translation; N projects on what the tool does not feel; D damps, in each singular
direction of W J that fades, by what is left of the tool's error along it: at the end of its reach an arm then stands
still, where constant damping swings for ever (the curvature of the tool's path weighs in by that error; compare
Sugihara, "Solvability-unconcerned inverse kinematics by the Levenberg-Marquardt method", IEEE T-RO 2011, which damps
all directions). A faded direction that the arm can leave towards the goal is driven instead: see `ArmTask.twist`.

The constraints always admit braking, so braking solves the problem always. daqp solves it in about 40 us for 7 joints
and 65 us for 14 (2-core machine, medians).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import daqp
import numpy as np

from vla_control import kernels
from vla_control.geometry import COLLISION, WORKSPACE, Place

#: Weight of a radian per second against a metre per second.
ROTATION_WEIGHT = 0.3
#: Damping everywhere, against squared singular values of W J, (m/rad)^2.
DAMPING = 1e-5
#: A direction fades below this singular value of W J, m/rad, and is then damped by this much per m of error along it,
#: m: enough for a Panda stretched out to stand still, little enough for a ViperX to pass its wrist's singularity.
FADING, ERROR_DAMPING = 0.05, 0.1
#: Pull towards the home posture, in the tool's null space.
POSTURE = 1e-4
#: A faded direction is left at this joint speed at most, rad/s, when the tool is asked for more than this in it, m/s.
LEAVING_SPEED, LEAVING_TWIST = 0.5, 1e-4
#: Less than this is no bend of the tool's path, m/rad^2.
BENT = 0.02


class ArmTask:
    """What one arm is to do, as a quadratic cost of its joint velocities.

    acceleration: (n,) with which errors are taken away, rad/s^2 (m/s^2). period: s. gain: most of the rates at which
    they are, 1/s.
    """

    def __init__(self, acceleration: np.ndarray, period: float, gain: float):
        self._weights = np.array([1.0, 1.0, 1.0, *[ROTATION_WEIGHT] * 3])
        self._eye, self._unbent = np.eye(len(acceleration)), np.zeros((6, 6))
        self._brakes = acceleration, period, gain

    def correction(self, jacobian: np.ndarray, error: np.ndarray) -> np.ndarray:
        """Tool velocity (6,) that takes away a tool error (6,), m and rad, as fast as the joints can brake again.

        Each singular direction is corrected at its own rate, so that a fading one holds up no other. Call it before
        `twist`, which works in the same directions with the same damping.

        Args:
            jacobian: (6, n) base-frame axes at the tool point, linear first.
        """
        self._U, self._sizes, self._directions, self._squares, self._free_damping, twist = kernels.decompose(
            jacobian, self._weights, error, *self._brakes, DAMPING, FADING, ERROR_DAMPING, POSTURE
        )
        return twist

    def twist(
        self,
        twist: np.ndarray,
        posture: np.ndarray,
        bend: Callable[[np.ndarray], np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Cost of following a tool velocity: hessian (n, n), linear (n,), and whether a singularity slows the arm.

        Where a direction u of the tool has faded, joints along v move the tool hardly at all, yet they bend its path:
        by u (dJ/dq v) v. When that is to the side where the tool is wanted, the arm is driven along v and so leaves
        the singularity; when it is not, the goal is out of reach and the arm stands still. (At full stretch the only
        way back is of this kind, and the Jacobian does not show it.)

        Args:
            twist: (6,) wanted tool velocity, m/s and rad/s. posture: (n,) velocity towards the home posture, rad/s.
            bend: joint directions v (k, n) -> derivatives (k, 6) of J v along them, m and rad per rad^2.
        """
        bends = bend(self._directions) if self._sizes[-1] < FADING else self._unbent
        return kernels.follow(
            self._U, self._sizes, self._directions, self._squares, self._free_damping, self._weights, twist, posture,
            bends, POSTURE, FADING, BENT, LEAVING_SPEED, LEAVING_TWIST,
        )  # fmt: skip

    def joints(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Cost of following joint velocities `wanted` (n,): hessian, linear, and False."""
        return self._eye, -wanted, False


class Program:
    """The program of `n` joints with at most `most` rows; arrays are allocated once. What is beyond the last place is
    left out: the caller checks what it sends."""

    def __init__(self, n: int, most: int):
        self._n = n
        self.hessian, self.linear = np.zeros((n, n)), np.zeros(n)
        self._rows = np.zeros((most, n))
        self._lower, self._upper = np.zeros(n + most), np.zeros(n + most)
        self._labels = np.zeros((most, 2), np.int64)
        self._sense = np.zeros(n + most, np.int32)
        self._used, self._braked = 0, np.zeros(n)
        self._arrays = self._rows, self._lower, self._upper, self._labels

    def bound(self, lower: np.ndarray, upper: np.ndarray, braked: np.ndarray) -> None:
        """Begin anew with bounds (n,) of the joint velocities, rad/s (m/s), and braking velocities (n,) inside them,
        which no constraint will exclude."""
        self._lower[: self._n], self._upper[: self._n] = lower, upper
        self._braked = braked
        self._used = 0

    def tighten(self, most: np.ndarray) -> None:
        """Narrow the bounds to speeds `most` (n,), as far as braking allows."""
        n = self._n
        np.maximum(self._lower[:n], np.minimum(-most, self._braked), out=self._lower[:n])
        np.minimum(self._upper[:n], np.maximum(most, self._braked), out=self._upper[:n])

    def add(self, kind: int, where: np.ndarray, rows: np.ndarray, least: np.ndarray, most: np.ndarray) -> None:
        """Constrain rows (k, n) of the joint velocities to least <= rows qd <= most (k,), or as near to that as braking
        is. Rows that the bounds keep anyhow are left out. kind, where (k,): told of a row that holds back, by
        `active`."""
        self._used = kernels.put(kind, where, rows, least, most, self._braked, self._used, *self._arrays)

    def add_cell(
        self, here: Place, there: Place, corners: np.ndarray, margin: np.ndarray, v: np.ndarray, ahead: float,
        damping: tuple[float, float, float, float, float],
    ) -> np.ndarray:  # fmt: skip
        """Constrain tools to their boxes and watched pairs to their margins, where the arms are and `there`, where they
        would come to rest; see kernels.put_cell. damping: its acceleration, period, back, slack and gain.

        Returns the speeds (2, arms, 3) that the walls allow the tools, m/s.
        """
        self._used, speeds = kernels.put_cell(
            WORKSPACE, COLLISION, corners, margin, *damping, v, ahead,
            here.T_base_tool, here.tool_rows, here.count, here.pair, here.distance, here.rows,
            there.T_base_tool, there.tool_rows, there.count, there.pair, there.distance, there.rows,
            self._braked, self._used, *self._arrays,
        )  # fmt: skip
        return speeds

    def solve(self) -> np.ndarray | None:
        """Joint velocities (n,), or None when the solver found none (the caller brakes)."""
        m = self._n + self._used
        self._sense[:m] = 0  # the solver may leave its active set there
        solution, _, flag, _ = daqp.solve(
            self.hessian, self.linear, self._rows[: self._used], self._upper[:m], self._lower[:m], self._sense[:m]
        )
        if flag < 1:
            return None
        # The solver keeps bounds to its tolerance, the limits are kept exactly.
        velocity = kernels.clipped(solution, self._lower, self._upper)
        return None if math.isnan(velocity.sum()) else velocity

    def wanted(self) -> np.ndarray:
        """Joint velocities (n,) without any constraint."""
        return kernels.unbounded(self.hessian, self.linear)

    def active(self, velocity: np.ndarray) -> list[list[int]]:
        """Kind and place of the rows that hold velocities (n,) back; WORKSPACE and CONE: of which arm, COLLISION: of
        which pair."""
        return kernels.holding(*self._arrays, self._used, velocity, 1e-6).tolist()
