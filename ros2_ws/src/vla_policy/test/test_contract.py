"""A policy that does not fit the robot is refused before it may drive, with every mismatch named."""

from dataclasses import replace

import pytest
from vla_core.actions import ActionSpace
from vla_core.robot import load_robot
from vla_models.policy import PolicySpec
from vla_policy.contract import ContractError, check, mismatches


def space(arms=("arm",), kind="pose", joints=()):
    return ActionSpace(
        arms=arms,
        kind=kind,
        joints=joints,
        reference="absolute",
        frame="base",
        rotation="quaternion",
        gripper=(0.0, 1.0),
    )


def spec(**changes):
    values = dict(
        name="p",
        recipe="flow",
        cameras={"scene": (96, 128), "wrist": (96, 128)},
        arms=("arm",),
        state="pose",
        action_space=space(),
        horizon=16,
        period=0.05,
    )
    return PolicySpec(**{**values, **changes})


def test_a_policy_made_for_the_robot_passes():
    assert mismatches(spec(), load_robot("panda")) == []


def test_each_mismatch_is_named_in_one_message():
    policy = spec(cameras={"scene": (96, 96), "head": (96, 128)}, period=0.001)
    with pytest.raises(ContractError) as error:
        check(policy, load_robot("panda"))
    text = str(error.value)
    for part in ("camera head", "camera scene: the policy was trained on images of 96x96", "period"):
        assert part in text


def test_the_arms_have_to_be_the_same():
    with pytest.raises(ContractError, match=r"arms: the policy drives \['arm'\], the robot has \['left', 'right'\]"):
        check(spec(cameras={"top": (96, 128)}), load_robot("aloha"))


def test_the_joints_have_to_be_as_many():
    robot = load_robot("panda")
    joint = spec(
        action_space=space(kind="joint", joints=(6,)), state="joint", joints={"arm": tuple(f"j{i}" for i in range(6))}
    )
    with pytest.raises(ContractError, match="drives 6 joints, the robot has 7"):
        check(joint, robot)


def test_an_arm_without_gripper_cannot_serve_a_policy_with_one():
    robot = load_robot("panda")
    bare = replace(robot, arms=(replace(robot.arms[0], gripper=None),))
    with pytest.raises(ContractError, match="the robot has none"):
        check(spec(), bare)
