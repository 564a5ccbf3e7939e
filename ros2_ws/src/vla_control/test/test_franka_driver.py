"""The driver "franka" against doubles of franky's two classes that speak to the arm: what the contract does not say."""

import threading
import time

import numpy as np
import pytest

franky = pytest.importorskip("franky")

from driver_rig import move, target, until  # noqa: E402
from rig_franka import FrankaRig  # noqa: E402
from vla_control.drivers import ArmTarget, DriverError, load_driver  # noqa: E402

#: The emulated device keeps real time.
pytestmark = pytest.mark.slow


@pytest.fixture
def rig():
    made = FrankaRig()
    yield made
    made.close()


@pytest.fixture
def driver(rig):
    made = load_driver("franka", rig.config(), rig.time)
    yield made
    made.close()


def test_the_arm_is_under_impedance_with_a_streaming_reference(rig, driver):
    driver.connect()
    motion = rig.arm.motion
    assert isinstance(motion, franky.JointImpedanceTrackingMotion)
    np.testing.assert_allclose(motion.get_gains().stiffness, driver.config.stiffness)
    move(rig, driver)
    assert rig.arm.motion is motion, "no target replaces the motion"
    driver.send(ArmTarget(rig.position(), np.full(7, 0.25)))
    until(lambda: np.allclose(motion.get_reference().dq, 0.25))


