"""Pacing: never faster than real time, no bursts after a stall."""

import pytest
from vla_sim.pacing import Pacer


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_periods_are_evenly_spaced():
    clock = FakeClock()
    pacer = Pacer(0.01, 1.0, clock)
    pacer.advance()
    assert pacer.remaining() == pytest.approx(0.01)
    clock.now = 0.004
    assert pacer.remaining() == pytest.approx(0.006)


def test_a_small_delay_is_made_up_for():
    clock = FakeClock()
    pacer = Pacer(0.01, 1.0, clock)
    pacer.advance()
    clock.now = 0.013
    pacer.advance()
    assert pacer.remaining() == pytest.approx(0.007)


def test_a_stall_is_not_followed_by_a_burst():
    clock = FakeClock()
    pacer = Pacer(0.01, 1.0, clock)
    clock.now = 1.0
    for _ in range(3):
        clock.now += pacer.remaining()
        pacer.advance()
    assert clock.now >= 1.01


def test_the_factor_is_reported():
    clock = FakeClock()
    pacer = Pacer(0.01, 0.5, clock)
    for _ in range(100):
        clock.now += pacer.remaining()
        pacer.advance()
    clock.now += pacer.remaining()
    assert pacer.factor() == pytest.approx(0.5, rel=0.02)


def test_a_bad_factor_is_refused():
    with pytest.raises(ValueError, match="realtime_factor"):
        Pacer(0.01, -1.0)
