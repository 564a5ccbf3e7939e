import re
from dataclasses import replace

import numpy as np
import pytest
from execution_toys import HORIZON, PERIOD, ROBOT, START, Run, ToyPolicy, path
from hypothesis import given, settings
from hypothesis import strategies as st
from vla_core import se3
from vla_execution.chunk import Chunk
from vla_execution.executor import EARLY
from vla_execution.goal import GoalPredictor


class Answers(ToyPolicy):
    """Changes every chunk by `spoil` once it is set."""

    spoil = None

    def infer(self, request, observed, phase):
        chunk = super().infer(request, observed, phase)
        return self.spoil(chunk) if self.spoil else chunk


def spoiled(spoil, begin=1.0, end=3.0, **config):
    run = Run("naive", 0.1, Answers(), **config).until(begin)
    run.policy.spoil = spoil
    return run.until(end)


@pytest.mark.parametrize("spoil, reason", [
    (lambda c: replace(c, arms=("left",)), "arms: expected \\['arm'\\], found \\['left'\\]"),
    (lambda c: replace(c, frame="map"), "frame: expected 'world', found 'map'"),
    (lambda c: c.shifted(c.start - 1.5), "due times: expected actions still to come"),
    (lambda c: c.shifted(c.start + 2.0), "due times: expected the first about now"),
    (lambda c: replace(c, observed=c.observed - 9.0), "age of the observation"),
    (lambda c: replace(c, targets=c.targets + [0.3, *[0] * 7]), "distance of the plan from the goal"),
    (lambda c: replace(c, id=1), "request id"),
    (lambda c: Chunk(0 * c.targets[:, :6], c.start, c.period, "joint", c.arms, id=c.id), "the arms' joints"),
    (lambda c: None, "the policy failed"),
])  # fmt: skip
def test_what_must_not_be_executed_is_refused_and_the_arm_holds(spoil, reason):
    run = spoiled(spoil)
    assert run.refusals and all(re.search(reason, r) for r in run.refusals)
    assert run.executor.reason == run.refusals[-1]
    assert all(run.holds[-50:]) and run.controller.state == "holding"
    assert np.isfinite(run.controller.log).all()


def test_it_goes_on_by_itself_when_the_cause_is_gone():
    run = spoiled(lambda c: replace(c, frame="map"))
    run.policy.spoil = None
    run.until(5.0)
    assert run.executor.reason == "" and not any(run.holds[-50:])


def test_a_refused_chunk_leaves_the_running_plan_alone():
    run = spoiled(lambda c: replace(c, targets=c.targets + [0.3, *[0] * 7]), end=1.5)
    assert run.refusals and not any(run.holds[50:150])


def test_a_chunk_of_an_older_observation_does_not_replace_the_running_one():
    run = Run("naive", 0.1).until(1.0)
    running = run.executor.strategy.chunk
    old = ToyPolicy().infer(run.requests[-1], running.observed - 0.2, running.observed - 0.2)
    assert "older than" in run.executor.on_chunk(replace(old, id=0), run.now)
    assert run.executor.strategy.chunk is running


def test_deltas_stay_exact_whatever_the_controller_takes_late():
    run = Run("naive", 0.1)

    class Late:
        queue: list = []

    take = run.controller.step
    run.controller.step = lambda c: (Late.queue.append(c), take(Late.queue.pop(0)) if len(Late.queue) > 4 else None)
    run.until(3.0)
    np.testing.assert_allclose(run.controller.log[-1][:3], path(run.phase(3.0 - 0.01 - 0.06))[:3], atol=1e-3)
    steps = np.linalg.norm(run.steps[60:], axis=1)
    assert steps.max() < 0.0015  # no overshoot, no catching up


def test_a_goal_that_the_controller_pulled_back_is_noticed():
    run = Run("naive", 0.1).until(1.0)
    run.controller.goal[0, 3] -= 0.03
    run.until(2.0)
    np.testing.assert_allclose(run.controller.log[-1][:3], path(run.phase(1.98))[:3], atol=1.5e-3)


def test_a_goal_torn_far_away_drops_the_plan():
    run = Run("naive", 0.1).until(1.0)
    run.policy = None
    run.controller.goal[0, 3] -= 0.3
    run.until(1.1)
    assert "distance of the plan from the goal" in run.executor.reason and run.holds[-1]


