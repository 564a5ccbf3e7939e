"""The transform buffer against composition by hand with vla_core.se3, and its refusals."""

import timeit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vla_core import se3
from vla_perception.transforms import Reason, TransformBuffer, TransformError, TransformUnavailable


def random_transform(rng):
    return se3.exp(rng.uniform(-1, 1, 6) * [2, 2, 2, 3, 3, 3])


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_equals_composition_by_hand(seed):
    """A random tree of 8 frames, static and moving, and any pair of them at any time."""
    rng = np.random.default_rng(seed)
    buffer, at_time, stamp = TransformBuffer(), {"f0": np.eye(4)}, rng.uniform(100.0, 101.0)
    for i in range(1, 8):
        parent, child = f"f{rng.integers(i)}", f"f{i}"
        if rng.random() < 0.3:
            T = random_transform(rng)
            buffer.set_static(parent, child, T)
        else:
            stamps = np.concatenate([[100.0], np.sort(rng.uniform(100.0, 101.0, 6)), [101.0]])
            values = [random_transform(rng) for _ in stamps]
            for k in rng.permutation(len(stamps)):
                buffer.set(parent, child, stamps[k], values[k])
            k = np.searchsorted(stamps, stamp) - 1
            T = se3.interpolate(values[k], values[k + 1], (stamp - stamps[k]) / (stamps[k + 1] - stamps[k]))
        at_time[child] = at_time[parent] @ T
    a, b = (f"f{i}" for i in rng.integers(8, size=2))
    if a == "f0" == b:
        b = "f1"
    np.testing.assert_allclose(buffer.lookup(a, b, stamp), se3.inverse(at_time[a]) @ at_time[b], atol=1e-9)


def test_without_a_time_the_newest_common_one_is_read():
    buffer = TransformBuffer()
    for stamp in (1.0, 2.0, 3.0):
        buffer.set("world", "a", stamp, se3.transform(np.eye(3), [stamp, 0, 0]))
    for stamp in (1.0, 2.5):
        buffer.set("a", "b", stamp, se3.transform(np.eye(3), [0, stamp, 0]))
    np.testing.assert_allclose(buffer.lookup("world", "b")[:3, 3], [2.5, 2.5, 0])


def test_unknown_frame_is_named():
    buffer = TransformBuffer()
    buffer.set_static("world", "a", np.eye(4))
    with pytest.raises(TransformUnavailable, match="'b'") as error:
        buffer.lookup("world", "b", 0.0)
    assert error.value.reason is Reason.UNKNOWN_FRAME


def test_separate_trees_are_named():
    buffer = TransformBuffer()
    buffer.set_static("world", "a", np.eye(4))
    buffer.set_static("map", "b", np.eye(4))
    with pytest.raises(TransformUnavailable, match="'world' and 'map'") as error:
        buffer.lookup("a", "b", 0.0)
    assert error.value.reason is Reason.NOT_CONNECTED


@pytest.mark.parametrize(("asked", "missing"), [(0.75, -0.25), (2.5, 0.5)])
def test_extrapolation_says_how_far(asked, missing):
    buffer = TransformBuffer()
    buffer.set("world", "a", 1.0, np.eye(4))
    buffer.set("world", "a", 2.0, np.eye(4))
    with pytest.raises(TransformUnavailable, match=f"{abs(missing):.6f} s too") as error:
        buffer.lookup("world", "a", asked)
    assert error.value.reason is Reason.EXTRAPOLATION
    assert error.value.missing == pytest.approx(missing)


def test_cache_forgets_what_is_older():
    buffer = TransformBuffer(cache=10.0)
    for i in range(4000):
        buffer.set("world", "a", i * 0.01, np.eye(4))
    buffer.lookup("world", "a", 39.99 - 10.0)
    with pytest.raises(TransformUnavailable):
        buffer.lookup("world", "a", 39.99 - 15.01)


def test_clear_keeps_static_frames_only():
    buffer = TransformBuffer()
    buffer.set_static("world", "camera", np.eye(4))
    buffer.set("world", "tool", 5.0, np.eye(4))
    buffer.clear()
    buffer.lookup("world", "camera", 0.0)
    with pytest.raises(TransformUnavailable):
        buffer.lookup("world", "tool", 5.0)
    buffer.set("world", "tool", 1.0, np.eye(4))
    buffer.lookup("world", "tool", 1.0)


@pytest.mark.parametrize(
    ("parent", "child", "named"),
    [("other", "b", "parent"), ("b", "world", "loop"), ("x", "x", "loop"), ("world", "a", "moving")],
)
def test_what_is_no_tree_is_refused(parent, child, named):
    buffer = TransformBuffer()
    buffer.set("world", "a", 0.0, np.eye(4))
    buffer.set_static("a", "b", np.eye(4))
    with pytest.raises(TransformError, match=named):
        buffer.set_static(parent, child, np.eye(4))


def test_lookup_of_ten_links_is_many_times_cheaper_than_matrices():
    """A time bound that holds on any machine: against the same work done with 4x4 matrices."""
    rng = np.random.default_rng(0)
    buffer, values = TransformBuffer(), [random_transform(rng) for _ in range(11)]
    for i in range(10):
        for k in range(11):
            buffer.set(f"f{i}", f"f{i + 1}", k * 0.1, values[k])

    def by_matrices():
        return se3.compose(*(se3.interpolate(values[4], values[5], 0.5) for _ in range(10)))

    np.testing.assert_allclose(buffer.lookup("f0", "f10", 0.45), by_matrices(), atol=1e-9)
    fast = min(timeit.repeat(lambda: buffer.lookup("f0", "f10", 0.45), number=50, repeat=5))
    slow = min(timeit.repeat(by_matrices, number=50, repeat=5))
    assert fast < slow / 3
