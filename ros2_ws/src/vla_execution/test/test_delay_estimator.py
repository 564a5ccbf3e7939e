import pytest
from hypothesis import given
from hypothesis import strategies as st
from vla_execution.delay import DelayEstimator


def test_nothing_measured_counts_as_one_step():
    assert DelayEstimator().seconds is None and DelayEstimator().steps(0.05) == 1


def test_the_largest_of_the_newest_counts():
    delays = DelayEstimator()
    for d in (0.1, 0.12, 0.08):
        delays.record(d)
    assert delays.seconds == 0.12 and delays.steps(0.05) == 3 and delays.steps(0.06) == 2


@given(st.lists(st.floats(0, 0.2), min_size=10, max_size=30))
def test_a_spike_is_forgotten_after_ten_chunks(later):
    delays = DelayEstimator()
    delays.record(5.0)
    for d in later:
        delays.record(d)
    assert delays.seconds == max(later[-10:])


@pytest.mark.parametrize("delay", [-0.1, float("nan"), float("inf")])
def test_what_is_no_delay_is_refused(delay):
    with pytest.raises(ValueError, match="delay: expected"):
        DelayEstimator().record(delay)
