"""From messages to what the safety controller takes, and from what it decides to messages.

The node publishes with these every control period, so messages are made once and filled in anew; a recorder of
lock-step rollouts makes new ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import Pose, Vector3
from sensor_msgs.msg import JointState
from vla_core.robot import Arm, Robot
from vla_core.se3 import matrix_to_pose
from vla_core.time import seconds
from vla_msgs import msg
from vla_msgs.msg import ArmSafety, SafetyStatus

from vla_control.command import ArmCommand, Command
from vla_control.safety import JointTarget, SafetyDecision


def read_command(message: msg.Command) -> Command:
    """The command of a message, not yet checked; what cannot be read lacks what the check asks for."""
    arms = {part.arm: _read_arm(part) for part in message.arms}
    if len(arms) < len(message.arms):
        arms = {}  # an arm named twice: refused, as any wrong set of arms
    return Command(
        stamp=seconds(message.header.stamp),
        sequence=message.sequence,
        source=message.source,
        period=message.period,
        hold=message.hold,
        arms=arms,
        frame=message.header.frame_id,
    )


def _read_arm(part: msg.ArmCommand) -> ArmCommand:
    if part.mode == msg.ArmCommand.JOINT:
        return ArmCommand(joints=np.array(part.joints), gripper=part.gripper)
    if part.mode == msg.ArmCommand.DELTA:
        t, r = part.translation, part.rotation
        return ArmCommand(delta=np.array([t.x, t.y, t.z, r.x, r.y, r.z]), gripper=part.gripper)
    return ArmCommand()  # an unknown mode: refused for what it lacks


def write_command(command: Command, robot: Robot, stamp: Time) -> msg.Command:
    """What a sender of the command publishes."""
    message = msg.Command(sequence=command.sequence, source=command.source, period=command.period, hold=command.hold)
    message.header.stamp, message.header.frame_id = stamp, robot.base_frame
    for name, part in command.arms.items():
        arm = msg.ArmCommand(arm=name, gripper=float(part.gripper))
        if part.joints is not None:
            arm.mode, arm.joints = msg.ArmCommand.JOINT, np.asarray(part.joints, float).tolist()
        else:
            x, y, z, rx, ry, rz = map(float, part.delta)
            arm.translation, arm.rotation = Vector3(x=x, y=y, z=z), Vector3(x=rx, y=ry, z=rz)
        message.arms.append(arm)
    return message


def target_message(arm: Arm, frame: str) -> JointState:
    """An empty joint target of an arm and its fingers."""
    fingers = [joint.name for joint in arm.gripper.joints] if arm.gripper else []
    message = JointState(name=[*arm.joints, *fingers])
    # Not left empty: rmw pads a message that ends in an empty float64[], and strict bag readers refuse that.
    message.effort = [0.0] * len(message.name)
    message.header.frame_id = frame
    return message


def fill_target(message: JointState, arm: Arm, target: JointTarget, stamp: Time) -> JointState:
    """Write a target, rad, m and their rates, into the message of its arm."""
    position, velocity = target.position.tolist(), target.velocity.tolist()
    if arm.gripper:
        fingers = arm.gripper.positions(float(target.gripper))
        position += fingers.values()
        velocity += [0.0] * len(fingers)
    message.header.stamp, message.position, message.velocity = stamp, position, velocity
    return message


def status_message(robot: Robot) -> SafetyStatus:
    """An empty status of a robot's controller."""
    message = SafetyStatus(arms=[ArmSafety(arm=arm.name) for arm in robot.arms])
    message.header.frame_id = robot.base_frame
    return message


def fill_status(
    message: SafetyStatus,
    decision: SafetyDecision,
    targets: Mapping[str, JointTarget],
    stamp: Time,
    period: float,
    refused: int = 0,
) -> SafetyStatus:
    """Write a decision into the status.

    Args:
        targets: arm -> its target as commanded, whether or not it is sent.
        period: of this control step, s. refused: commands refused so far.
    """
    message.header.stamp = stamp
    message.state, message.reason = int(decision.state), decision.reason
    message.source, message.sequence = decision.source, decision.sequence
    message.command_age = float(decision.command_age)
    message.period, message.refused = period, refused
    for part in message.arms:
        target = targets[part.arm]
        _write_pose(part.goal, decision.goal[part.arm])
        _write_pose(part.commanded, decision.commanded[part.arm])
        part.joints, part.velocity = target.position.tolist(), target.velocity.tolist()
        part.gripper, part.limited = float(target.gripper), list(decision.limited[part.arm])
    return message


def _write_pose(pose: Pose, T: np.ndarray) -> None:
    p, q = pose.position, pose.orientation
    p.x, p.y, p.z, q.x, q.y, q.z, q.w = matrix_to_pose(T).tolist()
