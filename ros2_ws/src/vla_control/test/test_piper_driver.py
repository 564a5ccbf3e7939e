"""The driver of AgileX Piper against an emulated arm on python-can's virtual bus, and its frames against piper_sdk."""

import threading

import numpy as np
import pytest

can = pytest.importorskip("can")
from driver_rig import target, until  # noqa: E402
from rig_piper import PiperRig  # noqa: E402
from vla_control.drivers import DriverError, load_driver  # noqa: E402

#: The emulated device keeps real time.
pytestmark = pytest.mark.slow


@pytest.fixture
def rig():
    made = PiperRig()
    yield made
    made.close()


@pytest.fixture
def driver(rig):
    made = load_driver("piper", rig.config(), rig.time)
    yield made
    made.close()


def halted(driver) -> str:
    until(lambda: driver.read().halted)
    return driver.read().halted


def ids(rig) -> list:
    return [identifier for identifier, _ in rig.arm.seen]


def test_the_target_is_where_the_arm_is_before_torque_and_can_control(rig, driver):
    driver.connect()
    seen = ids(rig)
    assert max(map(seen.index, (0x155, 0x156, 0x157))) < min(seen.index(0x151), seen.index(0x471))
    assert 0x150 not in seen and rig.arm.powered()


def test_an_arm_that_takes_targets_only_under_can_control_does_not_go_to_its_old_ones(rig, driver):
    # Its old ones are zeros, 0.9 rad away.
    rig.arm.strict = True
    before = rig.position()
    driver.connect()
    rig.wait(0.3)
    np.testing.assert_allclose(rig.position(), before, atol=2e-3)
    goal = before + 0.1
    driver.send(target(goal))
    rig.wait(0.1)
    np.testing.assert_allclose(rig.position(), goal, atol=2 * rig.resolution)


def test_an_arm_that_still_moves_to_an_old_target_stops_there(rig, driver):
    driver.connect()
    driver.send(target(rig.position() + 1.0))
    rig.wait(0.1)
    driver.connect()
    at = rig.position()
    rig.wait(0.3)
    np.testing.assert_allclose(rig.position(), at, atol=2 * rig.resolution)


def test_without_frames_the_arm_goes_to_its_last_target_and_stays(rig, driver):
    # No watchdog in the hardware: what is sent has to be near, and stop has to send where to stay.
    driver.connect()
    goal = rig.position() + 0.2
    driver.send(target(goal))
    rig.wait(0.02)
    rig.cut()
    rig.wait(0.5)
    np.testing.assert_allclose(rig.position(), goal, atol=2 * rig.resolution)


def test_velocity_and_torque_have_their_units_and_signs(rig):
    config = dict(rig.config(), sign=(1, -1, 1, 1, 1, -1), zero=(0.0, 0.5, 0.0, 0.0, 0.0, 0.0))
    driver = load_driver("piper", config, rig.time)
    try:
        driver.connect()
        state = driver.read()
        true = rig.position()
        np.testing.assert_allclose(state.position[[1, 5]], [-(true[1] - 0.5), -true[5]], atol=2 * rig.resolution)
        # Amperes times the maker's coefficient of each joint.
        np.testing.assert_allclose(state.effort[[0, 1, 5]], [-0.2 * 1.18125, 0.1 * 1.18125, -0.3 * 0.95844])
        goal = state.position + np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
        driver.send(target(goal))
        until(lambda: driver.read().velocity[1] > 1.0)
        rig.wait(1.0)
        np.testing.assert_allclose(driver.read().position, goal, atol=2 * rig.resolution)
    finally:
        driver.close()


