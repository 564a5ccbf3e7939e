"""From messages to what the executor takes, and from what it gives to messages. Plain data both ways, no rclpy."""

from __future__ import annotations

import numpy as np
from geometry_msgs.msg import Vector3
from vla_core import se3
from vla_core.robot import Robot
from vla_core.time import seconds
from vla_msgs.msg import ActionChunk, ActionTrajectory, ArmCommand, ChunkRequest, Command, SafetyStatus
from vla_ros.messages import time_message

from vla_execution.chunk import Chunk, ChunkRefused
from vla_execution.executor import ExecutorCommand, Request
from vla_execution.goal import ArmStatus, Status

_KINDS = {ActionTrajectory.POSE: "pose", ActionTrajectory.JOINT: "joint"}
_STATES = {
    SafetyStatus.DISARMED: "disarmed",
    SafetyStatus.ARMED: "armed",
    SafetyStatus.RUNNING: "running",
    SafetyStatus.HOLDING: "holding",
    SafetyStatus.STOPPING: "stopping",
    SafetyStatus.STOPPED: "stopped",
    SafetyStatus.FAULT: "fault",
}


def read_chunk(message: ActionChunk, robot: Robot) -> Chunk:
    """The chunk of an answer without error. Raises ChunkRefused when its numbers are no chunk for this robot."""
    actions = message.actions
    if actions.representation not in _KINDS:
        raise ChunkRefused(f"representation: expected POSE or JOINT, found {actions.representation}")
    if len(actions.data) != actions.horizon * actions.dimension or actions.horizon == 0:
        raise ChunkRefused(
            f"actions: expected {actions.horizon} x {actions.dimension} numbers, found {len(actions.data)}"
        )
    if tuple(actions.arms) != robot.arm_names:
        raise ChunkRefused(f"arms: expected {list(robot.arm_names)}, found {list(actions.arms)}")
    kind = _KINDS[actions.representation]
    return Chunk(
        targets=np.array(actions.data).reshape(actions.horizon, actions.dimension),
        start=seconds(actions.start),
        period=actions.period,
        kind=kind,
        arms=tuple(actions.arms),
        widths=tuple(len(arm.joints) + 1 for arm in robot.arms) if kind == "joint" else (),
        observed=seconds(message.header.stamp),
        frame=actions.frame_id or message.header.frame_id,
        id=message.request_id,
        policy=message.policy,
    )


def read_status(message: SafetyStatus) -> Status:
    """The safety status as the executor takes it."""
    return Status(
        stamp=seconds(message.header.stamp),
        state=_STATES.get(message.state, f"in an unknown state ({message.state})"),
        source=message.source,
        sequence=message.sequence,
        arms={
            arm.arm: ArmStatus(goal=_matrix(arm.goal), joints=np.array(arm.joints), gripper=arm.gripper)
            for arm in message.arms
        },
    )


def write_command(command: ExecutorCommand, robot: Robot, source: str) -> Command:
    """A control period of motion as a message."""
    message = Command()
    message.header.stamp = time_message(command.stamp)
    message.header.frame_id = robot.base_frame
    message.sequence = command.sequence
    message.source = source
    message.period = command.period
    message.hold = command.hold
    message.observation = time_message(command.observed)
    message.chunk = command.chunk
    message.boundary_translation, message.boundary_rotation = command.boundary
    for name, motion in command.arms.items():
        arm = ArmCommand(arm=name, gripper=motion.gripper)
        if motion.delta is not None:
            arm.mode = ArmCommand.DELTA
            arm.translation = Vector3(**dict(zip("xyz", motion.delta[:3].tolist(), strict=True)))
            arm.rotation = Vector3(**dict(zip("xyz", motion.delta[3:].tolist(), strict=True)))
        else:
            arm.mode = ArmCommand.JOINT
            arm.joints = motion.joints.tolist()
        message.arms.append(arm)
    return message


def write_request(request: Request, robot: Robot) -> ChunkRequest:
    """A request for the next chunk as a message."""
    message = ChunkRequest()
    message.header.stamp = time_message(request.stamp)
    message.header.frame_id = robot.base_frame
    message.id = request.id
    plan = request.plan
    message.delay = plan.delay
    message.execution_horizon = plan.execution_horizon
    message.guidance = plan.guidance
    message.schedule = plan.schedule
    message.beta = plan.beta
    if plan.remainder is not None:
        chunk, out = plan.remainder, message.remainder
        out.frame_id = robot.base_frame
        out.arms = list(chunk.arms)
        out.representation = {kind: code for code, kind in _KINDS.items()}[chunk.kind]
        out.start = time_message(chunk.start)
        out.period = chunk.period
        out.horizon, out.dimension = chunk.targets.shape
        out.data = chunk.targets.ravel().tolist()
    return message


def _matrix(pose) -> np.ndarray:
    """(4, 4) of a geometry_msgs/Pose."""
    p, q = pose.position, pose.orientation
    return se3.pose_to_matrix([p.x, p.y, p.z, q.x, q.y, q.z, q.w])
