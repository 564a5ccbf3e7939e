"""Arming, stopping, holding: what is sent in which state, and what leads from one to another."""

import numpy as np
import pytest
from vla_control.command import CommandRefused
from vla_control.safety import Measured, SafetyController, SafetyLimits, State

MOVE = (0, 2e-3, 0, 0, 0, 0.005)


def running(make_rig, robot, **fields):
    rig = make_rig(robot, **fields)
    for _ in range(40):
        rig.step(rig.delta(MOVE))
    assert rig.history[-1].state == State.RUNNING
    return rig


def speed(rig):
    return max(np.abs(t.velocity).max() for t in rig.history[-1].sent.values())


def until_rest(rig, state, **step):
    """Step until `state`; braking may take no longer than the slowest joint needs."""
    longest = max((a.limits.velocity / a.limits.acceleration).max() for a in rig.robot.arms)
    for _ in range(int(longest / rig.period) + 5):  # and a few for the average
        if rig.step(**step).state == state:
            return rig.history[-1]
    raise AssertionError(f"still {rig.history[-1].state.name}")


def test_nothing_is_sent_until_armed(robot, make_rig):
    rig = make_rig(robot, armed=False)
    for _ in range(20):
        decision = rig.step(rig.delta(MOVE))
        assert decision.state == State.DISARMED
        assert decision.sent == {}
        assert decision.refused.startswith("state")


def test_armed_it_holds_where_the_robot_is(robot, make_rig):
    start = {a.name: a.home + 0.1 for a in robot.arms}
    rig = make_rig(robot, start=start)
    decision = rig.idle(20)
    assert decision.state == State.ARMED
    for name, q in start.items():
        assert np.array_equal(decision.sent[name].position, q)


@pytest.mark.parametrize("bad", [{}, {"arm": np.full(7, np.nan)}, {"arm": np.zeros(6)}])
def test_arming_without_sound_joint_states_is_refused(panda, bad):
    controller = SafetyController(panda)
    with pytest.raises(CommandRefused, match="joint_states"):
        controller.arm(Measured(0.0, bad))
    assert controller.state == State.DISARMED


def test_arming_a_moving_robot_is_refused(panda, make_rig):
    rig = running(make_rig, panda)
    with pytest.raises(CommandRefused, match="at rest"):
        rig.controller.arm(rig.measured)
    assert rig.step(rig.delta(MOVE)).state == State.RUNNING


def test_silence_brakes_both_arms_within_a_period_of_the_time_out(robot, make_rig):
    rig = running(make_rig, robot)
    last = rig.now - rig.period
    while rig.step().state == State.RUNNING:
        assert rig.now - last <= rig.controller.limits.command_timeout + 1.5 * rig.period
    assert "stale command" in rig.history[-1].reason
    decision = until_rest(rig, State.HOLDING)
    assert all(not t.velocity.any() for t in decision.sent.values())
    assert np.array_equal(decision.goal[robot.arms[0].name], decision.commanded[robot.arms[0].name])


def test_after_a_hold_a_new_command_resumes_without_a_step(robot, make_rig):
    rig = running(make_rig, robot)
    rig.idle(100)
    before = {a.name: rig.position[a.name].copy() for a in robot.arms}
    decision = rig.step(rig.delta(MOVE))
    assert decision.state == State.RUNNING
    for name, q in before.items():
        assert np.abs(decision.sent[name].position - q).max() < 0.01


def test_a_command_while_braking_resumes(panda, make_rig):
    rig = running(make_rig, panda)
    rig.step(rig.command({}, hold=True))
    assert rig.history[-1].state == State.STOPPING
    goal = rig.history[-1].goal["arm"]
    decision = rig.step(rig.delta(MOVE))
    assert decision.state == State.RUNNING
    assert decision.goal["arm"][1, 3] == pytest.approx(goal[1, 3] + MOVE[1], abs=1e-9)


def test_hold_brakes_and_stays(robot, make_rig):
    rig = running(make_rig, robot)
    rig.step(rig.command({}, hold=True))
    decision = until_rest(rig, State.HOLDING)
    assert "asks to hold" in decision.reason
    held = {n: t.position for n, t in decision.sent.items()}
    rig.idle(20)
    assert all(np.array_equal(rig.position[n], q) for n, q in held.items())


