"""Attacks on the controller: drives of one arm or two into themselves, each other, the table and every limit."""

from __future__ import annotations

import numpy as np
from vla_control.command import ArmCommand
from vla_core.kinematics import Kinematics

from proofs.cells import Rig, needed
from proofs.oracle import Oracle

#: Speed of a drive, m/s, where the tool may go that fast.
SPEED = 0.5
#: A drive turns to something else after this long, s, at least and at most.
TURN = (0.3, 1.5)
#: Steps ahead at which a joint target is set, rad; nearer than what is refused as a jump.
REACH = 0.3
#: Periods between two looks at which way leads into a collision fastest.
LOOK = 8

ONE_ARM = ("links", "table", "limits", "poses", "descent", "wild")
TWO_ARMS = ("tools", "others", *ONE_ARM)


class Attacker:
    """Drives all arms of a rig at once, each in the manner of `kind`.

    links: the tool at a link of its own arm. others: at a link of the other arm. tools: both tools at each other.
    table: down, at a slant. limits: a joint's limits, by joint targets. poses: joint targets on the straight way to
    configurations in which meshes penetrate. descent: joint targets in whatever direction takes the smallest distance
    down fastest. wild: any direction and turn.
    """

    def __init__(self, rig: Rig, oracle: Oracle, kind: str, rng: np.random.Generator):
        self.rig, self.oracle, self.kind, self.rng = rig, oracle, kind, rng
        self._kinematics = Kinematics(rig.robot)
        self._turn_at = -1.0
        self._arms = rig.robot.arms
        self._links = {arm.name: self._links_near(arm.name) for arm in self._arms}
        self._look = 0
        at, straight, to = self._at_aims, self._straight, self._to_goals
        self._manners = {"links": at, "others": at, "tools": at, "table": straight, "wild": straight}
        self._manners |= {"limits": to, "poses": to, "descent": self._descend}

    def command(self) -> dict[str, ArmCommand]:
        """The arms' parts for the next period."""
        if self.rig.now >= self._turn_at:
            self._turn_at = self.rig.now + self.rng.uniform(*TURN)
            self._turn()
        return self._manners[self.kind]()

    # ---------------------------------------------------------------------------------------------------- inside
    def _owner(self, link: str) -> str | None:
        """The arm whose chain a link belongs to; none for what is fixed."""
        carrier = self.oracle.carriers[link]
        joint = self.oracle.model.names[carrier]
        return next((arm.name for arm in self._arms if joint in arm.joints), None)

    def _links_near(self, arm_name: str) -> list[str]:
        """An arm's own links and the fixed ones that it can run into."""
        found = set()
        for pair in self.oracle.pairs:
            owners = {link: self._owner(link) for link in pair.links if link}
            if arm_name in owners.values():
                found |= {link for link, owner in owners.items() if owner in (arm_name, None)}
        return sorted(found)

    def _turn(self) -> None:
        rng = self.rng
        self._aim = {}
        self._direction = {}
        self._rotation = {}
        for arm in self._arms:
            direction = rng.normal(size=3)
            if self.kind == "table":
                direction = np.array([*rng.normal(0.0, 0.4, 2), -1.0])
            self._direction[arm.name] = direction / np.linalg.norm(direction)
            turn = rng.normal(size=3)
            share = rng.choice([0.0, 0.5, 1.0])
            self._rotation[arm.name] = share * arm.tool_limits.rotation * turn / np.linalg.norm(turn)
            others = [a.name for a in self._arms if a.name != arm.name]
            of = rng.choice(others) if self.kind in ("others", "tools") else arm.name
            self._aim[arm.name] = self._tool_link(of) if self.kind == "tools" else rng.choice(self._links[of])
        self._goal = self._joint_goals()

    def _tool_link(self, arm_name: str) -> str:
        return self.rig.robot.arm(arm_name).tool.link

    def _joint_goals(self) -> dict[str, np.ndarray]:
        rng = self.rng
        goals = {}
        if self.kind == "limits":
            for arm in self._arms:
                q = self._commanded(arm.name).copy()
                for k in rng.choice(len(q), rng.integers(1, len(q) + 1), replace=False):
                    q[k] = rng.choice([arm.limits.lower[k] - 0.5, arm.limits.upper[k] + 0.5])
                goals[arm.name] = q
        if self.kind == "poses":
            for _ in range(200):
                goals = {a.name: rng.uniform(a.limits.lower, a.limits.upper) for a in self._arms}
                if (self.oracle.distances(goals) <= 0.0).any():
                    break
        return goals

    def _commanded(self, name: str) -> np.ndarray:
        return self.rig.controller.target(name).position

    def _tool(self, name: str) -> np.ndarray:
        return self._kinematics.forward(name, self._commanded(name))

    def _along(self, arm, direction: np.ndarray) -> ArmCommand:
        speed = min(SPEED, arm.tool_limits.speed)
        twist = np.concatenate([speed * direction, self._rotation[arm.name]])
        return ArmCommand(delta=twist * self.rig.period)

    def _at_aims(self) -> dict[str, ArmCommand]:
        centres = self.oracle.centres({arm.name: self._commanded(arm.name) for arm in self._arms})
        parts = {}
        for arm in self._arms:
            way = centres.get(self._aim[arm.name], np.zeros(3)) - self._tool(arm.name)[:3, 3]
            length = np.linalg.norm(way)
            parts[arm.name] = self._along(arm, way / length if length > 1e-3 else self._direction[arm.name])
        return parts

    def _straight(self) -> dict[str, ArmCommand]:
        return {arm.name: self._along(arm, self._direction[arm.name]) for arm in self._arms}

    def _to_goals(self) -> dict[str, ArmCommand]:
        parts = {}
        for arm in self._arms:
            q = self._commanded(arm.name)
            parts[arm.name] = ArmCommand(joints=q + np.clip(self._goal[arm.name] - q, -REACH, REACH))
        return parts

    def _descend(self) -> dict[str, ArmCommand]:
        if self._look % LOOK == 0 or not self._goal:
            here = {arm.name: self._commanded(arm.name) for arm in self._arms}
            best, self._goal = np.inf, {}
            for _ in range(12):
                tried = {n: q + self.rng.normal(size=len(q)) * 0.1 for n, q in here.items()}
                distance = float((self.oracle.distances(tried) - needed(self.oracle)).min())
                if distance < best:
                    best, self._goal = distance, {n: here[n] + 10.0 * (tried[n] - here[n]) for n in here}
        self._look += 1
        return self._to_goals()
