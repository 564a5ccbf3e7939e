"""The simulated world without ROS: one MuJoCo model, its robot, its cameras and its tasks.

`make_world(robot)` builds the world that the robot description names under `simulation.world`. A world steps whole
control periods, takes physical joint positions as targets (arms and fingers) and judges its own task. The MuJoCo
world frame is the robot's base frame. Not thread-safe; rendering belongs to the thread that renders first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import mujoco
import numpy as np
from vla_core.robot import Robot, load_robot

from vla_sim.renderer import Renderer, Shot


class WorldError(ValueError):
    """A request the world cannot serve; the message names the input, what was expected and what was found."""


@dataclass(frozen=True)
class Episode:
    """One episode of a task: `time_limit` in seconds of simulated time after the reset."""

    task: str
    seed: int
    instruction: str
    time_limit: float


@dataclass(frozen=True)
class Outcome:
    """How the episode stands: it runs on while neither `success` nor `failed`; both are final until the next reset.

    `reward` is the task's own; `detail` names the rule that fired, for example `lifted: red cube`.
    """

    success: bool
    failed: bool
    reward: float
    detail: str


RUNNING = Outcome(False, False, 0.0, "")


class World(ABC):
    """A robot, its surroundings and a task in MuJoCo.

    Subclasses hand model and data to `__init__` and say how a task begins (`_begin`), how it is judged (`_judge`)
    and, where it differs from `mujoco.mj_step`, how physics advances (`_advance`).
    """

    #: Names of the tasks; the first is the default.
    tasks: tuple[str, ...]

    def __init__(self, robot: Robot, model: mujoco.MjModel, data: mujoco.MjData, task: str | None = None):
        self.robot = robot
        self.model = model
        self.data = data
        self.joint_names = robot.joint_names + robot.finger_names
        joints = [self._id(mujoco.mjtObj.mjOBJ_JOINT, name) for name in self.joint_names]
        self._qpos = model.jnt_qposadr[joints]
        self._qvel = model.jnt_dofadr[joints]
        drives = {int(j): a for a, j in enumerate(model.actuator_trnid[:, 0])}
        self._actuators = {name: drives[j] for name, j in zip(self.joint_names, joints, strict=True)}
        self._substeps = round(1.0 / (robot.rates.control * model.opt.timestep))
        if abs(self._substeps * model.opt.timestep * robot.rates.control - 1.0) > 1e-6:
            raise WorldError(
                f"robot {robot.name}: rates.control: expected a whole number of physics steps of "
                f"{model.opt.timestep} s in a period, found {robot.rates.control} Hz"
            )
        self._cameras = {c.name: self._id(mujoco.mjtObj.mjOBJ_CAMERA, c.name) for c in robot.cameras}
        self._tools = {a.name: self._id(mujoco.mjtObj.mjOBJ_BODY, a.tool.link) for a in robot.arms}
        self._renderer: Renderer | None = None
        self._outcome = RUNNING
        self._periods = 0
        self.episode = Episode("", 0, "", 0.0)
        self.reset(task or self.tasks[0], 0)

    # ------------------------------------------------------------------------------------------------- running

    @property
    def time(self) -> float:
        """Simulated time since the world was made, s: resets do not turn it back."""
        return self._periods / self.robot.rates.control

    @property
    def period(self) -> float:
        """Control period, s."""
        return 1.0 / self.robot.rates.control

    @property
    def elapsed(self) -> float:
        """Simulated time since the last reset, s."""
        return (self._periods - self._reset_period) / self.robot.rates.control

    def reset(self, task: str | None = None, seed: int = 0, options: Mapping[str, str] | None = None) -> Episode:
        """Begin a new episode; the seed (with the options) determines the scene fully.

        Args:
            task: one of `tasks`; None keeps the task.
            seed: seed of the scene, 0 or above.
            options: task options as texts, see the world's class.

        Raises:
            WorldError: unknown task, seed or option.
        """
        task = task or self.episode.task
        if task not in self.tasks:
            raise WorldError(f"task: expected one of {list(self.tasks)}, found {task!r}")
        if seed < 0:
            raise WorldError(f"seed: expected 0 or above, found {seed}")
        mujoco.mj_resetData(self.model, self.data)
        self._reset_period = self._periods
        self._outcome = RUNNING
        self.episode = self._begin(task, int(seed), dict(options or {}))
        return self.episode

    def step(self, n_control_periods: int = 1) -> None:
        """Advance physics by whole control periods; the task is judged after each."""
        for _ in range(n_control_periods):
            self._advance(self._substeps)
            self._periods += 1
            if not (self._outcome.success or self._outcome.failed):
                outcome = self._judge()
                if not outcome.success and not outcome.failed and self.elapsed >= self.episode.time_limit - 1e-9:
                    outcome = Outcome(False, True, outcome.reward, "time limit")
                self._outcome = outcome

    def outcome(self) -> Outcome:
        """How the episode stands after the last step."""
        return self._outcome

    def set_targets(self, positions: Mapping[str, float]) -> None:
        """Drive joints (arm and finger joints by name) to positions, rad or m; others keep their targets."""
        for name, value in positions.items():
            if name not in self._actuators:
                raise WorldError(f"targets: expected joints among {list(self._actuators)}, found {name!r}")
            if not np.isfinite(value):
                raise WorldError(f"targets.{name}: expected a finite position, found {value}")
        for name, value in positions.items():
            actuator = self._actuators[name]
            low, high = self.model.actuator_ctrlrange[actuator]
            self.data.ctrl[actuator] = min(max(value, low), high)

    # ------------------------------------------------------------------------------------------------- sensing

    def joint_state(self) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        """Names, positions (N,) and velocities (N,) of all arm joints, then all finger joints; rad, m."""
        return self.joint_names, self.data.qpos[self._qpos].copy(), self.data.qvel[self._qvel].copy()

    def positions(self) -> dict[str, float]:
        """Joint name -> measured position of every arm and finger joint, rad or m."""
        return dict(zip(self.joint_names, self.data.qpos[self._qpos].tolist(), strict=True))

    def tool_pose(self, arm: str) -> np.ndarray:
        """T_base_tool (4, 4) of an arm, as simulated."""
        body = self._tools[self.robot.arm(arm).name]
        T = np.eye(4)
        T[:3, :3] = self.data.xmat[body].reshape(3, 3)
        T[:3, 3] = self.data.xpos[body]
        return T @ self.robot.arm(arm).tool.T_link_tool

    def render(self, camera: str, width: int | None = None, height: int | None = None) -> np.ndarray:
        """Picture of a camera of the robot, (height, width, 3) uint8 RGB; the default size is the robot's."""
        described = self.robot.camera(camera)
        if self._renderer is None:
            self._renderer, self._shot = Renderer(self.model), Shot(self.model)
        self.take(camera, self._shot)
        return self._renderer.draw(self._shot, width or described.width, height or described.height)

    def take(self, camera: str, shot: Shot) -> None:
        """Fill a shot with what a camera sees now; a renderer of another thread may draw it."""
        shot.take(self.data, self._cameras[self.robot.camera(camera).name])

    def intrinsics(self, camera: str, width: int | None = None, height: int | None = None) -> np.ndarray:
        """Intrinsic matrix (3, 3) in pixels: square pixels, principal point in the middle, no distortion."""
        described = self.robot.camera(camera)
        width, height = width or described.width, height or described.height
        focal = 0.5 * height / np.tan(0.5 * np.deg2rad(self.model.cam_fovy[self._cameras[camera]]))
        # Pixel centres are whole numbers (OpenCV), hence the half pixel.
        return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])

    def extrinsics(self, camera: str) -> np.ndarray:
        """T_base_camera (4, 4) now, optical frame: z forward, x right, y down."""
        index = self._cameras[self.robot.camera(camera).name]
        T = np.eye(4)
        # MuJoCo's camera looks along -z with y up.
        T[:3, :3] = self.data.cam_xmat[index].reshape(3, 3) * [1.0, -1.0, -1.0]
        T[:3, 3] = self.data.cam_xpos[index]
        return T

    def carrier(self, camera: str) -> str | None:
        """Name of the arm whose tool link carries a camera; None for one that stands still."""
        body = self.model.cam_bodyid[self._cameras[self.robot.camera(camera).name]]
        return next((arm for arm, tool in self._tools.items() if tool == body), None)

    def close(self) -> None:
        """Free the rendering context."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    # ------------------------------------------------------------------------------------------- for subclasses

    @abstractmethod
    def _begin(self, task: str, seed: int, options: dict[str, str]) -> Episode:
        """Lay out the scene in freshly reset data and return the episode."""

    @abstractmethod
    def _judge(self) -> Outcome:
        """Judge the episode after a control period (the time limit is looked after elsewhere)."""

    def _advance(self, substeps: int) -> None:
        mujoco.mj_step(self.model, self.data, substeps)
        # Poses of the state that the step ended in: mj_step leaves those it began with.
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def _place_robot(self, positions: Mapping[str, float]) -> None:
        """Put joints at positions and let the actuators hold them."""
        for name, address in zip(self.joint_names, self._qpos, strict=True):
            if name in positions:
                self.data.qpos[address] = positions[name]
        self.set_targets({n: p for n, p in positions.items() if n in self._actuators})

    def _id(self, kind: mujoco.mjtObj, name: str) -> int:
        index = mujoco.mj_name2id(self.model, kind, name)
        if index < 0:
            what = kind.name.removeprefix("mjOBJ_").lower()
            raise WorldError(f"robot {self.robot.name}: expected a {what} {name!r} in its model, found none")
        return index


def make_world(robot: Robot | str, task: str | None = None) -> World:
    """The world that `simulation.world` of a robot description names, reset to seed 0 of `task`.

    Raises:
        WorldError: the description names no world that exists here, or not this task.
    """
    from vla_sim.gym_aloha_world import GymAlohaWorld
    from vla_sim.table import TableWorld

    robot = load_robot(robot) if isinstance(robot, str) else robot
    worlds = {"table": TableWorld, "gym_aloha": GymAlohaWorld}
    name = robot.simulation.get("world")
    if name not in worlds:
        raise WorldError(f"robot {robot.name}: simulation.world: expected one of {sorted(worlds)}, found {name!r}")
    return worlds[name](robot, task)
