"""A bus of serial servos on a pseudo-terminal: joints that move, and two protocols, written from their descriptions.

Registers, errors and torque are the servos'; `faults` spoils replies, `power` and `plugged` take the power and the
cable away.
"""

from __future__ import annotations

import contextlib
import os
import select
import tempfile
import termios
import threading
import time
import tty
from abc import ABC, abstractmethod
from pathlib import Path

PING, READ, WRITE, REBOOT, SYNC_READ, SYNC_WRITE, BROADCAST = 1, 2, 3, 8, 0x82, 0x83, 0xFE


class Servo(ABC):
    """One servo: its registers, and a joint at `place`, ticks, that goes to its goal at a limited speed.

    stuck: something holds the joint. defaults: value and size of every register after power-up.
    """

    fastest = 3000.0  # ticks/s
    eeprom: int  # registers below keep their values without power
    torque_at: int

    def __init__(self, number: int, place: float, defaults: dict[int, tuple[int, int]]):
        self.number, self.place, self.speed = number, float(place), 0.0
        self.stuck = False
        self._defaults = defaults
        self.registers = bytearray(256)
        self.load(0)

    def load(self, begin: int) -> None:
        for address, (value, size) in self._defaults.items():
            if address >= begin:
                self.set(address, size, value)

    def set(self, address: int, size: int, value: int) -> None:
        self.registers[address : address + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def get(self, address: int, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.registers[address : address + size], "little", signed=signed)

    @property
    def torque(self) -> bool:
        return bool(self.registers[self.torque_at])

    def restart(self) -> None:
        self.load(self.eeprom)

    def move(self, duration: float) -> None:
        """Let `duration` s pass."""
        most = min(self.fastest, self.most()) * duration
        step = 0.0
        if self.torque and not self.stuck and not self.halted():
            step = max(-most, min(most, self.goal() - self.place))
        self.place += step
        self.speed = step / duration if duration > 0.0 else self.speed

    @abstractmethod
    def goal(self) -> int: ...

    @abstractmethod
    def most(self) -> float:
        """ticks/s that its settings allow."""

    def halted(self) -> bool:
        return False

    @abstractmethod
    def measure(self) -> None:
        """Put what is measured into the registers."""

    @abstractmethod
    def write(self, address: int, data: bytes) -> int:
        """Returns the error of the protocol."""

    @abstractmethod
    def error(self) -> int:
        """Bits that every reply carries."""


class Bus(ABC):
    """The emulated adapter and what hangs on it. `path`: the serial port, the same again after the cable is back.

    faults: what happens to the next replies, of "lost", "late", "spoilt", "half", "". jumps: goals that asked a joint
    for another place than where it was. late: s until a late reply comes, longer than the rigs' drivers wait.
    """

    late = 0.45

    def __init__(self, servos: list[Servo]):
        self.servos = {servo.number: servo for servo in servos}
        self.power, self.faults, self.jumps, self.log = True, [], 0, []
        self.lock = threading.RLock()
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name) / "ttyServos"
        self._time, self._master, self._slave = time.monotonic(), -1, -1
        self._late: list[tuple[float, bytes]] = []
        self._ends = False
        self.plug()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def plug(self) -> None:
        with self.lock:
            self._master, self._slave = os.openpty()
            tty.setraw(self._slave)
            self.path.symlink_to(os.ttyname(self._slave))

    def pull(self) -> None:
        with self.lock:
            self.path.unlink(missing_ok=True)
            for handle in (self._slave, self._master):
                os.close(handle)
            self._master = self._slave = -1

    def close(self) -> None:
        self._ends = True
        self._thread.join()
        with self.lock:
            if self._master >= 0:
                self.pull()
        self._folder.cleanup()

    def cycle_power(self) -> None:
        """Power off and on: torque and all other registers that are not kept are forgotten."""
        with self.lock:
            for servo in self.servos.values():
                servo.restart()

    def advance(self) -> None:
        """Go on to now."""
        with self.lock:
            now = time.monotonic()
            duration, self._time = now - self._time, now
            for servo in self.servos.values():
                servo.move(duration if self.power else 0.0)
                servo.measure()

    def _run(self) -> None:
        waiting = b""
        while not self._ends:
            # Without the lock, for others look at the servos meanwhile; the cable may be pulled while this waits.
            with contextlib.suppress(OSError):
                select.select([self._master] if self._master >= 0 else [], [], [], 0.002)
            with self.lock:
                self.advance()
                if self._master < 0:
                    waiting = b""
                    continue
                # The port is open for as long as the slave is: what nobody reads is thrown away by its next opener.
                with contextlib.suppress(OSError):
                    if select.select([self._master], [], [], 0.0)[0]:
                        waiting += os.read(self._master, 4096)
                    if not self.power:
                        waiting = b""
                    while packet := self.next_packet(waiting):
                        (used, number, instruction, parameters) = packet
                        waiting = waiting[used:]
                        if instruction is not None:
                            self.heard()
                            self.log.append((number, instruction, parameters))
                            self._obey(number, instruction, parameters)
                    now = time.monotonic()
                    for due in [item for item in self._late if item[0] <= now]:
                        self._late.remove(due)
                        os.write(self._master, due[1])

    @abstractmethod
    def heard(self) -> None:
        """An instruction came, to whomever."""

    @abstractmethod
    def next_packet(self, waiting: bytes) -> tuple[int, int, int | None, bytes] | None:
        """Bytes used, id, instruction (None: a spoilt packet) and parameters; None: not all there yet."""

    @abstractmethod
    def reply(self, servo: Servo, error: int, data: bytes = b"") -> bytes: ...

    #: Bytes of an address and of a length among parameters.
    word: int

    def _obey(self, number: int, instruction: int, parameters: bytes) -> None:
        word = self.word
        address = int.from_bytes(parameters[:word], "little")
        if instruction == SYNC_READ:
            size = int.from_bytes(parameters[word : 2 * word], "little")
            for listed in parameters[2 * word :]:
                if listed in self.servos:
                    self._answer(self.servos[listed], 0, bytes(self.servos[listed].registers[address : address + size]))
            return
        if instruction == SYNC_WRITE:
            size = int.from_bytes(parameters[word : 2 * word], "little")
            rest = parameters[2 * word :]
            for i in range(0, len(rest), size + 1):
                for servo in self.listeners(rest[i]):
                    self._write(servo, address, rest[i + 1 : i + 1 + size])
            return
        for servo in self.listeners(number):
            if instruction == READ:
                size = int.from_bytes(parameters[word : 2 * word], "little")
                error, data = 0, bytes(servo.registers[address : address + size])
            elif instruction == WRITE:
                error, data = self._write(servo, address, parameters[word:]), b""
            elif instruction == REBOOT:
                servo.restart()
                error, data = 0, b""
            else:
                error, data = 0, self.pong(servo)
            if servo.number == number:
                self._answer(servo, error, data)

    def _write(self, servo: Servo, address: int, data: bytes) -> int:
        before = servo.goal()
        error = servo.write(address, data)
        if servo.goal() != before and abs(servo.goal() - servo.place) > 2.0:
            self.jumps += 1
        return error

    def listeners(self, number: int) -> list[Servo]:
        return [servo for servo in self.servos.values() if number in (servo.number, BROADCAST)]

    def pong(self, servo: Servo) -> bytes:
        return b""

    def _answer(self, servo: Servo, error: int, data: bytes) -> None:
        packet = self.reply(servo, error | servo.error(), data)
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "lost":
            return
        if fault == "late":
            self._late.append((time.monotonic() + self.late, packet))
            return
        if fault == "spoilt":
            packet = packet[:-3] + bytes([packet[-3] ^ 0x10]) + packet[-2:]
        if fault == "half":
            packet = packet[: len(packet) // 2]
        with contextlib.suppress(OSError, termios.error):
            os.write(self._master, packet)


# Dynamixel, protocol 2.0 (emanual.robotis.com/docs/en/dxl/protocol2/).


def crc(data: bytes) -> int:
    """CRC-16 of the polynomial 0x8005, from 0."""
    value = 0
    for byte in data:
        value ^= byte << 8
        for _ in range(8):
            value = (value << 1 ^ 0x8005 if value & 0x8000 else value << 1) & 0xFFFF
    return value


class Dynamixel(Servo):
    """X series (emanual.robotis.com/docs/en/dxl/x/xm540-w270/). shadow_of: its Secondary ID."""

    eeprom, torque_at = 64, 64
    SIZES = {98: 1, 102: 2, 108: 4, 112: 4, 116: 4}

    def __init__(self, number: int, place: float, model: int = 1120, shadow_of: int = 255, velocity_limit: int = 131):
        super().__init__(
            number,
            place,
            {
                0: (model, 2), 6: (45, 1), 7: (number, 1), 8: (3, 1), 10: (0, 1), 11: (3, 1), 12: (shadow_of, 1),
                38: (1193, 2), 44: (velocity_limit, 4), 48: (4095, 4), 52: (0, 4), 64: (0, 1), 68: (2, 1), 70: (0, 1),
                98: (0, 1), 102: (1193, 2), 108: (0, 4), 112: (0, 4), 116: (0, 4),
            },
        )  # fmt: skip
        self.silence = 0.0

    def restart(self) -> None:
        super().restart()
        self.silence = 0.0

    def goal(self) -> int:
        return self.get(116, 4, signed=True)

    def most(self) -> float:
        # 0.229 rev/min a unit.
        profile = self.get(112, 4)
        return profile * 0.229 * 4096 / 60 if profile else self.fastest

    def halted(self) -> bool:
        return self.registers[98] == 0xFF

    def move(self, duration: float) -> None:
        self.silence += duration
        limit = self.registers[98]
        if self.torque and 1 <= limit <= 127 and self.silence > 0.02 * limit:
            self.registers[98] = 0xFF
        super().move(duration)

    def measure(self) -> None:
        self.set(126, 2, 37 if self.torque else 0)
        self.set(128, 4, round(self.speed * 60 / 4096 / 0.229))
        self.set(132, 4, round(self.place))

    def overload(self) -> None:
        """Shutdown (63): the error is kept and the torque taken off until a reboot."""
        self.registers[70] |= 0x20
        self.registers[64] = 0

    def write(self, address: int, data: bytes) -> int:
        value = int.from_bytes(data, "little", signed=True)
        if address < 64 and self.torque:
            return 7  # access
        if address in (100, 102, 104, 116) and self.halted():
            return 4  # data range
        if address == 116 and self.registers[11] == 3 and not self.get(52, 4) <= value <= self.get(48, 4):
            return 6  # data limit
        if address == 112 and value > self.get(44, 4):
            return 6
        if address == 64 and self.registers[70]:
            return 1  # result fail
        self.registers[address : address + len(data)] = data
        return 0

    def error(self) -> int:
        return 0x80 if self.registers[70] else 0


class DynamixelBus(Bus):
    word = 2

    def heard(self) -> None:
        for servo in self.servos.values():
            servo.silence = 0.0

    def listeners(self, number):
        return [servo for servo in self.servos.values() if number in (servo.number, servo.registers[12], BROADCAST)]

    def pong(self, servo):
        return bytes([*servo.registers[0:2], servo.registers[6]])

    def next_packet(self, waiting):
        begin = waiting.find(b"\xff\xff\xfd\x00")
        if begin < 0 or len(waiting) < begin + 7:
            return None
        end = begin + 7 + int.from_bytes(waiting[begin + 5 : begin + 7], "little")
        if len(waiting) < end:
            return None
        packet = waiting[begin:end]
        well = crc(packet[:-2]) == int.from_bytes(packet[-2:], "little")
        body = packet[7:-2].replace(b"\xff\xff\xfd\xfd", b"\xff\xff\xfd")
        return end, packet[4], body[0] if well else None, body[1:]

    def reply(self, servo, error, data=b""):
        body = (bytes([0x55, error]) + data).replace(b"\xff\xff\xfd", b"\xff\xff\xfd\xfd")
        packet = b"\xff\xff\xfd\x00" + bytes([servo.number]) + (len(body) + 2).to_bytes(2, "little") + body
        return packet + crc(packet).to_bytes(2, "little")


# Feetech, SCS protocol and the memory table of the STS series.


def encoded(value: int, bit: int = 15) -> int:
    return 1 << bit | -value if value < 0 else value


class Feetech(Servo):
    """STS3215. Its overload goes away with the load."""

    eeprom, torque_at = 40, 40

    def __init__(self, number: int, place: float, model: int = 777, phase: int = 12):
        super().__init__(
            number,
            place,
            {
                0: (3, 1), 1: (10, 1), 3: (model, 2), 5: (number, 1), 7: (0, 1), 8: (1, 1), 9: (0, 2), 11: (4095, 2),
                16: (1000, 2), 18: (phase, 1), 33: (0, 1), 40: (0, 1), 41: (0, 1), 42: (0, 2), 46: (0, 2),
                48: (1000, 2), 55: (1, 1), 65: (0, 1),
            },
        )  # fmt: skip

    def goal(self) -> int:
        return self.get(42, 2)

    def most(self) -> float:
        unit = 1 if self.registers[18] & 0x04 else 50
        return self.get(46, 2) * unit or self.fastest

    def measure(self) -> None:
        unit = 1 if self.registers[18] & 0x04 else 50
        self.set(56, 2, encoded(round(self.place)))
        self.set(58, 2, encoded(round(self.speed / unit)))
        self.set(69, 2, encoded(-12 if self.torque else 0))

    def overload(self) -> None:
        self.registers[65] |= 0x20

    def write(self, address: int, data: bytes) -> int:
        self.registers[address : address + len(data)] = data
        if address == 42 and abs(self.goal() - self.place) < 2.0:
            self.registers[65] &= ~0x20 & 0xFF
        return 0

    def error(self) -> int:
        return self.registers[65]


class FeetechBus(Bus):
    word = 1

    def heard(self):
        pass  # These servos have no watchdog.

    def next_packet(self, waiting):
        begin = waiting.find(b"\xff\xff")
        if begin < 0 or len(waiting) < begin + 4:
            return None
        end = begin + 4 + waiting[begin + 3]
        if len(waiting) < end:
            return None
        packet = waiting[begin:end]
        well = sum(packet[2:]) & 0xFF == 0xFF
        return end, packet[2], packet[4] if well else None, packet[5:-1]

    def reply(self, servo, error, data=b""):
        body = bytes([servo.number, len(data) + 2, error]) + data
        return b"\xff\xff" + body + bytes([~sum(body) & 0xFF])
