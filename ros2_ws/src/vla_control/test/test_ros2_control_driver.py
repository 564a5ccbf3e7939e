"""The driver "ros2_control": what it sends to which controller, and what it refuses."""

import numpy as np
import pytest
from driver_rig import drive, target, until
from rig_ros2_control import JOINTS, Ros2ControlRig, description
from scipy.spatial.transform import Rotation
from vla_control.drivers import ArmTarget, DriverError, load_driver

#: The controllers keep real time.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rig():
    made = Ros2ControlRig("trajectory")
    yield made
    made.close()


@pytest.fixture
def make(rig):
    drivers = []

    def make(**settings):
        drivers.append(load_driver("ros2_control", {**rig.config(), **settings}, rig.time))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.close()
    rig.controllers.heard.clear()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "force"}, "mode: expected one of .*'trajectory', 'twist', 'velocity'.*found 'force'"),
        ({"states": "/joint_states"}, "states: expected another topic than /joint_states"),
        ({"tip": "flange"}, "tip: expected 'tool' or 'link'"),
        ({"node": None}, "expected a ROS node"),
        ({"mode": "pose", "robot": None}, "expected a robot description"),
        ({"gripper": True}, "expected the topic gripper_command"),
        ({"mode": "twist", "base_link": "wrist_1_link"}, "base_link: expected a link that no joint moves"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, settings, said):
    with pytest.raises(DriverError, match=said):
        make(**settings)


@pytest.mark.parametrize("velocities", [False, True])
def test_a_target_is_a_point_two_periods_ahead(rig, make, velocities):
    driver = make(velocities=velocities)
    until(lambda: np.allclose(rig.position(), rig.controllers.goal, atol=1e-12))
    driver.connect()
    heard = rig.controllers.heard
    until(lambda: heard)
    np.testing.assert_allclose(heard[0].points[0].positions, rig.position(), atol=1e-9)
    heard.clear()
    goal = rig.position() + 0.01
    driver.send(ArmTarget(goal, np.full(6, 0.1)))
    until(lambda: heard)
    message, point = heard[0], heard[0].points[0]
    assert list(message.joint_names) == JOINTS and message.header.stamp.sec == message.header.stamp.nanosec == 0
    np.testing.assert_allclose(point.positions, goal)
    assert list(point.velocities) == ([0.1] * 6 if velocities else [])
    assert (point.time_from_start.sec, point.time_from_start.nanosec) == (0, 20_000_000)


def test_nobody_who_listens_is_one_clear_error(make):
    driver = make(command="/nobody", patience=0.3)
    with pytest.raises(DriverError, match="arm left: ros2_control trajectory on /nobody: .* nobody who listens"):
        driver.connect()


def test_controllers_that_go_are_one_clear_error(rig, make):
    driver = make(stale=0.3)
    driver.connect()
    rig.ask(lambda: rig.controllers.activate(False))
    with pytest.raises(DriverError, match="expected a controller that is active there, found nobody who listens"):
        until(lambda: driver.send(target(rig.position())))
    rig.ask(lambda: rig.controllers.activate(True))
    driver.connect()
    drive(rig, driver, rig.position() + 0.05, 0.3)


def test_states_of_other_joints_are_not_taken(make, rig):
    driver = make(joints=["somewhere", *JOINTS[1:]], patience=0.3)
    with pytest.raises(DriverError, match="no joint state on"):
        driver.connect()
    driver = make(joints=[JOINTS[0], "somewhere", *JOINTS[2:]], patience=0.3)
    with pytest.raises(DriverError, match="expected the position of 'somewhere'"):
        driver.connect()


@pytest.mark.parametrize("tip", ["tool", "link"])
@pytest.mark.parametrize("base_link", ["base_link", ""])
def test_the_twist_is_the_motion_of_the_pose(tmp_path, tip, base_link):
    from vla_control.drivers.driver import ArmInfo
    from vla_control.drivers.ros2_control import Ros2ControlConfig, _Tool

    robot = description(tmp_path)
    config = Ros2ControlConfig("twist", "/command", "/theirs", base_link=base_link, tip=tip)
    tool = _Tool(ArmInfo("left", tuple(JOINTS), 0.01, robot=robot), config)
    assert tool.frame == (base_link or "table")
    rng = np.random.default_rng(4)
    for _ in range(20):
        q, velocity, step = rng.uniform(-2.0, 2.0, 6), rng.uniform(-1.0, 1.0, 6), 1e-6
        before, after = tool.pose(q - step * velocity), tool.pose(q + step * velocity)
        twist = tool.twist(q, velocity, q, gain=10.0)
        np.testing.assert_allclose(twist[:3], (after - before)[:3, 3] / (2 * step), atol=1e-6)
        turned = Rotation.from_matrix(after[:3, :3] @ before[:3, :3].T).as_rotvec() / (2 * step)
        np.testing.assert_allclose(twist[3:], turned, atol=1e-6)
    # At rest it leads to the target: the tip's distance shrinks at `gain` of itself a second.
    q, goal = rng.uniform(-1.0, 1.0, 6), rng.uniform(-1.0, 1.0, 6) * 0.01
    way = tool.pose(q + goal)[:3, 3] - tool.pose(q)[:3, 3]
    twist = tool.twist(q + goal, np.zeros(6), q, gain=10.0)
    np.testing.assert_allclose(twist[:3], 10.0 * way, atol=0.2 * np.linalg.norm(10.0 * way))


def test_a_pose_is_the_tools_in_the_controllers_base(tmp_path):
    from vla_control.drivers.driver import ArmInfo
    from vla_control.drivers.ros2_control import Ros2ControlConfig, _Tool
    from vla_core.kinematics import Kinematics

    robot = description(tmp_path)
    arm, q = robot.arms[0], robot.arms[0].home
    tool = _Tool(
        ArmInfo("left", tuple(JOINTS), 0.01, robot=robot),
        Ros2ControlConfig("pose", "/command", "/theirs", base_link="base_link", tip="link"),
    )
    T_table_base = robot.parts[0].T_base_part
    T_table_tool = Kinematics(robot).forward("left", q)
    np.testing.assert_allclose(T_table_base @ tool.pose(q) @ arm.tool.T_link_tool, T_table_tool, atol=1e-9)
