"""What is watched beside commands: where a motion starts, drivers, contacts, chunks, gaps; and the evidence kept."""

from dataclasses import replace

import numpy as np
import pytest
from test_safety_states import MOVE, running
from vla_control.command import CommandRefused
from vla_control.safety import TRANSITIONS, Measured, State
from vla_core.robot import Contact


def touching(robot, **thresholds):
    none = {"force": np.inf, "torque": np.inf, "retreat": 0.0}
    arms = []
    for arm in robot.arms:
        contact = Contact(**(none | {"effort": np.full(len(arm.joints), np.inf)} | thresholds))
        arms.append(replace(arm, contact=contact))
    return replace(robot, arms=tuple(arms))


# ----------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("after", ["arm", "hold"])
def test_an_arm_that_was_moved_by_hand_does_not_start_from_elsewhere(robot, make_rig, after, seed):
    rig = make_rig(robot) if after == "arm" else running(make_rig, robot)
    rig.idle(60)
    rng = np.random.default_rng(seed)
    name = robot.arms[seed % len(robot.arms)].name
    arm = robot.arm(name)
    rig.position[name] = rig.position[name] + rng.uniform(2.0, 20.0) * arm.start.joint * rng.choice([-1, 1])
    before = {n: t.position for n, t in rig.history[-1].sent.items()}
    moved = rig.position[name].copy()
    for _ in range(5):
        measured = Measured(rig.now, rig.position | {name: moved})
        decision = rig.step(rig.delta(MOVE), measured)
        assert decision.refused.startswith("start") and name in decision.refused
        assert all(np.array_equal(decision.sent[n].position, q) for n, q in before.items())
    rig.position[name] = moved
    rig.arm()
    for _ in range(2):  # the first targets after arming are where the arms are
        decision = rig.step(rig.delta(MOVE))
    assert decision.state == State.RUNNING
    assert np.abs(decision.sent[name].position - moved).max() < 0.01


def test_a_tool_farther_away_than_its_guard_does_not_start(panda, make_rig):
    rig = make_rig(panda)
    rig.step()
    q = rig.position["arm"] + np.array([0.004, 0, 0, 0, 0, 0, 0])  # 0.4 m from the axis: 1.7 mm at the tool
    decision = rig.step(rig.delta(MOVE), Measured(rig.now, {"arm": q}))
    assert "its tool is 0.0017 m away" in decision.refused


def test_an_arm_that_sags_may_have_a_wider_guard(panda, make_rig):
    arm = panda.arms[0]
    loose = replace(panda, arms=(replace(arm, start=replace(arm.start, joint=0.05, tool=0.05)),))
    rig = make_rig(loose)
    rig.step()
    assert rig.step(rig.delta(MOVE), Measured(rig.now, {"arm": rig.position["arm"] + 0.02})).state == State.RUNNING


# --------------------------------------------------------------------------------------------------- watchdogs


@pytest.mark.parametrize("state", [State.ARMED, State.RUNNING])
def test_a_driver_that_does_not_follow_stops_all_arms_silently(robot, make_rig, state):
    rig = running(make_rig, robot) if state == State.RUNNING else make_rig(robot)
    name = robot.arms[-1].name
    halted = replace(rig.measured, halted={name: "protective stop"})
    for _ in range(100):
        decision = rig.step(rig.delta(MOVE), replace(halted, stamp=rig.now, position=rig.position))
    assert decision.state == State.STOPPED and decision.stop_category == 2
    assert name in decision.reason and "protective stop" in decision.reason
    assert decision.sent == {}  # nothing is waiting for the driver to follow again
    with pytest.raises(CommandRefused, match="driver: .*protective stop"):
        rig.controller.arm(replace(halted, stamp=rig.now))
    rig.arm()
    assert rig.step().state == State.ARMED


def test_drivers_without_a_sign_of_life_stop_all_arms(panda, make_rig):
    rig = running(make_rig, panda)
    seen = rig.now
    while rig.controller.state == State.RUNNING:
        rig.step(rig.delta(MOVE), replace(rig.measured, drivers=seen))
        assert rig.now - seen < rig.controller.limits.driver_timeout + 2.5 * rig.period
    assert rig.controller.stops["driver"] == 1


def test_drivers_that_live_do_not(panda, make_rig):
    rig = make_rig(panda)
    for _ in range(50):
        decision = rig.step(rig.delta(MOVE), replace(rig.measured, drivers=rig.now - 0.02))
    assert decision.state == State.RUNNING


def test_a_command_that_rests_on_an_old_observation_is_refused(panda, make_rig):
    rig = running(make_rig, panda)
    fresh = replace(rig.delta(MOVE), observation=rig.now - 1.0)
    assert rig.step(fresh).refused == ""
    old = replace(rig.delta(MOVE), observation=rig.now - rig.controller.limits.chunk_timeout - 0.1)
    assert rig.step(old).refused.startswith("chunk")


def test_after_a_gap_in_which_nothing_was_sent_the_arms_hold(panda, make_rig):
    rig = running(make_rig, panda)
    rig.ticks += 20
    assert rig.step(rig.delta(MOVE)).state == State.RUNNING  # a fresh command goes on from the braking
    assert rig.controller.stops["overrun"] == 1


def test_joint_states_too_old_to_arm_on_are_refused(panda, make_rig):
    rig = running(make_rig, panda)
    rig.idle(60)
    with pytest.raises(CommandRefused, match="stale joint states"):
        rig.controller.arm(replace(rig.measured, stamp=rig.now - 0.5))