def test_the_gripper_has_a_largest_torque_and_keeps_what_it_holds(rig):
    driver = load_driver("piper", dict(rig.config(), gripper_torque=0.6), rig.time)
    try:
        driver.connect()
        rig.wait(0.05)
        assert (rig.arm.force, rig.arm.goal_stroke) == (600, 30000)
        driver.send(target(driver.read().position, 0.1))
        rig.wait(0.3)
        assert (rig.arm.force, rig.arm.goal_stroke) == (600, 7000)
        driver.stop(2)
        rig.wait(0.1)
        assert rig.arm.goal_stroke == 7000 and rig.arm.state_gripper >> 6 & 1
    finally:
        driver.close()


def test_a_controlled_stop_comes_to_rest_before_the_emergency_stop(rig, driver):
    driver.connect()
    rig.arm.seen.clear()
    driver.send(target(rig.position() + 0.5))
    rig.wait(0.1)
    assert driver.stop(1) == 1
    driver.close()
    rig.wait(0.05)
    seen = ids(rig)
    assert seen[-1] == 0x150 and seen.count(0x155) == 2 and rig.arm.status == 1


@pytest.mark.parametrize(("bit", "words"), [(0, "voltage too low"), (1, "motor too hot"), (2, "current too high"),
                                            (3, "drive too hot"), (4, "collision"), (5, "drive in error"),
                                            (7, "stalled")])  # fmt: skip
def test_a_fault_of_a_drive_is_named_and_the_arm_is_not_driven_on(rig, driver, bit, words):
    driver.connect()
    rig.arm.state[2] |= 1 << bit
    assert halted(driver) == f"joint3: {words}"
    with pytest.raises(DriverError, match=f"left: piper on virtual {rig.channel}: expected .*joint3: {words}"):
        driver.send(target(rig.position()))
    rig.arm.state[2] = 1 << 6
    rig.wait(0.1)
    # It stays so until connect, also when the fault is gone.
    assert words in driver.read().halted
    with pytest.raises(DriverError, match=words):
        driver.send(target(rig.position()))
    driver.connect()
    assert driver.read().halted == ""


def test_a_drive_in_error_is_cleared_by_connect_but_not_one_that_is_too_hot(rig, driver):
    rig.arm.state[4] |= 1 << 5
    driver.connect()
    assert driver.read().halted == ""
    driver.close()
    rig.arm.state[4] |= 1 << 1
    with pytest.raises(DriverError, match="can be enabled, found .*joint5: motor too hot"):
        driver.connect()
    rig.arm.state[4] &= ~(1 << 1)
    driver.connect()


def test_a_drive_that_cannot_be_enabled(rig, driver):
    before = rig.position()
    rig.arm.enables[3] = False
    with pytest.raises(DriverError, match="expected an arm that can be enabled, found joint4: torque is off$"):
        driver.connect()
    np.testing.assert_allclose(rig.position(), before, atol=2 * rig.resolution)
    rig.arm.enables[3] = True
    driver.connect()


@pytest.mark.parametrize(("change", "words"), [
    ({"status": 1}, "emergency stop"), ({"status": 7}, "collision"), ({"status": 0x20}, "code 0x20"),
    ({"control": 0}, "standby"), ({"control": 2}, "teach mode"), ({"control": 3}, "Ethernet control"),
    ({"control": 5}, "remote control"), ({"move": 0}, "move mode 0"), ({"errors": (2, 0)}, "joint2: beyond its limit"),
    ({"errors": (0, 32)}, "joint6: does not communicate"),
    ({"state": [64, 0, 64, 64, 64, 64]}, "joint2: torque is off"), ({"state_gripper": 0xC2}, "gripper: motor too hot"),
])  # fmt: skip
def test_what_keeps_the_arm_from_following_is_said(rig, driver, change, words):
    driver.connect()
    rig.wait(0.02)
    for name, value in change.items():
        setattr(rig.arm, name, value)
    assert halted(driver) == words
    with pytest.raises(DriverError, match=words):
        driver.send(target(rig.position()))


@pytest.mark.parametrize(("control", "words"), [(2, "teach mode"), (3, "Ethernet control"), (6, "linkage teaching"),
                                                (7, "offline trajectory")])  # fmt: skip
