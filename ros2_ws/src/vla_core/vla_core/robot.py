"""The robot description: one YAML file per robot, read strictly.

`launch/robots/<name>.yaml` names the kinematic model (URDF or MJCF), the arms with their joints, limits, tool
and gripper, the cameras and the rates. Everything else in the stack asks this module; an unknown or a missing
key is refused with the path of the key, so that a typing error never becomes a default.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.spatial.transform import Rotation

#: Folders searched, in order, for `<name>.yaml` when a robot is given by name.
SEARCH_PATH_VARIABLE = "VLA_ROBOT_PATH"
#: `limits.tracking` of a joint where the description names none, rad (m): 0.1 s of lag at 5 rad/s.
DEFAULT_TRACKING = 0.5
#: `limits.jerk` where the description names none, as a multiple of the acceleration, 1/s: full acceleration in 10 ms.
DEFAULT_JERK = 100.0


class RobotError(ValueError):
    """A robot description that cannot be used; the message names the file, the key, the expected and the found."""


@dataclass(frozen=True)
class Limits:
    """Joint limits, arrays of shape (n,): position in rad (m), velocity in rad/s (m/s), acceleration in rad/s^2, jerk
    in rad/s^3.

    `tracking`: how far a measured joint may lastingly be from its command, rad (m); a servo lags and gives way.
    """

    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray
    tracking: np.ndarray


@dataclass(frozen=True)
class ToolLimits:
    """Largest speed of the tool: `speed` in m/s, `rotation` in rad/s."""

    speed: float
    rotation: float


@dataclass(frozen=True)
class Box:
    """Axis-aligned box in the base frame, corners of shape (3,), m."""

    lower: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True)
class Cone:
    """Where an axis of the tool may point: `axis` (3,) in the tool frame, at most `angle`, rad, from `direction` (3,)
    in the base frame; unit vectors."""

    axis: np.ndarray
    direction: np.ndarray
    angle: float


@dataclass(frozen=True)
class Tool:
    """The tool frame: fixed to model link `link` by T_link_tool (4, 4); published to TF as `frame`."""

    link: str
    T_link_tool: np.ndarray
    frame: str
    cone: Cone | None = None


@dataclass(frozen=True)
class StartGuard:
    """How far from where it is measured an arm's motion may begin: `joint` in rad (m), `tool` in m."""

    joint: float = 0.01
    tool: float = 0.001


@dataclass(frozen=True)
class Contact:
    """What counts as a contact that nobody asked for, and what the arm then does before it stops.

    force (N) and torque (N m) of the measured wrench, without what the tool weighs; effort (n,) of the joints, in the
    driver's unit (N m or A); infinity where there is no threshold. retreat: way back along its own path, m; 0: it
    brakes and holds where it is.
    """

    force: float
    torque: float
    effort: np.ndarray
    retreat: float


@dataclass(frozen=True)
class Obstacle:
    """A box of the cell that links keep `margin` (m) away from: a table, a wall, a volume to keep out of.

    allow: links that may touch it.
    """

    name: str
    box: Box
    margin: float
    allow: tuple[str, ...]


@dataclass(frozen=True)
class Collision:
    """What is kept apart: links of all arms from each other and from the obstacles, by `margin`, m.

    allow: pairs of links that are not watched, beside neighbours in the model.
    """

    margin: float = 0.02
    allow: tuple[tuple[str, str], ...] = ()
    world: tuple[Obstacle, ...] = ()


@dataclass(frozen=True)
class ModelPart:
    """A URDF or MJCF file of the cell: its root placed by T_base_part (4, 4), its names begun with `prefix`."""

    file: Path
    T_base_part: np.ndarray
    prefix: str = ""


@dataclass(frozen=True)
class GripperJoint:
    """One finger joint and its positions (m or rad) when the gripper is closed and open."""

    name: str
    closed: float
    open: float


@dataclass(frozen=True)
class Gripper:
    """A gripper seen as one opening, 0 closed to 1 open; `speed` is the largest change of the opening, 1/s, `force`
    the most that it grips with, N, where its driver can be told so."""

    joints: tuple[GripperJoint, ...]
    speed: float
    force: float | None = None

    def opening(self, positions: Mapping[str, float]) -> float:
        """Mean opening of the fingers, from joint name -> position (m or rad)."""
        return float(np.mean([(positions[j.name] - j.closed) / (j.open - j.closed) for j in self.joints]))

    def positions(self, opening: float) -> dict[str, float]:
        """Joint name -> position (m or rad) at `opening`."""
        return {j.name: j.closed + opening * (j.open - j.closed) for j in self.joints}


