"""ROS times as seconds and back."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vla_core.time import seconds, to_msg


@given(st.integers(0, 2**31 - 1), st.integers(0, 10**9 - 1))
def test_round_trip_is_as_exact_as_a_double(sec, nanosec):
    there = to_msg(seconds(SimpleNamespace(sec=sec, nanosec=nanosec)))
    assert abs((there[0] - sec) * 10**9 + there[1] - nanosec) <= 250
    assert 0 <= there[1] < 10**9


@given(st.integers(0, 10_000), st.integers(0, 10**9 - 1))
def test_simulation_times_round_trip_to_the_nanosecond(sec, nanosec):
    assert to_msg(seconds(SimpleNamespace(sec=sec, nanosec=nanosec))) == (sec, nanosec)


def test_nanoseconds_carry_into_the_seconds():
    assert to_msg(1.9999999999) == (2, 0)


def test_times_before_zero_have_positive_nanoseconds():
    assert to_msg(-0.25) == (-1, 750_000_000)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**31])
def test_a_time_that_fits_no_message_is_refused(bad):
    with pytest.raises(ValueError, match="expected finite seconds within 32 bits"):
        to_msg(bad)
