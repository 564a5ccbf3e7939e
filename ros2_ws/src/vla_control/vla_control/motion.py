"""The commanded motion of all arms of a cell: joint velocities inside every limit, and the braking that always fits.

Three layers keep a limit. A row of the quadratic program (vla_control.ik) makes the arm glide along it. Then the
velocity is taken only if braking after it, all joints of all arms together in one straight line of joint space, leads
to rest inside every limit: this holds whatever the rows left out, and by induction braking is possible at any time.
Last, what is sent is the average of the motion over a few periods, which keeps every limit of position, velocity and
acceleration that the motion keeps, and bounds its jerk: an average of M periods T of accelerations up to A changes by
at most 2 A / (M T) per second.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from vla_core.robot import Arm, Limits, Robot

from vla_control import kernels
from vla_control.cell import TOLERANCE, Cell, Kept
from vla_control.command import ArmCommand
from vla_control.geometry import COLLISION, CONE, WORKSPACE
from vla_control.goal import ArmGoal, MotionLimits
from vla_control.ik import Program
from vla_control.limits import RETURN_SPEED, velocity_bounds

__all__ = ["CellMotion", "JointTarget", "MotionLimits"]

#: A bound counts as active within this of it, rad/s; most rows of the program.
_ACTIVE, _ROWS = 1e-9, 96
#: The path behind an arm is remembered for retreats: this many control periods.
_BEHIND = 400

#: What limits a motion, and which arms.
Cause = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class JointTarget:
    """What is sent to one arm for the end of this period: position and velocity (n,), opening 0 to 1."""

    position: np.ndarray
    velocity: np.ndarray
    gripper: float


class Followed(NamedTuple):
    """One period of motion. limited: arm -> limits that were active. wanted, velocity (n,): joint velocities without
    limits and with them, rad/s. solved: False when the arms could only brake."""

    limited: dict[str, tuple[str, ...]]
    wanted: np.ndarray
    velocity: np.ndarray
    solved: bool


class CellMotion:
    """All arms' commanded state, moved one control period at a time.

    q, v: (n,) joints of all arms, arm after arm, rad (m), and their velocity, before the average. goals: arm -> goal.
    """

    def __init__(self, robot: Robot, limits: MotionLimits, period: float):
        self._arms, self._limits, self._period = robot.arms, limits, period
        self.cell = Cell(robot)
        self._there = self.cell.twin()
        self.slices = self.cell.slices
        self.goals = {arm.name: ArmGoal(arm, limits, period) for arm in robot.arms}
        kinds = ("lower", "upper", "velocity", "acceleration", "jerk", "tracking")
        self._joints = Limits(*(np.concatenate([getattr(arm.limits, kind) for arm in robot.arms]) for kind in kinds))
        ramp = float((2.0 * self._joints.acceleration / self._joints.jerk).max())
        self._periods = max(1, math.ceil(ramp / period - 1e-9))  # of the average
        self._owner = np.concatenate([np.full(len(arm.joints), k) for k, arm in enumerate(robot.arms)])
        self._program = Program(self.cell.n, _ROWS)
        self._corners = np.array([[arm.workspace.lower, arm.workspace.upper] for arm in robot.arms])
        self._damping = limits.tool_acceleration, period, RETURN_SPEED, 2.0 * TOLERANCE, limits.gain
        home = {arm.name: arm.home for arm in robot.arms}
        self.start(home, {})
        self._warm_up()
        self.start(home, {})

    # ------------------------------------------------------------------------------------------------- the state
    def start(self, q: Mapping[str, np.ndarray], gripper: Mapping[str, float]) -> None:
        """Stand at joint positions (arm -> (n,)) and gripper openings (where there are any; else open)."""
        self.q = np.concatenate([np.asarray(q[arm.name], float) for arm in self._arms])
        self.v = np.zeros(len(self.q))
        self._fill()
        self.cell.update(self.q)
        for name, goal in self.goals.items():
            goal.start(self.q[self.slices[name]], self.cell.tool(name), gripper.get(name, math.nan))
        self._behind: deque[np.ndarray] = deque(maxlen=_BEHIND)

    def release(self) -> None:
        """Drop all goals: they are where the command is."""
        for goal in self.goals.values():
            goal.release()

    def halt(self) -> None:
        """Stand still from now on, for motors that are without power."""
        self.q = self.sent.copy()
        self.v = np.zeros(len(self.q))
        self._fill()
        self._place()
        self.release()

    @property
    def still(self) -> bool:
        return self._rest >= self._periods

    @property
    def sent(self) -> np.ndarray:
        """(n,) joint positions to be sent for the end of this period, rad (m)."""
        return self._now

    @property
    def sent_velocity(self) -> np.ndarray:
        """(n,) their velocity over the period, rad/s (m/s)."""
        return (self._now - self._before) / self._period

    def target(self, arm: str) -> JointTarget:
        part = self.slices[arm]
        return JointTarget(self._now[part].copy(), self.sent_velocity[part], self.goals[arm].gripper)

    def commanded(self) -> dict[str, np.ndarray]:
        """arm -> T_base_tool (4, 4) of what is sent."""
        if self.still:
            return {name: goal.T for name, goal in self.goals.items()}
        self._there.update(self._now, look=False)
        return {name: self._there.tool(name) for name in self.goals}

    def tool(self, arm: str, q: np.ndarray) -> np.ndarray:
        """T_base_tool (4, 4) of an arm at joint positions q (n,) of all arms."""
        self._there.update(q, look=False)
        return self._there.tool(arm)

    def lag(self, arm: str, q: np.ndarray) -> tuple[float, int, float]:
        """How far an arm at joint positions q (n,) is from where it was sent, in the joint that is farthest off for its
        tracking limit: the share of the limit, the joint's number, and the distance, rad (m)."""
        part, q = self.slices[arm], np.array(q, float)
        share, k = kernels.worst_share(q, self._now[part], self._joints.tracking[part])
        return share, k, abs(q[k] - self._now[part][k])

    # ------------------------------------------------------------------------------------------------- one period
    def follow(self, now: float) -> Followed:
        """One period towards the goals."""
        period, program = self._period, self._program
        # How long a joint would go on at its present speed if all braked together from the next period on, at most.
        ahead = 1.5 * period + 0.5 * self._braking_time(self.v)
        bounds = velocity_bounds(self.q, self.v, self._joints, period, ahead)
        braked, (lower, upper) = kernels.admit(
            self._braked(), bounds.rows, self.q, self._joints.lower, self._joints.upper
        )
        program.bound(lower, upper, braked)
        self._there.update(self.q + ahead * self.v)
        kept = self.cell.kept(self.q)
        jacobians = [self.cell.jacobian(arm.name) for arm in self._arms]
        self._constrain(kept, jacobians, ahead)
        names = {arm.name: self._add_wish(k, jacobians[k], now) for k, arm in enumerate(self._arms)}
        velocity = program.solve()
        if velocity is None:
            self.brake()
            return Followed({arm.name: ("unsolved",) for arm in self._arms}, program.wanted(), self.v.copy(), False)
        held = [self._cause(kind, where) for kind, where in program.active(velocity)]
        velocity, more = self._able_to_stop(velocity, braked, kept)
        for kind, arms in held + more:
            for name in arms:
                names[name].append(kind)
        for arm in self._arms:
            names[arm.name] += bounds.made_by(velocity, self.slices[arm.name])
        self._advance(velocity)
        for name, goal in self.goals.items():
            names[name] += goal.moved(now)
        limited = {name: tuple(dict.fromkeys(found)) for name, found in names.items()}
        wanted = program.wanted() if any(limited.values()) else velocity
        return Followed(limited, wanted, velocity, True)

    def brake(self) -> None:
        """One period of braking as hard as the acceleration limits allow, all arms together on their way."""
        if self.v.any():
            self._advance(self._braked())
            for goal in self.goals.values():
                goal.aim_here()
        elif not self.still:
            self._average()
        for goal in self.goals.values():
            goal.move_gripper()

    def retreat(self, arm: str, distance: float, now: float) -> None:
        """Aim an arm back along its own path to where its tool was `distance` m away, as far as that is remembered."""
        part = self.slices[arm]
        here, q = self.cell.point(arm), self.q
        for q in reversed(self._behind):  # noqa: B007
            if np.linalg.norm(self.tool(arm, q)[:3, 3] - here) >= distance:
                break
        time = 4.0 * distance / self.goals[arm].arm.tool_limits.speed
        self.goals[arm].take(ArmCommand(joints=q[part].copy()), now, now + time)

    # ------------------------------------------------------------------------------------------------- constraints
    def _add_wish(self, k: int, jacobian: np.ndarray, now: float) -> list[str]:
        """Put what the k-th arm is to do into the program; returns what limited that already."""
        arm = self._arms[k]
        wish = self.goals[arm.name].wish(now, jacobian, lambda v: self.cell.bends(arm.name, v))
        part = self.slices[arm.name]
        self._program.hessian[part, part], self._program.linear[part] = wish.hessian, wish.linear
        if kernels.beyond_walls(wish.twist, *self._wall_speeds[:, k], 1e-6):
            wish.limited.append("workspace")
        return wish.limited

    def _constrain(self, kept: Kept, jacobians: list[np.ndarray], ahead: float) -> None:
        """Put into the program what lies in the way where the arms are, and where they would come to rest, `ahead` s on
        at the present velocity. Where they are, velocities are damped for braking at a known deceleration (velocity
        dampers: Faverjon and Tournassoud, "A local based approach for path planning of manipulators with a high number
        of degrees of freedom", ICRA 1987)."""
        program, cell = self._program, self.cell
        ahead = ahead if self.v.any() else 0.0
        for k, arm in enumerate(self._arms):
            if arm.tool.cone:
                self._constrain_cone(k, jacobians[k], ahead)
        if (hulls := kept.hulls) is not None:
            acceleration, period, _, slack, gain = self._damping
            room = hulls.distance - hulls.margin
            least = np.array([kernels.damper(x, acceleration, period, slack, gain) for x in room])
            program.add(COLLISION, hulls.pair, hulls.rows, least, np.full(len(least), np.inf))
        self._wall_speeds = program.add_cell(
            cell.place, self._there.place, self._corners, cell.layout.margin, self.v, ahead, self._damping
        )

    def _constrain_cone(self, k: int, jacobian: np.ndarray, ahead: float) -> None:
        arm, where, none = self._arms[k], np.array([k]), np.array([-np.inf])
        room, row = self._cone(self.cell, arm, jacobian)
        most = kernels.braking(max(float(room[0]), 0.0), 2.0 * self._limits.tool_acceleration, self._period)
        self._program.add(CONE, where, row, none, np.array([most]))
        if ahead:
            then, row = self._cone(self._there, arm, self._there.jacobian(arm.name))
            self._program.add(CONE, where, row, none, row @ self.v + (then - np.minimum(room, 0.0)) / ahead)

    def _cone(self, cell: Cell, arm: Arm, jacobian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Angle (1,) left to a tool's cone, rad, and how its tilt changes per joint velocity (1, n).

        The angle a between the tool's axis x and the cone's direction u changes by -w (x x u) / sin a.
        """
        cone, row = arm.tool.cone, np.zeros((1, len(self.q)))
        axis = cell.axis(arm.name, cone.axis)
        normal = np.cross(axis, cone.direction)
        sine = math.sqrt(normal @ normal)
        row[0, self.slices[arm.name]] = -(normal / max(sine, 1e-9)) @ jacobian[3:]
        return np.array([cone.angle - math.atan2(sine, float(axis @ cone.direction))]), row

    # ------------------------------------------------------------------------------------------------- braking
    def _braking_time(self, velocity: np.ndarray) -> float:
        """In which all joints come to rest together, s."""
        return kernels.braking_time(velocity, self._joints.acceleration)

    def _braked(self) -> np.ndarray:
        """Velocity (n,) after a period of braking: all joints come to rest together, so the arms keep their way."""
        joints = self._joints
        return kernels.braked(self.q, self.v, joints.lower, joints.upper, joints.acceleration, self._period)

    def _able_to_stop(self, velocity: np.ndarray, braked: np.ndarray, kept: Kept) -> tuple[np.ndarray, list[Cause]]:
        """The velocity, taken back towards braking in those arms that could not stop inside all limits after it; and
        what was in the way."""
        kind, arms = self._cannot_stop(velocity, kept)
        if not kind:
            return velocity, []
        # Who speeds up along an obstacle takes longer to rest, and so comes nearer to it: not so fast.
        found = [(kind, arms)]
        slower = self._joints.acceleration * max(self._braking_time(self.v) - self._period, 0.0)
        self._program.tighten(slower)
        again = self._program.solve()
        velocity = velocity if again is None else again
        share, tried = np.ones(len(self._arms)), velocity
        for _ in range(7):
            kind, arms = self._cannot_stop(tried, kept)
            if not kind:
                return tried, found
            found.append((kind, arms))
            blamed = [k for k, arm in enumerate(self._arms) if arm.name in arms]
            if not share[blamed].any():
                blamed = list(range(len(self._arms)))
            share[blamed] = np.where(share[blamed] > 0.1, 0.5 * share[blamed], 0.0)
            tried = braked + share[self._owner] * (velocity - braked)
        return braked, found

    def _cannot_stop(self, velocity: np.ndarray, kept: Kept) -> Cause:
        """What would be broken while braking to rest after a period with `velocity`, "" for nothing; and by which arms.

        What is outside already counts only when it would get farther out.
        """
        joints = self._joints
        way, first, outside = kernels.way_to_rest(
            self.q, velocity, joints.lower, joints.upper, joints.acceleration, self._owner, self._period, _ACTIVE
        )
        if outside:
            return "position", tuple(arm.name for k, arm in enumerate(self._arms) if outside >> k & 1)
        return self._there.first_broken(self.cell, self.q, way, first, kept)

    def _cause(self, kind: int, where: int) -> Cause:
        """What a row of the program stands for."""
        if kind == COLLISION:
            return "collision", self.cell.arms_of(where)
        return "workspace" if kind == WORKSPACE else "cone", (self._arms[where].name,)

    # ------------------------------------------------------------------------------------------------- private
    def _warm_up(self) -> None:
        """A few periods of every kind, near things and not, so that what is compiled at its first call is so now."""
        self.cell.update(self.q, look=False)
        kernels.damper(0.0, *self._damping[:2], *self._damping[3:])
        kernels.braking(0.0, *self._damping[:2])
        none = np.zeros(1)
        self._program.add(CONE, np.zeros(1, np.int64), np.zeros((1, self.cell.n)), none, none)
        for arm in self._arms:
            self.lag(arm.name, arm.home)
            part, limits = self.slices[arm.name], arm.limits
            kernels.straight(self.v[part], self.v[part], limits.acceleration, self._period)
            self.cell.bends(arm.name, np.eye(len(arm.joints)))
        draw = np.random.default_rng(0)
        moves = np.array([1e-3, 1e-3, -1e-3, 0.0, 1e-2, 0.0])
        for _ in range(100):
            for k in range(6):
                for name, goal in self.goals.items():
                    parts = [ArmCommand(delta=moves), ArmCommand(joints=self.q[self.slices[name]] + 1e-3)]
                    goal.take(parts[k // 3], 0.0, self._period)
                self.follow(0.0)
            self.brake()
            if self.cell.near() is not None and self._there.near() is not None:
                return
            self.start({arm.name: draw.uniform(arm.limits.lower, arm.limits.upper) for arm in self._arms}, {})

    def _fill(self) -> None:
        """The average of what has always been so."""
        self._window = np.tile(self.q, (self._periods, 1))
        self._oldest, self._rest = 0, self._periods
        self._now = self._before = self.q

    def _average(self) -> None:
        self._window[self._oldest] = self.q
        self._oldest = (self._oldest + 1) % self._periods
        self._rest = 0 if self.v.any() else self._rest + 1
        self._before = self._now
        self._now = self.q if self.still else kernels.mean(self._window)

    def _advance(self, velocity: np.ndarray) -> None:
        self.q = self.q + velocity * self._period
        self.v = velocity
        self._average()
        self._place()
        self._behind.append(self.q)

    def _place(self) -> None:
        self.cell.update(self.q)
        for name, goal in self.goals.items():
            part = self.slices[name]
            goal.at(self.q[part], self.v[part], self.cell.tool(name))
