"""One running recorder node: counts, losses, discard, diagnostics."""

import subprocess
import sys
import threading
import time

import pytest
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger
from vla_msgs.msg import EpisodeEvent
from vla_msgs.srv import StartEpisode, StopEpisode
from vla_teleop import bags

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@pytest.fixture(scope="module")
def running_recorder(tmp_path_factory):
    """One recorder for the tests that leave it as they found it."""
    folder = tmp_path_factory.mktemp("shared")
    command = [sys.executable, "-m", "vla_teleop.recorder_node", "--ros-args", "-p", f"folder:={folder}"]
    process = subprocess.Popen(command)
    yield folder
    process.terminate()
    assert process.wait(10.0) == 0


def test_nothing_is_lost_at_two_cameras_and_100_hz(running_recorder, robot, node, call):
    assert node.spin_until(robot.matched, 15.0)
    bag = call(StartEpisode, "/recorder/start", StartEpisode.Request(task="pick")).bag
    thread = threading.Thread(target=robot.run, args=(3.0,))
    thread.start()
    thread.join()
    time.sleep(0.5)
    assert call(StopEpisode, "/recorder/stop", StopEpisode.Request(outcome=1, note="good")).success
    found = bags.info(bag)
    assert {t: found.received[t] for t in robot.sent} == robot.sent
    assert sum(found.lost.values()) == 0
    assert found.facts["outcome"] == "success" and found.facts["note"] == "good"
    assert found.facts["robot"] == "panda" and found.facts["task"] == "pick"


def test_discard_removes_the_folder(running_recorder, node, call):
    before = sorted(running_recorder.iterdir())
    events: list[int] = []
    node.create_subscription(EpisodeEvent, "/episode_events", lambda m: events.append(m.event), 10)
    assert call(StartEpisode, "/recorder/start", StartEpisode.Request()).success
    assert not call(StartEpisode, "/recorder/start", StartEpisode.Request()).success
    assert call(Trigger, "/recorder/discard", Trigger.Request()).success
    assert not call(Trigger, "/recorder/discard", Trigger.Request()).success
    assert sorted(running_recorder.iterdir()) == before
    assert node.spin_until(lambda: EpisodeEvent.DISCARDED in events, 5.0)
    assert events.count(EpisodeEvent.RECORDING) == 1


def test_a_gap_in_a_publishers_sequence_is_counted(running_recorder, node, call):
    publisher = node.create_publisher(
        JointState, "/joint_states", QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
    )
    assert node.spin_until(lambda: publisher.get_subscription_count() == 1, 15.0)
    bag = call(StartEpisode, "/recorder/start", StartEpisode.Request()).bag
    sent = 20000
    for _ in range(sent):  # faster than anybody reads, with a history of one
        publisher.publish(JointState())
    for _ in range(3):
        node.spin_until(lambda: False, 0.1)
        publisher.publish(JointState())
    node.spin_until(lambda: False, 0.5)
    call(StopEpisode, "/recorder/stop", StopEpisode.Request())
    found = bags.info(bag)
    assert found.received["/joint_states"] + found.lost["/joint_states"] == sent + 3


def test_diagnostics_tell_the_state(running_recorder, node):
    messages: list[str] = []
    node.create_subscription(DiagnosticArray, "/diagnostics", lambda m: messages.append(m.status[0].message), 10)
    assert node.spin_until(lambda: "idle" in messages, 15.0)
