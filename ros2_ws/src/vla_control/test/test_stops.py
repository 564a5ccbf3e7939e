"""Where emergency stops come from, and when an enabling device lets the arms move."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vla_control.stops import Stops


@pytest.mark.parametrize("category", [0, 1, 2])
def test_every_source_asks_for_the_category_set(category):
    stops = Stops(category, enabling_device=True)
    found = [stops.topic(), stops.service(), stops.watch(0.0)]
    assert [s.category for s in found] == [category] * 3
    assert len({s.code for s in found}) == 3 and all(s.reason for s in found)


@pytest.mark.parametrize("settings", [{"category": 3}, {"category": -1}, {"enable_timeout": 0.0},
                                      {"enable_timeout": float("nan")}])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        Stops(**settings)


def test_without_an_enabling_device_nothing_is_missing():
    stops = Stops()
    assert stops.missing(1e9) == "" and stops.watch(1e9) is None
    stops.enable(False, 0.0)
    assert stops.watch(1e9) is None


def test_an_enabling_device_that_was_never_heard_lets_nothing_move():
    assert "nothing heard" in Stops(enabling_device=True).missing(0.0)


def test_released_stops_at_once_and_held_again_allows_arming():
    stops = Stops(enabling_device=True)
    stops.enable(True, 5.0)
    assert stops.watch(5.1) is None
    stops.enable(False, 5.1)
    assert "released" in stops.watch(5.1).reason
    stops.enable(True, 5.2)
    assert stops.missing(5.2) == ""


@given(
    timeout=st.floats(0.05, 2.0),
    gaps=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=20),
)
def test_it_allows_motion_exactly_while_it_was_heard_within_the_time_out(timeout, gaps):
    stops, heard = Stops(enabling_device=True, enable_timeout=timeout), 0.0
    for gap in gaps:
        stops.enable(True, heard)
        assert (stops.watch(heard + gap) is None) == (heard + gap - heard <= timeout)
        heard += gap
