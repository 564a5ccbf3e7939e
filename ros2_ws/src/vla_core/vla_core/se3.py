"""Rotations and rigid transforms, batched over leading dimensions that broadcast.

Rotations are matrices (..., 3, 3), transforms (..., 4, 4), quaternions xyzw (..., 4), rotation vectors (...,
3) in rad, twists [v, w] (..., 6) linear part first. Formulas: Sola, Deray, Atchuthan, "A micro Lie theory for
state estimation in robotics", arXiv 1812.01537, appendices B and D. Every function is accurate near the
identity and near half a turn, where the naive ones lose half of the digits: angles come from atan2, never
from acos, and the coefficients that divide by the angle are written with sinc or as series.

Signs and branches:
- `matrix_to_quat` gives qw >= 0; at exactly half a turn (qw = 0) the component of largest magnitude is
  positive.
- `log_so3` gives an angle in [0, pi]; at exactly pi its axis is the one of that quaternion.
- `matrix_to_rpy` gives roll, yaw in [-pi, pi], pitch in [-pi/2, pi/2]; in gimbal lock (|pitch| = pi/2) yaw is
  0.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

_TINY = 1e-12


class RotationError(ValueError):
    """Numbers that name no rotation: a zero quaternion, parallel 6D columns, NaN."""


# ------------------------------------------------------------------------------------------------------ SO(3)


def hat(w: ArrayLike) -> np.ndarray:
    """Skew matrix (..., 3, 3) of w (..., 3): hat(w) @ x = cross(w, x)."""
    w = np.asarray(w, float)
    W = np.zeros((*w.shape[:-1], 3, 3))
    W[..., 2, 1], W[..., 0, 2], W[..., 1, 0] = w[..., 0], w[..., 1], w[..., 2]
    W[..., 1, 2], W[..., 2, 0], W[..., 0, 1] = -w[..., 0], -w[..., 1], -w[..., 2]
    return W


def vee(W: ArrayLike) -> np.ndarray:
    """Vector (..., 3) of a skew matrix (..., 3, 3): the inverse of `hat`."""
    W = np.asarray(W, float)
    return np.stack([W[..., 2, 1], W[..., 0, 2], W[..., 1, 0]], axis=-1)


def exp_so3(w: ArrayLike) -> np.ndarray:
    """Rotation matrix (..., 3, 3) of a rotation vector (..., 3), rad (Rodrigues)."""
    w = np.asarray(w, float)
    if w.ndim == 1:
        return _exp_so3_one(*w.tolist())
    angle = _norm(w)[..., None, None]
    W = hat(w)
    return np.eye(3) + _sinc(angle) * W + 0.5 * _sinc(angle / 2) ** 2 * (W @ W)


def log_so3(R: ArrayLike) -> np.ndarray:
    """Rotation vector (..., 3) in rad, of length at most pi, of a rotation matrix (..., 3, 3)."""
    return quat_to_rotvec(matrix_to_quat(R))


def quat_to_rotvec(q: ArrayLike) -> np.ndarray:
    """Rotation vector (..., 3) in rad, of length at most pi, of a unit quaternion (..., 4)."""
    q = np.asarray(q, float)
    if q.ndim == 1:
        return _quat_to_rotvec_one(*q.tolist())
    sine, cosine = _norm(q[..., :3]), q[..., 3]
    half = np.arctan2(sine, np.abs(cosine))
    safe = np.where(sine > 0, sine, 1.0)
    factor = np.where(sine > 0, 2 * half / safe, 2.0)
    return q[..., :3] * np.where(cosine < 0, -factor, factor)[..., None]


def quat_to_matrix(q: ArrayLike) -> np.ndarray:
    """Rotation matrix (..., 3, 3) of a quaternion xyzw (..., 4), normalised here.

    Raises:
        RotationError: a quaternion of length zero or not finite.
    """
    q = np.asarray(q, float)
    if q.ndim == 1:
        return _quat_to_matrix_one(q)
    q = _unit(q, "quaternion")
    x, y, z, w = q[..., 0], q[..., 1], q[..., 2], q[..., 3]
    R = np.empty((*q.shape[:-1], 3, 3))
    R[..., 0, 0] = 1 - 2 * (y * y + z * z)
    R[..., 1, 1] = 1 - 2 * (x * x + z * z)
    R[..., 2, 2] = 1 - 2 * (x * x + y * y)
    R[..., 0, 1], R[..., 1, 0] = 2 * (x * y - z * w), 2 * (x * y + z * w)
    R[..., 0, 2], R[..., 2, 0] = 2 * (x * z + y * w), 2 * (x * z - y * w)
    R[..., 1, 2], R[..., 2, 1] = 2 * (y * z - x * w), 2 * (y * z + x * w)
    return R


def matrix_to_quat(R: ArrayLike) -> np.ndarray:
    """Unit quaternion xyzw (..., 4) with qw >= 0 of a rotation matrix (..., 3, 3).

    4 q q^T is linear in R; its row with the largest diagonal element, normalised, is q (Shepperd 1978).
    """
    R = np.asarray(R, float)
    if R.ndim == 2:
        return _matrix_to_quat_one(R)
    K = np.empty((*R.shape[:-2], 4, 4))
    a, b, c = R[..., 0, 0], R[..., 1, 1], R[..., 2, 2]
    K[..., 0, 0], K[..., 1, 1], K[..., 2, 2], K[..., 3, 3] = 1 + a - b - c, 1 - a + b - c, 1 - a - b + c, 1 + a + b + c
    K[..., 0, 1] = K[..., 1, 0] = R[..., 1, 0] + R[..., 0, 1]
    K[..., 0, 2] = K[..., 2, 0] = R[..., 0, 2] + R[..., 2, 0]
    K[..., 1, 2] = K[..., 2, 1] = R[..., 2, 1] + R[..., 1, 2]
    K[..., 0, 3] = K[..., 3, 0] = R[..., 2, 1] - R[..., 1, 2]
    K[..., 1, 3] = K[..., 3, 1] = R[..., 0, 2] - R[..., 2, 0]
    K[..., 2, 3] = K[..., 3, 2] = R[..., 1, 0] - R[..., 0, 1]
    row = np.argmax(np.diagonal(K, axis1=-2, axis2=-1), axis=-1)
    q = np.take_along_axis(K, row[..., None, None], axis=-2)[..., 0, :]
    q = _unit(q, "rotation matrix")
    return np.where(q[..., 3:] < 0, -q, q)


def rpy_to_matrix(rpy: ArrayLike) -> np.ndarray:
    """Rotation matrix (..., 3, 3) = Rz(yaw) Ry(pitch) Rx(roll) of (..., 3) rad: fixed axes x, y, z as in ROS."""
    rpy = np.asarray(rpy, float)
    (sr, sp, sy), (cr, cp, cy) = np.moveaxis(np.sin(rpy), -1, 0), np.moveaxis(np.cos(rpy), -1, 0)
    R = np.empty((*rpy.shape[:-1], 3, 3))
    R[..., 0, 0], R[..., 0, 1], R[..., 0, 2] = cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr
    R[..., 1, 0], R[..., 1, 1], R[..., 1, 2] = sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr
    R[..., 2, 0], R[..., 2, 1], R[..., 2, 2] = -sp, cp * sr, cp * cr
    return R


def matrix_to_rpy(R: ArrayLike) -> np.ndarray:
    """Roll, pitch, yaw (..., 3) rad of a rotation matrix (..., 3, 3): the inverse of `rpy_to_matrix`.

    Roll is taken from Rz(-yaw) R, so an ill-determined yaw near gimbal lock is made good by the roll, and the angles
    always give back the matrix to machine precision.
    """
    R = np.asarray(R, float)
    x, y = R[..., 0, 0], R[..., 1, 0]
    yaw = np.where(np.hypot(x, y) > _TINY, np.arctan2(y, x), 0.0)
    s, c = np.sin(yaw), np.cos(yaw)
    pitch = np.arctan2(-R[..., 2, 0], c * x + s * y)
    roll = np.arctan2(s * R[..., 0, 2] - c * R[..., 1, 2], c * R[..., 1, 1] - s * R[..., 0, 1])
    return np.stack([roll, pitch, yaw], axis=-1)


def rot6d_to_matrix(d: ArrayLike) -> np.ndarray:
    """Rotation matrix (..., 3, 3) of its first two columns [c0, c1] (..., 6), orthonormalised (Gram-Schmidt).

    Zhou et al., "On the continuity of rotation representations in neural networks", CVPR 2019, section 4.

    Raises:
        RotationError: a first column of length zero, parallel columns, or numbers not finite.
    """
    d = np.asarray(d, float)
    x = _unit(d[..., :3], "first column of a 6D rotation")
    y = _unit(d[..., 3:], "second column of a 6D rotation")
    y = _unit(y - np.sum(x * y, axis=-1, keepdims=True) * x, "part of the second 6D column normal to the first")
    return np.stack([x, y, np.cross(x, y)], axis=-1)


def matrix_to_rot6d(R: ArrayLike) -> np.ndarray:
    """First two columns [c0, c1] (..., 6) of a rotation matrix (..., 3, 3)."""
    R = np.asarray(R, float)
    return np.concatenate([R[..., :, 0], R[..., :, 1]], axis=-1)


def slerp(q0: ArrayLike, q1: ArrayLike, u: ArrayLike) -> np.ndarray:
    """Quaternion (..., 4) at u (...) on the shorter arc from q0 (u = 0) to q1 (u = 1), unit xyzw (..., 4).

    The result lies in the hemisphere of q0. When q0 and q1 are half a turn apart the arc is not unique; the one of
    the signs as given is taken.
    """
    q0, q1, u = np.asarray(q0, float), np.asarray(q1, float), np.asarray(u, float)[..., None]
    q1 = np.where(np.sum(q0 * q1, axis=-1, keepdims=True) < 0, -q1, q1)
    angle = 2 * np.arctan2(_norm(q1 - q0), _norm(q1 + q0))[..., None]
    # sin(u a) / sin(a) with a in [0, pi/2], written with sinc so that a = 0 needs no branch
    scale = _sinc(angle)
    q = (1 - u) * _sinc(np.abs(1 - u) * angle) / scale * q0 + u * _sinc(np.abs(u) * angle) / scale * q1
    return q / _norm(q)[..., None]


# ------------------------------------------------------------------------------------------------------ SE(3)


def transform(R: ArrayLike, p: ArrayLike) -> np.ndarray:
    """Transform (..., 4, 4) from a rotation (..., 3, 3) and a translation (..., 3)."""
    R, p = np.asarray(R, float), np.asarray(p, float)
    T = np.zeros((*np.broadcast_shapes(R.shape[:-2], p.shape[:-1]), 4, 4))
    T[..., :3, :3] = R
    T[..., :3, 3] = p
    T[..., 3, 3] = 1.0
    return T


def inverse(T: ArrayLike) -> np.ndarray:
    """Inverse (..., 4, 4) of a transform (..., 4, 4)."""
    T = np.asarray(T, float)
    R = np.swapaxes(T[..., :3, :3], -1, -2)
    return transform(R, -(R @ T[..., :3, 3:])[..., 0])


def compose(*transforms: ArrayLike) -> np.ndarray:
    """Product (..., 4, 4) of transforms from left to right: compose(T_a_b, T_b_c) = T_a_c."""
    T = np.asarray(transforms[0], float)
    for other in transforms[1:]:
        T = T @ np.asarray(other, float)
    return T


def exp(twist: ArrayLike) -> np.ndarray:
    """Exponential of SE(3): transform (..., 4, 4) of a twist [v, w] (..., 6) (m, rad), with p = V(w) v."""
    twist = np.asarray(twist, float)
    v, w = twist[..., :3], twist[..., 3:]
    angle = _norm(w)[..., None, None]
    W = hat(w)
    W2 = W @ W
    half = 0.5 * _sinc(angle / 2) ** 2
    V = np.eye(3) + half * W + _third(angle) * W2
    return transform(np.eye(3) + _sinc(angle) * W + half * W2, (V @ v[..., None])[..., 0])


def log(T: ArrayLike) -> np.ndarray:
    """Logarithm of SE(3): twist [v, w] (..., 6) with |w| <= pi of a transform (..., 4, 4)."""
    T = np.asarray(T, float)
    w = log_so3(T[..., :3, :3])
    W = hat(w)
    V_inverse = np.eye(3) - 0.5 * W + _twelfth(_norm(w)[..., None, None]) * (W @ W)
    return np.concatenate([(V_inverse @ T[..., :3, 3:])[..., 0], w], axis=-1)


def interpolate(T0: ArrayLike, T1: ArrayLike, u: ArrayLike) -> np.ndarray:
    """Transform (..., 4, 4) at u (...) between T0 (u = 0) and T1 (u = 1): p linear, R geodesic."""
    T0, T1, u = np.asarray(T0, float), np.asarray(T1, float), np.asarray(u, float)[..., None]
    p = (1 - u) * T0[..., :3, 3] + u * T1[..., :3, 3]
    R0 = T0[..., :3, :3]
    return transform(R0 @ exp_so3(u * log_so3(np.swapaxes(R0, -1, -2) @ T1[..., :3, :3])), p)


def mean(T: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Weighted mean (..., 4, 4) of transforms (..., N, 4, 4), weights (..., N) >= 0 of any sum above zero.

    Translation: the linear mean. Rotation: the Karcher mean, that is the rotation with the least weighted sum
    of squared angles, found from the rotation of largest weight by R <- R exp(sum w_i log(R^T R_i)) (Manton
    2004). It is chosen over the dominant quaternion eigenvector (Markley 2007) since for two rotations it
    equals `interpolate` at every weight, so blending two chunks moves evenly; the eigenvector does not.
    Unique for rotations within a quarter turn of one of them, which chunks to be blended are.

    Raises:
        ValueError: weights negative, not finite, of sum zero, or of another number than the transforms.
    """
    T = np.asarray(T, float)
    count = T.shape[-3]
    w = np.full(count, 1.0 / count) if weights is None else np.asarray(weights, float)
    if w.shape[-1:] != (count,):
        raise ValueError(f"weights of a mean: expected {count} in the last dimension, found shape {w.shape}")
    total = w.sum(axis=-1, keepdims=True)
    if not (w >= 0).all() or not (total > 0).all() or not np.isfinite(total).all():
        raise ValueError(f"weights of a mean: expected finite, none negative, sum above zero, found {w}")
    w = np.broadcast_to(w / total, T.shape[:-2])
    R = T[..., :3, :3]
    middle = np.take_along_axis(R, np.argmax(w, axis=-1)[..., None, None, None], axis=-3)
    for _ in range(30):
        step = np.sum(w[..., None] * log_so3(np.swapaxes(middle, -1, -2) @ R), axis=-2)
        middle = middle @ exp_so3(step)[..., None, :, :]
        if step.size == 0 or np.abs(step).max() < 1e-14:
            break
    return transform(middle[..., 0, :, :], np.sum(w[..., None] * T[..., :3, 3], axis=-2))


