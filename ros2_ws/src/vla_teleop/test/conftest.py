"""Helpers of this package's tests: processes, a ROS graph of its own, and sample messages."""

from __future__ import annotations

import array
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, Image, JointState
from vla_msgs.msg import Command, SafetyStatus


@pytest.fixture(scope="session", autouse=True)
def own_graph():
    """Keep the tests' nodes away from other graphs on this machine (ROS_DOMAIN_ID given: used as it is)."""
    os.environ.setdefault("ROS_DOMAIN_ID", str(random.SystemRandom().randint(60, 100)))


@pytest.fixture
def processes():
    """Starts processes and ends them with the test: start(arguments, **popen)."""
    running: list[subprocess.Popen] = []

    def start(arguments: list[str], **options) -> subprocess.Popen:
        process = subprocess.Popen(arguments, **options)
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.terminate()  # not kill: Fast DDS crashes when its participant goes right after a killed peer
        process.wait(60.0)


@pytest.fixture
def node():
    """A node of the test's own."""
    import rclpy

    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("tester", context=context)
    executor = rclpy.executors.SingleThreadedExecutor(context=context)
    executor.add_node(node)
    node.spin_until = lambda done, timeout=10.0: _spin_until(executor, done, timeout)
    yield node
    executor.shutdown()
    node.destroy_node()
    rclpy.shutdown(context=context)


def _spin_until(executor, done: Callable[[], bool], timeout: float) -> bool:
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() > end:
            return False
        executor.spin_once(timeout_sec=0.02)
    return True


@pytest.fixture
def call(node):
    """Calls a service: call(type, name, request) -> response."""

    def call(kind, name: str, request):
        client = node.create_client(kind, name)
        assert client.wait_for_service(15.0), f"no service {name}"
        future = client.call_async(request)
        assert node.spin_until(future.done, 15.0), f"{name} does not answer"
        return future.result()

    return call


@pytest.fixture
def recorder(processes, tmp_path):
    """Starts the real recorder node: recorder(name=value, ...) -> process; bags go to tmp_path / "bags"."""

    def start(**parameters) -> subprocess.Popen:
        parameters = {"robot": "panda", "folder": str(tmp_path / "bags"), **parameters}
        command = [sys.executable, "-m", "vla_teleop.recorder_node", "--ros-args"]
        for name, value in parameters.items():
            command += ["-p", f"{name}:={value}"]
        return processes(command)

    return start


@pytest.fixture
def bag_folder(tmp_path) -> Path:
    """A folder that does not exist yet."""
    return tmp_path / "bags" / "episode_0001"


class Robot:
    """Publishes what a robot with two cameras of 320x240 at 30 Hz and 100 Hz topics publishes, and counts it."""

    def __init__(self, node):
        self.sent: dict[str, int] = {}
        self._node = node
        image = Image(height=240, width=320, encoding="rgb8", step=960)
        image.data = array.array("B", bytes(range(256)) * 900)
        joints = JointState(name=["a", "b"], position=[0.0, 1.0])
        self._fast = [
            self._make(JointState, "/joint_states", joints, 10),
            self._make(JointState, "/arm/joint_targets", joints, 5),
            self._make(SafetyStatus, "/safety_status", SafetyStatus(), 10),
            self._make(Command, "/command", Command(), 5),
        ]
        self._slow = [
            self._make(kind, f"/camera/{camera}/{name}", message, 5)
            for camera in ("scene", "wrist")
            for kind, name, message in ((Image, "image_raw", image), (CameraInfo, "camera_info", CameraInfo()))
        ]

    def _make(self, kind, topic, message, depth):
        return self._node.create_publisher(kind, topic, QoSProfile(depth=depth)), topic, message

    def matched(self) -> bool:
        return all(p.get_subscription_count() > 0 for p, *_ in self._fast + self._slow)

    def run(self, seconds: float) -> None:
        begin = time.monotonic()
        for tick in range(int(seconds * 100)):
            for publisher, topic, message in self._fast + (self._slow if tick % 10 in (0, 3, 6) else []):
                publisher.publish(message)
                self.sent[topic] = self.sent.get(topic, 0) + 1
            time.sleep(max(0.0, begin + (tick + 1) * 0.01 - time.monotonic()))


@pytest.fixture
def robot(node):
    return Robot(node)
