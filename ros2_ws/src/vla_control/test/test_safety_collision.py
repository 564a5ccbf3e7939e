"""Links stay apart, tools stay in their cones, and who is too near may always leave."""

from dataclasses import replace

import numpy as np
import pytest
from test_cell import two_pandas
from vla_control.cell import Cell
from vla_control.safety import State
from vla_core.robot import Box, Collision, Cone, Obstacle, load_robot

#: Beyond the margin by what a check tolerates and what the average cuts from corners, m.
SLACK = 4e-4


@pytest.fixture(scope="module")
def pair():
    return two_pandas(0.6)


@pytest.fixture(scope="module")
def boxed():
    """A Panda with a free workspace above a table and a box that it must not enter."""
    panda = load_robot("panda")
    free = Box(np.full(3, -2.0), np.full(3, 2.0))
    base = ("panda_link0",)
    world = (
        Obstacle("table", Box(np.array([-1.0, -1.0, -0.5]), np.array([1.5, 1.0, -0.01])), 0.02, base),
        Obstacle("keep out", Box(np.array([0.3, 0.25, 0.0]), np.array([0.7, 0.6, 0.5])), 0.05, base),
    )
    arm = replace(panda.arms[0], workspace=free)
    return replace(panda, arms=(arm,), collision=Collision(0.02, (), world))


def room(cell, decision):
    """How much more than the margins is left at what is sent, m."""
    q = np.concatenate([target.position for target in decision.sent.values()])
    cell.update(q)
    near = cell.near()
    return np.inf if near is None else float((near.distance - near.margin).min())


@pytest.mark.parametrize("axis, sign", [(0, 1), (0, -1), (1, 1), (1, -1), (2, 1), (2, -1)])
def test_a_tool_driven_anywhere_at_speed_keeps_its_margins(boxed, make_rig, axis, sign):
    rig, cell = make_rig(boxed), Cell(boxed)
    delta = np.zeros(6)
    delta[axis] = 0.5 * sign * rig.period
    least = np.inf
    for _ in range(250):
        least = min(least, room(cell, rig.step(rig.delta(delta))))
    assert least > -SLACK
    if axis == 2 and sign == -1:  # the table
        assert least < 0.005
        assert rig.controller.limitations["collision"] > 0
        assert "table" in rig.history[-1].nearest


def test_an_arm_glides_along_what_it_must_not_touch(boxed, make_rig):
    rig = make_rig(boxed)
    for _ in range(150):
        rig.step(rig.delta([0, 0, -0.5 * rig.period, 0, 0, 0]))
    before = rig.history[-1].commanded["arm"][:3, 3]
    for _ in range(100):
        decision = rig.step(rig.delta([0.1 * rig.period, -0.1 * rig.period, -0.2 * rig.period, 0, 0, 0]))
    assert decision.state == State.RUNNING
    moved = decision.commanded["arm"][:3, 3] - before
    assert moved[0] > 0.03 and moved[1] < -0.07
    assert "collision" in decision.reasons and np.isfinite(decision.distance)


def test_two_arms_driven_at_each_other_stay_apart(pair, make_rig):
    rig, cell = make_rig(pair), Cell(pair)
    rng = np.random.default_rng(0)
    least = np.inf
    tools = {n: rig.step().commanded[n][:3, 3] for n in ("left", "right")}
    for k in range(900):
        tools = {n: rig.history[-1].commanded[n][:3, 3] for n in tools}
        if k % 150 == 0:
            push = {n: rng.normal(size=3) * 0.1 for n in tools}
        middle = np.mean(list(tools.values()), axis=0)
        parts = rig.delta().arms
        for name, part in parts.items():
            way = middle + push[name] - tools[name]
            part.delta[:3] = 0.5 * rig.period * way / max(np.linalg.norm(way), 1e-6)
        least = min(least, room(cell, rig.step(rig.command(parts))))
    assert -SLACK < least < 0.01
    assert rig.controller.limitations["collision"] > 100


