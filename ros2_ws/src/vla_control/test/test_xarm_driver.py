"""The driver "xarm" with the vendor's library against an emulated control box: what the contract does not say of it."""

import socket
import threading
import time

import numpy as np
import pytest

pytest.importorskip("xarm")

from driver_rig import move, target, until  # noqa: E402
from rig_xarm import XarmRig  # noqa: E402
from vla_control.drivers import ArmTarget, DriverError, load_driver  # noqa: E402

#: The emulated device keeps real time.
pytestmark = pytest.mark.slow


@pytest.fixture
def rig():
    made = XarmRig()
    yield made
    made.close()


@pytest.fixture
def driver(rig):
    made = load_driver("xarm", rig.config(), rig.time)
    yield made
    made.close()


@pytest.mark.parametrize("axes", [5, 6])
def test_arms_of_five_and_six_joints(axes):
    rig = XarmRig(axes=axes)
    driver = load_driver("xarm", rig.config(), rig.time)
    try:
        driver.connect()
        at = rig.position()
        move(rig, driver, change=-0.1)
        until(lambda: np.allclose(driver.read().position, at - 0.1, atol=0.01))
        assert driver.read().effort.shape == (axes,)
    finally:
        driver.close()
        rig.close()


def test_velocity_and_effort_are_the_arms(rig, driver):
    driver.connect()
    np.testing.assert_allclose(driver.read().effort, rig.box.torque, atol=1e-5)
    at, seen, begin = driver.read().position, [], rig.time()
    for _ in range(40):
        driver.send(ArmTarget(at + 0.5 * (rig.time() - begin), np.full(7, 0.5)))
        rig.wait(driver.arm.period)
        seen.append(driver.read().velocity)
    assert np.median(seen[10:]) == pytest.approx(0.5, abs=0.25)


def test_the_force_torque_sensor_gives_the_wrench(rig):
    with_sensor = XarmRig(sensor=True, wrench=True)
    driver = load_driver("xarm", with_sensor.config(), with_sensor.time)
    try:
        driver.connect()
        np.testing.assert_allclose(driver.read().wrench, [1.0, 2.0, 3.0, 0.1, 0.2, 0.3], atol=1e-6)
    finally:
        driver.close()
        with_sensor.close()
    driver = load_driver("xarm", {**rig.config(), "wrench": True}, rig.time)
    with pytest.raises(DriverError, match="expected the readings of a force-torque sensor"):
        driver.connect()
    driver.close()


def test_an_arm_of_another_size_is_refused(rig):
    driver = load_driver("xarm", {**rig.config(), "joints": list("abcdef")}, rig.time)
    with pytest.raises(DriverError, match="arm right: xarm 127.*expected an arm of 6 joints, found one of 7"):
        driver.connect()
    with pytest.raises(DriverError, match="expected 5 to 7 joints"):
        load_driver("xarm", {"joints": ["a"], "address": "127.0.0.1"})


@pytest.mark.parametrize(
    ("error", "name"), [(31, "Collision"), (24, "Speed"), (22, "[Cc]ollision"), (11, "motor"), (1, "[Ee]mergency")]
)
def test_an_error_of_the_box_halts_the_arm_until_connect_clears_it(rig, driver, error, name):
    driver.connect()
    move(rig, driver)
    rig.box.fail(error)
    until(lambda: f"error {error} (" in driver.read().halted)
    with pytest.raises(DriverError, match=f"expected an arm that follows, found it stopped by error {error} .*{name}"):
        driver.send(target(rig.position()))
    at = rig.position()
    rig.place(at + 0.05)
    until(lambda: np.allclose(driver.read().position, at + 0.05, atol=1e-4))  # angles do not freeze with an error
    assert rig.box.error == error, "nothing is cleared without connect"
    driver.connect()
    np.testing.assert_allclose(rig.position(), at + 0.05)
    move(rig, driver)
    until(lambda: np.allclose(rig.position(), at + 0.15, atol=0.01))


def test_an_emergency_stop_that_is_pressed_refuses_the_connection(rig, driver):
    driver.connect()
    rig.box.press()
    until(lambda: "error 1 (" in driver.read().halted)
    assert not rig.powered()
    with pytest.raises(DriverError, match="expected no error after clearing it, found error 1"):
        driver.connect()
    rig.box.press(False)
    driver.connect()
    move(rig, driver)


@pytest.mark.parametrize(
    ("change", "found"), [("mode", "in mode 0, which another client has set"), ("pause", "paused")]
)
def test_another_client_takes_the_arm(rig, driver, change, found):
    driver.connect()
    move(rig, driver)
    if change == "mode":
        rig.box.mode = 0
    else:
        rig.box.state = 3
    until(lambda: driver.read().halted == found)
    with pytest.raises(DriverError, match=found):
        driver.send(target(rig.position()))
    assert rig.box.mode == (0 if change == "mode" else 1), "it is not taken back without connect"
    driver.connect()
    move(rig, driver)


