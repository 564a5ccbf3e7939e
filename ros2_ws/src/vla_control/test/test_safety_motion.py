"""How commands become motion: exact goals, even speed, walls, singularities, the way back from outside."""

import numpy as np
import pytest
from vla_control.command import ArmCommand
from vla_core import se3

HERE = np.zeros(6)


def accelerations(rig, name):
    return np.abs(np.diff(rig.velocities(name), axis=0)) / rig.period


def test_many_small_deltas_integrate_exactly(panda, make_rig):
    rig = make_rig(panda)
    start = rig.step().goal["arm"]
    rng = np.random.default_rng(0)
    expected = start
    for _ in range(400):
        delta = rng.normal(size=6) * [2e-4] * 6
        expected = se3.apply_delta(expected, delta)
        rig.step(rig.delta(delta))
    assert np.abs(rig.history[-1].goal["arm"] - expected).max() < 1e-9
    for _ in range(100):
        rig.step(rig.delta(HERE))
    assert np.abs(rig.history[-1].commanded["arm"][:3, 3] - expected[:3, 3]).max() < 1e-4


def test_a_steady_stream_is_followed_without_lag(panda, make_rig):
    rig = make_rig(panda)
    for k in range(150):
        speed = 0.3 * min(1.0, k / 50)
        decision = rig.step(rig.delta([0, speed * rig.period, 0, 0, 0, 0]))
        if k > 60:
            assert np.linalg.norm(decision.goal["arm"][:3, 3] - decision.commanded["arm"][:3, 3]) < 2e-3  # the average
    assert accelerations(rig, "arm").max() < 3.0


@pytest.mark.parametrize("rate", [10.5, 12.0, 20.0, 30.0, 70.0])
def test_commands_slower_than_the_control_rate_give_even_motion(panda, make_rig, rate):
    rig = make_rig(panda)
    due, speed = 0.0, 0.1
    for _ in range(300):
        command = None
        if rig.now >= due - 1e-9:
            command = rig.delta([0, speed / rate, 0, 0, 0, 0], period=1.0 / rate)
            due += 1.0 / rate
        rig.step(command)
    late = rig.tools("arm")[150:, 1, 3]
    assert np.allclose(np.diff(late) / rig.period, speed, rtol=0.05)
    assert accelerations(rig, "arm")[150:].max() < 1.0


def test_commands_that_come_early_and_late_give_even_motion(panda, make_rig):
    rig = make_rig(panda)
    rng = np.random.default_rng(0)
    waiting = []
    for _ in range(400):
        waiting.append((rig.now + rng.uniform(0.0, 0.015), rig.delta([0, 0.001, 0, 0, 0, 0])))
        come = [c for t, c in waiting if t <= rig.now]
        waiting = [(t, c) for t, c in waiting if t > rig.now]
        for command in come[:-1]:
            assert rig.controller.offer(command, rig.now) == ""
        rig.step(come[-1] if come else None)
    speeds = np.diff(rig.tools("arm")[100:, 1, 3]) / rig.period
    assert np.allclose(speeds, 0.1, rtol=0.15)
    assert not rig.controller.refusals


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [1, -1])
def test_full_speed_into_a_wall_ends_at_the_wall(robot, make_rig, axis, sign):
    rig = make_rig(robot)
    delta = np.zeros(6)
    delta[axis] = sign * rig.period * robot.arms[0].tool_limits.speed
    for _ in range(300):
        rig.step(rig.delta(delta))  # the rig judges the walls
    for arm in robot.arms:
        assert np.abs(rig.velocities(arm.name)[-1]).max() < 0.5
    assert rig.controller.limitations["workspace"] > 0


def test_joint_targets_outside_the_workspace_slide_along_the_wall(robot, make_rig):
    for seed in range(3):
        rig = make_rig(robot)
        rng = np.random.default_rng(seed)
        aim = {a.name: rng.uniform(a.limits.lower, a.limits.upper) for a in robot.arms}
        for _ in range(300):
            at = {a.name: rig.controller.target(a.name).position for a in robot.arms}
            rig.step(rig.joints({n: q + np.clip(aim[n] - q, -0.4, 0.4) for n, q in at.items()}))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [1, -1])
def test_a_command_away_from_a_wall_is_taken(panda, make_rig, axis, sign):
    rig = make_rig(panda)
    delta = np.zeros(6)
    delta[axis] = sign * rig.period * 0.5
    for _ in range(250):
        rig.step(rig.delta(delta))
    before = rig.history[-1].commanded["arm"][axis, 3]
    for _ in range(60):
        decision = rig.step(rig.delta(-0.4 * delta))
        assert decision.refused == ""
    assert sign * (before - decision.commanded["arm"][axis, 3]) > 0.02


def test_an_arm_at_the_end_of_its_reach_stands_still(panda, make_rig):
    rig = make_rig(panda)
    for _ in range(600):
        rig.step(rig.delta([0.006, 0, 0, 0, 0, 0]))
    assert np.ptp([d.sent["arm"].position for d in rig.history[400:]], axis=0).max() < 0.05
    before = rig.history[-1].commanded["arm"][0, 3]
    for _ in range(100):
        rig.step(rig.delta([-0.002, 0, 0, 0, 0, 0]))
    assert rig.history[-1].commanded["arm"][0, 3] < before - 0.1


