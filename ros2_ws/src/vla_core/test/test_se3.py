"""SO(3) and SE(3): properties, and agreement with SciPy's Rotation and with pinocchio."""

import math

import numpy as np
import pinocchio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from vla_core import se3

#: Angles where naive formulas lose digits, and all between.
angles = st.one_of(
    st.floats(0, math.pi),
    st.sampled_from([0.0, 1e-300, 1e-20, 1e-12, 1e-8, 1e-7, 1e-4, 0.1, 3.0, math.pi]),
    st.floats(-14, -1).map(lambda e: 10.0**e),
    st.floats(-14, -1).map(lambda e: math.pi - 10.0**e),
)
vectors = st.tuples(*[st.floats(-2, 2)] * 3).map(np.array)
directions = vectors.filter(lambda v: np.linalg.norm(v) > 1e-2).map(lambda v: v / np.linalg.norm(v))
rotation_vectors = st.builds(lambda angle, axis: angle * axis, angles, directions)
rotations = rotation_vectors.map(lambda w: Rotation.from_rotvec(w).as_matrix())
transforms = st.builds(se3.transform, rotations, vectors)
quaternions = st.builds(lambda w, s: s * Rotation.from_rotvec(w).as_quat(), rotation_vectors, st.sampled_from([-1, 1]))


def same(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def random_rotations(*shape):
    return Rotation.random(int(np.prod(shape)), rng=np.random.default_rng(0)).as_matrix().reshape(*shape, 3, 3)


def random_transforms(*shape):
    return se3.transform(random_rotations(*shape), np.random.default_rng(1).normal(size=(*shape, 3)))


# ------------------------------------------------------------------------------------------------------------ SO(3)


@given(vectors, vectors)
def test_hat_is_the_cross_product_and_vee_its_inverse(w, x):
    same(se3.hat(w) @ x, np.cross(w, x))
    same(se3.vee(se3.hat(w)), w)


@given(rotation_vectors)
def test_exp_so3_agrees_with_scipy(w):
    same(se3.exp_so3(w), Rotation.from_rotvec(w).as_matrix(), 1e-14)


@given(rotations)
def test_log_so3_is_undone_by_exp_so3(R):
    w = se3.log_so3(R)
    assert np.linalg.norm(w) <= math.pi + 1e-12
    same(se3.exp_so3(w), R, 1e-14)


@given(rotation_vectors.filter(lambda w: np.linalg.norm(w) < math.pi - 1e-10))
def test_log_so3_gives_back_the_rotation_vector_to_relative_precision(w):
    np.testing.assert_allclose(se3.log_so3(se3.exp_so3(w)), w, rtol=1e-9, atol=1e-15)


def test_log_so3_keeps_digits_next_to_half_a_turn():
    axis = np.array([2.0, -1.0, 2.0]) / 3
    for gap in (1e-5, 1e-8, 1e-10):
        same(se3.log_so3(se3.exp_so3((math.pi - gap) * axis)), (math.pi - gap) * axis, 1e-14)


@given(rotations)
def test_matrix_to_quat_is_unit_has_positive_w_and_agrees_with_scipy(R):
    q = se3.matrix_to_quat(R)
    assert q[3] >= 0
    same(np.linalg.norm(q), 1.0, 1e-15)
    same(np.abs(q @ Rotation.from_matrix(R).as_quat()), 1.0, 1e-14)


@given(quaternions)
def test_quaternion_round_trip_up_to_sign(q):
    back = se3.matrix_to_quat(se3.quat_to_matrix(q))
    same(back * np.sign(back @ q), q, 1e-14)


@given(quaternions, st.floats(1e-3, 1e3))
def test_quat_to_matrix_normalises(q, length):
    same(se3.quat_to_matrix(length * q), Rotation.from_quat(q).as_matrix(), 1e-14)


@given(quaternions)
def test_quat_to_rotvec_takes_either_sign(q):
    same(se3.exp_so3(se3.quat_to_rotvec(q)), Rotation.from_quat(q).as_matrix(), 1e-14)


def test_half_a_turn_about_each_axis_has_its_largest_component_positive():
    for axis in np.eye(3):
        R = np.diag(2 * axis - 1)
        same(se3.matrix_to_quat(R), [*axis, 0.0])
        same(se3.log_so3(R), math.pi * axis)


@given(st.tuples(st.floats(-math.pi, math.pi), st.floats(-1.57, 1.57), st.floats(-math.pi, math.pi)))
def test_rpy_agrees_with_scipy_fixed_axes(rpy):
    same(se3.rpy_to_matrix(rpy), Rotation.from_euler("xyz", rpy).as_matrix(), 1e-15)


@given(rotations)
def test_rpy_round_trip(R):
    same(se3.rpy_to_matrix(se3.matrix_to_rpy(R)), R, 1e-14)


@given(st.floats(-math.pi, math.pi), st.sampled_from([-1, 1]), st.floats(-math.pi, math.pi), st.floats(0, 16))
def test_rpy_round_trip_at_and_near_gimbal_lock(roll, sign, yaw, digits):
    R = se3.rpy_to_matrix([roll, sign * (math.pi / 2 - 10.0**-digits), yaw])
    same(se3.rpy_to_matrix(se3.matrix_to_rpy(R)), R, 2e-12)


def test_yaw_is_zero_in_gimbal_lock():
    R = np.array([[0.0, -math.sin(0.3), math.cos(0.3)], [0.0, math.cos(0.3), math.sin(0.3)], [-1.0, 0.0, 0.0]])
    roll, pitch, yaw = se3.matrix_to_rpy(R)
    assert yaw == 0.0
    same([roll, pitch], [-0.3, math.pi / 2])


@given(rotations, st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-3, 3))
def test_rot6d_round_trip_whatever_length_and_slant_of_the_columns(R, length, other_length, slant):
    d = se3.matrix_to_rot6d(R)
    same(d, np.concatenate([R[:, 0], R[:, 1]]))
    slanted = np.concatenate([length * d[:3], other_length * d[3:] + slant * d[:3]])
    same(se3.rot6d_to_matrix(slanted), R, 1e-13)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (4, 0)])
