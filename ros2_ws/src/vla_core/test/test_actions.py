"""Action spaces: every dialect both ways, what its numbers mean, and what is refused."""

import json
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from vla_core import se3
from vla_core.actions import (
    FRAMES,
    REFERENCES,
    ROTATIONS,
    ActionSpace,
    ActionSpaceError,
    join_poses,
    split_poses,
)

GRIPPERS = ((0, 1), (-1, 1), (1, 0), (0.08, -0.01))
#: Turns where a rotation dialect is at its worst: none, tiny, half a turn about axes, gimbal lock.
SPECIAL = np.stack(
    [
        np.eye(3),
        Rotation.from_rotvec([1e-9, -1e-10, 0]).as_matrix(),
        np.diag([1.0, -1.0, -1.0]),
        np.diag([-1.0, 1.0, -1.0]),
        np.diag([-1.0, -1.0, 1.0]),
        Rotation.from_rotvec((math.pi - 1e-9) * np.array([0.6, 0.0, 0.8])).as_matrix(),
        Rotation.from_euler("xyz", [0.3, math.pi / 2, -1.0]).as_matrix(),
        Rotation.from_euler("xyz", [-2.0, -math.pi / 2 + 1e-9, 0.4]).as_matrix(),
    ]
)


def random_targets(rng, steps, arms, special=0.4):
    """Pose targets (steps, 8 arms): rotations at random, some of them special; signs of quaternions at random."""
    R = Rotation.random(steps * arms, rng=rng).as_matrix().reshape(steps, arms, 3, 3)
    chosen = rng.uniform(size=(steps, arms)) < special
    R[chosen] = SPECIAL[rng.integers(len(SPECIAL), size=chosen.sum())]
    targets = join_poses(se3.transform(R, rng.uniform(-1, 1, (steps, arms, 3))), rng.uniform(0, 1, (steps, arms)))
    parts = targets.reshape(steps, arms, 8)
    parts[..., 3:7] *= rng.choice([-1.0, 1.0], (steps, arms, 1))
    return targets


def same_poses(found, expected, tolerance=1e-9):
    """Equal positions, rotations and grippers; quaternions up to their sign, each element to the tolerance."""
    a, b = (x.reshape(*x.shape[:-1], -1, 8).copy() for x in (found, expected))
    a[..., 3:7] *= np.sign(np.sum(a[..., 3:7] * b[..., 3:7], axis=-1, keepdims=True))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


ALL_POSE_DIALECTS = list(product(REFERENCES, FRAMES, ROTATIONS))


@pytest.mark.parametrize(("reference", "frame", "rotation"), ALL_POSE_DIALECTS)
@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 3), st.sampled_from(GRIPPERS))
def test_pose_targets_come_back_from_every_dialect(reference, frame, rotation, seed, steps, arms, gripper):
    space = ActionSpace(tuple("abc"[:arms]), "pose", (), reference, frame, rotation, gripper)
    rng = np.random.default_rng(seed)
    targets, anchor = random_targets(rng, steps, arms), random_targets(rng, 1, arms)[0]
    actions = space.encode(targets, anchor)
    assert actions.shape == (steps, space.dim)
    same_poses(space.decode(actions, anchor), targets)


@pytest.mark.parametrize("reference", REFERENCES)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.sampled_from(GRIPPERS))
def test_joint_targets_come_back_from_every_dialect(reference, seed, steps, gripper):
    space = ActionSpace(("left", "right"), "joint", (6, 7), reference, gripper=gripper)
    rng = np.random.default_rng(seed)
    targets, anchor = rng.uniform(-3, 3, (steps, 15)), rng.uniform(-3, 3, 15)
    targets[:, space.gripper_indices] = rng.uniform(0, 1, (steps, 2))
    np.testing.assert_allclose(space.decode(space.encode(targets, anchor), anchor), targets, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("reference", "frame", "rotation"), ALL_POSE_DIALECTS)
def test_actions_come_back_from_targets(reference, frame, rotation):
    """What a policy said is what its prefix is built from again (small turns, where every dialect is unique)."""
    rng = np.random.default_rng(1)
    space = ActionSpace(("a",), "pose", (), reference, frame, rotation, (-1, 1))
    anchor = np.array([0.4, 0.0, 0.3, 0.0, 0.0, 0.0, 1.0, 0.5])
    R = se3.exp_so3(rng.uniform(-0.1, 0.1, (9, 3)))
    actions = np.concatenate([rng.uniform(-0.1, 0.1, (9, 3)), ROTATIONS[rotation][2](R), rng.uniform(-1, 1, (9, 1))], 1)
    np.testing.assert_allclose(space.encode(space.decode(actions, anchor), anchor), actions, atol=1e-12)


