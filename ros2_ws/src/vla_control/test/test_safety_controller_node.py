"""The real node over real topics, on the wall clock."""

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

rclpy = pytest.importorskip("rclpy")

from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from geometry_msgs.msg import WrenchStamped  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from sensor_msgs.msg import JointState  # noqa: E402
from std_msgs.msg import Bool  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402
from vla_core.robot import load_robot  # noqa: E402
from vla_msgs.msg import (  # noqa: E402
    ArmCommand,
    ArmDriverStatus,
    Command,
    DriverStatus,
    SafetyEvent,
    SafetyStatus,
)

PATIENCE = 60.0
#: Time-outs of the node under test, s: long, since the machine may be busy with other things.
TIMEOUT = 1.5
DOMAINS = itertools.count()
NODE = [sys.executable, "-m", "vla_control.safety_controller_node", "--ros-args"]


class Graph:
    """The node as a process, and a robot with a sender of commands at 100 Hz beside it."""

    def __init__(self, robot, **parameters):
        self.robot = load_robot(robot)
        self.domain = int(os.environ.get("ROS_DOMAIN_ID", 16)) + next(DOMAINS)  # of this process and node only
        timeouts = ("command_timeout", "joint_state_timeout", "driver_timeout", "overrun", "enable_timeout")
        parameters = {"robot": robot, **dict.fromkeys(timeouts, TIMEOUT), **parameters}
        words = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
        environment = os.environ | {
            "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
            "ROS_DOMAIN_ID": str(self.domain),
        }
        self.process = subprocess.Popen(NODE + words, env=environment, stderr=subprocess.PIPE, text=True)
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=self.domain)
        self.node = Node("robot_and_sender", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.status, self.diagnostics, self.events = [], [], []
        self.targets = {arm.name: [] for arm in self.robot.arms}
        for name, heard in self.targets.items():
            self.node.create_subscription(JointState, f"/{name}/joint_targets", heard.append, 100)
        self.node.create_subscription(SafetyStatus, "/safety_status", self.status.append, 100)
        self.node.create_subscription(SafetyEvent, "/safety_events", self.events.append, 100)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self.diagnostics.append, 10)
        self._joints = self.node.create_publisher(JointState, "/joint_states", 10)
        self._commands = self.node.create_publisher(Command, "/command", 5)
        self._drivers = self.node.create_publisher(DriverStatus, "/driver_status", 10)
        self._enable = self.node.create_publisher(Bool, "/enable", 10)
        self._wrenches = {
            arm.name: self.node.create_publisher(WrenchStamped, f"/{arm.name}/wrench", 10) for arm in self.robot.arms
        }
        self.emergency_stop = self.node.create_publisher(Bool, "/emergency_stop", 10)
        self.services = {
            name: self.node.create_client(Trigger, f"/safety_controller/{name}") for name in ("arm", "disarm", "stop")
        }
        self.positions = {j: float(q) for arm in self.robot.arms for j, q in zip(arm.joints, arm.home)}
        for arm in self.robot.arms:
            self.positions |= arm.gripper.positions(0.5)
        self.unmeasured: set[str] = set()
        self.sending, self.sequence, self.speed = False, 0, 0.02
        # What the drivers say, what the enabling device does, the forces (N): None is not published.
        self.halted, self.held, self.force = dict.fromkeys(self.targets, ""), True, dict.fromkeys(self.targets)
        self.node.create_timer(0.01, self.tick)

    def tick(self):
        for heard in self.targets.values():
            if heard:
                self.positions |= dict(zip(heard[-1].name, heard[-1].position))
        measured = {joint: q for joint, q in self.positions.items() if joint not in self.unmeasured}
        message = JointState(name=list(measured), position=list(measured.values()))
        message.header.stamp = self.node.get_clock().now().to_msg()
        self._joints.publish(message)
        if self.halted is not None:
            status = DriverStatus(arms=[ArmDriverStatus(arm=a, halted=why) for a, why in self.halted.items()])
            status.header.stamp = message.header.stamp
            self._drivers.publish(status)
        if self.held is not None:
            self._enable.publish(Bool(data=self.held))
        for arm, force in self.force.items():
            if force is not None:
                wrench = WrenchStamped()
                wrench.header.stamp, wrench.wrench.force.z = message.header.stamp, force
                self._wrenches[arm].publish(wrench)
        if self.sending:
            self._commands.publish(self.command())

    def command(self, **fields):
        self.sequence += 1
        message = Command(sequence=self.sequence, source="test", period=0.01, **fields)
        message.header.stamp = self.node.get_clock().now().to_msg()
        for arm in self.robot.arms:
            part = ArmCommand(arm=arm.name, gripper=float("nan"))
            part.translation.y = self.speed * 0.01
            message.arms.append(part)
        return message

    def until(self, condition, patience=PATIENCE):
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if condition():
                return True
            self.executor.spin_once(timeout_sec=0.05)
        return False

    def state(self):
        return self.status[-1].state if self.status else None

    def until_state(self, state):
        assert self.until(lambda: self.state() == state), f"expected {state}, found {self.status[-1:]}"
        return self.status[-1]

    def call(self, name):
        assert self.until(self.services[name].service_is_ready)
        future = self.services[name].call_async(Trigger.Request())
        assert self.until(future.done)
        return future.result()

    def arm(self):
        """Armed; the service refuses as long as no joint states have come."""
        assert self.until(lambda: self.call("arm").success)
        self.until_state(SafetyStatus.ARMED)

    def run(self):
        self.sending = True
        self.until_state(SafetyStatus.RUNNING)
        assert self.until(lambda: any(abs(v) > 0.005 for v in self.status[-1].arms[0].velocity))

    def counted(self, key):
        """What the newest diagnostics count under a key."""
        values = {v.key: v.value for m in self.diagnostics[-1:] for s in m.status for v in s.values}
        return int(values.get(key, 0))

    def rest(self):
        """Disarmed, with nothing sent and nothing counted against the next test."""
        self.sending, self.unmeasured = False, set()
        assert self.call("disarm").success
        self.until_state(SafetyStatus.DISARMED)
        self.positions |= {j: float(q) for arm in self.robot.arms for j, q in zip(arm.joints, arm.home)}
        for heard in self.targets.values():
            heard.clear()

    def close(self):
        self.process.terminate()  # not kill: Fast DDS crashes when its participant goes right after a killed peer
        self.process.wait(PATIENCE)
        self.process.stderr.close()
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture(scope="module")
def shared():
    graph = Graph("aloha")
    yield graph
    graph.close()


