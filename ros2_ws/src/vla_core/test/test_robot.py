"""The robot description: the shipped robots, and one clear error for each mistake in a file."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pinocchio
import pytest
import yaml
from vla_core.robot import DEFAULT_JERK, DEFAULT_TRACKING, RobotError, load_robot, resolve_uri, transform

ROBOTS = Path(load_robot("panda").path).parent


@pytest.fixture
def tree():
    return copy.deepcopy(PANDA)


@pytest.fixture
def load(tmp_path):
    """Loads a description from a tree written to a file."""

    def write_and_load(tree):
        file = tmp_path / "robot.yaml"
        file.write_text(yaml.safe_dump(tree))
        return load_robot(file)

    return write_and_load


def place(tree, path, value):
    """A copy of the tree with the value at a dotted path; the value `place` deletes the key."""
    tree = copy.deepcopy(tree)
    *parents, last = path.split(".")
    node = tree
    for key in parents:
        node = node[key]
    if value is place:
        del node[last]
    else:
        node[last] = value
    return tree


def key_paths(tree, prefix=""):
    """Dotted paths of all keys of the description (not inside free-form parts)."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        yield path
        if isinstance(value, dict) and not path.endswith((".driver", "simulation")):
            yield from key_paths(value, path + ".")


PANDA = yaml.safe_load((ROBOTS / "panda.yaml").read_text())
#: What the example has not.
for path in ("collision", "arms.arm.start", "arms.arm.contact", "arms.arm.driver", "arms.arm.tool.cone"):
    *parents, last = path.split(".")
    functools.reduce(dict.__getitem__, parents, PANDA).pop(last, None)
#: Keys that may be left out, and names given by the user, without which the rest is still whole.
OPTIONAL = {"simulation", "arms.arm.gripper", "cameras.scene.calibration", "cameras.wrist.calibration"}
NAMES = {"cameras.scene", "cameras.wrist", "arms.arm.gripper.joints.panda_finger_joint1"}
NAMES |= {"arms.arm.gripper.joints.panda_finger_joint2", "arms.arm"}
REQUIRED = [p for p in key_paths(PANDA) if p not in OPTIONAL | NAMES and not p.startswith("simulation.")]


@pytest.mark.parametrize("path", REQUIRED)
def test_every_missing_key_is_named_with_its_path(tree, load, path):
    with pytest.raises(RobotError, match=f"robot.yaml: {path}: missing; expected a value, found keys"):
        load(place(tree, path, place))


@pytest.mark.parametrize("path", sorted(OPTIONAL))
def test_optional_keys_may_be_left_out(tree, load, path):
    load(place(tree, path, place))


@pytest.mark.parametrize(
    "parent",
    ["", "model.", "rates.", "arms.arm.", *(f"arms.arm.{k}." for k in ("limits", "tool", "workspace", "gripper"))]
    + ["arms.arm.gripper.joints.panda_finger_joint1.", "cameras.scene."],
)
def test_every_unknown_key_is_named_with_its_path(tree, load, parent):
    with pytest.raises(RobotError, match=f"robot.yaml: {parent}typo: unknown key; expected one of"):
        load(place(tree, f"{parent}typo", 1))


def test_a_joint_missing_from_the_list_is_noticed_by_the_lengths(tree, load):
    joints = tree["arms"]["arm"]["joints"]
    with pytest.raises(RobotError, match=r"arms.arm.limits.lower: expected a list of 6 numbers, found \[-2.8973"):
        load(place(tree, "arms.arm.joints", joints[:3] + joints[4:]))


@pytest.mark.parametrize("key", ["lower", "upper", "velocity", "acceleration"])
def test_limits_need_one_number_a_joint(tree, load, key):
    values = tree["arms"]["arm"]["limits"][key]
    with pytest.raises(RobotError, match=f"arms.arm.limits.{key}: expected a list of 7 numbers"):
        load(place(tree, f"arms.arm.limits.{key}", [*values, 1.0]))


def test_tracking_tolerances_may_be_given_for_each_joint(tree, load):
    assert (load(tree).arm("arm").limits.tracking == DEFAULT_TRACKING).all()
    given = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    robot = load(place(tree, "arms.arm.limits.tracking", given))
    assert robot.arm("arm").limits.tracking.tolist() == given


