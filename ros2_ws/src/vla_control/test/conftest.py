"""A robot whose joints do what they are sent, and a judge of all that is sent."""

import gc
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from vla_control.command import ArmCommand, Command
from vla_control.safety import Measured, SafetyController
from vla_core.kinematics import Kinematics
from vla_core.robot import load_robot

sys.path.append(str(Path(__file__).parent))  # for driver_rig and the rigs

settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")

TOLERANCE = 1e-9
#: The tool may be outside its workspace by this, m.
WALL = 2e-3


def pytest_collection_finish():
    """Devices are emulated in real time in this process: let no garbage collection stop it to look through all that the
    tests have imported, which takes 0.4 s and more of a whole suite."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def panda():
    return load_robot("panda")


@pytest.fixture(scope="session")
def aloha():
    return load_robot("aloha")


@pytest.fixture(params=["panda", "aloha"])
def robot(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def make_rig():
    return Rig


class Rig:
    """A safety controller, a perfect robot and a clock. Everything sent is judged against every limit.

    start: arm -> (n,) joints at which the robot stands at first. Whoever starts outside a joint limit or the workspace
    is judged by not going farther out.
    """

    def __init__(self, robot, limits=None, start=None, armed=True):
        self.robot = robot
        self.controller = SafetyController(robot, limits)
        self.period = self.controller.period
        self.kinematics = Kinematics(robot)
        self.ticks = 0
        self.sequence = itertools.count(1)
        self.position = {a.name: np.array((start or {}).get(a.name, a.home), float) for a in robot.arms}
        self.gripper = {a.name: 0.5 for a in robot.arms}
        self.history = []
        self._judged = {}
        if armed:
            self.arm()

    @property
    def now(self):
        return self.ticks * self.period

    @property
    def measured(self):
        return Measured(self.now, {n: q.copy() for n, q in self.position.items()}, dict(self.gripper))

    def arm(self):
        self.controller.arm(self.measured)
        self._judged = {}

    def delta(self, delta=(0, 0, 0, 0, 0, 0), period=None, **fields):
        """A command that moves every arm's goal by `delta`."""
        parts = {a.name: ArmCommand(delta=np.array(delta, float)) for a in self.robot.arms}
        return self.command(parts, period, **fields)

    def joints(self, joints, period=None, **fields):
        """A command to joint positions (n,), or arm -> (n,)."""
        if not isinstance(joints, dict):
            joints = {a.name: joints for a in self.robot.arms}
        return self.command({n: ArmCommand(joints=np.array(q, float)) for n, q in joints.items()}, period, **fields)

    def command(self, parts, period=None, hold=False, source="test", age=0.0, sequence=None, frame=""):
        sequence = next(self.sequence) if sequence is None else sequence
        return Command(self.now - age, sequence, source, period or self.period, hold, parts, frame)

    def step(self, command=None, measured="measured"):
        """One control period; the robot is at its end where it was sent."""
        decision = self.controller.step(command, self.measured if measured == "measured" else measured, self.now)
        self.ticks += 1
        self.history.append(decision)
        for name, target in decision.sent.items():
            self.judge(name, target)
            self.position[name] = target.position.copy()
            self.gripper[name] = target.gripper
        return decision

    def idle(self, periods):
        for _ in range(periods):
            self.step()
        return self.history[-1]

    def judge(self, name, target):
        arm = self.robot.arm(name)
        limits = arm.limits
        assert np.isfinite(target.position).all() and np.isfinite(target.velocity).all()
        before = self._judged.get(name)
        outside = self.outside(name, target.position)
        far = np.maximum(target.position - limits.upper, limits.lower - target.position)
        if before is None:
            rest = np.zeros(len(limits.lower))
            before = (self.position[name], rest, rest, self.gripper[name], outside, far)
        q, v, a, gripper, was_outside, was_far = before
        change = (target.velocity - v) / self.period
        assert (np.abs(target.velocity) <= limits.velocity + TOLERANCE).all()
        assert (np.abs(change) <= limits.acceleration + TOLERANCE / self.period).all()
        assert (np.abs(change - a) <= limits.jerk * self.period + TOLERANCE / self.period).all()
        assert np.abs(target.position - q - target.velocity * self.period).max() < TOLERANCE
        assert (far <= np.maximum(was_far, 0.0) + TOLERANCE).all()
        assert outside <= max(was_outside, WALL) + TOLERANCE
        if arm.gripper:
            assert 0.0 <= target.gripper <= 1.0
            assert abs(target.gripper - gripper) <= arm.gripper.speed * self.period + TOLERANCE
        self._judged[name] = (target.position, target.velocity, change, target.gripper, outside, far)

    def outside(self, name, q):
        """How far the tool is outside its workspace at q, m; negative inside."""
        box, p = self.robot.arm(name).workspace, self.kinematics.forward(name, q)[:3, 3]
        return float(np.maximum(box.lower - p, p - box.upper).max())

    def velocities(self, name):
        return np.array([d.sent[name].velocity for d in self.history if d.sent])

    def tools(self, name):
        return np.array([d.commanded[name] for d in self.history])
