"""Writes a lock-step rollout into a bag, message for message as the running graph would be recorded."""

from __future__ import annotations

from rclpy.serialization import serialize_message
from std_msgs.msg import String
from tf2_msgs.msg import TFMessage
from vla_control.messages import (
    fill_status,
    fill_target,
    status_message,
    target_message,
    write_command,
    write_event,
)
from vla_msgs.msg import EpisodeEvent
from vla_ros.messages import time_message
from vla_teleop.bag_writer import BagWriter
from vla_teleop.interfaces import type_name

from vla_sim import messages
from vla_sim.rollout import Period
from vla_sim.world import World


class EpisodeWriter:
    """Begin, then every period, then the closing event; the bag's clock is the world's time."""

    def __init__(self, bag: BagWriter, world: World):
        self._bag, self._world = bag, world

    def begin(self) -> None:
        """Write the reset and the instruction."""
        self.event(EpisodeEvent.RESET)
        self._write("/instruction", String(data=self._world.episode.instruction), self._world.time)

    def write(self, period: Period) -> None:
        """Write what one control period published."""
        world, robot, now = self._world, self._world.robot, period.time
        self._write("/joint_states", messages.joint_state(now, *period.joint_state), now)
        self._write("/tf", TFMessage(transforms=[messages.tool_transform(world, a, now) for a in robot.arms]), now)
        for camera, picture in period.pictures.items():
            image = messages.image(world, camera, now, picture)
            self._write(f"/camera/{camera}/image_raw", image, now)
            self._write(f"/camera/{camera}/camera_info", messages.camera_info(world, camera, image), now)
        stamp, decision = time_message(now), period.decision
        self._write("/command", write_command(period.command, robot, time_message(period.command.stamp)), now)
        status = fill_status(status_message(robot), decision, decision.sent, stamp, world.period)
        self._write("/safety_status", status, now)
        for event in decision.events:
            self._write("/safety_events", write_event(event, robot, stamp), now)
        for arm in robot.arms:
            sent = fill_target(target_message(arm, robot.base_frame), arm, decision.sent[arm.name], stamp)
            self._write(f"/{arm.name}/joint_targets", sent, now)

    def event(self, event: int) -> None:
        """Write an episode event of now."""
        world = self._world
        self._write("/episode_events", messages.episode_event(world, event, world.outcome()), world.time)

    def _write(self, topic: str, message: object, time: float) -> None:
        self._bag.write_serialized(topic, type_name(message), serialize_message(message), round(time * 1e9))
