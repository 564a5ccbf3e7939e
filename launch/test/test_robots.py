"""The robot files of launch/robots: sound, within their makers' limits, and moving as the makers say.

Oracles: pinocchio on the same URDF, coal for distances, the makers' published Denavit-Hartenberg parameters.
"""

import dataclasses
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock, patch

import coal
import mujoco
import numpy as np
import pinocchio
import pytest
from vla_control.capsules import fit_capsules, watched_pairs
from vla_control.cell_driver import make_drivers
from vla_control.command import ArmCommand, Command
from vla_control.drivers import DRIVERS
from vla_control.safety import Measured, SafetyController, State
from vla_core.kinematics import Kinematics, load_model
from vla_core.robot import load_robot, resolve_uri, transform

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "robots"
ROBOTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
#: Robot -> type of its driver; those without a driver are simulated.
HARDWARE = {
    "ur5e": "ur", "dual_ur5e": "ur", "panda_real": "franka", "dual_panda": "franka", "xarm7": "xarm",
    "piper": "piper", "dual_piper": "piper", "viperx": "dynamixel", "aloha_real": "dynamixel",
    "so101": "feetech", "dual_so101": "feetech",
}  # fmt: skip
SIMULATED = ["aloha", "panda"]
URDF = sorted({*HARDWARE, "panda"})
#: Settings by which a driver finds its arm.
ADDRESSES = ("host", "address", "channel", "port")
#: Packages of the arms' makers that a machine without these arms need not have.
VENDORS = {
    "dynamixel_sdk": ["dynamixel_sdk"], "scservo_sdk": ["scservo_sdk"], "franky": ["franky"], "can": ["can"],
    "xarm": ["xarm", "xarm.core", "xarm.core.config", "xarm.core.config.x_code", "xarm.wrapper"],
}  # fmt: skip


@pytest.fixture(scope="module")
def robots():
    return {name: load_robot(FOLDER / f"{name}.yaml") for name in ROBOTS}


@pytest.fixture
def makers_libraries():
    """Stands in for the libraries that are not installed here, so that settings are checked without them."""
    absent = [name for name in VENDORS if importlib.util.find_spec(name) is None]
    # A class, since the servos' ports are made from it.
    stand_ins = {m: MagicMock(PortHandler=type("PortHandler", (), {})) for name in absent for m in VENDORS[name]}
    with patch.dict(sys.modules, stand_ins):
        yield


def part_of(robot, arm):
    """The part of the cell that an arm belongs to."""
    return max((p for p in robot.parts if arm.joints[0].startswith(p.prefix)), key=lambda part: len(part.prefix))


class Alone:
    """The oracle: pinocchio on the URDF of one arm."""

    def __init__(self, robot, arm):
        self.part = part_of(robot, arm)
        self.arm = arm
        self.model = pinocchio.buildModelFromUrdf(str(self.part.file))
        self.data = self.model.createData()
        self.frame = self.model.getFrameId(self.name(arm.tool.link))
        self.columns = [self.index(joint) for joint in arm.joints]

    def name(self, name):
        return name.removeprefix(self.part.prefix)

    def index(self, joint):
        """Place of a joint in q and v (every joint has one coordinate)."""
        found = self.model.joints[self.model.getJointId(self.name(joint))]
        assert (found.nq, found.nv) == (1, 1)
        return found.idx_q

    def full(self, q):
        positions = pinocchio.neutral(self.model)
        positions[self.columns] = q
        return positions

    def forward(self, q):
        """T_base_tool (4, 4)."""
        pinocchio.framesForwardKinematics(self.model, self.data, self.full(q))
        return self.part.T_base_part @ self.data.oMf[self.frame].homogeneous @ self.arm.tool.T_link_tool


def test_every_file_is_known_here():
    assert ROBOTS == sorted([*HARDWARE, *SIMULATED])


@pytest.mark.parametrize("name", ROBOTS)
def test_a_robot_is_called_as_its_file(robots, name):
    assert robots[name].name == name


@pytest.mark.parametrize("name", ROBOTS)
def test_joints_are_those_that_move_the_tool_and_home_is_a_good_place(robots, name):
    robot = robots[name]
    kinematics = Kinematics(robot)  # refuses joints that are not in kinematic order, or miss one
    for arm in robot.arms:
        room = np.minimum(arm.home - arm.limits.lower, arm.limits.upper - arm.home)
        assert (room > 0.05).all(), f"{arm.name}: home is {room} rad from the limits"
        T = kinematics.forward(arm.name, arm.home)
        assert (arm.workspace.lower < T[:3, 3]).all() and (T[:3, 3] < arm.workspace.upper).all(), T[:3, 3]
        if arm.tool.cone:
            lean = np.arccos(np.clip(T[:3, :3] @ arm.tool.cone.axis @ arm.tool.cone.direction, -1.0, 1.0))
            assert lean < arm.tool.cone.angle