def test_another_control_mode_is_not_taken_over(rig, driver, control, words):
    rig.arm.control = control
    with pytest.raises(DriverError, match=f"expected an arm in standby or under CAN control; .*found {words}"):
        driver.connect()
    assert set(ids(rig)) == {0x4AF} and rig.arm.control == control
    rig.arm.control = 0
    driver.connect()


def test_an_emergency_stop_is_ended_only_at_rest(rig, driver):
    driver.connect()
    driver.stop(0)
    until(lambda: rig.arm.status == 1)
    sinking = threading.Event()

    def sink():
        while not sinking.wait(0.01):
            with rig.arm.lock:
                rig.arm.position[1] += 50.0

    thread = threading.Thread(target=sink)
    thread.start()
    rig.arm.seen.clear()
    with pytest.raises(DriverError, match="expected an arm that rests after its emergency stop"):
        driver.connect()
    assert 0x150 not in ids(rig) and rig.arm.status == 1
    sinking.set()
    thread.join()
    at = rig.position()
    driver.connect()
    assert rig.arm.powered() and driver.read().halted == ""
    np.testing.assert_allclose(rig.position(), at, atol=2 * rig.resolution)


@pytest.mark.parametrize(("how", "identifier"), [("mute", 0x2A1), ("mute", 0x2A6), ("mute", 0x2A8), ("mute", 0x254),
                                                 ("mute", 0x265), ("short", 0x2A6)])  # fmt: skip
def test_a_frame_that_does_not_come_whole_is_named(rig, driver, identifier, how):
    driver.connect()
    getattr(rig.arm, how).add(identifier)
    with pytest.raises(DriverError, match=f"no new frame 0x{identifier:03X} came"):
        until(lambda: not driver.read())
    with pytest.raises(DriverError, match="cannot be sent|no new frame"):
        driver.send(target(rig.position()))
    getattr(rig.arm, how).clear()
    rig.wait(0.3)
    with pytest.raises(DriverError, match="no new frame"):
        driver.read()
    driver.connect()


def test_one_lost_frame_of_each_kind_is_no_fault(rig, driver):
    driver.connect()
    rig.arm.mute.update(range(0x200, 0x300))
    rig.wait(0.02)
    rig.arm.mute.clear()
    rig.wait(0.1)
    assert driver.read().halted == ""
    driver.send(target(driver.read().position))


def test_frames_that_waited_are_as_old_as_they_are(rig, driver):
    driver.connect()
    rig.arm.waited = 0.03
    rig.wait(0.05)
    assert 0.03 <= rig.time() - driver.read().stamp < 0.1
    rig.arm.waited = 0.5
    with pytest.raises(DriverError, match="no new frame 0x2A1, 0x2A5, 0x2A6, 0x2A7, ... came"):
        until(lambda: not driver.read())


def test_an_old_measurement_is_no_place_to_stop_at(rig, driver):
    driver.connect()
    goal = rig.position() + 0.5
    driver.send(target(goal))
    rig.arm.mute.update(range(0x200, 0x300))
    rig.wait(0.5)
    rig.arm.seen.clear()
    driver.stop(2)
    rig.wait(0.1)
    # The arm is elsewhere by now: holding at what was measured would move it.
    assert not rig.arm.seen
    np.testing.assert_allclose(rig.position(), goal, atol=2 * rig.resolution)


@pytest.mark.parametrize(("version", "words"), [
    (b"S-V1.4-9", "expected firmware S-V1.5-2 or newer, found S-V1.4-9"),
    (b"\xff\x00??", "expected a firmware version"),
    (b"S-V1.", "expected a firmware version"),
])  # fmt: skip
def test_a_wrong_firmware_answer(rig, driver, version, words):
    rig.arm.version = version
    with pytest.raises(DriverError, match=words):
        driver.connect()
    assert set(ids(rig)) == {0x4AF}
    rig.arm.version = b"S-V1.10-1"
    driver.connect()