BAD = [
    ("name", ""),
    ("name", 7),
    ("base_frame", None),
    ("model", "panda.urdf"),
    ("model", []),
    ("model.prefix", ""),
    ("model.prefix", 1),
    ("model.file", "absent.urdf"),
    ("model.xyz", [0.0, 0.0]),
    ("model.rpy", [0.0, 0.0, float("nan")]),
    ("rates.control", 0.0),
    ("rates.control", -100.0),
    ("rates.control", "fast"),
    ("rates.observation", float("inf")),
    ("rates.observation", True),
    ("arms", {}),
    ("arms", None),
    ("arms", ["arm"]),
    ("arms.arm", None),
    ("arms.arm.joints", []),
    ("arms.arm.joints", ["a"] * 7),
    ("arms.arm.joints", "panda_joint1"),
    ("arms.arm.home", [0.0] * 6),
    ("arms.arm.home", [float("nan")] * 7),
    ("arms.arm.home", [0.0] * 7),
    ("arms.arm.home", None),
    ("arms.arm.limits.velocity", [2.0] * 6 + [0.0]),
    ("arms.arm.limits.acceleration", [5.0] * 6 + [-5.0]),
    ("arms.arm.limits.upper", [2.8] * 6 + [float("inf")]),
    ("arms.arm.limits.tracking", [0.5] * 6),
    ("arms.arm.limits.tracking", [0.5] * 6 + [0.0]),
    ("arms.arm.limits.jerk", [100.0] * 6),
    ("arms.arm.limits.jerk", [100.0] * 6 + [-1.0]),
    ("arms.arm.tool.link", 3),
    ("arms.arm.tool.speed", 0.0),
    ("arms.arm.tool.xyz", [0, 0, "0.1"]),
    ("arms.arm.workspace.lower", [0.2, float("nan"), 0.0]),
    ("arms.arm.gripper.speed", -1),
    ("arms.arm.gripper.force", 0.0),
    ("arms.arm.driver", "ur"),
    ("arms.arm.gripper.joints", {}),
    ("arms.arm.gripper.joints.panda_finger_joint1", {"closed": 0.1, "open": 0.1}),
    ("cameras", None),
    ("cameras", []),
    ("cameras.scene", None),
    ("cameras.scene.width", 320.5),
    ("cameras.scene.width", 0),
    ("cameras.scene.rate", float("nan")),
    ("cameras.scene.driver", "mujoco"),
    ("cameras.scene.calibration", ""),
    ("simulation", "table"),
]


@pytest.mark.parametrize(("path", "value"), BAD)
def test_a_bad_value_is_named_with_its_path(tree, load, path, value):
    with pytest.raises(RobotError, match=f"robot.yaml: {path}: expected .*found"):
        load(place(tree, path, value))


#: Optional sections, each whole and sound; path -> value.
SECTIONS = {
    "arms.arm.tool.cone": {"axis": [0.0, 0.0, 2.0], "direction": [0.0, 0.0, -1.0], "angle": 0.8},
    "arms.arm.start": {"joint": 0.05, "tool": 0.02},
    "arms.arm.contact": {"force": 30.0, "torque": 5.0, "effort": [9.0] * 7, "retreat": 0.02},
    "arms.arm.driver": {"type": "franka", "address": "172.16.0.2"},
    "collision": {
        "margin": 0.03,
        "allow": [["panda_link5", "panda_link7"]],
        "world": {"table": {"lower": [-1.0, -1.0, -1.0], "upper": [1.0, 1.0, 0.0], "allow": ["panda_link0"]}},
    },
}


def with_sections(tree):
    for path, value in SECTIONS.items():
        tree = place(tree, path, copy.deepcopy(value))
    return tree


def test_what_is_left_out_takes_its_default(tree, load):
    robot = load(tree)
    arm = robot.arm("arm")
    assert arm.limits.jerk.tolist() == (DEFAULT_JERK * arm.limits.acceleration).tolist()
    assert (arm.start.joint, arm.start.tool) == (0.01, 0.001)  # the goals: within 0.01 rad and 1 mm
    assert arm.tool.cone is None and arm.contact is None and arm.driver == {} and arm.gripper.force is None
    assert (robot.collision.margin, robot.collision.allow, robot.collision.world) == (0.02, (), ())
    assert [(p.prefix, p.T_base_part.tolist()) for p in robot.parts] == [("", np.eye(4).tolist())]


