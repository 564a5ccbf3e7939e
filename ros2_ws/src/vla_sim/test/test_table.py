"""The table world: scenes by seed and options, targets, success and failure."""

import numpy as np
import pytest
from vla_sim.table import AWAY, LIFT_HEIGHT, SEPARATION, TIME_LIMIT, TableWorld
from vla_sim.world import WorldError, make_world


@pytest.fixture(scope="module")
def world() -> TableWorld:
    return make_world("panda")


def lift(world: TableWorld, index: int, height: float) -> None:
    """Hold an object in the air for one control period."""
    address = world._object_qpos[index]
    world.data.qpos[address + 2] = world.things[index].start[2] + height
    world.data.qvel[world._object_qvel[index] :][:6] = 0.0
    world.step()


def scene(world: TableWorld) -> np.ndarray:
    return np.concatenate([[*t.start] for t in world.things] + [world.joint_state()[1]])


def test_same_seed_gives_the_same_episode(world):
    def run():
        episode = world.reset("pick", 5)
        world.set_targets({"panda_joint1": 0.2})
        world.step(30)
        return episode, world.data.qpos.copy()

    (first, qpos), (second, again) = run(), run()
    assert first == second
    np.testing.assert_array_equal(qpos, again)


def test_seeds_differ(world):
    world.reset("pick", 1)
    one = scene(world)
    world.reset("pick", 2)
    assert not np.allclose(one, scene(world))


@pytest.mark.parametrize("task", ["pick", "place"])
def test_objects_keep_their_distance_and_differ_in_colour(world, task):
    for seed in range(30):
        world.reset(task, seed)
        starts = [t.start[:2] for t in world.things]
        apart = min(np.linalg.norm(a - b) for i, a in enumerate(starts) for b in starts[:i])
        assert apart >= SEPARATION
        assert len({t.colour for t in world.things}) == 3


def test_naming_another_object_keeps_the_scene(world):
    world.reset("pick", 3, {"target": "0"})
    layout, looks = scene(world), [t.name for t in world.things]
    for index in "12":
        episode = world.reset("pick", 3, {"target": index})
        np.testing.assert_array_equal(scene(world), layout)
        assert [t.name for t in world.things] == looks
        assert looks[int(index)] in episode.instruction


def test_colour_and_shape_can_be_forced(world):
    for colour in ("red", "green", "blue", "yellow"):
        episode = world.reset("pick", 4, {"colour": colour, "shape": "cube", "phrasing": "0"})
        assert episode.instruction == f"pick up the {colour} cube"
        assert len({t.colour for t in world.things}) == 3


@pytest.mark.parametrize(
    "options", [{"target": "7"}, {"colour": "pink"}, {"shape": "cone"}, {"size": "big"}, {"plate": "white"}]
)
def test_unknown_options_are_refused(world, options):
    with pytest.raises(WorldError, match="options"):
        world.reset("pick", 0, options)


def test_unknown_task_is_refused(world):
    with pytest.raises(WorldError, match="task"):
        world.reset("juggle", 0)


def test_lifting_the_named_object_for_long_enough_succeeds(world):
    world.reset("pick", 0)
    lift(world, world.target, LIFT_HEIGHT + 0.02)
    assert not world.outcome().success
    for _ in range(60):
        lift(world, world.target, LIFT_HEIGHT + 0.02)
    assert world.outcome().success
    assert world.things[world.target].name in world.outcome().detail


def test_lifting_another_object_fails_and_names_it(world):
    world.reset("pick", 0)
    other = (world.target + 1) % 3
    lift(world, other, LIFT_HEIGHT + 0.02)
    outcome = world.outcome()
    assert outcome.failed and not outcome.success
    assert outcome.detail == f"lifted: {world.things[other].name}"


def test_an_object_off_the_table_fails(world):
    world.reset("pick", 0)
    world.data.qpos[world._object_qpos[0]] = 3.0
    lift(world, 0, -0.2)
    assert world.outcome().detail.startswith("off the table")


def test_the_time_limit_fails(world):
    world.reset("pick", 0)
    world.step(round(TIME_LIMIT["pick"] / world.period))
    assert world.outcome().failed and world.outcome().detail == "time limit"


def test_placing_needs_the_named_plate_and_an_open_gripper_away(world):
    world.reset("place", 0)
    for plate, expected in ((1 - world.plate, False), (world.plate, True)):
        world.reset("place", 0)
        address = world._object_qpos[world.target]
        world.data.qpos[address : address + 2] = world.plates[plate].centre[:2]
        world.data.qpos[address + 2] += world.plates[plate].centre[2]
        world.step(80)
        assert np.linalg.norm(world.tool_pose("arm")[:3, 3] - world.object_position(world.target)) > AWAY
        assert world.outcome().success is expected


def test_targets_move_the_joints_there(world):
    world.reset("pick", 0)
    goal = dict(zip(world.arm.joints, world.arm.home + 0.1, strict=True)) | world.arm.gripper.positions(0.3)
    world.set_targets(goal)
    world.step(100)
    for name, value in world.positions().items():
        assert value == pytest.approx(goal[name], abs=0.003)


def test_targets_beyond_the_limits_are_held_at_them(world):
    world.reset("pick", 0)
    world.set_targets({"panda_joint1": 9.0})
    world.step(200)
    assert world.positions()["panda_joint1"] <= world.arm.limits.upper[0] + 0.01


@pytest.mark.parametrize("targets", [{"elbow": 0.0}, {"panda_joint1": float("nan")}])
def test_bad_targets_are_refused_whole(world, targets):
    world.reset("pick", 0)
    before = world.data.ctrl.copy()
    with pytest.raises(WorldError, match="targets"):
        world.set_targets({"panda_joint2": 0.1} | targets)
    np.testing.assert_array_equal(world.data.ctrl, before)


def test_time_goes_on_over_resets(world):
    world.step(3)
    before = world.time
    world.reset("pick", 0)
    assert world.time == before and world.elapsed == 0.0


def test_start_anywhere_is_above_the_objects(world):
    for seed in range(5):
        world.reset("pick", seed, {"start": "anywhere"})
        x, y, z = world.tool_pose("arm")[:3, 3]
        assert 0.3 < x < 0.7 and abs(y) < 0.25 and 0.08 < z < 0.45
