"""Nodes as processes: how they begin and end."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("rclpy")

NODE = """
    from rclpy.node import Node
    from std_msgs.msg import String
    from vla_ros.run import run_node

    class Talker(Node):
        done = False

        def __init__(self):
            super().__init__("talker")
            self.limit = self.declare_parameter("limit", 0).value
            if self.limit < 0:
                raise ValueError(f"limit: expected a number >= 0, found {self.limit}")
            self.count = 0
            self.publisher = self.create_publisher(String, "/words", 5)
            self.create_timer(0.01, self.tick)

        def tick(self):
            self.count += 1
            if self.count == 3:
                print("running", flush=True)
            self.done = 0 < self.limit <= self.count

        def finish(self):
            self.publisher.publish(String(data="goodbye"))
            print("goodbye", flush=True)

    run_node(Talker)
"""


def start(tmp_path, *words):
    script = tmp_path / "talker.py"
    script.write_text(textwrap.dedent(NODE))
    environment = os.environ | {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    return subprocess.Popen(
        [sys.executable, script, *words], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_node_say_goodbye_and_end_quietly(tmp_path, number):
    process = start(tmp_path)
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (0, "goodbye\n", "")


def test_a_node_that_is_done_ends(tmp_path):
    out, errors = (process := start(tmp_path, "--ros-args", "-p", "limit:=5")).communicate(timeout=60)
    assert (process.returncode, out, errors) == (0, "running\ngoodbye\n", "")


@pytest.mark.parametrize("value, words", [("-1", "limit: expected a number >= 0, found -1"), ("many", "limit")])
def test_a_node_that_cannot_be_made_says_why_in_one_line(tmp_path, value, words):
    out, errors = (process := start(tmp_path, "--ros-args", "-p", f"limit:={value}")).communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    assert errors.startswith("talker: ") and words in errors and errors.count("\n") == 1
