"""The real teleop node behind a terminal and a gamepad stream."""

import os
import pty
import struct
import sys
import termios
import tty

import numpy as np
import pytest
from std_msgs.msg import Bool
from std_srvs.srv import Trigger
from vla_msgs.msg import Command
from vla_msgs.srv import StartEpisode, StopEpisode


@pytest.fixture
def teleop(processes):
    """Starts the node: teleop(name=value, ...) -> process."""

    def start(**parameters):
        command = [sys.executable, "-m", "vla_teleop.teleop_node", "--ros-args"]
        for name, value in {"robot": "panda", **parameters}.items():
            command += ["-p", f"{name}:={value}"]
        return processes(command)

    return start


@pytest.fixture
def graph(node):
    """What the node sends: commands, and the names of services called."""
    node.commands, node.calls, node.stops = [], [], []
    node.create_subscription(Command, "/command", node.commands.append, 100)
    node.create_subscription(Bool, "/emergency_stop", node.stops.append, 10)

    def answer(name):
        def take(request, response):
            node.calls.append((name, getattr(request, "outcome", None)))
            response.success = True
            return response

        return take

    for kind, name in (
        (Trigger, "/safety_controller/arm"),
        (Trigger, "/safety_controller/stop"),
        (StartEpisode, "/recorder/start"),
        (StopEpisode, "/recorder/stop"),
        (Trigger, "/recorder/discard"),
    ):
        node.create_service(kind, name, answer(name))
    return node


def moves(graph) -> np.ndarray:
    """x motion of every command, (n,), m."""
    return np.array([c.arms[0].translation.x if c.arms else 0.0 for c in graph.commands])


def test_keyboard_drives_stops_and_calls_services(teleop, graph):
    person, device = pty.openpty()
    before = termios.tcgetattr(device)[3]
    process = teleop(device="keyboard", path=os.ttyname(device))
    assert graph.spin_until(lambda: not termios.tcgetattr(device)[3] & termios.ICANON, 15.0)
    assert graph.spin_until(lambda: graph.count_publishers("/command") == 1, 5.0)
    graph.spin_until(lambda: False, 0.5)
    assert graph.commands == []

    os.write(person, b"w")
    assert graph.spin_until(lambda: any(c.hold for c in graph.commands), 5.0)  # moved, and stopped by itself
    moved = moves(graph)
    assert 10 < np.count_nonzero(moved) < 60
    assert np.allclose(moved[moved != 0], 0.2 * 0.6 * 0.01)
    first = graph.commands[0]
    assert first.source == "teleop" and first.header.frame_id == "world" and first.period == 0.01
    assert [c.sequence for c in graph.commands] == list(range(1, len(graph.commands) + 1))

    graph.spin_until(lambda: False, 1.0)
    sent = len(graph.commands)
    graph.spin_until(lambda: False, 0.3)
    assert len(graph.commands) == sent  # silent: a policy may drive

    for key, name, outcome in (
        (b"\n", "/safety_controller/arm", None),
        (b"b", "/recorder/start", None),
        (b"e", "/recorder/stop", StopEpisode.Request.SUCCESS),
        (b"g", "/recorder/stop", StopEpisode.Request.FAILURE),
        (b"c", "/recorder/discard", None),
        (b"x", "/safety_controller/stop", None),
    ):
        assert graph.stops == []
        os.write(person, key)
        assert graph.spin_until(lambda n=name, o=outcome: graph.calls[-1:] == [(n, o)], 5.0)
    assert graph.spin_until(lambda: [m.data for m in graph.stops] == [True], 5.0)  # also when no service is there

    os.write(person, b"q")
    assert process.wait(10.0) == 0
    assert termios.tcgetattr(device)[3] == before
    os.close(person)
    os.close(device)


def test_gamepad_drives_stops_when_unplugged_and_comes_back(teleop, graph, tmp_path):
    path = tmp_path / "js0"  # leads to one pseudo terminal after the other: a byte stream that can hang up
    process = teleop(device="gamepad", path=str(path))
    push = struct.pack("<IhBB", 0, 1, 1, 4) + struct.pack("<IhBB", 0, -32767, 2, 1)
    for _ in range(2):
        person, device = pty.openpty()
        tty.setraw(device)
        path.symlink_to(os.ttyname(device))
        os.write(person, push)
        graph.commands.clear()
        assert graph.spin_until(lambda: np.count_nonzero(moves(graph)) > 5, 15.0)
        path.unlink()
        os.close(device)
        os.close(person)
        assert graph.spin_until(lambda: graph.commands[-1].hold, 5.0)
    process.terminate()
    assert process.wait(10.0) == 0
