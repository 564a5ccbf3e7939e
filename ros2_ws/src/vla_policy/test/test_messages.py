"""Messages become what a policy takes, and nothing is lost or shifted in time on the way."""

from dataclasses import replace

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from sensor_msgs.msg import Image
from vla_core.actions import ActionSpace
from vla_models.policy import PolicySpec
from vla_msgs.msg import ArmState, CameraImage, ChunkRequest, Observation
from vla_policy.messages import (
    MessageError,
    earlier,
    image_array,
    inference_request,
    policy_observation,
    trajectory_chunk,
    trajectory_message,
)

SPEC = PolicySpec(
    name="p", recipe="flow", cameras={"scene": (8, 8)}, arms=("arm",), state="pose", horizon=8, period=0.1,
    action_space=ActionSpace(arms=("arm",), kind="pose", joints=(), reference="absolute", frame="base",
                             rotation="quaternion", gripper=(0.0, 1.0)),
)  # fmt: skip


def image(array, encoding="rgb8", pad=0):
    message = Image(height=array.shape[0], width=array.shape[1], encoding=encoding, step=3 * array.shape[1] + pad)
    rows = np.zeros((array.shape[0], message.step), np.uint8)
    rows[:, : 3 * array.shape[1]] = array.reshape(array.shape[0], -1)
    message.data = rows.tobytes()
    return message


def poses(n, step=0.01):
    targets = np.zeros((n, 8))
    targets[:, 0] = step * np.arange(n)
    targets[:, 6] = 1.0
    return targets


@pytest.mark.parametrize("pad", [0, 5])
def test_padded_rows_and_bgr_give_the_same_rgb_image(pad):
    array = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    assert (image_array(image(array, pad=pad)) == array).all()
    assert (image_array(image(array[..., ::-1], "bgr8", pad)) == array).all()


def test_an_image_of_another_encoding_or_length_is_refused():
    with pytest.raises(MessageError, match="expected encoding rgb8 or bgr8, found 'mono8'"):
        image_array(image(np.zeros((4, 4, 3), np.uint8), "mono8"))
    short = image(np.zeros((4, 4, 3), np.uint8))
    short.data = short.data[:-1]
    with pytest.raises(MessageError, match="found 47 bytes"):
        image_array(short)


def test_a_missing_camera_is_named():
    observation = Observation(arms=[ArmState(arm="arm", position=[0.0])])
    observation.images = [CameraImage(camera="wrist", image=image(np.zeros((8, 8, 3), np.uint8)))]
    with pytest.raises(MessageError, match=r"expected camera 'scene', found \['wrist'\]"):
        policy_observation(observation, SPEC, "go")


def test_a_trajectory_survives_the_way_there_and_back():
    chunk = trajectory_chunk(trajectory_message(poses(8), Time(sec=3, nanosec=500_000_000), SPEC, "world"))
    assert np.allclose(chunk.targets, poses(8))
    assert (chunk.start, chunk.period, chunk.kind, chunk.arms) == (3.5, 0.1, "pose", ("arm",))


def test_the_remainder_is_sampled_at_the_due_times_of_the_chunk_to_come():
    # The running chunk is due at 10.00, 10.10, ...; the observation is of 10.23.
    request = ChunkRequest(id=1, guidance="guided", delay=2, execution_horizon=4)
    request.remainder = trajectory_message(poses(8), Time(sec=10), SPEC, "world")
    asked = inference_request(request, SPEC, observed=10.23, seed=0)
    # At 10.23 the plan is 2.3 steps along, then one step further each period, until its end at 10.70.
    assert np.allclose(asked.remainder[:, 0], 0.01 * (2.3 + np.arange(5)))
    assert (asked.delay, asked.execution_horizon, asked.guidance) == (2, 4, "guided")


def test_a_remainder_that_ended_before_the_observation_guides_nothing():
    request = ChunkRequest(id=1, guidance="guided")
    request.remainder = trajectory_message(poses(8), Time(sec=1), SPEC, "world")
    asked = inference_request(request, SPEC, observed=50.0, seed=0)
    assert asked.remainder is None and asked.guidance == ""


def observation_at(time: float, value: int = 0) -> Observation:
    message = Observation(arms=[ArmState(arm="arm", position=[0.0])])
    message.header.stamp = Time(sec=int(time), nanosec=round(time % 1 * 1e9))
    message.images = [CameraImage(camera="scene", image=image(np.full((8, 8, 3), value, np.uint8)))]
    return message


def test_a_history_takes_the_observations_nearest_to_its_times():
    spec = replace(SPEC, history=4)  # 0.1 s apart
    before = [observation_at(10.0 + 0.03 * k, k) for k in range(20)]
    seen = policy_observation(observation_at(10.6), spec, "", before)
    assert [round(past.time, 2) for past in seen.history] == [10.30, 10.39, 10.51]
    assert [int(past.images["scene"][0, 0, 0]) for past in seen.history] == [10, 13, 17]
    assert not any(past.history for past in seen.history)


def test_a_history_has_nothing_from_before_the_first_observation():
    spec = replace(SPEC, history=4)
    assert earlier(observation_at(10.0), spec, []) == []
    before = [observation_at(10.0), observation_at(10.1)]
    assert [m.header.stamp.nanosec for m in earlier(observation_at(10.2), spec, before)] == [0, 100_000_000]


def test_a_camera_that_may_be_missing_is_left_out():
    spec = replace(SPEC, cameras={"scene": (8, 8), "wrist": (8, 8)}, optional=("wrist",))
    assert list(policy_observation(observation_at(1.0), spec, "").images) == ["scene"]
