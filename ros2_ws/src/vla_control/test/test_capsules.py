"""Capsules: around all geometry by other engines' account, and pairs left out only when they cannot meet."""

import itertools
from dataclasses import replace
from pathlib import Path

import coal
import mujoco
import numpy as np
import pinocchio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vla_control import capsules as capsules_module
from vla_control.capsules import Capsule, fit_capsules, main, watched_pairs
from vla_core.robot import (
    Collision,
    Gripper,
    GripperJoint,
    Limits,
    ModelPart,
    RobotError,
    Tool,
    load_robot,
    resolve_uri,
    transform,
)

ROBOTS = Path(__file__).parents[4] / "launch" / "robots"
PANDA = "package://example_robot_data/robots/panda_description/urdf/panda.urdf"


def robot_of(template, file, joints, tool, limits, fingers=(), allow=(), parts=None):
    """A robot with one arm of any model; limits (n, 2)."""
    limits = np.array(limits, float)
    ones = np.ones(len(joints))
    arm = replace(
        template.arms[0],
        joints=tuple(joints),
        home=limits.mean(axis=1),
        tool=Tool(tool, np.eye(4), "tool"),
        limits=Limits(limits[:, 0], limits[:, 1], ones, ones, 100 * ones, 0.5 * ones),
        gripper=Gripper(tuple(GripperJoint(*f) for f in fingers), 1.0) if fingers else None,
    )
    parts = parts or (ModelPart(Path(file), np.eye(4)),)
    return replace(template, parts=parts, arms=(arm,), collision=Collision(0.02, tuple(allow)))


def two_pandas(panda, allow=()):
    """Two Pandas side by side, each a part of one cell."""
    file = resolve_uri(PANDA)
    parts = [ModelPart(file, transform([0, y, 0], [0, 0, 0]), f"{side}_") for side, y in (("a", 0.3), ("b", -0.3))]
    arms = []
    for side in "ab":
        arm = panda.arms[0]
        fingers = tuple(replace(j, name=f"{side}_{j.name}") for j in arm.gripper.joints)
        arms.append(
            replace(
                arm,
                name=side,
                joints=tuple(f"{side}_{j}" for j in arm.joints),
                tool=replace(arm.tool, link=f"{side}_{arm.tool.link}"),
                gripper=replace(arm.gripper, joints=fingers),
            )
        )
    return replace(panda, parts=tuple(parts), arms=tuple(arms), collision=Collision(0.02, tuple(allow)))


def random_poses(robot, count, seed=0):
    """Joint name -> position, of all joints, fingers anywhere in their stroke."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        pose = {}
        for arm in robot.arms:
            pose |= dict(zip(arm.joints, rng.uniform(arm.limits.lower, arm.limits.upper), strict=True))
            if arm.gripper:
                pose |= arm.gripper.positions(rng.uniform())
        yield pose


class PinocchioCell:
    """The oracle of a URDF: pinocchio places the links and the meshes as they are, coal measures."""

    def __init__(self, robot):
        file = robot.parts[0].file
        folder = str(file).split("/example-robot-data/")[0]
        self.model = pinocchio.buildModelFromUrdf(str(file))
        geometry = pinocchio.buildGeomFromUrdf(
            self.model, str(file), pinocchio.GeometryType.COLLISION, package_dirs=[folder]
        )
        self.data = self.model.createData()
        self.shapes = [
            (o.name.rsplit("_", 1)[0], o.geometry, o.parentJoint, o.placement) for o in geometry.geometryObjects
        ]
        self.columns = {name: self.model.joints[i].idx_q for i, name in enumerate(self.model.names) if i}

    def place(self, pose):
        """Link -> T_base_link, and (link, shape, T_base_shape) of every collision shape."""
        q = pinocchio.neutral(self.model)
        for name, position in pose.items():
            q[self.columns[name]] = position
        pinocchio.framesForwardKinematics(self.model, self.data, q)
        links = {f.name: self.data.oMf[i].homogeneous for i, f in enumerate(self.model.frames)}
        shapes = [(n, shape, (self.data.oMi[joint] * T).homogeneous) for n, shape, joint, T in self.shapes]
        return links, shapes


class MujocoCell:
    """The oracle of an MJCF file: MuJoCo's own load of it places the links, coal measures the triangles as they are."""

    def __init__(self, robot):
        self.model = mujoco.MjModel.from_xml_path(str(robot.parts[0].file))
        self.data = mujoco.MjData(self.model)
        self.shapes = []
        for geom in range(self.model.ngeom):
            link = self.model.body(self.model.geom_bodyid[geom]).name
            if not link.startswith("vx300s"):
                continue
            mesh = self.model.geom_dataid[geom]
            vertices = self.model.mesh_vert[self.model.mesh_vertadr[mesh] :][: self.model.mesh_vertnum[mesh]]
            faces = self.model.mesh_face[self.model.mesh_faceadr[mesh] :][: self.model.mesh_facenum[mesh]]
            shape = coal.BVHModelOBBRSS()
            shape.beginModel(len(faces), len(vertices))
            points, triangles = coal.StdVec_Vec3s(), coal.StdVec_Triangle()
            points.extend(v.astype(float) for v in vertices)
            triangles.extend(coal.Triangle(*map(int, f)) for f in faces)
            shape.addSubModel(points, triangles)
            shape.endModel()
            self.shapes.append((link, shape, geom))

    def place(self, pose):
        for name, position in pose.items():
            self.data.joint(name).qpos = position
        mujoco.mj_kinematics(self.model, self.data)
        links = {}
        for body in range(self.model.nbody):
            links[self.model.body(body).name] = homogeneous(self.data.xmat[body], self.data.xpos[body])
        shapes = [(n, s, homogeneous(self.data.geom_xmat[g], self.data.geom_xpos[g])) for n, s, g in self.shapes]
        return links, shapes


