"""The safety controller as a node: commands and joint states in, limited joint targets and the safety status out.

Nothing is sent to the arms until the service ~/arm (or the parameter auto_arm, for simulation) is used; ~/arm and
~/disarm answer when the arms are at rest. The loop runs at the robot's control rate: on a real robot by a steady timer,
in simulation by /clock. SIGINT and SIGTERM brake the arms before the node ends. One thread.
"""

from __future__ import annotations

import math
import time
from collections import deque

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool
from std_srvs.srv import Trigger
from vla_core.robot import load_robot
from vla_core.time import seconds
from vla_msgs import msg
from vla_msgs.msg import SafetyStatus
from vla_ros.run import run_node

from vla_control import messages
from vla_control.command import Command, CommandRefused
from vla_control.safety import Measured, SafetyController, SafetyDecision, SafetyLimits, State

#: Control periods over which jitter is reported.
WINDOW = 1000
#: Commands kept between two control periods, and the longest time to brake when the node ends, s.
QUEUE, PARKING = 10, 2.0


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
        self._commands: deque[Command] = deque(maxlen=QUEUE)
        self._measured: Measured | None = None
        self._last_wall = math.nan
        self._jitter: deque[float] = deque(maxlen=WINDOW)
        self._cost: deque[float] = deque(maxlen=WINDOW)
        self._overruns = 0
        self._last_refusal = ""
        self._shown_state: tuple | None = None
        self._status = messages.status_message(self.robot)
        self._targets = {arm.name: messages.target_message(arm, self.robot.base_frame) for arm in self.robot.arms}

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
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        sim = self.get_parameter("use_sim_time").value
        self.create_timer(self.period, self.tick, clock=None if sim else steady)
        self.create_timer(1.0, self.publish_diagnostics, clock=steady)

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
            try:
                self.controller.arm(measured)
                self.auto_arm = False
            except CommandRefused as error:
                self.get_logger().error(f"not armed: {error}", throttle_duration_sec=5.0)

    def on_command(self, message: msg.Command) -> None:
        self._commands.append(messages.read_command(message))

    def on_emergency_stop(self, message: Bool) -> None:
        if message.data:
            self.controller.stop(2, "emergency stop")

    # ------------------------------------------------------------------------------------------------- services
    def on_arm(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        age = math.inf if self._measured is None else self.now() - self._measured.stamp
        if not abs(age) <= self.limits.joint_state_timeout:
            response.message = f"not armed: joint states are {age:.2f} s old"
            return response
        try:
            self.controller.arm(self._measured)
            self._commands.clear()
            response.success, response.message = True, "armed, holding"
        except CommandRefused as error:
            response.message = f"not armed: {error}"
        return response

    def on_disarm(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.controller.disarm()
        moving = self.controller.state == State.STOPPING
        response.success, response.message = True, "braking, then disarmed" if moving else "disarmed"
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
        stamp = self.get_clock().now()
        now = stamp.nanoseconds * 1e-9
        newest = self._commands.pop() if self._commands else None
        while self._commands:
            self.controller.offer(self._commands.popleft(), now)
        decision = self.controller.step(newest, self._measured, now)
        self.publish(decision, stamp.to_msg(), elapsed)
        if not math.isnan(elapsed):
            self._jitter.append(abs(elapsed - self.period))
            self._overruns += elapsed > 2.0 * self.period
        self._cost.append(time.perf_counter() - wall)
        self._log(decision)

    def publish(self, decision: SafetyDecision, stamp, elapsed: float) -> None:
        """Send the targets, then the status. Messages are made once and filled in anew each period."""
        for name, target in decision.sent.items():
            message = messages.fill_target(self._targets[name], self.robot.arm(name), target, stamp)
            self.target_publishers[name].publish(message)
        targets = {arm.name: self.controller.target(arm.name) for arm in self.robot.arms}
        period = self.period if math.isnan(elapsed) else elapsed
        refused = self.controller.refusals.total()
        self.status_publisher.publish(messages.fill_status(self._status, decision, targets, stamp, period, refused))

    def finish(self) -> None:
        """Brake and disarm, for the end of the node."""
        self.controller.disarm()
        self._commands.clear()
        deadline = time.monotonic() + PARKING
        while self.controller.state == State.STOPPING and time.monotonic() < deadline:
            self.tick()
            time.sleep(self.period)
        self.tick()

    def _log(self, decision: SafetyDecision) -> None:
        shown = (decision.state, decision.reason)
        if shown != self._shown_state:
            self._shown_state = shown
            text = decision.state.name.lower() + (f": {decision.reason}" if decision.reason else "")
            # Two calls: rclpy's logger refuses another severity from the same line.
            if decision.state in (State.STOPPED, State.FAULT):
                self.get_logger().error(text)
            else:
                self.get_logger().info(text)
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
            **{f"stopped: {code}": count for code, count in sorted(controller.stops.items())},
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


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM; then brake, and end with exit status 0."""
    run_node(SafetyControllerNode, args)


if __name__ == "__main__":
    main()
