"""The compiled arithmetic that has a twin elsewhere gives what that gives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vla_control import kernels
from vla_core import se3

#: Angles near none and half a turn, where naive formulas lose their digits, and between.
angle = st.one_of(
    st.sampled_from([0.0, 1e-12, 1e-9, 1e-5, np.pi - 1e-5, np.pi - 1e-9]), st.floats(0.0, np.pi - 1e-6)
)  # fmt: skip


@st.composite
def changes(draw):
    axis = np.array([draw(st.floats(-1.0, 1.0)) for _ in range(3)])
    length = np.linalg.norm(axis)
    axis = axis / length if length > 1e-3 else np.array([0.0, 0.0, 1.0])
    return np.concatenate([[draw(st.floats(-2.0, 2.0)) for _ in range(3)], draw(angle) * axis])


@given(changes(), changes())
def test_changes_of_a_pose_are_those_of_se3(first, second):
    T = se3.apply_delta(np.eye(4), first)
    there = kernels.changed(T, second)
    np.testing.assert_allclose(there, se3.apply_delta(T, second), atol=1e-12)
    np.testing.assert_allclose(kernels.change(T, there), second, atol=1e-7)
    np.testing.assert_allclose(kernels.change(T, there), se3.delta(T, there), atol=1e-7)


@pytest.mark.parametrize("position", [[0.0, 0.2], [0.1, np.nan], [np.nan, 0.3]])
def test_what_is_not_a_number_is_the_worst(position):
    share, joint = kernels.worst_share(np.array(position), np.zeros(2), np.array([0.5, 0.1]))
    bad = np.flatnonzero(np.isnan(position))
    assert (joint, share) == ((bad[0], np.inf) if len(bad) else (1, pytest.approx(2.0)))


@given(st.integers(1, 14), st.integers(0, 10_000))
def test_a_cost_is_least_where_its_slope_is_none(n, seed):
    rng = np.random.default_rng(seed)
    root, linear = rng.normal(size=(n, n)), rng.normal(size=n)
    hessian = root @ root.T + 1e-3 * np.eye(n)
    np.testing.assert_allclose(hessian @ kernels.unbounded(hessian, linear), -linear, atol=1e-8)
