import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vla_core import se3
from vla_execution.blending import SAME_DECISION, along, average, choose_opening, cross_fade, curve
from vla_execution.layout import Layout

POSE = Layout("pose", ("left", "right"), (8, 8))
JOINT = Layout("joint", ("arm",), (4,))
openings = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def pose(rotation, opening):
    return np.array([*rotation, *se3.matrix_to_quat(se3.exp_so3(rotation)), opening])


def test_layout_names_every_number_once():
    assert POSE.grippers.tolist() == [7, 15]
    assert POSE.quaternions.tolist() == [[3, 4, 5, 6], [11, 12, 13, 14]]
    assert POSE.linear.tolist() == [0, 1, 2, 8, 9, 10]
    assert JOINT.linear.tolist() == [0, 1, 2] and JOINT.grippers.tolist() == [3]


@given(openings, st.data())
def test_an_opening_is_never_averaged_across_a_decision(values, data):
    weights = data.draw(st.lists(st.floats(0.01, 1), min_size=len(values), max_size=len(values)))
    found = choose_opening(values, weights)
    near = [v for v in values if (v >= 0.5) == (found >= 0.5)]
    assert near and min(near) <= found <= max(near)
    assert found in values or max(near) - min(near) <= SAME_DECISION


def test_the_heavier_side_wins():
    assert choose_opening([1.0, 0.0, 0.0], [1.0, 1.0, 1.0]) == 0.0
    assert choose_opening([1.0, 0.0, 0.0], [3.0, 1.0, 1.0]) == 1.0


def test_a_tie_goes_to_the_newest():
    assert choose_opening([1.0, 0.0], [0.5, 0.5]) == 0.0


def test_openings_of_one_decision_are_averaged():
    assert choose_opening([0.8, 1.0], [0.5, 0.5]) == pytest.approx(0.9)


def test_openings_far_apart_on_one_side_are_not():
    assert choose_opening([0.55, 1.0], [0.9, 0.1]) == 1.0


@given(st.floats(0, 1))
def test_cross_fade_moves_evenly_on_se3(u):
    old = np.concatenate([pose([0.1, 0.0, 0.0], 1.0), pose([0.0, 0.0, 0.0], 0.0)])
    new = np.concatenate([pose([0.5, 0.0, 0.0], 0.0), pose([0.0, 1.0, 0.0], 0.0)])
    mixed = cross_fade(POSE, old, new, u)
    np.testing.assert_allclose(mixed[0], 0.1 + 0.4 * u, atol=1e-12)
    np.testing.assert_allclose(se3.quat_to_rotvec(mixed[3:7]), [0.1 + 0.4 * u, 0, 0], atol=1e-9)
    np.testing.assert_allclose(se3.quat_to_rotvec(mixed[11:15]), [0, u, 0], atol=1e-9)
    assert mixed[7] == (1.0 if u < 0.5 - 1e-9 else mixed[7]) and mixed[7] in (0.0, 1.0)


def test_average_of_two_equals_the_cross_fade():
    old = np.concatenate([pose([0.1, 0.2, 0.0], 1.0), pose([0.0, 0.3, 0.0], 0.0)])
    new = np.concatenate([pose([0.5, 0.0, 0.1], 0.9), pose([0.4, 1.0, 0.0], 0.1)])
    np.testing.assert_allclose(
        np.abs(average(POSE, [old, new], [0.7, 0.3])), np.abs(cross_fade(POSE, old, new, 0.3)), atol=1e-9
    )


def test_joints_are_averaged_linearly():
    mean = average(JOINT, [[0, 1, 2, 1.0], [2, 3, 4, 1.0]], [0.5, 0.5])
    np.testing.assert_allclose(mean, [1, 2, 3, 1.0])


def way(times):
    """Actions (n, 16) of two arms that move and turn smoothly."""
    t = np.asarray(times)
    out = np.zeros((len(t), 16))
    out[:, 0], out[:, 9] = 0.1 * np.sin(2 * t), 0.1 * np.cos(3 * t)
    for arm, turn in enumerate(([1.0, 0.4, 0.0], [0.0, 3.0, 1.0])):
        rotation = np.sin(t)[:, None] * np.array(turn)
        out[:, 8 * arm + 3 : 8 * arm + 7] = se3.matrix_to_quat(se3.exp_so3(rotation))
        out[:, 8 * arm + 7] = t > 0.5
    return out


@given(st.integers(0, 19), st.booleans())
def test_the_way_goes_through_every_action(step, flipped):
    actions = way(0.05 * np.arange(20))
    if flipped:  # the same rotations
        actions[::2, 3:7] *= -1
    cubics = curve(POSE, actions)
    there = along(POSE, cubics[step], 0.0)
    np.testing.assert_allclose(there, actions[step], atol=1e-12)
    if step:
        before = along(POSE, cubics[step - 1], 1.0)
        before[3:7] *= np.sign(before[3:7] @ there[3:7])
        np.testing.assert_allclose(before[:7], there[:7], atol=1e-12)
        assert before[7] == actions[step - 1, 7]


def test_the_way_is_smooth_and_near_what_was_meant():
    period, parts = 0.05, 10
    actions = way(period * np.arange(20))
    fine = period / parts * np.arange(19 * parts)
    cubics = curve(POSE, actions)
    found = np.array([along(POSE, cubics[k // parts], k % parts / parts) for k in range(19 * parts)])
    meant = way(fine)
    np.testing.assert_allclose(found[:, POSE.linear], meant[:, POSE.linear], atol=2e-4)
    turned = se3.quat_to_matrix(found[:, POSE.quaternions]) @ np.swapaxes(
        se3.quat_to_matrix(meant[:, POSE.quaternions]), -1, -2
    )
    assert np.linalg.norm(se3.log_so3(turned), axis=-1).max() < 5e-3
    # Straight lines between the actions change the velocity at each by acceleration * period at once.
    position = found[:, POSE.linear]
    acceleration = np.diff(position, 2, axis=0) / (period / parts) ** 2
    meant_acceleration = np.diff(meant[:, POSE.linear], 2, axis=0) / (period / parts) ** 2
    inside = slice(parts, -parts)
    assert np.abs(acceleration[inside]).max() < 2.0 * np.abs(meant_acceleration[inside]).max()


def test_the_last_action_is_held():
    actions = way([0.0, 0.05, 0.1])
    np.testing.assert_allclose(along(POSE, curve(POSE, actions)[2], 0.7), actions[2], atol=1e-12)


def test_a_single_action_is_held():
    action = way([0.3])
    np.testing.assert_allclose(along(POSE, curve(POSE, action)[0], 0.4), action[0], atol=1e-12)
