"""The driver "ur" against an emulated controller: what the contract does not say of it."""

import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from driver_rig import move, target, until
from rig_ur import UrRig, _python, ur_rig
from vla_control.drivers import DriverError, load_driver
from vla_control.drivers.ur import PROGRAM

#: The emulated device keeps real time.
pytestmark = pytest.mark.slow


@pytest.fixture
def rig():
    with ur_rig() as made:
        yield made


@pytest.fixture
def driver(rig):
    yield from _driver(rig)


def _driver(rig, **settings):
    made = load_driver("ur", {**rig.config(), **settings}, rig.time)
    yield made
    made.close()


def still(rig) -> bool:
    with rig.robot.lock:
        return not rig.robot.qd.any()


def in_motion(rig, driver) -> None:
    move(rig, driver, change=1.0, duration=0.2)
    until(lambda: not still(rig))


def stays(rig, duration=0.3) -> None:
    at = rig.position()
    rig.wait(duration)
    np.testing.assert_allclose(rig.position(), at, atol=1e-9)


def follows_again(rig, driver) -> None:
    driver.connect()
    at = rig.position()
    move(rig, driver)
    until(lambda: np.allclose(rig.position(), at + 0.1, atol=0.01))
    assert driver.read().halted == "" and rig.robot.error == ""


# The watchdog on the robot.


def test_the_robot_stops_by_itself_when_targets_cease(rig, driver):
    driver.connect()
    in_motion(rig, driver)
    with rig.robot.lock:
        begin = rig.robot._tick
    until(lambda: rig.robot.runtime == 1)
    assert still(rig)
    # The watchdog, the way to the last target included, then 0.5 rad/s at 8 rad/s^2; its own cycles counted.
    assert (rig.robot._tick - begin) / rig.robot.hz < rig.config()["watchdog"] + 0.1 + 0.1
    until(lambda: "has ended" in driver.read().halted)
    with pytest.raises(DriverError, match="arm left: ur .*program on the robot has ended"):
        driver.send(target(rig.position()))
    stays(rig)
    follows_again(rig, driver)


def test_the_robot_waits_for_a_first_target_as_long_as_it_takes(rig, driver):
    driver.connect()
    rig.wait(1.0)
    assert driver.read().halted == ""
    move(rig, driver)


def test_the_robot_stops_by_itself_when_the_cable_is_pulled_in_motion_and_does_not_go_on(rig, driver):
    driver.connect()
    in_motion(rig, driver)
    rig.cut()
    until(lambda: rig.robot.runtime == 1)
    stays(rig)
    with pytest.raises(DriverError, match="expected a state"):
        driver.read()
    rig.mend()
    with pytest.raises(DriverError):
        driver.send(target(rig.position()))
    stays(rig)
    follows_again(rig, driver)


def test_the_controllers_own_watchdog_stops_a_program_that_hangs(rig, driver):
    driver.connect()
    in_motion(rig, driver)
    with rig.robot.lock:
        rig.robot._busy = 10**9
    until(lambda: rig.robot.runtime == 1)
    until(lambda: still(rig))


def test_a_program_that_takes_no_targets_is_one_clear_error(rig, driver):
    driver.connect()
    move(rig, driver, duration=0.1)
    with rig.robot.lock:
        rig.robot._busy = 10**9
    with pytest.raises(DriverError, match="expected target .* to be taken, found"):
        for _ in range(500):
            driver.send(target(rig.position()))
            rig.wait(0.01)
    follows_again(rig, driver)


# Stops.


@pytest.mark.parametrize("category", [2, 1, 0])
def test_a_stop_category_is_what_it_says(rig, driver, category):
    driver.connect()
    in_motion(rig, driver)
    assert driver.stop(category) == category
    assert driver.stop(category) == category
    until(lambda: rig.powered() == (category == 2))
    assert ("power off" in rig.robot.asked) == (category < 2)
    if category == 1:
        assert rig.robot.speed_at_power_off < 0.01
    until(lambda: still(rig))
    assert driver.read().halted
    follows_again(rig, driver)