def homogeneous(rotation, position):
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = np.reshape(rotation, (3, 3)), position
    return T


ORACLES = {"panda": PinocchioCell, "aloha": MujocoCell}
#: Fingers and what carries them.
CARRIERS = {
    "panda_leftfinger": "panda_hand",
    "panda_rightfinger": "panda_hand",
    **{
        f"vx300s_{side}/{finger}_finger_link": f"vx300s_{side}/gripper_link"
        for side in ("left", "right")
        for finger in ("left", "right")
    },
}


def corners(shape):
    """Points (n, 3) of a coal mesh or box."""
    if isinstance(shape, coal.Box):
        return np.array(list(itertools.product([-1, 1], repeat=3))) * shape.halfSide
    return np.array([shape.vertex(i) for i in range(shape.num_vertices)])


def outside(points, found):
    """How far points (n, 3) are outside all of the capsules, m; negative inside."""
    beyond = []
    for c in found:
        line = c.end - c.start
        share = np.clip((points - c.start) @ line / max(line @ line, 1e-30), 0, 1)
        beyond.append(np.linalg.norm(points - c.start - share[:, None] * line, axis=1) - c.radius)
    return np.min(beyond, axis=0)


def distance(first, T_first, second, T_second):
    result = coal.DistanceResult()
    return coal.distance(
        first,
        coal.Transform3s(T_first[:3, :3], T_first[:3, 3]),
        second,
        coal.Transform3s(T_second[:3, :3], T_second[:3, 3]),
        coal.DistanceRequest(),
        result,
    )


def capsule_shape(capsule):
    """coal's capsule and T_link_capsule (4, 4); coal's lies along z."""
    line = capsule.end - capsule.start
    length = np.linalg.norm(line)
    z = line / length if length > 1e-9 else np.array([0.0, 0.0, 1.0])
    x = np.cross(z, np.eye(3)[np.argmin(np.abs(z))])
    x /= np.linalg.norm(x)
    return coal.Capsule(capsule.radius, length), homogeneous(
        np.stack([x, np.cross(z, x), z], axis=1), (capsule.start + capsule.end) / 2
    )


def links_of(found):
    by_link = {}
    for capsule in found:
        by_link.setdefault(capsule.link, []).append(capsule)
    return by_link


# ------------------------------------------------------------------------------------------------------ enclosure


