"""What only Dynamixel servos do."""

import numpy as np
import pytest
from rig_dynamixel import DynamixelRig
from servo_emulator import REBOOT, DynamixelBus, crc
from test_servo_bus import TICK, drive, make, target, until, writes  # noqa: F401
from vla_control.drivers import DriverError

#: The emulated device keeps real time.
pytestmark = pytest.mark.slow


@pytest.fixture
def rig():
    made = DynamixelRig()
    yield made
    made.close()


def test_the_emulated_packets_are_those_of_the_manual():
    # Protocol 2.0, ping of ID 1 and its status packet.
    assert crc(bytes.fromhex("FFFFFD0001030001")) == 0x4E19
    status = DynamixelBus.reply(None, type("One", (), {"number": 1}), 0, bytes.fromhex("060426"))
    assert status == bytes.fromhex("FFFFFD00010700550006 04 26 65 5D".replace(" ", ""))


def test_the_watchdog_stops_the_arm_when_the_host_is_gone(rig, make):  # noqa: F811
    driver = make(watchdog=0.1)
    driver.connect()
    assert [servo.registers[98] for servo in rig.bus.servos.values()] == [5] * 9
    driver.send(target(rig.position()))
    for servo in rig.bus.servos.values():
        servo.fastest = 100.0  # slow, so that there is a way left to go
    driver.send(target(rig.position() + 0.5))
    rig.wait(0.06)
    rig.cut()
    rig.wait(0.3)
    at = rig.position()
    assert [servo.registers[98] for servo in rig.bus.servos.values()] == [0xFF] * 9
    rig.wait(0.3)
    np.testing.assert_allclose(rig.position(), at, atol=1e-9)
    with pytest.raises(DriverError):
        driver.read()
    rig.mend()
    driver.connect()
    rig.wait(0.3)
    np.testing.assert_allclose(rig.position(), at, atol=4 * TICK)
    driver.close()
    assert [servo.registers[98] for servo in rig.bus.servos.values()] == [0] * 9


def test_a_watchdog_that_ran_out_is_said(rig, make):  # noqa: F811
    driver = make()
    driver.connect()
    rig.bus.servos[6].registers[98] = 0xFF
    until(lambda: driver.read().halted)
    assert driver.read().halted == "servo 6: its bus watchdog ran out: no instruction came in time"


def test_velocity_bytes_that_look_like_a_header_are_read(rig, make):  # noqa: F811
    driver = make()
    servo = rig.bus.servos[1]
    measure = servo.measure

    def look_alike():
        measure()
        servo.registers[126:136] = bytes.fromhex("0000FFFFFFFFFD070000")  # velocity -1, position 0x7FD

    servo.measure = look_alike
    rig.wait(0.01)
    driver = make(leader=True)
    driver.connect()
    state = driver.read()
    assert state.position[0] == pytest.approx((0x7FD - 2048) * TICK)
    assert state.velocity[0] == pytest.approx(-0.229 * 2 * np.pi / 60)


def test_modes_are_set_when_the_torque_is_off_and_refused_when_on(rig, make):  # noqa: F811
    rig.bus.servos[6].registers[10] = 0x05  # reversed, and profiles as times
    driver = make()
    driver.connect()
    assert rig.bus.servos[6].registers[10] == 0x01
    assert [rig.bus.servos[servo].registers[11] for servo in (1, 9)] == [3, 5]
    driver.close()
    rig.bus.servos[1].registers[11] = 1
    with pytest.raises(DriverError, match=r"servo 1: expected drive and operating mode \[0, 3\], found \[0, 1\]"):
        driver.connect()


def test_speed_and_gripper_current_are_set(rig, make):  # noqa: F811
    make(gripper_current=0.3, speed=2.0).connect()
    assert rig.bus.servos[9].get(102, 2) == round(0.3 / 0.00269)
    assert rig.bus.servos[3].get(112, 4) == round(2.0 / (0.229 * 2 * np.pi / 60))


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda bus: bus.servos[3].set(12, 1, 255), "servo 3: expected secondary ID 2, found 255"),
        (lambda bus: bus.servos[7].set(12, 1, 1), "servo 7: expected no secondary ID, found 1"),
        (lambda bus: setattr(bus.servos[5], "place", 2400), "servo 5: expected the position of servo 4, 2300"),
        (lambda bus: bus.servos[2].set(6, 1, 37), "servo 2: expected firmware 38 or newer .*, found 37"),
        (lambda bus: bus.servos[2].set(52, 4, 1950), "servo 2: expected a position of its limits 1950 to 4095"),
    ],
)
def test_an_arm_that_would_fight_or_not_obey_is_refused(rig, make, change, error):  # noqa: F811
    change(rig.bus)
    with pytest.raises(DriverError, match=error):
        make().connect()
    assert not any(servo.torque for servo in rig.bus.servos.values())
    assert not rig.moved_by_commands()


def test_the_second_servo_of_a_joint_follows_and_is_watched(rig, make):  # noqa: F811
    driver = make()
    driver.connect()
    drive(rig, driver, rig.position() + 0.2, 0.6)
    assert rig.bus.servos[3].place == rig.bus.servos[2].place
    rig.bus.servos[3].overload()
    until(lambda: driver.read().halted)
    assert driver.read().halted == "servo 3: hardware error: overload"
    driver.connect()
    assert [number for number, instruction, _ in rig.bus.log if instruction == REBOOT] == [3]
    assert driver.read().halted == ""


def test_an_arm_whose_motors_do_not_all_measure_current_has_no_effort(rig, make):  # noqa: F811
    models = ("xm540-w270",) * 5 + ("xl430-w250", "xm430-w350")
    rig.bus.servos[8].set(0, 2, 1060)
    driver = make(models=models)
    driver.connect()
    assert not driver.capabilities.effort and driver.read().effort is None
    assert driver.capabilities.gripper_force


@pytest.mark.parametrize(
    "settings", [{"models": ("ax-12a",) * 7}, {"shadows": ((3, 30),)}, {"shadows": ((6, 2),)}, {"watchdog": 5.0}]
)
def test_settings_of_these_servos_that_make_no_sense_are_refused(make, settings):  # noqa: F811
    with pytest.raises(DriverError, match="expected"):
        make(**settings)