@pytest.fixture
def graph(shared):
    shared.until(lambda: shared.status)
    shared.rest()
    yield shared
    shared.sending = False


def test_nothing_is_sent_until_armed(graph):
    graph.sending = True
    count = len(graph.status)
    assert graph.until(lambda: len(graph.status) > count + 30)
    assert graph.state() == SafetyStatus.DISARMED
    assert not any(graph.targets.values())
    assert graph.status[-1].refused > 0
    graph.sending = False
    graph.arm()
    assert graph.until(lambda: all(graph.targets.values()))
    first = graph.targets["left"][0]
    arm = graph.robot.arm("left")
    assert list(first.name) == [*arm.joints, *(j.name for j in arm.gripper.joints)]
    assert list(first.position[:6]) == pytest.approx(arm.home)


def test_silence_holds_both_arms_within_a_period_of_the_time_out(graph):
    graph.arm()
    graph.run()
    graph.sending = False
    held = graph.until_state(SafetyStatus.HOLDING)
    assert "stale command" in held.reason
    running = [s for s in graph.status if s.state == SafetyStatus.RUNNING][-1]
    first = graph.status[graph.status.index(running) + 1]
    # Decided in the first period in which no command had come for too long, whenever the machine came to it; on a busy
    # one a command may be old when it is taken, by no more than that time again.
    assert running.command_age <= 2 * TIMEOUT + 0.011
    assert first.state in (SafetyStatus.STOPPING, SafetyStatus.HOLDING)
    assert all(v == 0.0 for arm in held.arms for v in arm.velocity)
    graph.run()


def test_an_emergency_stop_is_latched_until_armed(graph):
    graph.arm()
    graph.run()
    graph.emergency_stop.publish(Bool(data=True))
    graph.until_state(SafetyStatus.STOPPED)
    graph.emergency_stop.publish(Bool(data=False))
    count = len(graph.status)
    assert graph.until(lambda: len(graph.status) > count + 30)
    assert {s.state for s in graph.status[count:]} == {SafetyStatus.STOPPED}
    assert graph.status[-1].reason == "emergency stop"
    graph.sending = False
    graph.arm()
    graph.run()


def test_stop_is_left_by_arming_and_nothing_is_sent_once_disarmed(graph):
    graph.arm()
    graph.run()
    assert graph.call("stop").success
    graph.sending = False
    assert graph.until(lambda: graph.call("arm").success)  # refused as long as the arms brake
    graph.run()
    assert graph.call("disarm").success
    assert graph.until(lambda: graph.state() == SafetyStatus.DISARMED)
    graph.sending = False
    count = {n: len(t) for n, t in graph.targets.items()}
    seen = len(graph.status)
    assert graph.until(lambda: len(graph.status) > seen + 10)
    assert count == {n: len(t) for n, t in graph.targets.items()}


