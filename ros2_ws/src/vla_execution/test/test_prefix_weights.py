import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vla_execution.rtc import SCHEDULES, ScheduleError, prefix_weights


@pytest.mark.parametrize("schedule, expected", [
    ("linear", [1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0]),
    ("exp", [1, 1, 0.570589, 0.287072, 0.114492, 0.025770, 0, 0]),
    ("ones", [1, 1, 1, 1, 1, 1, 0, 0]),
    ("zeros", [1, 1, 0, 0, 0, 0, 0, 0]),
])  # fmt: skip
def test_vectors_of_start_2_end_6_of_8(schedule, expected):
    np.testing.assert_allclose(prefix_weights(8, 2, 2, schedule), expected, atol=1e-6)


def test_vector_of_delay_3_horizon_3_of_8():
    expected = [1, 1, 1, 0.367706, 0.076746, 0, 0, 0]
    np.testing.assert_allclose(prefix_weights(8, 3, 3, "exp"), expected, atol=1e-6)


def test_vector_of_delay_1_horizon_1_of_4():
    np.testing.assert_allclose(prefix_weights(4, 1, 1, "exp"), [1, 0.367706, 0.076746, 0], atol=1e-6)


@given(st.integers(1, 60), st.integers(0, 80), st.data(), st.sampled_from(SCHEDULES))
def test_weights_fall_from_one_to_zero(horizon, delay, data, schedule):
    s = data.draw(st.integers(0, horizon))
    w = prefix_weights(horizon, delay, s, schedule)
    end = horizon - s
    assert w.shape == (horizon,)
    assert np.all((w >= 0) & (w <= 1)) and np.all(np.diff(w) <= 1e-12)
    assert np.all(w[: min(delay, end)] == 1) and np.all(w[end:] == 0)


def test_a_delay_beyond_the_remainder_freezes_all_of_it():
    np.testing.assert_array_equal(prefix_weights(8, 7, 4, "exp"), [1, 1, 1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize("arguments, name", [
    ((0, 0, 0, "exp"), "horizon"),
    ((8, -1, 2, "exp"), "delay"),
    ((8, 1.5, 2, "exp"), "delay"),
    ((8, 1, 9, "exp"), "execution_horizon"),
    ((8, 1, -1, "exp"), "execution_horizon"),
    ((8, 1, 2, "cosine"), "schedule"),
])  # fmt: skip
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ScheduleError, match=f"^{name}: expected .* found"):
        prefix_weights(*arguments)
