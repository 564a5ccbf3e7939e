"""A gamepad as a teleoperation device, through the kernel's joystick interface (/dev/input/js*).

The stream is made of 8-byte events (Linux Documentation/input/joydev/joystick-api.rst): time (u32, ms), value
(s16), type (u8: 1 button, 2 axis, 0x80 set in the state sent first), number (u8). The numbers below are those of
the kernel's xpad driver (Xbox pads and most others).
"""

from __future__ import annotations

import os
import struct

import numpy as np

from vla_teleop.devices import DeviceError, TeleopInput

_EVENT = struct.Struct("<IhBB")
_BUTTON, _AXIS, _INITIAL = 0x01, 0x02, 0x80

#: Deflection below this counts as none; above, the rest of the way is spread over 0 .. 1.
DEAD_ZONE = 0.12

#: Axis number -> (axis of the twist, direction). Pushing a stick away or to the right gives -1 or +1.
STICKS = {1: (0, -1.0), 0: (1, -1.0), 4: (2, -1.0), 3: (5, -1.0), 6: (3, 1.0), 7: (4, -1.0)}

DEADMAN = 4  # left shoulder button
COMMANDS = {
    0: "gripper",  # A
    1: "record_failure",  # B
    2: "record_start",  # X
    3: "record_success",  # Y
    5: "next_arm",  # right shoulder
    6: "stop",  # back
    7: "arm",  # start
    8: "disarm",  # guide
    9: "record_discard",  # left stick pressed
    10: "faster",  # right stick pressed
}

HELP = """hold the LEFT SHOULDER button to move: left stick x, y   right stick z, turn   cross tilt   (base axes)
A gripper   right shoulder other arm   right stick pressed: speed   START arm   GUIDE disarm   BACK STOP
record  X begin   Y end: success   B end: failure   left stick pressed: throw away"""


class GamepadState:
    """Sticks and buttons as they stand; pure, fed with the bytes of the stream in pieces of any size."""

    def __init__(self) -> None:
        self._rest = b""
        self._axes: dict[int, float] = {}
        self._deadman = False
        self._buttons: list[str] = []

    def feed(self, data: bytes) -> None:
        """Take more of the stream."""
        data = self._rest + data
        whole = len(data) - len(data) % _EVENT.size
        self._rest = data[whole:]
        for _, value, kind, number in _EVENT.iter_unpack(data[:whole]):
            if kind & ~_INITIAL == _AXIS:
                self._axes[number] = _deflection(value)
            elif kind & ~_INITIAL == _BUTTON and number == DEADMAN:
                # Held already when the pad was opened does not count: it has to be pressed.
                self._deadman = bool(value) and not kind & _INITIAL
            elif kind == _BUTTON and value and number in COMMANDS:
                self._buttons.append(COMMANDS[number])

    def read(self) -> TeleopInput:
        """The input now; buttons are given once."""
        twist = np.zeros(6)
        if self._deadman:
            for number, (axis, direction) in STICKS.items():
                twist[axis] += direction * self._axes.get(number, 0.0)
        buttons, self._buttons = tuple(self._buttons), []
        return TeleopInput(twist, self._deadman, buttons)


class Gamepad:
    """The gamepad at `path`.

    Raises:
        DeviceError: there is none.
    """

    help = HELP

    def __init__(self, path: str = "/dev/input/js0"):
        self._path = path or "/dev/input/js0"
        try:
            self._stream = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise DeviceError(f"gamepad: expected one at {self._path}, found {error}") from error
        self._state = GamepadState()

    def read(self, now: float) -> TeleopInput:
        """See TeleopDevice."""
        while True:
            try:
                data = os.read(self._stream, 4096)
            except BlockingIOError:
                return self._state.read()
            except OSError as error:
                raise DeviceError(f"gamepad: expected one at {self._path}, found {error}") from error
            if not data:
                raise DeviceError(f"gamepad: expected one at {self._path}, found it unplugged")
            self._state.feed(data)

    def close(self) -> None:
        """Close the stream."""
        os.close(self._stream)


def _deflection(value: int) -> float:
    amount = min(1.0, abs(value) / 32767)
    return float(np.sign(value)) * max(0.0, amount - DEAD_ZONE) / (1 - DEAD_ZONE)