def pose_to_matrix(pose: ArrayLike) -> np.ndarray:
    """Transform (..., 4, 4) of a pose [x y z qx qy qz qw] (..., 7); the quaternion is normalised.

    Raises:
        RotationError: a quaternion of length zero or not finite.
    """
    pose = np.asarray(pose, float)
    return transform(quat_to_matrix(pose[..., 3:]), pose[..., :3])


def matrix_to_pose(T: ArrayLike) -> np.ndarray:
    """Pose [x y z qx qy qz qw] (..., 7) with qw >= 0 of a transform (..., 4, 4)."""
    T = np.asarray(T, float)
    return np.concatenate([T[..., :3, 3], matrix_to_quat(T[..., :3, :3])], axis=-1)


def delta(T_from: ArrayLike, T_to: ArrayLike) -> np.ndarray:
    """Change [dp, rotation vector] (..., 6) from one pose to another (..., 4, 4), in base-frame axes.

    dp = p_to - p_from, rotation vector of R_to R_from^T: the layout of an end-effector command.
    """
    T_from, T_to = np.asarray(T_from, float), np.asarray(T_to, float)
    if T_from.ndim == T_to.ndim == 2:
        return _delta_one(T_from, T_to)
    dp = T_to[..., :3, 3] - T_from[..., :3, 3]
    dR = T_to[..., :3, :3] @ np.swapaxes(T_from[..., :3, :3], -1, -2)
    return np.concatenate([dp, log_so3(dR)], axis=-1)


