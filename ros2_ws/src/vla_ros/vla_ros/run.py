"""The start and the end of every node, in one place."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from vla_core.memory import keep_freed_memory

from vla_ros.lean_executor import LeanExecutor

#: A node looks this often, at least, whether it is to end, s.
PATIENCE = 0.1


def run_node(make: Callable[[], Node], args: list[str] | None = None) -> None:
    """Make a node and spin it until SIGINT, SIGTERM or its own end; then end it in order, with exit status 0.

    Signals only ask: the ROS context lives until the node has said goodbye, so that the controller can brake and the
    recorder can close its bag. A ValueError while the node is made (a robot, a calibration or a parameter that cannot
    be used) is printed as one line, with exit status 1.

    What a node may have:
        done: true ends it.
        run(executor, ended): drives itself, until `ended()`, in place of spinning.
        finish(): called at the end, while topics and services still work.

    It spins on a LeanExecutor. rclpy's events executor, as the wheels of Kilted have it, keeps half a core busy with
    nothing to do and hangs at the end.
    """
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: asked.append(received))
    keep_freed_memory()
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    try:
        try:
            node = make()
        except (ValueError, ParameterException) as error:
            sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
        # What is alive now stays alive: collections then look at little and hold up no period and no image.
        gc.collect()
        gc.freeze()

        def ended() -> bool:
            return bool(asked) or getattr(node, "done", False)

        spinning = LeanExecutor()
        spinning.add_node(node)
        try:
            if hasattr(node, "run"):
                node.run(spinning, ended)
            else:
                while not ended():
                    spinning.spin_once(timeout_sec=PATIENCE)
        finally:
            if hasattr(node, "finish"):
                node.finish()
            spinning.shutdown()
            node.destroy_node()
    finally:
        rclpy.try_shutdown()
        # It is ending: a second Ctrl-C while Python tidies up must not turn that into a crash.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
