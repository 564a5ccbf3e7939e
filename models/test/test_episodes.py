"""Recorded bags become the very observations of the live node, with what was commanded as actions."""

import dataclasses

import numpy as np
import pytest
from vla_core import se3
from vla_core.actions import ActionSpace
from vla_core.kinematics import Kinematics
from vla_core.robot import load_robot
from vla_models.episodes import DataError, cached_episode, fingerprint, load_episodes, read_episode
from vla_models.policy import ArmState, PolicySpec
from vla_models.preprocess import resize_image, state_vector

pytest.importorskip("rclpy", reason="bags are written with ROS messages")

PERIOD, RATE = 0.05, 100.0
ROBOT = load_robot("panda")
KINEMATICS = Kinematics(ROBOT)
ARM = ROBOT.arms[0]


def joints_at(t):
    return ARM.home + 0.1 * np.sin(t + np.arange(7))


def goal_at(t):
    return se3.transform(se3.exp_so3([0.0, 0.0, 0.3 * t]), [0.4 + 0.1 * t, 0.05, 0.3])


def image_at(index, camera):
    return np.random.default_rng([index, len(camera)]).integers(0, 256, (240, 320, 3), np.uint8)


def spec_of(kind="pose"):
    space = ActionSpace(("arm",), "pose", (), "chunk", "base", "rotvec") if kind == "pose" else ActionSpace(
        ("arm",), "joint", (7,))  # fmt: skip
    return PolicySpec("p", "flow", {"scene": (24, 32), "wrist": (24, 32)}, ("arm",), kind, space, 6, PERIOD,
                      {"arm": ARM.joints}, robot="panda")  # fmt: skip


def write_bag(folder, start=2.0, seconds=1.0, leave_out=(), outcome="success"):
    """A second of joint states and safety status at 100 Hz; the wrist camera is 7 ms later than the scene camera."""
    from builtin_interfaces.msg import Time
    from geometry_msgs.msg import Point, Pose, Quaternion
    from sensor_msgs.msg import Image, JointState
    from std_msgs.msg import String
    from vla_core.time import to_msg
    from vla_msgs.msg import ArmSafety, SafetyStatus
    from vla_teleop.bag_writer import BagWriter

    def put(topic, message, stamp):
        if topic not in leave_out:
            if hasattr(message, "header"):
                message.header.stamp = Time(**dict(zip(("sec", "nanosec"), to_msg(stamp), strict=True)))
            bag.write(topic, message, round(stamp * 1e9))

    fingers = [joint.name for joint in ARM.gripper.joints]
    with BagWriter(folder, facts={"robot": "panda", "outcome": outcome}, sync_period=None) as bag:
        put("/instruction", String(data="take the red cube"), start)
        for i in range(round(seconds * RATE)):
            t = start + i / RATE
            state = JointState(name=[*fingers, *ARM.joints], position=[0.02, 0.02, *joints_at(t)])
            put("/joint_states", state, t)
            x, y, z, *q = se3.matrix_to_pose(goal_at(t)).tolist()
            goal = Pose(position=Point(x=x, y=y, z=z), orientation=Quaternion(x=q[0], y=q[1], z=q[2], w=q[3]))
            part = ArmSafety(arm="arm", goal=goal, joints=(joints_at(t) + 0.01).tolist(), gripper=0.25)
            put("/safety_status", SafetyStatus(arms=[part]), t)
        for i in range(int(seconds * 30) - 1):
            for camera, late in (("scene", 0.0), ("wrist", 0.007)):
                image = Image(height=240, width=320, encoding="rgb8", step=960, data=image_at(i, camera).tobytes())
                put(f"/camera/{camera}/image_raw", image, start + 0.02 + i / 30 + late)
    return folder


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    return write_bag(tmp_path_factory.mktemp("bags") / "one")


def test_an_episode_equals_the_live_observations(bag):
    from vla_perception.observation import ObservationSampler
    from vla_teleop import bags

    sampler, live = ObservationSampler(ROBOT, {}), []
    for topic, stamp, message in bags.messages(bag):
        if topic == "/joint_states":
            sampler.add_joints(stamp, message.name, message.position, message.velocity, stamp)
        elif topic.startswith("/camera"):
            sampler.add_image(topic.split("/")[2], stamp, message, stamp)
        live.append(sampler.sample(stamp))
    live = [sample for sample in live if sample is not None]
    episode = read_episode(bag, ROBOT, KINEMATICS, spec_of())
    assert len(live) >= len(episode) - 1 >= 27 and episode.instruction == "take the red cube"
    for tick, sample in enumerate(live):
        assert sample.time == pytest.approx(2.02 + tick / 30)
        for image in sample.images:
            picture = image.image.data.reshape(240, 320, 3)
            np.testing.assert_array_equal(episode.images[image.camera][tick], resize_image(picture, (24, 32)))
        (arm,) = sample.arms
        state = ArmState(arm.position, se3.matrix_to_pose(arm.tool), arm.gripper)
        np.testing.assert_allclose(episode.state[tick], state_vector(spec_of(), {"arm": state}), atol=1e-9)


