"""A kinematic arm, its controller and policies with a delay, all in lock-step, for the executor's tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from vla_core import se3
from vla_core.robot import load_robot
from vla_execution.chunk import Chunk, resampled
from vla_execution.executor import Executor
from vla_execution.goal import ArmStatus, Status
from vla_execution.rtc import prefix_weights
from vla_execution.strategies import ExecutionConfig

ROBOT = load_robot("panda")
PERIOD, HORIZON = 0.05, 20
START = np.array([0.4, 0.0, 0.3, 1.0, 0.0, 0.0, 0.0, 1.0])


def path(time: float) -> np.ndarray:
    """A smooth motion that starts at START; the gripper closes at 2 s."""
    x = START.copy()
    x[:3] += [0.05 * np.sin(time), 0.08 * (1 - np.cos(0.8 * time)), -0.03 * np.sin(0.5 * time)]
    x[3:7] = se3.matrix_to_quat(se3.rpy_to_matrix([np.pi, 0.2 * np.sin(0.7 * time), 0.1 * time]))
    x[7] = 1.0 if time < 2.0 else 0.0
    return x


class ToyController:
    """Takes every command as it is, one tick late; reports like the safety controller."""

    def __init__(self, pose=START):
        self.goal = se3.pose_to_matrix(pose[:7])
        self.joints = ROBOT.arms[0].home.copy()
        self.gripper, self.sequence, self.source, self.state = 1.0, 0, "", "armed"
        self.log, self.commands, self._late = [], [], None

    def step(self, command):
        command, self._late = self._late, command
        if command is None or self.state not in ("armed", "holding", "running"):
            return
        self.commands.append(command)
        self.sequence, self.source = command.sequence, "executor"
        self.state = "holding" if command.hold else "running"
        for motion in command.arms.values():
            self.gripper = motion.gripper
            if motion.delta is not None:
                self.goal = se3.apply_delta(self.goal, motion.delta)
            else:
                self.joints = motion.joints

    def status(self, now):
        self.log.append(np.append(se3.matrix_to_pose(self.goal), self.gripper))
        arm = ArmStatus(self.goal.copy(), self.joints.copy(), self.gripper)
        return Status(now, self.state, self.source, self.sequence, {"arm": arm})


class ToyPolicy:
    """Follows `way` on from the `phase` (s) it has reached; `spread` (m) is how far each new chunk strays sideways.

    Guided as an ideal sampler would be: mixes the remainder and its own mind by the soft mask.
    """

    def __init__(self, way=path, spread=0.0, seed=0):
        self.way, self.spread, self.rng = way, spread, np.random.default_rng(seed)

    def infer(self, request, observed, phase):
        times = phase + PERIOD * np.arange(HORIZON)
        targets = np.array([self.way(t) for t in times])
        targets[:, 1] += self.spread * self.rng.choice([-1, 1])
        plan = request.plan
        if plan.remainder is not None:
            old = resampled(plan.remainder, observed, PERIOD, HORIZON)
            horizon = min(max(plan.execution_horizon, HORIZON - len(old)), HORIZON)
            if plan.guidance == "prefix":
                w = (np.arange(HORIZON) < min(plan.delay, len(old))).astype(float)
            else:
                w = prefix_weights(HORIZON, plan.delay, horizon, plan.schedule)
            old = np.concatenate([old, np.repeat(old[-1:], HORIZON - len(old), axis=0)])
            targets[:, :3] += w[:, None] * (old - targets)[:, :3]
            targets[:, 3:7] = se3.slerp(targets[:, 3:7], old[:, 3:7], w)
            targets[w > 0.5, 7] = old[w > 0.5, 7]
        return Chunk(targets, observed, PERIOD, "pose", ("arm",), observed=observed, frame="world", id=request.id)


class Run:
    """One run of an executor with a policy of `delay` (s; a number or a function of the request's number)."""

    def __init__(self, strategy, delay=0.1, policy=None, observation_age=0.03, **config):
        self.config = replace(ExecutionConfig(execution_horizon=6), **config)
        self.executor = Executor(ROBOT, strategy, self.config)
        self.controller = ToyController()
        self.policy = policy or ToyPolicy()
        self.delay = delay if callable(delay) else lambda number: delay
        self.age = observation_age
        self.now = 0.0
        self.pending = []  # (arrival, chunk)
        self.refusals, self.requests, self.holds = [], [], []

    def until(self, end):
        while self.now < end - 1e-9:
            self.tick()
        return self

    def tick(self):
        now = self.now
        for item in [i for i in self.pending if i[0] <= now + 1e-9]:
            self.pending.remove(item)
            reason = self.executor.on_chunk(item[1], now)
            if reason:
                self.refusals.append(reason)
        command = self.executor.tick(now, self.controller.status(now))
        self.holds.append(command is None or command.hold)
        request = self.executor.poll_request(now)
        if request is not None:
            self.requests.append(request)
            if self.policy is not None:
                delay = self.delay(request.id)
                if delay is not None:
                    observed = now - self.age
                    self.pending.append((now + delay, self.policy.infer(request, observed, self.phase(observed))))
        self.controller.step(command)
        self.now = round(now + 0.01, 9)

    def phase(self, time):
        """Time for which plans were executed until `time`, s."""
        return max(time, 0.0) - self.executor._standstill.within(0.0, max(time, 0.0))

    @property
    def steps(self):
        """(N, 3) commanded tool step of every tick, m."""
        return np.diff(np.array(self.controller.log)[:, :3], axis=0)
