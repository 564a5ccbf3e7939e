"""Distances between the real meshes of a cell: pinocchio and coal, nothing of the controller's geometry or engine.

The cell is put together here anew from the URDF files of the robot description: one tree with every part at its
place, fingers at their opening, obstacles as boxes. A collision mesh that is convex (its volume is that of its hull)
is measured as such and exactly; of any other the hull bounds the distance from below, and the mesh itself is measured
where that bound is within `NEAR`.

Pairs are of links; fingers count with the link that carries them. All are judged but

- links that no arm joint moves against each other,
- neighbours in the tree, whose meshes meet at the joint, and pairs that always overlap or that no motion moves,
- what the description allows (`collision.allow`, the `allow` of an obstacle), and an arm's fixed base and an obstacle.
"""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import coal
import numpy as np
import pinocchio
from vla_core.robot import Robot, resolve_uri

#: Distances of concave meshes are exact below this, m; above it they are that of the hulls, which is never more.
NEAR = 0.06
#: A mesh counts as convex when it fills its hull to this share.
CONVEX = 0.998
#: Random configurations by which pairs are found that always overlap, or whose distance varies by less than this, m.
SAMPLES, CONSTANT = 200, 1e-5
BASE = "cell_base"


@dataclass(frozen=True)
class Pair:
    """Two links, or a link and an obstacle (then the second is empty); margin: m."""

    name: str
    margin: float
    links: tuple[str, str]


