"""What arms of serial servos do when the bus, the power or a servo fails: Dynamixel and Feetech alike."""

import threading

import numpy as np
import pytest
from driver_rig import target, until
from rig_dynamixel import DynamixelRig
from rig_feetech import FeetechRig
from servo_emulator import SYNC_WRITE, WRITE
from vla_control.drivers import DriverError, load_driver

#: The emulated device keeps real time.
pytestmark = pytest.mark.slow

TICK = 2 * np.pi / 4096


@pytest.fixture(params=[DynamixelRig, FeetechRig])
def rig(request):
    made = request.param()
    yield made
    made.close()


@pytest.fixture
def make(rig):
    """Makes a driver, with settings of its own."""
    drivers = []

    def make(**settings):
        drivers.append(load_driver(rig.driver, {**rig.config(), **settings}, rig.time))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.close()


def drive(rig, driver, goal, duration):
    at = driver.read().position
    for _ in range(int(duration / driver.arm.period)):
        at = at + np.clip(goal - at, -0.5 * driver.arm.period, 0.5 * driver.arm.period)
        driver.send(target(at))
        rig.wait(driver.arm.period)
        state = driver.read()
        assert np.abs(state.position - at).max() < 0.5, "a spoilt reply became a state"


def writes(rig):
    return [entry for entry in rig.bus.log if entry[1] in (WRITE, SYNC_WRITE)]


@pytest.mark.parametrize("fault", ["lost", "late", "spoilt", "half"])
def test_one_bad_reply_now_and_then_is_asked_for_again(rig, make, fault):
    driver = make()
    driver.connect()
    start = rig.position()
    for _ in range(3):
        with rig.bus.lock:
            rig.bus.faults += ["", "", fault]
        drive(rig, driver, start + 0.3, 0.3)
    drive(rig, driver, start + 0.3, 0.6)
    assert driver.lost >= 1 or not rig.bus.faults
    assert not driver.read().halted
    np.testing.assert_allclose(rig.position(), start + 0.3, atol=0.01)


@pytest.mark.parametrize("fault", ["lost", "late", "spoilt", "half"])
def test_bad_replies_only_are_one_error_and_connecting_again_works(rig, make, fault):
    driver = make()
    driver.connect()
    with rig.bus.lock:
        rig.bus.faults += [fault] * 10000
    with pytest.raises(DriverError, match=f"arm {driver.arm.name}: .* on {rig.bus.path}: servo 1: expected"):
        until(lambda: driver.read() is None)
    with pytest.raises(DriverError):
        driver.send(target(rig.position()))
    with pytest.raises(DriverError, match="servo 1"):
        driver.connect()
    with rig.bus.lock:
        rig.bus.faults.clear()
    before = rig.position()
    driver.connect()
    drive(rig, driver, before + 0.1, 0.6)
    np.testing.assert_allclose(rig.position(), before + 0.1, atol=0.01)


def test_power_lost_is_one_error_and_its_return_moves_nothing(rig, make):
    driver = make()
    driver.connect()
    drive(rig, driver, rig.position() + 0.1, 0.3)
    rig.bus.power = False
    with pytest.raises(DriverError, match="there is no status packet"):
        until(lambda: driver.read() is None)
    assert driver.stop(0) == 0
    with pytest.raises(DriverError, match="servo 1: expected"):
        driver.connect()
    rig.bus.cycle_power()
    rig.bus.power = True
    before = rig.position()
    driver.connect()
    rig.wait(0.2)
    np.testing.assert_allclose(rig.position(), before, atol=TICK)
    drive(rig, driver, before - 0.1, 0.6)
    np.testing.assert_allclose(rig.position(), before - 0.1, atol=0.01)


def test_a_dip_of_the_power_is_noticed(rig, make):
    driver = make()
    driver.connect()
    rig.bus.cycle_power()
    until(lambda: "torque is off: its power was lost" in driver.read().halted)
    with pytest.raises(DriverError, match="expected an arm that follows, found: servo"):
        driver.send(target(rig.position()))
    driver.connect()
    assert driver.read().halted == ""


def test_an_overload_stops_the_arm_and_connecting_ends_it(rig, make):
    driver = make()
    driver.connect()
    start = rig.position()
    with pytest.raises(DriverError, match="found: servo 4: .*overload"):
        for i in range(200):
            if i == 10:
                with rig.bus.lock:
                    rig.bus.servos[4].stuck = True
                    rig.bus.servos[4].overload()
            driver.send(target(start + 0.01 * i))
            rig.wait(driver.arm.period)
    assert "servo 4" in driver.read().halted
    rig.wait(0.2)
    at = rig.position()
    rig.wait(0.3)
    np.testing.assert_allclose(rig.position(), at, atol=TICK)
    rig.bus.servos[4].stuck = False
    driver.connect()
    rig.wait(0.2)
    np.testing.assert_allclose(rig.position(), at, atol=TICK)
    assert driver.read().halted == ""


def test_a_servo_that_is_no_longer_there_is_named(rig, make):
    driver = make()
    driver.connect()
    with rig.bus.lock:
        del rig.bus.servos[5 if rig.driver == "feetech" else 7]
    with pytest.raises(DriverError, match="servo [57]: expected"):
        until(lambda: driver.read() is None)


def test_another_model_is_refused_before_anything_is_written(rig, make):
    driver = make()
    servo = rig.bus.servos[2]
    servo.set(3 if rig.driver == "feetech" else 0, 2, 1234)
    with pytest.raises(DriverError, match="servo 2: expected an? .*, number .*, found 1234"):
        driver.connect()
    assert not writes(rig)