def apply_delta(T: ArrayLike, d: ArrayLike) -> np.ndarray:
    """Pose (..., 4, 4) after the change d [dp, rotation vector] (..., 6): the inverse of `delta`."""
    T, d = np.asarray(T, float), np.asarray(d, float)
    if T.ndim == 2 and d.ndim == 1:
        return _apply_delta_one(T, d)
    return transform(exp_so3(d[..., 3:]) @ T[..., :3, :3], T[..., :3, 3] + d[..., :3])


# ---------------------------------------------------------------------------------------------------- helpers


def _norm(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("...i,...i->...", x, x))


def _unit(x: np.ndarray, what: str) -> np.ndarray:
    norm = _norm(x)[..., None]
    if not (norm > _TINY).all() or not np.isfinite(norm).all():
        raise RotationError(f"{what}: expected finite numbers of length above zero, found {x}")
    return x / norm


def _sinc(x: np.ndarray) -> np.ndarray:
    """sin(x) / x of x >= 0, which is 1 at 0."""
    x = np.maximum(x, 1e-300)
    return np.sin(x) / x


def _third(x: np.ndarray) -> np.ndarray:
    """(x - sin x) / x^3, which is 1/6 at 0."""
    small, y = np.abs(x) < 0.1, x * x
    safe = np.where(small, 1.0, x)
    series = 1 / 6 - y / 120 * (1 - y / 42 * (1 - y / 72))
    return np.where(small, series, (safe - np.sin(safe)) / safe**3)


