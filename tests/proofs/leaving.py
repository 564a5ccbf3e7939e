"""Proof 4: from a limit, a wall, a singularity or a margin violation the way out is open and the way in is not.

Each state is found by the oracle and by finite differences, has one trouble only, and a way out on which nothing else
comes near. The way out and its opposite are commanded from a standstill, as joint targets or tool deltas:

    joint        a joint at or beyond its limit; measure: its position, rad
    wall         the tool at or beyond a wall of its workspace; how far it is inside, m
    margin       links nearer than their margin; the least distance beyond it over the pairs watched, m
    singularity  the tool hardly moves in one direction. Out: the tool motion of the joints along which the smallest
                 singular value grows fastest; how far the tool gets that way, m. In: straight that direction, which
                 the pseudo-inverse would follow at 5 rad/s and more (tool deltas only)

What counts is what is sent. A way out is taken when no command is refused and the measure grows by `TAKEN` of what the
motion commanded would make of it (from beyond a limit or a wall: at `RETURN`, slowly), or is out of trouble; a tool
delta also when the tool goes `TAKEN` of its way and the measure does not fall (an arm of seven joints may go that way
with other joints than those that would lead out). A way in is taken when the measure falls by more than `KEPT`, and for
links, which give way to each other, by `TAKEN` of what the motion commanded would take. A singularity may be crossed
slowly: there the way in is run into when a joint breaks a limit or the tool is swung about faster than `SWUNG` of its
speed limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from vla_control.command import ArmCommand
from vla_core import se3
from vla_core.kinematics import Kinematics
from vla_core.robot import Robot

from proofs.cells import Rig, judge_paths, load_cell, load_oracle, needed, random_start, watched
from proofs.oracle import Oracle

KINDS = ("joint", "wall", "margin", "singularity")
SECONDS, SPEED = 1.0, 0.15  # s; rad/s of the fastest joint, m/s of the tool at a wall
TAKEN = 0.25
#: How far a joint target may run ahead of the command, rad; farther is refused as a jump.
AHEAD = 0.3
KEPT = {"joint": 1e-9, "wall": 2e-3, "margin": 1e-3}
#: Speed from beyond a joint limit or a wall that is enough, rad/s and m/s.
RETURN = 0.03
#: Smallest singular values of states near a singularity, m/rad; the length that weighs a radian of the tool, m; speed
#: of the tool there, m/s; share of the tool's speed limit that it may reach in passing.
SINGULAR, WEIGHT, CREEP, SWUNG = (0.004, 0.02), 0.3, 0.1, 1.05
#: A pair that is nearer than its margin and this must not come nearer on a way out, m.
AROUND = 0.05
#: How far beyond the margin a state in violation is, m.
VIOLATION = (0.002, 0.012)
#: Distance that is kept from joint limits where they are not the trouble, rad.
EDGE = 0.02
#: A way out of a singularity on which the tool hardly moves is none for tool commands, m/s.
SLOW = 0.01
#: Room beyond the margin in states that are to have no other trouble, m.
CLEAR = 5e-4
Position = dict[str, np.ndarray]


@dataclass(frozen=True)
class LeaveVerdict:
    """at: the measure in the state; out, into: its change after the way out and the most that it fell on the way in;
    asked_out, asked_in: what the commanded motion alone would have made of it. (Singularity: into is the highest
    speed of the tool as a share of its limit.)"""

    run: int
    kind: str
    mode: str
    at: float
    out: float
    asked_out: float
    into: float
    asked_in: float
    refused: str
    left: bool
    entered: bool
    violations: int

    @property
    def passed(self) -> bool:
        return self.left and not self.entered and not self.violations


@dataclass(frozen=True)
class Trouble:
    """A state, the measure of what is wrong with it, what the measure is where nothing is, and the way out: joint
    velocities (n,) of each arm, rad/s, and tool twists (6,), m/s and rad/s.

    asked: what the way out makes of the measure; asked_in: what the way in takes from it, where links may come a little
    nearer as they pass (else 0: it may take nothing); twist_in: the way in, where it is not the opposite of the way
    out.
    """

    position: Position
    measure: Callable[[Mapping[str, np.ndarray]], float]
    clear: float
    out: Position
    twist: Position
    asked: float
    twist_in: Position | None = None
    asked_in: float = 0.0


def run_leave(robot_name: str, run: int) -> LeaveVerdict:
    kind = KINDS[run % 4]
    mode = "joints" if kind != "singularity" and (run // 4) % 2 else "delta"
    rng = np.random.default_rng([4, run])
    walls = kind == "wall"
    robot, oracle = load_cell(robot_name, walls), load_oracle(robot_name, walls)
    trouble = _FIND[kind](robot, oracle, Kinematics(robot), rng)
    at = trouble.measure(trouble.position)
    ends, refused, violations, followed = {}, "", 0, 0.0
    for way, sign in (("out", 1.0), ("in", -1.0)):
        rig = Rig(robot, start=trouble.position)
        rig.step()
        goal = {n: q.copy() for n, q in trouble.position.items()}
        values = [at]
        twist = trouble.twist
        if way == "in":
            twist = trouble.twist_in or {name: -part for name, part in twist.items()}
        for _ in range(round(SECONDS / rig.period)):
            parts = {}
            for arm in robot.arms:
                goal[arm.name] = goal[arm.name] + sign * trouble.out[arm.name] * rig.period
                if mode == "joints":
                    q = rig.controller.target(arm.name).position
                    parts[arm.name] = ArmCommand(joints=q + np.clip(goal[arm.name] - q, -AHEAD, AHEAD))
                else:
                    parts[arm.name] = ArmCommand(delta=twist[arm.name] * rig.period)
            decision = rig.step(rig.command(parts))
            values.append(trouble.measure({n: t.position for n, t in decision.sent.items()}))
            if way == "out":
                refused = refused or decision.refused
        ends[way] = values
        if way == "out" and mode == "delta":
            followed = _followed(robot, rig, twist)
        violations += sum(judge_paths(rig)[0].values())
    out, into = ends["out"][-1] - at, min(ends["in"]) - at
    if kind == "singularity":
        into = _tool_speed(robot, rig)
        entered = into > SWUNG
    else:
        entered = into < -KEPT[kind] and into < -TAKEN * trouble.asked_in
    enough = min(TAKEN * trouble.asked, RETURN * SECONDS if kind in ("joint", "wall") and at < 0.0 else np.inf)
    left = not refused and (ends["out"][-1] >= trouble.clear or out >= enough or (followed >= TAKEN and out >= 0.0))
    return LeaveVerdict(
        run, kind, mode, at, out, trouble.asked, into, -trouble.asked_in, refused, left, entered, violations
    )  # fmt: skip


def _followed(robot: Robot, rig: Rig, twist: Position) -> float:
    """Which share of the way that tool twists were to go the tools went, the least of all arms."""
    kinematics, shares, weights = Kinematics(robot), [], np.array([1.0, 1.0, 1.0, WEIGHT, WEIGHT, WEIGHT])
    for arm in robot.arms:
        wanted = weights * twist[arm.name] * SECONDS
        if not wanted.any():
            continue
        begin, end = (kinematics.forward(arm.name, rig.paths[0].array(arm.name)[k]) for k in (0, -1))
        went = weights * se3.delta(begin, end)
        shares.append(float(went @ wanted / (wanted @ wanted)))
    return min(shares)


def _tool_speed(robot: Robot, rig: Rig) -> float:
    """The highest speed of a tool in what was sent, as a share of its limit."""
    kinematics, most = Kinematics(robot), 0.0
    for arm in robot.arms:
        places = np.array([kinematics.forward(arm.name, q)[:3, 3] for q in rig.paths[0].array(arm.name)])
        speed = np.linalg.norm(np.diff(places, axis=0), axis=1).max() / rig.period
        most = max(most, float(speed) / arm.tool_limits.speed)
    return most


# ------------------------------------------------------------------------------------------------------------- states


def _scaled(out: Position, most: float = SPEED) -> Position:
    size = max(float(np.abs(way).max()) for way in out.values())
    return {name: way * (most / size) for name, way in out.items()}


def _gradient(measure, position: Position, size: float = 1e-4) -> Position:
    found = {}
    for name, q in position.items():
        found[name] = np.zeros(len(q))
        for k in range(len(q)):
            step = np.zeros(len(q))
            step[k] = size
            ahead, back = measure(position | {name: q + step}), measure(position | {name: q - step})
            found[name][k] = (ahead - back) / (2 * size)
    return found


def _still(robot: Robot) -> Position:
    return {arm.name: np.zeros(len(arm.joints)) for arm in robot.arms}


def _twists(robot: Robot, kinematics: Kinematics, position: Position, out: Position) -> Position:
    return {a.name: kinematics.jacobian(a.name, position[a.name]) @ out[a.name] for a in robot.arms}


def _way_is_free(oracle: Oracle, position: Position, out: Position, but: int | None = None) -> bool:
    """Nothing comes near on the way out, and no joint near a limit (of the pairs, `but` is the trouble itself)."""
    begin, bound = oracle.distances(position), oracle.margins() + AROUND
    for share in np.linspace(0.1, 1.0, 8):
        at = {n: q + share * SECONDS * out[n] for n, q in position.items()}
        near = oracle.distances(at)
        bad = (near < bound) & (near < begin - 1e-4)
        if but is not None:
            bad[but] = False
        if bad.any():
            return False
        for arm in oracle.robot.arms:
            moved = np.abs(out[arm.name]) > 1e-9
            room = np.minimum(at[arm.name] - arm.limits.lower, arm.limits.upper - at[arm.name])
            start = np.minimum(position[arm.name] - arm.limits.lower, arm.limits.upper - position[arm.name])
            if (moved & (room < EDGE) & (room < start)).any():
                return False
    return True


def _joint(robot: Robot, oracle: Oracle, kinematics: Kinematics, rng: np.random.Generator) -> Trouble:
    while True:
        position = random_start(oracle, rng)
        arm = robot.arms[rng.integers(len(robot.arms))]
        k, upper = int(rng.integers(len(arm.joints))), bool(rng.integers(2))
        beyond = rng.choice([0.0, rng.uniform(0.0, 0.1)])
        limit = arm.limits.upper[k] if upper else arm.limits.lower[k]
        sign = -1.0 if upper else 1.0
        position[arm.name][k] = limit - sign * beyond
        out = _still(robot)
        out[arm.name][k] = sign
        out = _scaled(out)
        if (oracle.distances(position) > needed(oracle) + CLEAR).all() and _way_is_free(oracle, position, out):
            break

    def inside(at: Mapping[str, np.ndarray]) -> float:
        return sign * float(at[arm.name][k] - limit)

    return Trouble(position, inside, np.inf, out, _twists(robot, kinematics, position, out), SPEED * SECONDS)


def _wall(robot: Robot, oracle: Oracle, kinematics: Kinematics, rng: np.random.Generator) -> Trouble:
    arm = robot.arms[rng.integers(len(robot.arms))]
    box = arm.workspace
    while True:
        axis, upper = int(rng.integers(3)), bool(rng.integers(2))
        aim = kinematics.forward(arm.name, arm.home)
        aim[:3, 3] = rng.uniform(box.lower, box.upper)
        limit = box.upper[axis] if upper else box.lower[axis]
        sign = -1.0 if upper else 1.0
        aim[axis, 3] = limit - sign * rng.choice([0.0, rng.uniform(0.0, 0.05)])
        q = kinematics.inverse(arm.name, aim, arm.home)
        if q is None or (np.minimum(q - arm.limits.lower, arm.limits.upper - q) < 0.3).any():
            continue
        jacobian = kinematics.jacobian(arm.name, q)
        if np.linalg.svd(jacobian, compute_uv=False)[-1] < 0.08:
            continue
        position = {a.name: a.home.copy() for a in robot.arms} | {arm.name: q}
        twist = np.zeros(6)
        twist[axis] = sign * SPEED
        out = _still(robot) | {arm.name: np.linalg.pinv(jacobian) @ twist}
        if (oracle.distances(position) > needed(oracle) + CLEAR).all() and _way_is_free(oracle, position, out):
            break

    def inside(at: Mapping[str, np.ndarray]) -> float:
        return sign * float(kinematics.forward(arm.name, at[arm.name])[axis, 3] - limit)

    ahead = {n: p + SECONDS * out[n] for n, p in position.items()}
    twists = {a.name: np.zeros(6) for a in robot.arms} | {arm.name: twist}
    return Trouble(position, inside, np.inf, out, twists, inside(ahead) - inside(position))


def _margin(robot: Robot, oracle: Oracle, kinematics: Kinematics, rng: np.random.Generator) -> Trouble:
    which = np.flatnonzero(watched(oracle))
    others = np.flatnonzero(~watched(oracle))
    margins = oracle.margins()[which]

    def beyond(at: Mapping[str, np.ndarray]) -> float:
        return float((oracle.distances(at)[which] - margins).min())

    while True:
        free = random_start(oracle, rng)
        bad = {a.name: rng.uniform(a.limits.lower, a.limits.upper) for a in robot.arms}
        if len(robot.arms) > 1 and rng.random() < 0.5:  # one arm alone into something
            bad |= {robot.arms[0].name: free[robot.arms[0].name]}
        if beyond(bad) >= 0.0:
            continue
        wanted, low, high = -rng.uniform(*VIOLATION), 0.0, 1.0
        for _ in range(30):
            middle = 0.5 * (low + high)
            position = {n: q + middle * (bad[n] - q) for n, q in free.items()}
            if beyond(position) > wanted:
                low = middle
            else:
                high = middle
        if abs(beyond(position) - wanted) > 1e-4 or (oracle.distances(position)[others] <= 0.0).any():
            continue
        if any((np.minimum(p - a.limits.lower, a.limits.upper - p) < 0.2).any()
               for a, p in ((a, position[a.name]) for a in robot.arms)):  # fmt: skip
            continue
        out = _scaled(_gradient(beyond, position))
        least = int(which[(oracle.distances(position)[which] - margins).argmin()])
        ahead = {n: q + SECONDS * out[n] for n, q in position.items()}
        asked = beyond(ahead) - beyond(position)
        if asked > 2e-3 and _way_is_free(oracle, position, out, least):
            back = {n: q - SECONDS * out[n] for n, q in position.items()}
            asked_in = beyond(position) - beyond(back)
            twist = _twists(robot, kinematics, position, out)
            return Trouble(position, beyond, 0.0, out, twist, asked, asked_in=asked_in)


def _singularity(robot: Robot, oracle: Oracle, kinematics: Kinematics, rng: np.random.Generator) -> Trouble:
    arm = robot.arms[rng.integers(len(robot.arms))]
    weights = np.array([1.0, 1.0, 1.0, WEIGHT, WEIGHT, WEIGHT])

    def parts(q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.linalg.svd(weights[:, None] * kinematics.jacobian(arm.name, q), full_matrices=False)

    def least(at: Mapping[str, np.ndarray]) -> float:
        return float(parts(at[arm.name])[1][-1])

    while True:
        position = random_start(oracle, rng)
        wanted = rng.uniform(*SINGULAR)
        for _ in range(60):
            rises = _gradient(least, {arm.name: position[arm.name]})[arm.name]
            missing = least(position) - wanted
            if abs(missing) < 1e-4 or not rises.any():
                break
            step = -missing * rises / (rises @ rises)
            step *= min(1.0, 0.1 / np.abs(step).max())
            position[arm.name] = np.clip(position[arm.name] + step, arm.limits.lower + EDGE, arm.limits.upper - EDGE)
        if abs(missing) > 1e-3 or (oracle.distances(position) < needed(oracle) + CLEAR).any():
            continue
        U = parts(position[arm.name])[0]
        rises = _gradient(least, {arm.name: position[arm.name]})[arm.name]
        out = _scaled(_still(robot) | {arm.name: rises})
        twist = weights * (kinematics.jacobian(arm.name, position[arm.name]) @ out[arm.name])
        if np.linalg.norm(twist) > SLOW and _way_is_free(oracle, position, out):
            break
    start = kinematics.forward(arm.name, position[arm.name])
    size = float(np.linalg.norm(twist))

    def way(at: Mapping[str, np.ndarray]) -> float:
        return float(twist @ (weights * se3.delta(start, kinematics.forward(arm.name, at[arm.name])))) / size

    still = {a.name: np.zeros(6) for a in robot.arms}
    lost = U[:, -1] * -np.copysign(1.0, U[:, -1] @ twist)
    return Trouble(
        position, way, np.inf, out, still | {arm.name: twist / weights}, size * SECONDS,
        still | {arm.name: CREEP * lost / weights},
    )  # fmt: skip


_FIND = {"joint": _joint, "wall": _wall, "margin": _margin, "singularity": _singularity}