def test_a_call_that_blocks_holds_up_nobody_and_the_arm_catches_up_without_a_jump(rig, driver):
    driver.connect()
    rig.box.late = [0.0] * 10 + [0.19] * 3
    at, longest = rig.position(), 0.0
    goal = at + 0.5
    ask = at
    for _ in range(100):
        ask = ask + np.clip(goal - ask, -0.01, 0.01)
        begin = time.perf_counter()
        driver.read()
        driver.send(target(ask))
        longest = max(longest, time.perf_counter() - begin)
        rig.wait(0.01)
    assert longest < 0.15
    assert not rig.box.late and rig.box.error == 0, "a jump is error 24"
    until(lambda: (driver.send(target(ask)), np.allclose(rig.position(), goal, atol=0.01))[1])
    assert driver.read().halted == ""


def test_a_far_target_is_approached_at_the_speed_of_catching_up(rig, driver):
    driver.connect()
    at = rig.position()
    driver.send(target(at + 1.0))
    rig.wait(0.5)
    assert rig.box.error == 0
    assert 0.0 < (rig.position() - at).max() < 0.75


def test_no_answer_is_one_clear_error(rig):
    driver = load_driver("xarm", {**rig.config(), "timeout": 0.3}, rig.time)
    driver.connect()
    rig.box.mute = True
    at = driver.read().position
    with pytest.raises(DriverError, match="set_servo_angle_j: expected code 0 within 0.3 s, found 3|gripper"):
        for step in range(200):
            driver.send(target(at + 0.001 * step))
            rig.wait(0.01)
    rig.box.mute = False
    driver.connect()
    move(rig, driver)
    driver.close()


@pytest.mark.parametrize("fault", ["half", "wrong"])
def test_answers_that_break_off_or_are_anothers_are_one_clear_error(rig, fault):
    driver = load_driver("xarm", {**rig.config(), "timeout": 0.3}, rig.time)
    driver.connect()
    setattr(rig.box, fault, True)
    at = driver.read().position
    with pytest.raises(DriverError, match="arm right: xarm 127"):
        for step in range(300):
            driver.send(target(at + 0.001 * step))
            rig.wait(0.01)
    setattr(rig.box, fault, False)
    driver.connect()
    move(rig, driver)
    driver.close()


def test_a_box_that_never_answers_is_given_up(rig):
    rig.box.mute = True
    driver = load_driver("xarm", {**rig.config(), "patience": 1.0}, rig.time)
    begin = time.perf_counter()
    with pytest.raises(DriverError, match="expected a control box that answers, found: no end after 1 s"):
        driver.connect()
    assert time.perf_counter() - begin < 6.0


def test_power_lost_and_back(rig, driver):
    driver.connect()
    move(rig, driver)
    rig.box.reboot()
    at = rig.position()
    with pytest.raises(DriverError, match="arm right: xarm 127"):
        for step in range(300):
            driver.send(target(at + 0.001 * step))
            driver.read()
            rig.wait(0.01)
    driver.connect()
    np.testing.assert_allclose(rig.position(), at)
    move(rig, driver)
    until(lambda: np.allclose(rig.position(), at + 0.1, atol=0.01))


def test_a_host_that_is_cut_off_leaves_an_arm_that_stands(rig, driver):
    driver.connect()
    move(rig, driver, duration=0.2)
    rig.cut()
    rig.wait(0.3)
    stood = rig.position()
    rig.wait(0.5)
    np.testing.assert_allclose(rig.position(), stood)


@pytest.mark.parametrize(("category", "state"), [(2, True), (1, False), (0, False)])
def test_a_stop_leaves_the_motors_as_its_category_says(rig, driver, category, state):
    driver.connect()
    move(rig, driver, duration=0.2)
    assert driver.stop(category) == category
    until(lambda: rig.box.state == 4 and rig.powered() == state)
    assert driver.read().halted == f"stopped, category {category}"


def test_the_gripper_keeps_its_grip_in_a_stop_and_says_what_fails(rig, driver):
    driver.connect()
    driver.send(target(rig.position(), 0.5))
    until(lambda: abs(driver.read().gripper - 0.5) < 0.02)
    driver.stop(0)
    rig.wait(0.2)
    assert rig.box.finger == pytest.approx(425.0, abs=2.0)
    driver.connect()
    rig.box.finger_error = 11
    with pytest.raises(DriverError, match="gripper: .*get_gripper_position: expected code 0, found 102"):
        for _ in range(300):
            driver.read()
            rig.wait(0.01)
    driver.connect()
    assert driver.read().gripper == pytest.approx(0.5, abs=0.02)


def test_threads_end_with_close_and_the_default_of_sockets_is_as_it_was(rig, driver):
    before, others = socket.getdefaulttimeout(), set(threading.enumerate())
    driver.connect()
    assert socket.getdefaulttimeout() == before
    assert {"right xarm", "right xarm gripper"} <= {thread.name for thread in threading.enumerate()}
    driver.close()
    left = [thread.name for thread in set(threading.enumerate()) - others]
    assert not [name for name in left if name.startswith("right xarm")]
