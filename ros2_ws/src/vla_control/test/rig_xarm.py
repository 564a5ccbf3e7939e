"""A control box of an xArm 7 on loopback: its control port (502), the port for its gripper (503) and its 100 Hz report
(30003), of which the frames, registers and reports are those that the vendor's library speaks."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import threading
import time

import numpy as np
import pytest
from driver_rig import RealTimeRig

#: Each rig has an address of its own, since the report's port is fixed.
_ADDRESSES = itertools.count(1)
#: Registers of the control port.
VERSION, MOTION, SET_STATE, GET_STATE, COUNT, ERROR, CLEAN_ERROR, CLEAN_WARN, MODE = 1, 11, 12, 13, 14, 15, 16, 17, 19
SERVO, POSE, JOINTS, GRIPPER, READ_TOOL, SENSOR = 29, 41, 42, 124, 128, 201
#: Bits of the status byte of an answer.
FAULTY, BLOCKED, INVALID = 0x40, 0x10, 0x08


class ControlBox:
    """The box and its arm. Joints go to their goal at a limited speed; without power they stay (brakes)."""

    def __init__(self, address: str, port: int, axes: int = 7, sensor: bool = False):
        self.address, self.port, self.axes, self.sensor = address, port, axes, sensor
        self.lock = threading.RLock()
        self.joints = np.array([0.1, -0.3, 0.0, 0.8, 0.2, 1.0, -0.4])
        self.joints[axes:] = 0.0
        self.goal, self.speed, self.time = self.joints.copy(), 3.14, time.monotonic()
        self.torque = np.array([0.5, 12.0, -1.0, 6.0, 0.2, 1.5, 0.1])
        self.power, self.mode, self.state, self.error, self.pressed = False, 0, 4, 0, False
        self.finger, self.finger_goal, self.finger_error, self.finger_on = 850.0, 850.0, 0, False
        self.version = f"{axes},{axes},XI130000B00B00,AC130000C00C00,v2.5.0\0"
        self.elsewhere = False  # whether a command has asked for another place than where the arm was
        self.cycle = 0.02  # s; the longest step that is no jump is what the fastest joint does in it
        # Faults: s by which the answer to a target is late, and whether answers break off or carry a wrong number.
        self.late: list[float] = []
        self.half = self.wrong = self.mute = False
        self.running, self.open = True, True
        self.listeners: list[socket.socket] = []
        self.sockets: set[socket.socket] = set()
        self.listen()

    def listen(self) -> None:
        for port, serve in ((self.port, self._control), (self.port + 1, self._control), (30003, self._report)):
            listener = socket.socket()
            listener.settimeout(None)  # the library sets a default for all sockets of the process
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.address, port))
            listener.listen()
            self.listeners.append(listener)
            threading.Thread(target=self._accept, args=(listener, serve), daemon=True).start()

    def _accept(self, listener: socket.socket, serve) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.settimeout(0.2)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sockets.add(connection)
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    def cut(self) -> None:
        """As a pulled cable is: nothing arrives, nobody is told."""
        self.open = False
        self._deaf()

    def _deaf(self) -> None:
        for listener in self.listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.listeners = []

    def mend(self) -> None:
        self._hang_up()
        self.open = True
        self.listen()

    def _hang_up(self) -> None:
        for connection in list(self.sockets):
            connection.close()
        self.sockets.clear()

    def reboot(self) -> None:
        """Power is lost and comes back: nothing is enabled, connections are closed."""
        with self.lock:
            self.move()
            self.power, self.mode, self.state, self.error = False, 0, 4, 0
        self._deaf()
        self._hang_up()
        self.listen()

    def close(self) -> None:
        self.running = False
        self._deaf()
        self._hang_up()

    def move(self) -> None:
        """Go on to now."""
        with self.lock:
            now = time.monotonic()
            most = self.speed * (now - self.time)
            if self.power and self.state in (1, 2):
                self.joints = self.joints + np.clip(self.goal - self.joints, -most, most)
            else:
                self.goal = self.joints.copy()
            if self.finger_on:
                reach = 1700.0 * (now - self.time)
                self.finger += float(np.clip(self.finger_goal - self.finger, -reach, reach))
            self.time = now

    def fail(self, error: int) -> None:
        """Stop for an error, as the box does."""
        with self.lock:
            self.move()
            self.error, self.state, self.goal = error, 4, self.joints.copy()
            if error <= 17:
                self.power = False

    def press(self, down: bool = True) -> None:
        """The emergency stop button of the box."""
        self.pressed = down
        if down:
            self.fail(1)

    def _receive(self, connection: socket.socket, count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            try:
                more = connection.recv(count - len(data))
            except TimeoutError:
                if not self.running:
                    return None
                continue
            except OSError:
                return None
            if not more:
                return None
            data += more
        return data

    def _control(self, connection: socket.socket) -> None:
        while self.running:
            head = self._receive(connection, 6)
            if head is None:
                return
            number, protocol, length = struct.unpack(">HHH", head)
            body = self._receive(connection, length)
            if body is None:
                return
            if not self.open or self.mute:
                continue
            register, data = body[0], body[1:]
            if register == SERVO and self.late:
                time.sleep(self.late.pop(0))
            with self.lock:
                self.move()
                status, answer = self._do(register, data)
                if self.error:
                    status |= FAULTY
                if self.state >= 4:
                    status |= BLOCKED
            frame = struct.pack(">HHHBB", number + self.wrong, protocol, len(answer) + 2, register, status) + answer
            try:
                connection.sendall(frame[: len(frame) // 2] if self.half else frame)
            except OSError:
                return

    def _do(self, register: int, data: bytes) -> tuple[int, bytes]:
        if register == VERSION:
            return 0, self.version.encode().ljust(80, b"\0")
        if register == MOTION:
            self.power = bool(data[1]) and not self.pressed
            self.state = 4 if not self.power else self.state
        elif register == SET_STATE:
            if data[0] == 0 and self.power and not self.error:
                self.state = 2
            elif data[0] in (3, 4, 6):
                self.state = 3 if data[0] == 3 else 4
            self.goal = self.joints.copy()
        elif register == GET_STATE:
            return 0, bytes([self.state])
        elif register == COUNT:
            return 0, bytes(2)
        elif register == ERROR:
            return 0, bytes([self.error, 0])
        elif register == CLEAN_ERROR:
            self.error = 1 if self.pressed else 0
        elif register == CLEAN_WARN or register == SENSOR:
            pass
        elif register == MODE:
            self.mode, self.state, self.goal = data[0], 5, self.joints.copy()
        elif register == SERVO:
            self._servo(np.array(struct.unpack("<7f", data[:28])))
        elif register == POSE:
            return 0, struct.pack("<6f", 300.0, 0.0, 200.0, 3.14, 0.0, 0.0)
        elif register == JOINTS:
            return 0, struct.pack("<7f", *self.joints)
        elif register == READ_TOOL:  # its serial line's rate, as an index: 2 Mbit/s
            return 0, struct.pack(">i", 11)
        elif register == GRIPPER:
            return 0, self._finger(data[0], data[1:])
        else:
            return INVALID, b""
        return 0, b""

    def _servo(self, goal: np.ndarray) -> None:
        if self.mode != 1 or self.state not in (1, 2) or not self.power or self.error:
            return
        if np.abs(goal - self.goal).max() > self.speed * self.cycle:
            self.fail(24)
            return
        self.elsewhere = self.elsewhere or not np.allclose(goal, self.joints, atol=1e-4)
        self.goal = goal

    def _finger(self, host: int, data: bytes) -> bytes:
        """Modbus RTU to the gripper (station 8), without its checksum."""
        station, function, register, count = struct.unpack(">BBHH", data[:6])
        if function == 3:
            value = {0x0702: struct.pack(">i", round(self.finger)), 0x000F: struct.pack(">H", self.finger_error)}
            content = value.get(register, bytes(2 * count))
            return bytes([host, station, 3, len(content)]) + content
        values = data[7:]
        if register == 0x0100:
            self.finger_on = bool(values[1])
        elif register == 0x0109:
            self.finger_error = 0
        elif register == 0x0700:
            self.finger_goal = float(struct.unpack(">i", values)[0])
        return bytes([host]) + data[:6]

    def _report(self, connection: socket.socket) -> None:
        while self.running:
            time.sleep(0.01)
            if not self.open:
                continue
            with self.lock:
                self.move()
                size = 135 if self.sensor else 87
                data = struct.pack(">IBH", size, self.state | self.mode << 4, 0)
                data += struct.pack("<7f6f7f", *self.joints, 300.0, 0.0, 200.0, 3.14, 0.0, 0.0, *self.torque)
                if self.sensor:
                    data += struct.pack("<12f", 1.0, 2.0, 3.0, 0.1, 0.2, 0.3, *[0.0] * 6)
            try:
                connection.sendall(data)
            except OSError:
                return


class XarmRig(RealTimeRig):
    driver = "xarm"
    boundary = "the vendor's library against an emulated control box on loopback (its protocol, ports 502, 503, 30003)"
    joints, gripper, resolution = 7, True, 2e-6

    def __init__(self, axes: int = 7, sensor: bool = False, **config):
        XCONF = pytest.importorskip("xarm.core.config.x_config").XCONF  # noqa: N806

        # Only root may listen on port 502; the library takes the port from its settings.
        self._ports, self._port = XCONF.SocketConf, XCONF.SocketConf.TCP_CONTROL_PORT
        self._ports.TCP_CONTROL_PORT = 50502
        self.joints, self.extra = axes, config
        number = next(_ADDRESSES)
        process = os.getpid()
        address = f"127.{64 + process // 250 % 128}.{process % 250 + 1}.{number % 250 + 1}"
        self.box = ControlBox(address, 50502, axes, sensor)

    def config(self):
        return {
            "name": "right", "joints": [f"joint{i + 1}" for i in range(self.joints)], "gripper": self.gripper,
            # Far above what the hardware needs, since the machine that runs the tests may be busy.
            "address": self.box.address, "timeout": 1.5, "stale": 3.0, "patience": 20.0, **self.extra,
        }  # fmt: skip

    def position(self):
        self.box.move()
        return self.box.joints[: self.joints].copy()

    def place(self, position):
        with self.box.lock:
            self.box.move()
            self.box.joints[: self.joints] = position
            self.box.goal = self.box.joints.copy()

    def moved_by_commands(self):
        return self.box.elsewhere

    def powered(self):
        return self.box.power

    def cut(self):
        self.box.cut()

    def mend(self):
        self.box.mend()

    def close(self):
        self.box.close()
        self._ports.TCP_CONTROL_PORT = self._port
