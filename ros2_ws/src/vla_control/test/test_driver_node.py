"""The whole path from commands to arms with real nodes: the safety controller, and the driver node with a fake left arm
and a right one behind the topics of a controller that this test plays."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy")

from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rig_ros2_control import Controllers  # noqa: E402
from sensor_msgs.msg import JointState  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402
from vla_control.driver_node import read_target  # noqa: E402
from vla_core.robot import load_robot  # noqa: E402
from vla_msgs.msg import ArmCommand, Command, DriverStatus, SafetyStatus  # noqa: E402

#: Real nodes keep real time.
pytestmark = pytest.mark.slow

PATIENCE = 60.0
#: Watchdogs of the nodes under test, s: long, since the machine may be busy with other things.
TIMEOUT = 1.5
DRIVERS = """    driver: {type: fake}
"""
THEIRS = f"""    driver:
      type: ros2_control
      mode: position
      command: /theirs/command
      states: /theirs/joint_states
      gripper_command: /theirs/gripper
      stale: {TIMEOUT}
      patience: 3.0
"""


def write_robot(folder):
    """ALOHA's description with drivers."""
    text = load_robot("aloha").path.read_text()
    head, tail = text.split("  right:\n")
    path = folder / "cell.yaml"
    path.write_text(head.replace("    tool:\n", DRIVERS + "    tool:\n") + "  right:\n" + THEIRS + tail)
    return path


