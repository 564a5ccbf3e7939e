"""Velocity bounds: never empty, never beyond what acceleration allows, always able to brake."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from vla_control.kernels import approach, braking
from vla_control.limits import RETURN_SPEED, velocity_bounds
from vla_core.robot import Limits

PERIOD = 0.01


def limits(acceleration=5.0, velocity=2.0):
    ones = np.ones(1)
    return Limits(-ones, ones, velocity * ones, acceleration * ones, 100 * acceleration * ones, 0.5 * ones)


@given(st.floats(0.0, 10.0), st.floats(0.1, 50.0), st.floats(1e-3, 0.05))
def test_braking_from_the_largest_speed_ends_within_the_distance(distance, acceleration, period):
    speed, gone = float(braking(distance, acceleration, period)), 0.0
    assert speed >= 0.0
    while speed > 0.0:
        gone += speed * period
        speed -= acceleration * period
    assert gone <= distance + 1e-9


@given(st.floats(0.0, 10.0), st.floats(0.1, 50.0))
def test_the_next_braking_speed_is_within_reach(distance, acceleration):
    speed = float(braking(distance, acceleration, PERIOD))
    after = float(braking(max(distance - speed * PERIOD, 0.0), acceleration, PERIOD))
    assert after >= speed - acceleration * PERIOD - 1e-9


@given(st.floats(1e-12, 3.0))
def test_beyond_a_limit_the_way_is_back_and_slow(excess):
    speed = float(approach(-excess, 5.0, PERIOD, RETURN_SPEED))
    assert -RETURN_SPEED <= speed <= 0.0
    assert -speed * PERIOD <= excess


@settings(max_examples=50)
@given(
    st.lists(st.floats(-1.0, 1.0), min_size=300, max_size=300),
    st.floats(-1.5, 1.5),
    st.floats(0.5, 30.0),
)
def test_any_choice_within_the_bounds_keeps_every_limit(choices, start, acceleration):
    bound = limits(acceleration)
    q, v = np.array([start]), np.zeros(1)
    for choice in choices:
        bounds = velocity_bounds(q, v, bound, PERIOD)
        lower, upper = bounds.lower, bounds.upper
        assert lower <= upper
        chosen = lower + (0.5 + 0.5 * choice) * (upper - lower)
        assert np.abs(chosen - v) <= acceleration * PERIOD + 1e-12
        assert np.abs(chosen) <= bound.velocity + 1e-12
        farthest = max(1.0, abs(float(q[0])))
        q, v = q + chosen * PERIOD, chosen
        assert abs(float(q[0])) <= farthest + 1e-9


def test_full_speed_towards_a_limit_ends_at_it():
    bound = limits()
    q, v = np.zeros(1), np.zeros(1)
    for _ in range(500):
        v = velocity_bounds(q, v, bound, PERIOD).upper
        q = q + v * PERIOD
    assert 1.0 - 1e-3 < q[0] <= 1.0 + 1e-12
    assert abs(v[0]) < 1e-3


def test_each_bound_is_named_for_what_makes_it():
    bound = limits()
    one, rest = np.ones(1), np.zeros(1)
    joint = slice(0, 1)

    def upper(q, v):
        bounds = velocity_bounds(q, v, bound, PERIOD)
        return bounds.made_by(bounds.upper, joint)

    assert upper(rest, rest) == ["acceleration"]
    assert upper(rest, 1.99 * one) == ["velocity"]
    assert upper(one, rest) == ["position"]
    low = velocity_bounds(-one, rest, bound, PERIOD)
    assert low.made_by(low.lower, joint) == ["position"]
    assert low.made_by(low.upper, joint) == ["acceleration"]
    assert low.made_by(0.5 * (low.lower + low.upper), joint) == []