@dataclass(frozen=True)
class Arm:
    """One arm: joint names in kinematic order, home position (n,), tool, limits, workspace box, gripper; `driver`: type
    and settings of its driver (vla_control.drivers), empty where there is none."""

    name: str
    joints: tuple[str, ...]
    home: np.ndarray
    tool: Tool
    limits: Limits
    tool_limits: ToolLimits
    workspace: Box
    gripper: Gripper | None
    start: StartGuard = StartGuard()
    contact: Contact | None = None
    driver: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Camera:
    """One camera: size in pixels, rate in Hz, optical frame, driver parameters, calibration file (may be absent)."""

    name: str
    width: int
    height: int
    rate: float
    frame: str
    driver: Mapping[str, Any]
    calibration: Path | None


@dataclass(frozen=True)
class Rates:
    """Rates in Hz: `control` of the controller and the executor, `observation` the most the observation node gives."""

    control: float
    observation: float


@dataclass(frozen=True)
class Robot:
    """A robot cell as described by its YAML file; its model is made of one or several parts."""

    name: str
    path: Path
    base_frame: str
    parts: tuple[ModelPart, ...]
    arms: tuple[Arm, ...]
    cameras: tuple[Camera, ...]
    rates: Rates
    simulation: Mapping[str, Any]
    collision: Collision = Collision()

    def arm(self, name: str) -> Arm:
        """The arm called `name`."""
        return _named(self.arms, name, f"robot {self.name}: arm")

    def camera(self, name: str) -> Camera:
        """The camera called `name`."""
        return _named(self.cameras, name, f"robot {self.name}: camera")

    @property
    def files(self) -> str:
        """Names of the model's files, for messages."""
        return ", ".join(part.file.name for part in self.parts)

    @property
    def arm_names(self) -> tuple[str, ...]:
        return tuple(arm.name for arm in self.arms)

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of all arm joints (fingers excluded), arm after arm."""
        return tuple(joint for arm in self.arms for joint in arm.joints)

    @property
    def finger_names(self) -> tuple[str, ...]:
        """Names of all finger joints, arm after arm."""
        return tuple(j.name for arm in self.arms if arm.gripper for j in arm.gripper.joints)


def load_robot(name_or_path: str | os.PathLike) -> Robot:
    """Read a robot description.

    Args:
        name_or_path: a YAML file, or the name of one in `launch/robots/` (or in a folder of $VLA_ROBOT_PATH).

    Raises:
        RobotError: the file is missing or is no valid description; the message says which key, what was expected
            and what was found.
    """
    path = find_description(name_or_path, "robots", SEARCH_PATH_VARIABLE)
    try:
        tree = yaml.load(path.read_text(), _StrictLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise RobotError(f"{path}: not valid YAML: {error}") from error
    return _read_robot(_Node(tree, str(path), ""), path)


def find_description(name_or_path: str | os.PathLike, folder: str, variable: str) -> Path:
    """Path of a description given by file name, or by name in `launch/<folder>/` or a folder of `$variable`."""
    given = Path(name_or_path).expanduser()
    if given.suffix in (".yaml", ".yml"):
        if given.is_file():
            return given.resolve()
        raise RobotError(f"{folder[:-1]} description {given}: expected a YAML file, found none there")
    folders = [Path(f) for f in os.environ.get(variable, "").split(os.pathsep) if f]
    folders += _launch_folders(folder)
    for directory in folders:
        if (directory / f"{given}.yaml").is_file():
            return (directory / f"{given}.yaml").resolve()
    known = sorted({f.stem for directory in folders for f in directory.glob("*.yaml")})
    raise RobotError(f"{folder[:-1]} {str(given)!r}: expected a YAML file or one of {known}, found neither")


def resolve_uri(uri: str, relative_to: Path | None = None, must_exist: bool = True) -> Path:
    """Path of `package://NAME/REST` (a ROS package, else an installed Python distribution), or of a plain path.

    A file of a package must be there, unless `must_exist` is False: then the package only, and the path is where the
    file belongs (in the source tree, where there is one).

    Raises:
        RobotError: no package of that name, or none with that file.
    """
    if not uri.startswith("package://"):
        path = Path(uri).expanduser()
        return path if path.is_absolute() or relative_to is None else relative_to / path
    package, _, rest = uri.removeprefix("package://").partition("/")
    candidates = [Path(p) / "share" / package for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    # Wheels of the cmeel family (pinocchio, example-robot-data) keep their share/ folder beside the packages.
    candidates += [
        Path(p) / "cmeel.prefix" / "share" / n for p in sys.path for n in (package, package.replace("_", "-"))
    ]
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found and found.submodule_search_locations:
        candidates += [Path(p) for p in found.submodule_search_locations]
    candidates.append(Path(__file__).resolve().parents[2] / package)  # the source tree: packages side by side
    for folder in candidates:
        if (folder / rest).exists():
            return folder / rest
    folders = [folder for folder in candidates if folder.is_dir()]
    if folders and not must_exist:
        return folders[-1] / rest
    raise RobotError(f"{uri}: expected a file of package {package!r}, found neither a ROS nor a Python package with it")


def transform(xyz: np.ndarray, rpy: np.ndarray) -> np.ndarray:
    """(4, 4) transform from a translation (m) and fixed-axes roll, pitch, yaw (rad), as in URDF."""
    T = np.eye(4)
    T[:3, :3] = Rotation.from_euler("xyz", rpy).as_matrix()
    T[:3, 3] = xyz
    return T


# --------------------------------------------------------------------------------------------------------- reading


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice in one mapping is an error (PyYAML takes the last one)."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node


class _Node:
    """A YAML value with its path, whose mapping keys must all be taken: what is left over is unknown."""

    def __init__(self, value: Any, file: str, path: str):
        self.value, self.file, self.path = value, file, path
        self.taken: set[str] = set()

    def fail(self, expected: str, found: Any = None) -> RobotError:
        shown = self.value if found is None else found
        return RobotError(f"{self.file}: {self.path or 'top level'}: expected {expected}, found {shown!r}")

    def get(self, key: str, *default: Any) -> _Node | Any:
        if not isinstance(self.value, dict):
            raise self.fail("a mapping")
        self.taken.add(key)
        if key not in self.value:
            if default:
                return default[0]
            raise RobotError(
                f"{self.file}: {self._child(key)}: missing; expected a value, found keys {sorted(map(str, self.value))}"
            )
        return _Node(self.value[key], self.file, self._child(key))

    def _child(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else str(key)

    def close(self) -> None:
        unknown = sorted(str(k) for k in self.value if k not in self.taken)
        if unknown:
            raise RobotError(
                f"{self.file}: {self._child(unknown[0])}: unknown key; expected one of {sorted(self.taken)}"
            )

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value:
            raise self.fail("a non-empty string")
        return self.value

    def location(self, relative_to: Path, must_exist: bool = True) -> Path:
        try:
            return resolve_uri(self.text(), relative_to, must_exist).resolve()
        except RobotError as error:
            raise RobotError(f"{self.file}: {self.path}: {error}") from None

    def positive(self) -> float:
        number = self.number()
        if number <= 0:
            raise self.fail("a number above zero")
        return number

    def number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)) or not np.isfinite(self.value):
            raise self.fail("a finite number")
        return float(self.value)

    def not_negative(self) -> float:
        number = self.number()
        if number < 0:
            raise self.fail("a number that is not negative")
        return number

    def integer(self) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value <= 0:
            raise self.fail("a whole number above zero")
        return self.value

    def vector(self, length: int) -> np.ndarray:
        good = isinstance(self.value, list) and len(self.value) == length
        if not good or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in self.value):
            raise self.fail(f"a list of {length} numbers")
        array = np.array(self.value, float)
        if not np.isfinite(array).all():
            raise self.fail("finite numbers")
        array.setflags(write=False)
        return array

    def direction(self) -> np.ndarray:
        """A vector (3,) of any length above zero, made a unit vector."""
        vector = self.vector(3)
        length = np.linalg.norm(vector)
        if length < 1e-6:
            raise self.fail("a direction")
        unit = vector / length
        unit.setflags(write=False)
        return unit

    def texts(self) -> tuple[str, ...]:
        if not isinstance(self.value, list) or not self.value or not all(isinstance(v, str) for v in self.value):
            raise self.fail("a list of names")
        if len(set(self.value)) != len(self.value):
            raise self.fail("names that differ")
        return tuple(self.value)

    def elements(self) -> list[_Node]:
        if not isinstance(self.value, list) or not self.value:
            raise self.fail("a list with at least one entry")
        return [_Node(value, self.file, f"{self.path}[{k}]") for k, value in enumerate(self.value)]

    def one_or_more(self) -> list[_Node]:
        """The entries of a list, or the value itself."""
        return self.elements() if isinstance(self.value, list) else [self]

    def items(self) -> list[tuple[str, _Node]]:
        if not isinstance(self.value, dict) or not self.value:
            raise self.fail("a mapping with at least one entry")
        return [(str(k), _Node(v, self.file, self._child(str(k)))) for k, v in self.value.items()]

    def mapping(self) -> dict:
        if not isinstance(self.value, dict):
            raise self.fail("a mapping")
        return self.value


def _read_robot(root: _Node, path: Path) -> Robot:
    parts = tuple(_read_part(node, path) for node in root.get("model").one_or_more())
    rates_node = root.get("rates")
    rates = Rates(rates_node.get("control").positive(), rates_node.get("observation").positive())
    rates_node.close()
    arms = tuple(_read_arm(name, node) for name, node in root.get("arms").items())
    joints = [j for arm in arms for j in arm.joints]
    joints += [j.name for arm in arms if arm.gripper for j in arm.gripper.joints]
    doubled = sorted({j for j in joints if joints.count(j) > 1})
    if doubled:
        raise root.get("arms").fail("every joint in one arm or gripper only", doubled)
    cameras_node = root.get("cameras")
    cameras = tuple(_read_camera(n, c, path) for n, c in cameras_node.items()) if cameras_node.mapping() else ()
    simulation = root.get("simulation", None)
    robot = Robot(
        name=root.get("name").text(),
        path=path,
        base_frame=root.get("base_frame").text(),
        parts=parts,
        arms=arms,
        cameras=cameras,
        rates=rates,
        simulation=simulation.mapping() if simulation else {},
        collision=_read_collision(root.get("collision", None)),
    )
    root.close()
    return robot


def _pose(node: _Node) -> np.ndarray:
    T = transform(node.get("xyz").vector(3), node.get("rpy").vector(3))
    T.setflags(write=False)
    return T


def _read_arm(name: str, node: _Node) -> Arm:
    joints = node.get("joints").texts()
    n = len(joints)
    limits_node = node.get("limits")
    bounds = [limits_node.get(k).vector(n) for k in ("lower", "upper", "velocity", "acceleration")]
    jerk, tracking = limits_node.get("jerk", None), limits_node.get("tracking", None)
    limits = Limits(
        *bounds,
        jerk=jerk.vector(n) if jerk else DEFAULT_JERK * bounds[-1],
        tracking=tracking.vector(n) if tracking else np.full(n, DEFAULT_TRACKING),
    )
    if not (limits.lower < limits.upper).all():
        raise limits_node.fail("lower below upper for every joint")
    for key in ("velocity", "acceleration", "jerk", "tracking"):
        if not (getattr(limits, key) > 0).all():
            raise limits_node.get(key).fail("numbers above zero")
    limits_node.close()
    home = node.get("home").vector(n)
    if not ((home >= limits.lower) & (home <= limits.upper)).all():
        raise node.get("home").fail("a position inside limits.lower and limits.upper")
    tool_node = node.get("tool")
    tool = Tool(tool_node.get("link").text(), _pose(tool_node), f"{name}_tool", _read_cone(tool_node.get("cone", None)))
    tool_limits = ToolLimits(tool_node.get("speed").positive(), tool_node.get("rotation").positive())
    tool_node.close()
    box_node = node.get("workspace")
    box = Box(box_node.get("lower").vector(3), box_node.get("upper").vector(3))
    if not (box.lower < box.upper).all():
        raise box_node.fail("lower below upper on every axis")
    box_node.close()
    gripper_node = node.get("gripper", None)
    gripper = _read_gripper(gripper_node) if gripper_node else None
    start, driver = _read_start(node.get("start", None)), node.get("driver", None)
    if driver:
        driver.get("type").text()
    contact = _read_contact(node.get("contact", None), n)
    node.close()
    return Arm(
        name, joints, home, tool, limits, tool_limits, box, gripper, start, contact, driver.mapping() if driver else {}
    )


def _read_part(node: _Node, path: Path) -> ModelPart:
    file = node.get("file").location(path.parent)
    if not file.is_file():
        raise node.get("file").fail("an existing URDF or MJCF file")
    prefix = node.get("prefix", None)
    part = ModelPart(file, _pose(node), prefix.text() if prefix else "")
    node.close()
    return part


def _read_cone(node: _Node | None) -> Cone | None:
    if node is None:
        return None
    cone = Cone(node.get("axis").direction(), node.get("direction").direction(), node.get("angle").positive())
    if cone.angle >= np.pi:
        raise node.get("angle").fail("an angle below pi")
    node.close()
    return cone


def _read_start(node: _Node | None) -> StartGuard:
    if node is None:
        return StartGuard()
    guard = StartGuard(node.get("joint").positive(), node.get("tool").positive())
    node.close()
    return guard


def _read_contact(node: _Node | None, n: int) -> Contact | None:
    if node is None:
        return None
    force, torque, effort, retreat = (node.get(key, None) for key in ("force", "torque", "effort", "retreat"))
    if not (force or torque or effort):
        raise node.fail("a threshold: force, torque or effort")
    contact = Contact(
        force=force.positive() if force else np.inf,
        torque=torque.positive() if torque else np.inf,
        effort=effort.vector(n) if effort else np.full(n, np.inf),
        retreat=retreat.number() if retreat else 0.0,
    )
    if not (contact.effort > 0).all():
        raise effort.fail("numbers above zero")
    if not 0.0 <= contact.retreat <= 0.2:
        raise retreat.fail("0 to 0.2 m")
    node.close()
    return contact


def _read_collision(node: _Node | None) -> Collision:
    if node is None:
        return Collision()
    given, allow, world = (node.get(key, None) for key in ("margin", "allow", "world"))
    margin = given.not_negative() if given else Collision.margin
    pairs = tuple(pair.texts() for pair in allow.elements()) if allow else ()
    for k, pair in enumerate(pairs):
        if len(pair) != 2:
            raise allow.elements()[k].fail("a pair of links")
    obstacles = tuple(_read_obstacle(name, entry, margin) for name, entry in world.items()) if world else ()
    node.close()
    return Collision(margin, pairs, obstacles)


def _read_obstacle(name: str, node: _Node, margin: float) -> Obstacle:
    box = Box(node.get("lower").vector(3), node.get("upper").vector(3))
    if not (box.lower < box.upper).all():
        raise node.fail("lower below upper on every axis")
    own, allow = node.get("margin", None), node.get("allow", None)
    obstacle = Obstacle(name, box, own.not_negative() if own else margin, allow.texts() if allow else ())
    node.close()
    return obstacle


def _read_gripper(node: _Node) -> Gripper:
    joints = []
    for name, joint in node.get("joints").items():
        closed, opened = joint.get("closed").number(), joint.get("open").number()
        if closed == opened:
            raise joint.fail("`closed` and `open` that differ")
        joint.close()
        joints.append(GripperJoint(name, closed, opened))
    force = node.get("force", None)
    gripper = Gripper(tuple(joints), node.get("speed").positive(), force.positive() if force else None)
    node.close()
    return gripper


def _read_camera(name: str, node: _Node, path: Path) -> Camera:
    calibration = node.get("calibration", None)
    camera = Camera(
        name=name,
        width=node.get("width").integer(),
        height=node.get("height").integer(),
        rate=node.get("rate").positive(),
        frame=f"{name}_optical_frame",
        driver=node.get("driver").mapping(),
        calibration=calibration.location(path.parent, must_exist=False) if calibration else None,
    )
    node.close()
    return camera


def _named(things: tuple, name: str, what: str) -> Any:
    for thing in things:
        if thing.name == name:
            return thing
    raise RobotError(f"{what}: expected one of {[t.name for t in things]}, found {name!r}")


def _launch_folders(folder: str) -> list[Path]:
    """`share/vla_bringup/<folder>` of the sourced workspace, else `launch/<folder>` of the source tree."""
    found = [
        Path(p) / "share" / "vla_bringup" / folder for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)
    ]
    found += [parent / "launch" / folder for parent in Path(__file__).resolve().parents]
    return [f for f in found if f.is_dir()]