def test_every_optional_section_is_read(tree, load):
    tree = place(place(with_sections(tree), "arms.arm.limits.jerk", [50.0] * 7), "arms.arm.gripper.force", 40.0)
    robot = load(tree)
    arm = robot.arm("arm")
    assert arm.limits.jerk.tolist() == [50.0] * 7
    assert arm.tool.cone.axis.tolist() == [0.0, 0.0, 1.0]  # made a unit vector
    assert (arm.tool.cone.direction.tolist(), arm.tool.cone.angle) == ([0.0, 0.0, -1.0], 0.8)
    assert (arm.start.joint, arm.start.tool) == (0.05, 0.02)
    assert (arm.contact.force, arm.contact.torque, arm.contact.retreat) == (30.0, 5.0, 0.02)
    assert arm.contact.effort.tolist() == [9.0] * 7
    assert dict(arm.driver) == {"type": "franka", "address": "172.16.0.2"}
    assert arm.gripper.force == 40.0
    assert (robot.collision.margin, robot.collision.allow) == (0.03, (("panda_link5", "panda_link7"),))
    (table,) = robot.collision.world
    assert (table.name, table.margin, table.allow) == ("table", 0.03, ("panda_link0",))  # the margin of all
    assert table.box.lower.tolist() == [-1.0, -1.0, -1.0] and table.box.upper.tolist() == [1.0, 1.0, 0.0]


def test_an_obstacle_may_have_a_margin_of_its_own(tree, load):
    tree = place(with_sections(tree), "collision.world.table.margin", 0.0)
    assert load(tree).collision.world[0].margin == 0.0


@pytest.mark.parametrize("key", ["force", "torque", "effort"])
def test_one_threshold_of_contact_is_enough_and_the_others_are_none(tree, load, key):
    value = SECTIONS["arms.arm.contact"][key]
    contact = load(place(tree, "arms.arm.contact", {key: value})).arm("arm").contact
    assert contact.retreat == 0.0
    for other in {"force", "torque", "effort"} - {key}:
        assert np.isinf(getattr(contact, other)).all()


@pytest.mark.parametrize(
    "parent",
    ["model.", "arms.arm.tool.cone.", "arms.arm.start.", "arms.arm.contact.", "collision.", "collision.world.table."],
)
def test_an_unknown_key_of_an_optional_section_is_named_with_its_path(tree, load, parent):
    with pytest.raises(RobotError, match=f"robot.yaml: {parent}typo: unknown key; expected one of"):
        load(place(with_sections(tree), f"{parent}typo", 1))


@pytest.mark.parametrize(
    "path",
    ["arms.arm.tool.cone.axis", "arms.arm.tool.cone.direction", "arms.arm.tool.cone.angle", "arms.arm.start.joint"]
    + ["arms.arm.start.tool", "arms.arm.driver.type", "collision.world.table.lower", "collision.world.table.upper"],
)
def test_a_missing_key_of_an_optional_section_is_named_with_its_path(tree, load, path):
    with pytest.raises(RobotError, match=f"robot.yaml: {path}: missing; expected a value"):
        load(place(with_sections(tree), path, place))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("arms.arm.tool.cone.axis", [0.0, 0.0, 0.0]),
        ("arms.arm.tool.cone.direction", [0.0, 1.0]),
        ("arms.arm.tool.cone.angle", 0.0),
        ("arms.arm.tool.cone.angle", 3.2),
        ("arms.arm.start.joint", 0.0),
        ("arms.arm.start.tool", -0.001),
        ("arms.arm.start.tool", float("nan")),
        ("arms.arm.contact.force", 0.0),
        ("arms.arm.contact.torque", "hard"),
        ("arms.arm.contact.effort", [9.0] * 6),
        ("arms.arm.contact.effort", [9.0] * 6 + [0.0]),
        ("arms.arm.contact.retreat", -0.01),
        ("arms.arm.contact.retreat", 0.5),
        ("arms.arm.driver.type", ""),
        ("collision.margin", -0.01),
        ("collision.allow", ["panda_link5"]),
        ("collision.allow", []),
        ("collision.world", {}),
        ("collision.world.table.margin", -1.0),
        ("collision.world.table.allow", "panda_link0"),
        ("collision.world.table.lower", [0.0, 0.0]),
    ],
)
def test_a_bad_value_of_an_optional_section_is_named_with_its_path(tree, load, path, value):
    with pytest.raises(RobotError, match=rf"robot.yaml: {path}(\[0\])?: expected .*found"):
        load(place(with_sections(tree), path, value))


@pytest.mark.parametrize("pair", [["panda_link5"], ["panda_link5", "panda_link6", "panda_link7"]])
def test_links_that_may_touch_come_in_pairs(tree, load, pair):
    with pytest.raises(RobotError, match=r"robot.yaml: collision.allow\[0\]: expected a pair of links, found"):
        load(place(with_sections(tree), "collision.allow", [pair]))