def test_arming_a_moving_robot_is_refused_with_a_reason(graph):
    graph.arm()
    graph.run()
    answer = graph.call("arm")
    assert not answer.success
    assert "at rest" in answer.message


@pytest.mark.parametrize("wrong", ["not_finite", "arms", "size", "frame"])
def test_a_bad_command_is_refused_and_counted(graph, wrong):
    graph.arm()
    before = graph.status[-1].refused
    bad = graph.command()
    if wrong == "not_finite":
        bad.arms[0].translation.x = float("nan")
    elif wrong == "arms":
        bad.arms = [bad.arms[0], bad.arms[0]]
    elif wrong == "size":
        bad.arms[1].mode = 9
    else:
        bad.header.frame_id = "left_tool"
    graph._commands.publish(bad)
    assert graph.until(lambda: graph.status[-1].refused == before + 1)
    assert graph.state() == SafetyStatus.ARMED
    assert graph.until(lambda: graph.counted(f"refused: {wrong}"))
    events = [e for e in graph.events if e.kind == "refused"]
    assert list(events[-1].reasons) == [wrong] and events[-1].header.frame_id == graph.robot.base_frame


def test_joint_states_without_a_joint_hold(graph):
    graph.arm()
    graph.run()
    graph.speed = 0.0  # what is not measured is not seen to follow either, which would stop the arm
    try:
        assert graph.until(lambda: all(v == 0.0 for arm in graph.status[-1].arms for v in arm.velocity))
        graph.unmeasured = {"vx300s_right/waist"}
        assert "stale joint states" in graph.until_state(SafetyStatus.HOLDING).reason
        graph.unmeasured = set()
    finally:
        graph.speed = 0.02
    graph.run()


def test_a_limited_and_a_stopped_command_are_events_with_before_and_after(graph):
    graph.arm()
    graph.speed = 0.4  # m/s, at once: more than the joints' acceleration allows
    graph.sending = True
    try:
        limited = lambda: [e for e in graph.events if e.kind == "limited" and "acceleration" in e.reasons]  # noqa: E731
        assert graph.until(limited)
        event = limited()[0]
        assert event.arm in graph.targets and len(event.before) == len(event.after) == 6
        assert max(np.abs(event.before)) > max(np.abs(event.after))
        graph.until_state(SafetyStatus.RUNNING)
        graph.events.clear()
        graph.emergency_stop.publish(Bool(data=True))
        graph.until_state(SafetyStatus.STOPPED)
        assert graph.until(lambda: {e.kind for e in graph.events} >= {"stopped", "state"})
        stopped = [e for e in graph.events if e.kind == "stopped"]
        assert [list(e.reasons) for e in stopped] == [["emergency_stop"]] and stopped[0].text == "emergency stop"
        assert len(stopped[0].before) == len(stopped[0].after) == 12
        # Jerk: braking begins gently, so the two may be equal but for rounding.
        assert np.abs(stopped[0].after).max() <= np.abs(stopped[0].before).max() + 1e-9
        assert graph.status[-1].stop_category == 2
        assert graph.until(lambda: graph.counted("stopped: emergency_stop") and graph.counted("limited: acceleration"))
    finally:
        graph.speed = 0.02


