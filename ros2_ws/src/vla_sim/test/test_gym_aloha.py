"""The ALOHA cell against AlohaEnv itself."""

import mujoco
import numpy as np
import pytest
from gym_aloha.env import AlohaEnv
from vla_sim.experts import make_expert
from vla_sim.world import WorldError, make_world


@pytest.fixture(scope="module")
def world():
    return make_world("aloha")


def drive(world, target: np.ndarray) -> None:
    """Set joint targets in target layout [left 6, opening, right 6, opening]."""
    targets = {}
    for arm, part in zip(world.robot.arms, np.split(target, 2), strict=True):
        targets |= dict(zip(arm.joints, part[:6], strict=True)) | arm.gripper.positions(float(part[6]))
    world.set_targets(targets)


def test_same_joint_trajectory_gives_the_state_and_reward_of_aloha_env(world):
    env = AlohaEnv("transfer_cube", obs_type="pixels_agent_pos", observation_width=64, observation_height=48)
    seed = 7
    # Pictures are not compared and cost most of the time.
    task = env._env.task
    task.get_observation = lambda physics: {"qpos": task.get_qpos(physics), "images": {"top": np.zeros(1)}}
    env.reset(seed=seed)
    world.reset(None, seed)
    physics = env._env.physics
    np.testing.assert_array_equal(physics.data.qpos, world.data.qpos)
    expert = make_expert(world)
    rewards, kind = set(), mujoco.mjtState.mjSTATE_INTEGRATION
    for _ in range(210):
        # Each step from the same state to the last digit: a grasp multiplies what differs there.
        state = np.empty(mujoco.mj_stateSize(world.model, kind))
        mujoco.mj_getState(physics.model.ptr, physics.data.ptr, state, kind)
        mujoco.mj_setState(world.model, world.data, state, kind)
        target = expert.target(world.time)
        drive(world, target)
        world.step(2)
        _, reward, *_ = env.step(target)
        assert world.outcome().reward == reward
        rewards.add(reward)
        np.testing.assert_allclose(physics.data.qpos, world.data.qpos, rtol=0, atol=1e-9)
    assert {0, 1, 2} <= rewards


def test_reward_four_is_success(world):
    world.reset(None, 0)
    expert = make_expert(world)
    while not (world.outcome().success or world.outcome().failed):
        drive(world, expert.target(world.time + world.period))
        world.step()
    assert world.outcome().success and world.outcome().reward == 4.0


def test_standing_still_fails_at_the_time_limit(world):
    episode = world.reset(None, 0)
    world.step(round(episode.time_limit / world.period))
    assert world.outcome().failed


def test_options_are_refused(world):
    with pytest.raises(WorldError, match="options"):
        world.reset(None, 0, {"colour": "red"})


def test_the_joint_model_has_no_weld_that_mujoco_3_softens(world):
    assert world.model.neq == 0
