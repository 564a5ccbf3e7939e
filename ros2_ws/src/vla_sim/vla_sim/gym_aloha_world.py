"""The two-arm ALOHA cell of the PyPI package gym-aloha with its transfer-cube task, unchanged.

Model, reward code and box positions are gym_aloha's own, so that a success rate compares with published ones:
`reward 4 = success`, as AlohaEnv rules. Differences from AlohaEnv: targets arrive at the robot's control rate
instead of 50 Hz, and pictures are rendered without shadows, reflections and multisampling.

On MuJoCo 3: gym-aloha was made for MuJoCo 2.3, whose welds were stiffer; the package's end-effector models (mocap
bodies welded to the grippers) then let the cube slip in 7 of 10 scripted episodes unless `eq_solimp` is set to .9, .95.
The joint-position model used here has no equality constraint at all, so there is nothing to mend and nothing is.
"""

from __future__ import annotations

import numpy as np
from dm_control import mujoco as dm_mujoco
from gym_aloha.constants import START_ARM_POSE
from gym_aloha.tasks.sim import TransferCubeTask
from gym_aloha.utils import sample_box_pose
from vla_core.robot import Robot

from vla_sim.world import Episode, Outcome, World, WorldError

INSTRUCTION = "transfer the red cube from the right arm to the left arm"
#: Of an episode, s: AlohaEnv is registered with 300 steps of 0.02 s, ACT evaluates 400 steps.
TIME_LIMIT = 8.0
SUCCESS_REWARD = 4
DETAIL = {
    0: "",
    1: "right gripper touches the cube",
    2: "right gripper lifted the cube",
    3: "left gripper touches the cube",
    4: "left gripper holds the cube",
}


class GymAlohaWorld(World):
    """Task `transfer_cube`. The seed places the cube as `gym_aloha.utils.sample_box_pose(seed)` does; no options."""

    tasks = ("transfer_cube",)

    def __init__(self, robot: Robot, task: str | None = None):
        if len(robot.parts) != 1 or not np.allclose(robot.parts[0].T_base_part, np.eye(4)):
            raise WorldError(f"robot {robot.name}: model: expected gym_aloha's scene alone, xyz and rpy zero")
        self._physics = dm_mujoco.Physics.from_xml_path(str(robot.parts[0].file))
        self._reward = TransferCubeTask()
        super().__init__(robot, self._physics.model.ptr, self._physics.data.ptr, task)

    @property
    def box_start(self) -> np.ndarray:
        """Centre of the cube as the seed placed it (it then falls 3 cm onto the table), base frame, (3,), m."""
        return sample_box_pose(self.episode.seed)[:3]

    def _begin(self, task: str, seed: int, options: dict[str, str]) -> Episode:
        if options:
            raise WorldError(f"options: expected none for task {task}, found {sorted(options)}")
        with self._physics.reset_context():
            self.data.qpos[:16] = START_ARM_POSE
            self.data.ctrl[:] = START_ARM_POSE
            self.data.qpos[-7:] = sample_box_pose(seed)
        return Episode(task, seed, INSTRUCTION, TIME_LIMIT)

    def _judge(self) -> Outcome:
        reward = self._reward.get_reward(self._physics)
        return Outcome(reward == SUCCESS_REWARD, False, float(reward), DETAIL[reward])

    def _advance(self, substeps: int) -> None:
        # dm_control's own step leaves contacts of the state it ends in, which the reward reads.
        self._physics.step(substeps)
