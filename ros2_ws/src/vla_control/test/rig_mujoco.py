"""The driver "mujoco" is its own device; its clock is the test's."""

from __future__ import annotations

import numpy as np
from driver_rig import Rig
from vla_core.robot import load_robot


class MujocoRig(Rig):
    driver, boundary = "mujoco", "no device: MuJoCo is inside the driver"
    joints, gripper, cuttable, resolution = 7, True, False, 1e-4

    def __init__(self, robot: str = "panda", **config) -> None:
        self.robot, self.extra = load_robot(robot), config
        self.arm = self.robot.arms[0]
        self.joints = len(self.arm.joints)
        self.now, self.made = 0.0, None

    def config(self):
        return {
            "name": self.arm.name, "joints": self.arm.joints, "gripper": True, "robot": self.robot, **self.extra,
        }  # fmt: skip

    def time(self):
        return self.now

    def wait(self, duration):
        end = self.now + duration
        while self.now < end - 1e-9:  # somebody asks now and then, as a node does
            self.now = min(end, self.now + 0.1)
            self.made._move()

    def position(self):
        self.made._move()
        return self.made._data.qpos[self.made._q[: self.joints]].copy()

    def place(self, position):
        fingers = self.made._data.qpos[self.made._q[self.joints :]]
        self.made._place(np.concatenate([position, fingers]))

    def cut(self):
        pass

    def mend(self):
        pass

    def moved_by_commands(self):
        ctrl = self.made._data.ctrl[: self.joints]
        return not np.allclose(ctrl, self.position(), atol=0.02)

    def close(self):
        pass