class Oracle:
    """The judge of one robot. Joint positions are arm -> (n,), rad; fingers by the gripper's opening (default open).

    pairs: what is judged, in the order of `distances`.
    never: names of the pairs that are left out because their meshes overlap in every configuration, or
        because no motion changes their distance.
    """

    def __init__(self, robot: Robot, seed: int = 0):
        self.robot = robot
        text, self._mimics, self._part_links = _whole_urdf(robot)
        self._parents = {
            joint.get("name"): joint.find("parent").get("link") for joint in ElementTree.fromstring(text).iter("joint")
        }
        self.model = pinocchio.buildModelFromXML(text)
        geometry = pinocchio.buildGeomFromUrdfString(self.model, text, pinocchio.GeometryType.COLLISION)
        self._columns = {
            arm.name: np.array([self.model.joints[self._joint(j)].idx_q for j in arm.joints]) for arm in robot.arms
        }
        self._convex, self._exact = pinocchio.GeometryModel(), {}
        owners = self._copy_geometry(geometry)
        self._link_of = owners
        bodies = [f.name for f in self.model.frames if f.type == pinocchio.FrameType.BODY and f.name != BASE]
        self._groups = self._rigid_groups(bodies)
        self._pair_up(owners, seed)
        self.data, self._geometry_data = self.model.createData(), self._convex.createData()

    # ------------------------------------------------------------------------------------------------ questions
    def configuration(self, position: Mapping[str, np.ndarray], opening: float = 1.0) -> np.ndarray:
        """The whole configuration vector of pinocchio."""
        q = pinocchio.neutral(self.model)
        for arm in self.robot.arms:
            q[self._columns[arm.name]] = position[arm.name]
            for name, value in arm.gripper.positions(opening).items() if arm.gripper else ():
                q[self.model.joints[self._joint(name)].idx_q] = value
        for name, (of, factor, offset) in self._mimics.items():
            q[self.model.joints[self._joint(name)].idx_q] = (
                offset + factor * q[self.model.joints[self._joint(of)].idx_q]
            )
        return q

    def distances(self, position: Mapping[str, np.ndarray], opening: float = 1.0) -> np.ndarray:
        """Smallest distance of each of `pairs`, m; negative where meshes penetrate (by about that much)."""
        return self._of_pairs(self._distances(self.configuration(position, opening)))

    def path_distances(
        self, path: Mapping[str, np.ndarray], opening: float = 1.0, between: int = 0, horizon: float = 0.15
    ) -> np.ndarray:
        """`distances` along a path arm -> (T, n), with `between` points on each straight way: (T', pairs).

        A pair farther apart than `horizon` (m) is measured anew only when the ways of its two sides since the last
        time could have brought it nearer; until then its entry is that bound from below.
        """
        columns = [(self._columns[name], np.asarray(steps, float)) for name, steps in path.items()]
        q0 = self.configuration({name: steps[0] for name, steps in path.items()}, opening)
        length = len(columns[0][1])
        grid = np.arange((length - 1) * (between + 1) + 1) / (between + 1)
        whole = np.tile(q0, (len(grid), 1))
        for index, steps in columns:
            low = np.minimum(grid.astype(int), length - 1)
            high = np.minimum(low + 1, length - 1)
            whole[:, index] = steps[low] + (grid - low)[:, None] * (steps[high] - steps[low])
        return np.array([self._of_pairs(row) for row in self._sweep(whole, horizon)])

    def margins(self) -> np.ndarray:
        """(pairs,) m."""
        return np.array([pair.margin for pair in self.pairs])

    @property
    def carriers(self) -> dict[str, int]:
        """Link -> the joint that carries it, 0 for what is fixed."""
        return dict(self._groups)

    def centres(self, position: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Where the middle of each link's geometry is: link -> (3,), m, base frame."""
        q = self.configuration(position)
        pinocchio.updateGeometryPlacements(self.model, self.data, self._convex, self._geometry_data, q)
        found: dict[str, np.ndarray] = {}
        for k, link in enumerate(self._link_of):
            if link is not None:
                found[link] = self._geometry_data.oMg[k].act(self._middle[k])
        return found

    # ---------------------------------------------------------------------------------------------------- inside
    def _joint(self, name: str) -> int:
        if not self.model.existJointName(name):
            raise ValueError(f"{self.robot.path}: oracle: expected joint {name!r} in the URDF, found none")
        return self.model.getJointId(name)

    def _copy_geometry(self, geometry: pinocchio.GeometryModel) -> list[str | None]:
        """Fill the geometry model with convex shapes; the link of each, None for an obstacle."""
        owners: list[str | None] = []
        for thing in geometry.geometryObjects:
            shape = thing.geometry
            if isinstance(shape, coal.BVHModelBase):
                shape.buildConvexHull(True, "Qt")
                hull = shape.convex
                if shape.computeVolume() < CONVEX * hull.computeVolume():
                    self._exact[len(owners)] = shape
                shape = hull
            name = f"geometry {len(owners)}"
            added = pinocchio.GeometryObject(name, thing.parentJoint, thing.parentFrame, thing.placement, shape)
            self._convex.addGeometryObject(added)
            owners.append(self.model.frames[thing.parentFrame].name)
        for obstacle in self.robot.collision.world:
            size = obstacle.box.upper - obstacle.box.lower
            place = pinocchio.SE3(np.eye(3), 0.5 * (obstacle.box.upper + obstacle.box.lower))
            box = pinocchio.GeometryObject(f"obstacle {obstacle.name}", 0, place, coal.Box(*size))
            self._convex.addGeometryObject(box)
            owners.append(None)
        self._radius, self._middle = [], []
        for thing in self._convex.geometryObjects:
            thing.geometry.computeLocalAABB()
            self._middle.append(np.array(thing.geometry.aabb_center))
            self._radius.append(float(thing.geometry.aabb_radius))
        return owners

    def _rigid_groups(self, links: Iterable[str]) -> dict[str, int]:
        """Link -> the joint that carries its group: the nearest arm joint towards the root, 0 for what is fixed."""
        moving = {self._joint(j) for j in self.robot.joint_names}
        carrier = {}
        for link in links:
            joint = self.model.frames[self.model.getFrameId(link)].parentJoint
            while joint and joint not in moving:
                joint = self.model.parents[joint]
            carrier[link] = joint
        return carrier

    def _pair_up(self, owners: list[str | None], seed: int) -> None:
        """Name the pairs of links, and the pairs of geometries of each."""
        obstacles = self.robot.collision.world
        first = len(owners) - len(obstacles)
        members: dict[tuple[str, str], list[int]] = {}
        for k, link in enumerate(owners):
            key = ("", obstacles[k - first].name) if link is None else (self._carrying_link(link), "")
            members.setdefault(key, []).append(k)
        allowed = {frozenset(pair) for pair in self.robot.collision.allow}
        keys = list(members)
        candidates = []
        for i, (a, obstacle) in enumerate(keys):
            for b, other in keys[i + 1 :]:
                if obstacle:
                    continue
                if other:
                    box = next(o for o in obstacles if o.name == other)
                    if a in box.allow or not self._groups[a]:  # what is fixed cannot move against an obstacle
                        continue
                    pair = Pair(f"{a} - {other}", box.margin, (a, ""))
                else:
                    if frozenset((a, b)) in allowed or self._neighbours(a, b):
                        continue
                    pair = Pair(f"{a} - {b}", self.robot.collision.margin, (a, b))
                candidates.append((pair, [(x, y) for x in members[a, obstacle] for y in members[b, other]]))
        out = self._senseless(candidates, seed)
        self.never = tuple(pair.name for (pair, _), left in zip(candidates, out) if left)
        kept = [c for c, left in zip(candidates, out) if not left]
        self.pairs = tuple(pair for pair, _ in kept)
        self._set_pairs(kept)

    def _carrying_link(self, link: str) -> str:
        """The link itself, or of a finger the link that carries its joint."""
        moving = {self._joint(j) for j in self.robot.joint_names}
        while (joint := self.model.frames[self.model.getFrameId(link)].parentJoint) and joint not in moving:
            link = self._parents[self.model.names[joint]]
        return link

    def _neighbours(self, a: str, b: str) -> bool:
        """Links of one rigid group, or of two that one arm joint joins."""
        one, two = self._groups[a], self._groups[b]
        if one == two:
            return True
        for child, parent, links in ((one, two, (a, b)), (two, one, (b, a))):
            if child and self._carrier_above(child) == parent:
                # What is fixed may belong to another arm; it is joined only where it carries this one.
                return bool(parent) or self._part_of(links[0]) == self._part_of(links[1])
        return False

    def _part_of(self, link: str) -> int:
        return next(k for k, links in enumerate(self._part_links) if link in links)

    def _carrier_above(self, joint: int) -> int:
        moving = {self._joint(j) for j in self.robot.joint_names}
        joint = self.model.parents[joint]
        while joint and joint not in moving:
            joint = self.model.parents[joint]
        return joint

    def _set_pairs(self, kept: list) -> None:
        self._convex.removeAllCollisionPairs()
        self._belongs, self._ends = [], []
        for number, (_, geometries) in enumerate(kept):
            for x, y in geometries:
                self._convex.addCollisionPair(pinocchio.CollisionPair(x, y))
                self._belongs.append(number)
                self._ends.append((x, y))
        self._belongs = np.array(self._belongs, int)
        self._starts = np.searchsorted(self._belongs, np.arange(len(kept)))
        self._ends = np.array(self._ends, int).reshape(-1, 2)
        self._concave = np.array([x in self._exact or y in self._exact for x, y in self._ends], bool)
        self._geometry_data = self._convex.createData()

    def _senseless(self, candidates: list, seed: int) -> np.ndarray:
        """(pairs,) bool: always overlapping, or always equally far apart."""
        self._set_pairs(candidates)
        self.data = self.model.createData()
        rng = np.random.default_rng(seed)
        found = []
        for _ in range(SAMPLES):
            position = {a.name: rng.uniform(a.limits.lower, a.limits.upper) for a in self.robot.arms}
            found.append(self._of_pairs(self._distances(self.configuration(position))))
        return (np.max(found, axis=0) <= 0.0) | (np.ptp(found, axis=0) < CONSTANT)

    def _of_pairs(self, distances: np.ndarray) -> np.ndarray:
        return np.minimum.reduceat(distances, self._starts)

    def _distances(self, q: np.ndarray) -> np.ndarray:
        pinocchio.computeDistances(self.model, self.data, self._convex, self._geometry_data, q)
        found = np.array([result.min_distance for result in self._geometry_data.distanceResults])
        for k in np.flatnonzero(self._concave & (found < NEAR)):
            found[k] = self._of_meshes(k)
        return found

    def _of_meshes(self, k: int) -> float:
        """Distance of a pair of geometries of which at least one is no convex shape."""
        shapes, places = [], []
        for index in self._ends[k]:
            shapes.append(self._exact.get(int(index), self._convex.geometryObjects[int(index)].geometry))
            place = self._geometry_data.oMg[int(index)]
            places.append(coal.Transform3s(place.rotation, place.translation))
        result = coal.DistanceResult()
        coal.distance(shapes[0], places[0], shapes[1], places[1], coal.DistanceRequest(), result)
        return result.min_distance

    def _sweep(self, whole: np.ndarray, horizon: float) -> np.ndarray:
        """Distances (T, geometry pairs) along configurations; far pairs are measured only when they may be near."""
        found = np.empty((len(whole), len(self._belongs)))
        geometries = len(self._link_of)
        middle = np.array(self._middle)
        radius = np.array(self._radius)
        rest = np.zeros(len(self._belongs))  # what is left of the distance at least, beyond what was moved
        before: tuple[np.ndarray, np.ndarray] | None = None
        a, b = self._ends.T
        for t, q in enumerate(whole):
            pinocchio.updateGeometryPlacements(self.model, self.data, self._convex, self._geometry_data, q)
            places = self._geometry_data.oMg
            R = np.array([places[k].rotation for k in range(geometries)])
            p = np.array([places[k].translation for k in range(geometries)])
            centre = np.einsum("gij,gj->gi", R, middle) + p
            if before is not None:
                # A point at distance r from the centre moves by no more than the centre does and r |R - R'|.
                turn = np.linalg.norm(R - before[1], axis=(1, 2))
                moved = np.linalg.norm(centre - before[0], axis=1) + radius * turn
                rest = rest - moved[a] - moved[b]
            before = centre, R
            apart = np.linalg.norm(centre[a] - centre[b], axis=1) - radius[a] - radius[b]
            rest = np.maximum(rest, apart)
            for k in np.flatnonzero(rest < horizon):
                d = pinocchio.computeDistance(self._convex, self._geometry_data, int(k)).min_distance
                rest[k] = self._of_meshes(k) if self._concave[k] and d < NEAR else d
            found[t] = rest
        return found


def _whole_urdf(robot: Robot) -> tuple[str, dict[str, tuple[str, float, float]], list[set[str]]]:
    """One URDF of all parts, its mimic joints as joint -> (of, factor, offset), and the links of each part."""
    cell = ElementTree.Element("robot", name=robot.name)
    ElementTree.SubElement(cell, "link", name=BASE)
    mimics, parts = {}, []
    for part in robot.parts:
        if part.file.suffix.lower() != ".urdf":
            raise ValueError(f"{part.file}: oracle: expected a URDF")
        root = ElementTree.parse(part.file).getroot()
        children = set()
        parts.append({part.prefix + link.get("name") for link in root.findall("link")})
        for link in root.findall("link"):
            link = copy.deepcopy(link)
            link.set("name", part.prefix + link.get("name"))
            for visual in link.findall("visual"):
                link.remove(visual)
            for mesh in link.iter("mesh"):
                mesh.set("filename", str(resolve_uri(mesh.get("filename"), part.file.parent)))
            cell.append(link)
        for joint in root.findall("joint"):
            joint = copy.deepcopy(joint)
            joint.set("name", part.prefix + joint.get("name"))
            for end in ("parent", "child"):
                joint.find(end).set("link", part.prefix + joint.find(end).get("link"))
            children.add(joint.find("child").get("link"))
            mimic = joint.find("mimic")
            if mimic is not None:
                factor, offset = float(mimic.get("multiplier", 1.0)), float(mimic.get("offset", 0.0))
                mimics[joint.get("name")] = part.prefix + mimic.get("joint"), factor, offset
                joint.remove(mimic)
            cell.append(joint)
        top = next(n for n in (part.prefix + k.get("name") for k in root.findall("link")) if n not in children)
        place = pinocchio.SE3(part.T_base_part)
        fixed = ElementTree.SubElement(cell, "joint", name=f"cell to {top}", type="fixed")
        rpy = " ".join(map(repr, map(float, pinocchio.rpy.matrixToRpy(place.rotation))))
        ElementTree.SubElement(fixed, "origin", xyz=" ".join(map(repr, map(float, place.translation))), rpy=rpy)
        ElementTree.SubElement(fixed, "parent", link=BASE)
        ElementTree.SubElement(fixed, "child", link=top)
    described = {j.name for arm in robot.arms if arm.gripper for j in arm.gripper.joints}
    mimics = {joint: of for joint, of in mimics.items() if joint not in described}
    return ElementTree.tostring(cell, encoding="unicode"), mimics, parts
