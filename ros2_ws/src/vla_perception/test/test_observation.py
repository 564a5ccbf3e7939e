"""What is in an observation: one reference time, nearest images, interpolated arms, and when one is due."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from perception_logs import feed, image, joints_at, log, names, robot
from vla_calibration.files import CameraCalibration
from vla_core import se3
from vla_core.kinematics import Kinematics
from vla_perception.observation import ObservationSampler, PerceptionError
from vla_perception.transforms import TransformBuffer


@given(seed=st.integers(0, 2**31), cameras=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_images_are_the_nearest_to_the_reference_time(seed, cameras):
    panda = robot([f"c{i}" for i in range(cameras)])
    events = log(panda, 1.0, seed=seed, jitter=0.003)
    samples = feed(ObservationSampler(panda, {}), panda, events)
    assert len(samples) >= 26
    for sample in samples:
        arrived = [e for e in events if e[0] <= sample.time + sample.age]
        newest = [max(e[2] for e in arrived if e[1] == c.name) for c in panda.cameras]
        assert sample.time == min(newest)
        for part in sample.images:
            nearest = min((e for e in arrived if e[1] == part.camera), key=lambda e: abs(e[2] - sample.time))
            assert part.image is nearest[3]
            assert part.skew == part.stamp - sample.time
        assert sample.skew == max(abs(part.skew) for part in sample.images)


def test_arms_are_interpolated_at_the_reference_time():
    panda = robot()
    kinematics = Kinematics(panda)
    for sample in feed(ObservationSampler(panda, {}), panda, log(panda, 1.0)):
        position, velocity = joints_at(panda, sample.time)
        np.testing.assert_allclose(sample.arms[0].position, position[:7], atol=1e-5)
        np.testing.assert_allclose(sample.arms[0].velocity, velocity[:7], atol=1e-5)
        np.testing.assert_allclose(sample.arms[0].tool, kinematics.forward("arm", sample.arms[0].position))
        assert sample.arms[0].gripper == pytest.approx(position[7] / 0.04, abs=1e-4)


def test_mismatch_of_image_and_tool_with_jittering_stamps():
    """3 ms of stamp jitter at 0.25 m/s: tool pose of each image's own stamp against where it was captured."""
    panda = robot(["a", "b", "c", "d"])
    arm = panda.arms[0]
    tool = CameraCalibration("a", 32, 24, [[30, 0, 16], [0, 30, 12], [0, 0, 1]], np.zeros(5), "arm_tool", np.eye(4))
    calibrations = {c.name: replace(tool, camera=c.name) for c in panda.cameras}
    kinematics = Kinematics(panda)
    # A swing of joint 1 alone: the tool moves at 0.25 m/s.
    reach = np.linalg.norm(kinematics.forward("arm", arm.home)[:2, 3])

    def position(t):
        q = np.append(arm.home, [0.0, 0.0])
        q[0] = 0.25 / reach * (t - 101.0)
        return q

    rng = np.random.default_rng(0)
    events = []
    for event in log(panda, 2.0, delay=0.03, joint_rate=500.0):
        if event[1] == "joints":
            event = (*event[:3], (position(event[2]), np.zeros(9)))
        else:
            event = (*event[:2], event[2] + rng.uniform(-0.003, 0.003), event[3])
        events.append(event)
    errors = []
    for sample in feed(ObservationSampler(panda, calibrations), panda, events):
        for part in sample.images:
            true = kinematics.forward("arm", position(part.image.number * 1e-6)[:7])
            errors.append(np.linalg.norm(part.T_base_camera[:3, 3] - true[:3, 3]))
    assert np.percentile(errors, 95) <= 0.001


def test_live_and_offline_are_bit_identical():
    panda = robot()
    events = log(panda, 1.0, jitter=0.003)
    live, offline = (feed(ObservationSampler(panda, {}), panda, events) for _ in range(2))
    assert len(live) == len(offline) > 25
    for a, b in zip(live, offline, strict=True):
        assert (a.time, a.skew, a.age) == (b.time, b.skew, b.age)
        assert [i.image for i in a.images] == [i.image for i in b.images]
        for x, y in zip(a.arms, b.arms, strict=True):
            assert x.position.tobytes() == y.position.tobytes()
            assert x.tool.tobytes() == y.tool.tobytes()