def test_torque_comes_after_the_goal_and_nothing_is_written_twice_else(rig, make):
    driver = make()
    torque, goal = (40, 42) if rig.driver == "feetech" else (64, 116)
    driver.connect()
    order = [parameters[0] for _, instruction, parameters in rig.bus.log if instruction == SYNC_WRITE]
    assert order.index(goal) < order.index(torque)
    assert not rig.moved_by_commands()


def test_a_second_program_is_kept_out(rig, make):
    make().connect()
    with pytest.raises(DriverError, match="expected a serial port, found"):
        make().connect()


def test_a_port_that_is_not_there_is_named(make):
    with pytest.raises(DriverError, match="/dev/not_there: expected a serial port, found"):
        make(port="/dev/not_there").connect()


def test_a_leader_is_read_and_never_written_to(rig, make):
    driver = make(leader=True)
    driver.connect()
    assert driver.capabilities.stops == {0} and not driver.capabilities.gripper_force
    rig.place(rig.position() + 0.3)
    rig.wait(0.2)
    state = driver.read()
    np.testing.assert_allclose(state.position, rig.position(), atol=2 * TICK)
    assert state.halted == "leader: its torque is off"
    with pytest.raises(DriverError, match="leader"):
        driver.send(target(rig.position()))
    assert driver.stop(2) == 0
    driver.close()
    assert not writes(rig)


def test_a_leader_that_something_holds_is_not_dropped(rig, make):
    rig.bus.servos[3].registers[rig.bus.servos[3].torque_at] = 1
    with pytest.raises(DriverError, match="servo 3: expected a leader's torque off, found it on"):
        make(leader=True).connect()
    assert rig.bus.servos[3].torque


def test_targets_stay_in_the_range_and_may_lead_back_into_it(rig, make):
    here = np.rint(np.array(rig.zero) + np.array(rig.sign) * rig.position() / TICK).astype(int)
    low, high = (here - 100).tolist(), (here + 100).tolist()
    high[0], low[0] = int(here[0]) - 10, int(here[0]) - 200  # the first joint is beyond it
    driver = make(low=low, high=high)
    driver.connect()
    start = rig.position()
    away = start.copy()
    away[0] += rig.sign[0] * 20 * TICK
    with pytest.raises(ValueError, match="target position: expected ticks from"):
        driver.send(target(away))
    away = start.copy()
    away[1] += 120 * TICK
    with pytest.raises(ValueError, match="target position: expected ticks from"):
        driver.send(target(away))
    rig.wait(0.1)
    assert not rig.moved_by_commands()
    back = start.copy()
    back[0] -= rig.sign[0] * 20 * TICK
    drive(rig, driver, back, 0.4)
    np.testing.assert_allclose(rig.position(), back, atol=2 * TICK)


@pytest.mark.parametrize(
    "settings",
    [{"ids": (1, 2)}, {"ids": (1, 1, 2, 3, 4, 5)}, {"zero": (2048,)}, {"sign": (1, 1, 1, 1, 0, 1)}, {"speed": 0.0},
     {"low": (4000,) * 6, "high": (100,) * 6}, {"gripper_open": 5, "gripper_closed": 5}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(make, settings):
    with pytest.raises(DriverError, match="expected"):
        make(**settings)


def test_a_gripper_that_grips_keeps_its_goal_when_the_arm_holds(rig, make):
    driver = make()
    driver.connect()
    gripper = rig.bus.servos[rig.gripper_id]
    gripper.stuck = True  # by what is in it
    driver.send(target(rig.position(), 0.0))
    rig.wait(0.2)
    goal = gripper.goal()
    assert driver.stop(2) == 2
    rig.wait(0.1)
    assert gripper.goal() == goal and gripper.torque


def test_category_one_stops_before_the_power_goes(rig, make):
    driver = make()
    driver.connect()
    goal = rig.position() + 0.5
    for servo in rig.ids:
        rig.bus.servos[servo].fastest = 300.0
    driver.send(target(goal))
    rig.wait(0.1)
    assert driver.stop(1) == 1
    until(lambda: not rig.powered())
    assert np.abs(driver.read().velocity).max() < 0.1
    assert np.abs(rig.position() - goal).max() > 0.2


def test_a_stop_may_be_followed_by_a_harder_one_at_once(rig, make):
    driver = make()
    driver.connect()
    driver.send(target(rig.position() + 0.3))
    assert (driver.stop(2), driver.stop(1), driver.stop(0)) == (2, 1, 0)
    until(lambda: not rig.powered())


@pytest.mark.parametrize("category", [0, 1])
def test_the_power_goes_though_no_servo_replies(rig, make, category):
    driver = make()
    driver.connect()
    with rig.bus.lock:
        rig.bus.faults += ["lost"] * 10000
    assert driver.stop(category) == category
    until(lambda: not rig.powered())


def test_the_power_of_the_others_goes_after_a_servo_is_lost(rig, make):
    driver = make()
    driver.connect()
    gripper = rig.bus.servos.pop(rig.gripper_id)
    with pytest.raises(DriverError, match=f"servo {gripper.number}: expected"):
        until(lambda: driver.read() is None)
    assert rig.powered()
    assert driver.stop(0) == 0
    until(lambda: not rig.powered())


def test_nothing_is_left_running(rig, make):
    driver = make()
    for _ in range(3):
        driver.connect()
    assert sum("servos of" in thread.name for thread in threading.enumerate()) == 1
    driver.close()
    assert not any("servos of" in thread.name for thread in threading.enumerate())
    assert rig.powered(), "a closed arm holds"
