import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vla_core import se3
from vla_execution.chunk import Chunk, ChunkRefused, resampled
from vla_execution.plan import Plan

H, PERIOD = 10, 0.05
START = 1_790_000_000.0  # present-day ROS time


def line(start=START, slope=1.0, offset=0.0, horizon=H):
    """A chunk on a straight way with even turning: exact under interpolation. x = slope (t - START) + offset."""
    t = start + PERIOD * np.arange(horizon) - START
    targets = np.zeros((horizon, 8))
    targets[:, 0] = slope * t + offset
    targets[:, 3:7] = se3.matrix_to_quat(se3.exp_so3(np.stack([0 * t, 0 * t, 0.5 * t], axis=-1)))
    targets[:, 7] = np.arange(horizon) % 2
    return Chunk(targets, start, PERIOD, "pose", ("arm",))


def valid(**change):
    targets = np.tile([0.4, 0, 0.3, 1, 0, 0, 0, 1.0], (4, 1))
    return dict(targets=targets, start=1.0, period=0.1, kind="pose", arms=("arm",)) | change


def spoiled(column, value):
    targets = valid()["targets"]
    targets[2, column] = value
    return targets


@pytest.mark.parametrize("change, reason", [
    (dict(targets=spoiled(0, np.nan)), "finite numbers, found nan in action 2"),
    (dict(targets=spoiled(7, np.inf)), "finite numbers"),
    (dict(targets=spoiled(3, 0.5)), "unit quaternions, found one of length 0.5"),
    (dict(targets=spoiled(3, 0.0)), "unit quaternions"),
    (dict(targets=spoiled(7, 1.5)), "openings from 0 to 1"),
    (dict(targets=np.zeros((0, 8))), "H > 0"),
    (dict(targets=np.zeros(8)), "H > 0"),
    (dict(targets=np.zeros((4, 7))), "expected .* numbers"),
    (dict(arms=()), "arms"),
    (dict(arms=("left", "right")), "expected .* numbers"),
    (dict(period=0.0), "period > 0"),
    (dict(period=np.nan), "period > 0"),
    (dict(start=np.inf), "finite start"),
    (dict(kind="twist"), "representation"),
    (dict(kind="joint", targets=np.zeros((4, 7)), arms=("left", "right")), "numbers for arms"),
])  # fmt: skip
def test_what_is_no_chunk_is_refused_with_the_reason(change, reason):
    with pytest.raises(ChunkRefused, match=reason):
        Chunk(**valid(**change))


def test_small_rounding_is_mended():
    chunk = Chunk(**valid(targets=spoiled(3, 1.0005)))
    assert np.linalg.norm(chunk.targets[2, 3:7]) == pytest.approx(1.0, abs=1e-12)


def test_a_chunk_keeps_its_own_copy():
    given = valid()
    chunk = Chunk(**given)
    given["targets"][0, 0] = 9.0
    assert chunk.targets[0, 0] == 0.4 and not chunk.targets.flags.writeable


@given(st.floats(-0.2, 0.8))
def test_at_is_exact_on_a_straight_way_and_holds_the_ends(offset):
    chunk, t = line(), START + offset
    expected = min(max(offset, 0.0), (H - 1) * PERIOD)
    found = chunk.at(t)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    np.testing.assert_allclose(se3.quat_to_rotvec(found[3:7])[2], 0.5 * expected, atol=1e-6)


@given(st.integers(0, H - 1), st.floats(0, 0.999))
def test_the_gripper_keeps_the_opening_of_the_action_before(k, fraction):
    chunk = line()
    step = min(k + fraction, H - 1)
    assert chunk.at(chunk.due(step))[7] == int(step + 1e-5) % 2


@given(st.floats(0, 1.0))
def test_consumed_counts_the_actions_that_have_fallen_due(elapsed):
    chunk = line()
    counted = sum(chunk.due(k) < START + elapsed - 1e-6 for k in range(100))
    assert chunk.consumed(START + elapsed) == counted


def test_remainder_begins_with_the_action_being_executed():
    rest = line().remainder(START + 0.12)
    assert rest.start == pytest.approx(START + 0.10, abs=1e-6)
    np.testing.assert_allclose(rest.targets, line().targets[2:])
    assert line().remainder(START + 0.6) is None


@given(st.floats(0.0, 0.4), st.floats(0.02, 0.1), st.integers(1, 30))
def test_entry_k_of_the_resampled_remainder_is_due_with_action_k(observed, period, horizon):
    rest = resampled(line(), START + observed, period, horizon)
    times = observed + period * np.arange(horizon)
    times = times[times <= (H - 1) * PERIOD + 1e-9]
    assert abs(len(rest) - len(times)) <= 1
    np.testing.assert_allclose(rest[: len(times), 0], times[: len(rest)], atol=1e-6)


def test_a_remainder_that_is_over_gives_nothing():
    assert resampled(line(), START + 0.5, PERIOD, H).shape == (0, 8)


def test_an_observation_before_the_remainder_holds_its_first_target():
    rest = resampled(line(), START - 0.1, PERIOD, H)
    np.testing.assert_allclose(rest[:4, 0], [0.0, 0.0, 0.0, 0.05], atol=1e-6)


def test_the_remainder_of_a_plan_carries_what_was_executed_before_the_switch():
    plan = Plan(line(offset=0.0), START)
    plan.switch(line(start=START + 0.2, offset=0.02), START + 0.31)
    rest = plan.remainder(START + 0.36)
    assert rest.start == pytest.approx(START + 0.05, abs=1e-6)
    for time, target in zip(rest.start + PERIOD * np.arange(rest.horizon), rest.targets, strict=True):
        np.testing.assert_allclose(target[0], time - START + (0.02 if time > START + 0.31 else 0.0), atol=1e-6)
    assert rest.end == pytest.approx(plan.chunk.end, abs=1e-6)


@given(st.floats(0.0, 0.2), st.floats(0.01, 0.2))
def test_a_cross_fade_leads_continuously_from_plan_to_plan(at, window):
    plan = Plan(line(horizon=30), START)
    new = line(start=START + 0.1, offset=0.1, horizon=30)
    since = START + 0.2 + at
    before = plan.at(since)
    plan.switch(new, since, window)
    times = np.linspace(since, since + window + 0.1, 40)
    way = np.array([plan.at(t)[0] for t in times])
    np.testing.assert_allclose(way[0], before[0], atol=1e-6)
    assert np.abs(np.diff(way)).max() <= (1.0 + 0.1 / window) * (times[1] - times[0]) + 1e-4
    np.testing.assert_allclose(way[-1], new.at(times[-1])[0], atol=1e-6)
