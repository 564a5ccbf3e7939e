"""The node among a policy and a safety controller that are faked by one publisher in this process."""

import time

import numpy as np
import pytest
import rclpy
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray
from execution_toys import HORIZON, PERIOD, START
from geometry_msgs.msg import Point, Pose, Quaternion
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_srvs.srv import Trigger
from vla_core.time import seconds
from vla_execution.chunk_executor_node import ChunkExecutorNode
from vla_msgs.msg import ActionChunk, ActionTrajectory, ArmSafety, ChunkRequest, Command, PolicyStatus, SafetyStatus

SPEED = 0.05  # of the faked policy's plan along x, m/s


class Graph(Node):
    """Answers requests and takes commands, ideally; `spoil` changes an answer, `alive` says whether there is one."""

    def __init__(self):
        super().__init__("graph")
        self.alive, self.spoil, self.state = True, None, SafetyStatus.ARMED
        self.position, self.begin = START[0], None
        self.requests, self.commands, self.diagnostics = [], [], []
        self._sequence, self._source = 0, ""
        self.chunks = self.create_publisher(ActionChunk, "/action_chunk", 5)
        self.statuses = self.create_publisher(SafetyStatus, "/safety_status", 10)
        self.policies = self.create_publisher(
            PolicyStatus, "/policy_status", QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        )
        self.create_subscription(ChunkRequest, "/chunk_request", self.answer, 5)
        self.create_subscription(Command, "/command", self.take, 5)
        self.create_subscription(DiagnosticArray, "/diagnostics", lambda m: self.diagnostics.append(m.status[0]), 10)
        self.create_timer(0.01, self.report)

    def now(self):
        return self.get_clock().now().nanoseconds * 1e-9

    def answer(self, request):
        self.requests.append(request)
        if not self.alive:
            return
        now = self.now()
        targets = np.tile(START, (HORIZON, 1))
        targets[:, 0] = self.position + SPEED * PERIOD * np.arange(HORIZON)
        message = ActionChunk(request_id=request.id, policy="toy")
        message.header.stamp, message.header.frame_id = self.get_clock().now().to_msg(), "world"
        message.actions = ActionTrajectory(frame_id="world", arms=["arm"], representation=ActionTrajectory.POSE)
        message.actions.start = Time(sec=message.header.stamp.sec, nanosec=message.header.stamp.nanosec)
        message.actions.period, message.actions.horizon, message.actions.dimension = PERIOD, HORIZON, 8
        message.actions.data = targets.ravel().tolist()
        if self.spoil:
            self.spoil(message, now)
        self.chunks.publish(message)

    def take(self, command):
        self.commands.append(command)
        self._sequence, self._source = command.sequence, command.source
        for arm in command.arms:
            self.position += arm.translation.x

    def report(self):
        message = SafetyStatus(state=self.state, source=self._source, sequence=self._sequence)
        message.header.stamp = self.get_clock().now().to_msg()
        pose = Pose(position=Point(x=self.position, y=START[1], z=START[2]), orientation=Quaternion(x=1.0, w=0.0))
        message.arms = [ArmSafety(arm="arm", goal=pose, commanded=pose, joints=[0.0] * 7, gripper=1.0)]
        self.statuses.publish(message)


@pytest.fixture
def start():
    """start(**parameters) -> (node, graph, wait): wait(condition) spins until it holds, at most 30 s."""
    rclpy.init(domain_id=15)
    executor, nodes = SingleThreadedExecutor(), []

    def begin(**parameters):
        parameters = {"robot": "panda", "strategy": "naive", "request_timeout": 0.3, **parameters}
        node = ChunkExecutorNode(parameter_overrides=[Parameter(k, value=v) for k, v in parameters.items()])
        nodes.extend([node, Graph()])
        for n in nodes:
            executor.add_node(n)
        return node, nodes[1], wait

    def wait(condition, least=0.0):
        begin = time.monotonic()
        while time.monotonic() - begin < 30.0:
            executor.spin_once(timeout_sec=0.02)
            if time.monotonic() - begin >= least and condition():
                return True
        return False

    yield begin
    executor.shutdown()
    for n in nodes:
        n.destroy_node()
    rclpy.shutdown()


def moving(graph):
    return lambda: len(graph.commands) > 20 and not any(c.hold for c in graph.commands[-20:])


def holding(graph):
    return lambda: len(graph.commands) > 20 and all(c.hold for c in graph.commands[-20:])


def reported(graph, text):
    return lambda: any(text in d.message for d in graph.diagnostics)


def nan(message, now):
    message.actions.data[3] = float("nan")


def late(message, now):
    message.actions.start.sec -= 2