def test_closing_in_motion_stops_the_arm(rig, driver):
    driver.connect()
    in_motion(rig, driver)
    driver.close()
    until(lambda: still(rig) and rig.robot.runtime == 1)
    assert rig.powered()
    stays(rig)


def test_stopping_before_connecting_is_fine(driver):
    assert [driver.stop(category) for category in (2, 1, 0)] == [2, 1, 0]


# What the controller reports.


def test_a_protective_stop_is_unlocked_only_by_connecting(rig, driver):
    driver.connect()
    in_motion(rig, driver)
    rig.robot.protective_stop()
    until(lambda: driver.read().halted == "protective stop")
    with pytest.raises(DriverError, match="protective stop"):
        driver.send(target(rig.position()))
    until(lambda: still(rig))
    assert not any("unlock" in line for line in rig.robot.asked)
    at = rig.position()
    begin = time.monotonic()
    driver.connect()
    assert time.monotonic() - begin > 3.0 and rig.robot.asked.count("unlock protective stop") > 1
    rig.wait(0.2)
    np.testing.assert_allclose(rig.position(), at, atol=1e-9)
    move(rig, driver)


def test_a_person_who_unlocks_and_plays_does_not_set_the_arm_in_motion(rig, driver):
    driver.connect()
    in_motion(rig, driver)
    rig.robot.protective_stop()
    until(lambda: "protective stop" in driver.read().halted)
    driver.stop(2)
    until(lambda: still(rig))
    rig.wait(0.1)
    at = rig.position()
    with rig.robot.lock:
        rig.robot.safety, rig.robot.runtime = 1, 2
    until(lambda: rig.robot.runtime == 1)
    # It goes on with the line of the program where it was interrupted: one cycle of servoj at most.
    np.testing.assert_allclose(rig.position(), at, atol=0.01)
    assert driver.read().halted


def test_a_protective_stop_stays_when_it_may_not_be_unlocked(rig):
    for driver in _driver(rig, unlock=False):
        rig.robot.protective_stop()
        with pytest.raises(DriverError, match="found: protective stop; unlock it at the pendant"):
            driver.connect()
    assert not any("unlock" in line for line in rig.robot.asked)


def test_an_emergency_stop_needs_a_person_and_then_connect(rig, driver):
    driver.connect()
    in_motion(rig, driver)
    rig.robot.emergency_stop()
    until(lambda: driver.read().halted == "emergency stop")
    with pytest.raises(DriverError, match="emergency stop"):
        driver.send(target(rig.position()))
    with pytest.raises(DriverError, match="found: emergency stop; a person ends it"):
        driver.connect()
    rig.robot.release_emergency_stop()
    follows_again(rig, driver)
    assert {"power on", "brake release"} <= set(rig.robot.asked)


def test_an_arm_without_power_stays_so_when_it_may_not_be_switched_on(rig):
    rig.robot.mode = 3
    for driver in _driver(rig, power_on=False):
        with pytest.raises(DriverError, match="expected an arm with power on, found: arm not running: power off"):
            driver.connect()
    assert "power on" not in rig.robot.asked


def test_power_that_is_lost_halts_the_arm(rig, driver):
    driver.connect()
    move(rig, driver, duration=0.1)
    with rig.robot.lock:
        rig.robot._end_program()
        rig.robot.mode = 3
    until(lambda: driver.read().halted == "arm not running: power off")
    with pytest.raises(DriverError, match="expected an arm that follows"):
        driver.send(target(rig.position()))
    follows_again(rig, driver)


def test_a_program_that_is_stopped_at_the_pendant_halts_the_arm(rig, driver):
    driver.connect()
    rig.robot.end_program()
    until(lambda: driver.read().halted == "the program on the robot has ended")
    follows_again(rig, driver)


def test_another_program_is_stopped_before_ours_starts(rig, driver):
    rig.robot.int_out[24] = 7
    rig.robot._load("def other():\n  while True:\n    sync()\n  end\nend\n")
    driver.connect()
    assert "stop" in rig.robot.asked
    move(rig, driver)


# The wrong arm, or one that must not be controlled from here.


