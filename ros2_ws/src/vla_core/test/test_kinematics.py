"""Kinematics: agreement with pinocchio (Panda) and dm_control (ALOHA), inverse kinematics, refusals."""

from dataclasses import replace
from pathlib import Path

import mujoco
import numpy as np
import pinocchio
import pytest
from dm_control import mujoco as dm_mujoco
from vla_core import se3
from vla_core.kinematics import Kinematics, KinematicsError, load_model, load_spec
from vla_core.robot import GripperJoint, RobotError, load_robot, transform

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def panda():
    return load_robot("panda")


@pytest.fixture(scope="module")
def aloha():
    return load_robot("aloha")


@pytest.fixture(scope="module")
def panda_kinematics(panda):
    return Kinematics(panda)


@pytest.fixture(scope="module")
def aloha_kinematics(aloha):
    return Kinematics(aloha)


def random_positions(arm, count):
    return RNG.uniform(arm.limits.lower, arm.limits.upper, (count, len(arm.joints)))


def changed(robot, **fields):
    return replace(robot, arms=(replace(robot.arms[0], **fields), *robot.arms[1:]))


class PinocchioPanda:
    """The oracle: pinocchio on the same URDF."""

    def __init__(self, robot):
        self.model = pinocchio.buildModelFromUrdf(str(robot.parts[0].file))
        self.data = self.model.createData()
        self.arm = robot.arms[0]
        self.frame = self.model.addFrame(
            pinocchio.Frame(
                "tool_point",
                self.model.frames[self.model.getFrameId(self.arm.tool.link)].parentJoint,
                self.model.frames[self.model.getFrameId(self.arm.tool.link)].placement
                * pinocchio.SE3(self.arm.tool.T_link_tool),
                pinocchio.FrameType.OP_FRAME,
            )
        )
        self.data = self.model.createData()
        self.columns = [self.model.joints[self.model.getJointId(j)].idx_v for j in self.arm.joints]

    def __call__(self, q):
        full = pinocchio.neutral(self.model)
        full[self.columns] = q
        J = pinocchio.computeFrameJacobian(
            self.model, self.data, full, self.frame, pinocchio.ReferenceFrame.LOCAL_WORLD_ALIGNED
        )
        pinocchio.framesForwardKinematics(self.model, self.data, full)
        return self.data.oMf[self.frame].homogeneous, J[:, self.columns]


def test_panda_agrees_with_pinocchio(panda, panda_kinematics):
    oracle = PinocchioPanda(panda)
    for q in random_positions(panda.arms[0], 100):
        T, J = oracle(q)
        np.testing.assert_allclose(panda_kinematics.forward("arm", q), T, atol=1e-9)
        np.testing.assert_allclose(panda_kinematics.jacobian("arm", q), J, atol=1e-9)


def test_aloha_agrees_with_dm_control(aloha, aloha_kinematics):
    physics = dm_mujoco.Physics.from_xml_path(str(aloha.parts[0].file))
    for arm in aloha.arms:
        for q in random_positions(arm, 20):
            with physics.reset_context():
                physics.named.data.qpos[list(arm.joints)] = q
            T = np.eye(4)
            T[:3, :3] = physics.named.data.xmat[arm.tool.link].reshape(3, 3)
            T[:3, 3] = physics.named.data.xpos[arm.tool.link]
            np.testing.assert_allclose(aloha_kinematics.forward(arm.name, q), T @ arm.tool.T_link_tool, atol=1e-9)


@pytest.mark.parametrize("name", ["panda", "aloha"])
def test_the_jacobian_is_the_derivative_of_the_tool_pose(name, request):
    robot, kinematics = request.getfixturevalue(name), request.getfixturevalue(f"{name}_kinematics")
    h = 1e-6
    for arm in robot.arms:
        for q in random_positions(arm, 5):
            steps = h * np.eye(len(q))
            change = [
                se3.delta(kinematics.forward(arm.name, q - s), kinematics.forward(arm.name, q + s)) / (2 * h)
                for s in steps
            ]
            np.testing.assert_allclose(kinematics.jacobian(arm.name, q), np.transpose(change), atol=1e-8)


def test_the_models_place_in_the_base_frame_counts(panda, panda_kinematics):
    T_base_model = transform([1.0, 2.0, 3.0], [0.4, -0.5, 0.6])
    moved = Kinematics(replace(panda, parts=(replace(panda.parts[0], T_base_part=T_base_model),)))
    q = panda.arms[0].home
    np.testing.assert_allclose(moved.forward("arm", q), T_base_model @ panda_kinematics.forward("arm", q), atol=1e-12)
    turn = np.kron(np.eye(2), T_base_model[:3, :3])
    np.testing.assert_allclose(moved.jacobian("arm", q), turn @ panda_kinematics.jacobian("arm", q), atol=1e-12)


