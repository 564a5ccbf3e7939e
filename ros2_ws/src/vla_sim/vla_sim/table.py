"""A table with coloured objects in front of one arm, and a family of tasks named in words.

The arm is built from the robot's own description (URDF or MJCF): position actuators, gravity compensation as real
arms have it, and the cameras of `simulation.cameras`. Three objects of different colours lie on the table:

- `pick`: "pick up the red cube". Success: the named object is lifted by 8 cm for half a second.
- `place`: "put the red cube on the white plate". Success: the named object rests on the named one of two plates
  and the open gripper is away from it.

Both fail when another object is lifted, when an object leaves the table, or at the time limit. Options of a reset
(the same seed always lays out the same scene, whatever is named):

- `target`: index 0..2 or colour of the object to name; without, the seed draws it.
- `colour`, `shape`: paint or shape the named object (an object that had this colour takes the other's).
- `phrasing`: index into the task's phrasings; without, the seed draws it.
- `plate` (task place): colour of the plate to name.
- `start`: `home` (the robot's home pose, jittered) or `anywhere` (the tool somewhere above the objects).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from vla_core.kinematics import Kinematics, load_spec
from vla_core.robot import Robot

from vla_sim.world import RUNNING, Episode, Outcome, World, WorldError

COLOURS = {
    "red": (0.90, 0.10, 0.08),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.10, 0.30, 1.00),
    "yellow": (1.00, 0.85, 0.05),
}
PLATE_COLOURS = {"white": (0.95, 0.95, 0.95), "purple": (0.60, 0.15, 0.75), "orange": (1.00, 0.50, 0.05)}
#: Shape -> MuJoCo geometry and its size (half extents; radius, half height; radius), m.
SHAPES = {
    "cube": (mujoco.mjtGeom.mjGEOM_BOX, (0.02, 0.02, 0.02)),
    "cylinder": (mujoco.mjtGeom.mjGEOM_CYLINDER, (0.02, 0.025, 0.0)),
    "ball": (mujoco.mjtGeom.mjGEOM_SPHERE, (0.022, 0.0, 0.0)),
}
#: Height of an object's centre while it rests on the table, m.
REST_HEIGHT = {"cube": 0.02, "cylinder": 0.025, "ball": 0.022}
PHRASINGS = {
    "pick": ("pick up the {object}", "grab the {object}", "lift the {object}", "take the {object}"),
    "place": (
        "put the {object} on the {plate} plate",
        "place the {object} on the {plate} plate",
        "move the {object} to the {plate} plate",
    ),
}
TIME_LIMIT = {"pick": 10.0, "place": 15.0}  # s
N_OBJECTS = 3
OBJECT_MASS = 0.05  # kg
SEPARATION = 0.11  # between the centres of objects, m: an open gripper fits between
YAW = np.deg2rad(20.0)  # objects are turned by at most this
LIFT_HEIGHT = 0.08  # m
LIFT_TIME = 0.5  # s
PLATE_RADIUS = 0.06  # m
PLATE_HEIGHT = 0.008  # m
REST_TIME = 0.3  # s
AWAY = 0.06  # distance of the tool from a placed object, m
START_JITTER = 0.06  # of every joint's start position, rad
_HIDDEN = np.array([0.0, 0.0, -2.0])


@dataclass
class Thing:
    """One object of the scene: colour and shape in words, centre where it was laid (3,), m."""

    colour: str
    shape: str
    start: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass
class Plate:
    """One plate of the scene: colour in words, centre of its top (3,), m."""

    colour: str
    centre: np.ndarray


class TableWorld(World):
    """One arm at a table, see the module. The things of the running episode are in `things`, `target`, `plates`."""

    tasks = ("pick", "place")

    def __init__(self, robot: Robot, task: str | None = None):
        settings = _Settings.read(robot)
        if len(robot.arms) != 1 or robot.arms[0].gripper is None:
            raise WorldError(f"robot {robot.name}: arms: the table takes one arm with a gripper")
        self._area = settings.area
        self._kinematics = Kinematics(robot)
        model = _build(robot, settings)
        self.arm = robot.arms[0]
        self.things: list[Thing] = []
        self.plates: list[Plate] = []
        self.target = 0
        self.plate = 0
        self._since: float | None = None
        bodies = [model.body(f"object_{i}").id for i in range(N_OBJECTS)]
        self._bodies = np.array(bodies)
        self._object_qpos = [model.jnt_qposadr[model.body_jntadr[b]] for b in bodies]
        self._object_qvel = [model.jnt_dofadr[model.body_jntadr[b]] for b in bodies]
        super().__init__(robot, model, mujoco.MjData(model), task)

    def object_position(self, index: int) -> np.ndarray:
        """Centre of an object in the base frame now, (3,), m."""
        return self.data.xpos[self._bodies[index]].copy()

    # -------------------------------------------------------------------------------------------------- scene

    def _begin(self, task: str, seed: int, options: dict[str, str]) -> Episode:
        known = {"target", "colour", "shape", "phrasing", "start"} | ({"plate"} if task == "place" else set())
        for option in options:
            if option not in known:
                raise WorldError(f"options: expected among {sorted(known)} for task {task}, found {option!r}")
        # Independent streams, so that naming another object or another start leaves the scene as it is.
        scene, words, start = (np.random.default_rng([seed, stream, self.tasks.index(task)]) for stream in range(3))
        self._lay_objects(scene, task)
        self._lay_plates(scene, task)
        self.target = int(words.integers(N_OBJECTS))
        self.plate = int(words.integers(2))
        phrasing = int(words.integers(len(PHRASINGS[task])))
        self._name(options)
        if "plate" in options:
            self.plate = _choice(options["plate"], [p.colour for p in self.plates], "options.plate")
        if "phrasing" in options:
            phrasing = _choice(options["phrasing"], [str(i) for i in range(len(PHRASINGS[task]))], "options.phrasing")
        self._dress()
        self._place_robot(self._start(start, options.get("start", "home")))
        self._since = None
        mujoco.mj_forward(self.model, self.data)
        plate = self.plates[self.plate].colour if self.plates else ""
        instruction = PHRASINGS[task][phrasing].format(object=self.things[self.target].name, plate=plate)
        return Episode(task, seed, instruction, TIME_LIMIT[task])

    def _lay_objects(self, rng: np.random.Generator, task: str) -> None:
        low, high = self._area
        if task == "place":  # the plates have the sides
            low, high = low * [1.0, 0.7], high * [1.0, 0.7]
        centres: list[np.ndarray] = []
        while len(centres) < N_OBJECTS:
            centres = []
            for _ in range(30):
                centre = rng.uniform(low, high)
                if all(np.linalg.norm(centre - c) >= SEPARATION for c in centres):
                    centres.append(centre)
                if len(centres) == N_OBJECTS:
                    break
        colours = rng.permutation(list(COLOURS))[:N_OBJECTS]
        shapes = rng.choice(list(SHAPES), N_OBJECTS)
        self._yaws = rng.uniform(-YAW, YAW, N_OBJECTS)
        self.things = [
            Thing(str(c), str(s), np.array([*centre, REST_HEIGHT[str(s)]]))
            for c, s, centre in zip(colours, shapes, centres, strict=True)
        ]

    def _lay_plates(self, rng: np.random.Generator, task: str) -> None:
        self.plates = []
        if task != "place":
            return
        low, high = self._area
        colours = rng.permutation(list(PLATE_COLOURS))
        for side, colour in zip((-1.0, 1.0), colours, strict=False):
            x = rng.uniform(low[0] + 0.05, high[0] - 0.05)
            y = side * (high[1] + rng.uniform(0.05, 0.10))
            self.plates.append(Plate(str(colour), np.array([x, y, PLATE_HEIGHT])))

    def _name(self, options: Mapping[str, str]) -> None:
        """Let the options choose, paint and shape the named object."""
        colours = [thing.colour for thing in self.things]
        if "target" in options:
            choice = options["target"]
            names = [str(i) for i in range(N_OBJECTS)] if choice.isdigit() else colours
            self.target = _choice(choice, names, "options.target")
        target = self.things[self.target]
        if "colour" in options:
            colour = options["colour"]
            _choice(colour, list(COLOURS), "options.colour")
            if colour in colours:
                self.things[colours.index(colour)].colour = target.colour
            target.colour = colour
        if "shape" in options:
            _choice(options["shape"], list(SHAPES), "options.shape")
            target.shape = options["shape"]
            target.start[2] = REST_HEIGHT[target.shape]

    def _dress(self) -> None:
        """Show each object's shape and colour, put objects and plates in place."""
        model, data = self.model, self.data
        for i, (thing, yaw) in enumerate(zip(self.things, self._yaws, strict=True)):
            for shape in SHAPES:
                geom = model.geom(f"object_{i}_{shape}")
                shown = shape == thing.shape
                geom.rgba = (*COLOURS[thing.colour], 1.0) if shown else (0.0, 0.0, 0.0, 0.0)
                geom.contype, geom.conaffinity = (1, 3) if shown else (0, 0)
            address = self._object_qpos[i]
            data.qpos[address : address + 3] = thing.start
            data.qpos[address + 3 : address + 7] = [np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
        for i in range(2):
            shown = i < len(self.plates)
            data.mocap_pos[i] = self.plates[i].centre - [0, 0, PLATE_HEIGHT / 2] if shown else _HIDDEN
            model.geom(f"plate_{i}").rgba = (*PLATE_COLOURS[self.plates[i].colour], 1.0) if shown else np.zeros(4)

    def _start(self, rng: np.random.Generator, start: str) -> dict[str, float]:
        """Start position of every joint: jittered home, or the tool anywhere above the objects."""
        _choice(start, ["home", "anywhere"], "options.start")
        limits = self.arm.limits
        q = np.clip(
            self.arm.home + rng.uniform(-START_JITTER, START_JITTER, len(self.arm.home)), limits.lower, limits.upper
        )
        if start == "anywhere":
            low, high = self._area
            T = self._kinematics.forward(self.arm.name, self.arm.home)
            solved = None
            while solved is None:
                goal = T.copy()
                goal[:3, 3] = [*rng.uniform(low, high), rng.uniform(0.10, 0.40)]
                turn = np.zeros(9)
                quat = np.array([1.0, *rng.uniform(-0.08, 0.08, 3)])
                mujoco.mju_quat2Mat(turn, quat / np.linalg.norm(quat))
                goal[:3, :3] = turn.reshape(3, 3) @ T[:3, :3]
                solved = self._kinematics.inverse(self.arm.name, goal, q)
            q = solved
        return dict(zip(self.arm.joints, q, strict=True)) | self.arm.gripper.positions(1.0)

    # ------------------------------------------------------------------------------------------------ judging

    def _judge(self) -> Outcome:
        heights = [self.object_position(i)[2] - t.start[2] for i, t in enumerate(self.things)]
        for thing, height in zip(self.things, heights, strict=True):
            if height < -0.05:
                return Outcome(False, True, 0.0, f"off the table: {thing.name}")
        lifted = [i for i, height in enumerate(heights) if height >= LIFT_HEIGHT]
        for i in lifted:
            if i != self.target:
                return Outcome(False, True, 0.0, f"lifted: {self.things[i].name}")
        if self.episode.task == "pick":
            done, hold, detail = self.target in lifted, LIFT_TIME, f"lifted: {self.things[self.target].name}"
        else:
            plate = self.plates[self.plate].colour
            done, hold, detail = self._placed(), REST_TIME, f"placed: {self.things[self.target].name} on {plate} plate"
        if not done:
            self._since = None
            return RUNNING
        if self._since is None:
            self._since = self.elapsed
        if self.elapsed - self._since >= hold - 1e-9:
            return Outcome(True, False, 1.0, detail)
        return RUNNING

    def _placed(self) -> bool:
        """The named object rests on the named plate and the open gripper is away from it."""
        position = self.object_position(self.target)
        plate = self.plates[self.plate].centre
        address = self._object_qvel[self.target]
        return bool(
            np.linalg.norm(position[:2] - plate[:2]) < PLATE_RADIUS
            and abs(position[2] - plate[2] - REST_HEIGHT[self.things[self.target].shape]) < 0.01
            and np.linalg.norm(self.data.qvel[address : address + 3]) < 0.05
            and np.linalg.norm(self.tool_pose(self.arm.name)[:3, 3] - position) > AWAY
            and self.arm.gripper.opening(self.positions()) > 0.5
        )


@dataclass(frozen=True)
class _Settings:
    """`simulation` of the robot description: area of the objects ((2,), (2,)) in m, cameras by name."""

    area: tuple[np.ndarray, np.ndarray]
    cameras: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, robot: Robot) -> _Settings:
        section = robot.simulation
        where = f"{robot.path}: simulation"
        _keys(section, ("world", "area", "cameras"), where)
        _keys(section["area"], ("lower", "upper"), f"{where}.area")
        area = tuple(_vector(section["area"][k], 2, f"{where}.area.{k}") for k in ("lower", "upper"))
        if not (area[0] < area[1]).all() or (area[1] - area[0]).min() < 2 * SEPARATION:
            least = 2 * SEPARATION
            raise WorldError(f"{where}.area: expected at least {least} m on each side, found {section['area']}")
        cameras = {}
        _keys(section["cameras"], [c.name for c in robot.cameras], f"{where}.cameras")
        for name, camera in section["cameras"].items():
            at = f"{where}.cameras.{name}"
            _keys(camera, ("link", "position", "look_at", "up", "fovy"), at)
            vectors = {k: _vector(camera[k], 3, f"{at}.{k}") for k in ("position", "look_at", "up")}
            cameras[name] = {"link": camera["link"], "fovy": float(camera["fovy"]), **vectors}
        return cls(area, cameras)


