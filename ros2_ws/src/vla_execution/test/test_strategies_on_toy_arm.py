from dataclasses import replace

import numpy as np
import pytest
from execution_toys import HORIZON, PERIOD, START, Run, ToyPolicy, path
from hypothesis import given, settings
from hypothesis import strategies as st
from vla_execution.strategies import STRATEGIES, ExecutionConfig, StrategyError, make_strategy

ASYNCHRONOUS = [name for name in STRATEGIES if name != "synchronous"]
DELAYS = [0.0, 0.1, 0.4]


@pytest.mark.parametrize("strategy", ASYNCHRONOUS)
@pytest.mark.parametrize("delay", DELAYS)
def test_a_policy_of_one_mind_is_followed_without_steps_or_gaps(strategy, delay):
    run = Run(strategy, delay).until(4.0)
    assert not run.refusals
    assert run.executor.metrics.empty_ticks == 0
    settled = np.array(run.controller.log)[100:]
    wanted = np.array([path(run.phase(0.01 * (k - 1))) for k in range(100, 400)])
    np.testing.assert_allclose(settled[:, :3], wanted[:, :3], atol=1.5e-3)
    assert max(run.executor.metrics.boundary_translation[1:]) < 1e-3


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_the_gripper_changes_once_and_only_between_its_decisions(strategy):
    run = Run(strategy, 0.1).until(6.0)
    openings = np.array(run.controller.log)[:, 7]
    assert set(openings) == {0.0, 1.0}
    assert np.count_nonzero(np.diff(openings)) == 1


@pytest.mark.parametrize("strategy", ["rtc_guided", "rtc_trained"])
@settings(max_examples=8, deadline=None)
@given(delay=st.floats(0.0, 0.4), age=st.floats(0.0, 0.08), seed=st.integers(0, 99))
def test_rtc_joins_chunks_of_a_policy_of_two_minds(strategy, delay, age, seed):
    spread = 0.02
    rtc = Run(strategy, delay, ToyPolicy(spread=spread, seed=seed), observation_age=age).until(3.0)
    steps = rtc.executor.metrics.boundary_translation[2:]
    assert not rtc.refusals and rtc.executor.metrics.empty_ticks == 0
    assert max(steps) < 0.5 * 2 * spread


def test_naive_jumps_by_what_the_policy_changed_its_mind():
    run = Run("naive", 0.2, ToyPolicy(spread=0.02)).until(4.0)
    assert max(run.executor.metrics.boundary_translation) == pytest.approx(0.04, abs=2e-3)


def test_linear_blend_has_no_step_at_the_boundary():
    run = Run("linear_blend", 0.2, ToyPolicy(spread=0.02), blend_window=0.3).until(4.0)
    assert max(run.executor.metrics.boundary_translation[1:]) < 1e-6
    assert np.linalg.norm(run.steps[60:], axis=1).max() < 0.04 / 0.3 * 0.01 + 0.002


def test_temporal_ensemble_asks_as_fast_as_answers_come_and_averages():
    run = Run("temporal_ensemble", 0.1, ToyPolicy(spread=0.01)).until(3.0)
    assert len(run.requests) >= 3.0 / 0.12
    assert max(run.executor.metrics.boundary_translation[20:]) < 0.006


def test_synchronous_stands_still_while_the_policy_thinks():
    run = Run("synchronous", 0.3, execution_horizon=6).until(4.0)
    holds = np.array(run.holds)
    for request in run.requests[1:]:
        thinking = slice(round(request.stamp * 100), round(request.stamp * 100) + 30)
        assert holds[thinking].all()
    # Each chunk moves for its six steps, from its first action on.
    moving = np.diff(np.flatnonzero(np.diff(np.concatenate([[1], holds, [1]]))))[::2]
    assert set(moving[:-1]) == {31}
    assert run.executor.metrics.empty_ticks > 100


class Remembering(ToyPolicy):
    """Keeps what it answered."""

    def __init__(self):
        super().__init__()
        self.chunks = []

    def infer(self, request, observed, phase):
        self.chunks.append(super().infer(request, observed, phase))
        return self.chunks[-1]


def until_chunk(run, number):
    """Run to the tick that put chunk `number` in force; its time (s)."""
    while run.executor.metrics.chunks < number:
        run.tick()
    return round(run.now - 0.01, 9)


@settings(max_examples=8, deadline=None)
@given(delay=st.floats(0.0, 0.4), age=st.floats(0.0, 0.1))
def test_exactly_the_actions_that_fell_due_meanwhile_are_dropped(delay, age):
    """The first command of a chunk leads to where the chunk wants the arm now, not to its first action."""
    run = Run("naive", delay, Remembering(), observation_age=age)
    now = until_chunk(run, 3)
    chunk = run.policy.chunks[2]
    np.testing.assert_allclose(run.executor.strategy.target(now), chunk.at(now), atol=1e-12)
    assert run.executor.metrics.delay[2] == pytest.approx(now - chunk.observed, abs=1e-9)
    # Arrivals are seen at the next tick.
    assert 0 <= now - (chunk.observed + age + delay) < 0.011


@settings(max_examples=8, deadline=None)
@given(delay=st.floats(0.0, 1.2), age=st.floats(0.0, 0.1))
def test_from_rest_a_chunk_begins_with_its_first_action(delay, age):
    """Nothing was consumed while the arm stood still, however long the policy thought."""
    run = Run("naive", delay, Remembering(), observation_age=age)
    now = until_chunk(run, 1)
    np.testing.assert_allclose(run.executor.strategy.target(now), run.policy.chunks[0].targets[0], atol=1e-12)


