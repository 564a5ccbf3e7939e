"""Scripted experts that see the true state of a world: teachers for demonstrations, never policies.

`make_expert(world)` plans at once from the world's present state; `expert.target(now)` is then the absolute target in
target layout at any time. What varies between episodes (pace, way-points) is drawn from the episode's seed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from vla_core import se3
from vla_core.kinematics import Kinematics

from vla_sim.gym_aloha_world import GymAlohaWorld
from vla_sim.minimum_jerk import Track, minimum_jerk
from vla_sim.table import PLATE_HEIGHT, REST_HEIGHT, TableWorld
from vla_sim.world import World, WorldError

GRASP_BELOW = 0.004  # below the centre of an object, m: fingers reach over the thickest part
CARRY = 0.16  # height of the tool with a lifted object, m
STEPS, STEP = 400, 0.02  # of ACT's way-points; a step in s


class Expert(ABC):
    """A plan for one episode. `kind` says what its targets are: "pose" or "joint" (target layout)."""

    kind: str

    def __init__(self, world: World):
        self._start = world.time

    @abstractmethod
    def target(self, now: float) -> np.ndarray:
        """Target (target_dim,) at world time `now` (s)."""

    @abstractmethod
    def steadiness(self, now: float) -> float:
        """0 where the motion forgives a disturbance, 1 where it does not (grasping, handing over)."""


class TableExpert(Expert):
    """Picks (and places) the named object: over it while descending, closes, lifts (carries, lowers, opens, leaves)."""

    kind = "pose"

    def __init__(self, world: TableWorld):
        super().__init__(world)
        rng = np.random.default_rng([world.episode.seed, 100])
        pose = world.tool_pose(world.arm.name)
        grasp = world.object_position(world.target)
        grasp[2] -= GRASP_BELOW
        grasp[:2] += rng.normal(0.0, 0.0015, 2)
        pace = rng.uniform(0.9, 1.15)

        # Over the object before the fingers are at its height: z starts later and ends later than x, y.
        across = np.linalg.norm(grasp[:2] - pose[:2, 3])
        over = pace * max(1.0, across / 0.22)
        down = over * 0.35
        grasped = max(over + 0.5, down + pace * max(1.3, (pose[2, 3] - grasp[2]) / 0.19))
        closed = grasped + 0.45
        lifted = closed + 1.1 * pace
        # Targets drawn from the seed bend the way slightly without changing where it ends.
        self._via = rng.normal(0.0, 0.012, 2)
        self._over = over
        level = grasp + [0.0, 0.0, CARRY]
        xy = [(0.0, over, grasp[:2])]
        z = [(down, grasped, grasp[2]), (closed, lifted, level[2])]
        gripper = [(grasped, grasped + 0.3, 0.0)]
        self._steady = (over, closed + 0.4)
        if world.episode.task == "place":
            plate = world.plates[world.plate].centre + [*rng.normal(0.0, 0.006, 2), 0.0]
            rest = REST_HEIGHT[world.things[world.target].shape] + PLATE_HEIGHT - GRASP_BELOW
            carried = lifted - 0.3 + pace * max(1.2, np.linalg.norm(plate[:2] - grasp[:2]) / 0.20)
            lowered = carried + 1.0 * pace
            opened = lowered + 0.4
            xy += [(lifted - 0.3, carried, plate[:2])]
            z += [(carried - 0.1, lowered, rest + 0.004), (opened, opened + 1.0, CARRY)]
            gripper += [(lowered + 0.05, opened, 1.0)]
            self._steady = (over, opened + 0.3)
        self._xy, self._z = Track(pose[:2, 3], xy), Track(pose[2, 3], z)
        self._gripper = Track(world.arm.gripper.opening(world.positions()), [(0.0, 0.3, 1.0), *gripper])
        self._turn = Track(0.0, [(0.0, over, 1.0)])
        self._pose = pose
        down_pose = pose.copy()
        down_pose[:3, :3] = np.diag([1.0, -1.0, -1.0])
        self._down_pose = down_pose

    def target(self, now: float) -> np.ndarray:
        t = now - self._start
        # The bend is zero with zero slope at both ends of the way.
        u = min(max(t / self._over, 0.0), 1.0)
        bend = self._via * (4.0 * u * (1.0 - u)) ** 2
        T = se3.interpolate(self._pose, self._down_pose, float(self._turn(t)[0]))
        T[:3, 3] = [*(self._xy(t) + bend), self._z(t)[0]]
        return np.concatenate([se3.matrix_to_pose(T), self._gripper(t)])

    def steadiness(self, now: float) -> float:
        t, (begin, end) = now - self._start, self._steady
        return float(np.clip((t - begin + 0.4) / 0.4, 0.0, 1.0) if t < end else np.clip(1 - (t - end) / 0.4, 0.0, 1.0))


class TransferCubeExpert(Expert):
    """Way-points of ACT's scripted policy for the cube transfer, as joint targets.

    Source: `PickAndTransferPolicy` of the ACT code (Zhao et al. 2023, "Learning fine-grained bimanual manipulation
    with low-cost hardware", scripted data of the simulated cube transfer). There mocap bodies drag the finger tips
    and the joints are replayed; here inverse kinematics follows the same way-points directly. Rotations turn away
    from the arm's straight pose; times are steps of 0.02 s.
    """

    kind = "joint"

    def __init__(self, world: GymAlohaWorld):
        super().__init__(world)
        box = world.box_start
        meet = np.array([0.0, 0.5, 0.25])
        tilted = _rotation([0.0, 1.0, 0.0], -60.0)
        rolled = _rotation([1.0, 0.0, 0.0], 90.0)
        upright = np.eye(3)
        # (step, tool position m, rotation, gripper opening)
        ways = {
            "left": [
                (100, meet + [-0.10, 0.0, -0.02], rolled, 1.0),
                (260, meet + [0.02, 0.0, -0.02], rolled, 1.0),
                (310, meet + [0.02, 0.0, -0.02], rolled, 0.0),
                (360, meet + [-0.10, 0.0, -0.02], upright, 0.0),
            ],
            "right": [
                (90, box + [0.0, 0.0, 0.08], tilted, 1.0),
                (130, box + [0.0, 0.0, -0.015], tilted, 1.0),
                (170, box + [0.0, 0.0, -0.015], tilted, 0.0),
                (200, meet + [0.05, 0.0, 0.0], tilted, 0.0),
                (220, meet, tilted, 0.0),
                (310, meet, tilted, 1.0),
                (360, meet + [0.10, 0.0, 0.0], tilted, 1.0),
            ],
        }
        straight = {"left": np.eye(3), "right": _rotation([0.0, 0.0, 1.0], 180.0)}
        kinematics = Kinematics(world.robot)
        self._plans = [
            _follow(world, kinematics, arm.name, [(s, p, R @ straight[arm.name], g) for s, p, R, g in ways[arm.name]])
            for arm in world.robot.arms
        ]

    def target(self, now: float) -> np.ndarray:
        step = (now - self._start) / STEP
        index = int(np.clip(step, 0, STEPS - 1))
        u = float(np.clip(step - index, 0.0, 1.0))
        return np.concatenate([(1 - u) * plan[index] + u * plan[index + 1] for plan in self._plans])

    def steadiness(self, now: float) -> float:
        step = (now - self._start) / STEP
        return float(np.clip((step - 80) / 20, 0.0, 1.0) * np.clip((340 - step) / 20, 0.0, 1.0))


def make_expert(world: World) -> Expert:
    """The expert for the world's running episode, planning from its present state."""
    for kind, expert in ((TableWorld, TableExpert), (GymAlohaWorld, TransferCubeExpert)):
        if isinstance(world, kind):
            return expert(world)
    raise WorldError(f"expert: expected a world that has one, found {type(world).__name__}")


def _follow(world: GymAlohaWorld, kinematics: Kinematics, name: str, way: list) -> np.ndarray:
    """Joints and opening (STEPS + 1, n + 1) at every step along way-points of the tool.

    Legs that turn the tool are straight in joint space, since on a straight way in space the wrist would come through
    its singularity and could leave it flipped; the others are straight in space.
    """
    arm = world.robot.arm(name)
    positions = world.positions()
    start = np.array([positions[j] for j in arm.joints])
    bent = start + [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]  # the wrist, away from the singularity
    openings = Track(arm.gripper.opening(positions), _legs([(s, g) for s, _, _, g in way]))
    corners = [(0, kinematics.forward(name, start))] + [(s, se3.transform(R, p)) for s, p, R, _ in way]
    joints = [start]
    for (s0, T0), (s1, T1) in zip(corners, corners[1:], strict=False):
        turns = not np.allclose(T0[:3, :3], T1[:3, :3])
        reached = _solve(kinematics, name, T1, bent) if turns else None
        first = joints[-1]
        for step in range(s0 + 1, s1 + 1):
            u = minimum_jerk((step - s0) / (s1 - s0))
            if reached is not None:
                joints.append(first + u * (reached - first))
            else:
                joints.append(_solve(kinematics, name, se3.interpolate(T0, T1, u), joints[-1]))
    joints += [joints[-1]] * (STEPS + 1 - len(joints))
    return np.array([np.append(q, np.clip(openings(step), 0.0, 1.0)) for step, q in enumerate(joints)])


def _solve(kinematics: Kinematics, name: str, T: np.ndarray, q0: np.ndarray) -> np.ndarray:
    q = kinematics.inverse(name, T, q0)
    if q is None:
        raise WorldError(f"expert: arm {name}: expected a way within reach, found {T[:3, 3]} m out of it")
    return q


def _legs(ways: list) -> list:
    times = [0] + [step for step, _ in ways]
    return [(t0, t1, value) for t0, (t1, value) in zip(times, ways, strict=False)]


def _rotation(axis: list[float], degrees: float) -> np.ndarray:
    return se3.exp_so3(np.array(axis) * np.deg2rad(degrees))
