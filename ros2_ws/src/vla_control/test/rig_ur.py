"""A Universal Robots controller on loopback, for the driver "ur": RTDE, dashboard server and script ports.

Written from UR's RTDE guide, Dashboard Server e-Series page and Script Manual. The program that the driver sends is
run as it is, cycle by cycle, by a small URScript interpreter (what the program uses of the language, no more).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Generator, Iterator

import numpy as np
from driver_rig import Rig

_VECTORS = ("target_q target_qd target_qdd target_current target_moment actual_q actual_qd actual_current "
            "joint_control_output actual_TCP_pose actual_TCP_speed actual_TCP_force target_TCP_pose target_TCP_speed "
            "joint_temperatures actual_joint_voltage tcp_offset ft_raw_wrench payload_inertia").split()  # fmt: skip
_DOUBLES = ("timestamp actual_execution_time speed_scaling target_speed_fraction actual_momentum actual_main_voltage "
            "actual_robot_voltage actual_robot_current standard_analog_input0 standard_analog_input1 "
            "standard_analog_output0 standard_analog_output1 payload").split()  # fmt: skip
_TYPES = (
    dict.fromkeys(_VECTORS, "VECTOR6D")
    | dict.fromkeys(_DOUBLES, "DOUBLE")
    | dict.fromkeys(["actual_digital_input_bits", "actual_digital_output_bits"], "UINT64")
    | dict.fromkeys(["robot_mode", "safety_mode"], "INT32")
    | dict.fromkeys(["runtime_state", "robot_status_bits", "safety_status_bits"], "UINT32")
    | {"joint_mode": "VECTOR6INT32", "actual_tool_accelerometer": "VECTOR3D", "payload_cog": "VECTOR3D"}
    | {f"output_int_register_{i}": "INT32" for i in range(48)}
    | {f"output_double_register_{i}": "DOUBLE" for i in range(48)}
)
_INPUTS = (
    {f"input_int_register_{i}": "INT32" for i in range(48)}
    | {f"input_double_register_{i}": "DOUBLE" for i in range(48)}
    | {"external_force_torque": "VECTOR6D", "speed_slider_mask": "UINT32", "speed_slider_fraction": "DOUBLE"}
)
_FORMATS = {"VECTOR6D": "6d", "VECTOR3D": "3d", "VECTOR6INT32": "6i", "DOUBLE": "d", "INT32": "i", "UINT32": "I",
            "UINT64": "Q"}  # fmt: skip
_STOPPING, _STOPPED, _PLAYING, _PAUSED = 0, 1, 2, 4
_POWER_OFF, _POWER_ON, _IDLE, _RUNNING = 3, 4, 5, 7

_addresses = itertools.count()


def _python(script: str) -> str:
    """A URScript program as a Python generator: what takes time there, is yielded."""
    lines, depth = [], 0
    for text in script.splitlines():
        text = re.sub(r"#.*", "", text).strip()
        if not text:
            continue
        if text == "end":
            depth -= 1
            continue
        wait = "yield " if re.match(r"(servoj|stopj|sync|sleep)\(", text) else ""
        lines.append("    " * (depth - text.startswith(("elif", "else"))) + wait + text)
        depth += text.endswith(":") and not text.startswith(("elif", "else"))
    if depth:
        raise SyntaxError("a block has no end")
    return "\n".join(lines)


class _Client:
    """One TCP connection to a port of the controller."""

    def __init__(self, own: socket.socket, port: int):
        self.own, self.port, self.data, self.started = own, port, b"", False
        self.outputs: list[str] = []
        self.inputs: dict[int, list[str]] = {}
        self.divider = 1


class UrController:
    """The controller and its arm. hz: of its cycle. Everything runs in one thread; `lock` guards what is public."""

    PORTS = (29999, 30002, 30003, 30004)

    def __init__(self, version=(5, 12, 0, 1101319), position=(0.1, -1.2, 1.4, -1.7, -1.5, 0.2)):
        number = next(_addresses)
        self.host = f"127.{66 + os.getpid() % 100}.{os.getpid() // 100 % 250 + 1}.{number % 250 + 1}"
        self.version, self.hz = version, 500 if version[0] > 3 else 125
        self.lock = threading.RLock()
        self.q, self.qd = np.array(position, float), np.zeros(6)
        self.speed = 3.0
        self.mode, self.runtime, self.safety = _RUNNING, _STOPPED, 1
        self.remote, self.serial = True, "20225500123"
        self.stopped_at = -1e9
        self.force = np.array([1.0, 2.0, 3.0, 0.1, 0.2, 0.3])
        self.pose, self.offset = np.zeros(6), np.zeros(6)
        self.int_in, self.float_in = [0] * 48, [0.0] * 48
        self.int_out, self.float_out = [0] * 48, [0.0] * 48
        self.asked: list[str] = []  # Lines to the dashboard.
        self.targets = 0  # servoj commands for another place than where the arm was.
        self.speed_at_power_off = 0.0  # rad/s
        self.error = ""  # Why a program failed.
        self.mangle = None  # What becomes of the bytes of a data package, None: nothing.
        self.cut = False
        self._watchdogs: dict[str, list[float]] = {}
        self._program: Generator | None = None
        self._busy, self._goal, self._brake = 0, None, None
        self._later: list[tuple[float, int]] = []
        self._clients: list[_Client] = []
        self._tick, self._ends = 0, threading.Event()
        self._listeners: dict[socket.socket, int] = {}
        for port in self.PORTS:
            own = socket.socket()
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.bind((self.host, port))
            own.listen(16)
            self._listeners[own] = port
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # The tests' side.

    def protective_stop(self) -> None:
        with self.lock:
            self.safety, self.stopped_at = 1 << 2 | 1 << 10, time.monotonic()
            if self.runtime == _PLAYING:
                self.runtime = _PAUSED

    def emergency_stop(self) -> None:
        with self.lock:
            self.safety, self.mode = 1 << 6 | 1 << 7 | 1 << 10, _POWER_OFF
            self._end_program()

    def release_emergency_stop(self) -> None:
        with self.lock:
            self.safety = 1

    def end_program(self) -> None:
        """As the stop button of the pendant."""
        with self.lock:
            self._end_program()

    def reboot(self) -> None:
        """Power lost and back: every connection is gone, the arm has no power."""
        with self.lock:
            self._end_program()
            self.mode, self.safety = _POWER_OFF, 1
            for client in list(self._clients):
                self._drop(client)

    def close(self) -> None:
        self._ends.set()
        self._thread.join(2.0)
        for own in (*self._listeners, *(client.own for client in self._clients)):
            own.close()

    # One thread for all.

    def _run(self) -> None:
        step, due = 1.0 / self.hz, time.monotonic()
        while not self._ends.is_set():
            with self.lock:
                sockets = [] if self.cut else [*self._listeners, *(client.own for client in self._clients)]
            ready = select.select(sockets, [], [], max(0.0, min(step, due - time.monotonic())))[0]
            with self.lock:
                for own in ready:
                    self._serve(own)
                cycles = 0
                while due <= time.monotonic() and cycles < 5:
                    self._cycle(step)
                    due, cycles = due + step, cycles + 1
                if cycles == 5:  # A busy machine: rather slow than in bursts that nobody can follow.
                    due = time.monotonic()

    def _serve(self, own: socket.socket) -> None:
        if own in self._listeners:
            made = own.accept()[0]
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._clients.append(_Client(made, self._listeners[own]))
            if self._listeners[own] == 29999:
                made.sendall(b"Connected: Universal Robots Dashboard Server\n")
            return
        client = next((one for one in self._clients if one.own is own), None)
        if client is None:
            return
        data = b""
        with contextlib.suppress(OSError):
            data = own.recv(65536)
        client.data += data
        if client.port == 30004:
            self._rtde(client)
        elif client.port == 29999:
            while b"\n" in client.data:
                line, client.data = client.data.split(b"\n", 1)
                with contextlib.suppress(OSError):
                    own.sendall(self._dashboard(line.decode()).encode() + b"\n")
        elif client.data.endswith(b"\nend\n") or not data:
            text, client.data = client.data.decode(), b""
            if text:
                self._load(text)
        if not data:
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        client.own.close()
        if client in self._clients:
            self._clients.remove(client)

    # RTDE.

    def _rtde(self, client: _Client) -> None:
        while len(client.data) >= 3:
            size, kind = struct.unpack_from(">Hc", client.data)
            if len(client.data) < size:
                return
            body, client.data = client.data[3:size], client.data[size:]
            if kind == b"U":
                self._receive(client, body)
                continue
            answer = self._answer(client, kind, body)
            with contextlib.suppress(OSError):
                client.own.sendall(struct.pack(">Hc", 3 + len(answer), kind) + answer)

    def _answer(self, client: _Client, kind: bytes, body: bytes) -> bytes:
        if kind == b"V":
            return bytes([body == b"\0\2"])
        if kind == b"v":
            return struct.pack(">4I", *self.version)
        if kind == b"O":
            client.divider = max(1, round(self.hz / struct.unpack_from(">d", body)[0]))
            client.outputs = [name for name in body[8:].decode().split(",") if name]
            types = [_TYPES.get(name, "NOT_FOUND") for name in client.outputs]
            return bytes(["NOT_FOUND" not in types]) + ",".join(types).encode()
        if kind == b"I":
            names = [name for name in body.decode().split(",") if name]
            used = {n for one in self._clients if one is not client for r in one.inputs.values() for n in r}
            types = ["IN_USE" if name in used else _INPUTS.get(name, "NOT_FOUND") for name in names]
            recipe = 0
            if not {"IN_USE", "NOT_FOUND"} & set(types):
                recipe = len(client.inputs) + 1
                client.inputs[recipe] = names
            return bytes([recipe]) + ",".join(types).encode()
        if kind in b"SP":
            client.started = kind == b"S"
            return b"\1"
        return b""

    def _receive(self, client: _Client, body: bytes) -> None:
        names = client.inputs.get(body[0], [])
        layout = struct.Struct(">" + "".join(_FORMATS[_INPUTS[name]] for name in names))
        if not names or len(body) - 1 != layout.size:
            return
        for name, value in zip(names, layout.unpack(body[1:])):
            if name.startswith("input_int_register_"):
                self.int_in[int(name[19:])] = value
            elif name.startswith("input_double_register_"):
                self.float_in[int(name[22:])] = value
            if name in self._watchdogs:
                self._watchdogs[name][1] = 0.0

    def _send(self, client: _Client) -> None:
        values = {
            "timestamp": self._tick / self.hz, "actual_q": self.q, "actual_qd": self.qd, "target_q": self.q,
            "target_qd": self.qd, "actual_current": 0.1 * np.arange(6), "actual_TCP_force": self.force,
            "actual_TCP_pose": self.pose, "tcp_offset": self.offset, "robot_mode": self.mode,
            "runtime_state": self.runtime, "safety_status_bits": self.safety, "safety_mode": 1,
            "robot_status_bits": (self.mode == _RUNNING) | (self.runtime == _PLAYING) << 1,
        }  # fmt: skip
        body = b"\1"
        for name in client.outputs:
            kind = _FORMATS[_TYPES[name]]
            count = int(kind[:-1] or 1)
            value = values.get(name, 0.0 if kind[-1] == "d" else 0)
            if name.startswith("output_int_register_"):
                value = self.int_out[int(name[20:])]
            elif name.startswith("output_double_register_"):
                value = self.float_out[int(name[23:])]
            body += struct.pack(">" + kind, *(np.broadcast_to(value, count) if count > 1 else (value,)))
        package = struct.pack(">Hc", 3 + len(body), b"U") + body
        if self.mangle is not None:
            package = self.mangle(package)
        try:
            if client.own.send(package, socket.MSG_DONTWAIT) != len(package):
                self._drop(client)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)

    # Dashboard.

    def _dashboard(self, line: str) -> str:
        self.asked.append(line)
        now = time.monotonic()
        if line == "is in remote control":
            return str(self.remote).lower()
        if line == "get serial number":
            return self.serial
        if line == "PolyscopeVersion":
            return "URSoftware " + ".".join(map(str, self.version)) + " (Nov 12 2021)"
        if line == "stop":
            self._end_program()
            return "Stopped"
        if line == "close safety popup":
            return "closing safety popup"
        if line == "unlock protective stop":
            if now - self.stopped_at < 5.0:
                return ("Cannot unlock protective stop until 5s after occurrence. Always inspect cause of protective "
                        "stop before unlocking")  # fmt: skip
            self.safety = 1
            return "Protective stop releasing"
        if not self.remote:
            return "Command is not allowed due to safety reasons"
        if line == "power on":
            self._later = [(now + 0.05, _POWER_ON), (now + 0.1, _IDLE)]
            return "Powering on"
        if line == "brake release":
            self._later.append((now + 0.15, _RUNNING))
            return "Brake releasing"
        if line == "power off":
            self._end_program()
            self.speed_at_power_off = float(np.abs(self.qd).max())
            self.mode, self._later = _POWER_OFF, []
            return "Powering off"
        return f"could not understand: '{line}'"

    # Programs and motion.

    def _load(self, text: str) -> None:
        self._end_program()
        if not self.remote or self.mode != _RUNNING or not self.safety & 3:
            return
        name = re.match(r"def (\w+)\(\):", text)[1]
        space = {
            "__builtins__": {},
            "read_input_integer_register": lambda i: self.int_in[i],
            "read_input_float_register": lambda i: self.float_in[i],
            "write_output_integer_register": lambda i, value: self.int_out.__setitem__(i, value),
            "write_output_float_register": lambda i, value: self.float_out.__setitem__(i, value),
            "get_target_joint_positions": lambda: self.q.tolist(),
            "get_actual_joint_positions": lambda: self.q.tolist(),
            "rtde_set_watchdog": self._watch, "servoj": self._servoj, "stopj": self._stopj, "sync": lambda: 1,
        }  # fmt: skip
        try:
            exec(_python(text), space)  # noqa: S102
            self._program = space[name]()
        except (SyntaxError, KeyError, TypeError) as error:
            self.error = repr(error)
            return
        self.runtime = _PLAYING

    def _watch(self, variable: str, frequency: float, action: str) -> None:
        assert action == "stop" and variable in _INPUTS
        self._watchdogs[variable] = [1.0 / frequency, 0.0]

    def _servoj(self, q, t=0.002, lookahead_time=0.1, gain=300.0) -> int:
        assert 0.03 <= lookahead_time <= 0.2 and 100 <= gain <= 2000 and len(q) == 6
        self._goal = (np.array(q, float), lookahead_time)
        self.targets += bool(np.abs(self._goal[0] - self.q).max() > 1e-4)
        return max(1, round(t * self.hz))

    def _stopj(self, a: float) -> int:
        self._goal, self._brake = None, a
        return -1

    def _end_program(self) -> None:
        """A program that is stopped from outside: the controller brakes the arm."""
        self._program, self._goal, self._busy, self.runtime = None, None, 0, _STOPPED
        self._watchdogs.clear()

    def _cycle(self, step: float) -> None:
        self._tick += 1
        while self._later and self._later[0][0] <= time.monotonic():
            self.mode = self._later.pop(0)[1]
        for wait in self._watchdogs.values():
            wait[1] += step * (self.runtime == _PLAYING)
            if wait[1] > wait[0]:
                self._end_program()
                break
        if self.runtime == _PLAYING and self._program is not None:
            self._think()
        self._move(step)
        if self.cut:
            return
        for client in list(self._clients):
            if client.port == 30004 and client.started and self._tick % client.divider == 0:
                self._send(client)
            elif client.port in (30002, 30003) and self._tick % (self.hz // 10) == 0:
                with contextlib.suppress(OSError):  # A robot state message without sub-packages, at 10 Hz.
                    client.own.send(struct.pack(">IB", 5, 16), socket.MSG_DONTWAIT)

    def _think(self) -> None:
        if self._busy > 0:
            self._busy -= 1
        if self._busy == 0 or (self._busy < 0 and not self.qd.any()):
            try:
                self._busy = next(self._program)
            except StopIteration:
                self._end_program()
            except Exception as error:  # What a controller shows as a runtime error of the program.
                self.error = repr(error)
                self._end_program()

    def _move(self, step: float) -> None:
        if self.mode != _RUNNING:
            self.qd[:] = 0.0
            return
        if self._goal is not None and self.runtime == _PLAYING:
            goal, lookahead = self._goal
            self.qd = np.clip((goal - self.q) / (lookahead / 2), -self.speed, self.speed)
            self.qd[np.abs(goal - self.q) < 1e-12] = 0.0
        else:
            slower = (self._brake or 10.0) * step
            self.qd = self.qd - np.clip(self.qd, -slower, slower)
        self.q = self.q + self.qd * step


class UrRig(Rig):
    driver = "ur"
    boundary = ("RTDE (port 30004), dashboard server (29999) and script port (30002) on loopback, from UR's published "
                "protocols; the driver's own URScript program runs in an interpreter")  # fmt: skip
    joints = 6
    resolution = 1e-6

    def __init__(self, **settings) -> None:
        self.robot = UrController(**settings)
        self.series = "e" if self.robot.version[0] > 3 else "cb3"
        self._targets = 0

    def config(self):
        # More than the defaults: the test machine is no real-time host.
        return {
            "name": "left", "joints": [f"joint_{i}" for i in range(6)], "host": self.robot.host, "series": self.series,
            "timeout": 0.8, "watchdog": 0.8, "answer": 5.0,
        }  # fmt: skip

    def time(self):
        """The time of the emulated controller: on a busy machine it is slower than the wall's."""
        return self.robot._tick / self.robot.hz

    def wait(self, duration):
        end = self.time() + duration
        while self.time() < end:
            time.sleep(0.001)

    def position(self):
        with self.robot.lock:
            return self.robot.q.copy()

    def place(self, position):
        with self.robot.lock:
            self.robot.q = np.array(position, float)

    def moved_by_commands(self):
        return self.robot.targets > 0

    def cut(self):
        with self.robot.lock:
            self.robot.cut = True

    def mend(self):
        """The controller has given up what could not be delivered, and with it the old connections."""
        with self.robot.lock:
            for client in list(self.robot._clients):
                self.robot._drop(client)
            self.robot.cut = False

    def powered(self):
        return self.robot.mode == _RUNNING

    def close(self):
        self.robot.close()


@contextlib.contextmanager
def ur_rig(**settings) -> Iterator[UrRig]:
    rig = UrRig(**settings)
    try:
        yield rig
    finally:
        rig.close()