def test_after_a_gap_the_plan_goes_on_where_execution_ended():
    run = Run("naive", lambda number: 0.1 if number < 3 else 0.9, Remembering())
    now = until_chunk(run, 3)
    still = sum(run.holds[round(run.requests[2].stamp * 100) :])
    assert still > 10
    consumed = now - run.policy.chunks[2].observed - 0.01 * (still - 1)
    expected = run.policy.chunks[2].at(run.policy.chunks[2].start + consumed)
    np.testing.assert_allclose(run.executor.strategy.target(now)[:3], expected[:3], atol=1e-3)


def test_the_request_states_the_measured_delay_from_the_observation():
    run = Run("rtc_guided", 0.17, observation_age=0.05).until(2.0)
    assert {r.plan.delay for r in run.requests[2:]} == {7}  # 0.22 s in steps of 0.05 s, and the two that shape the way


def test_the_next_inference_starts_after_the_execution_horizon():
    run = Run("rtc_guided", 0.05, execution_horizon=8, observation_age=0.0).until(3.0)
    gaps = np.diff([r.stamp for r in run.requests[1:]])
    np.testing.assert_allclose(gaps, 8 * PERIOD, atol=0.011)


def test_a_delay_beyond_the_horizon_is_asked_about_early_enough():
    run = Run("rtc_guided", 0.45, execution_horizon=18, observation_age=0.0).until(5.0)
    assert run.executor.metrics.empty_ticks == 0
    assert all(r.plan.delay + r.plan.execution_horizon <= HORIZON for r in run.requests[1:])


def test_remainder_reaches_from_before_the_request_to_the_end_of_the_plan():
    run = Run("rtc_guided", 0.1).until(2.0)
    for request in run.requests[2:]:
        rest = request.plan.remainder
        assert rest.start <= request.stamp - 0.25
        assert rest.end > request.stamp + 0.3
        assert rest.period == PERIOD
    assert run.requests[0].plan.remainder is None


def test_jittering_delays_leave_no_gap():
    rng = np.random.default_rng(3)
    run = Run("rtc_guided", lambda number: rng.uniform(0.05, 0.35)).until(6.0)
    assert run.executor.metrics.empty_ticks == 0


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_no_step_exceeds_the_speed_limit_of_the_tool(strategy):
    run = Run(strategy, 0.2, ToyPolicy(spread=0.05, seed=1)).until(4.0)
    assert np.linalg.norm(run.steps, axis=1).max() <= 0.6 * 0.01 + 1e-9
    if strategy == "naive":
        assert run.executor.metrics.limited_ticks > 0


@pytest.mark.parametrize("strategy", ["rtc_guided", "rtc_trained"])
def test_a_policy_that_continues_the_plan_exactly_leaves_no_boundary_step(strategy):
    """Remainder, delay and due times fit together: on a straight way, which sampling keeps, nothing is left over."""

    def straight(time):
        x = START.copy()
        x[0] += 0.02 * time
        return x

    class Stubborn(ToyPolicy):
        """Beyond the remainder it wants something else, so that an entry one step off would show."""

        def infer(self, request, observed, phase):
            rest = request.plan.remainder
            self.way = straight
            chunk = super().infer(request, observed, phase)
            if rest is None:
                return chunk
            targets = chunk.targets.copy()
            times = phase + PERIOD * np.arange(HORIZON)
            targets[: request.plan.delay, 0] = START[0] + 0.02 * times[: request.plan.delay]
            targets[request.plan.delay :, 2] += 0.01
            return replace(chunk, targets=targets)

    run = Run(strategy, 0.13, Stubborn(), observation_age=0.033).until(1.1)
    first = run.executor.metrics
    assert first.chunks >= 3
    assert first.boundary_translation[0] < 1e-9


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_policy_that_dies_leaves_the_arm_holding_and_its_return_moves_it_again(strategy):
    dead = (1.0, 3.0)
    policy = ToyPolicy()
    run = Run(strategy, 0.1, policy, request_timeout=0.3)
    run.delay = lambda number: 0.1 if not dead[0] < run.now < dead[1] else None
    run.until(3.0)
    log = np.array(run.controller.log)
    assert np.array_equal(log[-20, :7], log[-1, :7])
    assert run.controller.state == "holding"
    run.until(4.0)
    assert run.controller.state == "running" or strategy == "synchronous"
    assert np.linalg.norm(np.array(run.controller.log)[-1, :3] - log[-1, :3]) > 0.005


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_policy_that_runs_free_is_executed_too(strategy):
    run = Run(strategy, policy=None)
    policy = ToyPolicy()

    class Free:
        id = 0
        plan = make_strategy("naive").request(0.0, None)

    for k in range(300):
        if k % 20 == 0:
            run.pending.append((run.now + 0.1, policy.infer(Free, run.now, run.phase(run.now))))
        run.tick()
    assert run.executor.metrics.chunks >= (2 if strategy == "synchronous" else 10)
    assert np.abs(np.array(run.controller.log)[-1, :3] - START[:3]).max() > 0.01


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_is_found_by_name(name):
    assert type(make_strategy(name)) is STRATEGIES[name]


def test_an_unknown_strategy_is_named():
    with pytest.raises(StrategyError, match="strategy: expected one of .*'rtc'"):
        make_strategy("rtc")


@pytest.mark.parametrize("change, name", [
    (dict(execution_horizon=0), "execution_horizon"), (dict(schedule="cosine"), "schedule"),
    (dict(beta=0.0), "beta"), (dict(blend_window=-1.0), "blend_window"), (dict(decay=float("nan")), "decay"),
    (dict(max_chunk_age=0.0), "max_chunk_age"),
])  # fmt: skip
def test_a_bad_configuration_is_named(change, name):
    with pytest.raises(StrategyError, match=f"^{name}: expected"):
        ExecutionConfig(**change)