@pytest.mark.parametrize("name", ROBOTS)
def test_at_home_links_keep_their_margin(robots, name):
    robot = robots[name]
    model = load_model(robot)
    data = placed(model, robot)
    capsules = fit_capsules(robot)
    allowed = {link for pair in robot.collision.allow for link in pair}
    allowed |= {link for obstacle in robot.collision.world for link in obstacle.allow}
    assert allowed <= {capsule.link for capsule in capsules}  # else allowed in vain
    solids = [solid(data, capsule) for capsule in capsules]
    for i, j in watched_pairs(robot, capsules):
        apart = distance(*solids[i], *solids[j])
        assert apart > robot.collision.margin, f"{capsules[i].link} and {capsules[j].link}: {apart} m"
    for obstacle in robot.collision.world:
        middle = transform((obstacle.box.lower + obstacle.box.upper) / 2, [0.0, 0.0, 0.0])
        box = coal.Box(*(obstacle.box.upper - obstacle.box.lower)), as_transform(middle)
        for capsule, (shape, T) in zip(capsules, solids):
            if capsule.link not in obstacle.allow:
                apart = distance(shape, T, *box)
                assert apart > obstacle.margin, f"{capsule.link} and {obstacle.name}: {apart} m"


def placed(model, robot):
    """The model's data with every arm at home."""
    data = mujoco.MjData(model)
    for arm in robot.arms:
        data.qpos[[model.joint(joint).qposadr[0] for joint in arm.joints]] = arm.home
    mujoco.mj_kinematics(model, data)
    return data


def as_transform(T):
    return coal.Transform3s(T[:3, :3], T[:3, 3])


def solid(data, capsule):
    """coal's capsule, along its z about its middle, and where it is in the base frame."""
    along = capsule.end - capsule.start
    body = data.body(capsule.link)
    T_body_capsule = np.eye(4)
    T_body_capsule[:3, :3] = pinocchio.Quaternion.FromTwoVectors(np.array([0.0, 0.0, 1.0]), along).matrix()
    T_body_capsule[:3, 3] = (capsule.start + capsule.end) / 2
    T_base_body = np.eye(4)
    T_base_body[:3, :3], T_base_body[:3, 3] = body.xmat.reshape(3, 3), body.xpos
    return coal.Capsule(capsule.radius, np.linalg.norm(along)), as_transform(T_base_body @ T_body_capsule)


def distance(first, T_first, second, T_second):
    return coal.distance(first, T_first, second, T_second, coal.DistanceRequest(), coal.DistanceResult())


@pytest.mark.parametrize("name", URDF)
def test_limits_are_not_beyond_the_makers(robots, name):
    robot = robots[name]
    for arm in robot.arms:
        alone = Alone(robot, arm)
        model, columns = alone.model, alone.columns
        assert (arm.limits.lower >= model.lowerPositionLimit[columns] - 1e-4).all()
        assert (arm.limits.upper <= model.upperPositionLimit[columns] + 1e-4).all()
        assert (arm.limits.velocity <= model.velocityLimit[columns] + 1e-9).all()
        for finger in arm.gripper.joints if arm.gripper else ():
            i = alone.index(finger.name)
            low, high = sorted((finger.closed, finger.open))
            assert model.lowerPositionLimit[i] <= low < high <= model.upperPositionLimit[i], finger.name


@pytest.mark.parametrize("name", URDF)
def test_kinematics_are_those_of_pinocchio_on_the_same_urdf(robots, name):
    """Those of a part of a cell are those of its URDF alone, placed."""
    robot = robots[name]
    kinematics = Kinematics(robot)
    rng = np.random.default_rng(0)
    for arm in robot.arms:
        alone = Alone(robot, arm)
        for q in rng.uniform(arm.limits.lower, arm.limits.upper, (30, len(arm.joints))):
            np.testing.assert_allclose(kinematics.forward(arm.name, q), alone.forward(q), atol=1e-9)


# ------------------------------------------------------------------------------------------- hardware: drivers, limits


@pytest.mark.parametrize("name", HARDWARE)
def test_every_arm_has_a_driver_that_takes_its_settings(robots, name, makers_libraries):
    robot = robots[name]
    drivers = make_drivers(robot, clock=lambda: 0.0)
    assert list(drivers) == [arm.name for arm in robot.arms]
    for arm in robot.arms:
        assert arm.driver["type"] == HARDWARE[name]
        assert drivers[arm.name].arm.joints == arm.joints
        assert drivers[arm.name].arm.period == 1.0 / robot.rates.control
        assert drivers[arm.name].capabilities.rate >= robot.rates.control