@pytest.mark.parametrize(("reference", "frame"), list(product(REFERENCES, FRAMES)))
def test_decoding_follows_the_definition_step_by_step(reference, frame):
    rng = np.random.default_rng(2)
    space = ActionSpace(("a",), "pose", (), reference, frame, "rotvec")
    anchor = random_targets(rng, 1, 1)[0]
    actions = np.concatenate([rng.uniform(-1, 1, (11, 6)), rng.uniform(0, 1, (11, 1))], axis=1)
    T0 = se3.pose_to_matrix(anchor[:7])
    expected = []
    for action in actions:
        v, w = action[:3], action[3:6]
        if reference == "absolute":
            T = se3.transform(se3.exp_so3(w), v)
        elif frame == "base":
            T = se3.apply_delta(T0, np.concatenate([v, w]))
        else:
            T = T0 @ se3.transform(se3.exp_so3(w), v)
        expected.append(np.concatenate([se3.matrix_to_pose(T), action[6:]]))
        if reference == "step":
            T0 = T
    same_poses(space.decode(actions, anchor), np.array(expected), 1e-12)


def test_relative_actions_of_the_anchor_itself_are_nothing():
    anchor = random_targets(np.random.default_rng(3), 1, 2)[0]
    for reference, frame in product(("chunk", "step"), FRAMES):
        space = ActionSpace(("a", "b"), "pose", (), reference, frame, "rotvec")
        actions = space.encode(np.tile(anchor, (4, 1)), anchor).reshape(4, 2, 7)
        np.testing.assert_allclose(actions[..., :6], 0, atol=1e-12)
        np.testing.assert_allclose(actions[..., 6], np.tile(anchor[[7, 15]], (4, 1)))


@pytest.mark.parametrize(
    ("gripper", "expected"), [((0, 1), [0, 0.25, 1]), ((-1, 1), [-1, -0.5, 1]), ((1, 0), [1, 0.75, 0])]
)
def test_gripper_ranges(gripper, expected):
    space = ActionSpace(("a",), "joint", (1,), gripper=gripper)
    actions = space.encode([[0.0, 0.0], [0.0, 0.25], [0.0, 1.0]], [0.0, 0.5])
    np.testing.assert_allclose(actions[:, 1], expected)


def test_decoded_openings_are_clipped():
    space = ActionSpace(("a",), "joint", (1,), gripper=(1, -1))
    assert space.decode([[0.0, 1.3], [0.0, -1.2]], [0.0, 0.0])[:, 1].tolist() == [0.0, 1.0]


def test_the_default_dialect_is_the_target_layout():
    rng = np.random.default_rng(4)
    space = ActionSpace(("a", "b"), "pose")
    targets, anchor = random_targets(rng, 6, 2), random_targets(rng, 1, 2)[0]
    assert space.dim == space.target_dim == 16
    same_poses(space.encode(targets, anchor), targets, 1e-15)


@pytest.mark.parametrize("sign", [-1, 1])
def test_quaternions_keep_the_sign_of_the_anchor_along_the_chunk(sign):
    """A tool that points down turns about half a turn, where qw changes sign: no element may jump there."""
    turns = np.linspace(math.pi - 0.3, math.pi + 0.3, 25)
    q = Rotation.from_rotvec(turns[:, None] * np.array([1.0, 0.0, 0.0])).as_quat(canonical=True)
    assert np.abs(np.diff(q, axis=0)).max() > 1
    targets = np.concatenate([np.zeros((25, 3)), q, np.ones((25, 1))], axis=1)
    anchor = targets[0].copy()
    anchor[3:7] *= sign
    space = ActionSpace(("a",), "pose")
    for values in (space.encode(targets, anchor), space.decode(targets, anchor)):
        assert np.abs(np.diff(values[:, 3:7], axis=0)).max() < 0.02
        assert values[0, 3:7] @ anchor[3:7] > 0