def test_an_arm_that_is_set_as_the_leader(rig, driver):
    rig.arm.offset = 0x10
    with pytest.raises(DriverError, match=r"0x2A5, 0x2A6.* found 0x2B5.*teaching \(leader\) arm"):
        driver.connect()
    assert not rig.arm.seen


def test_another_controller_on_the_bus(rig, driver):
    driver.connect()
    with can.Bus(interface="virtual", channel=rig.channel) as other:
        other.send(can.Message(arbitration_id=0x156, data=bytes(8), is_extended_id=False))
    assert halted(driver) == "0x156 of another controller on its bus"


def test_power_lost_and_back(rig, driver):
    driver.connect()
    rig.cut()
    with pytest.raises(DriverError, match="no new frame"):
        until(lambda: not driver.read())
    rig.place(rig.position() - 0.3)
    rig.mend()
    before = rig.position()
    driver.connect()
    rig.wait(0.2)
    np.testing.assert_allclose(rig.position(), before, atol=2 * rig.resolution)


def test_a_short_loss_of_power_shows_although_no_frame_is_late(rig, driver):
    driver.connect()
    rig.wait(0.02)
    with rig.arm.lock:
        rig.arm.power_up()
    assert "standby" in halted(driver)
    rig.wait(0.1)
    with pytest.raises(DriverError, match="standby"):
        driver.send(target(rig.position()))


@pytest.mark.parametrize("side", ["recv", "send"])
def test_a_bus_that_goes_down(rig, driver, side, monkeypatch):
    driver.connect()

    def down(*_, **__):
        raise can.CanOperationError("Network is down", 100)

    monkeypatch.setattr(driver._bus, side, down)
    with pytest.raises(DriverError, match=f"left: piper on virtual {rig.channel}: expected .*Network is down"):
        for _ in range(20):
            driver.send(target(driver.read().position))
            rig.wait(0.01)
    assert driver.stop(2) == 2
    driver.connect()
    driver.send(target(driver.read().position))


def test_there_is_no_such_bus(rig):
    driver = load_driver("piper", dict(rig.config(), interface="socketcan", channel="can99"), rig.time)
    with pytest.raises(DriverError, match="piper on socketcan can99: expected a CAN bus that opens"):
        driver.connect()


def test_no_thread_stays_behind(rig, driver):
    before = set(threading.enumerate())
    for _ in range(3):
        driver.connect()
    driver.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("wrong", [
    {"joints": ["a"]}, {"zero": (0.0,)}, {"sign": (1, 1, 1, 1, 1, 2)}, {"gripper_torque": 6.0}, {"gripper_open": 0.0},
    {"speed": 0}, {"timeout": 0.0}, {"firmware": "1.5"},
])  # fmt: skip
def test_settings_that_make_no_sense(rig, wrong):
    with pytest.raises(DriverError, match="arm left: piper .*expected"):
        load_driver("piper", dict(rig.config(), **wrong), rig.time)


class Vendor:
    """piper_sdk's own parser, as an oracle that neither the driver nor the emulated arm was written from."""

    def __init__(self):
        pytest.importorskip("piper_sdk")
        from piper_sdk.piper_msgs.msg_v2 import PiperMessage
        from piper_sdk.protocol.protocol_v2 import C_PiperParserV2

        self.message, self.parser = PiperMessage(), C_PiperParserV2()

    def decode(self, identifier, data):
        frame = can.Message(arbitration_id=identifier, data=data, is_extended_id=False)
        assert self.parser.DecodeMessage(frame, self.message)
        return self.message


