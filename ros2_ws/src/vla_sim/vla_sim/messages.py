"""ROS messages of a simulated robot: what the node publishes and the demonstrator writes into bags."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import Point, Pose, Quaternion, TransformStamped, Vector3
from sensor_msgs.msg import CameraInfo, Image, JointState
from vla_control.command import Command
from vla_control.safety import JointTarget, SafetyDecision
from vla_core import se3
from vla_core.robot import Arm, Robot
from vla_core.time import to_msg
from vla_msgs import msg
from vla_msgs.msg import EpisodeEvent

from vla_sim.world import Episode, Outcome, World


def stamp(time: float) -> Time:
    """ROS time of a world time, s."""
    sec, nanosec = to_msg(time)
    return Time(sec=sec, nanosec=nanosec)


def joint_state(time: float, names: Sequence[str], position: np.ndarray, velocity: np.ndarray) -> JointState:
    message = JointState(name=list(names))
    message.position, message.velocity = np.asarray(position).tolist(), np.asarray(velocity).tolist()
    # Not left empty: rmw pads a message that ends in an empty float64[], and strict bag readers refuse that.
    message.effort = [0.0] * len(message.name)
    message.header.stamp = stamp(time)
    return message


def image(world: World, camera: str, time: float, picture: np.ndarray) -> Image:
    """rgb8 image of a picture (H, W, 3) uint8 taken at `time` (s)."""
    height, width, _ = picture.shape
    message = Image(height=height, width=width, encoding="rgb8", step=3 * width)
    message.data = array("B", picture.tobytes())
    message.header.stamp = stamp(time)
    message.header.frame_id = world.robot.camera(camera).frame
    return message


def camera_info(world: World, camera: str, of: Image) -> CameraInfo:
    """Intrinsics that belong to an image."""
    K = world.intrinsics(camera, of.width, of.height)
    message = CameraInfo(header=of.header, height=of.height, width=of.width, distortion_model="plumb_bob")
    message.d, message.k, message.r = [0.0] * 5, K.ravel().tolist(), np.eye(3).ravel().tolist()
    message.p = np.hstack([K, np.zeros((3, 1))]).ravel().tolist()
    return message


def tool_transform(world: World, arm: Arm, time: float) -> TransformStamped:
    """T_base_tool of an arm as simulated now."""
    message = TransformStamped(child_frame_id=arm.tool.frame)
    message.header.stamp, message.header.frame_id = stamp(time), world.robot.base_frame
    pose = se3.matrix_to_pose(world.tool_pose(arm.name)).tolist()
    translation, rotation = message.transform.translation, message.transform.rotation
    translation.x, translation.y, translation.z, rotation.x, rotation.y, rotation.z, rotation.w = pose
    return message


def episode_event(world: World, event: int, outcome: Outcome) -> EpisodeEvent:
    episode: Episode = world.episode
    message = EpisodeEvent(
        event=event,
        task=episode.task,
        seed=episode.seed,
        instruction=episode.instruction,
        detail=outcome.detail,
        reward=outcome.reward,
    )
    message.header.stamp = stamp(world.time)
    message.header.frame_id = world.robot.base_frame
    return message


def command(robot: Robot, command: Command) -> msg.Command:
    """What a sender of the command would have published."""
    message = msg.Command(sequence=command.sequence, source=command.source, period=command.period, hold=command.hold)
    message.header.stamp, message.header.frame_id = stamp(command.stamp), robot.base_frame
    for name, part in command.arms.items():
        arm = msg.ArmCommand(arm=name, gripper=float(part.gripper))
        if part.joints is not None:
            arm.mode, arm.joints = msg.ArmCommand.JOINT, np.asarray(part.joints, float).tolist()
        else:
            x, y, z, rx, ry, rz = map(float, part.delta)
            arm.translation, arm.rotation = Vector3(x=x, y=y, z=z), Vector3(x=rx, y=ry, z=rz)
        message.arms.append(arm)
    return message


def safety_status(world: World, decision: SafetyDecision, time: float) -> msg.SafetyStatus:
    """What the safety controller would have published with a decision that sends targets."""
    message = msg.SafetyStatus(
        state=int(decision.state),
        reason=decision.reason,
        source=decision.source,
        sequence=decision.sequence,
        command_age=float(decision.command_age),
        period=world.period,
    )
    message.header.stamp, message.header.frame_id = stamp(time), world.robot.base_frame
    for name, sent in decision.sent.items():
        arm = msg.ArmSafety(
            arm=name,
            goal=_pose(decision.goal[name]),
            commanded=_pose(decision.commanded[name]),
            joints=np.asarray(sent.position, float).tolist(),
            velocity=np.asarray(sent.velocity, float).tolist(),
            gripper=float(sent.gripper),
            limited=list(decision.limited[name]),
        )
        message.arms.append(arm)
    return message


def joint_targets(robot: Robot, arm: Arm, sent: JointTarget, time: float) -> JointState:
    """Physical targets of an arm's joints and fingers."""
    fingers = arm.gripper.positions(float(sent.gripper)) if arm.gripper else {}
    names = [*arm.joints, *fingers]
    position = [*map(float, sent.position), *fingers.values()]
    message = joint_state(time, names, position, [*map(float, sent.velocity), *[0.0] * len(fingers)])
    message.header.frame_id = robot.base_frame
    return message


def _pose(T: np.ndarray) -> Pose:
    x, y, z, qx, qy, qz, qw = se3.matrix_to_pose(T).tolist()
    return Pose(position=Point(x=x, y=y, z=z), orientation=Quaternion(x=qx, y=qy, z=qz, w=qw))


def targets(message: JointState) -> Mapping[str, float]:
    """Joint name -> position of a message.

    Raises:
        ValueError: not one position for each name.
    """
    if len(message.name) != len(message.position):
        raise ValueError(f"joint targets: expected {len(message.name)} positions, found {len(message.position)}")
    return dict(zip(message.name, message.position, strict=True))
