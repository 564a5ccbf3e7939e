"""Keys count as held for a quarter of a second, and a terminal is left as it was found."""

import os
import pty
import termios

import numpy as np
import pytest
from vla_teleop.devices import BUTTONS, DeviceError
from vla_teleop.gamepad import COMMANDS as PAD_COMMANDS
from vla_teleop.keyboard import COMMANDS, HOLD, MOTION, Keyboard, KeyState


@pytest.fixture
def terminal():
    """(side of the person, path of the terminal)"""
    person, device = pty.openpty()
    yield person, os.ttyname(device)
    os.close(device)
    try:
        os.close(person)
    except OSError:
        return  # a test closed it


@pytest.mark.parametrize("key", MOTION)
def test_each_motion_key_moves_one_axis(key):
    keys = KeyState()
    keys.press(key, 10.0)
    taken = keys.read(10.0)
    axis, direction = MOTION[key]
    assert taken.deadman and taken.twist[axis] == direction and np.count_nonzero(taken.twist) == 1


def test_a_key_not_repeated_stops_after_the_hold_time():
    keys = KeyState()
    keys.press("w", 0.0)
    assert keys.read(HOLD - 0.01).deadman
    taken = keys.read(HOLD + 0.01)
    assert not taken.deadman and not taken.twist.any()


def test_repeats_keep_a_key_held_without_adding_up():
    keys = KeyState()
    for i in range(30):
        keys.press("ww", i * 0.033)
    assert keys.read(1.0).twist[0] == 1.0


def test_buttons_are_given_once_in_order():
    keys = KeyState()
    keys.press("\r b", 0.0)
    assert keys.read(0.0).buttons == ("arm", "gripper", "record_start")
    assert keys.read(0.0).buttons == ()


def test_only_known_buttons_are_named():
    assert set(COMMANDS.values()) <= set(BUTTONS) and set(PAD_COMMANDS.values()) <= set(BUTTONS)


def test_the_terminal_gives_keys_at_once_and_is_put_back(terminal):
    person, path = terminal
    before = termios.tcgetattr(person)[3]
    keyboard = Keyboard(path)
    os.write(person, b"w")
    assert keyboard.read(1.0).twist[0] == 1.0
    keyboard.close()
    assert termios.tcgetattr(person)[3] == before


def test_what_is_no_terminal_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DeviceError, match="expected a terminal at"):
        Keyboard(str(tmp_path / "file"))


def test_a_terminal_that_closes_is_an_error(terminal):
    person, path = terminal
    keyboard = Keyboard(path)
    os.close(person)
    with pytest.raises(DeviceError):
        keyboard.read(0.0)
    keyboard.close()
