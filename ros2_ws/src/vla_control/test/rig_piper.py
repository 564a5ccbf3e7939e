"""An emulated AgileX Piper on python-can's virtual bus.

Written from the protocol's description (the docstrings of piper_sdk's msg_v2 and the maker's answers in its issues 66
and 103), not from our driver. Where the description leaves room it does the worst: after power-up its stored targets
are all zero, it takes targets in every mode, and follows the stored ones as soon as it is enabled under CAN control.
There is no gravity: a limp or damped joint stays.

It makes the clock that the driver is given, and lets it go on only when the driver has taken its frames, so that a busy
machine is not taken for a slow arm.
"""

from __future__ import annotations

import itertools
import math
import struct
import threading
import time

import numpy as np
import pytest
from driver_rig import Rig

#: s between two reports, twice the arm's own, to spare the machine.
PERIOD = 0.01
NUMBERS = itertools.count()


class Piper:
    """The arm. Angles in 0.001 degree, the stroke in 0.001 mm, as on the wire.

    To be changed by tests: control, status, state (bits of each drive), state_gripper, errors (bytes 6 and 7 of the
    status), mute (ids that are not sent), short (ids sent with 3 bytes), silent (cable pulled), enables (whether a
    drive can be enabled), strict (takes targets only under CAN control, and that only when enabled), version, offset
    (of the feedback's ids), waited (s that frames have waited before they are read).
    """

    def __init__(self, channel: str) -> None:
        self.can = pytest.importorskip("can")
        # Kept stamps are 0: none, since they would be of the wall clock.
        self.bus = self.can.Bus(interface="virtual", channel=channel, preserve_timestamps=True)
        self.now = 0.0
        self.position = np.rad2deg([0.1, 0.9, -0.7, 0.2, 0.5, -0.3]) * 1000.0
        self.speed = np.zeros(6)
        self.stroke, self.top, self.force = 30000.0, 3.0, 0
        self.version, self.text = b"S-V1.8-2", b"H-V1.2-1 "
        self.mute, self.short, self.silent, self.offset = set(), set(), False, 0
        self.strict, self.waited = False, 0.0
        self.enables, self.commanded, self.seen = [True] * 6, False, []
        self.lock, self.ending = threading.Lock(), threading.Event()
        self.power_up()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def power_up(self) -> None:
        """Power off and on: the targets are gone, the drives are off."""
        self.goal, self.goal_stroke = np.zeros(6), 0.0
        self.control = self.status = self.move = self.percent = 0
        self.state, self.asked = [0] * 6, [0] * 6
        self.state_gripper = 1 << 7
        self.every = 4  # the drives' states come with one report of so many
        self.errors = (0, 0)

    def powered(self) -> bool:
        return all(state >> 6 & 1 for state in self.state) and self.status != 1

    def run(self) -> None:
        for k in itertools.count():
            if self.ending.is_set():
                return
            with self.lock:
                while (message := self.bus.recv(0.0)) is not None:
                    if not self.silent:
                        self.take(message.arbitration_id, bytes(message.data))
                self.step(PERIOD)
                if not self.silent:
                    self.report(slow=k % self.every == 0)
            self.let_read()
            self.now += PERIOD
            time.sleep(PERIOD)

    def let_read(self) -> None:
        """Wait until the others on the bus have taken their frames, at most 1 s."""
        end = time.monotonic() + 1.0
        while time.monotonic() < end and any(not q.empty() for q in self.bus.channel if q is not self.bus.queue):
            time.sleep(0.0005)

    def step(self, duration: float) -> None:
        most = math.degrees(self.top) * 1000.0 * self.percent / 100.0 * duration
        before = self.position.copy()
        if self.control == 1 and self.move == 1 and self.status == 0:
            for k in range(6):
                if self.state[k] & 0x7F == 1 << 6:
                    self.position[k] += np.clip(self.goal[k] - self.position[k], -most, most)
        if self.state_gripper >> 6 & 1:
            self.stroke += np.clip(self.goal_stroke - self.stroke, -2e5 * duration, 2e5 * duration)
        self.speed = np.deg2rad((self.position - before) / 1000.0) / max(duration, 1e-6)

    def take(self, identifier: int, data: bytes) -> None:
        assert len(data) == 8
        self.seen.append((identifier, data))
        if identifier == 0x150 and data[0] == 1:
            self.status = 1
        elif identifier == 0x150 and data[0] == 2:
            # Lets go of everything; two enabling commands are needed afterwards.
            self.state, self.asked, self.status, self.control = [0] * 6, [0] * 6, 0, 0
        elif identifier == 0x151:
            if self.control != 2 and self.status != 1 and (self.powered() or not self.strict):
                self.control, self.move, self.percent = data[0], data[1], data[2]
        elif 0x155 <= identifier <= 0x157 and (self.control == 1 or not self.strict):
            k = 2 * (identifier - 0x155)
            goal = struct.unpack(">ii", data)
            self.commanded |= bool(np.any(np.abs(goal - self.position[k : k + 2]) > 2.0))
            self.goal[k : k + 2] = goal
        elif identifier == 0x159:
            self.goal_stroke, self.force, code = struct.unpack(">iHB", data[:7])
            if code in (2, 3):
                self.state_gripper &= 1 << 7 | 1 << 6
            self.state_gripper = self.state_gripper & ~(1 << 6) | (1 << 6 if code in (1, 3) else 0)
        elif identifier == 0x471:
            for k in range(6) if data[0] == 0xFF else [data[0] - 1]:
                self.asked[k] += 1
                if data[1] == 1:
                    self.state[k] &= ~(1 << 6)
                elif self.enables[k] and self.asked[k] > 1:
                    self.state[k] |= 1 << 6
        elif identifier == 0x475:
            assert data[1] != 0xAE, "sets the zero of a joint"
            if data[5] == 0xAE:
                # What is still too hot stays so.
                self.state[data[0] - 1] &= 1 << 6 | 1 << 1 | 1 << 3
        elif identifier == 0x4AF:
            text = self.text + self.version
            for k in range(0, len(text), 8):
                self.send(0x4AF, text[k : k + 8])

    def report(self, slow: bool) -> None:
        arrived = not np.any(np.abs(self.goal - self.position) > 100.0)
        self.send(0x2A1, bytes([self.control, self.status, self.move, 0, 0 if arrived else 1, 0, *self.errors]))
        angles = np.rint(self.position).astype(int)
        for k in range(3):
            self.send(0x2A5 + k + self.offset, struct.pack(">ii", *map(int, angles[2 * k : 2 * k + 2])))
        self.send(0x2A8, struct.pack(">ihBB", round(self.stroke), 0, self.state_gripper, 0))
        for k in range(6):
            speed = int(np.clip(round(self.speed[k] * 1000.0), -32768, 32767))
            self.send(0x251 + k, struct.pack(">hhi", speed, 100 * (k - 2), round(math.radians(angles[k]))))
        if slow:
            for k in range(6):
                self.send(0x261 + k, struct.pack(">HhbBH", 240, 31, 35, self.state[k], 400))

    def send(self, identifier: int, data: bytes) -> None:
        if identifier not in self.mute:
            data = data[:3] if identifier in self.short else data
            stamp = time.time() - self.waited if self.waited else 0.0
            self.bus.send(self.can.Message(stamp, identifier, is_extended_id=False, data=data))

    def close(self) -> None:
        self.ending.set()
        self.thread.join()
        self.bus.shutdown()


class PiperRig(Rig):
    driver, boundary = "piper", "CAN frames, on python-can's virtual bus"
    joints, gripper = 6, True
    resolution = math.radians(0.001)

    def __init__(self) -> None:
        self.channel = f"piper{next(NUMBERS)}"
        self.arm = Piper(self.channel)

    def config(self):
        return {"name": "left", "joints": [f"joint{k + 1}" for k in range(6)], "gripper": True,
                "interface": "virtual", "channel": self.channel, "timeout": 0.1, "start_timeout": 0.8}  # fmt: skip

    def time(self):
        return self.arm.now

    def wait(self, duration):
        end = self.arm.now + duration
        while self.arm.now < end:
            time.sleep(0.001)

    def position(self):
        with self.arm.lock:
            return np.deg2rad(self.arm.position / 1000.0)

    def place(self, position):
        # Its drives hold it too hard for a hand, so its power goes off first.
        with self.arm.lock:
            self.arm.power_up()
            self.arm.position = np.rad2deg(position) * 1000.0

    def moved_by_commands(self):
        return self.arm.commanded

    def cut(self):
        self.arm.silent = True

    def mend(self):
        self.arm.silent = False

    def powered(self):
        return self.arm.powered()

    def close(self):
        self.arm.close()