def test_the_keyboard_command_stops_at_a_key_and_when_its_input_ends(graph):
    environment = os.environ | {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "ROS_DOMAIN_ID": str(graph.domain)}
    command = [sys.executable, "-m", "vla_control.stop"]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        graph.arm()
        graph.run()
        assert "any key" in process.stdout.readline()
        process.stdin.write(" ")
        process.stdin.flush()
        assert graph.until_state(SafetyStatus.STOPPED).reason == "emergency stop"
        graph.sending = False
        graph.arm()
        graph.run()
        process.stdin.close()
        graph.until_state(SafetyStatus.STOPPED)
        assert graph.until(lambda: process.poll() is not None)
        assert process.returncode == 0
        assert process.stdout.read().count("stopped: emergency stop") == 2
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_keyboard_command_says_when_nobody_answers():
    environment = os.environ | {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "ROS_DOMAIN_ID": "14"}
    result = subprocess.run(
        [sys.executable, "-m", "vla_control.stop", "--now"],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert result.returncode == 1 and "no safety controller answers" in result.stderr


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A Panda with a contact threshold, an enabling device, and drivers that are watched."""
    panda = load_robot("panda")
    tree = yaml.safe_load(panda.path.read_text())
    tree["arms"]["arm"]["contact"] = {"force": 20.0}
    tree["cameras"] = {}
    path = tmp_path_factory.mktemp("robot") / "guarded.yaml"
    path.write_text(yaml.safe_dump(tree))
    graph = Graph(str(path), enabling_device=True, watch_drivers="always", stop_category=1)
    yield graph
    graph.close()


@pytest.fixture
def guard(guarded):
    guarded.until(lambda: guarded.status)
    guarded.rest()
    yield guarded
    guarded.sending, guarded.held, guarded.force["arm"] = False, True, None
    guarded.halted = {"arm": ""}


@pytest.mark.parametrize("held", [False, None], ids=["released", "silent"])
def test_an_enabling_device_that_is_let_go_stops_and_is_needed_to_arm(guard, held):
    guard.arm()
    guard.run()
    guard.held = held
    stopped = guard.until_state(SafetyStatus.STOPPED)
    assert "enabling device" in stopped.reason and stopped.stop_category == 1
    guard.sending = False
    answer = guard.call("arm")
    assert not answer.success and "enabling device" in answer.message
    count = len(guard.status)
    guard.held = True
    assert guard.until(lambda: len(guard.status) > count + 30)
    assert {s.state for s in guard.status[count:]} == {SafetyStatus.STOPPED}
    guard.arm()
    guard.run()


@pytest.mark.parametrize("fault", ["protective stop", None], ids=["halted", "silent"])
def test_a_driver_that_halts_or_dies_stops_the_arm(guard, fault):
    guard.arm()
    guard.run()
    guard.halted = fault and {"arm": fault}
    assert (fault or "drivers") in guard.until_state(SafetyStatus.STOPPED).reason
    guard.sending = False
    assert not guard.call("arm").success
    guard.halted = {"arm": ""}
    guard.arm()
    guard.run()


def test_a_contact_stops_the_arm_and_silence_of_its_sensor_is_told_or_holds(guard):
    answer = guard.call("arm")
    assert answer.success and "contacts are not felt" in answer.message
    guard.rest()
    guard.force["arm"] = 5.0
    guard.until(lambda: False, patience=0.2)
    answer = guard.call("arm")
    assert answer.success and answer.message == "armed"
    guard.run()
    guard.force["arm"] = None
    guard.until_state(SafetyStatus.HOLDING)
    guard.force["arm"] = 5.0
    guard.until_state(SafetyStatus.RUNNING)
    guard.force["arm"] = 30.0
    assert "30" in guard.until_state(SafetyStatus.STOPPED).reason
    assert guard.until(lambda: guard.counted("stopped: contact"))


def test_the_loop_keeps_its_period_and_says_how_well(guard):
    count = len(guard.status)
    assert guard.until(lambda: len(guard.status) > count + 150)
    periods = np.array([s.period for s in guard.status[count:]])
    assert np.median(periods) == pytest.approx(guard.robot.rates.control**-1, rel=0.1)
    assert guard.until(lambda: guard.counted("periods") > 150)
    values = {v.key: v.value for v in guard.diagnostics[-1].status[0].values}
    assert int(values["overruns by its own work"]) <= int(values["overruns"])
    for key in ("period jitter median ms", "step CPU p99 ms", "garbage collections"):
        assert float(values[key]) >= 0.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_brakes_and_ends_the_node_quietly(number):
    graph = Graph("panda")
    try:
        graph.arm()
        graph.speed = 0.1
        graph.run()
        graph.process.send_signal(number)
        assert graph.until(lambda: graph.process.poll() is not None)
        graph.until(lambda: graph.state() == SafetyStatus.DISARMED, patience=5.0)
        last = graph.targets["arm"][-1]
        assert max(abs(v) for v in last.velocity) < 0.06  # a period of braking before rest at most
        assert graph.process.returncode == 0
        assert "Traceback" not in graph.process.stderr.read()
    finally:
        graph.close()


@pytest.mark.parametrize(
    "parameter, message",
    [
        ("robot:=nobody", "robot 'nobody'"),
        ("command_timeout:=-1.0", "command_timeout: expected a number"),
        ("watch_drivers:=sometimes", "watch_drivers: expected one of"),
        ("stop_category:=3", "stop_category: expected 0, 1 or 2"),
    ],
)
def test_a_bad_parameter_is_one_clear_error(parameter, message):
    result = subprocess.run([*NODE, "-p", parameter], capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