def _build(robot: Robot, settings: _Settings) -> mujoco.MjModel:
    """Arm, table, objects, plates, cameras and lights in one model; the world frame is the base frame."""
    spec = load_spec(robot)
    spec.modelname = f"{robot.name}_table"
    spec.option.timestep = 0.002
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    # Elliptic cones with a high impedance ratio keep grasps from slipping slowly.
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10.0
    _dress_arm(spec, robot)
    world = spec.worldbody
    for camera in (c for c in robot.cameras if c.name in settings.cameras):
        _add_camera(spec, camera.name, settings.cameras[camera.name], robot)
    spec.visual.headlight.ambient[:] = 0.45
    spec.visual.headlight.diffuse[:] = 0.35
    spec.visual.headlight.specular[:] = 0.1
    spec.visual.map.znear = 0.005
    world.add_light(pos=[0.5, 0.8, 2.0], dir=[0.0, -0.35, -0.93], directional=True, castshadow=False, diffuse=[0.5] * 3)
    world.add_geom(
        name="table", type=mujoco.mjtGeom.mjGEOM_BOX, pos=[0.35, 0.0, -0.02], size=[0.65, 0.70, 0.02],
        rgba=[0.34, 0.35, 0.38, 1.0], contype=1, conaffinity=3, condim=4,
    )  # fmt: skip
    world.add_geom(
        name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, pos=[0.0, 0.0, -0.8], size=[4.0, 4.0, 0.1],
        rgba=[0.62, 0.60, 0.57, 1.0], contype=1, conaffinity=3,
    )  # fmt: skip
    for i in range(N_OBJECTS):
        body = world.add_body(name=f"object_{i}", pos=[0.4 + 0.1 * i, 0.0, 0.05])
        body.mass, body.inertia, body.ipos, body.explicitinertial = OBJECT_MASS, [2e-5] * 3, np.zeros(3), True
        body.add_freejoint()
        for shape, (kind, size) in SHAPES.items():
            # Rolling friction stops a ball; torsional friction keeps an object from turning in the fingers.
            body.add_geom(
                name=f"object_{i}_{shape}", type=kind, size=size, contype=1, conaffinity=3,
                condim=6 if shape == "ball" else 4, friction=[1.2, 0.01, 0.001],
            )  # fmt: skip
    for i in range(2):
        plate = world.add_body(name=f"plate_{i}", mocap=True)
        plate.add_geom(
            name=f"plate_{i}", type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=[PLATE_RADIUS, PLATE_HEIGHT / 2, 0.0],
            contype=1, conaffinity=3, condim=4,
        )  # fmt: skip
    return spec.compile()