@pytest.mark.parametrize("state", ["disarmed", "stopped", "fault"])
def test_nothing_is_sent_or_asked_while_the_controller_is_not_ready(state):
    run = Run("naive", 0.1).until(1.0)
    run.controller.state = state
    asked = len(run.requests)
    run.tick()
    command = run.executor.tick(run.now, run.controller.status(run.now))
    assert command is None and run.executor.strategy.chunk is None
    run.until(2.0)
    assert len(run.requests) == asked and state in run.executor.reason
    run.controller.state = "holding"
    run.until(3.0)
    assert run.controller.state == "running" and run.executor.reason == ""


def test_a_plan_waits_while_the_controller_brakes():
    run = Run("naive", 0.1).until(1.0)
    run.controller.state = "stopping"
    run.tick()
    assert run.holds[-1] and run.executor.strategy.chunk is not None


def test_nothing_is_sent_without_a_fresh_status():
    run = Run("naive", 0.1).until(1.0)
    status = run.controller.status(run.now)
    assert run.executor.tick(run.now + 0.2, status) is not None
    assert run.executor.tick(run.now + 0.4, status) is None
    assert run.executor.tick(run.now + 0.4, None) is None
    assert run.executor.reason == "no safety status"


def test_nothing_is_sent_before_the_first_chunk():
    run = Run("naive", 0.5).until(0.4)
    assert run.controller.commands == [] and run.executor.metrics.empty_ticks == 0


def test_a_clock_set_back_starts_over():
    run = Run("naive", 0.1).until(2.0)
    run.now, run.pending = 0.0, []
    run.controller.goal = se3.pose_to_matrix(START[:7])
    run.tick()
    assert run.executor.strategy.chunk is None
    run.until(1.0)
    assert run.executor.metrics.chunks > 0 and not any(run.holds[-20:])


def test_an_answer_from_before_the_reset_is_refused():
    run = Run("naive", 0.5).until(0.3)
    chunk = run.pending[0][1]
    run.executor.reset(run.now)
    run.executor.tick(run.now, run.controller.status(run.now))
    assert "older request" in run.executor.on_chunk(chunk, run.now)
    assert "before it" in run.executor.on_chunk(replace(chunk, id=0), run.now)


def test_warm_up_does_not_count_as_delay():
    run = Run("naive", 0.1)
    run.executor.tick(0.5, run.controller.status(0.5))
    request = run.executor.poll_request(0.5)
    chunk = run.policy.infer(request, 0.0, 0.0)
    assert run.executor.on_chunk(chunk, 0.5, warm_up=True) == ""
    assert run.executor.delays.seconds is None


def test_a_policy_without_the_guidance_is_asked_for_nothing():
    run = Run("rtc_guided", 0.1)
    run.executor.on_policy("act", PERIOD, HORIZON, ())
    run.until(0.5)
    assert run.requests == []
    assert run.executor.reason == (
        "strategy rtc_guided: expected a policy that supports 'guided', found 'act', which supports no guidance"
    )
    run.executor.on_policy("flow", PERIOD, HORIZON, ("guided", "prefix"))
    run.until(1.0)
    assert run.controller.state == "running" and run.executor.reason == ""


def test_after_a_change_of_policy_the_first_request_carries_no_remainder():
    run = Run("rtc_guided", 0.1, Answers())

    def switch(name):
        run.policy.spoil = lambda chunk: replace(chunk, policy=name)
        run.executor.on_policy(name, PERIOD, HORIZON, ("guided",))

    switch("one")
    run.until(1.0)
    switch("two")
    count = len(run.requests)
    run.until(2.0)
    assert run.requests[count].plan.guidance == "" and run.requests[count + 1].plan.guidance == "guided"


