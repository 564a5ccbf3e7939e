"""From messages to what a policy takes, and from what it gives to messages. Plain data both ways, no rclpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from vla_core.time import seconds
from vla_execution.chunk import Chunk, ChunkRefused, resampled
from vla_models.policy import ArmState, InferenceRequest, PolicyObservation, PolicySpec
from vla_msgs.msg import ActionTrajectory, ChunkRequest, Observation

REPRESENTATIONS = {"pose": ActionTrajectory.POSE, "joint": ActionTrajectory.JOINT}


class MessageError(ValueError):
    """A message that a policy cannot use."""


def image_array(image) -> np.ndarray:
    """(H, W, 3) uint8 RGB view of a sensor_msgs/Image of encoding rgb8 (bgr8: a copy)."""
    if image.encoding not in ("rgb8", "bgr8"):
        raise MessageError(f"image: expected encoding rgb8 or bgr8, found {image.encoding!r}")
    data = np.frombuffer(image.data, np.uint8)
    if data.size != image.height * image.step or image.step < 3 * image.width:
        raise MessageError(
            f"image: expected {image.height} rows of {image.step} bytes, at least 3 x {image.width} each, "
            f"found {data.size} bytes"
        )
    array = data.reshape(image.height, image.step)[:, : 3 * image.width].reshape(image.height, image.width, 3)
    return array if image.encoding == "rgb8" else array[..., ::-1].copy()


def policy_observation(
    message: Observation, spec: PolicySpec, instruction: str, before: Sequence[Observation] = ()
) -> PolicyObservation:
    """What the policy sees of a vla_msgs/Observation: its own cameras and arms only.

    Args:
        before: earlier observations, oldest first; of these it sees what its history wants (`earlier`).

    Raises:
        MessageError: a camera or an arm of the policy is not in the message.
    """
    images = {i.camera: i.image for i in message.images}
    arms = {a.arm: a for a in message.arms}
    needed_cameras = [name for name in spec.cameras if name not in spec.optional]
    for kind, needed, found in (("camera", needed_cameras, images), ("arm", spec.action_space.arms, arms)):
        missing = [name for name in needed if name not in found]
        if missing:
            raise MessageError(f"observation: expected {kind} {missing[0]!r}, found {sorted(found)}")
    state = {}
    for name in spec.action_space.arms:
        arm = arms[name]
        p, q = arm.tool.position, arm.tool.orientation
        state[name] = ArmState(
            joints=np.array(arm.position),
            tool=np.array([p.x, p.y, p.z, q.x, q.y, q.z, q.w]),
            gripper=arm.gripper,
        )
    return PolicyObservation(
        images={name: image_array(images[name]) for name in spec.cameras if name in images},
        state=state,
        instruction=instruction,
        time=seconds(message.header.stamp),
        history=tuple(policy_observation(m, spec, instruction) for m in earlier(message, spec, before)),
    )


def earlier(message: Observation, spec: PolicySpec, before: Sequence[Observation]) -> list[Observation]:
    """The observations nearest to each time that the policy's history wants before `message`, oldest first.

    Times before the first observation there is are left out: a policy repeats its oldest.
    """
    now = seconds(message.header.stamp)
    stamps = np.array([seconds(m.header.stamp) for m in before])
    found = []
    for k in range(spec.history - 1, 0, -1):
        wanted = now - k * spec.period
        if len(stamps) and wanted > stamps[0] - 0.5 * spec.period:
            found.append(before[int(np.abs(stamps - wanted).argmin())])
    return found


def inference_request(message: ChunkRequest | None, spec: PolicySpec, observed: float, seed: int) -> InferenceRequest:
    """The request in the policy's own time: its remainder sampled at the due times of the chunk to come.

    Action k of the chunk is due at `observed` + k * period, as in training; so entry k of the remainder is where the
    running chunk wants the robot to be at that time.

    Args:
        message: the executor's request; None: the policy runs free.
        observed: reference time of the observation, s.
    """
    if message is None:
        return InferenceRequest(seed=seed)
    remainder = None
    if message.remainder.horizon and message.guidance:
        sampled = resampled(trajectory_chunk(message.remainder), observed, spec.period, spec.length)
        remainder = sampled if len(sampled) else None
    return InferenceRequest(
        remainder=remainder,
        delay=int(message.delay),
        execution_horizon=int(message.execution_horizon),
        guidance=message.guidance if remainder is not None else "",
        schedule=message.schedule or "exp",
        beta=float(message.beta) if message.beta > 0 else 5.0,
        seed=seed,
    )


def trajectory_chunk(message: ActionTrajectory) -> Chunk:
    """A vla_msgs/ActionTrajectory as a Chunk; MessageError when its numbers are no trajectory."""
    kind = {v: k for k, v in REPRESENTATIONS.items()}.get(message.representation)
    expected = message.horizon * message.dimension
    if kind is None or len(message.data) != expected:
        raise MessageError(
            f"trajectory: expected representation POSE or JOINT and {message.horizon} x {message.dimension} numbers, "
            f"found representation {message.representation} and {len(message.data)} numbers"
        )
    try:
        return Chunk(
            targets=np.array(message.data).reshape(message.horizon, message.dimension),
            start=seconds(message.start), period=message.period, kind=kind, arms=tuple(message.arms),
        )  # fmt: skip
    except ChunkRefused as error:
        raise MessageError(f"trajectory: {error}") from error


def trajectory_message(targets: np.ndarray, start, spec: PolicySpec, frame: str) -> ActionTrajectory:
    """Targets (H, D) whose first is due at `start` (builtin_interfaces/Time) as a message."""
    message = ActionTrajectory()
    message.frame_id = frame
    message.arms = list(spec.action_space.arms)
    message.representation = REPRESENTATIONS[spec.action_space.kind]
    message.start = start
    message.period = float(spec.period)
    message.horizon, message.dimension = targets.shape
    message.data = targets.astype(float).ravel().tolist()
    return message