@pytest.mark.parametrize("name", ["panda", "aloha"])
def test_every_corner_of_every_mesh_is_inside_at_any_stroke(name, request):
    robot = request.getfixturevalue(name)
    by_link = links_of(fit_capsules(robot))
    cell = ORACLES[name](robot)
    for pose in random_poses(robot, 8):
        links, shapes = cell.place(pose)
        for link, shape, T in shapes:
            carrier = CARRIERS.get(link, link)
            T = np.linalg.inv(links[carrier]) @ T
            points = corners(shape) @ T[:3, :3].T + T[:3, 3]
            assert outside(points, by_link[carrier]).max() <= 1e-6, link


@pytest.mark.parametrize("name", ["panda", "aloha"])
def test_meshes_are_never_nearer_than_their_capsules(name, request):
    robot = request.getfixturevalue(name)
    by_link = links_of(fit_capsules(robot))
    cell = ORACLES[name](robot)
    rng = np.random.default_rng(1)
    pairs = list(itertools.combinations(by_link, 2))
    over = []
    for pose in random_poses(robot, 30, seed=2):
        links, shapes = cell.place(pose)
        solids = {link: [(s, T) for n, s, T in shapes if CARRIERS.get(n, n) == link] for link in by_link}
        for a, b in rng.permutation(pairs)[:8]:
            nearest = min(
                distance(x, links[a] @ T_x, y, links[b] @ T_y)
                for x, T_x in map(capsule_shape, by_link[a])
                for y, T_y in map(capsule_shape, by_link[b])
            )
            if 0 < nearest < 0.3:
                over.append(min(distance(*x, *y) for x, y in itertools.product(solids[a], solids[b])) - nearest)
    assert len(over) > 30 and min(over) >= -1e-5
    assert np.median(over) < 0.04 and max(over) < 0.13  # and they are no more than centimetres too careful


def test_what_is_no_arm_has_no_capsules_and_what_only_looks_does(aloha):
    found = {c.link for c in fit_capsules(aloha)}
    assert "vx300s_left" in found  # its base has visual geometry only
    assert not found & {"table", "box", "midair", "world"}
    assert all(name.startswith("vx300s") for name in found)


def test_fingers_belong_to_the_link_that_carries_them(panda):
    found = {c.link for c in fit_capsules(panda)}
    assert "panda_hand" in found and not found & {"panda_leftfinger", "panda_rightfinger"}


def test_few_capsules_a_link(panda, aloha):
    for robot in (panda, aloha):
        by_link = links_of(fit_capsules(robot))
        assert max(map(len, by_link.values())) <= 9  # a hand and two fingers
        assert len(fit_capsules(robot)) <= 3 * len(by_link) + 6 * len(robot.arms)


def test_the_fit_is_the_same_every_time(panda):
    first = fit_capsules(panda)
    capsules_module._cell.cache_clear()
    again = fit_capsules(load_robot("panda"))
    assert first is not again
    for a, b in zip(first, again, strict=True):
        assert (a.link, a.radius) == (b.link, b.radius)
        np.testing.assert_array_equal([a.start, a.end], [b.start, b.end])


SOLIDS = """
<mujoco><worldbody><geom type="plane" size="1 1 1"/><body name="base">
  <geom type="cylinder" size="0.05 0.1" pos="0.1 0.02 0.3" euler="30 20 10"/>
  <body name="one" pos="0 0 0.2"><joint name="a" type="hinge" axis="0 0 1"/>
    <geom type="ellipsoid" size="0.03 0.06 0.12" euler="0 40 10"/>
    <geom type="sphere" size="0.5" contype="0" conaffinity="0"/>
    <body name="two" pos="0.2 0 0"><joint name="b" type="hinge" axis="0 1 0"/>
      <geom type="sphere" size="0.07" pos="0 0.01 0"/><geom type="capsule" size="0.02 0.1" pos="0.1 0.1 0"/>
      <body name="jaw" pos="0.1 0 0"><joint name="jaw" type="hinge" axis="0 0 1" pos="0.01 0 0" {range}/>
        <geom type="box" size="0.06 0.01 0.02" pos="0.06 0 0"/>
        <body name="pad" pos="0.1 0 0"><joint name="pad" type="slide" axis="0 1 0" range="0 0.02"/>
          <geom type="box" size="0.005 0.01 0.01"/></body>
      </body>
    </body>
  </body>
</body></worldbody></mujoco>
"""


