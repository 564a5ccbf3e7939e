"""Kinematics and distances of all arms of a cell at once, on capsules and boxes.

The robot's links are the capsules of vla_control.capsules, what stands around them are the boxes of the description;
vla_control.geometry does the arithmetic. Joint positions q (n,) are those of all arms, arm after arm.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import mujoco
import numpy as np
from vla_core.kinematics import load_model
from vla_core.robot import Robot, RobotError
from vla_core.se3 import exp_so3, quat_to_matrix, transform

from vla_control import geometry
from vla_control.capsules import Capsule, fit_capsules, watched_pairs
from vla_control.hulls import EXACT, Hulls

#: What a check lets a pair be nearer than its margin, m: so far may lie what linear rows say from how it is.
TOLERANCE = 3e-4
#: Pairs nearer than this are seen, m: from 0.5 m/s one stops in 0.125 m at 1 m/s^2.
INFLUENCE = 0.15
#: A way is looked at in steps of this at least, as two links can near each other; what is kept is kept to this; m.
#: Between two looks links come nearer by what their paths bend, which grows with the square of the step: some 0.01 mm.
_STEP, _EXACT = 0.01, 2e-8
_WORLD = "world"
_KINDS = {geometry.FREE: "", geometry.WORKSPACE: "workspace", geometry.CONE: "cone"}


class Near(NamedTuple):
    """What is near, k points of watched pairs.

    distance (k,), m, below zero where they overlap. margin (k,): what is to be kept, m. rows (k, n): change of the
    distance per joint velocity. pair (k,): numbers of `Cell.pairs`.
    """

    distance: np.ndarray
    margin: np.ndarray
    rows: np.ndarray
    pair: np.ndarray


class Kept(NamedTuple):
    """What no way may take away: distances of the watched pairs' capsules (pairs,), m, and `hulls`, of the links
    themselves whose capsules are nearer than their margin by more than twice TOLERANCE; None where none are."""

    distance: np.ndarray
    hulls: Near | None


class Cell:
    """One robot's arms and obstacles. `update` sets the joints that all other methods speak of.

    Not thread-safe; results are the caller's own. slices: arm -> its part of q. names: of the capsules' links and of
    the boxes. pairs (k, 2): the watched ones of these. layout, place: see vla_control.geometry.

    Raises:
        RobotError: links or joints that the model lacks.
    """

    def __init__(self, robot: Robot, capsules: Sequence[Capsule] | None = None):
        self._robot = robot
        if capsules is None:
            capsules = fit_capsules(robot)
        ends = np.cumsum([0, *(len(arm.joints) for arm in robot.arms)]).tolist()
        self.slices = {arm.name: slice(ends[k], ends[k + 1]) for k, arm in enumerate(robot.arms)}
        self.n = ends[-1]
        self._number = {arm.name: k for k, arm in enumerate(robot.arms)}
        self._layout = geometry.pack(self._build(load_model(robot, geometry=False), capsules))
        self.layout = geometry.unpack_layout(*self._layout)
        self._kept = Kept(self.layout.margin - TOLERANCE, None)
        self._stand()

    # ------------------------------------------------------------------------------------------------- questions
    def update(self, q: np.ndarray, look: bool = True) -> None:
        """Set joint positions q (n,), rad (m). Without `look`, what is near and the Jacobians stay as they were."""
        if look:
            self._least, self._pair, self._room = geometry.look(*self._layout, *self._place, q, INFLUENCE)
        else:
            geometry.put(*self._layout, *self._place, q)

    def twin(self) -> Cell:
        """Another one of the same cell, to ask about other joint positions."""
        twin = copy.copy(self)
        twin._stand()
        return twin

    def tool(self, arm: str) -> np.ndarray:
        """T_base_tool (4, 4)."""
        T = np.zeros((4, 4))
        T[:3] = self.place.T_base_tool[self._number[arm]]
        T[3, 3] = 1.0
        return T

    def point(self, arm: str) -> np.ndarray:
        """The tool point (3,) in the base frame, m."""
        return self.place.T_base_tool[self._number[arm], :, 3].copy()

    def axis(self, arm: str, axis: np.ndarray) -> np.ndarray:
        """An axis (3,) of the tool frame, in the base frame."""
        return self.place.T_base_tool[self._number[arm], :, :3] @ axis

    def jacobian(self, arm: str) -> np.ndarray:
        """(6, joints of the arm): twist [v, w] in base-frame axes at the tool point, per joint velocity."""
        return self._jacobians[arm].copy()

    def bends(self, arm: str, directions: np.ndarray) -> np.ndarray:
        """(k, 6): derivative of the tool velocity J v along joint directions v (k, joints of the arm)."""
        place, part, T = self.place, self.slices[arm], self.place.T_base_tool[self._number[arm]]
        return geometry.path_bends(place.W, place.L, self.layout.moves, part.start, part.stop, T, directions)

    def near(self) -> Near | None:
        """The watched pairs nearer than INFLUENCE beyond their margin, None when there are none."""
        place, count = self.place, int(self.place.count[0])
        if not count:
            return None
        pair = place.pair[:count].copy()
        return Near(place.distance[:count].copy(), self.layout.margin[pair], place.rows[:count].copy(), pair)

    def nearest(self) -> tuple[float, int]:
        """Smallest distance of a watched pair, m, and which; infinity and -1 when none is near."""
        return self._least, self._pair

    def room(self) -> float:
        """The least distance of a watched pair beyond its margin, m; infinity when none is near."""
        return self._room

    def kept(self, q: np.ndarray) -> Kept:
        """What each pair is to keep from joint positions q (n,) on, those of the last `update`: its margin less
        TOLERANCE, or what it has where that is less."""
        if self._room >= -TOLERANCE:
            return self._kept
        near = self.near()
        inside = near.distance < near.margin - TOLERANCE
        kept = self._kept.distance.copy()
        np.minimum.at(kept, near.pair[inside], near.distance[inside])
        if self._room >= -2.0 * TOLERANCE:
            return Kept(kept, None)
        inside = near.distance < near.margin - 2.0 * TOLERANCE  # what linear rows leave is no violation
        pairs = list({self._both[k]: k for k in near.pair[inside]}.values())
        distance, points, ways = self._hulls.measure(q, [self._both[k] for k in pairs])
        margin, moves, place = self.layout.margin[pairs], self.layout.moves, self.place
        sign = np.array([moves[self._frames[b]] - moves[self._frames[a]] for a, b in self.pairs[pairs]])
        rows = sign * (np.cross(points, ways) @ place.W + ways @ place.L)
        return Kept(kept, Near(distance, margin, rows, np.array(pairs)))

    def first_broken(
        self, here: Cell, q: np.ndarray, way: np.ndarray, first: float, kept: Kept
    ) -> tuple[str, tuple[str, ...]]:
        """What arms that are `here` would break on the straight way (n,) from joint positions q (n,), from its end back
        to its share `first`: "collision", "workspace", "cone" or "" for nothing, and which arms. Ends there.

        What is outside already counts only when it would get farther out.
        """
        kind, what = geometry.first_broken(
            *self._layout, *self._place, *here._place, q, way, first, kept.distance, INFLUENCE, _STEP, _EXACT
        )
        if kind == geometry.COLLISION:
            return "collision", self._arms_of[what]
        if kind == geometry.FREE and kept.hulls is not None:
            both = [self._both[k] for k in kept.hulls.pair]
            least = np.minimum(kept.hulls.distance, kept.hulls.margin - TOLERANCE) - 2.0 * EXACT
            for share in (1.0, 0.5 * (1.0 + first), first):
                broken = self._hulls.measure(q + share * way, both)[0] < least
                if broken.any():
                    return "collision", self._arms_of[kept.hulls.pair[broken.argmax()]]
        return _KINDS[kind], tuple(name for name, k in self._number.items() if what >> k & 1)

    def ends(self, k: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Ends (3,) of the k-th capsule's axis in the base frame and its radius, m."""
        return self.place.ends[k, 0].copy(), self.place.ends[k, 1].copy(), float(self.layout.radius[k])

    def arms_of(self, pair: int) -> tuple[str, ...]:
        """Arms that a pair belongs to."""
        return self._arms_of[pair]

    def describe(self, pair: int) -> str:
        """A pair by name, "" for -1."""
        return "" if pair < 0 else self._said[pair]

    # -------------------------------------------------------------------------------------------------- building
    def _stand(self) -> None:
        """Have a place of one's own, at home."""
        self._place = geometry.make_place(self._layout[0])
        self.place = geometry.unpack_place(self._layout[0], *self._place)
        self._jacobians = {
            name: self.place.jacobian[6 * part.start : 6 * part.stop].reshape(6, -1)
            for name, part in self.slices.items()
        }
        self.update(np.concatenate([arm.home for arm in self._robot.arms]))

    def _build(self, model: mujoco.MjModel, capsules: Sequence[Capsule]) -> geometry.Layout:
        """Reduce a model to the joints of the arms: bodies that others carry along become part of their frames."""
        robot = self._robot
        columns = {name: k for k, name in enumerate(name for arm in robot.arms for name in arm.joints)}
        arm_of = [arm.name for arm in robot.arms for _ in arm.joints]
        T_parent_joint, parents, axes = np.zeros((self.n, 4, 4)), np.full(self.n, -1), np.zeros((self.n, 3))
        hinge, order = np.zeros(self.n, bool), []
        frames: dict[int, tuple[int, np.ndarray]] = {0: (-1, np.eye(4))}  # body -> its joint, T_joint_body
        for body in sorted(self._needed(model, capsules)):  # parents come before children
            frame, T = frames[int(model.body_parentid[body])]
            T = T @ transform(quat_to_matrix(np.roll(model.body_quat[body], -1)), model.body_pos[body])
            first = int(model.body_jntadr[body])
            for joint in range(first, first + int(model.body_jntnum[body])):
                k = columns.get(model.joint(joint).name)
                if k is None:
                    continue
                anchor, axis, zero = model.jnt_pos[joint], model.jnt_axis[joint], model.qpos0[model.jnt_qposadr[joint]]
                hinge[k] = model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE
                back = (exp_so3(-zero * axis), anchor) if hinge[k] else (np.eye(3), anchor - zero * axis)
                T_parent_joint[k], parents[k], axes[k] = T @ transform(*back), frame, axis
                order.append(k)
                frame, T = k, transform(np.eye(3), -anchor)
            frames[body] = frame, T
        if len(order) != self.n:
            raise RobotError(f"{robot.path}: expected {self.n} joints that move the links, found {len(order)}")
        moves = np.zeros((self.n + 1, self.n))
        for k in order:
            moves[k] = moves[parents[k]]  # of the base: the last row
            moves[k, k] = 1.0
        by_name = {_WORLD: frames[0]} | {model.body(body).name: frame for body, frame in frames.items() if body}
        links = [by_name[capsule.link] for capsule in capsules]
        tools = [by_name[arm.tool.link] for arm in robot.arms]
        ends = np.array(
            [[T[:3, :3] @ end + T[:3, 3] for end in (c.start, c.end)] for (_, T), c in zip(links, capsules)]
        )
        radius = np.array([capsule.radius for capsule in capsules], float)
        # Back along the chain: no axis of a joint that moves a frame is farther from the frame's own than this. A joint
        # that slides bends the way of what it carries by less than another metre would.
        chain = np.zeros(self.n + 1)
        slides = np.concatenate([1.0 + np.maximum(-arm.limits.lower, arm.limits.upper) for arm in robot.arms])
        for k in order:
            offset = np.linalg.norm(T_parent_joint[k, :3, 3]) if parents[k] >= 0 else 0.0
            chain[k] = chain[parents[k]] + offset + (0.0 if hinge[k] else slides[k])
        owner = ["" if frame < 0 else arm_of[frame] for frame, _ in links]
        boxes = [obstacle.box for obstacle in robot.collision.world]
        margins = self._margins(capsules, owner)
        pairs = np.array(list(margins), np.int64).reshape(-1, 2)
        cones = [arm.tool.cone for arm in robot.arms]
        self.names = [capsule.link for capsule in capsules] + [obstacle.name for obstacle in robot.collision.world]
        self.pairs, owner = pairs, owner + [""] * len(boxes)
        self._both = [(self.names[a], self.names[b]) for a, b in pairs]
        self._said = [" - ".join(both) for both in self._both]
        self._frames = [frame for frame, _ in links] + [-1] * len(boxes)
        self._arms_of = [tuple({owner[g]: None for g in pair if owner[g]}) for pair in pairs]
        self._hulls = Hulls(robot, set(self._both), columns)
        return geometry.Layout(
            order=np.array(order), parent=parents, hinge=hinge, link=np.array([frame for frame, _ in links]),
            pairs=pairs, begin=np.array([0, *(part.stop for part in self.slices.values())]),
            tool=np.array([frame for frame, _ in tools]), T_parent_joint=T_parent_joint[:, :3], axis=axes, ends=ends,
            radius=radius, sphere=np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1) / 2 + radius,
            reach=np.linalg.norm(ends, axis=2).max(axis=1) + chain[[frame for frame, _ in links]],
            boxes=np.array([[box.lower, box.upper] for box in boxes]), margin=np.array(list(margins.values())),
            moves=moves, T_frame_tool=np.array([(T @ a.tool.T_link_tool)[:3] for (_, T), a in zip(tools, robot.arms)]),
            workspace=np.array([[a.workspace.lower - TOLERANCE, a.workspace.upper + TOLERANCE] for a in robot.arms]),
            cone=np.array([[cone.axis, cone.direction] if cone else np.zeros((2, 3)) for cone in cones]),
            cosine=np.array([math.cos(min(cone.angle + TOLERANCE, math.pi)) if cone else -1.0 for cone in cones]),
        )  # fmt: skip

    def _needed(self, model: mujoco.MjModel, capsules: Sequence[Capsule]) -> set[int]:
        """Bodies with capsules or tools, and all that carry them."""
        needed: set[int] = set()
        links = {capsule.link for capsule in capsules} | {arm.tool.link for arm in self._robot.arms}
        for link in sorted(links - {_WORLD}):
            body = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, link)
            if body < 0:
                raise RobotError(f"{self._robot.path}: expected a link of the model, found {link!r}")
            while body:
                needed.add(body)
                body = int(model.body_parentid[body])
        return needed

    def _margins(self, capsules: Sequence[Capsule], owner: Sequence[str]) -> dict[tuple[int, int], float]:
        """The margin of each watched pair, m: two capsules, or a capsule and a box, numbered after the capsules."""
        collision = self._robot.collision
        margins = {(a, b): collision.margin for a, b in watched_pairs(self._robot, capsules)}
        for j, obstacle in enumerate(collision.world, len(capsules)):
            for k, capsule in enumerate(capsules):
                if owner[k] and capsule.link not in obstacle.allow:
                    margins[k, j] = obstacle.margin
        return margins