def test_results_are_the_callers_own(panda, panda_kinematics):
    q = panda.arms[0].home
    for method in (panda_kinematics.forward, panda_kinematics.jacobian):
        first = method("arm", q)
        kept = first.copy()
        method("arm", q + 0.1)
        assert (first == kept).all()


@pytest.mark.parametrize("name", ["panda", "aloha"])
def test_inverse_reaches_poses_nearby_within_limits(name, request):
    robot, kinematics = request.getfixturevalue(name), request.getfixturevalue(f"{name}_kinematics")
    for arm in robot.arms:
        reached = 0
        for q in random_positions(arm, 50):
            T = kinematics.forward(arm.name, q)
            start = np.clip(q + RNG.normal(0, 0.1, len(q)), arm.limits.lower, arm.limits.upper)
            found = kinematics.inverse(arm.name, T, start)
            if found is not None:
                reached += 1
                assert (found >= arm.limits.lower).all() and (found <= arm.limits.upper).all()
                np.testing.assert_allclose(kinematics.forward(arm.name, found), T, atol=3e-6)
        assert reached >= 47


def test_inverse_from_the_solution_itself_stays_there(panda, panda_kinematics):
    q = panda.arms[0].home
    np.testing.assert_array_equal(panda_kinematics.inverse("arm", panda_kinematics.forward("arm", q), q), q)


def test_inverse_gives_none_out_of_reach(panda, panda_kinematics):
    far = transform([2.0, 0.0, 0.5], [0.0, 0.0, 0.0])
    assert panda_kinematics.inverse("arm", far, panda.arms[0].home) is None


def test_inverse_gives_none_rather_than_leave_the_limits(panda):
    """A pose that only joint 4 beyond its upper limit reaches."""
    arm = panda.arms[0]
    q = np.array([0.0, 0.2, 0.0, -1.0, 0.0, 1.2, 0.0])
    T = Kinematics(panda).forward("arm", q)
    upper = arm.limits.upper.copy()
    upper[3] = -1.2
    limited = Kinematics(changed(panda, limits=replace(arm.limits, upper=upper)))
    assert limited.inverse("arm", T, arm.home) is None


@pytest.mark.parametrize("q", [np.zeros(6), 0.0, np.zeros((1, 7)), np.zeros(9)])
def test_joint_positions_of_another_shape_are_refused(panda_kinematics, q):
    for method in (panda_kinematics.forward, panda_kinematics.jacobian):
        with pytest.raises(KinematicsError, match=r"joint positions: expected shape \(7,\), found"):
            method("arm", q)


@pytest.mark.parametrize(
    ("T", "q0", "message"), [(np.eye(3), np.zeros(7), "T_base_tool"), (np.eye(4), np.full(7, np.nan), "q0")]
)
def test_inverse_refuses_what_is_no_pose_or_start(panda_kinematics, T, q0, message):
    with pytest.raises(KinematicsError, match=f"{message}: expected"):
        panda_kinematics.inverse("arm", T, q0)


def test_an_unknown_arm_is_refused(panda_kinematics):
    with pytest.raises(RobotError, match=r"arm: expected one of \['arm'\], found 'left'"):
        panda_kinematics.forward("left", np.zeros(7))


# --------------------------------------------------------------------------------------------- cells of several parts


def two_pandas(panda, T_base_right, prefixes=("left_", "right_")):
    """A cell of two Pandas: the first at the base frame, the other at T_base_right; arms `left` and `right`."""
    arm, part = panda.arms[0], panda.parts[0]
    arms = tuple(
        replace(
            arm,
            name=name,
            joints=tuple(prefix + joint for joint in arm.joints),
            tool=replace(arm.tool, link=prefix + arm.tool.link),
            gripper=replace(arm.gripper, joints=tuple(replace(j, name=prefix + j.name) for j in arm.gripper.joints)),
        )
        for name, prefix in zip(("left", "right"), prefixes)
    )
    parts = (replace(part, prefix=prefixes[0]), replace(part, prefix=prefixes[1], T_base_part=T_base_right))
    return replace(panda, parts=parts, arms=arms)