@pytest.mark.parametrize("fit", ["pad", "pad_corner"])
def test_pictures_come_to_their_size_as_in_use(bag, fit):
    spec = dataclasses.replace(spec_of(), cameras={"scene": (32, 32), "wrist": (24, 32)}, fit=fit)
    picture = read_episode(bag, ROBOT, KINEMATICS, spec).images["scene"][3]
    np.testing.assert_array_equal(picture, resize_image(image_at(3, "scene"), (32, 32), fit))
    assert not picture[:4].any()  # black above


def test_pose_actions_are_the_goals_at_their_due_times(bag):
    episode = read_episode(bag, ROBOT, KINEMATICS, spec_of())
    times = 2.02 + 4 / 30 + PERIOD * np.arange(6)
    wanted = np.stack([se3.matrix_to_pose(goal_at(t)) for t in times])
    got = episode.targets[4]
    np.testing.assert_allclose(got[:, :3], wanted[:, :3], atol=1e-5)
    np.testing.assert_allclose(np.abs((got[:, 3:7] * wanted[:, 3:]).sum(-1)), 1, atol=1e-6)
    np.testing.assert_allclose(got[:, 7], 0.25)


def test_joint_actions_are_the_targets_that_were_sent(bag):
    episode = read_episode(bag, ROBOT, KINEMATICS, spec_of("joint"))
    np.testing.assert_allclose(episode.targets[4, 2, :7], joints_at(2.02 + 4 / 30 + 2 * PERIOD) + 0.01, atol=1e-4)
    np.testing.assert_allclose(episode.state[4], [*joints_at(2.02 + 4 / 30), 0.5], atol=1e-4)


def test_past_the_end_the_last_action_is_held_and_marked(bag):
    episode = read_episode(bag, ROBOT, KINEMATICS, spec_of())
    assert episode.valid[0] == 6 and episode.valid[-1] == 1
    np.testing.assert_allclose(episode.targets[-1, -1, 0], 0.4 + 0.1 * 2.99, atol=1e-6)


def test_a_second_start_reads_the_cache(bag, tmp_path, monkeypatch):
    first = cached_episode(bag, tmp_path, spec_of())
    monkeypatch.setattr("vla_models.episodes.read_episode", None)
    again = cached_episode(bag, tmp_path, spec_of())
    assert isinstance(again.images["scene"], np.memmap)
    for name in ("state", "anchor", "targets", "valid"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


def test_the_cache_knows_content_and_settings(bag, tmp_path):
    other = write_bag(tmp_path / "one", start=3.0, seconds=0.3)
    names = {fingerprint(bag, spec_of()), fingerprint(bag, spec_of("joint")), fingerprint(other, spec_of())}
    assert len(names) == 3 and fingerprint(bag, spec_of()) in names


def test_failed_episodes_are_left_out(tmp_path):
    write_bag(tmp_path / "good", seconds=0.3)
    write_bag(tmp_path / "bad", seconds=0.3, outcome="failure")
    assert [e.name for e in load_episodes(tmp_path, spec_of(), workers=1)] == ["good"]


@pytest.mark.parametrize(
    ("topic", "message"),
    [("/joint_states", "joint_states of arm arm: expected messages"), ("/safety_status", "/safety_status of arm arm"),
     ("/camera/wrist/image_raw", "camera wrist: expected messages")],
)  # fmt: skip
def test_a_bag_without_a_needed_topic_is_refused(tmp_path, topic, message):
    with pytest.raises(DataError, match=message):
        read_episode(write_bag(tmp_path / "bag", seconds=0.2, leave_out=(topic,)), ROBOT, KINEMATICS, spec_of())


def test_a_folder_that_is_no_bag_is_refused(tmp_path):
    with pytest.raises(DataError, match="bag"):
        read_episode(tmp_path, ROBOT, KINEMATICS, spec_of())