def _twelfth(x: np.ndarray) -> np.ndarray:
    """(1 - x/2 cot(x/2)) / x^2, which is 1/12 at 0."""
    small, y = np.abs(x) < 0.1, x * x
    safe = np.where(small, 1.0, x)
    series = 1 / 12 + y / 720 * (1 + y / 42 * (1 + y / 40))
    return np.where(small, series, (1 - 0.5 * safe / np.tan(0.5 * safe)) / safe**2)


# A control loop converts one rotation at a time, where NumPy's cost per call is ten times that of the
# arithmetic: the conversions that everything here is made of have a second form for one rotation or pose, in
# plain floats.


def _exp_so3_one(x: float, y: float, z: float) -> np.ndarray:
    xx, yy, zz = x * x, y * y, z * z
    angle = math.sqrt(xx + yy + zz)
    if angle < 1e-8:
        a, b = 1.0, 0.5
    elif angle < math.inf:
        a, b = math.sin(angle) / angle, 2 * (math.sin(angle / 2) / angle) ** 2
    else:
        a = b = math.nan
    bxy, bxz, byz, ax, ay, az = b * x * y, b * x * z, b * y * z, a * x, a * y, a * z
    return np.array(
        [
            [1 - b * (yy + zz), bxy - az, bxz + ay],
            [bxy + az, 1 - b * (xx + zz), byz - ax],
            [bxz - ay, byz + ax, 1 - b * (xx + yy)],
        ]
    )


