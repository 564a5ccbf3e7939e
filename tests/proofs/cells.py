"""The cells under test, a robot that does exactly what it is sent, and a judge of the limits of what is sent."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from vla_control.capsules import fit_capsules, watched_pairs
from vla_control.cell import TOLERANCE, Cell
from vla_control.command import ArmCommand, Command
from vla_control.safety import Measured, SafetyController, SafetyDecision, SafetyLimits, State
from vla_core.robot import Box, Collision, Obstacle, Robot, StartGuard, ToolLimits, load_robot

from proofs.oracle import Oracle

#: A workspace that no arm can fill: walls must not keep an arm from what it is driven into.
OPEN = Box(np.full(3, -2.0), np.full(3, 2.0))
#: Speeds that every tool is given at least, m/s and rad/s.
SPEED, ROTATION = 0.6, 2.0
#: Of what finite differences of rounded positions may be over a limit: a share of it.
ROUNDING = 1e-5


@lru_cache(maxsize=8)
def load_cell(name: str, walls: bool = False) -> Robot:
    """A robot description as it is attacked: fast, with obstacles that nothing but what stands on them may touch.

    The tools may go at `SPEED` at least, and motion begins within 1 mm and 0.01 rad of where the arms are; a table is
    put under the arms where the description has no obstacles.

    Args:
        name: of the description. walls: keep its workspaces and the cones of its tools; without, each is opened wide,
            so that an arm can be driven into anything.
    """
    robot = load_robot(name)
    arms = []
    for arm in robot.arms:
        fast = ToolLimits(max(arm.tool_limits.speed, SPEED), max(arm.tool_limits.rotation, ROTATION))
        if not walls:
            arm = replace(arm, workspace=OPEN, tool=replace(arm.tool, cone=None))
        arms.append(replace(arm, tool_limits=fast, start=StartGuard()))
    robot = replace(robot, arms=tuple(arms))
    fixed = fixed_links(robot)
    top = min(float(part.T_base_part[2, 3]) for part in robot.parts)
    table = Box(np.array([-1.5, -1.5, top - 0.2]), np.array([1.5, 1.5, top]))
    world = robot.collision.world or (Obstacle("table", table, robot.collision.margin, ()),)
    world = tuple(replace(obstacle, allow=fixed) for obstacle in world)
    return replace(robot, collision=replace(robot.collision, world=world))


@lru_cache(maxsize=8)
def load_oracle(name: str, walls: bool = False) -> Oracle:
    """The oracle of `load_cell`, made once a process."""
    return Oracle(load_cell(name, walls))


def fixed_links(robot: Robot) -> tuple[str, ...]:
    """Links that no joint moves: what stands on the table."""
    bare = Oracle(replace(robot, collision=Collision()))
    return tuple(sorted(link for link, carrier in bare.carriers.items() if carrier == 0))


@lru_cache(maxsize=8)
def watched(oracle: Oracle) -> np.ndarray:
    """(pairs,) bool: the oracle's pairs of which the controller watches every pair of capsules."""
    capsules = fit_capsules(oracle.robot)
    pairs = {frozenset(pair) for pair in watched_pairs(oracle.robot, capsules)}
    of: dict[str, list[int]] = {}
    for k, capsule in enumerate(capsules):
        of.setdefault(capsule.link, []).append(k)
    found = []
    for pair in oracle.pairs:
        one, two = pair.links
        # An obstacle is watched against every link that may not touch it.
        found.append(not two or all(frozenset((i, j)) in pairs for i in of[one] for j in of[two]))
    return np.array(found, bool)


@lru_cache(maxsize=8)
def needed(oracle: Oracle) -> np.ndarray:
    """(pairs,) m: the margin of what the controller watches; of what it does not, that nothing may touch."""
    return np.where(watched(oracle), oracle.margins(), 0.0)


def own_cell(oracle: Oracle) -> Cell:
    """The controller's own geometry of an oracle's robot, made once."""
    if not hasattr(oracle, "cell"):
        oracle.cell = Cell(oracle.robot)
    return oracle.cell


def random_start(oracle: Oracle, rng: np.random.Generator, room: float = 1e-3) -> dict[str, np.ndarray]:
    """Joint positions arm -> (n,) inside the limits, every pair at least `room` (m) beyond what it needs: the meshes,
    and the controller's capsules, which are larger (where a start is inside their margin, they are kept from getting
    nearer, but the meshes inside them may)."""
    robot, cell = oracle.robot, own_cell(oracle)
    for _ in range(10_000):
        position = {}
        for arm in robot.arms:
            low, high = arm.limits.lower + 0.05, arm.limits.upper - 0.05
            far = rng.uniform() < 0.5
            spread = rng.uniform(low, high) if far else np.clip(arm.home + rng.normal(0.0, 0.3, len(low)), low, high)
            position[arm.name] = spread
        if (oracle.distances(position) > needed(oracle) + room).all():
            cell.update(np.concatenate([position[arm.name] for arm in robot.arms]))
            if cell.room() >= -TOLERANCE:
                return position
    raise RuntimeError(f"{robot.name}: expected a free configuration, found none")


