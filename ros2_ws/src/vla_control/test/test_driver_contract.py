"""What every arm driver keeps, whatever the hardware: the same tests against each of them and its emulated device."""

import time

import numpy as np
import pytest
from driver_rig import Rig
from rig_dynamixel import DynamixelRig
from rig_feetech import FeetechRig
from rig_franka import FrankaRig
from rig_piper import PiperRig
from rig_ur import UrRig
from rig_xarm import XarmRig
from vla_control.drivers import DRIVERS, ArmTarget, DriverError, load_driver


class FakeRig(Rig):
    driver, boundary = "fake", "no device"
    joints, gripper, cuttable = 6, True, False

    def __init__(self) -> None:
        self.now, self.made = 0.0, None

    def config(self):
        return {"joints": [f"joint_{i}" for i in range(6)], "gripper": True, "start": (0.1, -0.2, 0.3, 0.0, 0.5, -0.6)}

    def time(self):
        return self.now

    def wait(self, duration):
        self.now += duration

    def position(self):
        self.made._move()
        return self.made._position.copy()

    def place(self, position):
        self.made._position = np.array(position)

    def cut(self):
        pass

    def mend(self):
        pass

    def moved_by_commands(self):
        return not np.allclose(self.made._target.position, self.position())

    def close(self):
        pass


#: Makes the rig of each driver; those of real devices are in rig_<driver>.py.
RIGS = {
    "dynamixel": DynamixelRig,
    "fake": FakeRig,
    "feetech": FeetechRig,
    "franka": FrankaRig,
    "piper": PiperRig,
    "ur": UrRig,
    "xarm": XarmRig,
}


#: Emulated devices keep real time and want their vendors' libraries.
REAL = [name if name == "fake" else pytest.param(name, marks=pytest.mark.slow) for name in sorted(RIGS)]


@pytest.fixture(params=REAL)
def rig(request):
    made = RIGS[request.param]()
    yield made
    made.close()


@pytest.fixture
def driver(rig):
    made = load_driver(rig.driver, rig.config(), rig.time)
    if isinstance(rig, FakeRig):
        rig.made = made
    yield made
    made.close()


def target(position, opening=None) -> ArmTarget:
    return ArmTarget(np.asarray(position, float), np.zeros(len(position)), opening)


def drive(rig, driver, goal, duration=2.0, opening=None) -> None:
    """Send targets on the way to `goal` as a controller does: one a period, at 0.5 rad/s at most."""
    period = driver.arm.period
    at = driver.read().position
    for _ in range(int(duration / period)):
        at = at + np.clip(goal - at, -0.5 * period, 0.5 * period)
        driver.send(target(at, opening))
        rig.wait(period)
        driver.read()


def test_there_is_a_rig_for_every_driver():
    assert set(RIGS) == set(DRIVERS)


def test_connecting_moves_nothing(rig, driver):
    before = rig.position()
    driver.connect()
    rig.wait(0.3)
    np.testing.assert_allclose(rig.position(), before, atol=2 * rig.resolution)
    assert not rig.moved_by_commands()


def test_the_state_is_the_devices(rig, driver):
    driver.connect()
    rig.wait(0.1)
    begin = rig.time()
    state = driver.read()
    np.testing.assert_allclose(state.position, rig.position(), atol=2 * rig.resolution)
    assert state.velocity.shape == (rig.joints,) and np.isfinite(state.velocity).all()
    assert begin - 0.2 <= state.stamp <= rig.time() and state.halted == ""
    assert (state.effort is not None) == driver.capabilities.effort
    assert (state.wrench is not None) == driver.capabilities.wrench
    assert (state.gripper is not None) == driver.capabilities.gripper == rig.gripper


def test_the_arm_follows_targets(rig, driver):
    driver.connect()
    goal = rig.position() + 0.2 * np.where(np.arange(rig.joints) % 2, -1, 1)
    drive(rig, driver, goal)
    np.testing.assert_allclose(rig.position(), goal, atol=max(0.01, 3 * rig.resolution))
    np.testing.assert_allclose(driver.read().position, goal, atol=max(0.01, 3 * rig.resolution))