@pytest.mark.parametrize("name", HARDWARE)
def test_no_two_arms_have_one_address(robots, name):
    addresses = [next(arm.driver[key] for key in ADDRESSES if key in arm.driver) for arm in robots[name].arms]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_robots_have_no_driver(robots, name):
    assert robots[name].simulation and not any(arm.driver for arm in robots[name].arms)


@pytest.mark.parametrize("name", HARDWARE)
def test_hardware_is_gentle_and_stands_on_a_table(robots, name):
    robot = robots[name]
    assert [obstacle.name for obstacle in robot.collision.world] == ["table"]
    (table,) = robot.collision.world
    assert robot.collision.margin == table.margin == 0.02
    for arm in robot.arms:
        assert arm.tool_limits.speed <= 0.25
        assert arm.workspace.lower[2] >= table.box.upper[2]
        assert arm.contact is not None
        # The jerk limit is kept by averaging over 2 A / (J T) periods: few, so that a stop begins at once.
        periods = 2.0 * arm.limits.acceleration / (arm.limits.jerk / robot.rates.control)
        assert (periods <= 6.0).all(), periods


@pytest.mark.parametrize("name", HARDWARE)
def test_under_the_safety_controller_the_tools_go_where_they_are_sent(robots, name):
    """From home 3 cm down in half a second, with arms that follow at once: nothing in the file is in the way."""
    robot = robots[name]
    controller, kinematics = SafetyController(robot), Kinematics(robot)
    period, count = 1.0 / robot.rates.control, round(0.5 * robot.rates.control)
    down = np.array([0.0, 0.0, -0.03, 0.0, 0.0, 0.0])
    position = {arm.name: arm.home for arm in robot.arms}
    gripper = {arm.name: 0.5 for arm in robot.arms if arm.gripper}
    controller.arm(Measured(0.0, position, gripper))
    for step in range(1, 2 * count + 1):
        now = step * period
        parts = {arm.name: ArmCommand(delta=down / count * (step <= count)) for arm in robot.arms}
        command = Command(now, step, "test", period, arms=parts)
        decision = controller.step(command, Measured(now, position, gripper), now)
        position = {arm: target.position for arm, target in decision.sent.items()}
        assert decision.state is State.RUNNING, decision.reason
    for arm in robot.arms:
        went = kinematics.forward(arm.name, position[arm.name]) - kinematics.forward(arm.name, arm.home)
        np.testing.assert_allclose(went[:3, 3], down[:3], atol=2e-3)


@pytest.mark.parametrize("name", [n for n, kind in HARDWARE.items() if kind in ("xarm", "piper")])
def test_an_arms_own_weight_is_no_contact(robots, name):
    """Where effort is in N m."""
    robot = robots[name]
    rng = np.random.default_rng(0)
    for arm in robot.arms:
        alone = Alone(robot, arm)
        for q in rng.uniform(arm.limits.lower, arm.limits.upper, (500, len(arm.joints))):
            weight = pinocchio.computeGeneralizedGravity(alone.model, alone.data, alone.full(q))[alone.columns]
            assert (np.abs(weight) < 0.9 * arm.contact.effort).all(), weight


@pytest.mark.parametrize(("name", "simulated"), [("panda_real", "panda"), ("aloha_real", "aloha")])
def test_a_real_robot_moves_as_the_simulated_one_and_has_its_names(robots, name, simulated):
    """So that the same policies fit."""
    real, model = robots[name], robots[simulated]
    assert real.arm_names == model.arm_names and real.joint_names == model.joint_names
    assert real.finger_names == model.finger_names
    assert {camera.name for camera in real.cameras} <= {camera.name for camera in model.cameras}
    moves, oracle = Kinematics(real), Kinematics(model)
    rng = np.random.default_rng(0)
    for arm, other in zip(real.arms, model.arms):
        assert (arm.home == other.home).all() and (arm.limits.upper <= other.limits.upper + 1e-9).all()
        assert [(j.closed, j.open) for j in arm.gripper.joints] == [(j.closed, j.open) for j in other.gripper.joints]
        for q in rng.uniform(arm.limits.lower, arm.limits.upper, (30, len(arm.joints))):
            np.testing.assert_allclose(
                moves.forward(arm.name, q), oracle.forward(arm.name, q), atol=2e-5
            )  # its angles have six digits


# ----------------------------------------------------------------------------------------------- the shipped models


def standard(a, alpha, d, theta):
    """T of one row of Denavit-Hartenberg parameters, standard convention: turn and go along z, then along x."""
    return transform([0, 0, d], [0, 0, theta]) @ transform([a, 0, 0], [alpha, 0, 0])


def modified(a, alpha, d, theta):
    """The same in Craig's convention: along x first, then z."""
    return transform([a, 0, 0], [alpha, 0, 0]) @ transform([0, 0, d], [0, 0, theta])