@dataclass
class Path:
    """What was sent from one arming on: arm -> list of (n,), the first where it stood at rest."""

    sent: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def array(self, arm: str) -> np.ndarray:
        return np.array(self.sent[arm])


class Rig:
    """A safety controller, a clock, and a robot that is at the end of each period where it was sent.

    What is measured is what was sent a period before. `paths` holds what was sent since each arming.

    Args:
        start: arm -> (n,) joints at first (default home). lag: further periods by which the joints follow late.
    """

    def __init__(
        self,
        robot: Robot,
        limits: SafetyLimits | None = None,
        start: Mapping[str, np.ndarray] | None = None,
        lag: int = 0,
        armed: bool = True,
    ):
        self.robot = robot
        self.controller = SafetyController(robot, limits)
        self.period = self.controller.period
        self.position = {a.name: np.array((start or {}).get(a.name, a.home), float) for a in robot.arms}
        self.gripper = {a.name: 1.0 for a in robot.arms if a.gripper}
        self.now = 0.0
        self.paths: list[Path] = []
        self.history: list[SafetyDecision] = []
        self._numbers = itertools.count(1)
        self._late = [self.position] * (lag + 1)
        self.lag = lag
        if armed:
            self.arm()

    @property
    def measured(self) -> Measured:
        return Measured(self.now, {n: q.copy() for n, q in self._late[0].items()}, dict(self.gripper))

    def arm(self) -> None:
        self.controller.arm(self.measured)
        self.paths.append(Path({n: [q.copy()] for n, q in self.measured.position.items()}))

    def move_by_hand(self, position: Mapping[str, np.ndarray]) -> None:
        """Put the arms at `position`, whatever they are sent; they stay there until they are sent something new."""
        self.position = {n: np.array(q, float) for n, q in position.items()}
        self._late = [self.position] * (self.lag + 1)

    def command(self, arms: Mapping[str, ArmCommand], **changed) -> Command:
        given = {"stamp": self.now, "sequence": next(self._numbers), "source": "proof", "period": self.period}
        return Command(**(given | {"arms": arms} | changed))

    def step(self, command: Command | None = None, measured: Measured | None | str = "measured") -> SafetyDecision:
        """One control period."""
        decision = self.controller.step(command, self.measured if measured == "measured" else measured, self.now)
        self.now += self.period
        self.history.append(decision)
        position = dict(self.position)
        for name, target in decision.sent.items():
            self.paths[-1].sent[name].append(target.position)
            position[name] = target.position
            if name in self.gripper:
                self.gripper[name] = target.gripper
        self.position = position
        self._late = [*self._late[1:], position]
        return decision


LIMIT_KINDS = ("position", "velocity", "acceleration", "jerk")


def judge_limits(path: np.ndarray, limits, period: float) -> tuple[dict[str, int], dict[str, float]]:
    """Violations of an arm's limits in positions (T, n) that begin at rest, by finite differences over `period` (s).

    Who is outside a position limit may stay or come nearer, never go farther.

    Returns:
        kind -> how many periods violate it; kind -> the most that was used of the limit (1: all of it; position: the
        most, rad, that a joint went out of its limits or farther out).
    """
    path = np.concatenate([np.repeat(path[:1], 3, axis=0), path])
    out = np.maximum(np.maximum(path - limits.upper, limits.lower - path), 0.0)
    farther = np.diff(out, axis=0)[2:]
    counts, worst = {"position": int((farther > 1e-9).any(1).sum())}, {"position": float(farther.max(initial=0.0))}
    for order, (kind, most) in enumerate(
        (("velocity", limits.velocity), ("acceleration", limits.acceleration), ("jerk", limits.jerk)), start=1
    ):
        used = np.abs(np.diff(path, order, axis=0)) / period**order / most
        # Positions of a few rad are rounded to 4e-16 rad each.
        allowed = 1.0 + ROUNDING + 2**order * 1e-15 / period**order / most
        counts[kind] = int((used > allowed).any(1).sum())
        worst[kind] = float(used.max(initial=0.0))
    return counts, worst


def judge_paths(rig: Rig) -> tuple[dict[str, int], dict[str, float]]:
    """`judge_limits` of everything that a rig was sent."""
    counts, worst = dict.fromkeys(LIMIT_KINDS, 0), dict.fromkeys(LIMIT_KINDS, 0.0)
    for path in rig.paths:
        for arm in rig.robot.arms:
            c, w = judge_limits(path.array(arm.name), arm.limits, rig.period)
            for kind in LIMIT_KINDS:
                counts[kind] += c[kind]
                worst[kind] = max(worst[kind], w[kind])
    return counts, worst


def at_rest(decision: SafetyDecision) -> bool:
    return all(not np.any(target.velocity) for target in decision.sent.values())


def running(decision: SafetyDecision) -> bool:
    return decision.state == State.RUNNING
