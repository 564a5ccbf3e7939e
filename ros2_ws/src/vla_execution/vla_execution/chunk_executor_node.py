"""The chunk executor node: action chunks in, one command per control period and chunk requests out.

All decisions are made by `vla_execution.executor.Executor`; this file turns messages into calls. Single-threaded.
"""

from __future__ import annotations

from dataclasses import fields

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_srvs.srv import Trigger
from vla_core.robot import load_robot
from vla_msgs.msg import ActionChunk, ChunkRequest, Command, PolicyStatus, SafetyStatus
from vla_ros.run import run_node

from vla_execution.chunk import ChunkRefused
from vla_execution.executor import Executor, ExecutorCommand
from vla_execution.messages import read_chunk, read_status, write_command, write_request
from vla_execution.strategies import ExecutionConfig

#: Least time between two diagnostics messages, s.
DIAGNOSTICS_PAUSE = 0.1


class ChunkExecutorNode(Node):
    """Parameters: `robot`, `strategy`, `source` (name in the commands), and the fields of ExecutionConfig."""

    def __init__(self, **options) -> None:
        super().__init__("chunk_executor", **options)
        robot = load_robot(self.declare_parameter("robot", "panda").value)
        strategy = self.declare_parameter("strategy", "naive").value
        source = self.declare_parameter("source", "executor").value
        config = {f.name: self.declare_parameter(f.name, f.default).value for f in fields(ExecutionConfig)}
        self.executor_core = Executor(robot, strategy, ExecutionConfig(**config), source)
        self._status = None
        self._reported = ""
        self._reported_at = 0.0

        self._commands = self.create_publisher(Command, "/command", 5)
        self._requests = self.create_publisher(ChunkRequest, "/chunk_request", 5)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.create_subscription(PolicyStatus, "/policy_status", self.on_policy_status, latched)
        self.create_subscription(SafetyStatus, "/safety_status", self.on_safety_status, 10)
        self.create_subscription(ActionChunk, "/action_chunk", self.on_chunk, 5)
        self.create_service(Trigger, "~/reset", self.on_reset)
        self.create_timer(1.0 / robot.rates.control, self.on_tick)
        self.create_timer(1.0, self.publish_diagnostics)

    def now(self) -> float:
        """The node's clock, s."""
        return self.get_clock().now().nanoseconds * 1e-9

    def on_policy_status(self, message: PolicyStatus) -> None:
        self.executor_core.on_policy(message.active, message.period, message.horizon, tuple(message.guidance))

    def on_safety_status(self, message: SafetyStatus) -> None:
        self._status = read_status(message)

    def on_chunk(self, message: ActionChunk) -> None:
        core, now = self.executor_core, self.now()
        try:
            chunk = None if message.error else read_chunk(message, core.robot)
        except ChunkRefused as refusal:
            core.refuse(str(refusal), now, message.request_id)
        else:
            core.on_chunk(chunk, now, message.warm_up, message.error)
            self._send(core.tick_early(now, self._status), now)

    def on_tick(self) -> None:
        now = self.now()
        self._send(self.executor_core.tick(now, self._status), now)

    def _send(self, command: ExecutorCommand | None, now: float) -> None:
        """Send a command and what else it is time for."""
        core = self.executor_core
        if command is not None:
            self._commands.publish(write_command(command, core.robot, core.source))
        request = core.poll_request(now)
        if request is not None:
            self._requests.publish(write_request(request, core.robot))
        if core.reason != self._reported and not 0 <= now - self._reported_at < DIAGNOSTICS_PAUSE:
            if core.reason:
                self.get_logger().warning(core.reason, throttle_duration_sec=1.0)
            self.publish_diagnostics()

    def on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.executor_core.reset(self.now())
        response.success, response.message = True, "all plans are dropped"
        return response

    def publish_diagnostics(self) -> None:
        core = self.executor_core
        self._reported, self._reported_at = core.reason, self.now()
        status = DiagnosticStatus(name="chunk_executor", hardware_id=core.robot.name)
        status.level = DiagnosticStatus.WARN if core.reason else DiagnosticStatus.OK
        status.message = core.reason or ("executing" if core.executing else "waiting for a chunk")
        values = {"strategy": core.name, **core.metrics.summary()}
        values["delay_expected_ms"] = (core.delays.seconds or 0.0) * 1e3
        status.values = [
            KeyValue(key=k, value=f"{v:.3f}" if isinstance(v, float) else str(v)) for k, v in values.items()
        ]
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM."""
    run_node(ChunkExecutorNode, args)


if __name__ == "__main__":
    main()