@pytest.mark.parametrize("prefixes", [("left_", "right_"), ("", "other/")])
def test_each_part_moves_as_it_does_alone_where_it_is_placed(panda, panda_kinematics, prefixes):
    T_base_right = transform([0.3, -0.8, 0.1], [0.2, -0.3, 2.5])
    cell = Kinematics(two_pandas(panda, T_base_right, prefixes))
    turn = np.kron(np.eye(2), T_base_right[:3, :3])
    for q in random_positions(panda.arms[0], 20):
        T, J = panda_kinematics.forward("arm", q), panda_kinematics.jacobian("arm", q)
        np.testing.assert_allclose(cell.forward("left", q), T, atol=1e-12)
        np.testing.assert_allclose(cell.jacobian("left", q), J, atol=1e-12)
        np.testing.assert_allclose(cell.forward("right", q), T_base_right @ T, atol=1e-12)
        np.testing.assert_allclose(cell.jacobian("right", q), turn @ J, atol=1e-12)


@pytest.mark.parametrize("geometry", [True, False])
def test_names_of_a_part_begin_with_its_prefix(panda, geometry):
    alone = load_model(panda, geometry)
    cell = load_model(two_pandas(panda, transform([0.0, 1.0, 0.0], [0.0, 0.0, 0.0])), geometry)
    for count, kind in ((alone.nbody, "body"), (alone.njnt, "joint")):
        names = [getattr(alone, kind)(i).name for i in range(count) if getattr(alone, kind)(i).name != "world"]
        found = {getattr(cell, kind)(i).name for i in range(cell.nbody if kind == "body" else cell.njnt)}
        assert found - {"world"} == {prefix + name for prefix in ("left_", "right_") for name in names}
    assert cell.ngeom == 2 * alone.ngeom


def test_one_part_may_have_a_prefix_too(panda, panda_kinematics):
    alone = two_pandas(panda, np.eye(4))
    alone = replace(alone, parts=alone.parts[:1], arms=alone.arms[:1])
    q = panda.arms[0].home
    np.testing.assert_allclose(Kinematics(alone).forward("left", q), panda_kinematics.forward("arm", q), atol=1e-12)


@pytest.mark.parametrize("geometry", [True, False])
@pytest.mark.parametrize("prefixes", [("", ""), ("arm_", "arm_")])
def test_parts_that_share_names_are_refused(panda, prefixes, geometry):
    cell = two_pandas(panda, transform([0.0, 1.0, 0.0], [0.0, 0.0, 0.0]), prefixes)
    message = (
        rf"panda.yaml: model: expected parts .*\(give each a prefix\), found .*'{prefixes[0]}panda_joint1'.* again"
    )
    with pytest.raises(RobotError, match=message):
        load_spec(cell, geometry)


def test_a_part_that_is_no_model_is_named(tmp_path, panda):
    cell = two_pandas(panda, np.eye(4))
    broken = tmp_path / "broken.urdf"
    broken.write_text("<robot")
    with pytest.raises(RobotError, match=r"model.file: expected a URDF or MJCF model, found .*broken.urdf"):
        load_spec(replace(cell, parts=(cell.parts[0], replace(cell.parts[1], file=broken))))


# ------------------------------------------------------------------------------- robots that do not fit the model


@pytest.mark.parametrize("name", ["panda", "aloha"])
def test_a_joint_that_the_model_lacks_is_named(name, request):
    robot = request.getfixturevalue(name)
    joints = (*robot.arms[0].joints[:-1], "joint_of_another_robot")
    with pytest.raises(
        RobotError, match=rf"arms.{robot.arms[0].name}.joints: expected a joint of .*found 'joint_of_another"
    ):
        Kinematics(changed(robot, joints=joints))


def test_a_finger_joint_that_the_model_lacks_is_named(panda):
    gripper = replace(panda.arms[0].gripper, joints=(GripperJoint("thumb", 0.0, 1.0),))
    with pytest.raises(RobotError, match="arms.arm.gripper.joints: expected a joint of .*found 'thumb'"):
        load_model(changed(panda, gripper=gripper))


def test_a_tool_link_that_the_model_lacks_is_named(aloha):
    tool = replace(aloha.arms[0].tool, link="hand")
    with pytest.raises(
        RobotError, match="arms.left.tool.link: expected a link of .*vx300s_left/gripper_link.*found 'hand'"
    ):
        Kinematics(changed(aloha, tool=tool))


