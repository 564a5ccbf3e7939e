"""Motion made from the operator's input: limits, the other arm, the deadman, the gripper."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vla_core.robot import load_robot
from vla_teleop.devices import TeleopInput
from vla_teleop.teleoperation import RELEASE_TIME, SPEEDS, Teleoperation

PANDA, ALOHA = load_robot("panda"), load_robot("aloha")
PERIOD = 0.01


def held(*twist: float) -> TeleopInput:
    return TeleopInput(np.array(twist), True)


def test_full_deflection_is_the_speed_set():
    motion = Teleoperation(PANDA, speed=0.5).motion(held(1, 0, 0, 0, 0, -1), PERIOD, 0.0)
    limits = PANDA.arms[0].tool_limits
    expected = [0.5 * limits.speed * PERIOD, 0, 0, 0, 0, -0.5 * limits.rotation * PERIOD]
    np.testing.assert_allclose(motion.arms["arm"].delta, expected)
    assert np.isnan(motion.arms["arm"].gripper)


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6), st.sampled_from(SPEEDS))
def test_no_input_exceeds_the_tools_limits(twist, speed):
    delta = Teleoperation(PANDA, speed=speed).motion(held(*twist), PERIOD, 0.0).arms["arm"].delta
    limits = PANDA.arms[0].tool_limits
    assert np.linalg.norm(delta[:3]) <= limits.speed * PERIOD * (1 + 1e-9)
    assert np.linalg.norm(delta[3:]) <= limits.rotation * PERIOD * (1 + 1e-9)


def test_the_other_arm_gets_no_motion():
    teleoperation = Teleoperation(ALOHA)
    first, second = ALOHA.arm_names
    motion = teleoperation.motion(held(1, 0, 0, 0, 0, 0), PERIOD, 0.0)
    assert motion.arms[first].delta.any() and not motion.arms[second].delta.any()
    teleoperation.press("next_arm", {})
    motion = teleoperation.motion(held(1, 0, 0, 0, 0, 0), PERIOD, 0.0)
    assert motion.arms[second].delta.any() and not motion.arms[first].delta.any()


def test_before_the_first_press_there_is_no_command():
    assert Teleoperation(PANDA).motion(TeleopInput(), PERIOD, 0.0) is None


def test_letting_go_holds_and_then_falls_silent():
    teleoperation = Teleoperation(PANDA)
    teleoperation.motion(held(1, 0, 0, 0, 0, 0), PERIOD, 0.0)
    assert teleoperation.motion(TeleopInput(), PERIOD, 0.01).hold
    assert teleoperation.motion(TeleopInput(), PERIOD, RELEASE_TIME + 0.01) is None


def test_the_gripper_button_turns_the_target_over_without_motion():
    teleoperation = Teleoperation(PANDA)
    press = TeleopInput(buttons=("gripper",))
    teleoperation.press("gripper", {"arm": 1.0})
    motion = teleoperation.motion(press, PERIOD, 0.0)
    assert motion.arms["arm"].gripper == 0.0 and not motion.arms["arm"].delta.any() and not motion.hold
    teleoperation.press("gripper", {"arm": 1.0})
    assert teleoperation.motion(press, PERIOD, 0.1).arms["arm"].gripper == 1.0


def test_speed_steps_stay_in_their_range():
    teleoperation = Teleoperation(PANDA)
    for _ in range(20):
        teleoperation.press("faster", {})
    assert teleoperation.speed == SPEEDS[-1]
    for _ in range(20):
        teleoperation.press("slower", {})
    assert teleoperation.speed == SPEEDS[0]


@pytest.mark.parametrize("speed", [0.0, -1.0, 1.5, float("nan")])
def test_a_speed_that_makes_no_sense_is_refused(speed):
    with pytest.raises(ValueError, match="expected a fraction"):
        Teleoperation(PANDA, speed=speed)