def _dress_arm(spec: mujoco.MjSpec, robot: Robot) -> None:
    """Actuators, gravity compensation, contact rules and colours of the robot's own bodies."""
    fingers = set(robot.finger_names)
    bodies = [body for body in spec.bodies if body.name != "world"]
    for i, body in enumerate(bodies):
        body.gravcomp = 1.0
        finger = any(joint.name in fingers for joint in body.joints)
        shade = 0.25 if finger else 0.93 - 0.12 * (i % 2)
        for geom in body.geoms:
            # The robot touches objects and table (bit 1 of their affinity), not itself.
            geom.contype, geom.conaffinity = 2, 0
            geom.rgba = [shade, shade, shade + 0.02, 1.0]
            if finger:
                geom.condim, geom.friction = 4, [1.2, 0.01, 0.001]
    driven = {joint.name: joint for joint in spec.joints}
    for name in robot.joint_names + robot.finger_names:
        joint = driven[name]
        effort = float(joint.actfrcrange[1]) or 50.0
        # A position servo that gives its full effort at 0.02 rad of error (a finger: at 0.1 m), critically damped.
        stiffness = effort / 0.1 if name in fingers else effort / 0.02
        joint.armature = 0.1
        actuator = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        actuator.gaintype, actuator.biastype = mujoco.mjtGain.mjGAIN_FIXED, mujoco.mjtBias.mjBIAS_AFFINE
        actuator.gainprm[0] = stiffness
        actuator.biasprm[:3] = [0.0, -stiffness, 1.0]  # a positive third number is a damping ratio
        actuator.ctrllimited, actuator.ctrlrange = True, joint.range
        actuator.forcelimited, actuator.forcerange = True, [-effort, effort]


