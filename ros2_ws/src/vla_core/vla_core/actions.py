"""Action spaces: what the numbers of a policy mean, and the conversion to and from metric targets.

Between nodes actions travel in the *target layout*: arms one after the other, per arm [x y z qx qy qz qw g]
for poses, [q1 .. qn g] for joints; absolute, in the base frame, SI units, g from 0 (closed) to 1 (open).
Policies speak dialects of it. With the reference pose T_ref (the anchor's, or the one of the action before) a
relative pose action is

- frame "base": p - p_ref and R R_ref^T (axes of the base frame);
- frame "tool": the translation and the rotation of T_ref^-1 T (axes of the reference tool frame).

Rotations in action order, per arm [position 3, rotation, gripper 1]:

- "quaternion": xyzw. Encoded absolute quaternions start in the hemisphere of the anchor's and go on without a
  change of sign along the chunk; relative ones have qw >= 0. Decoding takes any length above zero and either
  sign.
- "rpy": fixed axes x, y, z (as in ROS), principal values: roll, yaw in [-pi, pi], pitch in [-pi/2, pi/2]; in
  gimbal lock yaw is 0. Encoding then decoding gives the same rotation everywhere, gimbal lock included.
- "rotvec": axis times angle, length at most pi; at pi the axis is that of `se3.matrix_to_quat` with its sign.
- "rot6d": first two columns [c0, c1] of the matrix; decoding orthonormalises (Gram-Schmidt). The only one of
  them that is continuous everywhere: prefer it for learning.

Decoded quaternions start in the hemisphere of the anchor's and keep their sign along the chunk, so they can
be compared and plotted. Gripper actions are absolute in every dialect; decoded openings are clipped to
[0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vla_core import se3

KINDS = ("pose", "joint")
REFERENCES = ("absolute", "chunk", "step")
FRAMES = ("base", "tool")
#: Rotation dialect -> (numbers, to matrix, from matrix).
ROTATIONS = {
    "quaternion": (4, se3.quat_to_matrix, se3.matrix_to_quat),
    "rpy": (3, se3.rpy_to_matrix, se3.matrix_to_rpy),
    "rot6d": (6, se3.rot6d_to_matrix, se3.matrix_to_rot6d),
    "rotvec": (3, se3.exp_so3, se3.log_so3),
}


class ActionSpaceError(ValueError):
    """An action space or actions that cannot be used; the message names expected and found."""


@dataclass(frozen=True)
class ActionSpace:
    """The dialect of a policy.

    arms: arm names, in order. kind: "pose" or "joint". joints: number of joints per arm ("joint" only, else
    empty). reference: "absolute"; "chunk" (relative to the anchor, the state at the observation); "step"
    (relative to the target of the action before, the first to the anchor). frame: axes of relative poses,
    "base" or "tool". rotation: "quaternion", "rpy", "rot6d" or "rotvec". gripper: the values of closed and
    open.

    The defaults are the target layout itself.
    """

    arms: tuple[str, ...]
    kind: str
    joints: tuple[int, ...] = ()
    reference: str = "absolute"
    frame: str = "base"
    rotation: str = "quaternion"
    gripper: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        for name, allowed in (
            ("kind", KINDS),
            ("reference", REFERENCES),
            ("frame", FRAMES),
            ("rotation", tuple(ROTATIONS)),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise _error(name, f"one of {allowed}", value)
        arms = self.arms
        if not isinstance(arms, (list, tuple)) or not arms or not all(isinstance(a, str) and a for a in arms):
            raise _error("arms", "one name or more", arms)
        if len(set(arms)) != len(arms):
            raise _error("arms", "names that differ", arms)
        joints = self.joints
        if not isinstance(joints, (list, tuple)) or not all(type(n) is int and n > 0 for n in joints):
            raise _error("joints", "whole numbers above zero", joints)
        if len(joints) != (len(arms) if self.kind == "joint" else 0):
            raise _error("joints", f"{len(arms)} numbers" if self.kind == "joint" else "none for poses", joints)
        if self.kind == "joint" and (self.frame, self.rotation) != ("base", "quaternion"):
            raise _error("frame and rotation", "their defaults for joints", (self.frame, self.rotation))
        gripper = self.gripper
        good = isinstance(gripper, (list, tuple)) and len(gripper) == 2
        good = good and all(isinstance(g, (int, float)) and not isinstance(g, bool) for g in gripper)
        if not good or not np.isfinite(gripper).all() or gripper[0] == gripper[1]:
            raise _error("gripper", "two finite numbers that differ (closed, open)", gripper)
        object.__setattr__(self, "arms", tuple(arms))
        object.__setattr__(self, "joints", tuple(joints))
        object.__setattr__(self, "gripper", (float(gripper[0]), float(gripper[1])))

    # ------------------------------------------------------------------------------------------------- layout

    @property
    def dim(self) -> int:
        """Numbers of one action in this dialect."""
        return sum(self._sizes("action"))

    @property
    def target_dim(self) -> int:
        """Numbers of one action in the target layout."""
        return sum(self._sizes("target"))

    def arm_slices(self, layout: str = "target") -> dict[str, slice]:
        """Arm name -> its slice of an action in the "target" layout or in this dialect ("action"); gripper
        last."""
        if layout not in ("target", "action"):
            raise _error("layout", "'target' or 'action'", layout)
        ends = np.cumsum([0, *self._sizes(layout)])
        return {arm: slice(int(a), int(b)) for arm, a, b in zip(self.arms, ends[:-1], ends[1:], strict=True)}

    @property
    def gripper_indices(self) -> tuple[int, ...]:
        """Index of each arm's gripper in the target layout."""
        return tuple(s.stop - 1 for s in self.arm_slices().values())

    def _sizes(self, layout: str) -> list[int]:
        if self.kind == "joint":
            return [n + 1 for n in self.joints]
        rotation = 4 if layout == "target" else ROTATIONS[self.rotation][0]
        return [3 + rotation + 1] * len(self.arms)

    # --------------------------------------------------------------------------------------------------- JSON

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> ActionSpace:
        """The inverse of `to_dict`; every key must be there and no other.

        Raises:
            ActionSpaceError: an unknown key, a missing key, or a value out of its set.
        """
        if not isinstance(tree, Mapping):
            raise ActionSpaceError(f"action space: expected a mapping, found {tree!r}")
        names = [f.name for f in fields(cls)]
        for key in tree:
            if key not in names:
                raise ActionSpaceError(f"action space: {key}: unknown key; expected {names}")
        for name in names:
            if name not in tree:
                raise ActionSpaceError(f"action space: {name}: missing; expected keys {names}, found {sorted(tree)}")
        return cls(**tree)

    # --------------------------------------------------------------------------------------------- conversion

    def decode(self, actions: ArrayLike, anchor: ArrayLike) -> np.ndarray:
        """Metric targets (..., H, target_dim) of actions (..., H, dim) in this dialect.

        Args:
            anchor: (..., target_dim), the measured state at the observation, in the target layout.

        Raises:
            ActionSpaceError: a wrong shape, numbers not finite, or numbers that name no rotation.
        """
        actions, anchor = self._check("actions", actions, self.dim, anchor)
        targets = np.empty((*actions.shape[:-1], self.target_dim))
        closed, opened = self.gripper
        here, there = self.arm_slices("action"), self.arm_slices("target")
        for arm in self.arms:
            action, start, target = actions[..., here[arm]], anchor[..., there[arm]], targets[..., there[arm]]
            target[..., -1] = np.clip((action[..., -1] - closed) / (opened - closed), 0.0, 1.0)
            decode = self._decode_poses if self.kind == "pose" else self._decode_joints
            try:
                target[..., :-1] = decode(action[..., :-1], start[..., None, :-1])
            except se3.RotationError as error:
                raise ActionSpaceError(f"actions or anchor of arm {arm!r}: {error}") from error
        return targets

    def encode(self, targets: ArrayLike, anchor: ArrayLike) -> np.ndarray:
        """Actions (..., H, dim) in this dialect of metric targets (..., H, target_dim): undoes `decode`.

        Args:
            anchor: (..., target_dim), the measured state at the observation, in the target layout.

        Raises:
            ActionSpaceError: a wrong shape, numbers not finite, or a quaternion of length zero.
        """
        targets, anchor = self._check("targets", targets, self.target_dim, anchor)
        actions = np.empty((*targets.shape[:-1], self.dim))
        closed, opened = self.gripper
        here, there = self.arm_slices("action"), self.arm_slices("target")
        for arm in self.arms:
            action, start, target = actions[..., here[arm]], anchor[..., there[arm]], targets[..., there[arm]]
            action[..., -1] = closed + target[..., -1] * (opened - closed)
            encode = self._encode_poses if self.kind == "pose" else self._encode_joints
            try:
                action[..., :-1] = encode(target[..., :-1], start[..., None, :-1])
            except se3.RotationError as error:
                raise ActionSpaceError(f"targets or anchor of arm {arm!r}: {error}") from error
        return actions

    def _decode_joints(self, action: np.ndarray, start: np.ndarray) -> np.ndarray:
        if self.reference == "absolute":
            return action
        return start + (np.cumsum(action, axis=-2) if self.reference == "step" else action)

    def _encode_joints(self, target: np.ndarray, start: np.ndarray) -> np.ndarray:
        return target if self.reference == "absolute" else target - self._references(target, start)

    def _decode_poses(self, action: np.ndarray, start: np.ndarray) -> np.ndarray:
        p, R = action[..., :3], ROTATIONS[self.rotation][1](action[..., 3:])
        p0, R0 = start[..., :3], se3.quat_to_matrix(start[..., 3:])
        if self.reference != "absolute":
            if self.frame == "tool":
                T = se3.transform(R, p)
                T = se3.transform(R0, p0) @ (_running_products(T) if self.reference == "step" else T)
                p, R = T[..., :3, 3], T[..., :3, :3]
            elif self.reference == "step":
                R = np.swapaxes(_running_products(np.swapaxes(R, -1, -2)), -1, -2) @ R0  # R_k .. R_1 R_0
                p = p0 + np.cumsum(p, axis=-2)
            else:
                p, R = p0 + p, R @ R0
        q = _keep_sign(se3.matrix_to_quat(R), start[..., 3:])
        return np.concatenate([p, q], axis=-1)

    def _encode_poses(self, target: np.ndarray, start: np.ndarray) -> np.ndarray:
        T = se3.pose_to_matrix(target)
        T0 = se3.pose_to_matrix(start)
        if self.reference != "absolute":
            T_reference = self._references(T, T0, axis=-3)
            if self.frame == "tool":
                T = se3.inverse(T_reference) @ T
            else:
                R = T[..., :3, :3] @ np.swapaxes(T_reference[..., :3, :3], -1, -2)
                T = se3.transform(R, T[..., :3, 3] - T_reference[..., :3, 3])
        rotation = ROTATIONS[self.rotation][2](T[..., :3, :3])
        if self.rotation == "quaternion" and self.reference == "absolute":
            rotation = _keep_sign(rotation, start[..., 3:])
        return np.concatenate([T[..., :3, 3], rotation], axis=-1)

    def _references(self, target: np.ndarray, start: np.ndarray, axis: int = -2) -> np.ndarray:
        """What each action is relative to: the anchor, or the targets shifted by one behind it."""
        if self.reference == "chunk":
            return start
        steps = target.shape[axis]
        before = np.concatenate([start, target], axis=axis)
        return np.take(before, np.arange(steps), axis=axis)

    def _check(self, name: str, values: ArrayLike, dim: int, anchor: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Actions or targets and anchor as finite arrays of the right shapes and the same leading dimensions."""
        values, anchor = np.asarray(values, float), np.asarray(anchor, float)
        if values.ndim < 2 or values.shape[-1] != dim:
            raise ActionSpaceError(f"{name} of {self.arms}: expected shape (..., H, {dim}), found {values.shape}")
        if anchor.ndim < 1 or anchor.shape[-1] != self.target_dim:
            raise ActionSpaceError(f"anchor: expected shape (..., {self.target_dim}), found {anchor.shape}")
        for what, array in ((name, values), ("anchor", anchor)):
            if not np.isfinite(array).all():
                bad = np.argwhere(~np.isfinite(array))[0].tolist()
                raise ActionSpaceError(f"{what}: expected finite numbers, found {array[tuple(bad)]} at {bad}")
        try:
            batch = np.broadcast_shapes(values.shape[:-2], anchor.shape[:-1])
        except ValueError:
            raise ActionSpaceError(
                f"anchor: expected leading dimensions {values.shape[:-2]} of the {name}, found {anchor.shape[:-1]}"
            ) from None
        return np.broadcast_to(values, (*batch, *values.shape[-2:])), np.broadcast_to(anchor, (*batch, self.target_dim))


def split_poses(targets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Pose targets (..., 8 A) as transforms (..., A, 4, 4) and gripper openings (..., A)."""
    targets = np.asarray(targets, float)
    arms = targets.reshape(*targets.shape[:-1], -1, 8)
    return se3.pose_to_matrix(arms[..., :7]), arms[..., 7].copy()


def join_poses(T: ArrayLike, gripper: ArrayLike) -> np.ndarray:
    """Pose targets (..., 8 A) from transforms (..., A, 4, 4) and gripper openings (..., A); qw >= 0."""
    arms = np.concatenate([se3.matrix_to_pose(T), np.asarray(gripper, float)[..., None]], axis=-1)
    return arms.reshape(*arms.shape[:-2], -1)


def _running_products(M: np.ndarray) -> np.ndarray:
    """M_1, M_1 M_2, M_1 M_2 M_3, ... of matrices (..., H, k, k): a scan in log2(H) products (Hillis, Steele)."""
    M = M.copy()
    shift = 1
    while shift < M.shape[-3]:
        M[..., shift:, :, :] = M[..., :-shift, :, :] @ M[..., shift:, :, :]
        shift *= 2
    return M


def _keep_sign(q: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Quaternions (..., H, 4), each signed into the hemisphere of the one before, the first into `first`'s."""
    first = np.broadcast_to(first, (*q.shape[:-2], 1, 4))
    before = np.concatenate([first, q[..., :-1, :]], axis=-2)
    flips = np.where(np.sum(q * before, axis=-1, keepdims=True) < 0, -1.0, 1.0)
    return q * np.cumprod(flips, axis=-2)


def _error(name: str, expected: str, found: Any) -> ActionSpaceError:
    return ActionSpaceError(f"action space: {name}: expected {expected}, found {found!r}")
