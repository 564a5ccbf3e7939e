"""An emergency stop on a keyboard, for any shell and whatever else runs.

    python -m vla_control.stop          # any key stops the arms, as often as needed; Ctrl-C ends this program
    python -m vla_control.stop --now    # stop at once, and end

It publishes on /emergency_stop and tells what the safety controller answers. Input that ends (a terminal that is
closed, a connection that is cut) stops the arms too. Arming goes on as always, by the service or the teleoperation
device.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager

import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.utilities import remove_ros_args
from std_msgs.msg import Bool
from vla_msgs.msg import SafetyStatus

from vla_control.safety import State

#: How often a stop is repeated until the controller has answered, and how long that may take, s.
REPEAT, PATIENCE = 0.1, 5.0
_LATCHED = (State.STOPPED, State.FAULT)
_NAMES = {state.value: state.name.lower() for state in State}


class StopNode(Node):
    """Publishes emergency stops and hears what becomes of them."""

    def __init__(self) -> None:
        super().__init__("stop_key")
        self._status: SafetyStatus | None = None
        self._stop = self.create_publisher(Bool, "/emergency_stop", QoSProfile(depth=10))
        self.create_subscription(SafetyStatus, "/safety_status", self._on_status, QoSProfile(depth=10))

    def _on_status(self, status: SafetyStatus) -> None:
        self._status = status

    def stop(self) -> bool:
        """Stop the arms; returns whether the controller said so in time."""
        print("STOP", flush=True)
        self._status = None
        deadline, again = time.monotonic() + PATIENCE, 0.0
        while time.monotonic() < deadline:
            if time.monotonic() >= again:
                self._stop.publish(Bool(data=True))
                again = time.monotonic() + REPEAT
            rclpy.spin_once(self, timeout_sec=REPEAT)
            if self._status and self._status.state in _LATCHED:
                print(f"{_NAMES[self._status.state]}: {self._status.reason}", flush=True)
                return True
        heard = f"still {_NAMES.get(self._status.state)}" if self._status else "no safety controller answers"
        print(f"stop: expected the safety controller to stop in {PATIENCE:.0f} s, found: {heard}", file=sys.stderr)
        return False


@contextmanager
def _keys(handle: int) -> Iterator[None]:
    """A terminal gives each key at once; what is no terminal stays as it is."""
    if not os.isatty(handle):
        yield
        return
    before = termios.tcgetattr(handle)
    tty.setcbreak(handle)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 256)
    except OSError:
        return b""  # a terminal that has gone


def main() -> int:
    """Stop at each key until Ctrl-C or the end of the input; exit status 1 when the last stop was not confirmed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--now", action="store_true", help="stop at once, and end")
    now = parser.parse_args(remove_ros_args(sys.argv)[1:]).now
    handle = sys.stdin.fileno()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that is closed: stop first, then end
    rclpy.init()
    try:
        node = StopNode()
        if now:
            return 0 if node.stop() else 1
        print("any key stops the arms; Ctrl-C ends this program", flush=True)
        good = True
        with _keys(handle):
            while True:
                rclpy.spin_once(node, timeout_sec=0.0)
                if not select.select([handle], [], [], 0.05)[0]:
                    continue
                ended = not _read(handle)
                good = node.stop()
                if ended:
                    return 0 if good else 1
    except (KeyboardInterrupt, ExternalShutdownException):
        return 0
    finally:
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
