"""Which topics of a robot are recorded, and the quality of service of each."""

from __future__ import annotations

from dataclasses import dataclass

from vla_core.robot import Robot

from vla_teleop.bag_metadata import Qos

#: Raw images or none at all.
IMAGE_MODES = ("raw", "none")


@dataclass(frozen=True)
class RecordedTopic:
    """Topic name, `package/msg/Type` and the QoS that its publisher offers."""

    name: str
    type: str
    qos: Qos = Qos()

    @property
    def latched(self) -> bool:
        """Whether the newest message holds until the next one, so that each bag begins with it."""
        return self.qos.durability == "transient_local"


_LATCHED = Qos(durability="transient_local", depth=1)

_TOPICS = (
    RecordedTopic("/joint_states", "sensor_msgs/msg/JointState"),
    RecordedTopic("/command", "vla_msgs/msg/Command", Qos(depth=5)),
    RecordedTopic("/action_chunk", "vla_msgs/msg/ActionChunk", Qos(depth=5)),
    RecordedTopic("/chunk_request", "vla_msgs/msg/ChunkRequest", Qos(depth=5)),
    RecordedTopic("/safety_status", "vla_msgs/msg/SafetyStatus"),
    RecordedTopic("/safety_events", "vla_msgs/msg/SafetyEvent", Qos(depth=100)),
    RecordedTopic("/driver_status", "vla_msgs/msg/DriverStatus"),
    RecordedTopic("/emergency_stop", "std_msgs/msg/Bool"),
    RecordedTopic("/enable", "std_msgs/msg/Bool"),
    RecordedTopic("/tf", "tf2_msgs/msg/TFMessage", Qos(depth=100)),
    RecordedTopic("/tf_static", "tf2_msgs/msg/TFMessage", _LATCHED),
    RecordedTopic("/instruction", "std_msgs/msg/String", _LATCHED),
    RecordedTopic("/episode_events", "vla_msgs/msg/EpisodeEvent", Qos(depth=50)),
    RecordedTopic("/policy_status", "vla_msgs/msg/PolicyStatus", _LATCHED),
    RecordedTopic("/diagnostics", "diagnostic_msgs/msg/DiagnosticArray"),
)


def recorded_topics(robot: Robot, images: str) -> tuple[RecordedTopic, ...]:
    """The topics recorded for `robot`; `images` is one of IMAGE_MODES."""
    if images not in IMAGE_MODES:
        raise ValueError(f"record_images: expected one of {IMAGE_MODES}, found {images!r}")
    topics = list(_TOPICS)
    for arm in robot.arms:
        topics.append(RecordedTopic(f"/{arm.name}/joint_targets", "sensor_msgs/msg/JointState", Qos(depth=5)))
        topics.append(RecordedTopic(f"/{arm.name}/wrench", "geometry_msgs/msg/WrenchStamped"))
    for camera in robot.cameras:
        base = f"/camera/{camera.name}"
        topics.append(RecordedTopic(f"{base}/camera_info", "sensor_msgs/msg/CameraInfo", Qos(depth=5)))
        if images == "raw":
            topics.append(RecordedTopic(f"{base}/image_raw", "sensor_msgs/msg/Image", Qos(depth=5)))
    return tuple(topics)
