"""A running graph for the system tests: launch/sim.launch.yaml with real nodes, and a node that listens to it."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import Image
from std_srvs.srv import Trigger
from vla_bringup.launch_file import Launch, Process, load
from vla_core.time import seconds
from vla_msgs.msg import ActionChunk, EpisodeEvent, PolicyStatus, SafetyStatus
from vla_msgs.srv import ResetWorld

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
#: A deadline, not an expectation: machines that run tests are busy, s of wall time.
PATIENCE = float(os.environ.get("VLA_TEST_PATIENCE", "90"))
_domains = itertools.count(os.getpid() * 7)


def own_domain() -> int:
    """A ROS domain for one graph, other than those of the graphs before."""
    return 60 + next(_domains) % 40


class Listener:
    """Hears what a graph says, in a thread of its own; a context manager.

    Attributes:
        safety: every SafetyStatus since `forget`. chunks, events: likewise.
        policy: newest PolicyStatus. diagnostics: node -> newest status. warnings: (node, message) of every status
            that was not well since `forget`.
    """

    def __init__(self, domain: int):
        self.domain = domain
        self.policy = PolicyStatus()
        self.diagnostics: dict[str, DiagnosticStatus] = {}
        self.forget()

    def forget(self) -> None:
        """Forget what was heard so far."""
        self.safety: list[SafetyStatus] = []
        self.chunks: list[ActionChunk] = []
        self.events: list[EpisodeEvent] = []
        self.warnings: list[tuple[str, str]] = []

    def __enter__(self) -> Listener:
        self._context = rclpy.Context()
        rclpy.init(args=[], context=self._context, domain_id=self.domain)
        self.node = n = Node("listener", context=self._context)
        self._clients: dict[str, rclpy.client.Client] = {}
        n.create_subscription(SafetyStatus, "/safety_status", lambda m: self.safety.append(m), 1000)
        n.create_subscription(ActionChunk, "/action_chunk", lambda m: self.chunks.append(m), 50)
        n.create_subscription(EpisodeEvent, "/episode_events", lambda m: self.events.append(m), 50)
        n.create_subscription(PolicyStatus, "/policy_status", lambda m: setattr(self, "policy", m), LATCHED)
        n.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 100)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(n)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        rclpy.shutdown(context=self._context)
        self._thread.join()

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            pass

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.diagnostics[status.name] = status
            if status.level != DiagnosticStatus.OK:
                details = "; ".join(f"{v.key}: {v.value}" for v in status.values)
                self.warnings.append((status.name, f"{status.message}; {details}"))

    def until(self, condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
        """Wait for a condition. Raises AssertionError that says `what` did not happen, and what the graph is doing."""
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline, f"not within {patience:.0f} s: {what}\n{self.situation()}"
            time.sleep(0.02)

    def situation(self) -> str:
        """The newest words of the graph, for messages."""
        state = f"{self.state} ({self.safety[-1].reason})" if self.safety else "not heard"
        return (
            f"safety controller: {state}; policy: {self.policy.active or 'none'} {self.policy.error}; "
            f"chunks: {len(self.chunks)}; warnings: {list(dict.fromkeys(self.warnings))[-5:]}"
        )

    def call(self, kind: type, name: str, request=None):
        """Call a service and return its answer."""
        client = self._client(kind, name)
        future = client.call_async(request or kind.Request())
        self.until(future.done, f"answer of {name}")
        return future.result()

    def trigger(self, name: str) -> Trigger.Response:
        """Call a Trigger that may be called twice, and return its answer.

        It is called again while no answer comes: for seconds after a kill -9 the service seems ready although the
        node in the place of the dead one cannot be reached yet, and the request is lost.
        """
        client, futures = self._client(Trigger, name), []

        def answered() -> bool:
            if not futures or time.monotonic() > futures[-1][0] + 5.0:
                futures.append((time.monotonic(), client.call_async(Trigger.Request())))
            return any(future.done() for _, future in futures)

        self.until(answered, f"answer of {name}")
        return next(future.result() for _, future in futures if future.done())

    def _client(self, kind: type, name: str):
        """The client of a service that is there."""
        if name not in self._clients:
            self._clients[name] = self.node.create_client(kind, name)
        self.until(self._clients[name].service_is_ready, f"service {name}")
        return self._clients[name]

    # ------------------------------------------------------------------------------------------------- the arm
    @property
    def state(self) -> int:
        """Newest SafetyStatus.state."""
        return self.safety[-1].state if self.safety else -1

    @property
    def now(self) -> float:
        """Stamp of the newest SafetyStatus, s of the graph's clock."""
        return seconds(self.safety[-1].header.stamp)

    def tool(self, status: SafetyStatus | None = None) -> np.ndarray:
        """Commanded position (3,) of the only arm's tool, m."""
        p = (status or self.safety[-1]).arms[0].commanded.position
        return np.array([p.x, p.y, p.z])

    def moved(self, distance: float = 0.01) -> None:
        """Wait until the tool has moved by `distance` (m) from where it is now."""
        self.until(lambda: self.safety, "a safety status")
        start = self.tool()
        self.until(lambda: np.linalg.norm(self.tool() - start) > distance, f"the arm moves by {distance} m")

    def passed(self, duration: float) -> None:
        """Wait until `duration` (s) has passed on the graph's clock."""
        self.until(lambda: self.safety, "a safety status")
        start = self.now
        self.until(lambda: self.now > start + duration, f"{duration} s of the graph's time pass")

    def holds(self) -> None:
        """Wait until the controller holds, and check that the arm then stands still."""
        self.until(lambda: self.state == SafetyStatus.HOLDING, "the arm holds")
        before = self.tool()
        self.passed(0.3)
        assert self.state == SafetyStatus.HOLDING, self.situation()
        np.testing.assert_array_equal(self.tool(), before)