def too_near(robot, seed, most=-0.002):
    """Joint positions at which a watched pair is nearer than its margin, and the cell there."""
    rng, cell = np.random.default_rng(seed), Cell(robot)
    while True:
        q = np.concatenate([rng.uniform(a.limits.lower, a.limits.upper) for a in robot.arms])
        cell.update(q)
        near = cell.near()
        if near is not None and -0.019 < (near.distance - near.margin).min() < most and (near.distance > 1e-3).all():
            return q, cell, near


@pytest.mark.parametrize("seed", range(6))
def test_who_is_too_near_may_leave_and_not_get_nearer(boxed, make_rig, seed):
    q, cell, near = too_near(boxed, seed)
    arm = boxed.arms[0]
    k = int((near.distance - near.margin).argmin())
    away = near.rows[k] / np.linalg.norm(near.rows[k])
    inside = (q + 0.2 * away < arm.limits.upper) & (q + 0.2 * away > arm.limits.lower)
    for side in (1.0, -1.0):
        rig = make_rig(boxed, start={"arm": q})
        way = side * away * (inside if side > 0 else 1.0)
        for step in range(40):
            decision = rig.step(rig.joints(np.clip(q + way * 0.002 * step, arm.limits.lower, arm.limits.upper)))
            assert decision.refused == ""
        cell.update(decision.sent["arm"].position)
        room_then = (cell.near().distance - cell.near().margin).min() if cell.near() is not None else 1.0
        room_first = (near.distance - near.margin).min()
        if side < 0:
            assert room_then >= room_first - 1e-5
        else:
            assert np.abs(decision.sent["arm"].position - q).max() > 1e-3


def test_a_tool_stays_in_its_cone(panda, make_rig):
    cone = Cone(np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.0, -1.0]), 0.3)
    arm = panda.arms[0]
    robot = replace(panda, arms=(replace(arm, tool=replace(arm.tool, cone=cone)),))
    for axis in range(3):
        for sign in (1, -1):
            rig = make_rig(robot)
            delta = np.zeros(6)
            delta[3 + axis] = sign * 1.5 * rig.period
            tilt = []
            for _ in range(150):
                rotation = rig.step(rig.delta(delta)).commanded["arm"][:3, :3]
                tilt.append(np.arccos(np.clip(-rotation[2, 2], -1, 1)))
            assert max(tilt) <= 0.3 + 4e-4
            if axis < 2:
                assert max(tilt) > 0.28 and rig.controller.limitations["cone"] > 0
                for _ in range(60):
                    rotation = rig.step(rig.delta(-delta)).commanded["arm"][:3, :3]
                assert np.arccos(-rotation[2, 2]) < 0.15


def test_a_stop_beside_an_obstacle_keeps_the_margins(boxed, make_rig):
    cell, least = Cell(boxed), np.inf
    for when in range(20, 60, 3):
        rig = make_rig(boxed)
        for k in range(150):
            if k == when:
                rig.controller.stop(2, "button")
            least = min(least, room(cell, rig.step(rig.delta([0.2 * rig.period, 0, -0.5 * rig.period, 0, 0, 0]))))
    assert least > -SLACK


def test_a_stretched_arm_of_six_joints_can_be_pulled_back(make_rig):
    robot = load_robot("ur5e")
    arm = robot.arms[0]
    free = replace(robot, arms=(replace(arm, workspace=Box(np.full(3, -2.0), np.full(3, 2.0))),))
    q = arm.home.copy()
    q[2] = 0.0  # the elbow is straight
    q[1] = -0.7
    rig = make_rig(free, start={arm.name: q})
    T = rig.step().commanded[arm.name]
    shoulder = np.array([0.0, 0.0, T[2, 3]])
    inward = (shoulder - T[:3, 3]) * [1, 1, 0]
    inward /= np.linalg.norm(inward)
    for _ in range(150):
        decision = rig.step(rig.delta([*(0.1 * rig.period * inward), 0, 0, 0]))
    assert inward @ (decision.commanded[arm.name][:3, 3] - T[:3, 3]) > 0.05