# ----------------------------------------------------------------------------------------------------- contacts


def press(rig, steps, wrench=None, effort=None, command=MOVE):
    name = rig.robot.arms[-1].name
    for _ in range(steps):
        extra = {}
        if wrench is not None:
            extra["wrench"] = {name: np.array(wrench, float)}
        if effort is not None:
            extra["effort"] = {name: np.array(effort, float)}
        decision = rig.step(rig.delta(command), replace(rig.measured, **extra))
    return decision


@pytest.mark.parametrize(
    "thresholds, wrench, effort, word",
    [
        ({"force": 20.0}, (0, 0, -25, 0, 0, 0), None, "25.0 N"),
        ({"torque": 2.0}, (0, 0, 0, 0, 3, 0), None, "3.0 N m"),
        ({"force": 20.0}, (np.nan, 0, 0, 0, 0, 0), None, "nan N"),
        ({"effort": np.full(7, 10.0)}, None, (0, 0, -12, 0, 0, 0, 0), "panda_joint3"),
    ],
)
def test_a_contact_stops_and_is_latched(panda, make_rig, thresholds, wrench, effort, word):
    rig = running(make_rig, touching(panda, **thresholds))
    press(rig, 60, wrench, effort)
    decision = rig.step(rig.delta(MOVE))
    assert decision.state == State.STOPPED and word in decision.reason
    assert rig.controller.stops["contact"] == 1
    assert decision.sent  # it holds


@pytest.mark.parametrize("wrench", [(0, 0, 15, 0, 0, 0), (14, 0, 14, 1, 1, 0)])
def test_less_than_the_threshold_or_for_a_moment_is_no_contact(panda, make_rig, wrench):
    rig = running(make_rig, touching(panda, force=20.0, torque=2.0))
    assert press(rig, 30, wrench).state == State.RUNNING
    assert press(rig, 1, (50, 0, 0, 0, 0, 0)).state == State.RUNNING
    assert press(rig, 10, wrench).state == State.RUNNING


def test_an_arm_that_touched_backs_off_along_its_way_inside_the_limits(panda, make_rig):
    rig = make_rig(touching(panda, force=20.0, retreat=0.03))
    down = (0, 0, -0.2 * rig.period, 0, 0, 0)
    for _ in range(60):
        rig.step(rig.delta(down))
    touched = press(rig, 3, (0, 0, 30, 0, 0, 0), command=down).commanded["arm"]
    lowest = rig.history[-1].commanded["arm"][2, 3]
    for _ in range(250):
        decision = rig.step(rig.delta(down))
        lowest = min(lowest, decision.commanded["arm"][2, 3])
    assert decision.state == State.STOPPED
    assert decision.commanded["arm"][2, 3] == pytest.approx(lowest + 0.03, abs=0.006)
    assert np.abs(decision.commanded["arm"][:2, 3] - touched[:2, 3]).max() < 0.005
    assert touched[2, 3] - lowest < 0.03


def test_a_stop_ends_a_retreat(panda, make_rig):
    rig = make_rig(touching(panda, force=20.0, retreat=0.1))
    down = (0, 0, -0.2 * rig.period, 0, 0, 0)
    for _ in range(80):
        rig.step(rig.delta(down))
    press(rig, 30, (0, 0, 30, 0, 0, 0), command=down)
    assert rig.controller.state == State.STOPPING
    rig.controller.stop(1, "button")
    for _ in range(30):
        decision = rig.step()
    assert decision.state == State.STOPPED and decision.sent == {} and decision.stop_category == 1


# ----------------------------------------------------------------------------------------------------- evidence


def test_what_was_not_done_as_asked_is_kept_with_before_and_after(panda, make_rig):
    rig = running(make_rig, panda)
    fast = rig.step(rig.delta([0, 0.02, 0, 0, 0, 0]))
    for _ in range(5):
        fast = rig.step(rig.delta([0, 0.02, 0, 0, 0, 0]))
    (limited,) = [e for e in fast.events if e.kind == "limited"]
    assert limited.arm == "arm" and set(limited.reasons) == set(fast.limited["arm"]) <= set(fast.reasons)
    assert limited.before.shape == limited.after.shape == (7,)
    assert np.abs(limited.before - limited.after).max() > 1e-3
    delta = np.array([9.0, 0, 0, 0, 0, 0])
    (refused,) = [e for e in rig.step(rig.delta(delta)).events if e.kind == "refused"]
    assert refused.reasons == ("jump",) and np.array_equal(refused.before, delta) and refused.after.size == 0
    moving = rig.history[-1].sent["arm"].velocity
    rig.controller.stop(2, "button")
    events = rig.step().events
    (stopped,) = [e for e in events if e.kind == "stopped"]
    assert stopped.text == "button" and np.allclose(stopped.before, moving)
    assert np.linalg.norm(stopped.after) < np.linalg.norm(stopped.before)
    assert [e.reasons for e in events if e.kind == "state"] == [("stopping",)]


def test_a_command_that_is_followed_leaves_no_event(panda, make_rig):
    rig = make_rig(panda)
    rig.step()
    rig.step(rig.delta([0, 1e-4, 0, 0, 0, 0]))
    for _ in range(20):
        decision = rig.step(rig.delta([0, 1e-4, 0, 0, 0, 0]))
        assert decision.events == () and decision.reasons == ()


def test_no_state_is_a_dead_end_and_all_are_reached():
    assert {a for a, _ in TRANSITIONS} == {b for _, b in TRANSITIONS} == set(State)