def test_an_emergency_stop_brakes_and_is_latched(robot, make_rig):
    rig = running(make_rig, robot)
    rig.controller.stop(2, "button")
    until_rest(rig, State.STOPPED)
    for _ in range(20):
        decision = rig.step(rig.delta(MOVE))
        assert decision.state == State.STOPPED
        assert decision.reason == "button"
        assert decision.sent  # holds
    rig.arm()
    assert rig.step(rig.delta(MOVE)).state == State.RUNNING


def test_both_arms_come_to_rest_in_one_stop(aloha, make_rig):
    rig = running(make_rig, aloha)
    rig.controller.stop(2, "button")
    while rig.step().state == State.STOPPING:
        pass
    assert rig.history[-1].state == State.STOPPED
    assert speed(rig) == 0.0


def test_category_1_brakes_then_falls_silent(panda, make_rig):
    rig = running(make_rig, panda)
    rig.controller.stop(1, "button")
    assert rig.step().sent
    assert until_rest(rig, State.STOPPED).sent == {}
    assert rig.idle(5).sent == {}


def test_category_0_is_silent_at_once(panda, make_rig):
    rig = running(make_rig, panda)
    rig.controller.stop(0, "button")
    decision = rig.step(rig.delta(MOVE))
    assert decision.state == State.STOPPED
    assert decision.sent == {}


@pytest.mark.parametrize("first, second", [(0, 2), (0, 1), (1, 2), (2, 0), (2, 1)])
def test_a_stop_is_never_undone_by_another(panda, make_rig, first, second):
    rig = running(make_rig, panda)
    rig.controller.stop(first, "first")
    rig.idle(100)
    rig.controller.stop(second, "second")
    decision = rig.step()
    assert decision.state == State.STOPPED
    assert decision.sent == {}
    assert decision.reason == "first"


def test_a_stop_while_disarmed_is_latched_and_silent(panda, make_rig):
    rig = make_rig(panda, armed=False)
    rig.controller.stop(2, "button")
    assert rig.step().state == State.STOPPED
    assert rig.history[-1].sent == {}
    rig.arm()
    assert rig.step().sent


def test_an_unknown_category_is_refused(panda):
    with pytest.raises(ValueError, match="expected 0, 1 or 2, found 3"):
        SafetyController(panda).stop(3, "")


def test_disarming_brakes_first(robot, make_rig):
    rig = running(make_rig, robot)
    rig.controller.disarm()
    assert rig.step().state == State.STOPPING
    assert until_rest(rig, State.DISARMED).sent == {}


def test_an_emergency_stop_outranks_a_hold_and_a_disarm(panda, make_rig):
    rig = running(make_rig, panda)
    rig.controller.disarm()
    rig.step()
    rig.controller.stop(2, "button")
    rig.controller.disarm()
    until_rest(rig, State.STOPPED)


def test_armed_again_after_being_moved_by_hand_it_starts_where_it_is(robot, make_rig):
    rng = np.random.default_rng(0)
    for _ in range(10):
        rig = running(make_rig, robot)
        rig.controller.stop(2, "button")
        until_rest(rig, State.STOPPED)
        for arm in robot.arms:
            rig.position[arm.name] = arm.home + rng.uniform(-0.15, 0.15, len(arm.joints))
        measured = {n: q.copy() for n, q in rig.position.items()}
        rig.arm()
        decision = rig.step(rig.delta(MOVE))
        for name, q in measured.items():
            assert np.array_equal(decision.sent[name].position, q)
        assert rig.step(rig.delta(MOVE)).state == State.RUNNING


@pytest.mark.parametrize("trouble", ["none", "old", "nan", "missing"])
def test_bad_joint_states_hold_and_good_ones_resume(panda, make_rig, trouble):
    rig = running(make_rig, panda)
    for _ in range(60):
        bad = {
            "none": None,
            "old": Measured(rig.now - 0.3, rig.position),
            "nan": Measured(rig.now, {"arm": np.full(7, np.nan)}),
            "missing": Measured(rig.now, {}),
        }[trouble]
        rig.step(rig.delta(MOVE), bad)
    assert rig.history[-1].state == State.HOLDING
    assert rig.history[-1].refused.startswith("joint_states")
    assert rig.step(rig.delta(MOVE)).state == State.RUNNING


@pytest.mark.parametrize("jump", [-5.0, -0.05, 0.8, 100.0])
def test_a_clock_jump_holds_and_then_resumes(robot, make_rig, jump):
    rig = running(make_rig, robot)
    rig.ticks += round(jump / rig.period)
    assert rig.step().state == State.STOPPING
    assert "clock jumped" in rig.history[-1].reason
    until_rest(rig, State.HOLDING)
    assert rig.step(rig.delta(MOVE)).state == State.RUNNING


