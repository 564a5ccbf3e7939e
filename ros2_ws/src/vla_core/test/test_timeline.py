"""Timelines: interpolation, bounds, the ring, the clock policy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vla_core import se3
from vla_core.timeline import ClockJump, OutOfRange, Timeline, TimelineError


def filled(count, capacity=100, kind="vector"):
    timeline = Timeline(capacity, kind)
    for i in range(count):
        value = se3.exp([0.1 * i, 0, 0, 0, 0, 0.2 * i]) if kind == "pose" else [float(i), -2.0 * i]
        timeline.add(0.5 * i, value if kind != "object" else f"image {i}")
    return timeline


def test_vectors_are_interpolated_linearly():
    np.testing.assert_allclose(filled(10).sample(1.1), [2.2, -4.4])


def test_poses_are_interpolated_on_se3():
    timeline = Timeline(10, "pose")
    T0, T1 = se3.exp([1, 2, 3, 0.1, 0.2, 0.3]), se3.exp([0, 1, 0, -1.0, 0.5, 2.0])
    timeline.add(1.0, T0)
    timeline.add(2.0, T1)
    np.testing.assert_allclose(timeline.sample(1.3), se3.interpolate(T0, T1, 0.3), atol=1e-12)


def test_many_stamps_at_once_give_what_one_at_a_time_gives():
    for kind in ("vector", "pose"):
        timeline = filled(10, kind=kind)
        stamps = np.array([[0.0, 0.1, 4.5], [3.99, 4.0, 2.0]])
        many = timeline.sample(stamps)
        for index in np.ndindex(stamps.shape):
            np.testing.assert_allclose(many[index], timeline.sample(stamps[index]), atol=1e-12)


def test_a_value_is_given_back_exactly_at_its_stamp():
    timeline = filled(10)
    for i in range(10):
        assert timeline.sample(0.5 * i).tolist() == [i, -2 * i]


@settings(max_examples=50)
@given(st.integers(1, 7), st.lists(st.floats(0.01, 3.0), min_size=1, max_size=40), st.data())
def test_the_ring_keeps_the_newest_and_reads_as_numpy_does(capacity, gaps, data):
    stamps = np.cumsum(gaps)
    values = np.arange(len(stamps), dtype=float) ** 2
    timeline, images = Timeline(capacity), Timeline(capacity, "object")
    for stamp, value in zip(stamps, values, strict=True):
        timeline.add(stamp, [value])
        images.add(stamp, value)
    kept, kept_values = stamps[-capacity:], values[-capacity:]
    assert len(timeline) == len(images) == len(kept)
    assert (timeline.oldest, timeline.newest) == (kept[0], kept[-1])
    time = data.draw(st.floats(kept[0], kept[-1]))
    np.testing.assert_allclose(timeline.sample(time), [np.interp(time, kept, kept_values)], atol=1e-9)
    distance = np.abs(kept - time)
    nearest = images.nearest(time)
    assert abs(nearest.stamp - time) == pytest.approx(distance.min(), abs=1e-12)
    assert nearest.value == kept_values[kept == nearest.stamp][0]


def test_a_timeline_of_objects_lets_go_of_what_fell_out():
    timeline = filled(7, capacity=3, kind="object")
    assert sum(value is not None for value in timeline._values) == 3


def test_objects_are_kept_as_they_are():
    image = np.zeros((2, 3, 3), np.uint8)
    timeline = Timeline(2, "object")
    timeline.add(0.0, image)
    timeline.add(1.0, [1, 2])
    assert timeline.nearest(0.2).value is image
    assert timeline.nearest(0.9).value == [1, 2]


def test_of_two_as_near_the_older_is_taken():
    assert filled(3, kind="object").nearest(0.25) == (0.0, "image 0")


@pytest.mark.parametrize(("time", "expected"), [(-100.0, "image 0"), (100.0, "image 2"), (0.5, "image 1")])
def test_nearest_has_no_bounds(time, expected):
    assert filled(3, kind="object").nearest(time).value == expected


def test_no_extrapolation_beyond_the_tolerance():
    timeline = filled(3)
    assert timeline.sample(1.004, tolerance=0.005).tolist() == [2.0, -4.0]
    assert timeline.sample(-0.004, tolerance=0.005).tolist() == [0.0, 0.0]
    for stamp in (1.006, -0.006, np.nan, [0.5, 1.2]):
        with pytest.raises(OutOfRange, match=r"expected a time in \[0.000000, 1.000000\] s"):
            timeline.sample(stamp, tolerance=0.005)


def test_one_value_can_be_read_at_its_stamp():
    timeline = filled(1)
    assert timeline.sample(0.0).tolist() == [0.0, 0.0]
    assert timeline.sample([0.0, 0.001], tolerance=0.01).shape == (2, 2)


def test_an_empty_timeline_says_so():
    for read in (lambda t: t.sample(0.0), lambda t: t.nearest(0.0), lambda t: t.oldest, lambda t: t.newest):
        with pytest.raises(OutOfRange, match="at least one value, found none"):
            read(Timeline(3))


def test_a_clock_that_goes_backwards_is_refused_and_changes_nothing():
    timeline = filled(3)
    with pytest.raises(ClockJump, match="expected 1.000000000 s or later, found 0.900000000 s"):
        timeline.add(0.9, [0.0, 0.0])
    assert len(timeline) == 3 and timeline.newest == 1.0


def test_after_clear_an_earlier_clock_and_another_shape_are_taken():
    timeline = filled(3)
    timeline.clear()
    assert len(timeline) == 0
    timeline.add(0.1, [1.0, 2.0, 3.0])
    assert timeline.sample(0.1).tolist() == [1.0, 2.0, 3.0]


def test_the_same_stamp_replaces_the_newest_value():
    timeline = filled(3)
    timeline.add(1.0, [7.0, 8.0])
    assert len(timeline) == 3 and timeline.sample(1.0).tolist() == [7.0, 8.0]


def test_what_was_added_and_what_was_read_are_copies():
    value = np.array([1.0, 2.0])
    timeline = Timeline(3)
    timeline.add(0.0, value)
    value[:] = 9.0
    timeline.sample(0.0)[:] = 8.0
    timeline.nearest(0.0).value[:] = 7.0
    assert timeline.sample(0.0).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("stamp", "value", "message"),
    [
        (np.nan, [0.0, 0.0], "expected finite seconds"),
        (9.0, [0.0, np.nan], "expected finite numbers"),
        (9.0, [0.0], r"expected shape \(2,\), found \(1,\)"),
    ],
)
def test_bad_values_are_refused_and_change_nothing(stamp, value, message):
    timeline = filled(3)
    with pytest.raises(TimelineError, match=message):
        timeline.add(stamp, value)
    assert len(timeline) == 3


def test_a_pose_must_be_a_transform():
    with pytest.raises(TimelineError, match=r"expected shape \(4, 4\), found \(7,\)"):
        Timeline(3, "pose").add(0.0, np.zeros(7))


def test_objects_cannot_be_interpolated():
    with pytest.raises(TimelineError, match="use nearest"):
        filled(3, kind="object").sample(0.1)


@pytest.mark.parametrize(("capacity", "kind"), [(0, "vector"), (3, "poses")])
def test_a_timeline_that_cannot_be_is_refused(capacity, kind):
    with pytest.raises(TimelineError, match="expected"):
        Timeline(capacity, kind)