def test_remote_control_that_is_off_is_refused(rig, driver):
    rig.robot.remote = False
    with pytest.raises(DriverError, match="expected remote control to be on, found 'false'"):
        driver.connect()
    rig.robot.remote = True
    follows_again(rig, driver)


@pytest.mark.parametrize("version", [(10, 7, 0, 1), (5, 1, 2, 3), (3, 15, 8, 1)])
def test_another_controller_version_is_refused(version):
    with ur_rig(version=version) as rig:
        for driver in _driver(rig, series="e"):
            with pytest.raises(DriverError, match=f"version 5.6 or a later 5, found {version[0]}.{version[1]}"):
                driver.connect()
            assert not rig.moved_by_commands() and rig.robot.runtime == 1


def test_another_serial_number_is_refused(rig):
    for driver in _driver(rig, serial="20195500001"):
        with pytest.raises(DriverError, match="serial number 20195500001, found '20225500123'"):
            driver.connect()
    for driver in _driver(rig, serial="20225500123"):
        driver.connect()


def test_registers_that_another_client_has_are_one_clear_error(rig, driver):
    for other in _driver(rig):
        other.connect()
        with pytest.raises(DriverError, match="input_int_register_24 IN_USE"):
            driver.connect()
        assert other.read().halted == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"series": "f"}, {"watchdog": 0.0}, {"watchdog": float("nan")}, {"lookahead": 0.3}, {"gain": 1.0},
        {"joints": ["a"] * 7}, {"gripper": True}, {"period": 0.5}, {"period": 0.001}, {"deceleration": -1.0},
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(rig, wrong):
    with pytest.raises(DriverError, match="expected"):
        load_driver("ur", {**rig.config(), **wrong})


def test_a_controller_that_is_not_there_is_one_clear_error(rig):
    for driver in _driver(rig, host="127.0.99.99"):
        with pytest.raises(DriverError, match="arm left: ur 127.0.99.99: expected an answer, found"):
            driver.connect()


# The line.


def _zero_size(package):
    return b"\0\0U" + package[3:]