def test_effort_and_wrench_are_the_arms(rig, driver):
    driver.connect()
    state = driver.read()
    np.testing.assert_allclose(state.effort, np.arange(7.0))
    np.testing.assert_allclose(state.wrench, [1.0, 2.0, 3.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    "error", ["cartesian_reflex", "joint_velocity_violation", "communication_constraints_violation"]
)
def test_a_reflex_halts_the_arm_until_connect_clears_it(rig, driver, error):
    driver.connect()
    move(rig, driver)
    rig.arm.reflex(error)
    until(lambda: error in driver.read().halted)
    with pytest.raises(DriverError, match=f"arm left: franka 172.16.0.2: expected an arm that follows.*{error}"):
        driver.send(target(rig.position()))
    at = rig.position()
    rig.wait(0.2)
    np.testing.assert_allclose(rig.position(), at)
    assert rig.arm.mode == franky.RobotMode.Reflex, "nothing recovers without connect"
    driver.connect()
    np.testing.assert_allclose(rig.position(), at)
    move(rig, driver)
    np.testing.assert_allclose(rig.position(), at + 0.1, atol=0.01)


def test_a_target_far_away_is_a_reflex_not_a_motion(rig, driver):
    driver.connect()
    at = rig.position()
    driver.send(target(at + 1.0))
    until(lambda: "joint_velocity_violation" in driver.read().halted)
    np.testing.assert_allclose(rig.position(), at)


def test_errors_that_stay_refuse_the_connection(rig, driver):
    rig.arm.reflex("power_limit_violation")
    rig.arm.stubborn = True
    with pytest.raises(DriverError, match="errors that cannot be cleared.*power_limit_violation"):
        driver.connect()
    rig.arm.stubborn = False
    driver.connect()


def test_the_user_stop_halts_and_must_be_released(rig, driver):
    driver.connect()
    rig.arm.press()
    until(lambda: "User Stop" in driver.read().halted)
    with pytest.raises(DriverError, match="user stop"):
        driver.connect()
    rig.arm.press(False)
    driver.connect()
    move(rig, driver)


def test_an_arm_guided_by_hand_is_refused(rig, driver):
    rig.arm.mode = franky.RobotMode.Guiding
    with pytest.raises(DriverError, match="guided by hand"):
        driver.connect()


def test_a_host_that_is_cut_off_leaves_an_arm_that_stands(rig, driver):
    driver.connect()
    at = rig.position()
    driver.send(target(at + 0.4))
    rig.wait(0.1)
    rig.cut()
    rig.wait(0.05)
    stood = rig.position()
    assert not np.allclose(stood, at)
    rig.wait(0.5)
    np.testing.assert_allclose(rig.position(), stood)
    assert rig.arm.errors == '["communication_constraints_violation"]'
    with pytest.raises(DriverError, match="[Tt]imeout|found none for"):
        driver.read()
    rig.mend()
    driver.connect()
    np.testing.assert_allclose(rig.position(), stood)


def test_another_client_of_the_arm_is_one_clear_error(rig, driver):
    other = franky.Robot("172.16.0.2")
    with pytest.raises(DriverError, match="another client"):
        driver.connect()
    del other
    driver.connect()


def test_a_call_that_blocks_holds_up_nobody(rig, driver):
    driver.connect()
    rig.arm.block = 0.3
    rig.wait(0.1)
    for _ in range(10):
        begin = time.perf_counter()
        driver.read()
        driver.send(target(rig.position()))
        assert time.perf_counter() - begin < 0.2
        rig.wait(0.02)


def test_a_state_that_stands_still_is_an_error(rig):
    driver = load_driver("franka", {**rig.config(), "stale": 0.3}, rig.time)
    driver.connect()
    rig.arm.block = 2.0
    rig.wait(0.6)
    with pytest.raises(DriverError, match="expected a state every 0.001 s, found none for"):
        driver.read()
    rig.arm.block = 0.0
    driver.close()


def test_a_stop_of_category_0_ends_the_control_loop(rig, driver):
    driver.connect()
    assert driver.stop(0) == 2
    until(lambda: rig.arm.motion is None)
    assert rig.arm.mode == franky.RobotMode.Idle
    assert driver.read().halted == "stopped, category 2"


def test_the_hand_grips_with_force_when_it_closes_and_keeps_its_grip_in_a_stop(rig, driver):
    driver.connect()
    rig.arm.object = 0.03
    driver.send(target(rig.position(), 0.0))
    until(lambda: rig.arm.gripped and abs(driver.read().gripper - 0.03 / 0.08) < 0.01)
    driver.stop(2)
    rig.wait(0.2)
    assert rig.arm.gripped and rig.arm.width == pytest.approx(0.03, abs=1e-3)
    driver.connect()
    rig.wait(0.3)
    assert rig.arm.gripped, "connecting does not move the hand"
    driver.send(target(rig.position(), 1.0))
    until(lambda: driver.read().gripper > 0.98)
    assert not rig.arm.gripped


def test_a_hand_that_is_not_homed_is_refused(rig, driver):
    rig.arm.widest = 0.0
    with pytest.raises(DriverError, match="not homed"):
        driver.connect()


def test_threads_end_with_close(rig, driver):
    before = {thread.name for thread in threading.enumerate()}
    driver.connect()
    assert {"left franka", "left franka gripper"} <= {thread.name for thread in threading.enumerate()}
    driver.close()
    assert {thread.name for thread in threading.enumerate()} <= before
    assert rig.arm.motion is None


def test_an_arm_of_another_size_is_refused():
    with pytest.raises(DriverError, match="expected 7 joints and stiffnesses, found 6 and 7"):
        load_driver("franka", {"joints": list("abcdef"), "address": "x"})


def test_a_connection_that_comes_up_too_late_is_given_back(rig):
    driver = load_driver("franka", {**rig.config(), "patience": 1.0}, rig.time)
    made, gates, waiting = franky.Robot, [threading.Event(), threading.Event()], []

    class Late(made):
        def __init__(self, *arguments, **keywords):
            gate = gates[len(waiting)]
            waiting.append(gate)
            gate.wait(30.0)
            super().__init__(*arguments, **keywords)

    franky.Robot = Late
    with pytest.raises(DriverError, match="expected an arm that answers at FCI, found: no end after 1 s"):
        driver.connect()
    again = threading.Thread(target=driver.connect)
    again.start()
    until(lambda: len(waiting) == 2)
    gates[0].set()
    until(lambda: rig.arm.client is not None and rig.arm.client() is None)
    gates[1].set()
    again.join()
    move(rig, driver)
    driver.close()


def test_a_thread_late_from_the_connection_before_does_not_spoil_the_next(rig):
    driver = load_driver("franka", {**rig.config(), "patience": 0.5}, rig.time)
    driver.connect()
    let_go, stuck = threading.Event(), threading.Event()
    old = rig.arm.client()

    def hangs():
        stuck.set()
        let_go.wait(30.0)
        raise franky.NetworkException("libfranka: UDP receive: Timeout")

    old.poll_motion = hangs
    assert stuck.wait(5.0)
    driver.close()
    rig.arm.client = None  # the arm has given the dead connection up
    driver.connect()
    let_go.set()
    rig.wait(0.3)
    assert driver.read().halted == ""
    move(rig, driver)
    driver.close()
