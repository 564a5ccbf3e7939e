"""From messages to what the safety controller takes, and from what it decides to messages.

The node publishes with these every control period, so messages are made once and filled in anew; a recorder of
lock-step rollouts makes new ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import Pose, Vector3, WrenchStamped
from sensor_msgs.msg import JointState
from vla_core.robot import Arm, Robot
from vla_core.se3 import matrix_to_pose
from vla_core.time import seconds, to_msg
from vla_msgs import msg
from vla_msgs.msg import ArmSafety, DriverStatus, SafetyEvent, SafetyStatus

from vla_control.command import ArmCommand, Command
from vla_control.safety import Event, JointTarget, Measured, SafetyDecision


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
        observation=seconds(message.observation) or math.nan,
    )


def _read_arm(part: msg.ArmCommand) -> ArmCommand:
    if part.mode == msg.ArmCommand.JOINT:
        return ArmCommand(joints=np.array(part.joints), gripper=part.gripper)
    if part.mode == msg.ArmCommand.DELTA:
        t, r = part.translation, part.rotation
        return ArmCommand(delta=np.array([t.x, t.y, t.z, r.x, r.y, r.z]), gripper=part.gripper)
    return ArmCommand()  # an unknown mode: refused for what it lacks


def read_joint_states(message: JointState, robot: Robot) -> Measured:
    """What joint states tell of all arms and grippers; efforts where the message has them for all joints.

    Raises:
        ValueError: a joint is missing.
    """
    found = dict(zip(message.name, message.position))
    efforts = dict(zip(message.name, message.effort))
    try:
        return Measured(
            stamp=seconds(message.header.stamp),
            position={arm.name: np.array([found[j] for j in arm.joints]) for arm in robot.arms},
            gripper={arm.name: arm.gripper.opening(found) for arm in robot.arms if arm.gripper},
            effort={
                arm.name: np.array([efforts[j] for j in arm.joints])
                for arm in robot.arms
                if all(j in efforts for j in arm.joints)
            },
        )
    except KeyError as error:
        raise ValueError(f"joint states: expected joint {error.args[0]!r}, found {list(found)}") from None


def read_wrench(message: WrenchStamped, arm: Arm) -> np.ndarray:
    """Force, N, and torque, N m, (6,) on the tool of `arm`, in its frame.

    Raises:
        ValueError: it is in another frame.
    """
    if message.header.frame_id not in ("", arm.tool.frame):
        raise ValueError(f"wrench of {arm.name}: expected frame {arm.tool.frame!r}, found {message.header.frame_id!r}")
    f, t = message.wrench.force, message.wrench.torque
    return np.array([f.x, f.y, f.z, t.x, t.y, t.z])


def read_drivers(message: DriverStatus) -> dict[str, str]:
    """Arm -> why it does not follow, "" when it does."""
    return {part.arm: part.halted for part in message.arms}


def write_event(event: Event, robot: Robot, stamp: Time) -> SafetyEvent:
    """What the controller tells of a command that was limited, refused or stopped."""
    message = SafetyEvent(kind=event.kind, arm=event.arm, reasons=list(event.reasons), text=event.text)
    message.header.stamp, message.header.frame_id = stamp, robot.base_frame
    message.before = np.asarray(event.before, float).ravel().tolist()
    message.after = np.asarray(event.after, float).ravel().tolist()
    return message


def write_command(command: Command, robot: Robot, stamp: Time) -> msg.Command:
    """What a sender of the command publishes."""
    message = msg.Command(sequence=command.sequence, source=command.source, period=command.period, hold=command.hold)
    message.header.stamp, message.header.frame_id = stamp, robot.base_frame
    if not math.isnan(command.observation):
        message.observation.sec, message.observation.nanosec = to_msg(command.observation)
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
    message.stop_category = decision.stop_category
    message.distance, message.nearest = float(decision.distance), decision.nearest
    for part in message.arms:
        target = targets[part.arm]
        if part.arm in decision.goal:  # not when the very first period failed
            _write_pose(part.goal, decision.goal[part.arm])
            _write_pose(part.commanded, decision.commanded[part.arm])
        part.joints, part.velocity = target.position.tolist(), target.velocity.tolist()
        part.gripper, part.limited = float(target.gripper), list(decision.limited.get(part.arm, ()))
    return message


def _write_pose(pose: Pose, T: np.ndarray) -> None:
    p, q = pose.position, pose.orientation
    p.x, p.y, p.z, q.x, q.y, q.z, q.w = matrix_to_pose(T).tolist()
