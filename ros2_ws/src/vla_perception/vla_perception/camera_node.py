"""Node: the cameras of the robot description, each on /camera/<name>/image_raw and camera_info.

Parameters:
    robot (string, required): name or path of a robot description.
    cameras (string): names of its cameras, by commas; empty: all that are not simulated. Their `driver` sections say
        where the pictures come from (see vla_perception.camera_sources).

Stamps are capture times: the time at which the frame was handed over, less its age by the driver, less the driver's
`latency`. A camera that vanishes is named once and opened again every second until it is back; the others go on.
"""

from __future__ import annotations

import array
import threading
from pathlib import Path

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.time import Time
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header
from vla_calibration.files import CameraCalibration
from vla_core.robot import Camera, load_robot
from vla_ros.run import run_node

from vla_perception.calibrations import load_calibrations
from vla_perception.camera_sources import CameraError, CameraSource, Frame, check_driver, open_source
from vla_perception.messages import fault_status

#: Time between two attempts to open a camera, s.
_RETRY = 1.0


class CameraNode(Node):
    """A thread for each camera waits for frames and publishes them; the node's own thread tells how it goes."""

    def __init__(self) -> None:
        super().__init__("camera_node")
        robot = load_robot(self.declare_parameter("robot", "").value)
        named = [name for name in self.declare_parameter("cameras", "").value.split(",") if name]
        cameras = [robot.camera(name) for name in named]
        if not named:
            cameras = [camera for camera in robot.cameras if camera.driver.get("type") != "mujoco"]
        if not cameras:
            self.get_logger().info(f"robot {robot.name}: no camera but simulated ones; nothing to do")
        calibrations = load_calibrations(robot)[0]
        for camera in cameras:
            check_driver(camera)
        self._feeds = [_Feed(self, camera, robot.path.parent, calibrations.get(camera.name)) for camera in cameras]
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(1.0, self._diagnose)

    def finish(self) -> None:
        """Stop the cameras."""
        for feed in self._feeds:
            feed.end()

    def _diagnose(self) -> None:
        header = Header(stamp=self.get_clock().now().to_msg())
        self._diagnostics.publish(DiagnosticArray(header=header, status=[feed.status() for feed in self._feeds]))


class _Feed:
    """One camera: opened, read and published in its own thread."""

    def __init__(self, node: Node, camera: Camera, folder: Path, calibration: CameraCalibration | None):
        self._node, self._camera, self._folder = node, camera, folder
        self._latency = Duration(seconds=float(camera.driver.get("latency", 0.0)))
        self._info = camera_info(calibration, camera)
        topic = f"/camera/{camera.name}"
        self._images = node.create_publisher(Image, f"{topic}/image_raw", 5)
        self._infos = node.create_publisher(CameraInfo, f"{topic}/camera_info", 5)
        self._fault, self._frames = "not open yet", 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name=camera.name, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop reading; a driver that hangs in its read is left behind after 2 s."""
        self._end.set()
        self._thread.join(timeout=2.0)

    def status(self) -> DiagnosticStatus:
        """How the camera goes."""
        values = {"frames": str(self._frames)}
        return fault_status(f"{self._node.get_name()}: {self._camera.name}", {"camera": self._fault}, values)

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                source = open_source(self._camera, self._folder)
            except CameraError as error:
                self._report(str(error))
            else:
                try:
                    self._publish_all(source)
                except CameraError as error:
                    self._report(str(error))
                finally:
                    source.close()
            self._end.wait(_RETRY)

    def _publish_all(self, source: CameraSource) -> None:
        while not self._end.is_set():
            frame = source.read()
            stamp = self._node.get_clock().now() - Duration(seconds=frame.age) - self._latency
            if not self._end.is_set():
                self._publish(frame, stamp)
                self._report("")

    def _publish(self, frame: Frame, stamp: Time) -> None:
        header = Header(stamp=stamp.to_msg(), frame_id=self._camera.frame)
        height, width = frame.picture.shape[:2]
        image = Image(header=header, height=height, width=width, encoding="rgb8", step=3 * width)
        image.data = array.array("B", frame.picture.tobytes())
        self._info.header = header
        self._images.publish(image)
        self._infos.publish(self._info)
        self._frames += 1

    def _report(self, fault: str) -> None:
        """Log a fault once, and its end."""
        if fault == self._fault:
            return
        if fault:
            self._node.get_logger().error(f"{fault}; trying again every {_RETRY:.0f} s")
        else:
            self._node.get_logger().info(f"camera {self._camera.name!r}: frames come")
        self._fault = fault


def camera_info(calibration: CameraCalibration | None, camera: Camera) -> CameraInfo:
    """sensor_msgs/CameraInfo of a camera, with K and P zero when `calibration` is None."""
    info = CameraInfo(width=camera.width, height=camera.height)
    if calibration is not None:
        (fx, _, cx), (_, fy, cy), _ = calibration.K.tolist()
        info.distortion_model = "plumb_bob"
        info.d = calibration.distortion.tolist()
        info.k = calibration.K.ravel()
        info.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
        info.p = [fx, 0.0, cx, 0.0, 0.0, fy, cy, 0.0, 0.0, 0.0, 1.0, 0.0]
    return info


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM."""
    run_node(CameraNode, args)


if __name__ == "__main__":
    main()
