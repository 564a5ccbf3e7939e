"""The joystick stream: events as the kernel sends them, in pieces of any size."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vla_teleop.devices import DeviceError
from vla_teleop.gamepad import DEAD_ZONE, DEADMAN, Gamepad, GamepadState

# What an Xbox pad sends when it is opened (each button and axis once, type | 0x80), then: left shoulder pressed,
# left stick half away, A pressed and let go.
RECORDED = (
    b"".join(struct.pack("<IhBB", 4711, 0, 0x81, n) for n in range(11))
    + b"".join(struct.pack("<IhBB", 4711, -32767 if n in (2, 5) else 0, 0x82, n) for n in range(8))
    + bytes.fromhex("6f120000 0100 01 04  80120000 00c0 02 01  90120000 0100 01 00  a0120000 0000 01 00")
)


def button(number: int, value: int, initial: bool = False) -> bytes:
    return struct.pack("<IhBB", 0, value, 0x81 if initial else 0x01, number)


def axis(number: int, value: int) -> bytes:
    return struct.pack("<IhBB", 0, value, 0x02, number)


def test_a_recorded_stream_gives_motion_and_a_button():
    pad = GamepadState()
    pad.feed(RECORDED)
    taken = pad.read()
    expected = np.zeros(6)
    expected[0] = (16384 / 32767 - DEAD_ZONE) / (1 - DEAD_ZONE)
    assert taken.deadman and taken.buttons == ("gripper",)
    np.testing.assert_allclose(taken.twist, expected)


@given(st.lists(st.integers(0, len(RECORDED)), max_size=20))
def test_the_pieces_do_not_matter(cuts):
    pad = GamepadState()
    bounds = [0, *sorted(cuts), len(RECORDED)]
    for start, end in zip(bounds, bounds[1:]):
        pad.feed(RECORDED[start:end])
    taken = pad.read()
    assert taken.deadman and taken.twist[0] > 0.4 and taken.buttons == ("gripper",)


@given(st.binary(max_size=400))
def test_any_bytes_give_a_bounded_twist(data):
    pad = GamepadState()
    pad.feed(data)
    assert (np.abs(pad.read().twist) <= 1.0).all()


def test_without_the_deadman_nothing_moves():
    pad = GamepadState()
    pad.feed(axis(1, -32767) + axis(0, 32767))
    taken = pad.read()
    assert not taken.deadman and not taken.twist.any()


def test_letting_go_stops():
    pad = GamepadState()
    pad.feed(button(DEADMAN, 1) + axis(1, -32767) + button(DEADMAN, 0))
    assert not pad.read().twist.any()


def test_a_deadman_held_at_the_start_has_to_be_pressed_again():
    pad = GamepadState()
    pad.feed(button(DEADMAN, 1, initial=True) + axis(1, -32767))
    assert not pad.read().deadman
    pad.feed(button(DEADMAN, 0) + button(DEADMAN, 1))
    assert pad.read().deadman


def test_a_stick_near_its_middle_counts_as_at_rest():
    pad = GamepadState()
    pad.feed(button(DEADMAN, 1) + axis(1, int(DEAD_ZONE * 32767) - 1))
    assert not pad.read().twist.any()


def test_a_device_is_read_without_waiting_and_its_loss_is_an_error(tmp_path):
    path = tmp_path / "js0"
    os.mkfifo(path)
    pad = Gamepad(str(path))
    sender = os.open(path, os.O_WRONLY)
    os.write(sender, button(DEADMAN, 1) + axis(1, -32767))
    assert pad.read(0.0).twist[0] == 1.0
    os.close(sender)
    with pytest.raises(DeviceError, match="unplugged"):
        pad.read(0.0)
    pad.close()


def test_a_gamepad_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DeviceError, match=r"expected one at .*js9"):
        Gamepad(str(tmp_path / "js9"))