def _add_camera(spec: mujoco.MjSpec, name: str, camera: Mapping[str, Any], robot: Robot) -> None:
    link = camera["link"]
    parent = spec.worldbody if link == "world" else next((b for b in spec.bodies if b.name == link), None)
    if parent is None:
        raise WorldError(f"{robot.path}: simulation.cameras.{name}.link: expected a link, found {link!r}")
    backward = camera["position"] - camera["look_at"]
    backward /= np.linalg.norm(backward)
    right = np.cross(camera["up"], backward)
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(backward, right), backward], axis=1)
    mujoco.mju_mat2Quat(quat := np.zeros(4), rotation.ravel())
    parent.add_camera(name=name, pos=camera["position"], quat=quat, fovy=camera["fovy"])


def _choice(found: str, names: list[str], where: str) -> int:
    if found not in names:
        raise WorldError(f"{where}: expected one of {names}, found {found!r}")
    return names.index(found)


def _keys(section: Any, keys: Any, where: str) -> None:
    if not isinstance(section, Mapping) or set(section) != set(keys):
        found = sorted(section) if isinstance(section, Mapping) else section
        raise WorldError(f"{where}: expected the keys {sorted(keys)}, found {found}")


def _vector(value: Any, length: int, where: str) -> np.ndarray:
    array = np.asarray(value, float)
    if array.shape != (length,) or not np.isfinite(array).all():
        raise WorldError(f"{where}: expected {length} finite numbers, found {value!r}")
    return array
