"""Where positions, quaternions and grippers lie in a target (vla_msgs/ActionTrajectory)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

KINDS = ("pose", "joint")
#: Numbers of one arm of a pose target: x y z (m), qx qy qz qw, gripper.
POSE_WIDTH = 8


@dataclass(frozen=True)
class Layout:
    """The target layout of `arms`, one after the other, `widths` numbers each, the last one the gripper's.

    kind: "pose" ([x y z qx qy qz qw g] an arm) or "joint" ([q1 .. qn g] an arm).
    """

    kind: str
    arms: tuple[str, ...]
    widths: tuple[int, ...]

    @property
    def dim(self) -> int:
        """Numbers of one target, D."""
        return sum(self.widths)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Arm name -> its numbers in a target."""
        ends = np.cumsum([0, *self.widths])
        return {arm: slice(int(a), int(b)) for arm, a, b in zip(self.arms, ends[:-1], ends[1:], strict=True)}

    @cached_property
    def grippers(self) -> np.ndarray:
        """Indices (A,) of the gripper openings."""
        return np.cumsum(self.widths) - 1

    @cached_property
    def quaternions(self) -> np.ndarray:
        """Indices (A, 4) of the quaternions; (0, 4) for joints."""
        if self.kind == "joint":
            return np.zeros((0, 4), int)
        return np.array([np.arange(s.start + 3, s.start + 7) for s in self.slices.values()])

    @cached_property
    def quaternion_slices(self) -> list[slice]:
        """The same, an arm at a time."""
        return [slice(int(q[0]), int(q[-1]) + 1) for q in self.quaternions]

    @cached_property
    def linear(self) -> np.ndarray:
        """Indices of the numbers that are blended linearly: positions, or joints."""
        return np.setdiff1d(np.arange(self.dim), np.concatenate([self.grippers, self.quaternions.ravel()]))
