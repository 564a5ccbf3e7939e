"""The safety controller as a node: commands and joint states in, limited joint targets and the safety status out.

Nothing is sent to the arms until the service ~/arm (or the parameter auto_arm, for simulation) is used. The loop runs
at the robot's control rate on the node's clock: on a real robot a steady timer, in simulation a timer of /clock.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections import deque

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import Point, Pose, Quaternion
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool
from std_srvs.srv import Trigger
from vla_core.robot import load_robot
from vla_core.se3 import matrix_to_pose
from vla_core.time import seconds
from vla_msgs import msg
from vla_msgs.msg import ArmSafety, SafetyStatus

from vla_control.command import ArmCommand, Command, CommandRefused
from vla_control.safety import Measured, SafetyController, SafetyDecision, SafetyLimits, State

#: Control periods over which jitter is reported.
WINDOW = 1000


class SafetyControllerNode(Node):
    def __init__(self) -> None:
        super().__init__("safety_controller")
        self.robot = load_robot(self.declare_parameter("robot", "panda").value)
        defaults = SafetyLimits()
        self.limits = SafetyLimits(
            **{name: float(self.declare_parameter(name, value).value) for name, value in vars(defaults).items()}
        )
        self.auto_arm = self.declare_parameter("auto_arm", False).value
        self.controller = SafetyController(self.robot, self.limits)
        self.period = self.controller.period
        self._command: Command | None = None
        self._measured: Measured | None = None
        self._last_wall = math.nan
        self._jitter: deque[float] = deque(maxlen=WINDOW)
        self._cost: deque[float] = deque(maxlen=WINDOW)
        self._overruns = 0
        self._last_refusal = ""
        self._shown_state: tuple | None = None
        self._fingers = {
            arm.name: [j.name for j in arm.gripper.joints] if arm.gripper else [] for arm in self.robot.arms
        }

        self.target_publishers = {
            arm.name: self.create_publisher(JointState, f"/{arm.name}/joint_targets", 5) for arm in self.robot.arms
        }
        self.status_publisher = self.create_publisher(SafetyStatus, "/safety_status", 10)
        self.diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_subscription(JointState, "/joint_states", self.on_joint_states, 10)
        self.create_subscription(msg.Command, "/command", self.on_command, 5)
        self.create_subscription(Bool, "/emergency_stop", self.on_emergency_stop, 10)
        self.create_service(Trigger, "~/arm", self.on_arm)
        self.create_service(Trigger, "~/disarm", self.on_disarm)
        self.create_service(Trigger, "~/stop", self.on_stop)
        # A robot's control loop follows the steady clock: setting the system time must not stretch a period.
        sim = self.get_parameter("use_sim_time").value
        self.create_timer(self.period, self.tick, clock=None if sim else Clock(clock_type=ClockType.STEADY_TIME))
        self.create_timer(1.0, self.publish_diagnostics)

    # --------------------------------------------------------------------------------------------------- inputs
    def on_joint_states(self, message: JointState) -> None:
        found = dict(zip(message.name, message.position))
        try:
            measured = Measured(
                stamp=seconds(message.header.stamp),
                position={arm.name: np.array([found[j] for j in arm.joints]) for arm in self.robot.arms},
                gripper={arm.name: arm.gripper.opening(found) for arm in self.robot.arms if arm.gripper},
            )
        except KeyError as error:
            self.get_logger().error(
                f"joint_states: expected joint {error.args[0]!r}, found {list(found)}", throttle_duration_sec=5.0
            )
            return
        self._measured = measured
        if self.auto_arm:
            self.auto_arm = False
            self.controller.arm(measured)

    def on_command(self, message: msg.Command) -> None:
        self._command = Command(
            stamp=seconds(message.header.stamp),
            sequence=message.sequence,
            source=message.source,
            period=message.period,
            hold=message.hold,
            arms={part.arm: _arm_command(part) for part in message.arms},
            frame=message.header.frame_id,
        )

    def on_emergency_stop(self, message: Bool) -> None:
        if message.data:
            self.controller.stop(2, "emergency stop")

    # ------------------------------------------------------------------------------------------------- services
    def on_arm(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        age = math.inf if self._measured is None else self.now() - self._measured.stamp
        if not age <= self.limits.joint_state_timeout:
            response.success, response.message = False, f"not armed: joint states are {age:.2f} s old"
            return response
        try:
            self.controller.arm(self._measured)
            self._command = None
            response.success, response.message = True, "armed, holding"
        except CommandRefused as error:
            response.success, response.message = False, f"not armed: {error}"
        return response

    def on_disarm(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.controller.disarm()
        response.success, response.message = True, "disarmed"
        return response

    def on_stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.controller.stop(2, "stop service")
        response.success, response.message = True, "stopping; latched until armed again"
        return response

    # --------------------------------------------------------------------------------------------------- the loop
    def now(self) -> float:
        return self.get_clock().now().nanoseconds * 1e-9

    def tick(self) -> None:
        wall = time.perf_counter()
        elapsed = wall - self._last_wall
        self._last_wall = wall
        command, self._command = self._command, None
        stamp = self.get_clock().now()
        decision = self.controller.step(command, self._measured, stamp.nanoseconds * 1e-9)
        stamp_message = stamp.to_msg()
        for name, target in decision.sent.items():
            arm = self.robot.arm(name)
            message = JointState()
            message.header.stamp, message.header.frame_id = stamp_message, self.robot.base_frame
            position, velocity = target.position.tolist(), target.velocity.tolist()
            if arm.gripper:
                fingers = arm.gripper.positions(target.gripper)
                position += [fingers[j] for j in self._fingers[name]]
                velocity += [0.0] * len(fingers)
            message.name = [*arm.joints, *self._fingers[name]]
            message.position, message.velocity = position, velocity
            # Not left empty: rmw pads a message that ends in an empty float64[], and strict bag readers refuse that.
            message.effort = [0.0] * len(message.name)
            self.target_publishers[name].publish(message)
        self.status_publisher.publish(self._status(decision, stamp_message, elapsed))
        if not math.isnan(elapsed):
            self._jitter.append(abs(elapsed - self.period))
            self._overruns += elapsed > 2.0 * self.period
        self._cost.append(time.perf_counter() - wall)
        self._log(decision)

    def _status(self, decision: SafetyDecision, stamp, elapsed: float) -> SafetyStatus:
        status = SafetyStatus()
        status.header.stamp, status.header.frame_id = stamp, self.robot.base_frame
        status.state, status.reason = int(decision.state), decision.reason
        status.source, status.sequence = decision.source, decision.sequence
        status.command_age = decision.command_age
        status.period = self.period if math.isnan(elapsed) else elapsed
        status.refused = sum(self.controller.refusals.values())
        for arm in self.robot.arms:
            target = self.controller.target(arm.name)
            status.arms.append(
                ArmSafety(
                    arm=arm.name,
                    goal=_pose(decision.goal[arm.name]),
                    commanded=_pose(decision.commanded[arm.name]),
                    joints=target.position.tolist(),
                    velocity=target.velocity.tolist(),
                    gripper=target.gripper,
                    limited=list(decision.limited[arm.name]),
                )
            )
        return status

    def _log(self, decision: SafetyDecision) -> None:
        shown = (decision.state, decision.reason)
        if shown != self._shown_state:
            self._shown_state = shown
            text = decision.state.name.lower() + (f": {decision.reason}" if decision.reason else "")
            serious = decision.state in (State.STOPPED, State.FAULT)
            (self.get_logger().error if serious else self.get_logger().info)(text)
        if decision.refused and decision.refused != self._last_refusal:
            self._last_refusal = decision.refused
            self.get_logger().warning(f"refused a command: {decision.refused}", throttle_duration_sec=1.0)

    def publish_diagnostics(self) -> None:
        controller = self.controller
        stopped = controller.state in (State.STOPPED, State.FAULT)
        values = {
            "state": controller.state.name.lower(),
            "reason": controller.reason,
            "overruns": self._overruns,
            **{f"refused: {code}": count for code, count in sorted(controller.refusals.items())},
            **{f"limited: {name}": count for name, count in sorted(controller.limitations.items())},
        }
        if self._jitter:
            for name, samples in (("period jitter", self._jitter), ("step", self._cost)):
                median, tail = np.percentile(samples, [50, 99]) * 1e3
                values |= {f"{name} median ms": f"{median:.3f}", f"{name} p99 ms": f"{tail:.3f}"}
        status = DiagnosticStatus(
            level=DiagnosticStatus.ERROR if stopped else DiagnosticStatus.OK,
            name="safety_controller",
            hardware_id=self.robot.name,
            message=values["reason"] or values["state"],
            values=[KeyValue(key=k, value=str(v)) for k, v in values.items()],
        )
        array = DiagnosticArray(status=[status])
        array.header.stamp = self.get_clock().now().to_msg()
        self.diagnostics_publisher.publish(array)


def _arm_command(part: msg.ArmCommand) -> ArmCommand:
    if part.mode == msg.ArmCommand.JOINT:
        return ArmCommand(joints=np.array(part.joints), gripper=part.gripper)
    t, r = part.translation, part.rotation
    return ArmCommand(delta=np.array([t.x, t.y, t.z, r.x, r.y, r.z]), gripper=part.gripper)


def _pose(T: np.ndarray) -> Pose:
    x, y, z, qx, qy, qz, qw = matrix_to_pose(T).tolist()
    return Pose(position=Point(x=x, y=y, z=z), orientation=Quaternion(x=qx, y=qy, z=qz, w=qw))


def main() -> None:
    rclpy.init()
    node = None
    try:
        node = SafetyControllerNode()
        # What is alive now stays alive: collections then look at little and keep the control period.
        gc.collect()
        gc.freeze()
        rclpy.spin(node)
    except ValueError as error:
        if node is not None:
            raise
        sys.exit(f"safety_controller: {error}")  # a robot or a parameter that cannot be used
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