def test_conversions_batch_over_leading_dimensions(shape):
    R = random_rotations(*shape)
    for there, back in (
        (se3.log_so3, se3.exp_so3),
        (se3.matrix_to_quat, se3.quat_to_matrix),
        (se3.matrix_to_rpy, se3.rpy_to_matrix),
        (se3.matrix_to_rot6d, se3.rot6d_to_matrix),
    ):
        values = there(R)
        assert values.shape[:-1] == shape
        same(back(values), R, 1e-14)
        for index in np.ndindex(shape):
            same(there(R[index]), values[index], 1e-14)


@given(rotation_vectors)
def test_one_rotation_and_a_batch_of_it_agree(w):
    R = se3.exp_so3(w)
    same(se3.exp_so3(w[None])[0], R, 1e-14)
    same(se3.matrix_to_quat(R[None])[0], se3.matrix_to_quat(R), 1e-14)
    q = se3.matrix_to_quat(R)
    same(se3.quat_to_matrix(q[None])[0], se3.quat_to_matrix(q), 1e-14)
    np.testing.assert_allclose(se3.quat_to_rotvec(q[None])[0], se3.quat_to_rotvec(q), rtol=1e-14, atol=1e-300)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("bad", [np.zeros(4), [np.nan, 0, 0, 1], [np.inf, 0, 0, 1]])
def test_a_quaternion_that_is_no_rotation_is_refused(bad, batch):
    with pytest.raises(se3.RotationError, match="quaternion: expected finite numbers of length above zero"):
        se3.quat_to_matrix(np.broadcast_to(bad, (*batch, 4)))


@pytest.mark.parametrize("bad", [np.zeros(6), [1, 0, 0, 2, 0, 0], [1, 0, 0, np.nan, 0, 0]])
def test_6d_columns_that_are_no_rotation_are_refused(bad):
    with pytest.raises(se3.RotationError, match="6D"):
        se3.rot6d_to_matrix(np.array(bad, float))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_matrix_with_nan_is_refused(batch):
    with pytest.raises(se3.RotationError, match="rotation matrix"):
        se3.matrix_to_quat(np.full((*batch, 3, 3), np.nan))


@given(quaternions, quaternions, st.floats(0, 1))
def test_slerp_turns_evenly_by_the_shorter_way(q0, q1, u):
    R0, R1 = se3.quat_to_matrix(q0), se3.quat_to_matrix(q1)
    whole = se3.log_so3(R0.T @ R1)
    if np.linalg.norm(whole) > math.pi - 1e-6:
        return
    same(R0.T @ se3.quat_to_matrix(se3.slerp(q0, q1, u)), se3.exp_so3(u * whole), 1e-9)


@given(quaternions, quaternions)
def test_slerp_starts_at_the_first_and_ends_at_the_second_in_the_hemisphere_of_the_first(q0, q1):
    same(se3.slerp(q0, q1, 0.0), q0)
    end = se3.slerp(q0, q1, 1.0)
    same(end, q1 if q0 @ q1 >= 0 else -q1)


def test_slerp_broadcasts():
    q = se3.matrix_to_quat(random_rotations(2))
    assert se3.slerp(q[0], q[1], np.linspace(0, 1, 7)).shape == (7, 4)


# ------------------------------------------------------------------------------------------------------------ SE(3)


@given(rotation_vectors, vectors)
def test_exp_agrees_with_pinocchio(w, v):
    twist = np.concatenate([v, w])
    same(se3.exp(twist), pinocchio.exp6(pinocchio.Motion(twist)).homogeneous, 1e-11)


@given(rotation_vectors.filter(lambda w: np.linalg.norm(w) < 3.1), vectors)
def test_log_agrees_with_pinocchio(w, v):
    T = se3.exp(np.concatenate([v, w]))
    same(se3.log(T), pinocchio.log6(pinocchio.SE3(T)).vector, 1e-9)


