"""Runs a node until SIGINT or SIGTERM, with the ROS context alive to the end so that it can say goodbye."""

from __future__ import annotations

import signal
from collections.abc import Callable

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions


def run_node(make: Callable[[], Node], args: list[str] | None = None) -> None:
    """Make the node and spin it; after a signal call its `finish` and leave quietly."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    node = make()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not stopped:
            executor.spin_once(timeout_sec=0.1)
    finally:
        node.finish()
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown()