class Graph:
    """Both nodes as processes; their listener, who also sends commands and plays the right arm's controller."""

    def __init__(self, robot):
        self.path, self.robot = robot, load_robot(robot)
        self.domain = 50 + os.getpid() % 10
        self.context = rclpy.Context()
        rclpy.init(args=[], context=self.context, domain_id=self.domain)
        self.node = Node("listener", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.theirs = Controllers(self.node, "position", self.robot, "/theirs", "right")
        self.status, self.drivers, self.joints = SafetyStatus(), DriverStatus(), None
        for kind, topic, name in (
            (SafetyStatus, "/safety_status", "status"),
            (DriverStatus, "/driver_status", "drivers"),
            (JointState, "/joint_states", "joints"),
        ):
            self.node.create_subscription(kind, topic, lambda message, own=name: setattr(self, own, message), 10)
        self.commands = self.node.create_publisher(Command, "/command", 5)
        self.node.create_timer(0.01, self.send)
        self.sending, self.sequence = False, 0
        self.processes, self.clients = {}, {}
        self.start("driver_node", watchdog=TIMEOUT)
        self.start_controller()

    def start_controller(self):
        names = ("command_timeout", "joint_state_timeout", "driver_timeout", "overrun")
        self.start("safety_controller_node", **dict.fromkeys(names, TIMEOUT))

    def start(self, name, robot=None, **parameters):
        command = [sys.executable, "-m", f"vla_control.{name}", "--ros-args", "-p", f"robot:={robot or self.path}"]
        for key, value in parameters.items():
            command += ["-p", f"{key}:={value}"]
        environment = os.environ | {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "ROS_DOMAIN_ID": str(self.domain)}
        self.processes[name] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        return self.processes[name]

    def send(self):
        if not self.sending:
            return
        self.sequence += 1
        message = Command(sequence=self.sequence, source="test", period=0.01)
        message.header.stamp = self.node.get_clock().now().to_msg()
        for arm in self.robot.arms:
            part = ArmCommand(arm=arm.name, gripper=0.3)
            part.translation.z = 0.0002
            message.arms.append(part)
        self.commands.publish(message)

    def until(self, condition, what):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            for process in self.processes.values():
                assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, f"{what}; {self.status.state} {self.status.reason} {self.halted}"
            self.executor.spin_once(timeout_sec=0.05)

    def pass_by(self, duration):
        deadline = time.monotonic() + duration
        while time.monotonic() < deadline:
            self.executor.spin_once(timeout_sec=0.02)

    @property
    def halted(self):
        return {part.arm: part.halted for part in self.drivers.arms}

    def positions(self):
        """Arm -> measured joints, as published."""
        found = dict(zip(self.joints.name, self.joints.position))
        return {arm.name: np.array([found[joint] for joint in arm.joints]) for arm in self.robot.arms}

    def call(self, name):
        """Whether a Trigger succeeded; asks again while no answer comes."""
        if name not in self.clients:
            self.clients[name] = self.node.create_client(Trigger, name)
        client, futures = self.clients[name], []

        def answered():
            if client.service_is_ready() and (not futures or time.monotonic() > futures[-1][0] + 5.0):
                futures.append((time.monotonic(), client.call_async(Trigger.Request())))
            return any(future.done() for _, future in futures)

        self.until(answered, f"answer of {name}")
        return next(future.result() for _, future in futures if future.done())

    def run(self):
        """Armed, and both arms in motion under commands."""
        self.sending = False
        self.until(lambda: self.drivers.arms and "connecting" not in self.halted.values(), "the drivers are there")
        if any(self.halted.values()):  # by what an earlier test left
            self.connect()
        self.until(lambda: self.call("/safety_controller/arm").success, "armed")
        before = None
        self.sending = True

        def moved():
            nonlocal before
            before = self.positions() if before is None else before
            return all(np.abs(self.positions()[name] - before[name]).max() > 0.01 for name in before)

        self.until(moved, "both arms move")
        assert self.status.state == SafetyStatus.RUNNING

    def stands(self):
        """Both arms hold where they are, and go on doing so."""
        self.pass_by(0.5)
        before = self.positions()
        self.pass_by(0.7)
        for name, position in self.positions().items():
            np.testing.assert_allclose(position, before[name], atol=1e-6)

    def connect(self):
        self.sending = False
        answer = self.call("/driver_node/connect")
        assert answer.success, answer.message
        self.until(lambda: not any(self.halted.values()), "every arm follows")

    def end(self, name, number=signal.SIGTERM):
        process = self.processes.pop(name)
        process.send_signal(number)
        status, printed = process.wait(PATIENCE), process.stderr.read()
        process.stderr.close()
        return status, printed

    def close(self):
        for name in list(self.processes):
            self.end(name)  # not killed: Fast DDS crashes when its participant goes right after a peer that was killed
        self.theirs.ended = True
        self.theirs.thread.join()
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    made = Graph(write_robot(tmp_path_factory.mktemp("robot")))
    try:
        yield made
    finally:
        made.close()


def test_commands_move_the_arms_and_what_is_measured_comes_back(graph):
    graph.run()
    joints = graph.joints
    assert set(joints.name) == {*graph.robot.joint_names, *graph.robot.finger_names}
    assert len(joints.position) == len(joints.velocity) == len(joints.effort) == len(joints.name)
    np.testing.assert_allclose(graph.positions()["right"], graph.theirs.joints, atol=0.2)
    right = graph.robot.arm("right").gripper
    graph.until(lambda: abs(right.opening(graph.theirs.fingers) - 0.3) < 0.01, "the gripper follows")
    graph.until(
        lambda: abs(right.opening(dict(zip(graph.joints.name, graph.joints.position))) - 0.3) < 0.01, "measured"
    )
    assert not graph.call("/driver_node/connect").success, "not while the controller moves the arms"
    graph.sending = False
    graph.until(lambda: graph.status.state == SafetyStatus.HOLDING, "the arms hold without commands")
    assert not any(graph.halted.values())


def test_an_arm_whose_driver_fails_stops_both(graph):
    graph.run()
    graph.theirs.open = False
    graph.until(lambda: all(graph.halted.values()), "both arms are halted")
    assert "arm right: ros2_control position on /theirs/command: expected a joint state" in graph.halted["right"]
    assert "stopped with arm right" in graph.halted["left"]
    graph.until(lambda: graph.status.state == SafetyStatus.STOPPED, "the controller has stopped")
    assert "arm right" in graph.status.reason
    assert not graph.call("/driver_node/connect").success
    assert not graph.call("/safety_controller/arm").success
    graph.theirs.open = True
    graph.connect()
    graph.stands()
    graph.run()


def test_a_controller_that_is_killed_leaves_arms_that_hold(graph):
    graph.run()
    graph.end("safety_controller_node", signal.SIGKILL)
    graph.until(lambda: all(graph.halted.values()), "both arms are halted")
    assert all(f"none for {TIMEOUT:g} s" in why for why in graph.halted.values())
    graph.stands()
    graph.start_controller()
    graph.connect()
    graph.stands()
    graph.run()


def test_the_end_of_the_node_stops_the_arms(graph):
    graph.run()
    graph.theirs.heard.clear()
    status, printed = graph.end("driver_node")
    assert status == 0 and "Traceback" not in printed, printed
    graph.pass_by(0.3)
    last = [message.data for message in graph.theirs.heard if len(message.data) == 6][-1]
    np.testing.assert_allclose(last, graph.theirs.joints, atol=1e-6)
    graph.start("driver_node", watchdog=TIMEOUT)
    graph.until(lambda: graph.status.state == SafetyStatus.STOPPED, "a controller without drivers stops")


def test_a_robot_without_drivers_is_left_to_its_own_node(graph):
    process = subprocess.run(
        [sys.executable, "-m", "vla_control.driver_node", "--ros-args", "-p", "robot:=aloha"],
        env=os.environ | {"ROS_DOMAIN_ID": "49"}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert process.returncode == 0 and "no arm has a `driver` section" in process.stderr


def test_a_target_without_a_joint_is_refused_by_name():
    arm = load_robot("panda").arms[0]
    with pytest.raises(ValueError, match="expected a position of 'panda_joint1', found"):
        read_target(arm, JointState(name=["elbow"], position=[0.0]))