def test_joint_plans_are_absolute_goals_within_the_joints_speed():
    home = Run("naive").controller.joints

    class Joints(ToyPolicy):
        def infer(self, request, observed, phase):
            t = phase + PERIOD * np.arange(HORIZON)
            targets = np.concatenate([home + 0.1 * np.sin(t)[:, None], np.ones((HORIZON, 1))], axis=1)
            targets[t > 1.0, 0] += 0.1
            return Chunk(targets, observed, PERIOD, "joint", ("arm",), id=request.id)

    run = Run("linear_blend", 0.1, Joints())
    run.controller.goal = run.executor._kinematics.forward("arm", home)
    joints = []
    for _ in range(150):
        run.tick()
        joints.append(run.controller.joints)
        run.controller.goal = run.executor._kinematics.forward("arm", run.controller.joints)
    assert np.abs(np.diff(joints, axis=0)).max() <= 2.61 * 0.01 + 1e-9
    np.testing.assert_allclose(joints[-1][1:], home[1:] + 0.1 * np.sin(run.phase(1.48)), atol=1e-3)
    assert run.executor.metrics.boundary_translation and not run.refusals


def test_a_hold_that_cut_a_motion_short_is_waited_for():
    run = Run("naive", 0.1).until(0.5)
    status = run.controller.status(0.5)
    goals = GoalPredictor("executor")
    goals.record(status.sequence + 1, 0.5, {"arm": np.array([0.01, 0, 0, 0, 0, 0])}, {})
    moved = goals.predict(status, 0.5)["arm"].goal
    np.testing.assert_allclose(moved[0, 3] - status.arms["arm"].goal[0, 3], 0.01)
    goals.record(status.sequence + 2, 0.5, None, {})
    assert goals.predict(status, 0.5) is None
    assert goals.predict(replace(status, sequence=status.sequence + 1), 0.5) is not None


def test_a_lost_command_is_given_up():
    run = Run("naive", 0.1).until(0.5)
    status = run.controller.status(0.5)
    goals = GoalPredictor("executor")
    goals.record(status.sequence + 1, 0.5, {"arm": np.array([0.01, 0, 0, 0, 0, 0])}, {})
    np.testing.assert_array_equal(goals.predict(status, 0.8)["arm"].goal, status.arms["arm"].goal)


@settings(max_examples=30)
@given(st.lists(st.floats(0.0, 0.01), min_size=1, max_size=40), st.sampled_from([PERIOD, 0.12]))
def test_early_ticks_split_control_periods_and_change_nothing_else(offsets, delay):
    """Chunks that come between two ticks get a command at once: the periods of all add up, none is too fast."""
    run = Run("naive", delay, ToyPolicy(spread=0.01)).until(1.0)
    control, limits = run.executor.period, ROBOT.arms[0].tool_limits
    early = 0
    for offset in offsets:
        begin = run.now
        run.tick()
        commands = [run.controller._late]
        now = begin + offset
        running = run.executor.strategy.chunk
        new = ToyPolicy(seed=early).infer(run.requests[-1], running.observed + 1e-6, run.phase(running.observed))
        assert run.executor.on_chunk(replace(new, id=0), now) == ""
        command = run.executor.tick_early(now, run.controller.status(now))
        if command is not None:
            early += 1
            commands.append(command)
            run.controller.step(command)
            assert control * EARLY[0] <= command.period == pytest.approx(offset)
            # A second chunk in the same period is split off from what is left.
            assert run.executor.tick_early(now, run.controller.status(now)) is None
        for each in commands:
            assert np.linalg.norm(each.arms["arm"].delta[:3]) <= limits.speed * each.period * (1 + 1e-9)
        run.tick()
        rest = run.controller._late
        spent = command.period if command else 0.0
        assert rest.period + spent == pytest.approx(control)
        assert rest.sequence == commands[-1].sequence + 1
    # At the very ends of the range rounding decides.
    low, high = control * EARLY[0] * (1 + 1e-6), control * (1 - EARLY[1]) * (1 - 1e-6)
    assert early or not any(low < o < high for o in offsets)


def test_nothing_is_sent_early_without_a_plan_a_tick_or_an_armed_controller():
    run = Run("naive", 0.1)
    assert run.executor.tick_early(0.005, run.controller.status(0.0)) is None
    run.until(1.0)
    run.controller.state = "stopped"
    run.executor.tick(run.now, run.controller.status(run.now))
    assert run.executor.tick_early(run.now + 0.005, run.controller.status(run.now)) is None