def arms(message, now):
    message.actions.arms = ["left"]


def frame(message, now):
    message.actions.frame_id = "map"


def size(message, now):
    message.actions.data = message.actions.data[:-1]


def failed(message, now):
    message.error, message.actions = "out of memory", ActionTrajectory()


@pytest.mark.parametrize("spoil, reason", [
    (nan, "expected finite numbers, found nan"),
    (late, "due times: expected actions still to come"),
    (arms, "arms: expected ['arm'], found ['left']"),
    (frame, "frame: expected 'world', found 'map'"),
    (size, "actions: expected 20 x 8 numbers, found 159"),
    (failed, "the policy failed: out of memory"),
])  # fmt: skip
def test_a_bad_chunk_is_refused_with_its_reason_and_the_arm_holds_until_good_ones_come(start, spoil, reason):
    node, graph, wait = start()
    assert wait(moving(graph))
    graph.spoil = spoil
    assert wait(reported(graph, reason)), [d.message for d in graph.diagnostics]
    assert wait(holding(graph))
    graph.spoil = None
    assert wait(moving(graph))
    assert wait(lambda: graph.diagnostics[-1].message == "executing")


def test_a_dead_policy_is_asked_again_and_its_return_moves_the_arm(start):
    node, graph, wait = start()
    assert wait(moving(graph))
    graph.alive = False
    assert wait(holding(graph))
    position, asked = graph.position, len(graph.requests)
    assert wait(lambda: len(graph.requests) >= asked + 2)
    assert graph.position == position
    graph.alive = True
    assert wait(moving(graph))


def test_commands_say_where_they_come_from(start):
    node, graph, wait = start()
    assert wait(lambda: len(graph.requests) >= 3 and moving(graph)())
    motions = [c for c in graph.commands if not c.hold]
    assert [c.sequence for c in graph.commands] == sorted({c.sequence for c in graph.commands})
    assert {c.source for c in motions} == {"executor"} and {c.header.frame_id for c in motions} == {"world"}
    assert all(c.chunk in {r.id for r in graph.requests} for c in motions)
    assert all(0 <= seconds(c.header.stamp) - seconds(c.observation) < 1.0 for c in motions)
    assert all(np.hypot(c.arms[0].translation.x, c.arms[0].translation.y) <= 0.006 + 1e-9 for c in motions)


def test_the_goal_moves_at_the_speed_of_the_plan(start):
    node, graph, wait = start()
    assert wait(moving(graph))
    position, now = graph.position, graph.now()
    wait(lambda: True, least=1.0)
    assert (graph.position - position) / (graph.now() - now) == pytest.approx(SPEED, rel=0.2)


def test_nothing_is_sent_while_disarmed(start):
    node, graph, wait = start()
    graph.state = SafetyStatus.DISARMED
    wait(lambda: True, least=0.5)
    assert not graph.commands and not graph.requests
    assert wait(reported(graph, "the safety controller is disarmed"))
    graph.state = SafetyStatus.HOLDING
    assert wait(moving(graph))


def test_requests_of_rtc_carry_the_remainder(start):
    node, graph, wait = start(strategy="rtc_guided", schedule="linear", beta=3.0)
    assert wait(lambda: graph.requests and graph.requests[-1].guidance)
    first, request = graph.requests[0], graph.requests[-1]
    assert first.remainder.horizon == 0 and first.guidance == ""
    assert (request.guidance, request.schedule, request.beta) == ("guided", "linear", 3.0)
    assert request.remainder.horizon * request.remainder.dimension == len(request.remainder.data) > 0
    assert seconds(request.remainder.start) < seconds(request.header.stamp)


def test_a_policy_without_the_guidance_is_named(start):
    node, graph, wait = start(strategy="rtc_guided")
    graph.policies.publish(PolicyStatus(active="act", period=PERIOD, horizon=HORIZON))
    assert wait(reported(graph, "strategy rtc_guided: expected a policy that supports 'guided', found 'act'"))
    asked = len(graph.requests)
    wait(lambda: True, least=0.5)
    assert len(graph.requests) == asked


def test_reset_drops_the_plan(start):
    node, graph, wait = start()
    assert wait(moving(graph))
    graph.alive = False
    client = graph.create_client(Trigger, "/chunk_executor/reset")
    future = client.call_async(Trigger.Request())
    assert wait(future.done) and future.result().success
    count = len(graph.commands)
    wait(lambda: True, least=0.2)
    assert len(graph.commands) <= count + 2


def test_an_unknown_strategy_is_an_error_that_names_it(start):
    with pytest.raises(ValueError, match="strategy: expected one of"):
        start(strategy="magic")
