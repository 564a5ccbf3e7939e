"""The drivers of a robot's arms as a node: joint targets in; joint states, wrenches and what halts an arm out.

It connects all arms as it starts and at the service ~/connect, which moves nothing. SIGINT and SIGTERM stop the arms
with category 2 before it ends. A robot whose description names no driver has one of its own: this node then says so and
ends. See `cell_driver` for what stops the arms.

/joint_states carries all arms at once, with the time of the oldest measurement in it; it ceases while one arm has none,
or none that is new. /driver_status comes every period, whatever the arms do.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import WrenchStamped
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger
from vla_core.robot import Arm, Robot, RobotError, load_robot
from vla_core.time import seconds
from vla_msgs.msg import ArmDriverStatus, DriverStatus, SafetyStatus
from vla_ros.messages import time_message
from vla_ros.run import run_node

from vla_control.cell_driver import CellDriver, CellReading, make_drivers
from vla_control.drivers import ArmState, ArmTarget, DriverError

#: Periods over which jitter is reported.
WINDOW = 1000


class DriverNode(Node):
    def __init__(self) -> None:
        super().__init__("driver_node")
        self.robot = load_robot(self.declare_parameter("robot", "panda").value)
        override = self.declare_parameter("driver", "").value
        watchdog = float(self.declare_parameter("watchdog", 0.1).value)
        try:
            drivers = make_drivers(self.robot, override, time.monotonic, self)
        except DriverError as error:
            raise RobotError(str(error)) from error
        self.done = not drivers
        self.cell: CellDriver | None = None
        if self.done:
            self.get_logger().warning(
                f"{self.robot.path}: no arm has a `driver` section, so another node has to bring /joint_states and to "
                "follow the joint targets; or start this one with driver:=fake or driver:=mujoco"
            )
            return
        for arm in self.robot.arms:
            own = drivers[arm.name].capabilities
            if arm.gripper and arm.gripper.force is not None and not own.gripper_newtons and not override:
                self.get_logger().warning(
                    f"arm {arm.name}: gripper.force: its driver knows no N; its own settings count"
                )
        self.cell = CellDriver(self.robot, drivers, watchdog)
        self._halted: Mapping[str, str] = {}
        self._before: dict[str, ArmState] = {}
        self._last_wall, self._stamp = math.nan, math.nan
        self._jitter: deque[float] = deque(maxlen=WINDOW)
        self._joint_states = self.create_publisher(JointState, "/joint_states", 10)
        self._driver_status = self.create_publisher(DriverStatus, "/driver_status", 10)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._wrenches = {
            name: self.create_publisher(WrenchStamped, f"/{name}/wrench", 10)
            for name, driver in drivers.items()
            if driver.capabilities.wrench
        }
        for arm in self.robot.arms:
            self.create_subscription(
                JointState, f"/{arm.name}/joint_targets", lambda message, own=arm: self.on_target(own, message), 1
            )
        self.create_subscription(SafetyStatus, "/safety_status", self.on_safety_status, 1)
        self.create_service(Trigger, "~/connect", self.on_connect, callback_group=ReentrantCallbackGroup())
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(self.cell.period, self.tick, clock=steady)
        self.create_timer(1.0, self.publish_diagnostics, clock=steady)
        self.cell.begin_connect()

    # --------------------------------------------------------------------------------------------------- inputs
    def on_target(self, arm: Arm, message: JointState) -> None:
        try:
            target = read_target(arm, message)
        except ValueError as error:
            self.cell.stop(2, f"stopped: {error}")
            return
        self.cell.target(arm.name, target, seconds(message.header.stamp))

    def on_safety_status(self, message: SafetyStatus) -> None:
        self.cell.status(message.state, message.stop_category, seconds(message.header.stamp))

    def on_connect(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        error = self.cell.connect()
        response.success, response.message = not error, error or "every arm is connected and holds where it is"
        return response

    # --------------------------------------------------------------------------------------------------- a period
    def tick(self) -> None:
        wall = time.perf_counter()
        if not math.isnan(self._last_wall):
            self._jitter.append(abs(wall - self._last_wall - self.cell.period))
        self._last_wall = wall
        reading = self.cell.tick()
        # The drivers' clock never jumps; stamps are of the ROS clock.
        now = self.get_clock().now().nanoseconds * 1e-9
        offset = now - self.cell.clock()
        if not math.isnan(reading.stamp) and reading.stamp != self._stamp:
            self._stamp = reading.stamp
            message = joint_states(self.robot, reading, self._before)
            message.header.stamp = time_message(reading.stamp + offset)
            self._joint_states.publish(message)
        for name, publisher in self._wrenches.items():
            state = reading.states.get(name)
            if state is not None and state.wrench is not None and state is not self._before.get(name):
                message = wrench(self.robot.arm(name), state)
                message.header.stamp = time_message(state.stamp + offset)
                publisher.publish(message)
        self._before = dict(reading.states)
        status = DriverStatus(arms=[ArmDriverStatus(arm=name, halted=why) for name, why in reading.halted.items()])
        status.header.stamp = time_message(now)
        self._driver_status.publish(status)
        self._log(reading.halted)

    def finish(self) -> None:
        """Stop the arms and let go of their devices, for the end of the node."""
        if self.cell is not None:
            self.cell.close()

    def _log(self, halted: Mapping[str, str]) -> None:
        for name, why in halted.items():
            if why != self._halted.get(name):
                # Two calls: rclpy's logger refuses another severity from the same line.
                if why:
                    self.get_logger().warning(f"{name}: {why}")
                else:
                    self.get_logger().info(f"{name}: ready to follow")
        self._halted = halted

    def publish_diagnostics(self) -> None:
        halted = {name: why for name, why in self._halted.items() if why}
        values = {
            "following": self.cell.following,
            **{f"errors: {arm.name}": self.cell.errors[arm.name] for arm in self.robot.arms},
            **{f"halted: {name}": why for name, why in halted.items()},
        }
        if self._jitter:
            median, tail = np.percentile(self._jitter, [50, 99]) * 1e3
            values |= {"period jitter median ms": f"{median:.3f}", "period jitter p99 ms": f"{tail:.3f}"}
        status = DiagnosticStatus(
            level=DiagnosticStatus.ERROR if halted else DiagnosticStatus.OK,
            name="driver_node",
            hardware_id=self.robot.name,
            message="; ".join(halted.values()) or "every arm follows",
            values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
        )
        array = DiagnosticArray(status=[status])
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(array)


def read_target(arm: Arm, message: JointState) -> ArmTarget:
    """The target of a message with the arm's joints and fingers by name. Raises ValueError for one that lacks them."""
    position, velocity = dict(zip(message.name, message.position)), dict(zip(message.name, message.velocity))
    fingers = [joint.name for joint in arm.gripper.joints] if arm.gripper else []
    if missing := [name for name in (*arm.joints, *fingers) if name not in position]:
        raise ValueError(f"/{arm.name}/joint_targets: expected a position of {missing[0]!r}, found {message.name}")
    opening = float(np.clip(arm.gripper.opening(position), 0.0, 1.0)) if arm.gripper else None
    return ArmTarget(
        np.array([position[joint] for joint in arm.joints]),
        np.array([velocity.get(joint, 0.0) for joint in arm.joints]),
        opening,
    )