def test_an_obstacle_must_have_a_volume(tree, load):
    tree = place(with_sections(tree), "collision.world.table.upper", [1.0, 1.0, -1.0])
    with pytest.raises(RobotError, match="collision.world.table: expected lower below upper on every axis, found"):
        load(tree)


def test_contact_without_a_threshold_is_refused(tree, load):
    with pytest.raises(RobotError, match="arms.arm.contact: expected a threshold: force, torque or effort, found"):
        load(place(tree, "arms.arm.contact", {"retreat": 0.01}))


def test_a_cell_is_made_of_parts(tree, load):
    part = tree["model"]
    other = dict(part, xyz=[0.0, 0.6, 0.0], rpy=[0.0, 0.0, 1.0], prefix="right_")
    robot = load(place(tree, "model", [part, other]))
    assert [p.prefix for p in robot.parts] == ["", "right_"]
    np.testing.assert_array_equal(robot.parts[1].T_base_part, transform([0.0, 0.6, 0.0], [0.0, 0.0, 1.0]))
    assert robot.files == "panda.urdf, panda.urdf"


def test_a_fault_of_a_part_is_named_with_its_place_in_the_list(tree, load):
    part = tree["model"]
    with pytest.raises(RobotError, match=r"robot.yaml: model\[1\].xyz: missing"):
        load(place(tree, "model", [part, {k: v for k, v in part.items() if k != "xyz"}]))


@pytest.mark.parametrize("path", ["model.file", "cameras.scene.calibration"])
def test_a_file_of_a_package_that_is_not_there_is_named_with_its_path(tree, load, path):
    with pytest.raises(
        RobotError, match=f"robot.yaml: {path}: package://absent/x: expected a file of package 'absent'"
    ):
        load(place(tree, path, "package://absent/x"))


@pytest.mark.parametrize("folder", ["../calibration", "package://vla_calibration"])
def test_a_calibration_may_be_made_later(tree, load, folder):
    robot = load(place(tree, "cameras.scene.calibration", f"{folder}/new/scene.yaml"))
    assert robot.camera("scene").calibration.parts[-2:] == ("new", "scene.yaml")
    assert not robot.camera("scene").calibration.exists()


def test_lower_limits_must_lie_below_the_upper_ones(tree, load):
    tree["arms"]["arm"]["limits"]["lower"][2] = 3.0
    with pytest.raises(RobotError, match="arms.arm.limits: expected lower below upper for every joint"):
        load(tree)


def test_the_workspace_must_have_a_volume(tree, load):
    tree["arms"]["arm"]["workspace"]["lower"][1] = 0.5
    with pytest.raises(RobotError, match="arms.arm.workspace: expected lower below upper on every axis"):
        load(tree)


def test_two_arms_do_not_share_a_joint(tree, load):
    tree["arms"]["other"] = tree["arms"]["arm"]
    with pytest.raises(RobotError, match="arms: expected every joint in one arm or gripper only, found .*panda_joint1"):
        load(tree)


def test_a_finger_is_no_arm_joint_and_moves_in_one_gripper_only(tree, load):
    tree["arms"]["arm"]["gripper"]["joints"]["panda_joint7"] = {"closed": 0.0, "open": 1.0}
    with pytest.raises(RobotError, match="arms: expected every joint in one arm or gripper only, found .*panda_joint7"):
        load(tree)


@pytest.mark.parametrize("text", ["", "- 1", "robot", "a: [1", "a: 1\na: {b"])
def test_a_file_that_is_no_description_is_refused(tmp_path, text):
    file = tmp_path / "robot.yaml"
    file.write_text(text)
    with pytest.raises(RobotError, match="robot.yaml: (not valid YAML|top level: expected a mapping|model: missing)"):
        load_robot(file)


def test_a_key_given_twice_is_refused(tmp_path):
    file = tmp_path / "robot.yaml"
    file.write_text(
        (ROBOTS / "panda.yaml").read_text().replace("base_frame: world", "base_frame: world\nbase_frame: table")
    )
    with pytest.raises(RobotError, match="base_frame.*twice"):
        load_robot(file)


def test_a_robot_may_have_no_cameras(tree, load):
    assert load(place(tree, "cameras", {})).cameras == ()


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(RobotError, match="robot description absent.yaml: expected a YAML file, found none there"):
        load_robot("absent.yaml")


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(RobotError, match="robot 'pandda': expected a YAML file or one of .*'aloha', .*'panda'"):
        load_robot("pandda")


