"""The driver "mujoco": that its physics are the model's."""

import numpy as np
import pinocchio as pin
import pytest
from rig_mujoco import MujocoRig
from vla_control.drivers import ArmTarget, DriverError, load_driver


def connected(robot="panda", **settings):
    rig = MujocoRig(robot, **settings)
    rig.made = driver = load_driver("mujoco", rig.config(), rig.time)
    driver.connect()
    return rig, driver


def run(rig, driver, goal, duration, speed=0.5):
    """Joints go to `goal` as a controller sends them; returns the states."""
    states, at, period = [], driver.read().position, driver.arm.period
    for _ in range(round(duration / period)):
        step = np.clip(goal - at, -speed * period, speed * period)
        at = at + step
        driver.send(ArmTarget(at, step / period))
        rig.now += period
        states.append(driver.read())
    return states


def test_without_compensation_the_servos_carry_the_arms_weight():
    rig, driver = connected(gravity_compensation=False)
    state = run(rig, driver, rig.arm.home, 2.0)[-1]
    model = pin.buildModelFromUrdf(str(rig.robot.parts[0].file))
    q = pin.neutral(model)
    q[[model.joints[model.getJointId(name)].idx_q for name in rig.arm.joints]] = state.position
    q[[model.joints[model.getJointId(f.name)].idx_q for f in rig.arm.gripper.joints]] = 0.04
    weight = pin.computeGeneralizedGravity(model, model.createData(), q)[:7]
    assert np.abs(weight).max() > 10.0
    np.testing.assert_allclose(state.effort, weight, atol=0.05)
    assert 1e-3 < np.abs(state.position - rig.arm.home).max() < 0.02, "it sags a little, as servos do"


def test_with_compensation_nothing_sags():
    rig, driver = connected()
    state = run(rig, driver, rig.arm.home, 1.0)[-1]
    np.testing.assert_allclose(state.position, rig.arm.home, atol=1e-9)
    np.testing.assert_allclose(state.effort, 0.0, atol=1e-6)


def test_the_servos_lag_behind_and_give_no_more_than_their_effort():
    rig, driver = connected()
    states = run(rig, driver, rig.arm.home + 0.4, 1.2)
    lags = [np.abs(state.position - rig.arm.home).max() for state in states[:5]]
    assert lags[0] < 0.5 * 0.01, "no jump"
    limit = np.array([87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0])
    assert all((np.abs(state.effort) <= limit + 1e-9).all() for state in states)
    assert np.abs(np.array([state.velocity for state in states])).max() == pytest.approx(0.5, abs=0.25)
    np.testing.assert_allclose(states[-1].position, rig.arm.home + 0.4, atol=1e-3)


@pytest.mark.parametrize(("category", "power"), [(2, True), (1, False), (0, False)])
def test_power_goes_as_the_stop_says_and_the_brakes_hold(category, power):
    rig, driver = connected(gravity_compensation=False)
    run(rig, driver, rig.arm.home + 0.5, 0.5)
    assert np.abs(driver.read().velocity).max() > 0.2
    assert driver.stop(category) == category
    began = driver.read().position
    rig.wait(1.0)
    state = driver.read()
    assert np.abs(state.position - began).max() < (1e-12 if category == 0 else 0.1)
    assert np.any(state.effort) == power and not np.abs(state.velocity).max() > 0.01
    driver.connect()
    rig.wait(0.5)
    assert np.abs(driver.read().position - state.position).max() < 0.02


def test_each_arm_of_a_pair_is_its_own():
    rig, driver = connected("aloha")
    other = load_driver("mujoco", {**rig.config(), "name": "right", "joints": rig.robot.arms[1].joints}, rig.time)
    other.connect()
    run(rig, driver, rig.arm.home + 0.2, 1.0)
    np.testing.assert_allclose(driver.read().position, rig.arm.home + 0.2, atol=1e-2)
    np.testing.assert_allclose(other.read().position, rig.robot.arms[1].home, atol=1e-9)


def test_an_arm_without_its_description_is_refused():
    with pytest.raises(DriverError, match="arm arm: mujoco: expected a robot description with this arm"):
        load_driver("mujoco", {"joints": ["a"]})
    rig = MujocoRig()
    with pytest.raises(DriverError, match="expected 7 positions to start from, found \\[1.0\\]"):
        load_driver("mujoco", {**rig.config(), "start": (1.0,)})