def _quat_to_rotvec_one(x: float, y: float, z: float, w: float) -> np.ndarray:
    sine = math.sqrt(x * x + y * y + z * z)
    factor = 2 * math.atan2(sine, abs(w)) / sine if sine != 0 else 2.0
    if w < 0:
        factor = -factor
    return np.array([factor * x, factor * y, factor * z])


def _quat_to_matrix_one(q: np.ndarray) -> np.ndarray:
    x, y, z, w = q.tolist()
    square = x * x + y * y + z * z + w * w
    if not _TINY**2 < square < math.inf:
        raise RotationError(f"quaternion: expected finite numbers of length above zero, found {q}")
    s = 2 / square
    return np.array(
        [
            [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
            [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
            [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
        ]
    )


def _matrix_to_quat_one(R: np.ndarray) -> np.ndarray:
    (a, ab, ac), (ba, b, bc), (ca, cb, c) = R.tolist()
    rows = (1 + a - b - c, 1 - a + b - c, 1 - a - b + c, 1 + a + b + c)
    largest = rows.index(max(rows))
    if largest == 0:
        x, y, z, w = rows[0], ba + ab, ac + ca, cb - bc
    elif largest == 1:
        x, y, z, w = ba + ab, rows[1], cb + bc, ac - ca
    elif largest == 2:
        x, y, z, w = ac + ca, cb + bc, rows[2], ba - ab
    else:
        x, y, z, w = cb - bc, ac - ca, ba - ab, rows[3]
    norm = math.sqrt(x * x + y * y + z * z + w * w)
    if not _TINY < norm < math.inf:
        raise RotationError(f"rotation matrix: expected finite numbers of length above zero, found {R}")
    if w < 0:
        norm = -norm
    return np.array([x / norm, y / norm, z / norm, w / norm])


def _apply_delta_one(T: np.ndarray, d: np.ndarray) -> np.ndarray:
    moved = T.copy()
    moved[:3, :3] = _exp_so3_one(*d[3:].tolist()) @ T[:3, :3]
    moved[:3, 3] += d[:3]
    return moved


def _delta_one(T_from: np.ndarray, T_to: np.ndarray) -> np.ndarray:
    change = np.empty(6)
    np.subtract(T_to[:3, 3], T_from[:3, 3], out=change[:3])
    change[3:] = _quat_to_rotvec_one(*_matrix_to_quat_one(T_to[:3, :3] @ T_from[:3, :3].T).tolist())
    return change