def test_a_folder_of_the_users_own_is_searched_first(tmp_path, monkeypatch, tree):
    for name in ("mine", "panda"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(place(tree, "name", "mine")))
    monkeypatch.setenv("VLA_ROBOT_PATH", str(tmp_path))
    assert load_robot("mine").name == load_robot("panda").name == "mine"
    assert load_robot("aloha").name == "aloha"


@pytest.mark.parametrize("workspace", ["sourced", "not sourced"])
def test_robots_are_found_by_name_from_any_folder(tmp_path, workspace):
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if workspace == "not sourced":
        environment.pop("AMENT_PREFIX_PATH", None)
    code = "from vla_core.robot import load_robot; robots = [load_robot(n) for n in ('panda', 'aloha')]; "
    code += "print([r.name for r in robots], all(c.calibration.is_file() for r in robots for c in r.cameras))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert found.stdout.strip() == "['panda', 'aloha'] True", found.stderr


# ------------------------------------------------------------------------------------------------- shipped robots


@pytest.mark.parametrize("name", ["panda", "aloha"])
def test_the_shipped_robots_are_whole(name):
    robot = load_robot(name)
    assert robot.name == name and robot.base_frame == "world"
    assert all(part.file.is_file() for part in robot.parts)
    assert robot.joint_names == tuple(j for arm in robot.arms for j in arm.joints)
    for arm in robot.arms:
        assert robot.arm(arm.name) is arm
        assert arm.tool.frame == f"{arm.name}_tool"
        assert not set(robot.finger_names) & set(arm.joints)
    for camera in robot.cameras:
        assert robot.camera(camera.name) is camera
        assert camera.frame == f"{camera.name}_optical_frame"


def test_panda_limits_lie_within_those_of_the_urdf():
    robot = load_robot("panda")
    model = pinocchio.buildModelFromUrdf(str(robot.parts[0].file))
    arm = robot.arms[0]
    index = [model.joints[model.getJointId(j)].idx_q for j in arm.joints]
    assert (arm.limits.lower >= model.lowerPositionLimit[index] - 1e-9).all()
    assert (arm.limits.upper <= model.upperPositionLimit[index] + 1e-9).all()
    assert (arm.limits.velocity <= model.velocityLimit[index] + 1e-9).all()
    for finger in arm.gripper.joints:
        i = model.joints[model.getJointId(finger.name)].idx_q
        assert model.lowerPositionLimit[i] <= finger.closed < finger.open <= model.upperPositionLimit[i]


def test_arrays_cannot_be_changed():
    arm = load_robot("panda").arms[0]
    arrays = [arm.home, arm.tool.T_link_tool, arm.limits.lower, arm.limits.acceleration, arm.workspace.upper]
    for array in [*arrays, load_robot("panda").parts[0].T_base_part]:
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_an_unknown_arm_or_camera_is_answered_with_the_known_ones():
    robot = load_robot("aloha")
    with pytest.raises(RobotError, match=r"robot aloha: arm: expected one of \['left', 'right'\], found 'middle'"):
        robot.arm("middle")
    with pytest.raises(RobotError, match=r"robot aloha: camera: expected one of \['top', 'angle'\], found 'wrist'"):
        robot.camera("wrist")


@pytest.mark.parametrize("name", ["panda", "aloha"])
def test_a_grippers_opening_comes_back_from_its_joints(name):
    for arm in load_robot(name).arms:
        for opening in (0.0, 0.3, 1.0):
            assert arm.gripper.opening(arm.gripper.positions(opening)) == pytest.approx(opening, abs=1e-12)


def test_transform_is_that_of_urdf():
    T = transform([1, 2, 3], [0.1, 0.2, 0.3])
    expected = pinocchio.SE3(pinocchio.rpy.rpyToMatrix(0.1, 0.2, 0.3), np.array([1.0, 2.0, 3.0])).homogeneous
    np.testing.assert_allclose(T, expected, atol=1e-15)


# ----------------------------------------------------------------------------------------------------------- files


def test_a_package_uri_is_found_in_a_ros_package_first(tmp_path, monkeypatch):
    file = tmp_path / "share" / "some_robot" / "model.urdf"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))
    assert resolve_uri("package://some_robot/model.urdf") == file


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(RobotError, match="package://absent/model.urdf: expected a file of package 'absent'"):
        resolve_uri("package://absent/model.urdf")


def test_a_relative_path_is_relative_to_the_description(tmp_path):
    assert resolve_uri("a/b.urdf", tmp_path) == tmp_path / "a" / "b.urdf"
    assert resolve_uri("/a/b.urdf", tmp_path) == Path("/a/b.urdf")
