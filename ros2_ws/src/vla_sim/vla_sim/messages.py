"""ROS messages of a simulated robot: what the node publishes and the demonstrator writes into bags."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np
from geometry_msgs.msg import TransformStamped
from sensor_msgs.msg import CameraInfo, Image, JointState
from vla_core import se3
from vla_core.robot import Arm
from vla_msgs.msg import EpisodeEvent
from vla_ros.messages import time_message

from vla_sim.world import Episode, Outcome, World


def joint_state(time: float, names: Sequence[str], position: np.ndarray, velocity: np.ndarray) -> JointState:
    message = JointState(name=list(names))
    message.position, message.velocity = np.asarray(position).tolist(), np.asarray(velocity).tolist()
    # Not left empty: rmw pads a message that ends in an empty float64[], and strict bag readers refuse that.
    message.effort = [0.0] * len(message.name)
    message.header.stamp = time_message(time)
    return message


def image(world: World, camera: str, time: float, picture: np.ndarray) -> Image:
    """rgb8 image of a picture (H, W, 3) uint8 taken at `time` (s)."""
    height, width, _ = picture.shape
    message = Image(height=height, width=width, encoding="rgb8", step=3 * width)
    message.data = array("B", picture.tobytes())
    message.header.stamp = time_message(time)
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
    message.header.stamp, message.header.frame_id = time_message(time), world.robot.base_frame
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
    message.header.stamp = time_message(world.time)
    message.header.frame_id = world.robot.base_frame
    return message


def targets(message: JointState) -> Mapping[str, float]:
    """Joint name -> position of a message.

    Raises:
        ValueError: not one position for each name.
    """
    if len(message.name) != len(message.position):
        raise ValueError(f"joint targets: expected {len(message.name)} positions, found {len(message.position)}")
    return dict(zip(message.name, message.position, strict=True))
