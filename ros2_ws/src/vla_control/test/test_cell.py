"""The cell's kinematics and distances: those of other engines, with derivatives as by finite differences."""

from dataclasses import replace

import coal
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from vla_control import geometry
from vla_control.capsules import Capsule
from vla_control.cell import INFLUENCE, TOLERANCE, Cell
from vla_core.kinematics import Kinematics
from vla_core.robot import Box, Collision, Obstacle, RobotError, load_robot, transform


def two_pandas(apart=0.5):
    panda = load_robot("panda")
    arms, parts = [], []
    for name, y in (("left", apart / 2), ("right", -apart / 2)):
        arm = panda.arms[0]
        gripper = replace(
            arm.gripper, joints=tuple(replace(joint, name=f"{name}_{joint.name}") for joint in arm.gripper.joints)
        )
        box = Box(np.full(3, -2.0), np.full(3, 2.0))
        tool = replace(arm.tool, link=f"{name}_{arm.tool.link}")
        joints = tuple(f"{name}_{joint}" for joint in arm.joints)
        arms.append(replace(arm, name=name, joints=joints, tool=tool, gripper=gripper, workspace=box))
        parts.append(replace(panda.parts[0], T_base_part=transform([0, y, 0], [0, 0, 0]), prefix=f"{name}_"))
    table = Obstacle("table", Box(np.array([-1.0, -1.0, -0.3]), np.array([1.5, 1.0, -0.05])), 0.03, ())
    return replace(panda, arms=tuple(arms), parts=tuple(parts), cameras=(), collision=Collision(0.02, (), (table,)))


@pytest.fixture(scope="module")
def pair():
    return two_pandas()


@pytest.fixture(scope="module")
def cells(pair):
    aloha = load_robot("aloha")
    return {"panda": Cell(load_robot("panda")), "aloha": Cell(aloha), "pair": Cell(pair)}


def robot_of(name, pair):
    return pair if name == "pair" else load_robot(name)


