"""Samples to messages. Imports message classes only, no rclpy: bag tools use it too."""

from __future__ import annotations

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from geometry_msgs.msg import Point, Pose, Quaternion, Transform, TransformStamped, Vector3
from std_msgs.msg import Header
from vla_core import se3
from vla_msgs.msg import ArmState, CameraImage, Observation
from vla_ros.messages import time_message

from vla_perception.observation import ArmSample, CameraSample, ObservationSample


def transform_message(T: np.ndarray) -> Transform:
    """geometry_msgs/Transform of (4, 4); NaN everywhere when T has one."""
    x, y, z, qx, qy, qz, qw = _pose(T)
    return Transform(translation=Vector3(x=x, y=y, z=z), rotation=Quaternion(x=qx, y=qy, z=qz, w=qw))


def transform_stamped(parent: str, child: str, stamp: Time, T_parent_child: np.ndarray) -> TransformStamped:
    """geometry_msgs/TransformStamped of (4, 4)."""
    header = Header(stamp=stamp, frame_id=parent)
    return TransformStamped(header=header, child_frame_id=child, transform=transform_message(T_parent_child))


def transform_matrix(message: Transform) -> np.ndarray:
    """(4, 4) of a geometry_msgs/Transform."""
    t, r = message.translation, message.rotation
    return se3.pose_to_matrix([t.x, t.y, t.z, r.x, r.y, r.z, r.w])


def observation_message(sample: ObservationSample, robot: str, base_frame: str, sequence: int) -> Observation:
    """vla_msgs/Observation of a sample. Image messages are passed on as they came, not copied."""
    return Observation(
        header=Header(stamp=time_message(sample.time), frame_id=base_frame),
        sequence=sequence,
        robot=robot,
        images=[_camera(image) for image in sample.images],
        arms=[_arm(arm) for arm in sample.arms],
        skew=sample.skew,
        age=sample.age,
    )


def fault_status(node: str, faults: dict[str, str], values: dict[str, str]) -> DiagnosticStatus:
    """diagnostic_msgs/DiagnosticStatus: ERROR with the first fault as its message, or OK; `values` are added."""
    wrong = {name: fault for name, fault in faults.items() if fault}
    return DiagnosticStatus(
        level=DiagnosticStatus.ERROR if wrong else DiagnosticStatus.OK,
        name=node,
        message="; ".join(f"{name}: {fault}" for name, fault in wrong.items()) or "ok",
        values=[KeyValue(key=name, value=fault or "ok") for name, fault in faults.items()]
        + [KeyValue(key=key, value=value) for key, value in values.items()],
    )


def _camera(sample: CameraSample) -> CameraImage:
    return CameraImage(
        camera=sample.camera,
        image=sample.image,
        skew=sample.skew,
        k=sample.K.ravel(),
        t_base_camera=transform_message(sample.T_base_camera),
    )


def _arm(sample: ArmSample) -> ArmState:
    x, y, z, qx, qy, qz, qw = _pose(sample.tool)
    return ArmState(
        arm=sample.arm,
        joints=list(sample.joints),
        position=sample.position.tolist(),
        velocity=sample.velocity.tolist(),
        tool=Pose(position=Point(x=x, y=y, z=z), orientation=Quaternion(x=qx, y=qy, z=qz, w=qw)),
        gripper=sample.gripper,
    )


def _pose(T: np.ndarray) -> list[float]:
    return [np.nan] * 7 if np.isnan(T).any() else se3.matrix_to_pose(T).tolist()
