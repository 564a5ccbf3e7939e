"""Node: the extrinsics of a robot's cameras, from their calibration files, on /tf_static.

Parameters:
    robot (string, required): name or path of a robot description.

Cameras without a calibration file are named in a warning and left out.
"""

from __future__ import annotations

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from tf2_msgs.msg import TFMessage
from vla_core.robot import load_robot
from vla_ros.run import run_node

from vla_perception.calibrations import load_calibrations
from vla_perception.messages import transform_stamped


class CalibrationTfNode(Node):
    """Publishes once; late subscribers get it too (transient local)."""

    def __init__(self) -> None:
        super().__init__("calibration_tf_node")
        robot = load_robot(self.declare_parameter("robot", "").value)
        calibrations, missing = load_calibrations(robot)
        if missing:
            self.get_logger().warning(f"cameras without a calibration: {', '.join(missing)}")
        latched = QoSProfile(
            depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
        )
        self._publisher = self.create_publisher(TFMessage, "/tf_static", latched)
        now = self.get_clock().now().to_msg()
        self._publisher.publish(
            TFMessage(
                transforms=[
                    transform_stamped(c.parent, robot.camera(name).frame, now, c.T_parent_camera)
                    for name, c in calibrations.items()
                ]
            )
        )


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM."""
    run_node(CalibrationTfNode, args)


if __name__ == "__main__":
    main()
