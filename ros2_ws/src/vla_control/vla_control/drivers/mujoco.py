"""An arm in MuJoCo, in this process: the dynamics of the description's own model, under position servos.

Of the model it has the arm's bodies with their masses, joints and fingers, and no geometry: the arm touches nothing,
not even itself. Time is the clock's: each call steps the physics up to now. For a cell with objects and cameras there
is the simulator of vla_sim, which is a node of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mujoco
import numpy as np
from vla_core.kinematics import load_model
from vla_core.robot import Arm, Robot

from vla_control.drivers.driver import ArmDriver, ArmInfo, ArmState, ArmTarget, Capabilities, DriverError

#: s of one step; at most so many s are made up for when nobody has asked for long.
_STEP, _MOST = 0.001, 1.0
#: A servo gives its full effort at this error, rad; a finger's, m.
_ERROR, _FINGER_ERROR = 0.02, 0.1
#: Effort of a joint of which the model names none, N m; armature, kg m^2, of motor and gear, which few models name.
_EFFORT, _ARMATURE = 50.0, 0.1
#: rad/s under which a joint stands.
_STANDS = 0.01


@dataclass(frozen=True)
class MujocoConfig:
    """start: positions, rad, empty: the description's home. gravity_compensation: whether the servos feel no weight, as
    those of arms that compensate for it."""

    start: tuple[float, ...] = ()
    gravity_compensation: bool = True


class MujocoDriver(ArmDriver):
    """The driver "mujoco".

    Stops: 2 holds where the arm is. 0 is power off with brakes that lock the joints at once, as a model of arms that
    have them; 1 is 2, then 0 when the arm stands. effort: N m, of the servos.
    """

    Config = MujocoConfig

    def __init__(self, arm: ArmInfo, config: MujocoConfig, clock: Callable[[], float]):
        super().__init__(arm, config, clock)
        described = arm.described()
        if described is None or tuple(described.joints) != tuple(arm.joints):
            raise self._error("a robot description with this arm and its joints", described and described.joints)
        start = np.array(config.start if len(config.start) else described.home, np.float64)
        if start.shape != (len(arm.joints),) or not np.all(np.isfinite(start)):
            raise self._error(f"{len(arm.joints)} positions to start from", list(config.start))
        self._gripper = described.gripper if arm.gripper else None
        self.capabilities = Capabilities(
            frozenset({0, 1, 2}), rate=1.0 / arm.period, effort=True, gripper=self._gripper is not None
        )
        fingers = [joint.name for joint in self._gripper.joints] if self._gripper else []
        self._model = _arm_model(arm.robot, described, fingers, config.gravity_compensation)
        self._data = mujoco.MjData(self._model)
        names = [*arm.joints, *fingers]
        joints = [self._model.joint(name).id for name in names]
        self._q, self._v = self._model.jnt_qposadr[joints], self._model.jnt_dofadr[joints]
        self._count = len(arm.joints)
        self._place(np.concatenate([start, self._fingers(1.0)]))
        self._power, self._follows, self._halted = True, False, "not connected"
        self._ending = False  # whether power goes when the arm stands
        self._time = clock()

    def connect(self) -> None:
        self._move()
        self._hold()
        self._power, self._follows, self._halted, self._ending = True, True, "", False

    def read(self) -> ArmState:
        if self._halted == "not connected":
            raise self._error("a connected arm", "none")
        self._move()
        data, n = self._data, self._count
        gripper = None
        if self._gripper:
            found = dict(zip((joint.name for joint in self._gripper.joints), data.qpos[self._q[n:]]))
            gripper = float(np.clip(self._gripper.opening(found), 0.0, 1.0))
        effort = data.actuator_force[:n].copy() if self._power else np.zeros(n)
        return ArmState(
            min(self._time, self.clock()),
            data.qpos[self._q[:n]],
            data.qvel[self._v[:n]],
            effort,
            gripper=gripper,
            halted=self._halted,
        )

    def send(self, target: ArmTarget) -> None:
        self.check(target)
        if not self._follows:
            raise self._error("an arm that follows", self._halted)
        self._move()
        self._data.ctrl[: self._count] = target.position
        if self._gripper and target.gripper is not None:
            self._data.ctrl[self._count :] = self._fingers(target.gripper)

    def stop(self, category: int) -> int:
        self._move()
        done = self.stop_category(category)
        self._follows, self._halted = False, self._halted or f"stopped, category {done}"
        if self._power:
            self._hold()
            self._ending = self._ending or done == 1
            if done == 0:
                self._brake()
        return done

    def close(self) -> None:
        self._move()
        self._hold()
        self._follows, self._halted = False, "not connected"

    def _error(self, expected: str, found: object) -> DriverError:
        return DriverError(f"arm {self.arm.name}: mujoco: expected {expected}, found {found}")

    def _fingers(self, opening: float) -> np.ndarray:
        return np.array([*self._gripper.positions(opening).values()]) if self._gripper else np.zeros(0)

    def _place(self, position: np.ndarray) -> None:
        """Put joints and fingers where they are to be, at rest."""
        self._data.qpos[self._q], self._data.qvel[:] = position, 0.0
        self._data.ctrl[:] = position
        mujoco.mj_forward(self._model, self._data)

    def _hold(self) -> None:
        """The joints stay where they are; the fingers keep their goal, and with it their grip."""
        self._data.ctrl[: self._count] = self._data.qpos[self._q[: self._count]]

    def _brake(self) -> None:
        self._power, self._ending = False, False
        self._data.qvel[:] = 0.0

    def _move(self) -> None:
        """Go on to now."""
        now = self.clock()
        self._time = max(self._time, now - _MOST)
        while self._time + _STEP <= now + 1e-9:
            if self._power:
                mujoco.mj_step(self._model, self._data)
                if self._ending and np.abs(self._data.qvel[self._v[: self._count]]).max() < _STANDS:
                    self._brake()
            self._time += _STEP


def _arm_model(robot: Robot, arm: Arm, fingers: list[str], gravity_compensation: bool) -> mujoco.MjModel:
    """The arm's bodies from the model's root on, and all that hangs on them, with a position servo on every joint."""
    whole = load_model(robot)
    root = [whole.jnt_bodyid[whole.joint(arm.joints[0]).id]]
    while whole.body_parentid[root[0]] != 0:
        root.insert(0, whole.body_parentid[root[0]])
    first = root[-1]
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    spec.option.timestep = _STEP
    spec.option.gravity = whole.opt.gravity
    # Joints on the way that are not the arm's stand still, as all else that is not the arm's.
    made = {0: spec.worldbody}
    driven = {*arm.joints, *fingers}
    for body in range(1, whole.nbody):
        parent = int(whole.body_parentid[body])
        if parent not in made or not (body in root or parent in made and _under(whole, body, first)):
            continue
        made[body] = own = made[parent].add_body(
            pos=whole.body_pos[body], quat=whole.body_quat[body], mass=whole.body_mass[body],
            ipos=whole.body_ipos[body], iquat=whole.body_iquat[body], inertia=whole.body_inertia[body],
            gravcomp=float(gravity_compensation),
        )  # fmt: skip
        own.explicitinertial = True
        for joint in range(whole.body_jntadr[body], whole.body_jntadr[body] + whole.body_jntnum[body]):
            name = whole.joint(joint).name
            if name not in driven:
                continue
            dof = whole.jnt_dofadr[joint]
            own.add_joint(
                name=name, type=mujoco.mjtJoint(whole.jnt_type[joint]), pos=whole.jnt_pos[joint],
                axis=whole.jnt_axis[joint], ref=whole.qpos0[whole.jnt_qposadr[joint]],
                # The friction of a model is there for its own actuators, whose gains these servos do not have.
                damping=whole.dof_damping[dof], armature=max(float(whole.dof_armature[dof]), _ARMATURE),
            )  # fmt: skip
    for name in (*arm.joints, *fingers):
        joint = whole.joint(name).id
        effort = float(whole.jnt_actfrcrange[joint][1]) or _EFFORT
        stiffness = effort / (_FINGER_ERROR if name in fingers else _ERROR)
        servo = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        servo.gaintype, servo.biastype = mujoco.mjtGain.mjGAIN_FIXED, mujoco.mjtBias.mjBIAS_AFFINE
        servo.gainprm[0] = stiffness
        servo.biasprm[:3] = [0.0, -stiffness, 1.0]  # a positive third number is a damping ratio
        servo.forcelimited, servo.forcerange = True, [-effort, effort]
    return spec.compile()


def _under(model: mujoco.MjModel, body: int, ancestor: int) -> bool:
    while body != 0 and body != ancestor:
        body = int(model.body_parentid[body])
    return body == ancestor
