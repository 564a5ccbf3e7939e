"""Experts through the real safety controller, and the demonstrations written from them."""

import numpy as np
import pytest
from vla_sim.disturbance import Disturbance
from vla_sim.experts import make_expert
from vla_sim.rollout import rollout
from vla_sim.world import make_world

WORLDS = {}


def world_of(robot):
    if robot not in WORLDS:
        WORLDS[robot] = make_world(robot)
    return WORLDS[robot]


def run(robot, task, seed, amplitude=0.0, options=None, **kwargs):
    world = world_of(robot)
    world.reset(task, seed, options)
    expert = make_expert(world)
    disturbance = Disturbance(world.robot, expert, amplitude, seed, world.time) if amplitude else None
    periods = list(rollout(world, expert.target, expert.kind, disturbance=disturbance, **kwargs))
    return world, periods


@pytest.mark.parametrize(
    ("robot", "task", "seed", "amplitude", "options"),
    [
        ("panda", "pick", 0, 0.0, None),
        ("panda", "pick", 1, 0.03, {"start": "anywhere"}),
        ("panda", "pick", 2, 0.0, {"shape": "ball"}),
        ("panda", "place", 3, 0.0, None),
        ("aloha", "transfer_cube", 4, 0.0, None),
    ],
)
def test_experts_succeed(robot, task, seed, amplitude, options):
    world, _ = run(robot, task, seed, amplitude, options)
    assert world.outcome().success, world.outcome()


def test_an_expert_for_another_object_fails_the_episode():
    world = world_of("panda")
    world.reset("pick", 0, {"target": "0"})
    expert = make_expert(world)
    world.reset("pick", 0, {"target": "1"})
    for _ in rollout(world, lambda now: expert.target(now), "pose"):
        pass
    assert world.outcome().failed
    assert world.outcome().detail == f"lifted: {world.things[0].name}"


def test_sent_targets_keep_the_limits():
    world, periods = run("panda", "pick", 5)
    limits = world.arm.limits
    sent = np.array([p.decision.sent["arm"].position for p in periods])
    velocity = np.diff(sent, axis=0) / world.period
    assert (np.abs(velocity) <= limits.velocity + 1e-6).all()
    assert (np.abs(np.diff(velocity, axis=0)) / world.period <= limits.acceleration + 1e-4).all()
    assert not any(p.decision.refused for p in periods)


def test_the_disturbance_moves_the_arm_and_not_the_commands():
    def tools(periods):
        n = 80
        return (
            np.array([p.tools["arm"][:3, 3] for p in periods[:n]]),
            np.array([p.decision.goal["arm"][:3, 3] for p in periods[:n]]),
        )

    _, clean = run("panda", "pick", 6)
    _, disturbed = run("panda", "pick", 6, 0.03)
    (moved, goal), (moved_disturbed, goal_disturbed) = tools(clean), tools(disturbed)
    np.testing.assert_allclose(goal, goal_disturbed, atol=1e-6)
    assert np.abs(moved - moved_disturbed).max() > 0.005


def test_pictures_come_at_their_rate():
    _, periods = run("panda", "pick", 0, cameras=("wrist",), camera_rate=10.0)
    taken = [p.time - periods[0].time for p in periods if "wrist" in p.pictures]
    np.testing.assert_allclose(np.diff(taken), 0.1, atol=0.0101)


def test_the_tail_goes_on_after_the_success():
    world, short = run("panda", "pick", 0)
    _, long = run("panda", "pick", 0, tail=0.2)
    assert len(long) - len(short) == round(0.2 / world.period)


def test_a_demonstration_is_a_bag_with_the_topics_of_a_recording(tmp_path):
    pytest.importorskip("rclpy")
    from pathlib import Path

    from rosbags.rosbag2 import Reader
    from vla_sim.demonstrate import Settings, demonstrate

    world = world_of("panda")
    result = demonstrate(world, 11, Settings("panda", "pick", Path(tmp_path), camera_rate=5.0))
    assert result.success
    with Reader(tmp_path / "pick_000011") as bag:
        counts = {c.topic: c.msgcount for c in bag.connections}
    assert counts["/joint_states"] == counts["/safety_status"] == counts["/command"] == counts["/arm/joint_targets"]
    assert counts["/camera/scene/image_raw"] == counts["/camera/scene/camera_info"] > 10
    assert counts["/episode_events"] == 2 and counts["/instruction"] == 1


def test_a_failed_demonstration_leaves_no_bag(tmp_path, monkeypatch):
    pytest.importorskip("rclpy")
    from vla_sim import experts
    from vla_sim.demonstrate import Settings, demonstrate

    world = world_of("panda")
    monkeypatch.setattr(experts, "GRASP_BELOW", -0.08)  # grasps above the object
    result = demonstrate(world, 11, Settings("panda", "pick", tmp_path, camera_rate=1.0))
    assert not result.success and list(tmp_path.iterdir()) == []
