"""The real nodes over real topics: observation_node, calibration_tf_node, camera_node."""

import array
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_srvs.srv import Trigger
from tf2_msgs.msg import TFMessage
from vla_core.kinematics import Kinematics
from vla_core.robot import load_robot
from vla_core.time import seconds
from vla_msgs.msg import Observation

PERIOD = 1 / 15


def write_robot(folder: Path, **camera) -> Path:
    """The Panda with two cameras of 64x48 pixels at 15 Hz."""
    panda = load_robot("panda")
    tree = yaml.safe_load(panda.path.read_text())
    for name in tree["cameras"]:
        driver = {"type": "mujoco"}
        tree["cameras"][name] = {"width": 64, "height": 48, "rate": 1 / PERIOD, "driver": driver} | camera
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


class Graph:
    """A node that plays cameras and arm, and hears what comes."""

    def __init__(self, robot_path):
        self.robot = load_robot(robot_path)
        self.node = rclpy.create_node("test_perception")
        self.observations, self.faults, self.tf = [], [], []
        n = self.node
        self.joints = n.create_publisher(JointState, "/joint_states", 10)
        self.images = {c.name: n.create_publisher(Image, f"/camera/{c.name}/image_raw", 5) for c in self.robot.cameras}
        n.create_subscription(Observation, "/observation", self.observations.append, 10)
        n.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        n.create_subscription(TFMessage, "/tf", self.tf.append, 10)
        self.count = 0

    def _on_diagnostics(self, message):
        self.faults += [s for s in message.status if s.name == "observation_node"]

    def spin(self, duration):
        end = time.monotonic() + duration
        while (left := end - time.monotonic()) > 0:
            rclpy.spin_once(self.node, timeout_sec=left)

    def wait(self, condition, timeout=20.0):
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, "timed out"
            rclpy.spin_once(self.node, timeout_sec=0.05)

    def play(self, until, cameras=("scene", "wrist"), timeout=20.0, **image):
        """Publish joints and images of `cameras` at their rates until a condition holds."""
        end = time.monotonic() + timeout
        while not until():
            assert time.monotonic() < end, "timed out"
            self.joints.publish(self.joint_state())
            if self.count % 4 == 0:
                for camera in cameras:
                    self.images[camera].publish(self.image(**image))
            self.count += 1
            self.spin(PERIOD / 4)
        return time.monotonic()

    def joint_state(self):
        arm = self.robot.arms[0]
        message = JointState(name=[*self.robot.joint_names, *self.robot.finger_names])
        message.header.stamp = self.node.get_clock().now().to_msg()
        message.position = [*arm.home.tolist(), 0.02, 0.02]
        message.velocity = [0.0] * 9
        return message

    def image(self, width=64, height=48):
        message = Image(width=width, height=height, encoding="rgb8", step=3 * width)
        message.header.stamp = self.node.get_clock().now().to_msg()
        message.header.frame_id = "scene_optical_frame"
        data = np.random.default_rng(self.count).integers(0, 256, 3 * width * height, np.uint8)
        message.data = array.array("B", data.tobytes())
        return message


@pytest.fixture(scope="module", autouse=True)
def ros():
    rclpy.init()
    yield
    rclpy.shutdown()


class Process:
    """A node as a process of its own; leaving the block ends it with SIGINT and checks that it ends well."""

    def __init__(self, module, **parameters):
        arguments = [a for k, v in parameters.items() for a in ("-p", f"{k}:={v}")]
        self.command = [sys.executable, "-m", f"vla_perception.{module}", "--ros-args", *arguments]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
        return self.process

    def __exit__(self, kind, *_):
        self.process.send_signal(signal.SIGINT)
        try:
            self.errors = self.process.communicate(timeout=10)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        if kind is None:
            assert self.process.returncode == 0, self.errors
            assert "Traceback" not in self.errors


def test_observation_node_gives_observations_names_faults_and_recovers(tmp_path):
    path = write_robot(tmp_path)
    graph = Graph(path)
    with Process("observation_node", robot=path):
        graph.play(lambda: len(graph.observations) >= 5)
        observation = graph.observations[-1]
        assert [i.camera for i in observation.images] == ["scene", "wrist"]
        assert observation.header.frame_id == "world"
        assert observation.skew == max(abs(i.skew) for i in observation.images)
        for part in observation.images:
            assert part.image.header.frame_id == "scene_optical_frame"
            assert part.skew == pytest.approx(seconds(part.image.header.stamp) - seconds(observation.header.stamp))
        arm = graph.robot.arms[0]
        np.testing.assert_allclose(observation.arms[0].position, arm.home)
        assert observation.arms[0].gripper == pytest.approx(0.5)
        tool = Kinematics(graph.robot).forward("arm", arm.home)[:3, 3]
        assert observation.arms[0].tool.position.x == pytest.approx(tool[0])
        transform = graph.tf[-1].transforms[0]
        assert (transform.header.frame_id, transform.child_frame_id) == ("world", "arm_tool")
        assert transform.transform.translation.z == pytest.approx(tool[2])

        def says(text):
            return lambda: graph.faults and text in graph.faults[-1].message

        for fault, play in (
            ("wrist: dead", {"cameras": ["scene"]}),
            ("wrist: configuration: expected 64x48 rgb8, found 32x48 rgb8", {"width": 32}),
        ):
            graph.play(says(fault), **play)
            assert graph.faults[-1].level == DiagnosticStatus.ERROR
            graph.observations.clear()
            count = graph.count
            graph.play(lambda count=count: graph.count > count + 12, **play)
            assert not graph.observations
            graph.play(lambda: len(graph.observations) >= 3)
            graph.play(says("ok"))

        reset = graph.node.create_client(Trigger, "/observation_node/reset")
        assert reset.wait_for_service(5.0)
        future = reset.call_async(Trigger.Request())
        graph.wait(future.done)
        assert future.result().success
        graph.observations.clear()
        graph.play(lambda: len(graph.observations) >= 3)
    graph.node.destroy_node()