def test_a_wrist_singularity_is_passed(aloha, make_rig):
    rig = make_rig(aloha)
    for k in range(200):
        speed = 0.1 * min(1.0, k / 50)
        decision = rig.step(rig.delta(speed * rig.period * np.array([0, 1, 0.5, 0, 1, 1])))
    error = se3.delta(decision.commanded["left"], decision.goal["left"])
    assert np.linalg.norm(error[:3]) < 2e-3
    assert np.linalg.norm(error[3:]) < 0.01


def test_the_goal_leads_by_no_more_than_the_limit(panda, make_rig):
    rig = make_rig(panda)
    most = rig.controller.limits.max_lead
    for _ in range(100):
        decision = rig.step(rig.delta([0, 0.02, 0, 0, 0, 0.05]))
        lead = se3.delta(decision.commanded["arm"], decision.goal["arm"])
        assert np.linalg.norm(lead[:3]) <= most + 1e-9
        assert np.linalg.norm(lead[3:]) <= rig.controller.limits.max_lead_rotation + 1e-9
    assert rig.controller.limitations["lead"] > 0


def test_a_long_command_within_the_speed_limit_is_not_cut(panda, make_rig):
    rig = make_rig(panda)
    start = rig.step().goal["arm"][1, 3]
    for _ in range(3):
        rig.step(rig.delta([0, 0.04, 0, 0, 0, 0], period=0.1))
        rig.idle(9)
    assert rig.history[-1].goal["arm"][1, 3] == pytest.approx(start + 0.12, abs=1e-9)
    assert not rig.controller.limitations["lead"]


def test_deltas_and_joint_targets_may_alternate(robot, make_rig):
    rig = make_rig(robot)
    for k in range(200):
        if k % 2:
            rig.step(rig.delta([0, 1e-3, 0, 0, 0, 0]))
        else:
            at = {a.name: rig.controller.target(a.name).position + 1e-3 for a in robot.arms}
            rig.step(rig.joints(at))
    assert not rig.controller.refusals


def test_a_joint_target_is_reached_at_the_end_of_its_period(panda, make_rig):
    rig = make_rig(panda)
    goal = panda.arm("arm").home.copy()
    for k in range(200):
        goal[2] = 0.3 * (1 - np.cos(k * rig.period * 2))
        decision = rig.step(rig.joints(goal))
        assert np.abs(decision.sent["arm"].position - goal).max() < 5e-3  # the average is half a period behind
    assert np.array_equal(decision.goal["arm"], decision.commanded["arm"])


@pytest.mark.parametrize("mode", ["delta", "joint"])
def test_who_starts_outside_a_joint_limit_comes_back_slowly(panda, make_rig, mode):
    arm = panda.arm("arm")
    start = arm.home.copy()
    start[5] = arm.limits.upper[5] + 0.05
    rig = make_rig(panda, start={"arm": start})
    rig.idle(10)
    assert np.array_equal(rig.position["arm"], start)  # at rest until it is driven
    for _ in range(250):
        rig.step(rig.delta(HERE) if mode == "delta" else rig.joints(start))
    joint = np.array([d.sent["arm"].position[5] for d in rig.history])
    assert (np.diff(joint)[joint[:-1] > arm.limits.upper[5]] <= 1e-12).all()
    assert (np.diff(joint) >= -0.5 * rig.period).all()
    assert joint[-1] <= arm.limits.upper[5] + 1e-3


def test_who_starts_outside_the_workspace_comes_back_slowly(panda, make_rig):
    start = panda.arm("arm").home.copy()
    start[3] = -1.4  # reaches out
    rig = make_rig(panda, start={"arm": start})
    at_first = rig.outside("arm", start)
    assert at_first > 0.02
    for _ in range(600):
        rig.step(rig.delta(HERE))
    outside = np.array([rig.outside("arm", d.sent["arm"].position) for d in rig.history])
    assert (np.diff(outside) < 1e-4).all()
    assert (np.diff(outside) > -0.2 * rig.period).all()
    assert outside[-1] < 2e-3


def test_the_gripper_keeps_its_rate_and_nan_keeps_its_target(panda, make_rig):
    rig = make_rig(panda)
    rate = panda.arm("arm").gripper.speed * rig.period
    rig.step()  # the first targets after arming are where the arm is
    rig.step(rig.command({"arm": ArmCommand(delta=HERE, gripper=1.0)}))
    assert rig.history[-1].sent["arm"].gripper == pytest.approx(0.5 + rate)
    for _ in range(100):
        rig.step(rig.command({"arm": ArmCommand(delta=HERE)}))
    assert rig.history[-1].sent["arm"].gripper == 1.0


def test_tracking_is_unbiased_by_the_posture_term(panda, make_rig):
    rig = make_rig(panda, start={"arm": panda.arm("arm").home + 0.3})
    for _ in range(200):
        decision = rig.step(rig.delta(HERE))
    error = se3.delta(decision.commanded["arm"], decision.goal["arm"])
    assert np.abs(error).max() < 1e-4
