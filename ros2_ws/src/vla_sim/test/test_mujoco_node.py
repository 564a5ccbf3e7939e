"""The real node over real topics."""

import os
import signal
import subprocess
import sys
import time

import pytest

rclpy = pytest.importorskip("rclpy")

from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.qos import qos_profile_sensor_data  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import CameraInfo, Image, JointState  # noqa: E402
from vla_msgs.msg import EpisodeEvent  # noqa: E402
from vla_msgs.srv import ResetWorld  # noqa: E402

PATIENCE = 60.0
#: Of this run alone, so that graphs beside it do not mix in.
DOMAIN = 10 + os.getpid() % 90


def seconds(stamp) -> float:
    return stamp.sec + stamp.nanosec * 1e-9


class Graph:
    """A node under test with a client that keeps what it hears."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vla_sim.mujoco_node", "--ros-args", "-p", "robot:=panda", "-p", "seed:=3"],
            env=os.environ | {"ROS_DOMAIN_ID": str(DOMAIN)},
        )
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=DOMAIN)
        self.node = Node("listener", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.heard: dict[str, list] = {}
        for kind, topic, qos in (
            (JointState, "/joint_states", 10),
            (Clock, "/clock", qos_profile_sensor_data),
            (Image, "/camera/scene/image_raw", 5),
            (Image, "/camera/wrist/image_raw", 5),
            (CameraInfo, "/camera/scene/camera_info", 5),
            (EpisodeEvent, "/episode_events", 50),
        ):
            self.heard[topic] = []
            self.node.create_subscription(kind, topic, self.heard[topic].append, qos)
        self.targets = self.node.create_publisher(JointState, "/arm/joint_targets", 5)
        self.reset = self.node.create_client(ResetWorld, "/world/reset")

    def until(self, condition) -> bool:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if condition():
                return True
            self.executor.spin_once(timeout_sec=0.1)
        return False

    def call_reset(self, **fields) -> ResetWorld.Response:
        future = self.reset.call_async(ResetWorld.Request(**fields))
        assert self.until(future.done)
        return future.result()

    def close(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=PATIENCE)
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)
        return code


@pytest.fixture(scope="module")
def graph():
    graph = Graph()
    assert graph.until(lambda: all(graph.heard[t] for t in graph.heard if t != "/episode_events"))
    yield graph
    assert graph.close() == 0


def test_joint_states_come_every_control_period(graph):
    states = graph.heard["/joint_states"]
    states.clear()
    assert graph.until(lambda: len(states) >= 50)
    stamps = [seconds(m.header.stamp) for m in states]
    steps = [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
    assert sorted(steps)[len(steps) // 2] == pytest.approx(0.01, abs=1e-6)
    assert len(states[0].name) == len(states[0].position) == len(states[0].velocity) == 9


def test_pictures_carry_size_frame_and_capture_time(graph):
    for camera in ("scene", "wrist"):
        image = graph.heard[f"/camera/{camera}/image_raw"][-1]
        assert (image.width, image.height, image.encoding, image.step) == (320, 240, "rgb8", 960)
        assert len(image.data) == 240 * 960
        assert image.header.frame_id == f"{camera}_optical_frame"
        assert seconds(image.header.stamp) > 0


def test_pictures_come_at_the_cameras_rate(graph):
    images = graph.heard["/camera/scene/image_raw"]
    images.clear()
    assert graph.until(lambda: len(images) >= 10)
    stamps = [seconds(m.header.stamp) for m in images]
    steps = sorted(b - a for a, b in zip(stamps, stamps[1:], strict=False))
    assert 0.029 < steps[len(steps) // 2] < 0.041


def test_camera_info_belongs_to_an_image(graph):
    info = graph.heard["/camera/scene/camera_info"][-1]
    assert info.k[0] == pytest.approx(info.p[0]) and info.k[0] > 0
    assert (info.width, info.height) == (320, 240)


def test_reset_gives_the_instruction_and_an_event(graph):
    graph.heard["/episode_events"].clear()
    answer = graph.call_reset(task="pick", seed=9, options=["colour=red", "shape=cube", "phrasing=1"])
    assert answer.success and answer.instruction == "grab the red cube" and answer.time_limit == 10.0
    assert graph.until(lambda: graph.heard["/episode_events"])
    event = graph.heard["/episode_events"][0]
    assert (event.event, event.task, event.seed) == (EpisodeEvent.RESET, "pick", 9)


def test_a_bad_reset_is_refused_with_the_reason(graph):
    answer = graph.call_reset(task="juggle", seed=0)
    assert not answer.success and "juggle" in answer.message


def test_targets_move_the_arm_and_stale_ones_do_not(graph):
    graph.call_reset(task="pick", seed=3)
    state = graph.heard["/joint_states"]
    state.clear()
    assert graph.until(lambda: state)
    start = dict(zip(state[-1].name, state[-1].position, strict=True))["panda_joint1"]
    stale = JointState(name=["panda_joint1"], position=[start - 0.5])
    stale.header.stamp.nanosec = 1_000_000
    graph.targets.publish(stale)
    graph.targets.publish(JointState(name=["panda_joint1"], position=[start + 0.3]))

    def joint() -> float:
        return dict(zip(state[-1].name, state[-1].position, strict=True))["panda_joint1"]

    assert graph.until(lambda: joint() > start + 0.25)
    assert all(dict(zip(m.name, m.position, strict=True))["panda_joint1"] > start - 0.05 for m in state)