def test_calibration_is_on_tf_static_for_late_subscribers():
    node = rclpy.create_node("test_calibration_tf")
    received = []
    with Process("calibration_tf_node", robot="panda"):
        time.sleep(1.0)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        node.create_subscription(TFMessage, "/tf_static", received.append, latched)
        end = time.monotonic() + 15
        while not received and time.monotonic() < end:
            rclpy.spin_once(node, timeout_sec=0.1)
    frames = {(t.header.frame_id, t.child_frame_id) for t in received[0].transforms}
    assert frames == {("world", "scene_optical_frame"), ("arm_tool", "wrist_optical_frame")}
    node.destroy_node()


def test_camera_node_replays_a_folder_and_comes_back_when_it_vanished(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    driver = {"type": "file", "path": "pictures", "loop": False}
    path = write_robot(tmp_path, driver=driver)
    node = rclpy.create_node("test_camera")
    images, infos = [], []
    node.create_subscription(Image, "/camera/scene/image_raw", images.append, 5)
    node.create_subscription(CameraInfo, "/camera/scene/camera_info", infos.append, 5)
    faults = []
    node.create_subscription(
        DiagnosticArray, "/diagnostics", lambda m: faults.extend(s for s in m.status if "found no" in s.message), 10
    )

    def wait(count):
        end = time.monotonic() + 20
        while len(images) < count or len(infos) < count:
            assert time.monotonic() < end, "timed out"
            rclpy.spin_once(node, timeout_sec=0.1)

    process = Process("camera_node", robot=path, cameras="scene")
    with process:
        end = time.monotonic() + 20
        while not faults:  # an empty folder: the camera is not there yet
            assert time.monotonic() < end, "timed out"
            rclpy.spin_once(node, timeout_sec=0.1)
        for i in range(8):
            cv2.imwrite(str(pictures / f"{i}.png"), np.full((48, 64, 3), (i, 0, 200), np.uint8))
        wait(10)  # the folder ends after 8: it was opened again
    assert (images[0].width, images[0].height, images[0].encoding) == (64, 48, "rgb8")
    assert images[0].data[0] == 200
    assert images[0].header.frame_id == infos[0].header.frame_id == "scene_optical_frame"
    assert images[0].header.stamp == infos[0].header.stamp
    assert "found no pictures; trying again" in process.errors
    assert process.errors.count("found no pictures") == 1
    node.destroy_node()


def test_one_camera_that_is_not_there_leaves_the_other_alone(tmp_path):
    (tmp_path / "pictures").mkdir()
    cv2.imwrite(str(tmp_path / "pictures" / "0.png"), np.zeros((48, 64, 3), np.uint8))
    path = write_robot(tmp_path, driver={"type": "file", "path": "pictures", "loop": True})
    tree = yaml.safe_load(path.read_text())
    tree["cameras"]["wrist"]["driver"] = {"type": "file", "path": "nowhere"}
    path.write_text(yaml.safe_dump(tree))
    node = rclpy.create_node("test_cameras")
    images, states = [], {}
    node.create_subscription(Image, "/camera/scene/image_raw", images.append, 5)
    node.create_subscription(
        DiagnosticArray, "/diagnostics", lambda m: states.update({s.name: s.level for s in m.status}), 10
    )
    process = Process("camera_node", robot=path)  # every camera of the robot
    with process:
        end = time.monotonic() + 20
        while len(images) < 5 or states != {"camera_node: scene": b"\0", "camera_node: wrist": b"\2"}:
            assert time.monotonic() < end, f"timed out: {len(images)} images, {states}"
            rclpy.spin_once(node, timeout_sec=0.1)
    assert process.errors.count("camera 'wrist'") == 1 and "nowhere" in process.errors
    node.destroy_node()


def test_a_simulated_camera_cannot_be_read():
    command = [sys.executable, "-m", "vla_perception.camera_node", "--ros-args", "-p", "robot:=panda"]
    result = subprocess.run([*command, "-p", "cameras:=scene"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "camera 'scene': driver.type: expected one of" in result.stderr and len(result.stderr.splitlines()) == 1


def test_robot_that_does_not_exist_is_one_line_and_status_1():
    command = [sys.executable, "-m", "vla_perception.observation_node", "--ros-args", "-p", "robot:=nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == 1
    assert result.stderr.startswith("observation_node: robot 'nowhere'") and len(result.stderr.splitlines()) == 1
