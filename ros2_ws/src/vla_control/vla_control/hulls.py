"""Distances of the links themselves, as the hulls of their collision geometry; MuJoCo measures.

A capsule bulges beyond the flat sides of its link (14 mm at the Panda's forearm), by more here than there: links whose
capsules keep their distance may come nearer to each other, or go apart. That does not matter while the capsules are
apart as they should be, for the links are no nearer. It does where they are not, and no link is to come nearer still:
there, and only there, the hulls are measured as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mujoco
import numpy as np
from vla_core.robot import Robot

from vla_control.capsules import BOX, hull_model

#: Distances are measured up to this, m; they are exact to this, m.
_FAR, EXACT = 1.0, 1e-8


class Hulls:
    """Hulls of the links of a robot, and the boxes around it.

    Args:
        pairs: two links each, or a link and the name of an obstacle.
        columns: name of a joint -> its place in joint positions q.
    """

    def __init__(self, robot: Robot, pairs: Iterable[tuple[str, str]], columns: dict[str, int]):
        self._model = model = hull_model(robot)
        model.opt.ccd_tolerance = EXACT
        self._data = mujoco.MjData(model)
        joints = [model.joint(k) for k in range(model.njnt)]
        self._columns = np.array([columns[joint.name] for joint in joints])
        self._address = np.array([joint.qposadr[0] for joint in joints])
        self._geoms = {both: [(a, b) for a in self._of(both[0]) for b in self._of(both[1])] for both in pairs}

    def measure(self, q: np.ndarray, pairs: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Smallest distances (k,) of pairs at joint positions q (n,), m, below zero where they overlap; where on the
        first of each (k, 3), and the way to the second (k, 3), of length 1 (0 where they just touch)."""
        model, data = self._model, self._data
        data.qpos[self._address] = q[self._columns]
        mujoco.mj_kinematics(model, data)
        distance, points, ways = np.full(len(pairs), _FAR), np.zeros((len(pairs), 3)), np.zeros((len(pairs), 3))
        between = np.zeros(6)
        for k, both in enumerate(pairs):
            for first, second in self._geoms[both]:
                # MuJoCo gives the ends of what is between two geoms in the order of their types.
                turned = model.geom_type[first] > model.geom_type[second]
                found = mujoco.mj_geomDistance(model, data, first, second, _FAR, between)
                if found < distance[k]:
                    begin, end = (between[3:], between[:3]) if turned else (between[:3], between[3:])
                    distance[k], points[k] = found, begin
                    ways[k] = (end - begin) / found if abs(found) > EXACT else 0.0
        return distance, points, ways

    def _of(self, name: str) -> list[int]:
        """Geoms of a link or an obstacle."""
        box = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_GEOM, f"{BOX}{name}")
        if box >= 0:
            return [box]
        geoms = np.flatnonzero(self._model.geom_bodyid == self._model.body(name).id).tolist()
        return [k for k in geoms if not self._model.geom(k).name.startswith(BOX)]