def test_the_ur5e_has_the_makers_parameters(robots):
    """Universal Robots, "DH Parameters for calculations of kinematics and dynamics"; its base is turned by pi."""
    arm = robots["ur5e"].arm("arm")
    rows = [(0, np.pi / 2, 0.1625), (-0.425, 0, 0), (-0.3922, 0, 0), (0, np.pi / 2, 0.1333), (0, -np.pi / 2, 0.0997)]
    rows.append((0, 0, 0.0996))
    for q in np.random.default_rng(0).uniform(arm.limits.lower, arm.limits.upper, (20, 6)):
        T = transform([0, 0, 0], [0, 0, np.pi])
        for (a, alpha, d), angle in zip(rows, q):
            T = T @ standard(a, alpha, d, angle)
        np.testing.assert_allclose(Kinematics(robots["ur5e"]).forward("arm", q), T, atol=1e-6)


def test_the_piper_has_the_makers_parameters(robots):
    """AgileX, piper_sdk 0.6.2, kinematics/piper_fk.py, dh_is_offset 1: a, alpha, d, offset of theta, to the flange."""
    arm = robots["piper"].arm("arm")
    half = np.pi / 2
    rows = [(0, 0, 0.123, 0), (0, -half, 0, -172.22), (0.28503, 0, 0, -102.78), (-0.02198, half, 0.25075, 0)]
    rows += [(0, -half, 0, 0), (0, half, 0.091, 0)]
    for q in np.random.default_rng(0).uniform(arm.limits.lower, arm.limits.upper, (20, 6)):
        T = np.eye(4)
        for (a, alpha, d, offset), angle in zip(rows, q):
            T = T @ modified(a, alpha, d, angle + np.deg2rad(offset))
        expected = T @ arm.tool.T_link_tool
        np.testing.assert_allclose(Kinematics(robots["piper"]).forward("arm", q), expected, atol=1e-9)


def test_the_xarm7_is_the_description_of_its_maker_with_a_gripper(robots):
    robot = robots["xarm7"]
    arm = robot.arm("arm")
    file = resolve_uri("package://example_robot_data/robots/xarm_description/urdf/xarm7.urdf")
    model = pinocchio.buildModelFromUrdf(str(file))
    data = model.createData()
    for q in np.random.default_rng(0).uniform(arm.limits.lower, arm.limits.upper, (20, 7)):
        pinocchio.framesForwardKinematics(model, data, q)
        flange = data.oMf[model.getFrameId("link_eef")].homogeneous
        expected = flange @ transform([0, 0, 0.172], [0, 0, 0])
        np.testing.assert_allclose(Kinematics(robot).forward("arm", q), expected, atol=1e-9)


@pytest.mark.parametrize("path", sorted((FOLDER / "models").glob("*.urdf")), ids=lambda path: path.name)
def test_a_shipped_model_is_small_and_says_where_it_comes_from(path):
    text = path.read_text()
    assert path.stat().st_size < 1_000_000
    assert re.search(r"<!--.*(Kinematics|description of).*-->", text, re.DOTALL)
    assert path.name in (path.parent / "LICENSE").read_text()
    assert all(name.startswith("package://") for name in re.findall(r'filename="([^"]*)"', text))


# ---------------------------------------------------------------------------------------------------------------- docs

PAGES = sorted((ROOT / "docs" / "robots").glob("*.md"))


def test_every_robot_is_in_the_index_of_pages():
    index = (ROOT / "docs" / "robots" / "README.md").read_text()
    assert not [name for name in ROBOTS if f"`{name}`" not in index]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_that_it_is_no_safety_function_and_its_links_lead_somewhere(page):
    text = page.read_text()
    assert "not a certified safety function" in " ".join(text.split())
    targets = [target for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize(
    ("page", "driver"),
    [("ur", "ur"), ("franka", "franka"), ("xarm", "xarm"), ("piper", "piper"), ("dynamixel", "dynamixel")]
    + [("so101", "feetech")],
)
def test_settings_on_a_page_are_the_drivers_own_with_their_defaults(page, driver, makers_libraries):
    module, kind = DRIVERS[driver][0].split(":")
    fields = {field.name: field for field in dataclasses.fields(getattr(importlib.import_module(module), kind).Config)}
    table = re.findall(
        r"^\| (`[^|]*`) \| ([^|]*?) \|", (ROOT / "docs" / "robots" / f"{page}.md").read_text(), re.MULTILINE
    )
    rows = [(re.findall(r"`(\w+)`", names), defaults) for names, defaults in table]
    assert rows
    for names, defaults in rows:
        for name in names:
            assert name in fields, f"{page}.md: {name}"
            default = fields[name].default
            if default is dataclasses.MISSING:
                assert defaults == "required"
            elif isinstance(default, (int, float)) and not isinstance(default, bool):
                assert re.search(rf"(?<![\d.]){re.escape(f'{default:.10g}')}(?![\d.])", defaults), f"{page}.md: {name}"
