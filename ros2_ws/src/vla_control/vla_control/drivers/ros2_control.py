"""Any arm that has a ROS 2 driver of its own, through the topics of its controllers; nothing of it is changed.

    mode        controller behind the topic `command`                                          message
    trajectory  JointTrajectoryController (ros2_controllers)                                    JointTrajectory
    position    forward position controller (JointGroupPositionController, ...)                 Float64MultiArray
    velocity    forward velocity controller (JointGroupVelocityController, ...)                 Float64MultiArray
    pose        Cartesian motion controller (cartesian_controllers, CRISP, ...)                 PoseStamped
    twist       Cartesian velocity controller, and MoveIt Servo (command type TWIST, in speed)  TwistStamped

Targets are joints. What a Cartesian controller is sent is the tool pose of the target joints, or their tool velocity
with the pose error times `gain`, by the kinematics of the robot description. How the joints get the tool there is then
the controller's own choice: on an arm with more than six joints, or in another branch of its kinematics, they may be
elsewhere than the targets, and the safety controller, which judges joints, stops for it when that is beyond `tracking`.
Joint modes follow exactly and are to be preferred where the arm has one.

The state comes from the controllers' JointState topic, which must be another one than ours (remap
joint_state_broadcaster, usually by its namespace).

Stops: 2 only. Sent once: the present position (trajectory, position, pose), or zero velocity (velocity, twist). Power
is not switched over topics. When this program is gone, position, pose and trajectory end at the last target, less than
a period away, and MoveIt Servo stops by its own time-out (`incoming_command_timeout`); a velocity or twist controller
without one goes on moving: use these modes only with a time-out in the controller or in the hardware.

Sources: ros2_controllers user guides (joint_trajectory_controller, forward_command_controller), MoveIt Servo, FZI's
cartesian_controllers.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.qos import QoSProfile, ReliabilityPolicy
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint
from vla_core.kinematics import Kinematics, load_model
from vla_core.se3 import matrix_to_pose
from vla_core.time import seconds, to_msg

from vla_control.drivers.driver import ArmDriver, ArmInfo, ArmState, ArmTarget, Capabilities, DriverError

#: What each mode publishes.
_MESSAGES = {
    "trajectory": JointTrajectory, "position": Float64MultiArray, "velocity": Float64MultiArray, "pose": PoseStamped,
    "twist": TwistStamped,
}  # fmt: skip
_CARTESIAN = ("pose", "twist")
#: Their newest state, whatever reliability they offer; our newest command.
_STATES = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


@dataclass(frozen=True)
class Ros2ControlConfig:
    """mode: see the module. command: its topic. states: the controllers' JointState topic, with this arm's joints.

    gripper_command: topic of a forward position controller of the fingers, in the order of the description.

    horizon: s, time_from_start of trajectories; 0: two periods. velocities: whether trajectories carry them, for a
    JointTrajectoryController with allow_nonzero_velocity_at_trajectory_end. gain: 1/s, of the error in modes velocity
    and twist.
    base_link: link of the model in which poses and twists are given, empty: the base frame. frame: their frame_id,
    empty: the name of base_link, or of the base frame. tip: "tool" or "link": whether the controller's end effector is
    the description's tool frame, or its link without the offset.
    stale: s after which a state is too old to be read. patience: s that connecting may take.
    """

    mode: str
    command: str
    states: str
    gripper_command: str = ""
    horizon: float = 0.0
    velocities: bool = False
    gain: float = 10.0
    base_link: str = ""
    frame: str = ""
    tip: str = "tool"
    stale: float = 0.2
    patience: float = 5.0

    def __post_init__(self) -> None:
        checks = {
            "mode": (self.mode in _MESSAGES, f"one of {sorted(_MESSAGES)}"),
            "states": (self.states.lstrip("/") != "joint_states", "another topic than /joint_states, which is ours"),
            "tip": (self.tip in ("tool", "link"), "'tool' or 'link'"),
            "horizon": (self.horizon >= 0.0, "0 or more"),
            "gain": (self.gain >= 0.0, "0 or more"),
        }
        for name, (sound, expected) in checks.items():
            if not sound:
                raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)!r}")


class Ros2ControlDriver(ArmDriver):
    """The driver "ros2_control". Needs ArmInfo.node, and ArmInfo.robot for Cartesian modes and for a gripper."""

    Config = Ros2ControlConfig

    def __init__(self, arm: ArmInfo, config: Ros2ControlConfig, clock: Callable[[], float]):
        super().__init__(arm, config, clock)
        described = arm.described()
        if arm.node is None:
            raise self._error("a ROS node to speak by, as driver_node gives", "none")
        if described is None and (config.mode in _CARTESIAN or arm.gripper):
            raise self._error("a robot description, for Cartesian modes and grippers", "none")
        if arm.gripper and not config.gripper_command:
            raise self._error("the topic gripper_command, since the arm has a gripper", "none")
        self._fingers = described.gripper if arm.gripper else None
        self.capabilities = Capabilities(
            frozenset({2}), rate=1.0 / arm.period, effort=True, gripper=self._fingers is not None
        )
        self._tool = _Tool(arm, config) if config.mode in _CARTESIAN else None
        self._lock = threading.Lock()
        self._newest: tuple[float, JointState] | None = None
        self._halted = "not connected"
        self._commands = arm.node.create_publisher(_MESSAGES[config.mode], config.command, 1)
        self._grips = arm.node.create_publisher(Float64MultiArray, config.gripper_command, 1) if arm.gripper else None
        arm.node.create_subscription(JointState, config.states, self._heard, _STATES)

    def connect(self) -> None:
        self.close()
        begin, what = self.clock(), ""
        while True:
            try:
                self._check_controller()
                if self._received() >= begin:
                    state = self._read()
                    break
                what = f"no joint state on {self.config.states}"
            except DriverError as error:
                what = str(error)
            if self.clock() - begin > self.config.patience:
                raise self._error(f"controllers within {self.config.patience:g} s", what)
            time.sleep(0.005)
        self._halted = ""
        self._hold(state)  # whatever they followed before

    def read(self) -> ArmState:
        if self._halted == "not connected":
            raise self._error("a connected arm", "none")
        state = self._read()
        if (age := self.clock() - state.stamp) > self.config.stale:
            raise self._error(f"a joint state every period on {self.config.states}", f"none for {age:.2f} s")
        return state

    def send(self, target: ArmTarget) -> None:
        self.check(target)
        if self._halted:
            raise self._error("an arm that follows", self._halted)
        self._check_controller()
        self._publish(self._command(target, self.read()))
        if self._grips is not None and target.gripper is not None:
            self._publish_to(self._grips, Float64MultiArray(data=[*self._fingers.positions(target.gripper).values()]))

    def stop(self, category: int) -> int:
        self._stay()
        self._halted = self._halted or "stopped, category 2"
        return self.stop_category(category)

    def close(self) -> None:
        self._stay()
        self._halted = "not connected"

    def _error(self, expected: str, found: str) -> DriverError:
        return DriverError(
            f"arm {self.arm.name}: ros2_control {self.config.mode} on {self.config.command}: expected {expected}, "
            f"found {found}"
        )

    # What comes.

    def _heard(self, message: JointState) -> None:
        """In the node's thread. The stamp is the controllers' own where their clock is ours."""
        age = self.arm.node.get_clock().now().nanoseconds * 1e-9 - seconds(message.header.stamp)
        stamp = self.clock() - (age if 0.0 < age < 1.0 else 0.0)
        if self.arm.joints[0] in message.name:  # other arms' states may come on the same topic
            with self._lock:
                self._newest = stamp, message

    def _received(self) -> float:
        with self._lock:
            return -np.inf if self._newest is None else self._newest[0]

    def _read(self) -> ArmState:
        with self._lock:
            stamp, message = self._newest
        n = len(message.name)
        found = {
            key: dict(zip(message.name, values))
            for key, values in (("p", message.position), ("v", message.velocity), ("e", message.effort))
            if len(values) == n
        }
        fingers = [joint.name for joint in self._fingers.joints] if self._fingers else []
        if missing := [name for name in (*self.arm.joints, *fingers) if name not in found.get("p", {})]:
            raise self._error(f"the position of {missing[0]!r} on {self.config.states}", str(list(message.name)))
        position, velocity, effort = (
            np.array([found.get(key, {}).get(joint, 0.0) for joint in self.arm.joints]) for key in "pve"
        )
        if not np.all(np.isfinite(position)):
            raise self._error(f"finite positions on {self.config.states}", str(position.tolist()))
        opening = float(np.clip(self._fingers.opening(found["p"]), 0.0, 1.0)) if self._fingers else None
        # Broadcasters give NaN for what the hardware does not measure.
        return ArmState(
            stamp, position, np.nan_to_num(velocity), np.nan_to_num(effort), gripper=opening, halted=self._halted
        )

    # What goes.

    def _check_controller(self) -> None:
        if self._commands.get_subscription_count() == 0:
            raise self._error("a controller that is active there", "nobody who listens")

    def _publish(self, message: Any) -> None:
        self._publish_to(self._commands, message)

    def _publish_to(self, publisher: Any, message: Any) -> None:
        try:
            publisher.publish(message)
        except Exception as error:  # what rclpy raises for a context that has ended
            raise self._error("to publish", str(error)) from error

    def _stay(self) -> None:
        """Hold where the arm is, if it may be in motion; never raises."""
        if not self._halted:
            with contextlib.suppress(DriverError):
                self._hold(self._read())

    def _hold(self, state: ArmState) -> None:
        self._publish(self._command(ArmTarget(state.position, np.zeros(len(self.arm.joints))), state))

    def _command(self, target: ArmTarget, state: ArmState) -> Any:
        """The message for a target. state: as it is now."""
        config, position = self.config, np.asarray(target.position, float)
        velocity = np.asarray(target.velocity, float)
        if config.mode == "trajectory":
            sec, nanosec = to_msg(config.horizon or 2.0 * self.arm.period)
            point = JointTrajectoryPoint(positions=position.tolist())
            point.velocities = velocity.tolist() if config.velocities else []
            point.time_from_start.sec, point.time_from_start.nanosec = sec, nanosec
            return JointTrajectory(joint_names=list(self.arm.joints), points=[point])  # stamp 0: from now on
        if config.mode == "position":
            return Float64MultiArray(data=position.tolist())
        if config.mode == "velocity":
            return Float64MultiArray(data=(velocity + config.gain * (position - state.position)).tolist())
        message = _MESSAGES[config.mode]()
        message.header.stamp, message.header.frame_id = self.arm.node.get_clock().now().to_msg(), self._tool.frame
        if config.mode == "pose":
            p, q = message.pose.position, message.pose.orientation
            p.x, p.y, p.z, q.x, q.y, q.z, q.w = matrix_to_pose(self._tool.pose(position)).tolist()
        else:
            v, w = message.twist.linear, message.twist.angular
            v.x, v.y, v.z, w.x, w.y, w.z = self._tool.twist(position, velocity, state.position, config.gain).tolist()
        return message


class _Tool:
    """What a Cartesian controller is told: pose and velocity of its end effector in its base, from joints."""

    def __init__(self, arm: ArmInfo, config: Ros2ControlConfig):
        described = arm.described()
        self._name = arm.name
        self._kinematics = Kinematics(arm.robot)
        self.frame = config.frame or config.base_link or arm.robot.base_frame
        self._T_link_base = np.eye(4)
        if config.base_link:
            model = load_model(arm.robot, geometry=False)
            body = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, config.base_link)
            if body < 0 or model.body_weldid[body] != 0:
                raise DriverError(
                    f"arm {arm.name}: ros2_control: base_link: expected a link that no joint moves, found "
                    f"{config.base_link!r}"
                )
            data = mujoco.MjData(model)
            mujoco.mj_kinematics(model, data)
            T = np.eye(4)
            T[:3, :3], T[:3, 3] = data.xmat[body].reshape(3, 3), data.xpos[body]
            self._T_link_base = np.linalg.inv(T)
        # From the tool, whose pose the kinematics give, to the controller's end effector.
        self._T_tool_tip = np.linalg.inv(described.tool.T_link_tool) if config.tip == "link" else np.eye(4)

    def pose(self, q: np.ndarray) -> np.ndarray:
        """T_link_tip (4, 4)."""
        return self._T_link_base @ self._kinematics.forward(self._name, q) @ self._T_tool_tip

    def twist(self, q: np.ndarray, velocity: np.ndarray, measured: np.ndarray, gain: float) -> np.ndarray:
        """(6,) of the tip, m/s and rad/s along the axes of base_link: that of the target, and what leads back to it."""
        goal, at = (self._kinematics.forward(self._name, joints) for joints in (q, measured))
        moving = self._kinematics.jacobian(self._name, measured) @ velocity
        moving[:3] += gain * (goal[:3, 3] - at[:3, 3])
        moving[3:] += gain * Rotation.from_matrix(goal[:3, :3] @ at[:3, :3].T).as_rotvec()
        moving[:3] += np.cross(moving[3:], at[:3, :3] @ self._T_tool_tip[:3, 3])
        R = self._T_link_base[:3, :3]
        return np.concatenate([R @ moving[:3], R @ moving[3:]])
