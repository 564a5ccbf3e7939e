"""teleop: drives the arms from a keyboard or gamepad, arms the controller and runs the recorder by buttons.

Publishes Command (source "teleop") each control period while the operator holds on and for half a second after
letting go; then it is silent, the controller holds, and a policy may drive. A device that goes away stops the arm
and is opened again when it is back.
"""

from __future__ import annotations

import time

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Vector3
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile
from std_msgs.msg import Bool
from std_srvs.srv import Trigger
from vla_core.robot import load_robot
from vla_msgs.msg import ArmCommand, Command, SafetyStatus
from vla_msgs.srv import StartEpisode, StopEpisode
from vla_ros.run import run_node

from vla_teleop.devices import DeviceError, TeleopDevice, TeleopInput
from vla_teleop.gamepad import Gamepad
from vla_teleop.keyboard import Keyboard
from vla_teleop.teleoperation import ArmMotion, Motion, Teleoperation

_DEVICES = {"keyboard": Keyboard, "gamepad": Gamepad}
_RETRY = 1.0  # s between two tries to open the device


class TeleopNode(Node):
    """Node `teleop`: device in, /command and service calls out."""

    def __init__(self) -> None:
        super().__init__("teleop")
        self._robot = load_robot(self.declare_parameter("robot", "panda").value)
        kind = self.declare_parameter("device", "keyboard").value
        self._path = self.declare_parameter("path", "").value
        arm = self.declare_parameter("arm", "").value
        speed = float(self.declare_parameter("speed", 0.2).value)
        if kind not in _DEVICES:
            raise DeviceError(f"device: expected one of {sorted(_DEVICES)}, found {kind!r}")
        self._open = _DEVICES[kind]
        self._device: TeleopDevice | None = None
        self._error = ""
        self._retry_at = 0.0
        self.done = False

        self._teleoperation = Teleoperation(self._robot, arm, speed)
        self._sequence = 0
        self._status: SafetyStatus | None = None
        self._commands = self.create_publisher(Command, "/command", QoSProfile(depth=5))
        self._emergency_stop = self.create_publisher(Bool, "/emergency_stop", QoSProfile(depth=10))
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", QoSProfile(depth=10))
        self.create_subscription(SafetyStatus, "/safety_status", self._on_status, QoSProfile(depth=10))
        self._requests = {
            "arm": (self.create_client(Trigger, "/safety_controller/arm"), Trigger.Request()),
            "disarm": (self.create_client(Trigger, "/safety_controller/disarm"), Trigger.Request()),
            "stop": (self.create_client(Trigger, "/safety_controller/stop"), Trigger.Request()),
            "record_start": (self.create_client(StartEpisode, "/recorder/start"), StartEpisode.Request()),
            "record_discard": (self.create_client(Trigger, "/recorder/discard"), Trigger.Request()),
        }
        stop = self.create_client(StopEpisode, "/recorder/stop")
        for button, outcome in (("record_success", 1), ("record_failure", 2)):
            self._requests[button] = (stop, StopEpisode.Request(outcome=outcome))
        self._period = 1.0 / self._robot.rates.control
        self.create_timer(self._period, self._tick)
        self.create_timer(1.0, self._diagnose, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def finish(self) -> None:
        """Ask for hold and give the device back."""
        if self._device:
            self._publish(Motion(True, {}))
            self._device.close()

    # ---- motion

    def _on_status(self, status: SafetyStatus) -> None:
        self._status = status

    def _tick(self) -> None:
        taken = self._read()
        for button in taken.buttons:
            self._press(button)
        motion = self._teleoperation.motion(taken, self._period, time.monotonic())
        if motion:
            self._publish(motion)

    def _read(self) -> TeleopInput:
        """The device's input; nothing pressed while there is no device."""
        now = time.monotonic()
        try:
            if self._device is None:
                if now < self._retry_at:
                    return TeleopInput()
                self._device = self._open(self._path)
                self._error = ""
                self.get_logger().info(f"arm {self._teleoperation.arm}\n{self._device.help}")
            return self._device.read(now)
        except DeviceError as error:
            if str(error) != self._error:
                self.get_logger().error(str(error))
            self._error, self._retry_at = str(error), now + _RETRY
            if self._device:
                self._device.close()
                self._device = None
            return TeleopInput()

    def _publish(self, motion: Motion) -> None:
        self._sequence += 1
        command = Command(sequence=self._sequence, source="teleop", period=self._period, hold=motion.hold)
        command.header.stamp = self.get_clock().now().to_msg()
        command.header.frame_id = self._robot.base_frame
        command.arms = [_arm_command(name, part) for name, part in motion.arms.items()]
        self._commands.publish(command)

    # ---- buttons

    def _press(self, button: str) -> None:
        if button == "quit":
            self.done = True
            return
        if button == "stop":
            # Before the service, which may not be there; it also tells the operator what came of it.
            self._emergency_stop.publish(Bool(data=True))
        if button in self._requests:
            self._call(button, *self._requests[button])
        else:
            arms = self._status.arms if self._status else []
            self._teleoperation.press(button, {arm.arm: arm.gripper for arm in arms})
            if button != "gripper":
                told = self._teleoperation
                self.get_logger().info(f"arm {told.arm}, speed {told.speed:.0%}")

    def _call(self, button: str, client, request) -> None:
        if not client.service_is_ready():
            self.get_logger().error(f"{button}: no node offers {client.srv_name}")
            return

        def report(future) -> None:
            answer = future.result()
            log = self.get_logger()
            (log.info if answer.success else log.error)(f"{button}: {answer.message}")

        client.call_async(request).add_done_callback(report)

    # ---- watching

    def _diagnose(self) -> None:
        level = DiagnosticStatus.ERROR if self._error else DiagnosticStatus.OK
        status = DiagnosticStatus(name="teleop", hardware_id=self._robot.name, level=level)
        status.message = self._error or f"arm {self._teleoperation.arm}, speed {self._teleoperation.speed:.0%}"
        array = DiagnosticArray(status=[status])
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(array)


def _arm_command(name: str, motion: ArmMotion) -> ArmCommand:
    command = ArmCommand(arm=name, mode=ArmCommand.DELTA, gripper=motion.gripper)
    command.translation = Vector3(**dict(zip("xyz", motion.delta[:3].tolist())))
    command.rotation = Vector3(**dict(zip("xyz", motion.delta[3:].tolist())))
    return command


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT, SIGTERM or the quit key."""
    run_node(TeleopNode, args)


if __name__ == "__main__":
    main()