class Relay:
    """Stands between the simulator and the graph as the lead of one camera. `mode`: pass, cut or frozen."""

    def __init__(self, node: Node, source: str, target: str):
        self.mode = "pass"
        self._picture = b""
        self._publisher = node.create_publisher(Image, target, 5)
        node.create_subscription(Image, source, self._on_image, 5, raw=True)

    def _on_image(self, data: bytes) -> None:
        if self.mode == "cut":
            return
        if self.mode == "frozen" and len(self._picture) == len(data):
            # The header's stamp follows the 4 bytes of the encapsulation: only time goes on.
            data = data[:12] + self._picture[12:]
        self._picture = data
        self._publisher.publish(data)


class Graph(Listener):
    """The nodes of sim.launch.yaml under a policy, and their listener.

    Args:
        policy: policy description (YAML).
        arguments: further launch arguments.

    Attributes:
        lines: (process, line) of everything that the nodes printed.
        wrist: the relay that the wrist camera's images pass.
    """

    def __init__(self, policy: Path, **arguments: str):
        super().__init__(own_domain())
        self.lines: list[tuple[str, str]] = []
        self._arguments = {"policy": str(policy), "runtime": "torch", **arguments}
        self._launch = self._make(self._arguments)
        self.process("mujoco_node").command += ["-r", "/camera/wrist/image_raw:=/wrist_lead"]
        self._commands = {p.name: p.command for p in self._launch.processes}

    def __enter__(self) -> Graph:
        super().__enter__()
        self.wrist = Relay(self.node, "/wrist_lead", "/camera/wrist/image_raw")
        self._launch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._launch.stop()
        super().__exit__()

    def _make(self, arguments: dict[str, str], *names: str) -> Launch:
        """A launch of sim.launch.yaml, or of some of its processes, in this graph's domain."""
        processes = load(LAUNCH / "sim.launch.yaml", arguments)
        for process in processes:
            process.environment |= {"ROS_DOMAIN_ID": str(self.domain)}
        chosen = [p for p in processes if p.name in names or not names]
        return Launch(chosen, lambda name, line: self.lines.append((name, line)))

    @contextmanager
    def recorder(self, folder: Path) -> Iterator[None]:
        """Run the recorder beside the graph; bags go to `folder`."""
        with self._make(self._arguments | {"record": "true", "bags": str(folder)}, "recorder") as launch:
            # A server that was just started may not know its client yet; its answer is then lost without a word
            # (ros2/rmw_fastrtps#842).
            time.sleep(1.0)
            yield
        assert launch.processes[0].popen.returncode == 0

    def process(self, name: str) -> Process:
        """A process by its name."""
        return next(p for p in self._launch.processes if p.name == name)

    def stop(self, name: str, number: int = signal.SIGINT) -> int:
        """End one process and return its exit status."""
        process = self.process(name).popen
        process.send_signal(number)
        return process.wait(PATIENCE)

    def start(self, name: str, **parameters: object) -> None:
        """Start a process that has ended again; parameters given here count for this time only."""
        process = self.process(name)
        process.command = [*self._commands[name], *(w for k, v in parameters.items() for w in ("-p", f"{k}:={v}"))]
        if name == "policy_node":
            self.policy = PolicyStatus()  # that of the process before says nothing any more
        self._launch.start(process)

    def recovers(self, name: str) -> None:
        """Wait until the arm moves again by itself, after process `name` was killed and started again.

        Fast DDS may go on writing into the shared memory of the process that was killed, and the one in its place
        hears nothing (eProsima/Fast-DDS#4728). It is started once more then, as a user would.
        """
        for _ in range(2):
            try:
                return self.until(lambda: self.state == SafetyStatus.RUNNING, "the arm moves again", PATIENCE / 2)
            except AssertionError:
                assert self.stop(name) == 0
                self.start(name)
        self.until(lambda: self.state == SafetyStatus.RUNNING, f"the arm moves again with another {name}")

    def output(self, name: str) -> str:
        """What a process has printed."""
        return "\n".join(line for process, line in self.lines if process == name)

    def begin(self, seed: int = 0) -> None:
        """Begin an episode: the arm at home and armed; returns when it moves under the policy."""
        self.wrist.mode = "pass"
        for process in self._launch.dead():
            self.start(process.name)
        self.until(lambda: self.policy.active, "a policy is active")
        assert self.trigger("/safety_controller/disarm").success
        self.until(lambda: self.state == SafetyStatus.DISARMED, "the controller is disarmed")
        assert self.call(ResetWorld, "/world/reset", ResetWorld.Request(seed=seed)).success
        for name in ("/observation_node/reset", "/chunk_executor/reset"):
            assert self.trigger(name).success
        answer = self.trigger("/safety_controller/arm")
        assert answer.success, answer.message
        self.until(lambda: self.state != SafetyStatus.DISARMED, "the controller is armed")
        self.forget()
        self.until(lambda: self.state == SafetyStatus.RUNNING, "the arm moves under the policy")
        self.moved()