def joint_states(robot: Robot, reading: CellReading, before: Mapping[str, ArmState]) -> JointState:
    """All arms' joints and fingers, without a stamp. before: the states of the period before, for the fingers' speed.

    effort is 0 where the driver has none, and for fingers.
    """
    names: list[str] = []
    values = np.zeros((3, 0))  # rows: position, velocity, effort
    for arm in robot.arms:
        state = reading.states[arm.name]
        names += arm.joints
        effort = np.zeros(len(arm.joints)) if state.effort is None else state.effort
        values = np.hstack([values, [state.position, state.velocity, effort]])
        if arm.gripper and state.gripper is not None:
            names += [joint.name for joint in arm.gripper.joints]
            reach = np.array([joint.open - joint.closed for joint in arm.gripper.joints])
            position = [*arm.gripper.positions(state.gripper).values()]
            values = np.hstack([values, [position, _opening_speed(before.get(arm.name), state) * reach, 0.0 * reach]])
    message = JointState(name=names)
    message.header.frame_id = robot.base_frame
    message.position, message.velocity, message.effort = values.tolist()
    return message


def _opening_speed(before: ArmState | None, now: ArmState) -> float:
    """Change of a gripper's opening, 1/s."""
    if before is None or before.gripper is None or not now.stamp > before.stamp:
        return 0.0
    return (now.gripper - before.gripper) / (now.stamp - before.stamp)


def wrench(arm: Arm, state: ArmState) -> WrenchStamped:
    """What presses on an arm's tool, in its frame, without a stamp."""
    message = WrenchStamped()
    message.header.frame_id = arm.tool.frame
    force, torque = message.wrench.force, message.wrench.torque
    force.x, force.y, force.z, torque.x, torque.y, torque.z = map(float, state.wrench)
    return message


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM; then stop the arms, and end with exit status 0."""
    run_node(DriverNode, args)


if __name__ == "__main__":
    main()
