"""What only Feetech servos do."""

import numpy as np
import pytest
from rig_feetech import FeetechRig
from servo_emulator import FeetechBus
from test_servo_bus import TICK, drive, make, target  # noqa: F401
from vla_control.drivers import DriverError

#: The emulated device keeps real time.
pytestmark = pytest.mark.slow


@pytest.fixture
def rig():
    made = FeetechRig()
    yield made
    made.close()


def test_the_emulated_packets_are_those_of_the_manual():
    # SCS protocol, status packet of ID 1 without an error.
    status = FeetechBus.reply(None, type("One", (), {"number": 1}), 0)
    assert status == bytes.fromhex("FFFF010200FC")


@pytest.mark.parametrize("phase", [12, 8])
def test_velocity_has_the_unit_that_the_phase_says(rig, make, phase):  # noqa: F811
    for servo in rig.bus.servos.values():
        servo.registers[18] = phase
    driver = make(speed=0.6)
    driver.connect()
    start = rig.position()
    driver.send(target(start - 0.5))
    rig.wait(0.4)
    unit = TICK * (1 if phase & 4 else 50)
    np.testing.assert_allclose(driver.read().velocity, np.full(5, -0.6), atol=max(0.01, unit))
    rig.wait(1.0)
    np.testing.assert_allclose(rig.position(), start - 0.5, atol=2 * TICK)


@pytest.mark.parametrize(
    "register, value, error",
    [(18, 28, "servo 3: expected a phase without turns counted, bit 4, found 28"),
     (33, 1, "servo 3: expected position mode, 0, found 1")],
)  # fmt: skip
def test_a_servo_that_is_set_up_otherwise_is_refused(rig, make, register, value, error):  # noqa: F811
    rig.bus.servos[3].registers[register] = value
    with pytest.raises(DriverError, match=error):
        make().connect()
    assert not any(servo.torque for servo in rig.bus.servos.values())


def test_without_a_watchdog_a_cut_off_arm_ends_at_its_last_goal(rig, make):  # noqa: F811
    driver = make()
    driver.connect()
    start = rig.position()
    drive(rig, driver, start + 0.2, 0.2)
    rig.cut()
    rig.wait(0.5)
    assert np.abs(rig.position() - start).max() < 0.2 and rig.powered()


def test_current_and_gripper_torque(rig, make):  # noqa: F811
    driver = make(gripper_torque=0.4)
    driver.connect()
    rig.wait(0.1)
    np.testing.assert_allclose(driver.read().effort, -12 * 0.0065 * np.array(rig.sign))
    assert rig.bus.servos[6].get(48, 2) == 400
    with pytest.raises(DriverError, match="expected a gripper_torque of 0 to 1"):
        make(gripper_torque=1.5)