def test_round_solids_and_jaws_that_turn_are_inside(panda, tmp_path):
    file = tmp_path / "solids.xml"
    file.write_text(SOLIDS.format(range=""))
    limits, stroke = [(-1, 1), (-1, 1)], ("jaw", 1.2, -0.4)
    robot = robot_of(panda, file, ["a", "b"], "two", limits, [stroke])
    by_link = links_of(fit_capsules(robot))
    assert set(by_link) == {"base", "one", "two"}
    model = mujoco.MjModel.from_xml_path(str(file))
    data = mujoco.MjData(model)
    rng = np.random.default_rng(0)
    tightest = -np.inf
    for jaw, pad in rng.uniform([-0.4, 0], [1.2, 0.02], (50, 2)):
        data.joint("jaw").qpos, data.joint("pad").qpos = jaw, pad
        mujoco.mj_kinematics(model, data)
        for geom in range(1, model.ngeom):
            if not model.geom_contype[geom]:
                continue  # looks only, and the link has geoms that collide
            size = model.geom_size[geom]
            sphere = rng.normal(size=(300, 3))
            sphere /= np.linalg.norm(sphere, axis=1)[:, None]
            along = np.sign(sphere) * [0, 0, size[1]]
            points = {
                mujoco.mjtGeom.mjGEOM_SPHERE: size[0] * sphere,
                mujoco.mjtGeom.mjGEOM_ELLIPSOID: size * sphere,
                mujoco.mjtGeom.mjGEOM_CAPSULE: size[0] * sphere + along,
                mujoco.mjtGeom.mjGEOM_BOX: size * np.sign(sphere),
                mujoco.mjtGeom.mjGEOM_CYLINDER: size[0]
                * sphere
                / np.linalg.norm(sphere[:, :2], axis=1)[:, None]
                * [1, 1, 0]
                + along,
            }[model.geom_type[geom]]
            link = model.body(model.geom_bodyid[geom]).name
            link = link if link in by_link else "two"
            T = np.linalg.inv(homogeneous(data.body(link).xmat, data.body(link).xpos))
            T = T @ homogeneous(data.geom_xmat[geom], data.geom_xpos[geom])
            beyond = outside(points @ T[:3, :3].T + T[:3, 3], by_link[link]).max()
            assert beyond <= 1e-9
            tightest = max(tightest, beyond)
    assert tightest > -0.002  # something touches: the capsules are not merely large


def test_a_jaw_that_is_no_gripper_joint_needs_a_range(panda, tmp_path):
    file = tmp_path / "solids.xml"
    file.write_text(SOLIDS.format(range=""))
    with pytest.raises(RobotError, match="jaw.*range"):
        fit_capsules(robot_of(panda, file, ["a", "b"], "two", [(-1, 1), (-1, 1)]))
    file.write_text(SOLIDS.format(range='range="-20 40"'))
    assert fit_capsules(robot_of(panda, file, ["a", "b"], "two", [(-1, 1), (-1, 1)]))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([3, 2, 1]), st.integers(1, 3))
def test_any_convex_solids_lie_inside(seed, count, dimensions, most):
    """Points of any solid (flat and thin ones too) that a cut may divide between capsules."""
    rng = np.random.default_rng(seed)
    clouds = [
        rng.normal(size=(count, 3)) * ([0.1] * dimensions + [0.0] * (3 - dimensions)) + rng.normal(size=3) * 0.1
        for _ in range(rng.integers(1, 4))
    ]
    pieces = [capsules_module._Piece(cloud) for cloud in clouds]
    found = [Capsule("", *segment) for segment in capsules_module._cover(pieces, most)]
    assert 1 <= len(found) <= most
    for cloud in clouds:
        mixed = rng.dirichlet(np.full(count, 0.3), 200) @ cloud
        assert outside(np.concatenate([cloud, mixed]), found).max() <= 1e-9


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 10**6))
def test_a_hull_of_fewer_corners_still_holds_all(seed):
    rng = np.random.default_rng(seed)
    cloud = rng.normal(size=(1000, 3))
    cloud *= np.array([0.02, 0.05, 0.1]) / np.linalg.norm(cloud, axis=1)[:, None]
    piece = capsules_module._Piece(cloud)
    assert len(piece.points) < 700 and 0 < piece.pad <= 0.001
    hull = capsules_module.ConvexHull(piece.points)
    assert (cloud @ hull.equations[:, :3].T + hull.equations[:, 3]).max() <= piece.pad + 1e-9
    (segment,) = capsules_module._cover([piece], 1)
    assert outside(cloud, [Capsule("", *segment)]).max() <= 0


