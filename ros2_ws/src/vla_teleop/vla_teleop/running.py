"""Runs a node until a signal or its own end; the ROS context lives until the node has said goodbye."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions


def run_node(make: Callable[[], Node], args: list[str] | None = None) -> None:
    """Make the node and spin it until a signal or until it sets `done`; then call its `finish`.

    A ValueError while it is made is printed as one line, with exit status 1.
    """
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        node = make()
    except ValueError as error:  # a robot or a parameter that cannot be used
        rclpy.shutdown()
        sys.exit(f"error: {error}")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not stopped and not getattr(node, "done", False):
            executor.spin_once(timeout_sec=0.1)
    finally:
        node.finish()
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown()
