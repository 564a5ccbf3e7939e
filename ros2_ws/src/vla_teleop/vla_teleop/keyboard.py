"""The keyboard of a terminal as a teleoperation device.

A terminal tells of key presses and repeats, never of releases. So a key counts as held for HOLD after each
press or repeat, and letting go stops the arm that much later. Terminals begin to repeat only after a delay
(often 0.5 s): a key kept down moves, pauses and then moves on; `xset r rate 200 30` closes the gap.
"""

from __future__ import annotations

import os
import select
import termios
import tty

import numpy as np

from vla_teleop.devices import DeviceError, TeleopInput

#: A motion key counts as held for this long after its last press or repeat, s.
HOLD = 0.25

#: Motion key -> (axis of the twist, direction).
MOTION = {
    "w": (0, 1.0),
    "s": (0, -1.0),
    "a": (1, 1.0),
    "d": (1, -1.0),
    "r": (2, 1.0),
    "f": (2, -1.0),
    "u": (3, 1.0),
    "o": (3, -1.0),
    "i": (4, 1.0),
    "k": (4, -1.0),
    "j": (5, 1.0),
    "l": (5, -1.0),
}

COMMANDS = {
    "\r": "arm",
    "\n": "arm",
    "x": "stop",
    "z": "disarm",
    " ": "gripper",
    "\t": "next_arm",
    "+": "faster",
    "=": "faster",
    "-": "slower",
    "b": "record_start",
    "e": "record_success",
    "g": "record_failure",
    "c": "record_discard",
    "q": "quit",
}

HELP = """move  w/s x+ x-   a/d y+ y-   r/f z+ z-      turn  u/o about x   i/k about y   j/l about z   (base axes)
space gripper   tab other arm   + - speed   Enter arm   z disarm   x STOP   q quit
record  b begin   e end: success   g end: failure   c cancel (throw away)"""


class KeyState:
    """Which keys count as held; pure, fed with characters and times (s)."""

    def __init__(self) -> None:
        self._held: dict[str, float] = {}
        self._buttons: list[str] = []

    def press(self, text: str, now: float) -> None:
        """Take the characters that the terminal gave at `now`."""
        for key in text.lower():
            if key in MOTION:
                self._held[key] = now
            elif key in COMMANDS:
                self._buttons.append(COMMANDS[key])

    def read(self, now: float) -> TeleopInput:
        """The input at `now`; buttons are given once."""
        self._held = {key: at for key, at in self._held.items() if now - at < HOLD}
        twist = np.zeros(6)
        for key in self._held:
            axis, direction = MOTION[key]
            twist[axis] += direction
        buttons, self._buttons = tuple(self._buttons), []
        return TeleopInput(twist, bool(self._held), buttons)


class Terminal:
    """The controlling terminal, in a mode that gives each key at once; Ctrl-C still interrupts.

    Raises:
        DeviceError: there is no terminal.
    """

    def __init__(self, path: str = ""):
        path = path or "/dev/tty"
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_NOCTTY)
        except OSError as error:
            raise DeviceError(f"keyboard: expected a terminal at {path}, found {error}") from error
        try:
            self._before = termios.tcgetattr(self._handle)
            tty.setcbreak(self._handle)
        except termios.error as error:
            os.close(self._handle)
            raise DeviceError(f"keyboard: expected a terminal at {path}, found {error}") from error

    def read(self) -> str:
        """The characters typed since the last call; never waits."""
        text = ""
        while select.select([self._handle], [], [], 0)[0]:
            try:
                data = os.read(self._handle, 256)
            except OSError as error:
                raise DeviceError(f"keyboard: expected its terminal, found {error}") from error
            if not data:
                raise DeviceError("keyboard: expected its terminal, found it closed")
            text += data.decode(errors="ignore")
        return text

    def close(self) -> None:
        """Put the terminal back."""
        try:
            termios.tcsetattr(self._handle, termios.TCSADRAIN, self._before)
        except termios.error:
            return  # the terminal is gone, and its mode with it
        finally:
            os.close(self._handle)


class Keyboard:
    """A terminal's keyboard as a TeleopDevice."""

    help = HELP

    def __init__(self, path: str = ""):
        self._terminal = Terminal(path)
        self._keys = KeyState()

    def read(self, now: float) -> TeleopInput:
        """See TeleopDevice."""
        self._keys.press(self._terminal.read(), now)
        return self._keys.read(now)

    def close(self) -> None:
        """Put the terminal back."""
        self._terminal.close()
