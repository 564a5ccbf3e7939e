"""Capsules around a robot's links, fitted from its own collision geometry, and the pairs that are kept apart.

A capsule is all that is within `radius` of a segment; the distance of two is that of their segments less the radii,
quick to compute and smooth in the joint positions. Each convex piece of a link (a mesh counts with its convex hull)
lies wholly inside the capsules of that link, so distances of capsules never exceed those of the meshes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np
from scipy.optimize import minimize
from scipy.spatial import ConvexHull, QhullError
from vla_core.kinematics import load_model
from vla_core.robot import Robot, RobotError, load_robot

#: Most capsules of one link (as many again for each finger that it carries).
_MOST = 3
#: What one capsule more has to save: this share of the volume of the one that it halves, and this volume, m^3 (a ball
#: of 10 mm). A cut is not tried where the first guess at its halves is above so many times what it has to beat.
_SAVING, _WORTH, _HOPELESS = 0.03, 4 / 3 * np.pi * 0.01**3, 1.15
#: A hull of more corners than this is made of fewer, such that it is off by no more than this, m.
_CORNERS, _FINE = 200, 0.001
#: Geoms of a hull model that are obstacles are named so, and after them.
BOX = "box of "
_CUBE = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
#: Step at which the turn of a finger's hinge is laid out, rad.
_TURN = 0.1
#: Random configurations that show which capsules are always near each other, their seed, and what share is always.
_SAMPLES, _SEED, _ALWAYS = 500, 0, 0.95
#: Most distances computed to prove that two links cannot meet.
_EFFORT = 10000
#: What is allowed for the engine's error in a distance, m.
_ACCURACY = 1e-4


@dataclass(frozen=True)
class Capsule:
    """All points within `radius` (m) of the segment from `start` (3,) to `end` (3,), m, in the frame of `link`."""

    link: str
    start: np.ndarray
    end: np.ndarray
    radius: float

    @property
    def volume(self) -> float:
        """m^3."""
        return _volume(float(np.linalg.norm(self.end - self.start)), self.radius)


def fit_capsules(robot: Robot) -> tuple[Capsule, ...]:
    """Tight capsules around every link of every arm, in the order of the model's bodies.

    Links are the bodies that an arm's joints move and those that its base is made of; of a link the geoms that
    collide count, or its visual ones where none does. What other joints move (fingers) is covered over its whole
    stroke, in the frame of the link that carries it: from closed to open for a joint of the gripper, over its range
    for another one. Deterministic; the last robots are remembered.

    Raises:
        RobotError: a model that `load_model` refuses; a geom that is no solid; a joint without range on a finger.
    """
    return _cell(_Key(robot)).capsules


def watched_pairs(robot: Robot, capsules: Sequence[Capsule]) -> tuple[tuple[int, int], ...]:
    """Pairs (i, j), i < j, of capsules that are to be kept apart. Not watched are

    - capsules that do not move against each other, and those of links that one joint joins: these touch by
      construction, and the joint's limits keep them from each other;
    - links that the description lists under collision.allow;
    - second neighbours, two joints apart, that cannot meet: over the whole range of both joints (the limits of the
      description) the distance of their convex hulls stays above zero. This is proved, not sampled: the range is
      cut into boxes until the distance at the middle of each exceeds what any motion inside the box can take away
      (a Lipschitz bound). What cannot be proved is watched;
    - capsules of second neighbours that are nearer than the margin at home and in 95 % of the configurations: a
      short link between them keeps them so close by construction that to watch them would forbid nearly every
      pose (MoveIt's set-up assistant leaves out its "default" and "always in collision" pairs alike). Nothing
      is left out because it was not seen to collide.

    Raises:
        RobotError: collision.allow names no link, or a finger instead of the link that carries it.
    """
    return _sort_out(_Key(robot), tuple(_Frozen(c) for c in capsules))[0]


def hull_model(robot: Robot) -> mujoco.MjModel:
    """The links that `fit_capsules` covers as the hulls of their collision geometry, moved by the joints of the arms
    alone; and the boxes of the description, geoms named after the obstacles.

    Raises:
        RobotError: as `fit_capsules`.
    """
    spec = _cell(_Key(robot)).hulls()
    for obstacle in robot.collision.world:
        box, name = obstacle.box, f"{BOX}{obstacle.name}"
        middle, half = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
        spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, name=name, pos=middle, size=half)
    return spec.compile()


# --------------------------------------------------------------------------------------------------- links of a cell


class _Key:
    """A robot, equal to another with the same model files, joints, limits and collision settings."""

    def __init__(self, robot: Robot):
        self.robot = robot
        self._key = (
            tuple((str(p.file), p.file.stat().st_mtime_ns, p.T_base_part.tobytes(), p.prefix) for p in robot.parts),
            tuple((a.joints, a.limits.lower.tobytes(), a.limits.upper.tobytes(), a.gripper) for a in robot.arms),
            tuple(a.home.tobytes() for a in robot.arms),
            (robot.collision.margin, robot.collision.allow),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class _Frozen:
    """A capsule, equal to another with the same numbers."""

    def __init__(self, capsule: Capsule):
        self.capsule = capsule
        self._key = (capsule.link, *map(float, (*capsule.start, *capsule.end, capsule.radius)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache(maxsize=8)
def _cell(key: _Key) -> _Cell:
    return _Cell(key.robot)


class _Cell:
    """The links of a robot: which bodies there are, which are one rigid group, and the convex pieces of each."""

    def __init__(self, robot: Robot):
        self.robot = robot
        self.model = model = load_model(robot)
        self.limits = {  # joint id -> its range: the description's, rad (m)
            model.joint(name).id: (lower, upper)
            for arm in robot.arms
            for name, lower, upper in zip(arm.joints, arm.limits.lower, arm.limits.upper, strict=True)
        }
        self.strokes = {
            model.joint(j.name).id: (min(j.closed, j.open), max(j.closed, j.open))
            for arm in robot.arms
            for j in (arm.gripper.joints if arm.gripper else ())
        }
        self.carrier = self._carriers()  # body -> the link in whose frame its geometry is
        self.group = [self._group(body) for body in range(model.nbody)]
        self.pieces = self._pieces()  # link -> pieces in its frame

    @functools.cached_property
    def capsules(self) -> tuple[Capsule, ...]:
        found, known = [], {}  # arms of one kind have the same links
        for link, sources in self.pieces.items():
            name = self.model.body(link).name
            for pieces in sources:
                key = tuple(piece.points.tobytes() for piece in pieces)
                if key not in known:
                    known[key] = _cover(pieces, _MOST)
                found += [Capsule(name, *segment) for segment in known[key]]
        return tuple(found)

    def joints(self, body: int) -> range:
        """Ids of the joints that join a body to its parent."""
        first = self.model.body_jntadr[body]
        return range(first, first + self.model.body_jntnum[body])

    def _group(self, body: int) -> int:
        """The body nearest to the root that is rigidly joined to `body`, the world left out."""
        while body and not self.model.body_jntnum[body] and self.model.body_parentid[body]:
            body = int(self.model.body_parentid[body])
        return body

    def _carriers(self) -> dict[int, int]:
        """Body -> link that carries it (itself, but for fingers), of all bodies that belong to an arm."""
        model = self.model
        moved = {int(model.jnt_bodyid[j]) for j in self.limits}
        bases = {self._group(int(model.body_parentid[b])) for b in moved} - {0}
        carrier: dict[int, int] = {}
        for body in range(1, model.nbody):
            parent = int(model.body_parentid[body])
            if body in moved or body in bases:
                carrier[body] = body
            elif parent in carrier:
                rigid = carrier[parent] == parent and not model.body_jntnum[body]
                carrier[body] = body if rigid else carrier[parent]
        return carrier

    def _pieces(self) -> dict[int, list[list[_Piece]]]:
        """Link -> convex pieces in its frame, its own first, then those of each finger that it carries."""
        pieces: dict[int, list[list[_Piece]]] = {}
        for body, link in self.carrier.items():
            geoms = np.flatnonzero(self.model.geom_bodyid == body)
            solid = [g for g in geoms if self.model.geom_contype[g] or self.model.geom_conaffinity[g]]
            found = [_piece(self.model, g, self.robot) for g in (solid or geoms)]
            while body != link and found:
                found = [_Piece(self._sweep(piece.points, body), piece.pad) for piece in found]
                body = int(self.model.body_parentid[body])
            if found:
                pieces.setdefault(link, []).append(found)
        return pieces

    def belong_together(self, first: int, second: int) -> bool:
        """Whether two links do not move against each other, or are neighbours that one joint joins."""
        groups = self.group[first], self.group[second]
        if groups[0] == groups[1] or not any(self.model.body_weldid[list(groups)]):
            return True
        above = [self.group[int(self.model.body_parentid[g])] for g in groups]
        return groups[0] == above[1] or groups[1] == above[0]

    def joints_between(self, first: int, second: int) -> int | None:
        """Number of joints between two links of which one stands on the other, None for others."""
        path = self._path(first, second)
        return None if path is None else len(path[0])

    def configurations(self) -> np.ndarray:
        """(m, nq) positions of the model's joints: first the home pose, then random ones within the limits."""
        rng = np.random.default_rng(_SEED)
        q = np.tile(self.model.qpos0, (_SAMPLES + 1, 1))
        for arm in self.robot.arms:
            columns = [self.model.jnt_qposadr[self.model.joint(name).id] for name in arm.joints]
            q[0, columns] = arm.home
            q[1:, columns] = rng.uniform(arm.limits.lower, arm.limits.upper, (_SAMPLES, len(columns)))
        return q

    def distances(self, capsules: Sequence[Capsule], pairs: Sequence[tuple[int, int]], q: np.ndarray) -> np.ndarray:
        """(m, p) distances (m) of pairs of capsules at joint positions q (m, nq)."""
        data = mujoco.MjData(self.model)
        links = [self.model.body(c.link).id for c in capsules]
        ends = np.array([[c.start, c.end] for c in capsules])
        placed = np.empty((len(q), *ends.shape))
        for row, positions in zip(placed, q, strict=True):
            data.qpos[:] = positions
            mujoco.mj_kinematics(self.model, data)
            rotations = data.xmat[links].reshape(-1, 3, 3)
            row[:] = np.einsum("lij,lkj->lki", rotations, ends) + data.xpos[links][:, None]
        first, second = np.transpose(pairs)
        radii = np.array([c.radius for c in capsules])
        return _apart(placed[:, first], placed[:, second]) - radii[first] - radii[second]

    def never_meet(self, first: int, second: int) -> bool:
        """Whether the hulls of two links provably stay apart over the whole range of the joints between them.

        A box of that range is cut in two, across the joint that counts most, until in the middle of each part the
        hulls are further apart than the motion inside the part can take away: sum of reach * largest joint change.
        """
        path = self._path(first, second)
        if path is None:
            return False
        joints, reach = path
        engine, data = self._engine, mujoco.MjData(self._engine)
        columns = [engine.joint(self.model.joint(j).name).qposadr[0] for j in joints]
        geoms = [np.flatnonzero(engine.geom_bodyid == engine.body(self.model.body(b).name).id) for b in (first, second)]
        slack = _ACCURACY + sum(max(p.pad for pieces in self.pieces[b] for p in pieces) for b in (first, second))
        lower, upper = np.transpose([self.limits[j] for j in joints])
        boxes, left = [((lower + upper) / 2, (upper - lower) / 2)], _EFFORT
        while boxes:
            middle, half = boxes.pop()
            data.qpos[columns] = middle
            mujoco.mj_kinematics(engine, data)
            enough = reach @ half + slack
            for a, b in itertools.product(*geoms):
                distance = mujoco.mj_geomDistance(engine, data, a, b, enough, None)
                left -= 1
                if distance < enough:
                    break
            else:
                continue
            if distance <= slack or left < 0:
                return False
            cut = np.argmax(reach * half)
            half = np.where(np.arange(len(half)) == cut, half / 2, half)
            step = np.where(np.arange(len(half)) == cut, half, 0.0)
            boxes += [(middle - step, half), (middle + step, half)]
        return True

    def _path(self, first: int, second: int) -> tuple[list[int], np.ndarray] | None:
        """Joints between two links, and how fast each can carry a point of the one against the other, m/rad (m/m).

        None where neither link stands on the other: two arms, or two branches of one.
        """
        for link, other in ((first, second), (second, first)):
            joints, reach = [], []
            # How far the link can be from the frame in question: first its own, then one body after the other down.
            far = np.linalg.norm(_all_points([p for pieces in self.pieces[link] for p in pieces]), axis=1).max()
            body = link
            while body and self.group[body] != self.group[other]:
                for joint in reversed(self.joints(body)):
                    if joint not in self.limits:
                        return None
                    joints.append(joint)
                    offset = np.linalg.norm(self.model.jnt_pos[joint])
                    if self.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE:
                        reach.append(1.0)
                        start = self.model.qpos0[self.model.jnt_qposadr[joint]]
                        far += np.abs(np.array(self.limits[joint]) - start).max()
                    else:
                        reach.append(far + offset)
                        far += 2 * offset
                far += np.linalg.norm(self.model.body_pos[body])
                body = int(self.model.body_parentid[body])
            if body:
                return joints, np.array(reach)
        return None

    @functools.cached_property
    def _engine(self) -> mujoco.MjModel:
        return self.hulls().compile()

    def hulls(self) -> mujoco.MjSpec:
        """The links with their pieces as meshes, moved by the joints of the arms alone."""
        model, spec = self.model, mujoco.MjSpec()
        spec.compiler.degree = False
        spec.compiler.inertiafromgeom = 0  # no dynamics: masses do not matter
        bodies = {0: spec.worldbody}
        for body in range(1, model.nbody):
            bodies[body] = copy = bodies[int(model.body_parentid[body])].add_body(
                name=model.body(body).name,
                pos=model.body_pos[body],
                quat=model.body_quat[body],
                ipos=[0.0, 0.0, 0.0],
                mass=1.0,
                inertia=[1.0, 1.0, 1.0],
                explicitinertial=True,
            )
            for joint in self.joints(body):
                if joint in self.limits:
                    copy.add_joint(
                        name=model.joint(joint).name,
                        type=mujoco.mjtJoint(model.jnt_type[joint]),
                        pos=model.jnt_pos[joint],
                        axis=model.jnt_axis[joint],
                        ref=model.qpos0[model.jnt_qposadr[joint]],
                    )
            for number, piece in enumerate(p for pieces in self.pieces.get(body, ()) for p in pieces):
                name = f"{body}_{number}"
                spec.add_mesh(name=name, uservert=piece.points.ravel())
                copy.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname=name)
        return spec

    def _sweep(self, points: np.ndarray, body: int) -> np.ndarray:
        """Points (m, 3) in the parent's frame whose hull holds `points` (n, 3) of a body at all its joints' positions.

        MuJoCo applies the joints of a body in order, each in the frame that the former ones leave: backwards here.
        """
        model = self.model
        for joint in reversed(self.joints(body)):
            name, kind = model.joint(joint).name, model.jnt_type[joint]
            if joint in self.strokes:
                lower, upper = self.strokes[joint]
            elif model.jnt_limited[joint] and kind in (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE):
                lower, upper = model.jnt_range[joint]
            else:
                raise RobotError(
                    f"{self.robot.path}: model: joint {name}: expected a joint of an arm or a gripper, or one with a "
                    f"range, found neither"
                )
            axis, anchor = model.jnt_axis[joint], model.jnt_pos[joint]
            lower, upper = np.array([lower, upper]) - model.qpos0[model.jnt_qposadr[joint]]
            if kind == mujoco.mjtJoint.mjJNT_SLIDE:
                points = np.concatenate([points + lower * axis, points + upper * axis])
                continue
            steps = max(int(np.ceil((upper - lower) / _TURN)), 1)
            arms = points - anchor
            along = np.outer(arms @ axis, axis)
            # A chord stays inside its arc: points further out by 1/cos(half the step) hold the arc.
            wide = along + (arms - along) / np.cos((upper - lower) / steps / 2)
            turned = [arms @ _rotation(axis, lower).T, arms @ _rotation(axis, upper).T]
            turned += [wide @ _rotation(axis, lower + (upper - lower) * (k + 0.5) / steps).T for k in range(steps)]
            points = anchor + np.concatenate(turned)
        rotation = np.zeros(9)
        mujoco.mju_quat2Mat(rotation, model.body_quat[body])
        return points @ rotation.reshape(3, 3).T + model.body_pos[body]