def test_relative_quaternions_have_positive_w():
    rng = np.random.default_rng(5)
    for reference, frame in product(("chunk", "step"), FRAMES):
        space = ActionSpace(("a",), "pose", (), reference, frame, "quaternion")
        assert (space.encode(random_targets(rng, 30, 1), random_targets(rng, 1, 1)[0])[:, 6] >= 0).all()


def test_rpy_in_gimbal_lock_has_no_yaw():
    pose = [0, 0, 0, *Rotation.from_euler("xyz", [0.4, math.pi / 2, 0.1]).as_quat(), 0]
    actions = ActionSpace(("a",), "pose", rotation="rpy").encode([pose], pose)
    np.testing.assert_allclose(actions[0, 3:6], [0.3, math.pi / 2, 0.0], atol=1e-7)


def test_rot6d_and_quaternions_of_any_length_are_decoded():
    R = Rotation.random(rng=np.random.default_rng(6)).as_matrix()
    d = np.concatenate([3 * R[:, 0], 0.5 * R[:, 1] + R[:, 0]])
    q = -7 * Rotation.from_matrix(R).as_quat()
    anchor = [0, 0, 0, 0, 0, 0, 1, 0]
    for rotation, numbers in (("rot6d", d), ("quaternion", q)):
        target = ActionSpace(("a",), "pose", rotation=rotation).decode([[1, 2, 3, *numbers, 0.5]], anchor)
        same_poses(target, np.array([[1, 2, 3, *Rotation.from_matrix(R).as_quat(), 0.5]]))


@pytest.mark.parametrize(("reference", "frame", "rotation"), ALL_POSE_DIALECTS)
def test_leading_dimensions_broadcast(reference, frame, rotation):
    rng = np.random.default_rng(7)
    space = ActionSpace(("a", "b"), "pose", (), reference, frame, rotation)
    targets = np.stack([random_targets(rng, 5, 2) for _ in range(3)])
    anchors = random_targets(rng, 3, 2)
    actions = space.encode(targets, anchors)
    assert actions.shape == (3, 5, space.dim)
    for i in range(3):
        np.testing.assert_allclose(actions[i], space.encode(targets[i], anchors[i]), atol=1e-12)
    assert space.encode(targets[0], anchors).shape == space.encode(targets, anchors[0]).shape == (3, 5, space.dim)
    same_poses(space.decode(actions, anchors), targets)


@pytest.mark.parametrize("reference", REFERENCES)
def test_no_actions_give_no_targets(reference):
    for space in (ActionSpace(("a",), "pose", (), reference), ActionSpace(("a",), "joint", (7,), reference)):
        anchor = np.array([0, 0, 0, 0, 0, 0, 1, 0.5])
        assert space.decode(np.empty((0, 8)), anchor).shape == space.encode(np.empty((0, 8)), anchor).shape == (0, 8)


def test_what_is_given_is_not_changed():
    rng = np.random.default_rng(8)
    targets, anchor = random_targets(rng, 5, 1), random_targets(rng, 1, 1)[0]
    kept = targets.copy(), anchor.copy()
    for reference, frame, rotation in ALL_POSE_DIALECTS:
        space = ActionSpace(("a",), "pose", (), reference, frame, rotation)
        space.decode(space.encode(targets, anchor), anchor)
    assert (targets == kept[0]).all() and (anchor == kept[1]).all()


def test_sizes_and_slices():
    space = ActionSpace(("left", "right"), "pose", rotation="rot6d")
    assert (space.dim, space.target_dim) == (20, 16)
    assert space.arm_slices() == {"left": slice(0, 8), "right": slice(8, 16)}
    assert space.arm_slices("action") == {"left": slice(0, 10), "right": slice(10, 20)}
    assert space.gripper_indices == (7, 15)
    joints = ActionSpace(("left", "right"), "joint", (6, 7))
    assert joints.arm_slices() == joints.arm_slices("action") == {"left": slice(0, 7), "right": slice(7, 15)}
    assert joints.gripper_indices == (6, 14)


def test_split_and_join_poses():
    targets = random_targets(np.random.default_rng(9), 4, 2)
    T, gripper = split_poses(targets)
    assert T.shape == (4, 2, 4, 4) and gripper.shape == (4, 2)
    same_poses(join_poses(T, gripper), targets, 1e-14)


# ------------------------------------------------------------------------------------------------- dictionaries


@pytest.mark.parametrize(
    "space",
    [
        ActionSpace(("left", "right"), "joint", (6, 6), "chunk", gripper=(1, 0)),
        ActionSpace(("arm",), "pose", (), "step", "tool", "rot6d", (-1, 1)),
    ],
)
def test_a_space_comes_back_from_json(space):
    assert ActionSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space


