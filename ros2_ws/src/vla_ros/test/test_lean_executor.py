"""Everything that a node may wait for, on the executor of all nodes."""

import os
import threading
import time

import pytest

rclpy = pytest.importorskip("rclpy")

from rclpy.callback_groups import ReentrantCallbackGroup  # noqa: E402
from rclpy.node import Node  # noqa: E402
from std_msgs.msg import Int32  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402
from vla_ros.lean_executor import LeanExecutor  # noqa: E402


@pytest.fixture
def graph():
    """A node on a LeanExecutor, and a function that spins it until a condition holds."""
    context = rclpy.Context()
    rclpy.init(args=[], context=context, domain_id=60 + os.getpid() % 40)
    node = Node("lean", context=context)
    executor = LeanExecutor(context=context)
    executor.add_node(node)

    def until(condition, patience=30.0):
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline
            executor.spin_once(timeout_sec=0.1)

    yield node, executor, until
    executor.shutdown()
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_every_message_and_timer_call_arrives_once_and_in_order(graph):
    node, _, until = graph
    publisher = node.create_publisher(Int32, "numbers", 100)
    found, calls = [], []
    node.create_subscription(Int32, "numbers", lambda m: found.append(m.data), 100)

    def tick():
        calls.append(time.monotonic())
        if len(calls) <= 50 and publisher.get_subscription_count():
            publisher.publish(Int32(data=len(calls)))

    node.create_timer(0.002, tick)
    until(lambda: found and found[-1] == 50)
    assert found == list(range(found[0], 51))


def test_services_clients_guards_and_tasks_work(graph):
    node, executor, until = graph
    heard = []

    def serve(_, response):
        response.success, response.message = True, "served"
        return response

    node.create_service(Trigger, "serve", serve)
    client = node.create_client(Trigger, "serve")
    until(client.service_is_ready)
    client.call_async(Trigger.Request()).add_done_callback(lambda f: heard.append(f.result().message))
    until(lambda: heard == ["served"])
    guard = node.create_guard_condition(lambda: heard.append("guard"))
    guard.trigger()
    until(lambda: "guard" in heard)
    executor.create_task(lambda: heard.append("task"))
    until(lambda: "task" in heard)
    assert heard == ["served", "guard", "task"]


def test_what_is_made_and_destroyed_while_it_spins_is_heeded(graph):
    node, executor, until = graph
    publisher = node.create_publisher(Int32, "later", 10)
    executor.spin_once(timeout_sec=0.01)
    found = []
    subscription = node.create_subscription(Int32, "later", lambda m: found.append(m.data), 10)
    until(lambda: publisher.get_subscription_count() == 1)
    publisher.publish(Int32(data=1))
    until(lambda: found == [1])
    node.destroy_subscription(subscription)
    until(lambda: publisher.get_subscription_count() == 0)
    publisher.publish(Int32(data=2))
    for _ in range(10):
        executor.spin_once(timeout_sec=0.01)
    assert found == [1]


def test_an_error_in_a_callback_reaches_the_caller(graph):
    node, _, until = graph
    node.create_timer(0.001, lambda: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        until(lambda: False)


def test_a_callback_that_awaits_is_refused(graph):
    node, executor, until = graph

    async def tick():
        await executor.create_task(lambda: None)

    node.create_timer(0.001, tick)
    with pytest.raises(TypeError, match="expected a plain function"):
        until(lambda: False)


def test_a_slow_service_of_a_reentrant_group_holds_up_nothing(graph):
    node, _, until = graph
    go_on, calls, answers = threading.Event(), [], []

    def serve(_, response):
        go_on.wait(30.0)
        response.success = True
        return response

    node.create_service(Trigger, "slow", serve, callback_group=ReentrantCallbackGroup())
    client = node.create_client(Trigger, "slow")
    until(client.service_is_ready)
    client.call_async(Trigger.Request()).add_done_callback(lambda f: answers.append(f.result().success))
    node.create_timer(0.002, lambda: calls.append(1))
    until(lambda: len(calls) > 50)
    assert answers == []
    go_on.set()
    until(lambda: answers == [True])


def test_an_error_in_a_service_beside_reaches_the_caller(graph):
    node, _, until = graph
    node.create_service(Trigger, "broken", lambda q, a: {}["missing"], callback_group=ReentrantCallbackGroup())
    client = node.create_client(Trigger, "broken")
    until(client.service_is_ready)
    client.call_async(Trigger.Request())
    with pytest.raises(KeyError, match="missing"):
        until(lambda: False)


def test_it_waits_no_longer_than_asked(graph):
    _, executor, _ = graph
    executor.spin_once(timeout_sec=0.0)
    begin = time.monotonic()
    for _ in range(5):  # what is left of the making may wake it up
        executor.spin_once(timeout_sec=0.02)
    assert time.monotonic() - begin < 10.0