# ----------------------------------------------------------------------------------------------------------- pairs


def names(robot, found, pairs):
    return {frozenset((found[i].link, found[j].link)) for i, j in pairs}


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(f, id=f.stem, marks=[pytest.mark.slow] * f.stem.startswith("dual_"))
        for f in sorted(ROBOTS.glob("*.yaml"))
    ],
)
def test_no_watched_pair_is_near_at_home(file):
    robot = load_robot(file)
    found = fit_capsules(robot)
    pairs = watched_pairs(robot, found)
    assert pairs and list(pairs) == sorted(set(pairs)) and all(i < j for i, j in pairs)
    cell = capsules_module._cell(capsules_module._Key(robot))
    at_home = cell.distances(found, pairs, cell.configurations()[:1])[0]
    near = {
        (found[i].link, found[j].link): round(d, 4)
        for (i, j), d in zip(pairs, at_home, strict=True)
        if d < robot.collision.margin
    }
    assert not near


def test_distances_agree_with_coal(panda):
    found = fit_capsules(panda)
    cell = capsules_module._cell(capsules_module._Key(panda))
    pairs = list(itertools.combinations(range(len(found)), 2))
    oracle = PinocchioCell(panda)
    q = cell.configurations()[:20]
    for row, measured in zip(q, cell.distances(found, pairs, q), strict=True):
        links, _ = oracle.place({cell.model.joint(i).name: row[i] for i in range(cell.model.njnt)})
        for (i, j), value in zip(pairs, measured, strict=True):
            (x, T_x), (y, T_y) = capsule_shape(found[i]), capsule_shape(found[j])
            if value > 1e-3:
                assert value == pytest.approx(
                    distance(x, links[found[i].link] @ T_x, y, links[found[j].link] @ T_y), abs=1e-5
                )


def test_neighbours_are_not_watched_and_other_links_are(panda):
    found = fit_capsules(panda)
    watched = names(panda, found, watched_pairs(panda, found))
    chain = [f"panda_link{i}" for i in range(8)]
    for a, b in itertools.pairwise(chain):
        assert {a, b} not in watched
    assert {"panda_link7", "panda_hand"} not in watched  # rigidly joined
    assert {"panda_link6", "panda_hand"} not in watched  # one joint between
    for a, b in [("panda_hand", "panda_link0"), ("panda_hand", "panda_link2"), ("panda_link5", "panda_link1")]:
        assert {a, b} in watched


@pytest.mark.parametrize("name", ["panda", "aloha"])
def test_a_pair_left_out_cannot_meet(name, request):
    """Second neighbours that are left out stay apart, by coal on the meshes, on a fine grid of both joints."""
    robot = request.getfixturevalue(name)
    found = fit_capsules(robot)
    key = capsules_module._Key(robot)
    _, reasons = capsules_module._sort_out(key, tuple(map(capsules_module._Frozen, found)))
    left_out = {(found[i].link, found[j].link) for (i, j), reason in reasons.items() if reason == "cannot meet"}
    assert left_out
    cell, oracle = capsules_module._cell(key), ORACLES[name](robot)
    for pair in sorted(left_out):
        if "right" in pair[0]:
            continue  # the other arm's twin
        joints, _ = cell._path(*(cell.model.body(link).id for link in pair))
        grids = [np.linspace(*cell.limits[j], 7) for j in joints]
        for q in itertools.product(*grids):
            pose = {cell.model.joint(j).name: position for j, position in zip(joints, q, strict=True)}
            _, shapes = oracle.place(pose)
            first, second = ([s for s in shapes if s[0] == link] for link in pair)
            for (_, a, T_a), (_, b, T_b) in itertools.product(first, second):
                assert distance(a, T_a, b, T_b) > 0, (pair, pose)