@pytest.mark.parametrize("silence", [0.12, 3.0])
def test_a_clock_jump_is_told_to_who_holds_or_brakes_already(panda, make_rig, silence):
    rig = running(make_rig, panda)
    for _ in range(round(silence / rig.period)):
        rig.step()
    assert "stale command" in rig.history[-1].reason
    rig.ticks -= 1000
    rig.step()
    assert "clock jumped" in rig.history[-1].reason
    until_rest(rig, State.HOLDING)
    assert "clock jumped" in rig.history[-1].reason
    assert rig.step(rig.delta(MOVE)).state == State.RUNNING


def test_a_joint_that_stays_behind_stops_all_arms(robot, make_rig):
    rig = running(make_rig, robot)
    name = robot.arms[-1].name
    away = robot.arm(name).limits.tracking[1] + 0.05

    def measured():
        return Measured(rig.now, rig.position | {name: rig.position[name] + away * np.eye(len(rig.position[name]))[1]})

    for _ in range(int(rig.controller.limits.tracking_time / rig.period) - 1):
        assert rig.step(rig.delta(MOVE), measured()).state == State.RUNNING
    for _ in range(100):
        rig.step(rig.delta(MOVE), measured())
    assert rig.history[-1].state == State.STOPPED
    assert robot.arm(name).joints[1] in rig.history[-1].reason


def test_a_tenth_of_a_second_of_lag_is_no_tracking_error(panda, make_rig):
    rig = make_rig(panda)
    goal, past = panda.arm("arm").home.copy(), [panda.arm("arm").home] * 10
    for k in range(200):
        goal[6] = 0.7854 + 0.9 * np.sin(2.0 * k * rig.period)
        decision = rig.step(rig.joints(goal), Measured(rig.now, {"arm": past.pop(0)}))
        past.append(decision.sent["arm"].position)
        assert decision.state == State.RUNNING


def test_commands_out_of_order_are_refused(panda, make_rig):
    rig = running(make_rig, panda)
    for sequence in (1, 40):
        assert rig.step(rig.delta(MOVE, sequence=sequence)).refused.startswith("order")
    assert rig.step(rig.delta(MOVE)).refused == ""


def test_a_sender_that_was_started_again_is_heard(panda, make_rig):
    rig = running(make_rig, panda)
    rig.idle(12)
    assert rig.step(rig.delta(MOVE, sequence=1)).refused == ""
    assert rig.history[-1].sequence == 1


def test_a_refused_command_moves_no_arm(aloha, make_rig):
    rig = make_rig(aloha)
    part = rig.delta(MOVE).arms["left"]
    bad = rig.command({"left": part, "right": type(part)(delta=np.full(6, np.nan))})
    for _ in range(10):
        decision = rig.step(bad)
        assert decision.refused.startswith("not_finite")
        assert decision.state == State.ARMED
    assert speed(rig) == 0.0
    assert rig.controller.refusals["not_finite"] == 10


@pytest.mark.parametrize("delta", [(0.5, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 2.0)])
def test_a_jump_is_refused(panda, make_rig, delta):
    rig = running(make_rig, panda)
    assert rig.step(rig.delta(delta)).refused.startswith("jump")


def test_a_joint_jump_is_refused(panda, make_rig):
    rig = make_rig(panda)
    goal = panda.arm("arm").home.copy()
    goal[4] += 0.6
    assert "panda_joint5" in rig.step(rig.joints(goal)).refused
    assert rig.history[-1].state == State.ARMED


@pytest.mark.parametrize("age", [0.3, -0.3])
def test_a_command_of_another_time_is_refused(panda, make_rig, age):
    rig = make_rig(panda)
    assert rig.step(rig.delta(MOVE, age=age)).refused.startswith("stale")


def test_without_a_solution_all_arms_stop(aloha, make_rig, monkeypatch):
    rig = running(make_rig, aloha)
    monkeypatch.setattr("vla_control.ik.daqp.solve", lambda *_: (np.full(6, np.nan), 0.0, -1, {}))
    rig.step(rig.delta(MOVE))
    assert rig.controller.limitations["unsolved"] == 2
    decision = until_rest(rig, State.FAULT)
    assert "no joint velocities" in decision.reason


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_limit_that_makes_no_sense_is_refused(value):
    with pytest.raises(ValueError, match="command_timeout: expected a number above zero"):
        SafetyLimits(command_timeout=value)