@given(transforms)
def test_log_is_undone_by_exp(T):
    same(se3.exp(se3.log(T)), T, 1e-13)


@given(rotation_vectors.filter(lambda w: np.linalg.norm(w) < math.pi - 1e-9), vectors)
def test_exp_is_undone_by_log(w, v):
    twist = np.concatenate([v, w])
    same(se3.log(se3.exp(twist)), twist, 1e-12)


def test_series_and_closed_forms_of_the_coefficients_meet():
    for function in (se3._third, se3._twelfth):
        below, above = function(np.array([0.1 - 1e-12, 0.1 + 1e-12]))
        assert abs(below - above) < 1e-13


@given(transforms, transforms)
def test_inverse_and_compose(T0, T1):
    same(se3.compose(T0, se3.inverse(T0)), np.eye(4))
    same(se3.compose(T0, T1, se3.inverse(T1)), T0)
    same(se3.inverse(T0), np.linalg.inv(T0))


@given(transforms)
def test_pose_round_trip(T):
    same(se3.pose_to_matrix(se3.matrix_to_pose(T)), T)


@given(transforms, transforms)
def test_delta_is_what_apply_delta_adds(T0, T1):
    same(se3.apply_delta(T0, se3.delta(T0, T1)), T1)


@given(transforms, rotation_vectors.filter(lambda w: np.linalg.norm(w) < 3.0), vectors)
def test_apply_delta_is_in_base_frame_axes(T, w, dp):
    moved = se3.apply_delta(T, np.concatenate([dp, w]))
    same(moved[:3, 3], T[:3, 3] + dp)
    same(moved[:3, :3], Rotation.from_rotvec(w).as_matrix() @ T[:3, :3])
    same(se3.delta(T, moved), np.concatenate([dp, w]), 1e-11)


@given(transforms, transforms, st.floats(0, 1))
def test_interpolate_moves_straight_and_turns_evenly(T0, T1, u):
    T = se3.interpolate(T0, T1, u)
    same(T[:3, 3], (1 - u) * T0[:3, 3] + u * T1[:3, 3])
    whole = se3.log_so3(T0[:3, :3].T @ T1[:3, :3])
    same(T0[:3, :3].T @ T[:3, :3], se3.exp_so3(u * whole))


@given(transforms, transforms)
def test_interpolate_reaches_both_ends(T0, T1):
    same(se3.interpolate(T0, T1, 0.0), T0)
    same(se3.interpolate(T0, T1, 1.0), T1)


def test_interpolate_broadcasts_and_equals_one_at_a_time():
    T = random_transforms(2, 5)
    u = np.linspace(0, 1, 5)
    many = se3.interpolate(T[0], T[1], u)
    for i in range(5):
        same(many[i], se3.interpolate(T[0, i], T[1, i], u[i]))
    assert se3.interpolate(T[0, 0], T[1, 0], u).shape == (5, 4, 4)


@given(transforms, rotation_vectors.filter(lambda w: np.linalg.norm(w) < 3.0), st.floats(0, 1))
def test_mean_of_two_is_their_interpolation(T0, w, u):
    T1 = se3.apply_delta(T0, np.concatenate([[0.1, -0.2, 0.3], w]))
    same(se3.mean(np.stack([T0, T1]), [1 - u, u]), se3.interpolate(T0, T1, u), 1e-11)


def test_mean_rotation_has_no_weighted_residual():
    rng = np.random.default_rng(3)
    center = random_rotations(1)[0]
    R = center @ se3.exp_so3(rng.uniform(-0.7, 0.7, (6, 3)))
    w = rng.uniform(size=6)
    mean = se3.mean(se3.transform(R, np.zeros(3)), w)[:3, :3]
    same(w @ se3.log_so3(mean.T @ R), np.zeros(3))


def test_mean_moves_with_the_frame_and_ignores_the_scale_of_weights():
    rng = np.random.default_rng(4)
    T = se3.compose(random_transforms(1)[0], se3.exp(rng.uniform(-0.5, 0.5, (4, 6))))
    w, frame = rng.uniform(size=4), random_transforms(2)[1]
    same(se3.mean(frame @ T, 7 * w), frame @ se3.mean(T, w))


def test_mean_batches():
    T = se3.exp(np.random.default_rng(5).uniform(-0.5, 0.5, (3, 2, 4, 6)))
    w = np.random.default_rng(6).uniform(size=(2, 4))
    means = se3.mean(T, w)
    assert means.shape == (3, 2, 4, 4)
    same(means[1, 0], se3.mean(T[1, 0], w[0]))
    same(se3.mean(T[0, 0]), se3.mean(T[0, 0], np.ones(4)))


@pytest.mark.parametrize("weights", [[1, -1], [0, 0], [np.nan, 1], [1, 1, 1]])
def test_mean_refuses_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="weights of a mean"):
        se3.mean(random_transforms(2), weights)