def _once_half():
    sent = []
    return lambda package: b"" if sent else sent.append(1) or package[: len(package) // 2]


def _nan(package):
    return package[:4] + struct.pack(">d", float("nan")) + package[12:]


@pytest.mark.parametrize(
    "mangle",
    [
        pytest.param(lambda package: package[: len(package) // 2], id="half a package, over and over"),
        pytest.param(_zero_size, id="a size of 0"),
        pytest.param(lambda package: bytes(range(200, 256)), id="noise"),
        pytest.param(lambda package: struct.pack(">H", len(package) - 8) + package[2:-8], id="too short"),
        pytest.param(_nan, id="not a number"),
        pytest.param(lambda package: b"", id="nothing"),
        pytest.param(_once_half(), id="half a package, then nothing"),
    ],
)
def test_bytes_that_make_no_sense_are_one_clear_error(rig, driver, mangle):
    driver.connect()
    in_motion(rig, driver)
    rig.robot.mangle = mangle
    with pytest.raises(DriverError, match="arm left: ur 127.*:30004: expected a state"):
        for _ in range(200):
            driver.read()
            rig.wait(0.01)
    with pytest.raises(DriverError):
        driver.send(target(rig.position()))
    with pytest.raises(DriverError):
        driver.connect()
    rig.robot.mangle = None
    until(lambda: still(rig))
    follows_again(rig, driver)


def test_one_late_package_is_no_fault(rig, driver):
    driver.connect()
    rig.robot.mangle = lambda package: b""
    rig.wait(0.1)
    rig.robot.mangle = None
    rig.wait(0.1)
    assert driver.read().halted == ""


def test_a_controller_that_restarts_is_one_clear_error(rig, driver):
    driver.connect()
    in_motion(rig, driver)
    rig.robot.reboot()
    with pytest.raises(DriverError, match="arm left: ur 127.*closed the connection|reset"):
        for _ in range(200):
            driver.read()
            rig.wait(0.01)
    follows_again(rig, driver)


# Motion and state.


@pytest.mark.parametrize(("version", "period", "split"), [((5, 12, 0, 1), 0.01, 5), ((5, 12, 0, 1), 0.002, 1),
                                                          ((3, 15, 8, 1), 0.008, 1)])  # fmt: skip
def test_the_robot_servos_at_its_own_rate_between_targets(version, period, split):
    with ur_rig(version=version) as rig:
        goals = []
        own = rig.robot._servoj
        rig.robot._servoj = lambda q, **rest: goals.append((list(q), rest["t"])) or own(q, **rest)
        for driver in _driver(rig, period=period):
            assert driver.capabilities.rate == rig.robot.hz
            driver.connect()
            move(rig, driver, change=0.2, speed=0.4)
            until(lambda: np.allclose(goals[-1][0], goals[0][0] + np.full(6, 0.2), atol=0.05))
        assert {t for _, t in goals} == {1.0 / rig.robot.hz}
        steps = np.diff([q for q, _ in goals], axis=0)
        assert steps.min() > -1e-9
        if split > 1:  # A target is 4 mrad on; the robot is never asked for more than that in less than a few cycles.
            assert np.median(steps[steps > 1e-9]) < 0.0021


def test_the_program_is_urscript_that_ends_every_block():
    text = PROGRAM.format(
        session=1, idle=2, split=1, frequency=5.0, step=0.002, lookahead=0.1, gain=300, deceleration=8
    )
    compile(_python(text), "program", "exec")
    assert text.count("\n  end\nend\n") == 0 and text.startswith("def vla_servo():\n") and text.endswith("\nend\n")
    assert "{" not in text and "\t" not in text


def test_the_wrench_is_about_the_tool_centre_point_and_in_its_frame(rig, driver):
    # The tool is turned by 90 degrees about z of the base; its centre point is 0.1 m along z of the flange.
    rig.robot.pose, rig.robot.offset = np.array([0.4, 0.1, 0.3, 0, 0, np.pi / 2]), np.array([0, 0, 0.1, 0, 0, 0.0])
    rig.robot.force = np.array([10.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    driver.connect()
    # A push of 10 N along x of the base at the centre point turns the flange by 1 N m about y of the base.
    np.testing.assert_allclose(driver.read().wrench, [0.0, -10.0, 0.0, 0.0, 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(driver.read().effort, 0.1 * np.arange(6))


def test_the_wrench_of_a_cb3_is_about_the_tool_centre_point_already():
    with ur_rig(version=(3, 15, 8, 1)) as rig:
        rig.robot.offset = np.array([0, 0, 0.1, 0, 0, 0.0])
        for driver in _driver(rig):
            driver.connect()
            np.testing.assert_allclose(driver.read().wrench, rig.robot.force)


# The emulated controller itself.


#: In a process of its own: ur_rtde keeps Python's lock while it waits for the controller, which is a thread here.
UR_RTDE = """
import sys
from dashboard_client import DashboardClient
from rtde_receive import RTDEReceiveInterface

line = DashboardClient(sys.argv[1])
line.connect()
print(line.isInRemoteControl(), line.getSerialNumber(), line.polyscopeVersion())
client = RTDEReceiveInterface(sys.argv[1])
print(client.getActualQ(), client.getActualTCPForce())
print(client.getRobotMode(), client.getRuntimeState(), client.isProtectiveStopped())
"""


@pytest.mark.parametrize("version", [(5, 12, 0, 1101319), (3, 15, 8, 106339)])
def test_another_client_library_reads_the_emulated_controller(version):
    pytest.importorskip("rtde_receive")
    with ur_rig(version=version) as rig:
        rig.robot.protective_stop()
        if version[0] == 3:  # No serial number there.
            code = UR_RTDE.replace("line.isInRemoteControl(), line.getSerialNumber()", "True, 20225500123")
        else:
            code = UR_RTDE
        done = subprocess.run(
            [sys.executable, "-c", code, rig.robot.host], capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.splitlines()[:3] == [
            f"True {rig.robot.serial} {'.'.join(map(str, version))}",
            f"{rig.position().tolist()} {rig.robot.force.tolist()}",
            "7 1 True",
        ]


def test_the_rig_says_what_it_is():
    assert UrRig.driver == "ur" and "30004" in UrRig.boundary