def test_the_vendors_parser_understands_our_frames(rig, driver):
    vendor = Vendor()
    driver.connect()
    rig.wait(0.05)
    rig.arm.seen.clear()
    goal = np.array([0.3, 1.2, -0.9, -0.4, 0.6, 1.1])
    driver.send(target(goal, 0.5))
    until(lambda: len(rig.arm.seen) == 4)
    for frame in rig.arm.seen:
        message = vendor.decode(*frame)
    joints = [getattr(message.arm_joint_ctrl, f"joint_{k}") for k in range(1, 7)]
    np.testing.assert_array_equal(joints, np.rint(np.rad2deg(goal) * 1000))
    grip = message.arm_gripper_ctrl
    assert (grip.grippers_angle, grip.grippers_effort, grip.status_code, grip.set_zero) == (35000, 1000, 1, 0)


def test_our_commands_are_the_vendors(rig, driver):
    vendor = Vendor()
    from piper_sdk.piper_msgs.msg_v2 import (
        ArmMsgJointConfig,
        ArmMsgMotionCtrl_1,
        ArmMsgMotionCtrl_2,
        ArmMsgMotorEnableDisableConfig,
        ArmMsgType,
    )

    def frame(kind, field, value):
        setattr(vendor.message, field, value)
        vendor.message.type_ = kind
        made = can.Message()
        assert vendor.parser.EncodeMessage(vendor.message, made)
        return made.arbitration_id, bytes(made.data)

    rig.arm.state[1] |= 1 << 5
    driver.connect()
    driver.stop(0)
    rig.wait(0.05)
    driver.connect()
    expected = {
        frame(ArmMsgType.PiperMsgMotionCtrl_2, "arm_motion_ctrl_2", ArmMsgMotionCtrl_2(1, 1, 100, 0)),
        frame(ArmMsgType.PiperMsgMotorEnableDisableConfig, "arm_motor_enable", ArmMsgMotorEnableDisableConfig(3, 2)),
        frame(ArmMsgType.PiperMsgJointConfig, "arm_joint_config", ArmMsgJointConfig(2, 0, 0, 0x7FFF, 0xAE)),
        frame(ArmMsgType.PiperMsgMotionCtrl_1, "arm_motion_ctrl_1", ArmMsgMotionCtrl_1(1, 0, 0)),
        frame(ArmMsgType.PiperMsgMotionCtrl_1, "arm_motion_ctrl_1", ArmMsgMotionCtrl_1(2, 0, 0)),
    }
    assert expected <= set(rig.arm.seen)


def test_the_vendors_parser_reads_the_emulated_arm_as_we_do(rig, driver):
    vendor = Vendor()
    driver.connect()
    rig.wait(0.1)
    state = driver.read()
    for identifier, (_, data) in sorted(driver._frames.items()):
        message = vendor.decode(identifier, data)
    joints = [getattr(message.arm_joint_feedback, f"joint_{k}") for k in range(1, 7)]
    np.testing.assert_allclose(state.position, np.deg2rad(np.array(joints) / 1000), atol=1e-9)
    motors = [getattr(message, f"arm_high_spd_feedback_{k}") for k in range(1, 7)]
    np.testing.assert_allclose(state.velocity, [motor.motor_speed / 1000 for motor in motors], atol=1e-9)
    np.testing.assert_allclose(state.effort, [motor.cal_effort() / 1000 for motor in motors], atol=1e-9)
    drives = [getattr(message, f"arm_low_spd_feedback_{k}").foc_status for k in range(1, 7)]
    assert all(drive.driver_enable_status and not drive.driver_error_status for drive in drives)
    assert (int(message.arm_status_msgs.ctrl_mode), int(message.arm_status_msgs.arm_status)) == (1, 0)
    assert state.gripper == pytest.approx(message.gripper_feedback.grippers_angle / 70000)
    assert message.gripper_feedback.foc_status.driver_enable_status


def test_drives_that_are_slow_to_say_that_a_reset_let_go_are_enabled_again(rig, driver):
    rig.arm.every = 40
    driver.connect()
    driver.stop(0)
    rig.wait(0.3)
    driver.connect()
    assert rig.powered()
    for _ in range(30):
        driver.send(target(driver.read().position))
        rig.wait(0.01)