def test_joints_out_of_kinematic_order_are_refused(panda):
    joints = panda.arms[0].joints
    with pytest.raises(RobotError, match="expected every joint that moves link 'panda_hand', in kinematic order"):
        Kinematics(changed(panda, joints=(joints[1], joints[0], *joints[2:])))


def test_a_joint_that_does_not_move_the_tool_is_refused(panda):
    tool = replace(panda.arms[0].tool, link="panda_link6")
    with pytest.raises(RobotError, match="every joint that moves link 'panda_link6'"):
        Kinematics(changed(panda, tool=tool))


def test_a_joint_on_the_way_to_the_tool_that_the_arm_leaves_out_is_refused(panda):
    joints = panda.arms[0].joints
    with pytest.raises(RobotError, match="in kinematic order .*'panda_joint4'"):
        Kinematics(changed(panda, joints=joints[:3] + joints[4:]))


# ------------------------------------------------------------------------------------------------------- loading


def test_the_model_keeps_fixed_links_and_collision_geometry(panda):
    model = load_model(panda)
    assert model.body("panda_hand_tcp").id > 0
    assert model.ngeom > 0 and model.nmesh > 0
    assert load_model(panda, geometry=False).ngeom == 0


def test_the_specification_can_be_built_upon(panda):
    spec = load_spec(panda)
    spec.worldbody.add_body(name="table", pos=[0.5, 0, 0]).add_geom(
        size=[0.3, 0.3, 0.01], type=mujoco.mjtGeom.mjGEOM_BOX
    )
    assert spec.compile().body("table").id > 0


def urdf(tmp_path, robot, text):
    file = tmp_path / "robot.urdf"
    file.write_text(text)
    return replace(robot, parts=(replace(robot.parts[0], file=Path(file)),))


def test_kinematics_need_no_mesh_files(tmp_path, panda):
    robot = urdf(tmp_path, panda, panda.parts[0].file.read_text().replace("package://", "package://absent_"))
    q = panda.arms[0].home
    np.testing.assert_allclose(Kinematics(robot).forward("arm", q), Kinematics(panda).forward("arm", q))
    with pytest.raises(RobotError, match="package://absent_"):
        load_spec(robot)


@pytest.mark.parametrize("text", ["<robot", "", "<robot name='empty'/>"])
def test_a_file_that_is_no_model_is_refused(tmp_path, panda, text):
    with pytest.raises(RobotError, match="model.file|arms.arm.joints"):
        Kinematics(urdf(tmp_path, panda, text))


def test_a_broken_mjcf_is_refused(tmp_path, panda):
    file = tmp_path / "robot.xml"
    file.write_text("<mujoco><worldbody><body></worldbody></mujoco>")
    with pytest.raises(RobotError, match="model.file: expected a URDF or MJCF model"):
        load_model(replace(panda, parts=(replace(panda.parts[0], file=file),)))


def test_slides_offsets_and_reference_positions_of_mjcf_count(tmp_path, panda):
    """A chain with a slide, a joint off its body's origin, reference positions, degrees, and a body that is fixed."""
    file = tmp_path / "robot.xml"
    file.write_text(
        """<mujoco><compiler angle="degree"/><worldbody><body name="a" pos="0.1 0.2 0.3" euler="10 20 30">
        <inertial pos="0 0 0" mass="1" diaginertia="1 1 1"/><joint name="lift" type="slide" axis="0 0.6 0.8" ref="0.2"/>
        <body name="b" pos="0 0 0.5" euler="0 0 90"><inertial pos="0 0 0" mass="1" diaginertia="1 1 1"/>
        <body name="c" pos="0.2 0 0"><inertial pos="0 0 0" mass="1" diaginertia="1 1 1"/>
        <joint name="turn" pos="0.05 0 0.02" axis="0 1 0" ref="30"/></body></body></body></worldbody></mujoco>"""
    )
    arm = replace(panda.arms[0], joints=("lift", "turn"), gripper=None, tool=replace(panda.arms[0].tool, link="c"))
    robot = replace(panda, parts=(replace(panda.parts[0], file=file),), arms=(arm,))
    model = mujoco.MjModel.from_xml_path(str(file))
    data = mujoco.MjData(model)
    kinematics = Kinematics(robot)
    for q in ([0.0, 0.0], [0.2, np.pi / 6], [-0.3, 1.1]):
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        T = se3.transform(data.body("c").xmat.reshape(3, 3), data.body("c").xpos) @ arm.tool.T_link_tool
        np.testing.assert_allclose(kinematics.forward("arm", q), T, atol=1e-12)
