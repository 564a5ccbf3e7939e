"""Pictures and the geometry that goes with them."""

import numpy as np
import pytest
from vla_core.robot import load_robot
from vla_sim.calibrate import calibration
from vla_sim.world import make_world


@pytest.fixture(scope="module")
def table():
    return make_world("panda")


@pytest.mark.parametrize("robot", ["panda", "aloha"])
def test_pictures_have_the_described_size_or_the_asked_one(robot):
    world = make_world(robot)
    for camera in world.robot.cameras:
        picture = world.render(camera.name)
        assert picture.shape == (camera.height, camera.width, 3) and picture.dtype == np.uint8
        assert picture.std() > 5
        assert world.render(camera.name, 128, 96).shape == (96, 128, 3)
    world.close()


@pytest.mark.parametrize("camera", ["scene", "wrist"])
def test_an_object_appears_where_the_calibration_says(table, camera):
    table.reset("pick", 0, {"colour": "red", "shape": "ball"})
    # Let the arm look at it from above.
    from vla_core.kinematics import Kinematics

    goal = table.tool_pose("arm")
    goal[:3, 3] = table.object_position(table.target) + [-0.03, 0.0, 0.18]
    q = Kinematics(table.robot).inverse("arm", goal, table.arm.home)
    table.set_targets(dict(zip(table.arm.joints, q, strict=True)))
    table.step(150)
    picture = table.render(camera).astype(int)
    red = (picture[..., 0] > 90) & (picture[..., 1] < 60) & (picture[..., 2] < 60)
    rows, columns = np.nonzero(red)
    seen = np.array([columns.mean(), rows.mean()])
    point = np.linalg.inv(table.extrinsics(camera)) @ [*table.object_position(table.target), 1.0]
    u, v, w = table.intrinsics(camera) @ point[:3]
    np.testing.assert_allclose(seen, [u / w, v / w], atol=2.0)


@pytest.mark.parametrize("robot", ["panda", "aloha"])
def test_shipped_calibrations_are_those_of_the_simulated_cameras(robot):
    files = pytest.importorskip("vla_calibration.files")
    world = make_world(robot)
    for camera in load_robot(robot).cameras:
        shipped, true = files.load_camera(camera.calibration), calibration(world, camera.name)
        np.testing.assert_allclose(shipped.K, true.K, atol=1e-6)
        np.testing.assert_allclose(shipped.T_parent_camera, true.T_parent_camera, atol=1e-5)
        assert shipped.parent == true.parent