def _rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """(3, 3) rotation about a unit axis (3,) by an angle, rad."""
    quat, rotation = np.zeros(4), np.zeros(9)
    mujoco.mju_axisAngle2Quat(quat, axis, angle)
    mujoco.mju_quat2Mat(rotation, quat)
    return rotation.reshape(3, 3)


# ------------------------------------------------------------------------------------------------------ convex pieces


class _Piece:
    """A convex solid: all within `pad` (m) of the hull of its corners `points` (n, 3); `edges` (m, 2) join corners."""

    def __init__(self, points: np.ndarray, pad: float = 0.0):
        self.pad = pad
        try:
            hull = ConvexHull(points)
        except QhullError:  # flat: made a little thick
            points = (points[:, None] + _FINE / 2 * _CUBE).reshape(-1, 3)
            hull = ConvexHull(points)
        if len(hull.vertices) > _CORNERS:
            hull, more = _simplified(points[hull.vertices])
            points = hull.points
            self.pad += more
        number = np.full(len(points), -1)
        number[hull.vertices] = np.arange(len(hull.vertices))
        self.points = points[hull.vertices]
        sides = number[hull.simplices]
        self.edges = np.unique(np.sort(sides[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1), axis=0)

    def cut(self, normal: np.ndarray, offset: float) -> tuple[np.ndarray, np.ndarray]:
        """Corners (n, 3) of what is below and of what is above the plane normal . x = offset."""
        height = self.points @ normal - offset
        a, b = height[self.edges[:, 0]], height[self.edges[:, 1]]
        crossed = a * b < 0
        share = (a[crossed] / (a[crossed] - b[crossed]))[:, None]
        first, second = self.points[self.edges[crossed, 0]], self.points[self.edges[crossed, 1]]
        section = first + share * (second - first)
        return (
            np.concatenate([self.points[height <= 0], section]),
            np.concatenate([self.points[height >= 0], section]),
        )


def _simplified(points: np.ndarray) -> tuple[ConvexHull, float]:
    """Hull of some of the points (n, 3), and a distance (m), about _FINE, within which of it all of them are.

    It begins with the outermost points in some directions and takes in the furthest ones until all are near enough.
    """
    kept = np.unique((points @ _ball()[::4].T).argmax(axis=0))
    while True:
        hull = ConvexHull(points[kept])
        above = points @ hull.equations[:, :3].T + hull.equations[:, 3]
        side = above.argmax(axis=1)
        out = np.flatnonzero(above[np.arange(len(points)), side] > 1e-12)
        out = out[~np.isin(out, kept)]
        beyond = _to_triangle(points[out], hull.points[hull.simplices[side[out]]])
        far = np.argsort(-beyond, kind="stable")[: len(kept)]
        far = far[beyond[far] > _FINE]
        if not len(far):
            return hull, float(beyond.max(initial=0.0))
        kept = np.union1d(kept, out[far])


def _to_triangle(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Distances (n,) of points (n, 3) from a near point, if not the nearest, of triangles (n, 3, 3)."""
    first, second, to = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0], points - corners[:, 0]
    a, b, c = (first * first).sum(1), (first * second).sum(1), (second * second).sum(1)
    d, e = (first * to).sum(1), (second * to).sum(1)
    scale = np.maximum(a * c - b * b, 1e-30)
    u, v = (c * d - b * e) / scale, (a * e - b * d) / scale
    weights = np.clip(np.stack([1 - u - v, u, v], axis=1), 0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.linalg.norm(points - (weights[:, :, None] * corners).sum(axis=1), axis=1)


def _piece(model: mujoco.MjModel, geom: int, robot: Robot) -> _Piece:
    """The solid of a geom in its body's frame; round ones as a hull around them."""
    kind, size = mujoco.mjtGeom(model.geom_type[geom]), model.geom_size[geom]
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        points = model.mesh_vert[first : first + model.mesh_vertnum[mesh]].astype(float)
    elif kind == mujoco.mjtGeom.mjGEOM_BOX:
        points = size * _CUBE
    elif kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
        angle = 2 * np.pi * np.arange(32) / 32
        rim = size[0] / np.cos(np.pi / 32) * np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
        points = np.concatenate([rim - [0, 0, size[1]], rim + [0, 0, size[1]]])
    elif kind == mujoco.mjtGeom.mjGEOM_SPHERE:
        points = size[0] * _ball()
    elif kind == mujoco.mjtGeom.mjGEOM_ELLIPSOID:
        points = size * _ball()
    elif kind == mujoco.mjtGeom.mjGEOM_CAPSULE:
        points = np.concatenate([size[0] * _ball() - [0, 0, size[1]], size[0] * _ball() + [0, 0, size[1]]])
    else:
        link = model.body(model.geom_bodyid[geom]).name
        raise RobotError(f"{robot.path}: model: link {link}: expected solid geoms, found {kind.name}")
    rotation = np.zeros(9)
    mujoco.mju_quat2Mat(rotation, model.geom_quat[geom])
    return _solid((points @ rotation.reshape(3, 3).T + model.geom_pos[geom]).tobytes())


@functools.lru_cache(maxsize=64)
def _solid(points: bytes) -> _Piece:
    """The piece with these corners, kept for the next arm of the same kind."""
    return _Piece(np.frombuffer(points).reshape(-1, 3))


@functools.cache
def _ball() -> np.ndarray:
    """Points (n, 3) whose hull holds the unit sphere, by less than 1 %."""
    count = 400
    height = 1 - (2 * np.arange(count) + 1) / count
    angle = np.pi * (1 + 5**0.5) * np.arange(count)
    ring = np.sqrt(1 - height**2)
    points = np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=1)
    return points / -ConvexHull(points).equations[:, 3].max()


# ---------------------------------------------------------------------------------------------------------- fitting


def _volume(length: float, radius: float) -> float:
    return np.pi * radius**2 * (length + 4 / 3 * radius)


def _cover(pieces: list[_Piece], most: int) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Start, end and radius of at most `most` capsules that hold all pieces.

    The part that is best cut in two is, again and again, as long as that is worth a capsule more.
    """
    parts = [(pieces, _fit(pieces))]
    while len(parts) < most:
        number, halves, rough = min(
            (
                (number, halves, sum(_rough(np.concatenate(half))[0] for half in halves) - _size(fitted))
                for number, (part, fitted) in enumerate(parts)
                for halves in _halves(part)
            ),
            key=lambda cut: cut[2],
            default=(0, None, 0.0),
        )
        before = _size(parts[number][1])
        if halves is None or before + rough > _HOPELESS * before:
            break
        pad = max(piece.pad for piece in parts[number][0])
        halved = [(half, _fit(half)) for half in ([_Piece(points, pad) for points in half] for half in halves)]
        saved = before - sum(_size(fitted) for _, fitted in halved)
        if saved < max(_SAVING * before, _WORTH):
            break
        parts[number : number + 1] = halved
    return [fitted for _, fitted in parts]


def _all_points(pieces: list[_Piece]) -> np.ndarray:
    return np.concatenate([piece.points for piece in pieces])


def _size(fitted: tuple[np.ndarray, np.ndarray, float]) -> float:
    start, end, radius = fitted
    return _volume(float(np.linalg.norm(end - start)), radius)


def _halves(pieces: list[_Piece]) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Ways to cut the pieces in two by a plane across a principal axis: corners of the pieces on either side."""
    points = _all_points(pieces)
    found = []
    for normal in _axes(points):
        height = points @ normal
        low, high = height.min(), height.max()
        for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
            sides = [piece.cut(normal, low + share * (high - low)) for piece in pieces]
            halves = tuple([side[k] for side in sides if len(side[k])] for k in (0, 1))
            if all(halves):
                found.append(halves)
    return found


def _axes(points: np.ndarray) -> np.ndarray:
    """Principal axes (3, 3), one a row, longest first."""
    return np.linalg.svd(points - points.mean(axis=0), full_matrices=False)[2]


def _rough(points: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Volume, direction (3,) and a point of the axis (3,) of the best capsule along a principal axis."""
    best = None
    for axis in _axes(points):
        across = points - np.outer(points @ axis, axis)
        centre = (across.min(axis=0) + across.max(axis=0)) / 2
        found = _along(points, axis, centre)
        if best is None or found[0] < best[0]:
            best = (found[0], axis, centre)
    return best


def _along(points: np.ndarray, axis: np.ndarray, centre: np.ndarray, more: float = 0.0) -> tuple:
    """Volume, reach of the segment along `axis` from `centre` (low, high) and radius of the capsule about that line.

    The radius is the smallest one plus `more`; then the segment is the shortest whose round ends hold all points.
    """
    offset = points - centre
    height = offset @ axis
    apart = np.maximum(np.einsum("ij,ij->i", offset, offset) - height * height, 0.0)
    radius = np.sqrt(apart.max()) + more
    bulge = np.sqrt(np.maximum(radius * radius - apart, 0.0))
    low, high = (height + bulge).min(), (height - bulge).max()
    if low > high:
        low = high = (low + high) / 2
    return _volume(high - low, radius), low, high, radius


def _fit(pieces: list[_Piece]) -> tuple[np.ndarray, np.ndarray, float]:
    """Start, end and radius of a capsule of little volume that holds the pieces."""
    points, pad = _corners(_all_points(pieces)), max(piece.pad for piece in pieces)
    _, axis, centre = _rough(points)
    scale = np.ptp(points, axis=0).max() or 1.0
    side, other = np.linalg.svd(axis[None])[2][1:]

    def capsule(x: np.ndarray) -> tuple:
        turned = axis + x[0] * side + x[1] * other
        turned /= np.sqrt(turned @ turned)
        middle = centre + scale * (x[2] * side + x[3] * other)
        return turned, middle, _along(points, turned, middle, scale * max(x[4], 0.0))

    found = minimize(
        lambda x: capsule(x)[2][0] / scale**3,
        np.zeros(5),
        method="Nelder-Mead",
        options={
            "initial_simplex": np.vstack([np.zeros(5), np.diag([0.1, 0.1, 0.03, 0.03, 0.03])]),
            "maxfev": 400,
            "xatol": 1e-3,
            "fatol": 1e-5,
        },
    )
    turned, middle, (_, low, high, _) = capsule(found.x)
    start, end = middle + low * turned, middle + high * turned
    return start, end, float(_to_segment(points, start, end).max()) + pad + 1e-9  # rounding


def _corners(points: np.ndarray) -> np.ndarray:
    try:
        return points[ConvexHull(points).vertices]
    except QhullError:
        return points


def _to_segment(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distances (n,) of points (n, 3) from a segment."""
    line = end - start
    share = np.clip((points - start) @ line / max(line @ line, 1e-30), 0, 1)
    return np.linalg.norm(points - start - share[:, None] * line, axis=1)


# ------------------------------------------------------------------------------------------------------------ pairs


@functools.lru_cache(maxsize=8)
def _sort_out(key: _Key, frozen: tuple[_Frozen, ...]) -> tuple[tuple[tuple[int, int], ...], dict]:
    """Watched pairs of capsules, and why others are not: (i, j) -> reason, but for those that belong together."""
    cell, capsules = _cell(key), [f.capsule for f in frozen]
    allowed = {frozenset(_link(cell, name) for name in pair) for pair in cell.robot.collision.allow}
    links = [cell.model.body(c.link).id for c in capsules]
    pairs, reasons, apart = [], {}, {}
    for i, j in itertools.combinations(range(len(capsules)), 2):
        both = links[i], links[j]
        if cell.belong_together(*both):
            continue
        pairs.append((i, j))
        if frozenset(both) in allowed:
            reasons[i, j] = "allowed"
        elif cell.joints_between(*both) == 2:
            if both not in apart:
                apart[both] = cell.never_meet(*both)
            reasons[i, j] = "cannot meet" if apart[both] else "doubtful"
    doubtful = [pair for pair, reason in reasons.items() if reason == "doubtful"]
    if doubtful:
        near = cell.distances(capsules, doubtful, cell.configurations()) < cell.robot.collision.margin
        always = near[0] & (near.mean(axis=0) >= _ALWAYS)
        for pair, close in zip(doubtful, always, strict=True):
            del reasons[pair]
            if close:
                reasons[pair] = "always close"
    return tuple(pair for pair in pairs if pair not in reasons), reasons


def _apart(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Distances (...) of segments (..., 2, 3); Ericson, Real-Time Collision Detection, section 5.1.9."""
    p, q = first[..., 0, :], second[..., 0, :]
    u, v, w = first[..., 1, :] - p, second[..., 1, :] - q, p - q
    a, b, c = (u * u).sum(-1), (u * v).sum(-1), (v * v).sum(-1)
    d, e = (u * w).sum(-1), (v * w).sum(-1)
    tiny = 1e-18
    across = a * c - b * b
    s = np.where(across > tiny, np.clip((b * e - c * d) / np.maximum(across, tiny), 0, 1), 0.0)
    t = np.clip((b * s + e) / np.maximum(c, tiny), 0, 1)
    s = np.clip((b * t - d) / np.maximum(a, tiny), 0, 1)
    return np.linalg.norm(w + s[..., None] * u - t[..., None] * v, axis=-1)


def _link(cell: _Cell, name: str) -> int:
    where = f"{cell.robot.path}: collision.allow"
    links = [cell.model.body(b).name for b in cell.pieces]
    body = mujoco.mj_name2id(cell.model, mujoco.mjtObj.mjOBJ_BODY, name)
    if body < 0 or body not in cell.carrier:
        raise RobotError(f"{where}: expected links of an arm ({links}), found {name!r}")
    if cell.carrier[body] != body:
        carrier = cell.model.body(cell.carrier[body]).name
        raise RobotError(f"{where}: expected the link that carries the finger, {carrier!r}, found {name!r}")
    return body


# ---------------------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m vla_control.capsules ROBOT`: what is watched, what is not and why, and what is near most often."""
    parser = argparse.ArgumentParser(prog="vla_control.capsules", description="Capsules of a robot and their pairs.")
    parser.add_argument("robot", help="robot description, name or file")
    try:
        robot = load_robot(parser.parse_args(arguments).robot)
        capsules = fit_capsules(robot)
        watched, reasons = _sort_out(_Key(robot), tuple(_Frozen(c) for c in capsules))
    except RobotError as error:
        sys.exit(str(error))
    margin = robot.collision.margin
    print(f"{robot.name}: {len(capsules)} capsules, {len(watched)} pairs watched, margin {1e3 * margin:g} mm")
    print("\nlinks (capsules: length x radius, mm)")
    for link, group in itertools.groupby(capsules, key=lambda c: c.link):
        shapes = (f"{1e3 * np.linalg.norm(c.end - c.start):.0f} x {1e3 * c.radius:.0f}" for c in group)
        print(f"  {link:<32} {', '.join(shapes)}")
    print("\nnot watched, beside neighbours")
    names = {pair: (capsules[pair[0]].link, capsules[pair[1]].link) for pair in (*watched, *reasons)}
    for both, reason in sorted({(names[pair], reason) for pair, reason in reasons.items()}):
        print(f"  {' - '.join(both):<64} {reason}")
    if not watched:
        return
    cell = _cell(_Key(robot))
    distances = cell.distances(capsules, watched, cell.configurations())
    print("\nwatched: nearest at home (mm), share of random configurations nearer than the margin")
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for pair, at_home, share in zip(watched, distances[0], (distances < margin).mean(axis=0), strict=True):
        before = found.get(names[pair], (np.inf, 0.0))
        found[names[pair]] = min(before[0], at_home), max(before[1], share)
    for both, (at_home, share) in sorted(found.items(), key=lambda item: item[1])[:12]:
        close = "  nearer than the margin: the arm cannot start here" if at_home < margin else ""
        print(f"  {' - '.join(both):<64} {1e3 * at_home:6.0f} {share:6.0%}{close}")


if __name__ == "__main__":
    main()
