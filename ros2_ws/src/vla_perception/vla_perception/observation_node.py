"""Node: camera images and joint states in, synchronised observations out.

Parameters:
    robot (string, required): name or path of a robot description.
    publish_tool_tf (bool, true): publish each tool's pose in the base frame on /tf, at most 30 times a second.
    max_image_age (double, 0.5 s): an image older than this on arrival is a fault of the camera's clock.
    max_image_lead (double, 0.1 s): an image stamped further in the future is a fault of the camera's clock.

Messages drive it, not a timer: an observation leaves with the last image or joint state that it needs.
"""

from __future__ import annotations

from functools import partial

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Header
from std_srvs.srv import Trigger
from tf2_msgs.msg import TFMessage
from vla_core.robot import load_robot
from vla_core.time import seconds
from vla_msgs.msg import Observation
from vla_ros.messages import time_message
from vla_ros.run import run_node

from vla_perception.calibrations import load_calibrations
from vla_perception.camera_track import HealthLimits
from vla_perception.messages import fault_status, observation_message, transform_matrix, transform_stamped
from vla_perception.observation import ObservationSampler
from vla_perception.transforms import TransformBuffer, TransformError

#: Least time between two tool poses on /tf, s: with every other call of the timer.
_TF_PERIOD = 0.025


class ObservationNode(Node):
    """Hands messages to an ObservationSampler and its samples to /observation."""

    def __init__(self) -> None:
        super().__init__("observation_node")
        self._robot = load_robot(self.declare_parameter("robot", "").value)
        calibrations, uncalibrated = load_calibrations(self._robot)
        if uncalibrated:
            self.get_logger().warning(f"cameras without a calibration: {', '.join(uncalibrated)}")
        limits = HealthLimits(
            lead=self.declare_parameter("max_image_lead", 0.1).value,
            age=self.declare_parameter("max_image_age", 0.5).value,
        )
        self._transforms = TransformBuffer()
        self._sampler = ObservationSampler(self._robot, calibrations, self._transforms, limits)
        self._publish_tool_tf = self.declare_parameter("publish_tool_tf", True).value
        self._sequence = 0
        self._skew = self._age = float("nan")
        self._faults: dict[str, str] = {}
        self._reported = self._sent_tf = -1.0

        self._observations = self.create_publisher(Observation, "/observation", 2)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._tf = self.create_publisher(TFMessage, "/tf", 100)
        self.create_subscription(JointState, "/joint_states", self._on_joints, 10)
        for camera in self._robot.cameras:
            topic = f"/camera/{camera.name}/image_raw"
            self.create_subscription(Image, topic, partial(self._on_image, camera.name), 5)
        known = {self._robot.base_frame, *(arm.tool.frame for arm in self._robot.arms)}
        if {c.parent for c in calibrations.values()} - known:
            latched = QoSProfile(
                depth=100, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
            )
            self.create_subscription(TFMessage, "/tf", partial(self._on_transforms, False), 100)
            self.create_subscription(TFMessage, "/tf_static", partial(self._on_transforms, True), latched)
        self.create_service(Trigger, "~/reset", self._on_reset)
        fastest = max([camera.rate for camera in self._robot.cameras], default=10.0)
        self.create_timer(0.5 / fastest, self._watch)

    def _now(self) -> float:
        return self.get_clock().now().nanoseconds * 1e-9

    def _on_image(self, camera: str, message: Image) -> None:
        now = self._now()
        if now > 0.0:  # zero: simulated time has not begun
            self._sampler.add_image(camera, seconds(message.header.stamp), message, now)
            self._emit(now)

    def _on_joints(self, message: JointState) -> None:
        now = self._now()
        if now > 0.0:
            stamp = seconds(message.header.stamp)
            self._sampler.add_joints(stamp, message.name, message.position, message.velocity, now)
            self._emit(now)

    def _emit(self, now: float) -> None:
        sample = self._sampler.sample(now)
        if sample is None:
            return
        self._sequence += 1
        self._skew, self._age = sample.skew, sample.age
        robot = self._robot
        self._observations.publish(observation_message(sample, robot.name, robot.base_frame, self._sequence))

    def _send_tool_tf(self, now: float) -> None:
        """Not with the joint states, which an image may be waiting behind."""
        if 0 <= now - self._sent_tf < _TF_PERIOD:
            return
        poses = self._sampler.tool_poses()
        if not poses:
            return
        self._sent_tf = now
        base, tools = self._robot.base_frame, {arm.name: arm.tool.frame for arm in self._robot.arms}
        transforms = [transform_stamped(base, tools[arm], time_message(stamp), T) for arm, (stamp, T) in poses.items()]
        self._tf.publish(TFMessage(transforms=transforms))

    def _on_transforms(self, static: bool, message: TFMessage) -> None:
        for t in message.transforms:
            try:
                T = transform_matrix(t.transform)
                if static:
                    self._transforms.set_static(t.header.frame_id, t.child_frame_id, T)
                else:
                    self._transforms.set(t.header.frame_id, t.child_frame_id, seconds(t.header.stamp), T)
            except (TransformError, ValueError) as error:
                self.get_logger().warning(f"/tf: {error}", throttle_duration_sec=5.0)

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._sampler.clear()
        self._transforms.clear()
        response.success, response.message = True, "timelines cleared"
        return response

    def _watch(self) -> None:
        """Publish the tools, and what is wrong: changes at once, and everything once a second."""
        now = self._now()
        if now <= 0.0:
            return
        if self._publish_tool_tf:
            self._send_tool_tf(now)
        faults = self._sampler.faults(now)
        kinds = {name: fault.partition(":")[0] for name, fault in faults.items()}
        changed = {name for name, kind in kinds.items() if self._faults.get(name, "") != kind}
        for name in sorted(changed):
            if faults[name] and not faults[name].startswith("waiting"):
                self.get_logger().error(f"{name}: {faults[name]}; no observations until it recovers")
            elif self._faults.get(name) and not faults[name]:
                self.get_logger().info(f"{name}: well")
        self._faults = kinds
        if changed or not 0 <= now - self._reported < 1.0:
            self._reported = now
            values = {
                "observations": str(self._sequence),
                "skew [s]": f"{self._skew:.4f}",
                "age [s]": f"{self._age:.4f}",
            }
            status = fault_status(self.get_name(), faults, values)
            self._diagnostics.publish(DiagnosticArray(header=Header(stamp=time_message(now)), status=[status]))


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM."""
    run_node(ObservationNode, args)


if __name__ == "__main__":
    main()