def test_the_gripper_follows_its_opening(rig, driver):
    if not rig.gripper:
        pytest.skip("has no gripper")
    driver.connect()
    for opening in (0.2, 0.9):
        drive(rig, driver, rig.position(), opening=opening)
        assert driver.read().gripper == pytest.approx(opening, abs=0.03)


@pytest.mark.parametrize("fault", ["nan", "inf", "short", "opening"])
def test_a_target_that_is_not_sound_is_not_sent(rig, driver, fault):
    driver.connect()
    wrong = rig.position() + 0.3
    opening = None
    if fault == "short":
        wrong = wrong[:-1]
    elif fault == "opening":
        opening = 1.5
    else:
        wrong[0] = float(fault)
    with pytest.raises(ValueError, match="expected"):
        driver.send(target(wrong, opening))
    rig.wait(0.2)
    assert not rig.moved_by_commands()


@pytest.mark.parametrize("category", [2, 1, 0])
def test_a_stop_ends_the_motion_until_connect(rig, driver, category):
    driver.connect()
    drive(rig, driver, rig.position() + 0.5, duration=0.3)
    done = driver.stop(category)
    assert done in driver.capabilities.stops
    assert done <= category or done == min(driver.capabilities.stops)
    with pytest.raises(DriverError):
        driver.send(target(rig.position()))
    rig.wait(0.3)
    at = rig.position()
    rig.wait(0.5)
    np.testing.assert_allclose(rig.position(), at, atol=2 * rig.resolution)
    if rig.powered() is not None:
        assert rig.powered() == (done == 2)
    driver.connect()
    rig.wait(0.2)
    np.testing.assert_allclose(rig.position(), at, atol=2 * rig.resolution)
    drive(rig, driver, at + 0.1, duration=0.5)
    np.testing.assert_allclose(rig.position(), at + 0.1, atol=max(0.01, 3 * rig.resolution))


def test_an_arm_moved_by_hand_stays_where_it_was_put(rig, driver):
    driver.connect()
    drive(rig, driver, rig.position() + 0.1, duration=0.5)
    driver.stop(2)
    driver.close()
    rig.place(rig.position() - 0.4)
    put = rig.position()
    driver.connect()
    rig.wait(0.5)
    np.testing.assert_allclose(rig.position(), put, atol=2 * rig.resolution)


def test_a_pulled_cable_is_one_clear_error_and_connecting_again_works(rig, driver):
    if not rig.cuttable:
        pytest.skip("has no cable")
    driver.connect()
    rig.wait(0.1)
    rig.cut()
    with pytest.raises(DriverError, match=driver.arm.name):
        for _ in range(200):
            driver.send(target(driver.read().position))
            rig.wait(driver.arm.period)
    driver.stop(0)
    driver.close()
    with pytest.raises(DriverError, match=driver.arm.name):
        driver.connect()
    rig.mend()
    before = rig.position()
    driver.connect()
    rig.wait(0.2)
    np.testing.assert_allclose(rig.position(), before, atol=2 * rig.resolution)
    drive(rig, driver, before + 0.1, duration=0.5)
    np.testing.assert_allclose(rig.position(), before + 0.1, atol=max(0.01, 3 * rig.resolution))


def test_reading_and_sending_do_not_wait(rig, driver):
    driver.connect()
    rig.wait(0.1)
    waits = []
    for _ in range(50):
        begin = time.perf_counter()
        driver.send(target(driver.read().position))
        waits.append(time.perf_counter() - begin)
        rig.wait(driver.arm.period)
    # A period is 10 ms to 33 ms; what a vendor's call may block, 190 ms, would show in every one.
    assert np.median(waits) < 0.1


def test_closing_twice_and_before_connecting_is_fine(driver):
    driver.close()
    driver.connect()
    driver.close()
    driver.close()
    with pytest.raises(DriverError):
        driver.read()


def test_settings_that_are_not_known_are_refused():
    with pytest.raises(DriverError, match="expected one of .*found 'hand'"):
        load_driver("hand", {})
    with pytest.raises(DriverError, match="expected the settings joints.*found \\['joints', 'sped'\\]"):
        load_driver("fake", {"joints": ["a"], "sped": 1.0})