def test_asking_more_often_changes_nothing():
    panda = robot()
    events = log(panda, 0.5)
    sampler, often = ObservationSampler(panda, {}), ObservationSampler(panda, {})
    expected = [s.time for s in feed(sampler, panda, events)]
    times = []
    for event in events:
        times += [s.time for s in feed(often, panda, [event])]
        for _ in range(3):
            assert often.sample(event[0]) is None
            often.faults(event[0])
    assert times == expected


@pytest.mark.parametrize(("camera_rate", "expected"), [(60.0, 30.0), (45.0, 30.0), (30.0, 30.0), (15.0, 15.0)])
def test_rate_is_bounded_by_the_robot_and_the_cameras(camera_rate, expected):
    panda = robot(rate=camera_rate)
    samples = feed(ObservationSampler(panda, {}), panda, log(panda, 4.0, jitter=0.001))
    assert len(samples) / 4.0 == pytest.approx(expected, rel=0.08)
    assert len(samples) / 4.0 <= 30.5


def test_waits_until_joint_states_bracket_the_reference_time():
    panda = robot(["scene"])
    sampler = ObservationSampler(panda, {})
    sampler.add_joints(100.0, names(panda), *joints_at(panda, 100.0), 100.0)
    sampler.add_image("scene", 100.005, image(0), 100.006)
    assert sampler.sample(100.006) is None
    sampler.add_joints(100.01, names(panda), *joints_at(panda, 100.01), 100.01)
    assert sampler.sample(100.01).time == 100.005


def test_image_before_the_first_joint_state_gives_none():
    panda = robot(["scene"])
    sampler = ObservationSampler(panda, {})
    sampler.add_image("scene", 99.99, image(0), 100.0)
    sampler.add_joints(100.0, names(panda), *joints_at(panda, 100.0), 100.0)
    assert sampler.sample(100.0) is None


def test_wrist_camera_moves_with_the_tool():
    panda = robot(["wrist"])
    K = [[30, 0, 16], [0, 30, 12], [0, 0, 1]]
    T_tool_camera = se3.exp(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    calibration = CameraCalibration("wrist", 32, 24, K, np.zeros(5), "arm_tool", T_tool_camera)
    for sample in feed(ObservationSampler(panda, {"wrist": calibration}), panda, log(panda, 0.3)):
        np.testing.assert_array_equal(sample.images[0].K, K)
        np.testing.assert_allclose(sample.images[0].T_base_camera, sample.arms[0].tool @ T_tool_camera)


def test_camera_on_another_frame_is_looked_up():
    panda = robot(["head"])
    calibration = CameraCalibration(
        "head", 32, 24, [[30, 0, 16], [0, 30, 12], [0, 0, 1]], np.zeros(5), "neck", np.eye(4)
    )
    buffer = TransformBuffer()
    sampler = ObservationSampler(panda, {"head": calibration}, buffer)
    unknown = feed(sampler, panda, log(panda, 0.2))
    assert all(np.isnan(s.images[0].T_base_camera).all() for s in unknown)
    T = se3.transform(np.eye(3), [0.0, 0.0, 1.5])
    buffer.set_static("world", "neck", T)
    sampler.clear()
    known = feed(sampler, panda, log(panda, 0.2, start=101.0))
    assert all(np.array_equal(s.images[0].T_base_camera, T) for s in known) and known


def test_calibration_of_another_size_is_refused():
    panda = robot(["scene"])
    K = [[30, 0, 16], [0, 30, 12], [0, 0, 1]]
    with pytest.raises(PerceptionError, match="expected one of 'scene' at 32x24 pixels, found 'scene' at 64x24"):
        ObservationSampler(panda, {"scene": CameraCalibration("scene", 64, 24, K, np.zeros(5), "world", np.eye(4))})


def test_joint_states_of_one_arm_at_a_time():
    from vla_core.robot import load_robot

    aloha = load_robot("aloha")
    aloha = replace(aloha, cameras=(replace(aloha.cameras[0], width=32, height=24, calibration=None),))
    sampler = ObservationSampler(aloha, {})
    for stamp in (100.0, 100.02):
        for arm in aloha.arms:
            fingers = [j.name for j in arm.gripper.joints]
            q = np.append(arm.home, [j.open for j in arm.gripper.joints])
            sampler.add_joints(stamp, [*arm.joints, *fingers], q, [], stamp)
    sampler.add_image("top", 100.01, image(0), 100.02)
    sample = sampler.sample(100.02)
    for part, arm in zip(sample.arms, aloha.arms, strict=True):
        np.testing.assert_allclose(part.position, arm.home)
        assert part.gripper == pytest.approx(1.0)