def configurations(robot, count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield np.concatenate([rng.uniform(a.limits.lower, a.limits.upper) for a in robot.arms])


@pytest.mark.parametrize("name", ["panda", "aloha", "pair"])
def test_kinematics_agree_with_those_of_each_arm_alone(name, pair, cells):
    robot, cell = robot_of(name, pair), cells[name]
    kinematics = Kinematics(robot)
    for q in configurations(robot, 20):
        cell.update(q)
        for arm in robot.arms:
            part = q[cell.slices[arm.name]]
            np.testing.assert_allclose(cell.tool(arm.name), kinematics.forward(arm.name, part), atol=1e-9)
            np.testing.assert_allclose(cell.point(arm.name), cell.tool(arm.name)[:3, 3])
            np.testing.assert_allclose(cell.jacobian(arm.name), kinematics.jacobian(arm.name, part), atol=1e-9)


@pytest.mark.parametrize("name", ["panda", "pair"])
def test_rows_are_the_derivative_of_the_distances(name, pair, cells):
    robot, cell, step, seen = robot_of(name, pair), cells[name], 1e-6, 0
    rng = np.random.default_rng(1)
    for q in configurations(robot, 60):
        cell.update(q)
        near = cell.near()
        if near is None:
            continue
        v = rng.normal(size=cell.n)
        moved = []
        for side in (1.0, -1.0):
            cell.update(q + side * step * v)
            moved.append(cell.near())
        if any(m is None or not np.array_equal(m.pair, near.pair) for m in moved):
            continue
        # Where two overlap, the nearest points may jump from side to side.
        sound = near.distance > 1e-3
        slope = (moved[0].distance - moved[1].distance) / (2 * step)
        np.testing.assert_allclose((near.rows @ v)[sound], slope[sound], atol=2e-4)
        seen += int(sound.sum())
    assert seen > 50


def test_distances_agree_with_coal_and_no_near_pair_is_missed(pair, cells):
    cell, seen = cells["pair"], 0
    for q in configurations(pair, 25, seed=2):
        cell.update(q)
        near = cell.near()
        found = {} if near is None else {k: near.distance[near.pair == k].min() for k in near.pair}
        for k, both in enumerate(cell.pairs):
            (first, at_first), (second, at_second) = (shape(cell, g) for g in both)
            request, result = coal.DistanceRequest(), coal.DistanceResult()
            expected = coal.distance(first, at_first, second, at_second, request, result)
            if k in found:
                if expected > 1e-3:
                    assert found[k] == pytest.approx(expected, abs=1e-6)
                    seen += 1
                else:
                    assert found[k] < 2e-3
            else:
                assert expected > cell.layout.margin[k] + INFLUENCE - 1e-6
    assert seen > 100


def shape(cell, k):
    """A capsule or box of the cell for coal."""
    capsules = len(cell.layout.link)
    if k >= capsules:
        lower, upper = cell.layout.boxes[k - capsules]
        return coal.Box(upper - lower), coal.Transform3s(np.eye(3), (lower + upper) / 2)
    start, end, radius = cell.ends(k)
    length = np.linalg.norm(end - start)
    turn = Rotation.align_vectors((end - start)[None], [[0.0, 0.0, 1.0]])[0] if length else Rotation.identity()
    return coal.Capsule(radius, length), coal.Transform3s(turn.as_matrix(), (start + end) / 2)


corner = st.tuples(*[st.floats(-1.0, 1.0)] * 3).map(np.array)


@settings(max_examples=1000)
@given(corner, corner, corner, corner)
def test_segments_are_nearest_where_no_other_points_are_nearer(a, b, c, d):
    s, t = geometry.segments(a, b, c, d)
    assert 0.0 <= s <= 1.0 and 0.0 <= t <= 1.0
    found = np.linalg.norm(a + s * (b - a) - c - t * (d - c))
    grid = np.linspace(0.0, 1.0, 41)
    points = (a + np.outer(grid, b - a))[:, None] - (c + np.outer(grid, d - c))
    assert found <= np.linalg.norm(points, axis=2).min() + 1e-7


@settings(max_examples=1000)
@example(*(np.array(x) for x in ([0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.5])))
@given(corner, corner, corner, st.tuples(*[st.floats(0.01, 0.5)] * 3).map(np.array))
def test_a_segment_is_nearest_to_a_box_or_deepest_in_it(a, b, lower, size):
    upper = lower + size

    def signed(points):
        beyond = np.maximum(lower - points, points - upper)
        away = np.linalg.norm(np.maximum(beyond, 0.0), axis=-1)
        return np.where(away > 0.0, away, beyond.max(axis=-1))

    t = geometry.segment_box(a, b, lower, upper)
    assert 0.0 <= t <= 1.0
    others = signed(a + np.outer(np.linspace(0.0, 1.0, 401), b - a))
    assert signed(a + t * (b - a)) <= others.min() + 1e-7


@pytest.mark.parametrize("name", ["panda", "aloha", "pair"])
def test_bends_are_the_derivative_of_the_jacobian(name, pair, cells):
    robot, cell, step = robot_of(name, pair), cells[name], 1e-6
    rng = np.random.default_rng(5)
    for q in configurations(robot, 10, seed=5):
        for arm in robot.arms:
            part, directions = cell.slices[arm.name], rng.normal(size=(3, len(arm.joints)))
            cell.update(q)
            bends, before = cell.bends(arm.name, directions), cell.jacobian(arm.name)
            for v, bend in zip(directions, bends):
                moved = q.copy()
                moved[part] += step * v
                cell.update(moved)
                np.testing.assert_allclose(bend, (cell.jacobian(arm.name) - before) @ v / step, atol=1e-4)


def test_what_is_far_away_is_not_near_and_what_is_near_is_named(pair, cells):
    cell = cells["pair"]
    cell.update(np.concatenate([arm.home for arm in pair.arms]))
    distance, found = cell.nearest()
    near = cell.near()
    assert distance == near.distance.min() and (near.distance - near.margin < INFLUENCE + 1e-9).all()
    assert " - " in cell.describe(found) and cell.describe(-1) == ""
    assert set(cell.arms_of(found)) <= {"left", "right"}


def test_a_pair_that_is_too_near_keeps_what_it_has(pair, cells):
    cell = cells["pair"]
    q = np.concatenate([arm.home for arm in pair.arms])
    cell.update(q)
    kept = cell.kept(q)
    np.testing.assert_array_equal(kept.distance, cell.layout.margin - TOLERANCE)
    assert kept.hulls is None
    for aim in configurations(pair, 200, seed=3):
        cell.update(aim)
        near = cell.near()
        if near is not None and (near.distance < near.margin).any():
            break
    kept = cell.kept(aim)
    assert (near.distance >= kept.distance[near.pair]).all()
    others = np.setdiff1d(np.arange(len(kept.distance)), near.pair[near.distance < near.margin - TOLERANCE])
    np.testing.assert_array_equal(kept.distance[others], cell.layout.margin[others] - TOLERANCE)
    # The links themselves are measured, once each, and are no nearer than their capsules.
    named = [cell.describe(k) for k in kept.hulls.pair]
    assert len(set(named)) == len(named)
    assert set(named) == {cell.describe(k) for k in near.pair[near.distance < near.margin - 2.0 * TOLERANCE]}
    for name, distance in zip(named, kept.hulls.distance):
        assert distance >= min(d for d, k in zip(near.distance, near.pair) if cell.describe(k) == name) - 1e-6
    cell.update(q)


def test_a_way_past_something_is_found_to_pass_too_near(cells):
    """Ways whose ends are apart as they should be, with a place between that is short of it by 0.05 mm."""
    robot, cell, rng = load_robot("panda"), cells["panda"], np.random.default_rng(6)
    there, seen = cell.twin(), 0
    for middle in configurations(robot, 3000, seed=7):
        cell.update(middle)
        if not 0.0 < cell.room() < 0.02:
            continue
        for _ in range(3):
            near = cell.near()
            row = near.rows[(near.distance - near.margin).argmin()]
            middle = middle - (cell.room() + TOLERANCE + 5e-5) / (row @ row) * row
            cell.update(middle)
        if not -6e-5 < cell.room() + TOLERANCE < -4e-5:
            continue
        near = cell.near()
        row = near.rows[(near.distance - near.margin).argmin()]
        for half in rng.uniform(-0.15, 0.15, (10, cell.n)):
            half -= (row @ half) / (row @ row) * row
            cell.update(middle - half)
            if cell.room() > -TOLERANCE:
                kind, _ = there.first_broken(cell, middle - half, 2.0 * half, 0.02, cell.kept(middle - half))
                assert kind
                seen += 1
    assert seen > 1000


@pytest.mark.parametrize("name", ["panda", "aloha", "pair"])
def test_no_pair_that_comes_nearer_on_the_way_than_it_may_is_passed_over(name, pair, cells):
    """Each pair may come as near as it does on the way, less a micrometre: then it is at risk."""
    cell, robot = cells[name], robot_of(name, pair)
    places = [geometry.make_place(cell._layout[0]) for _ in range(2)]
    here, there = (geometry.unpack_place(cell._layout[0], *place) for place in places)
    rng, chosen = np.random.default_rng(8), []

    def distances(place, q):
        geometry.look(*cell._layout, *places[place], q, 10.0)
        found, count = np.full(len(cell.pairs), np.inf), (here, there)[place].count[0]
        np.minimum.at(found, (here, there)[place].pair[:count], (here, there)[place].distance[:count])
        return found

    def check(q, way):
        nearest = np.min([distances(1, q + share * way) for share in np.linspace(0.0, 1.0, 41)], axis=0)
        distances(0, q)
        far, at_end = geometry._travel(cell.layout, there, here, q, way)[0], distances(1, q + way)
        assert set(np.flatnonzero(at_end > nearest + 1e-6)) <= set(
            geometry._at_risk(cell.layout, there, far, nearest + 1e-6)
        )
        chosen.append(len(geometry._at_risk(cell.layout, there, far, cell.layout.margin)))

    for q in configurations(robot, 40, seed=9):
        for size in (0.02, 0.1, 0.5):
            check(q, rng.uniform(-size, size, cell.n))
        # The tool swings out and comes back, so that its way bends, and leads nowhere.
        cell.update(q)
        half = np.zeros(cell.n)
        half[cell.slices[robot.arms[0].name]] = 0.4 * np.linalg.svd(cell.jacobian(robot.arms[0].name))[2][-1]
        check(q - half, 2.0 * half)
    assert np.mean(chosen[::4]) < 0.1 * len(cell.pairs)  # few are, on short ways


def test_a_way_to_rest_does_not_bring_links_nearer_whose_capsules_keep_their_distance(cells):
    robot, cell = load_robot("panda"), cells["panda"]
    there, rng, free, caught = cell.twin(), np.random.default_rng(5), 0, 0
    for q in configurations(robot, 300, seed=4):
        cell.update(q)
        kept = cell.kept(q)
        if kept.hulls is None or (kept.hulls.distance < 1e-3).any():
            continue
        least = np.minimum(kept.hulls.distance, kept.hulls.margin - TOLERANCE)
        for way in rng.uniform(-0.05, 0.05, (60, cell.n)):
            capsules_keep = not there.first_broken(cell, q, way, 0.2, kept._replace(hulls=None))[0]
            broken, arms = there.first_broken(cell, q, way, 0.2, kept)
            both = [tuple(cell.describe(k).split(" - ")) for k in kept.hulls.pair]
            after = cell._hulls.measure(q + way, both)[0]
            if not broken:
                assert (after >= least - 1e-6).all()
                free += 1
            elif capsules_keep:
                assert broken == "collision" and arms == ("arm",)
                caught += 1
    assert free > 30 and caught > 3


def test_a_twin_has_joints_of_its_own(cells):
    cell = cells["panda"]
    q = load_robot("panda").arms[0].home
    cell.update(q)
    twin = cell.twin()
    twin.update(q + 0.3)
    assert np.abs(twin.tool("arm") - cell.tool("arm")).max() > 0.05


def test_capsules_of_unknown_links_are_refused():
    with pytest.raises(RobotError, match="'absent'"):
        Cell(load_robot("panda"), [Capsule("absent", np.zeros(3), np.ones(3), 0.1)])