def good():
    return ActionSpace(("left", "right"), "pose", (), "chunk", "tool", "rot6d", (-1, 1)).to_dict()


@pytest.mark.parametrize("key", good())
def test_a_missing_key_is_refused(key):
    tree = good()
    del tree[key]
    with pytest.raises(ActionSpaceError, match=f"{key}: missing; expected keys"):
        ActionSpace.from_dict(tree)


def test_an_unknown_key_is_refused():
    with pytest.raises(ActionSpaceError, match="rotations: unknown key; expected"):
        ActionSpace.from_dict(good() | {"rotations": "rpy"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("arms", []),
        ("arms", "left"),
        ("arms", ["left", "left"]),
        ("arms", ["left", 3]),
        ("kind", "velocity"),
        ("kind", None),
        ("kind", "joint"),  # without the numbers of joints
        ("joints", [7, 7]),  # for poses
        ("joints", 7),
        ("reference", "delta"),
        ("frame", "world"),
        ("rotation", "euler"),
        ("gripper", [0, 0]),
        ("gripper", [0, math.nan]),
        ("gripper", [0]),
        ("gripper", [True, False]),
        ("gripper", 1.0),
    ],
)
def test_a_bad_value_is_refused_by_name(key, value):
    with pytest.raises(ActionSpaceError, match=f"action space: {'joints' if value == 'joint' else key}: expected"):
        ActionSpace.from_dict(good() | {key: value})


@pytest.mark.parametrize("joints", [(6,), (6, 0), (6, 6.0), (6, True)])
def test_joint_spaces_need_the_number_of_joints_of_every_arm(joints):
    with pytest.raises(ActionSpaceError, match="joints: expected"):
        ActionSpace(("left", "right"), "joint", joints)


def test_joint_spaces_have_no_rotation():
    with pytest.raises(ActionSpaceError, match="frame and rotation: expected their defaults for joints"):
        ActionSpace(("left",), "joint", (6,), rotation="rpy")


# ---------------------------------------------------------------------------------------------------- bad input

SPACE = ActionSpace(("a",), "pose", rotation="rot6d")
ANCHOR = np.array([0, 0, 0, 0, 0, 0, 1, 0.5])
GOOD = np.array([[0, 0, 0, 1, 0, 0, 0, 1, 0, 0.5]])


@pytest.mark.parametrize(
    ("actions", "anchor", "message"),
    [
        (GOOD[:, :9], ANCHOR, r"actions .*expected shape \(\.\.\., H, 10\), found \(1, 9\)"),
        (GOOD[0], ANCHOR, r"actions .*expected shape \(\.\.\., H, 10\), found \(10,\)"),
        (GOOD, ANCHOR[:7], r"anchor: expected shape \(\.\.\., 8\), found \(7,\)"),
        (GOOD * np.nan, ANCHOR, r"actions: expected finite numbers, found nan at \[0, 0\]"),
        (GOOD, ANCHOR + np.inf, "anchor: expected finite numbers"),
        (
            GOOD * 0,
            ANCHOR,
            "actions or anchor of arm 'a': first column of a 6D rotation: expected finite numbers of length",
        ),
        (GOOD, ANCHOR * 0, "actions or anchor of arm 'a': quaternion: expected"),
        (np.stack([GOOD] * 3), np.stack([ANCHOR] * 2), r"anchor: expected leading dimensions \(3,\) .*found \(2,\)"),
    ],
)
def test_actions_that_cannot_be_decoded_are_refused(actions, anchor, message):
    with pytest.raises(ActionSpaceError, match=message):
        SPACE.decode(actions, anchor)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (GOOD, r"targets .*expected shape \(\.\.\., H, 8\), found \(1, 10\)"),
        (ANCHOR[None] * 0, "targets or anchor of arm 'a': quaternion: expected"),
        (ANCHOR[None] * np.nan, "targets: expected finite numbers"),
    ],
)
def test_targets_that_cannot_be_encoded_are_refused(targets, message):
    with pytest.raises(ActionSpaceError, match=message):
        SPACE.encode(targets, ANCHOR)


def test_a_space_has_no_unknown_layout():
    with pytest.raises(ActionSpaceError, match="layout: expected"):
        SPACE.arm_slices("model")
