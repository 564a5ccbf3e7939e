"""mujoco_node: a simulated robot that looks like a real one from ROS.

One thread steps physics, serves callbacks in between and publishes joint states, tools and the clock every control
period; another draws the cameras' pictures. Nothing arrives from the controller: the arm holds its pose.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.executors import Executor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import String
from vla_core.robot import load_robot
from vla_core.time import seconds
from vla_msgs.msg import EpisodeEvent
from vla_msgs.srv import ResetWorld
from vla_ros.messages import time_message
from vla_ros.run import run_node

from vla_sim import messages
from vla_sim.camera_thread import CameraThread
from vla_sim.pacing import Pacer
from vla_sim.world import Episode, Outcome, World, make_world

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
BEST_EFFORT = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


class MujocoNode(Node):
    """Topics and services of a simulated robot; `run` drives everything until it is to end."""

    def __init__(self) -> None:
        super().__init__("mujoco_node")
        robot = load_robot(self.declare_parameter("robot", "panda").value)
        task = self.declare_parameter("task", "").value
        seed = self.declare_parameter("seed", 0).value
        factor = self.declare_parameter("realtime_factor", 1.0).value
        self._reset_on_end = self.declare_parameter("reset_on_end", False).value
        self.world: World = make_world(robot, task or None)
        self._joint_states = self.create_publisher(JointState, "/joint_states", 10)
        self._clock_topic = self.create_publisher(ClockMessage, "/clock", BEST_EFFORT)
        self._events = self.create_publisher(EpisodeEvent, "/episode_events", 50)
        self._instruction = self.create_publisher(String, "/instruction", LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._images, self._infos = {}, {}
        for camera in robot.cameras:
            base = f"/camera/{camera.name}"
            self._images[camera.name] = self.create_publisher(Image, f"{base}/image_raw", 5)
            self._infos[camera.name] = self.create_publisher(CameraInfo, f"{base}/camera_info", 5)
        for arm in robot.arms:
            self.create_subscription(JointState, f"/{arm.name}/joint_targets", self._on_targets, 5)
        self.create_service(ResetWorld, "/world/reset", self._on_reset)
        self._begin(self.world.reset(None, seed))
        # Cameras begin in different control periods and keep their own rates.
        self._due = {c.name: i * self.world.period for i, c in enumerate(robot.cameras)}
        self._pacer = Pacer(self.world.period, factor)
        self._cameras = CameraThread(self.world, self._publish_picture)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0, self._diagnose, clock=steady)
        self.get_logger().info(f"{robot.name}: task {self.world.episode.task}, {self.world.episode.instruction!r}")

    def run(self, executor: Executor, ended: Callable[[], bool]) -> None:
        """Step and serve callbacks until `ended()`."""
        while not ended():
            while (remaining := self._pacer.remaining()) > 0.0:
                executor.spin_once(timeout_sec=remaining)
            executor.spin_once(timeout_sec=0.0)
            self._tick()
            self._pacer.advance()

    def finish(self) -> None:
        """End the thread of the cameras."""
        self._cameras.close()

    # ------------------------------------------------------------------------------------------------- periods

    def _tick(self) -> None:
        before = self.world.outcome()
        self.world.step()
        now = self.world.time
        self._joint_states.publish(messages.joint_state(now, *self.world.joint_state()))
        self._clock_topic.publish(ClockMessage(clock=time_message(now)))
        for camera in self.world.robot.cameras:
            if now >= self._due[camera.name] - 1e-9:
                self._due[camera.name] += 1.0 / camera.rate
                self._cameras.take(camera.name)
        outcome = self.world.outcome()
        if (outcome.success or outcome.failed) and not (before.success or before.failed):
            self._publish_event(EpisodeEvent.SUCCESS if outcome.success else EpisodeEvent.FAILURE, outcome)
            if self._reset_on_end:
                self._begin(self.world.reset(None, self.world.episode.seed + 1))

    def _publish_picture(self, camera: str, time: float, picture: np.ndarray) -> None:
        """In the cameras' thread."""
        image = messages.image(self.world, camera, time, picture)
        self._images[camera].publish(image)
        self._infos[camera].publish(messages.camera_info(self.world, camera, image))

    # ----------------------------------------------------------------------------------------------- callbacks

    def _on_targets(self, message: JointState) -> None:
        if 0.0 < seconds(message.header.stamp) < self._began - 1e-9:
            return  # meant for the episode before
        try:
            self.world.set_targets(messages.targets(message))
        except ValueError as error:
            self.get_logger().error(f"refused: {error}", throttle_duration_sec=1.0)

    def _on_reset(self, request: ResetWorld.Request, response: ResetWorld.Response) -> ResetWorld.Response:
        try:
            options = {}
            for option in request.options:
                key, separator, value = option.partition("=")
                if not separator:
                    raise ValueError(f"options: expected key=value, found {option!r}")
                options[key] = value
            episode = self.world.reset(request.task or None, request.seed, options)
        except ValueError as error:
            response.message = str(error)
            return response
        self._begin(episode)
        response.success = True
        response.instruction, response.time_limit = episode.instruction, episode.time_limit
        return response

    def _begin(self, episode: Episode) -> None:
        self._began = self.world.time
        self._instruction.publish(String(data=episode.instruction))
        self._publish_event(EpisodeEvent.RESET, self.world.outcome())

    def _publish_event(self, event: int, outcome: Outcome) -> None:
        self._events.publish(messages.episode_event(self.world, event, outcome))

    def _diagnose(self) -> None:
        factor = self._pacer.factor()
        status = DiagnosticStatus(level=DiagnosticStatus.OK, name=self.get_name(), hardware_id="mujoco")
        status.message = f"real-time factor {factor:.2f}"
        status.values = [
            KeyValue(key="real_time_factor", value=f"{factor:.3f}"),
            KeyValue(key="pictures_skipped", value=str(self._cameras.skipped)),
        ]
        message = DiagnosticArray(status=[status])
        message.header.stamp = time_message(self.world.time)
        self._diagnostics.publish(message)


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM."""
    run_node(MujocoNode, args)


if __name__ == "__main__":
    main()
