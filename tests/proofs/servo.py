"""MoveIt Servo's way of slowing down, as a baseline: one factor for all joints, from three scaling laws.

Written from MoveIt 2's moveit_servo (collision_monitor.cpp, servo.cpp, utils/common.cpp; parameters at their
defaults), not taken from it:

    collision    exp(ln(0.001) / threshold (threshold - distance)) below a threshold of 0.01 m (the robot with itself)
                 or 0.02 m (with the scene), 0 in contact; looked up at its own rate, 10 Hz by default
    singularity  1 - (c - 17) / (30 - 17) for a condition number c from 17 to 30 on the way in, over twice that range on
                 the way out, 0 above 30
    joints       all by the factor that the fastest needs to keep its velocity limit; all halt while one moves on within
                 0.1 rad of its position limit

Its distances are the oracle's own, exact and without delay, so this is the law at its best. Each arm is a node of its
own, as several end effectors in one are not supported; what the collision monitor sees is the whole cell. The smoothing
filter, which adds lag, is left out, and so are limits of acceleration and jerk, which Servo leaves to what follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
from vla_control.command import ArmCommand
from vla_core.kinematics import Kinematics
from vla_core.robot import Robot

from proofs.cells import Path
from proofs.oracle import Oracle

SELF_THRESHOLD, SCENE_THRESHOLD = 0.01, 0.02
LOWER_SINGULARITY, HARD_STOP_SINGULARITY, LEAVING_MULTIPLIER = 17.0, 30.0, 2.0
JOINT_MARGIN = 0.1


class ServoRig:
    """Arms under Servo's law, used like a `Rig`: perfect arms that are measured where they were sent."""

    def __init__(
        self, robot: Robot, oracle: Oracle, collision_rate: float = 10.0, start: Mapping[str, np.ndarray] | None = None
    ):
        self.robot, self.oracle = robot, oracle
        self.period = 1.0 / robot.rates.control
        self.now, self.history = 0.0, []
        self.position = {a.name: np.array((start or {}).get(a.name, a.home), float) for a in robot.arms}
        self.paths = [Path({n: [q.copy()] for n, q in self.position.items()})]
        self.controller = SimpleNamespace(target=self._target)
        self._kinematics = Kinematics(robot)
        self._scene = np.array([not all(pair.links) for pair in oracle.pairs])
        self._check_every, self._next_check = 1.0 / collision_rate, 0.0
        self._collision_scale = 1.0

    def tool(self, arm_name: str) -> np.ndarray:
        """T_base_tool (4, 4) as commanded."""
        return self._kinematics.forward(arm_name, self.position[arm_name])

    def step_parts(self, parts: Mapping[str, ArmCommand]) -> None:
        """One control period."""
        if self.now >= self._next_check - 1e-9:
            self._next_check += self._check_every
            self._collision_scale = self._collision()
        for arm in self.robot.arms:
            q = self.position[arm.name]
            delta = self._joint_delta(arm, q, parts[arm.name]) * self._collision_scale
            velocity = delta / self.period
            over = float((np.abs(velocity) / arm.limits.velocity).max())
            delta = delta / max(over, 1.0)
            low, high = arm.limits.lower + JOINT_MARGIN, arm.limits.upper - JOINT_MARGIN
            if not (((delta < 0) & (q < low)) | ((delta > 0) & (q > high))).any():
                q = q + delta
            self.position[arm.name] = q
            self.paths[0].sent[arm.name].append(q)
        self.now += self.period

    def _target(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(position=self.position[name])

    def _joint_delta(self, arm, q: np.ndarray, command: ArmCommand) -> np.ndarray:
        if command.joints is not None:
            return np.clip(command.joints - q, -arm.limits.velocity * self.period, arm.limits.velocity * self.period)
        jacobian = self._kinematics.jacobian(arm.name, q)
        U, sizes, V = np.linalg.svd(jacobian, full_matrices=False)
        inverse = (V.T / sizes) @ U.T
        towards = U[:, -1]
        ahead = np.linalg.svd(self._kinematics.jacobian(arm.name, q + inverse @ (towards / 100.0)), compute_uv=False)
        condition = sizes[0] / sizes[-1]
        if ahead[0] / ahead[-1] <= condition:
            towards = -towards
        size = HARD_STOP_SINGULARITY - LOWER_SINGULARITY
        upper = LOWER_SINGULARITY + size * (1.0 if towards @ command.delta > 0.0 else LEAVING_MULTIPLIER)
        scale = 1.0
        if condition >= HARD_STOP_SINGULARITY:
            scale = 0.0
        elif condition > LOWER_SINGULARITY:
            scale = 1.0 - (condition - LOWER_SINGULARITY) / (upper - LOWER_SINGULARITY)
        return inverse @ command.delta * scale

    def _collision(self) -> float:
        distances = self.oracle.distances(self.position)
        if (distances <= 0.0).any():
            return 0.0
        scale = 1.0
        for which, threshold in ((self._scene, SCENE_THRESHOLD), (~self._scene, SELF_THRESHOLD)):
            nearest = distances[which].min(initial=np.inf)
            if nearest < threshold:
                scale = min(scale, float(np.exp(-np.log(0.001) / threshold * (nearest - threshold))))
        return scale
