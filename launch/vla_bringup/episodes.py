"""Runs episodes on a simulated robot through the running graph: reset, instruct, record, arm, wait for the outcome.

Everything goes over the topics and services that a person would use; nothing here reaches into a node.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import rclpy
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_msgs.msg import String
from std_srvs.srv import Trigger
from vla_msgs.msg import EpisodeEvent, PolicyStatus, SafetyStatus
from vla_msgs.srv import ResetWorld, StartEpisode, StopEpisode
from vla_ros.lean_executor import LeanExecutor

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
#: Longest wait for the graph to come up and for one answer of a service, wall time, s.
START_UP, SERVICE = 120.0, 20.0
#: From the moment that a service is seen until it is called, wall time, s.
SETTLE = 1.0
#: An episode may take this many times its own time limit in wall time before it is given up.
PATIENCE = 4.0


class EpisodeError(RuntimeError):
    """The graph cannot run an episode; the message says which part of it."""


@dataclass(frozen=True)
class EpisodeResult:
    """What came of one episode. `duration` in s of the robot's clock; `bag` None when nothing was recorded."""

    seed: int
    task: str
    instruction: str
    success: bool
    detail: str
    duration: float
    wall: float
    bag: Path | None
    options: tuple[str, ...] = field(default=())


class EpisodeRunner:
    """A client of the graph. A context manager.

    Args:
        alive: called while waiting; raises when a process of the graph has ended.
        record: whether the recorder runs in the graph.
    """

    def __init__(self, alive: Callable[[], None] = lambda: None, record: bool = True):
        self._alive, self._record = alive, record
        self._policy: PolicyStatus | None = None
        self._safety: SafetyStatus | None = None
        self._events: list[EpisodeEvent] = []

    def __enter__(self) -> EpisodeRunner:
        self._context = rclpy.Context()
        rclpy.init(args=[], context=self._context)
        self.node = Node(
            "episode_runner",
            context=self._context,
            parameter_overrides=[Parameter("use_sim_time", value=True)],
        )
        self._executor = LeanExecutor(context=self._context)
        self._executor.add_node(self.node)
        n = self.node
        n.create_subscription(PolicyStatus, "/policy_status", lambda m: setattr(self, "_policy", m), LATCHED)
        n.create_subscription(SafetyStatus, "/safety_status", lambda m: setattr(self, "_safety", m), 1)
        n.create_subscription(EpisodeEvent, "/episode_events", self._events.append, 50)
        self._instruction = n.create_publisher(String, "/instruction", LATCHED)
        self._clients = {
            name: n.create_client(kind, name)
            for name, kind in {
                "/world/reset": ResetWorld,
                "/safety_controller/arm": Trigger,
                "/safety_controller/disarm": Trigger,
                "/chunk_executor/reset": Trigger,
                "/observation_node/reset": Trigger,
                **({"/recorder/start": StartEpisode, "/recorder/stop": StopEpisode} if self._record else {}),
            }.items()
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)

    @property
    def policy(self) -> PolicyStatus:
        return self._policy

    def wait_ready(self) -> None:
        """Until the policy is active and every service is there.

        Raises:
            EpisodeError: not within START_UP, or the policy reports an error.
        """

        def ready() -> bool:
            if self._policy and self._policy.error and not self._policy.active:
                raise EpisodeError(f"the policy node: {self._policy.error}")
            return (
                bool(self._policy and self._policy.active)
                and self._safety is not None
                and all(c.service_is_ready() for c in self._clients.values())
            )

        if not self._spin_until(ready, START_UP):
            missing = [name for name, c in self._clients.items() if not c.service_is_ready()]
            raise EpisodeError(
                f"the graph did not come up in {START_UP:.0f} s: policy "
                f"{'active' if self._policy and self._policy.active else 'not active'}, safety status "
                f"{'heard' if self._safety else 'not heard'}, services missing: {missing}"
            )

        # A server that was just started may not know its client yet; its answer would be lost without a word
        # (ros2/rmw_fastrtps#842).
        self._spin_until(lambda: False, SETTLE)

    def run(self, task: str, seed: int, options: tuple[str, ...] = ()) -> EpisodeResult:
        """One episode, from reset to outcome."""
        self._disarm()
        self._call("/chunk_executor/reset", Trigger.Request())
        scene = self._call("/world/reset", ResetWorld.Request(task=task, seed=seed, options=list(options)))
        self._instruction.publish(String(data=scene.instruction))
        self._call("/observation_node/reset", Trigger.Request())
        self._spin_until(lambda: self._policy.instruction == scene.instruction, SERVICE)
        bag = None
        if self._record:
            answer = self._call("/recorder/start", StartEpisode.Request(task=task, instruction=scene.instruction))
            bag = Path(answer.bag)
        self._events.clear()
        wall = time.monotonic()
        begin = self._now()
        self._call("/safety_controller/arm", Trigger.Request())
        self._spin_until(lambda: self._outcome() is not None, PATIENCE * scene.time_limit)
        event = self._outcome()
        result = EpisodeResult(
            seed=seed,
            task=task,
            instruction=scene.instruction,
            success=event is not None and event.event == EpisodeEvent.SUCCESS,
            detail=event.detail if event else "no outcome within the time limit",
            duration=self._now() - begin,
            wall=time.monotonic() - wall,
            bag=bag,
            options=options,
        )
        self._disarm()
        if self._record:
            outcome = StopEpisode.Request.SUCCESS if result.success else StopEpisode.Request.FAILURE
            self._call("/recorder/stop", StopEpisode.Request(outcome=outcome, note=result.detail))
        return result

    # -------------------------------------------------------------------------------------------------- private
    def _disarm(self) -> None:
        """Disarm and wait for the arms to have braked."""
        self._call("/safety_controller/disarm", Trigger.Request())
        self._safety = None
        if not self._spin_until(lambda: self._safety and self._safety.state == SafetyStatus.DISARMED, SERVICE):
            raise EpisodeError(f"the safety controller did not disarm in {SERVICE:.0f} s")

    def _now(self) -> float:
        return self.node.get_clock().now().nanoseconds * 1e-9

    def _outcome(self) -> EpisodeEvent | None:
        ends = (EpisodeEvent.SUCCESS, EpisodeEvent.FAILURE)
        return next((e for e in self._events if e.event in ends), None)

    def _call(self, name: str, request):
        future = self._clients[name].call_async(request)
        if not self._spin_until(future.done, SERVICE):
            raise EpisodeError(f"{name}: no answer in {SERVICE:.0f} s")
        answer = future.result()
        if not answer.success:
            raise EpisodeError(f"{name}: {answer.message}")
        return answer

    def _spin_until(self, condition: Callable[[], bool], patience: float) -> bool:
        deadline = time.monotonic() + patience
        while not condition():
            if time.monotonic() > deadline:
                return False
            self._alive()
            self._executor.spin_once(timeout_sec=0.05)
        return True
