"""The safety controller as a node: commands and joint states in, limited joint targets and the safety status out.

Nothing is sent to the arms until the service ~/arm (or the parameter auto_arm, for simulation) is used. The controller
runs at the robot's control rate: on a real robot in a thread of its own (see `loop`), in simulation by /clock.
Callbacks only bring inputs and ask (see `shared`); events and words to the log go out in their thread, so that no disk,
terminal or listener holds up a period. SIGINT and SIGTERM brake the arms before the node ends.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import WrenchStamped
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool
from std_srvs.srv import Trigger
from vla_core.robot import Arm, load_robot
from vla_core.time import seconds
from vla_msgs import msg
from vla_msgs.msg import DriverStatus, SafetyEvent, SafetyStatus
from vla_ros.run import PATIENCE, run_node

from vla_control import messages
from vla_control.command import CommandRefused
from vla_control.loop import ControlLoop, take_realtime
from vla_control.safety import Event, SafetyController, SafetyLimits, State
from vla_control.shared import Period, SharedController
from vla_control.stops import Stops

#: Whether the arms' drivers are watched: auto is always for a robot whose description names drivers, unless simulated.
WATCH = ("auto", "always", "never")
#: The longest time to brake when the node ends, s.
PARKING = 2.0
#: Events and errors that wait for being told, at most; a second of both arms at every limit is far less.
WAITING = 1000


class SafetyControllerNode(Node):
    def __init__(self) -> None:
        super().__init__("safety_controller")
        self.robot = load_robot(self.declare_parameter("robot", "panda").value)
        defaults = SafetyLimits()
        limits = SafetyLimits(
            **{name: float(self.declare_parameter(name, value).value) for name, value in vars(defaults).items()}
        )
        self.auto_arm = self.declare_parameter("auto_arm", False).value
        stops = Stops(
            self.declare_parameter("stop_category", 2).value,
            self.declare_parameter("enabling_device", False).value,
            self.declare_parameter("enable_timeout", 0.2).value,
        )
        self.simulated = self.get_parameter("use_sim_time").value
        watch = self.declare_parameter("watch_drivers", "auto").value
        if watch not in WATCH:
            raise ValueError(f"watch_drivers: expected one of {WATCH}, found {watch!r}")
        driven = any(arm.driver for arm in self.robot.arms) and not self.simulated  # a simulator is no driver_node
        watch_drivers = driven if watch == "auto" else watch == "always"
        realtime = self.declare_parameter("realtime", False).value
        priority = self.declare_parameter("priority", 50).value
        self.shared = SharedController(SafetyController(self.robot, limits), stops, watch_drivers)
        self.period = self.shared.period
        self._shown: tuple | None = None
        self._refusal = ""
        self._waiting: deque[tuple[Event, Time] | tuple[str, str]] = deque(maxlen=WAITING)
        self._untold = 0
        self._status = messages.status_message(self.robot)
        self._targets = {arm.name: messages.target_message(arm, self.robot.base_frame) for arm in self.robot.arms}

        self.target_publishers = {
            arm.name: self.create_publisher(JointState, f"/{arm.name}/joint_targets", 5) for arm in self.robot.arms
        }
        self.status_publisher = self.create_publisher(SafetyStatus, "/safety_status", 10)
        self.event_publisher = self.create_publisher(SafetyEvent, "/safety_events", 100)
        self.diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_subscription(JointState, "/joint_states", self.on_joint_states, 10)
        self.create_subscription(msg.Command, "/command", self.on_command, 5)
        self.create_subscription(Bool, "/emergency_stop", self.on_emergency_stop, 10)
        if stops.enabling_device:
            self.create_subscription(Bool, "/enable", self.on_enable, 10)
        if watch_drivers:
            self.create_subscription(DriverStatus, "/driver_status", self.on_driver_status, 10)
        touchy = [a for a in self.robot.arms if a.contact and min(a.contact.force, a.contact.torque) < math.inf]
        self._feeling = {arm.name for arm in touchy}
        for arm in touchy:  # a QoS that hears either reliability
            self.create_subscription(
                WrenchStamped, f"/{arm.name}/wrench", self._wrench_callback(arm), qos_profile_sensor_data
            )
        self.create_service(Trigger, "~/arm", self.on_arm)
        self.create_service(Trigger, "~/disarm", self.on_disarm)
        self.create_service(Trigger, "~/stop", self.on_stop)
        self._told = self.create_guard_condition(self.tell)
        # A robot's control loop follows the steady clock: setting the system time must not stretch a period.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0, self.publish_diagnostics, clock=steady)
        if realtime:
            take_realtime(priority)
        self.loop = ControlLoop(self.period, self.work, self.failed, priority if realtime else None)
        if self.simulated:
            self.create_timer(self.period, self.loop.once)

    # ------------------------------------------------------------------------------------------------ start and end
    def run(self, executor, ended: Callable[[], bool]) -> None:
        """Run the loop, and the callbacks in this thread, until `ended()`; for run_node."""
        if not self.simulated:
            self.loop.start()
        while not ended():
            executor.spin_once(timeout_sec=PATIENCE)

    @property
    def done(self) -> bool:
        """Whether the loop's thread has ended by itself, as it never should."""
        return self.loop.started and not self.loop.running

    def finish(self) -> None:
        """Brake and disarm, for the end of the node."""
        self.shared.disarm()
        deadline = time.monotonic() + PARKING
        while self.shared.state == State.STOPPING and time.monotonic() < deadline:
            if not self.loop.running:
                self.loop.once()
            time.sleep(self.period)
        self.loop.stop()
        self.loop.once()  # so that the status tells the end of it
        self.tell()

    # --------------------------------------------------------------------------------------------------------- inputs
    def on_joint_states(self, message: JointState) -> None:
        try:
            self.shared.joints(messages.read_joint_states(message, self.robot))
        except ValueError as error:
            self.get_logger().error(str(error), throttle_duration_sec=5.0)
            return
        if self.auto_arm:
            try:
                self.shared.arm(self.now(), time.monotonic())
                self.auto_arm = False
            except CommandRefused as error:
                self.get_logger().error(f"not armed: {error}", throttle_duration_sec=5.0)

    def on_command(self, message: msg.Command) -> None:
        self.shared.command(messages.read_command(message))

    def on_emergency_stop(self, message: Bool) -> None:
        if message.data:
            self.shared.stop(self.shared.stops.topic())

    def on_enable(self, message: Bool) -> None:
        self.shared.enable(message.data, time.monotonic())

    def on_driver_status(self, message: DriverStatus) -> None:
        self.shared.drivers(messages.read_drivers(message), seconds(message.header.stamp))

    def _wrench_callback(self, arm: Arm) -> Callable[[WrenchStamped], None]:
        def take(message: WrenchStamped) -> None:
            try:
                wrench = messages.read_wrench(message, arm)
            except ValueError as error:
                self.get_logger().error(str(error), throttle_duration_sec=5.0)
                return
            self.shared.wrench(arm.name, wrench, seconds(message.header.stamp))

        return take

    # ------------------------------------------------------------------------------------------------------- services
    def on_arm(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            self.shared.arm(self.now(), time.monotonic())
            response.success, response.message = True, "armed"
            if unheard := sorted(self._feeling - self.shared.felt):
                response.message += f"; nothing was heard of the wrench of {', '.join(unheard)}: contacts are not felt"
                self.get_logger().warning(response.message)
        except CommandRefused as error:
            response.message = f"not armed: {error}"
        return response

    def on_disarm(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        state = self.shared.disarm()
        response.success = state in (State.DISARMED, State.STOPPING)
        response.message = "braking, then disarmed" if state == State.STOPPING else state.name.lower()
        return response

    def on_stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        state = self.shared.stop(self.shared.stops.service())
        response.success = True
        response.message = f"{state.name.lower()}; latched until armed again"
        return response

    # ------------------------------------------------------------------------------------------- a period, in the loop
    def now(self) -> float:
        """s of the ROS clock."""
        return self.get_clock().now().nanoseconds * 1e-9

    def work(self, elapsed: float) -> bool:
        """Decide a period and send what it came to; whether the arms are at rest. elapsed: since the last one, s."""
        stamp = self.get_clock().now()
        period = self.shared.step(stamp.nanoseconds * 1e-9, time.monotonic())
        self.publish(period, stamp.to_msg(), elapsed)
        return period.resting

    def failed(self, error: Exception) -> None:
        """Stop the arms for an exception in a period."""
        self._wait(("error", self.shared.fail(error)))

    def publish(self, period: Period, stamp: Time, elapsed: float) -> None:
        """Send the targets, then the status. Messages are made once and filled in anew each period."""
        decision = period.decision
        for name, target in decision.sent.items():
            message = messages.fill_target(self._targets[name], self.robot.arm(name), target, stamp)
            self.target_publishers[name].publish(message)
        lasted = self.period if math.isnan(elapsed) else elapsed
        self.status_publisher.publish(
            messages.fill_status(self._status, decision, period.targets, stamp, lasted, period.refused)
        )
        if period.error:
            self._wait(("error", period.error))
        for event in decision.events:
            self._wait((event, stamp))
        shown = (decision.state, decision.reason)
        if shown != self._shown:
            self._shown = shown
            text = decision.state.name.lower() + (f": {decision.reason}" if decision.reason else "")
            self._wait(("error" if decision.state in (State.STOPPED, State.FAULT) else "info", text))
        if decision.refused and decision.refused != self._refusal:
            self._refusal = decision.refused
            self._wait(("warning", f"refused a command: {decision.refused}"))

    def _wait(self, what: tuple) -> None:
        self._untold += len(self._waiting) == WAITING  # the oldest makes way
        self._waiting.append(what)
        self._told.trigger()

    # ---------------------------------------------------------------------------------------------------- what is told
    def tell(self) -> None:
        """Publish and log what has come up in the loop."""
        while self._waiting:
            what, detail = self._waiting.popleft()
            log = self.get_logger()
            if isinstance(what, Event):
                self.event_publisher.publish(messages.write_event(what, self.robot, detail))
            # One call each: rclpy's logger refuses another severity from the same line.
            elif what == "error":
                log.error(detail)
            elif what == "warning":
                log.warning(detail, throttle_duration_sec=1.0)
            else:
                log.info(detail)

    def publish_diagnostics(self) -> None:
        counts, timing = self.shared.counts(), self.loop.timing()
        values = {
            "state": counts.state.name.lower(),
            "reason": counts.reason,
            "periods": timing.periods,
            "overruns": timing.overruns,
            "overruns by its own work": timing.exhausted,
            "garbage collections": timing.collected,
            "garbage collection max ms": f"{timing.collecting * 1e3:.3f}",
            "events lost": self._untold,
            **{f"refused: {code}": count for code, count in sorted(counts.refused.items())},
            **{f"stopped: {code}": count for code, count in sorted(counts.stopped.items())},
            **{f"limited: {name}": count for name, count in sorted(counts.limited.items())},
        }
        times = {"lateness": timing.late, "period jitter": timing.jitter, "step": timing.wall, "step CPU": timing.cpu}
        for name, samples in times.items():
            if len(samples):
                median, tail = np.percentile(samples, [50, 99]) * 1e3
                values |= {f"{name} median ms": f"{median:.3f}", f"{name} p99 ms": f"{tail:.3f}"}
        stopped = counts.state in (State.STOPPED, State.FAULT)
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