FLAP = """
<mujoco><worldbody><body name="base"><geom type="box" size="0.1 0.02 0.02"/>
  <body name="one" pos="0.1 0 0.1"><joint name="a" type="hinge" axis="0 1 0"/>
    <geom type="sphere" size="0.005"/>
    <body name="two" pos="0 0 0.1"><joint name="b" type="hinge" axis="0 1 0"/>
      <geom type="capsule" fromto="0 0 0 0 0 {length}" size="0.01"/></body>
  </body>
</body></worldbody></mujoco>
"""


@pytest.mark.parametrize(("upper", "meets"), [(3.09, False), (3.13, True)])
def test_a_pair_that_meets_in_a_corner_of_its_range_only_is_watched(panda, tmp_path, upper, meets):
    """A rod folds back onto the base and touches it in the last 0.02 of 3.6 rad."""
    file = tmp_path / "flap.xml"
    file.write_text(FLAP.format(length=0.172))
    robot = robot_of(panda, file, ["a", "b"], "two", [(-0.001, 0.001), (-0.5, upper)])
    robot = replace(robot, arms=(replace(robot.arms[0], home=np.zeros(2)),))
    found = fit_capsules(robot)
    every = list(itertools.combinations(range(len(found)), 2))
    far = [p for p in every if {found[p[0]].link, found[p[1]].link} == {"base", "two"}]
    model = mujoco.MjModel.from_xml_path(str(file))
    data = mujoco.MjData(model)
    data.qpos[:] = [0.001, upper]
    mujoco.mj_kinematics(model, data)
    touch = mujoco.mj_geomDistance(model, data, 0, 2, 1.0, None)
    assert (touch <= 0) == meets
    assert bool(set(far) & set(watched_pairs(robot, found))) == meets


def test_pairs_always_close_are_left_out_and_named(panda):
    """The Panda's flange turns 22 mm beside its forearm, whatever the joints: without this no pose were allowed."""
    found = fit_capsules(panda)
    _, reasons = capsules_module._sort_out(
        capsules_module._Key(replace(panda, collision=Collision())), tuple(map(capsules_module._Frozen, found))
    )
    always = {frozenset((found[i].link, found[j].link)) for (i, j), why in reasons.items() if why == "always close"}
    assert always == {frozenset(("panda_link5", "panda_link7"))}


def test_two_arms_are_watched_against_each_other(panda):
    robot = two_pandas(panda)
    found = fit_capsules(robot)
    watched = names(robot, found, watched_pairs(robot, found))
    assert {"a_panda_link0", "b_panda_link0"} not in watched  # neither moves
    links = {c.link for c in found}
    for a, b in itertools.product(*([x for x in links if x.startswith(side)] for side in "ab")):
        assert ({a, b} in watched) or {a, b} == {"a_panda_link0", "b_panda_link0"}
    assert {"a_panda_link0", "b_panda_link1"} in watched  # a base and another arm's first link


def test_allowed_pairs_are_not_watched(panda):
    robot = replace(panda, collision=Collision(0.02, (("panda_hand", "panda_link0"),)))
    found = fit_capsules(robot)
    before = names(panda, found, watched_pairs(panda, found))
    after = names(robot, found, watched_pairs(robot, found))
    assert before - after == {frozenset(("panda_hand", "panda_link0"))}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("panda_hand", "panda_lnk0"), "panda_lnk0"),
        (("panda_leftfinger", "panda_link0"), "carries the finger, 'panda_hand'"),
    ],
)
def test_allowed_links_must_be_links(panda, pair, message):
    robot = replace(panda, collision=Collision(0.02, (pair,)))
    with pytest.raises(RobotError, match=message):
        watched_pairs(robot, fit_capsules(robot))


def test_the_command_tells_what_is_left_out(panda, capsys):
    main(["panda"])
    out = capsys.readouterr().out
    assert (
        "panda_link0 - panda_link2" in out
        and "cannot meet" in out
        and f"pairs watched, margin {1e3 * panda.collision.margin:g} mm" in out
    )
    with pytest.raises(SystemExit, match="nobody"):
        main(["nobody"])
