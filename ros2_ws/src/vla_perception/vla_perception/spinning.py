"""Run one node until it is told to end."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from vla_core.memory import keep_freed_memory


def spin(make_node: Callable[[], Node], args: list[str] | None = None) -> None:
    """Make a node and spin it until SIGINT or SIGTERM; both end it quietly.

    A ValueError while it is made (a robot, a calibration or a parameter that cannot be used) is printed as one line,
    with exit status 1. The executor is rclpy's single-threaded one: its events executor, as the wheels of Kilted
    have it, keeps half a core busy with nothing to do and hangs at the end.
    """
    keep_freed_memory()
    rclpy.init(args=args)
    try:
        try:
            node = make_node()
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        # What is alive now stays alive: collections then look at little, and hold up no image.
        gc.collect()
        gc.freeze()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        rclpy.try_shutdown()
