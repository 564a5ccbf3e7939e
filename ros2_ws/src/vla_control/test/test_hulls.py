"""Hulls of links: as far apart as the meshes by another engine's account, with rows that are their derivative."""

import numpy as np
import pinocchio
import pytest
from vla_control.cell import Cell
from vla_control.hulls import Hulls
from vla_core.robot import load_robot

#: Pairs of the Panda's links; their collision meshes are convex.
PAIRS = [("panda_link5", "panda_hand"), ("panda_link1", "panda_link6"), ("panda_link0", "panda_link7")]


@pytest.fixture(scope="module")
def panda():
    return load_robot("panda")


@pytest.fixture(scope="module")
def hulls(panda):
    return Hulls(panda, PAIRS, {joint: k for k, joint in enumerate(panda.arms[0].joints)})


def poses(robot, count, seed):
    rng = np.random.default_rng(seed)
    return rng.uniform(robot.arms[0].limits.lower, robot.arms[0].limits.upper, (count, len(robot.arms[0].joints)))


def test_distances_are_those_of_the_meshes_by_coal(panda, hulls):
    file = str(panda.parts[0].file)
    model = pinocchio.buildModelFromUrdf(file)
    folder = file.split("/example-robot-data/")[0]
    geometry = pinocchio.buildGeomFromUrdf(model, file, pinocchio.GeometryType.COLLISION, package_dirs=[folder])
    names = [shape.name.rsplit("_", 1)[0] for shape in geometry.geometryObjects]
    for first, second in PAIRS:
        geometry.addCollisionPair(pinocchio.CollisionPair(names.index(first), names.index(second)))
    data, places = model.createData(), geometry.createData()
    columns = [model.joints[model.getJointId(joint)].idx_q for joint in panda.arms[0].joints]
    seen = 0
    for q in poses(panda, 60, 0):
        whole = pinocchio.neutral(model)
        whole[columns] = q
        pinocchio.updateGeometryPlacements(model, data, geometry, places, whole)
        pinocchio.computeDistances(geometry, places)
        expected = np.array([result.min_distance for result in places.distanceResults])
        found = hulls.measure(q, PAIRS)[0]
        # The hand's fingers are part of it here, over their whole stroke: it is as near at least.
        assert found[0] <= expected[0] + 1e-6
        apart = expected > 1e-3
        np.testing.assert_allclose(found[1:][apart[1:]], expected[1:][apart[1:]], atol=1e-6)
        seen += apart[1:].sum()
    assert seen > 50


@pytest.mark.parametrize("name", ["panda", "aloha", "ur5e", "so101"])
def test_rows_are_the_derivative_of_the_distances(name):
    robot, step, seen = load_robot(name), 1e-6, 0
    cell = Cell(robot)
    rng = np.random.default_rng(2)
    for _ in range(150):
        q = np.concatenate([rng.uniform(arm.limits.lower, arm.limits.upper) for arm in robot.arms])
        cell.update(q)
        found = cell.kept(q).hulls
        if found is None:
            continue
        both = [tuple(cell.describe(k).split(" - ")) for k in found.pair]
        measure = Hulls(robot, both, {j: k for k, j in enumerate(j for arm in robot.arms for j in arm.joints)}).measure
        v = rng.normal(size=cell.n)
        slope = (measure(q + step * v, both)[0] - measure(q - step * v, both)[0]) / (2 * step)
        apart = found.distance > 1e-3  # of those that overlap the nearest points jump from side to side
        np.testing.assert_allclose((found.rows @ v)[apart], slope[apart], atol=2e-3)
        seen += apart.sum()
        if seen > 40:
            break
    assert seen > 20
