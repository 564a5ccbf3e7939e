"""The whole graph as real processes: the policy drives, is switched, dies and comes back; the clock jumps."""

import signal

import numpy as np
import pytest
from vla_core.robot import load_robot
from vla_core.time import seconds
from vla_msgs.msg import SafetyStatus
from vla_msgs.srv import LoadPolicy, ResetWorld, StartEpisode, StopEpisode, SwitchPolicy
from vla_teleop import bags

RUNNING, HOLDING = SafetyStatus.RUNNING, SafetyStatus.HOLDING


def check_limits(statuses) -> None:
    """The commanded joints keep their limits of position, velocity and acceleration from period to period."""
    statuses = list(statuses)  # a listener's grows meanwhile
    robot = load_robot("panda")
    limits, period = robot.arms[0].limits, 1.0 / robot.rates.control
    times = np.array([seconds(s.header.stamp) for s in statuses])
    joints = np.array([s.arms[0].joints for s in statuses])
    velocity = np.array([s.arms[0].velocity for s in statuses])
    assert np.isfinite(joints).all() and np.isfinite(velocity).all()
    assert (joints >= limits.lower).all() and (joints <= limits.upper).all()
    assert (np.abs(velocity) <= limits.velocity + 1e-9).all()
    following = np.isclose(np.diff(times), period, rtol=1e-3)  # on a busy machine some periods are missed
    assert following.sum() > 5
    acceleration = np.diff(velocity, axis=0)[following] / period
    assert (np.abs(acceleration) <= limits.acceleration * 1.001).all()
    np.testing.assert_allclose(np.diff(joints, axis=0)[following], velocity[1:][following] * period, atol=1e-6)


def test_the_policy_moves_the_arm(graph):
    start = graph.tool()
    graph.passed(1.5)
    step = graph.tool() - start
    assert 0.01 < step[1] < 0.08 and abs(step[0]) < 0.02 and abs(step[2]) < 0.02
    assert {c.policy for c in graph.chunks} == {"left"} and not any(c.error for c in graph.chunks)
    assert {t.stage for t in graph.chunks[-1].timings} >= {"preprocess", "encode", "sample", "decode", "total"}
    check_limits(graph.safety)


def test_a_second_policy_takes_over_without_a_stop(graph, policies):
    answer = graph.call(LoadPolicy, "/policy/load", LoadPolicy.Request(policy=str(policies / "right")))
    assert answer.success, answer.message
    assert graph.policy.active == "left"
    graph.begin()  # back from where the first has driven meanwhile
    try:
        assert graph.call(SwitchPolicy, "/policy/switch", SwitchPolicy.Request(policy="right")).success
        graph.until(lambda: graph.chunks and graph.chunks[-1].policy == "right", "chunks of the second policy")
        graph.until(lambda: graph.tool()[1] < max(graph.tool(s)[1] for s in graph.safety) - 0.01, "the arm turns back")
        running = [s.state for s in graph.safety]
        assert set(running[running.index(RUNNING) :]) == {RUNNING}
        check_limits(graph.safety)
    finally:
        assert graph.call(SwitchPolicy, "/policy/switch", SwitchPolicy.Request(policy="left")).success
    assert [c.policy for c in graph.chunks] == sorted(c.policy for c in graph.chunks)


def test_a_switch_to_a_policy_that_is_not_loaded_is_refused(graph):
    answer = graph.call(SwitchPolicy, "/policy/switch", SwitchPolicy.Request(policy="middle"))
    assert not answer.success and "'middle'" in answer.message and "'left'" in answer.message
    graph.moved()


def test_a_policy_killed_in_motion_leaves_the_arm_braking_and_drives_again_when_it_is_back(graph, tmp_path):
    with graph.recorder(tmp_path):
        bag = graph.call(StartEpisode, "/recorder/start").bag
        graph.passed(0.5)
        assert graph.stop("policy_node", signal.SIGKILL) == -signal.SIGKILL
        graph.holds()
        assert graph.call(StopEpisode, "/recorder/stop").success
    recorded = [message for _, _, message in bags.messages(bag, ["/safety_status"])]
    assert recorded[0].state == RUNNING and recorded[-1].state == HOLDING
    assert not np.any(recorded[-1].arms[0].velocity)
    check_limits(recorded)
    graph.start("policy_node")
    graph.recovers("policy_node")
    graph.moved()


def test_a_world_reset_in_motion_is_survived(graph):
    graph.passed(1.0)
    graph.forget()
    assert graph.call(ResetWorld, "/world/reset", ResetWorld.Request(seed=5)).success
    graph.passed(1.0)
    graph.until(lambda: graph.state == RUNNING, "the arm moves under the policy")
    graph.moved()
    check_limits(graph.safety)


def test_a_clock_that_is_set_back_makes_the_arm_hold_and_go_on(graph):
    graph.passed(1.0)
    before = graph.now
    assert graph.stop("mujoco_node") == 0
    graph.start("mujoco_node")
    graph.until(lambda: graph.now < before, "the clock goes back")
    graph.until(lambda: any("clock jumped" in s.reason for s in graph.safety), "the controller says so")
    graph.until(lambda: graph.state == RUNNING, "the arm moves again by itself")
    graph.moved()
    warned = [text for node, text in graph.warnings if node == "chunk_executor"]
    assert any("the clock was set back" in text for text in warned)
    again = next(k for k, s in enumerate(graph.safety) if seconds(s.header.stamp) < before)
    check_limits(graph.safety[again:])


@pytest.mark.parametrize("name", ["observation_node", "chunk_executor"])
def test_a_node_killed_in_motion_is_replaced(graph, name):
    graph.stop(name, signal.SIGKILL)
    graph.holds()
    check_limits(graph.safety)
    graph.start(name)
    graph.recovers(name)
    graph.moved()
