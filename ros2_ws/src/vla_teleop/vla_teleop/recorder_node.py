"""recorder: records episodes of the whole graph into rosbag2 folders.

Subscribes to every topic that `recorded_topics` names and hands the serialized bytes to EpisodeRecorder as
they arrive, without making Python messages of them. Recording is started, stopped and discarded by service,
or with `auto` by the simulator's episode events. A thread recovers bags that a crash cut off at start-up.

Lost messages: gaps in the sequence numbers of each publisher while recording, and what the bounded queue to
the disk could not take; see losses.py for what cannot be counted.
"""

from __future__ import annotations

import subprocess
import threading
import time
from importlib import metadata
from pathlib import Path

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from std_msgs.msg import String
from std_srvs.srv import Trigger
from vla_core.robot import load_robot
from vla_msgs.msg import EpisodeEvent, PolicyStatus
from vla_msgs.srv import StartEpisode, StopEpisode
from vla_ros.run import run_node

from vla_teleop import interfaces
from vla_teleop.bag_writer import BagError
from vla_teleop.episode_recorder import EpisodeRecorder, RawMessage, RecorderError
from vla_teleop.recorded_topics import RecordedTopic, recorded_topics
from vla_teleop.recover import recover_all

# Deep enough for the executor to be away for a second (closing a bag) without losing a message.
_DEPTH = 500
_IMAGE_DEPTH = 60
DEFAULT_FOLDER = "~/vla_bags"
# Event handlers make the executor wait on twice as many things at every message; none is needed here.
_NO_EVENTS = SubscriptionEventCallbacks(use_default_callbacks=False)
_OUTCOMES = {
    StopEpisode.Request.UNKNOWN: "unknown",
    StopEpisode.Request.SUCCESS: "success",
    StopEpisode.Request.FAILURE: "failure",
}


class RecorderNode(Node):
    """Node `recorder`: topics and simulator events in, bags and EpisodeEvents out."""

    def __init__(self) -> None:
        super().__init__("recorder")
        self._robot = load_robot(self.declare_parameter("robot", "panda").value)
        folder = Path(self.declare_parameter("folder", "").value or DEFAULT_FOLDER).expanduser()
        compression = self.declare_parameter("compression", "zstd").value
        images = self.declare_parameter("record_images", "raw").value
        max_queue = int(self.declare_parameter("max_queue_mb", 256).value)
        self._auto = bool(self.declare_parameter("auto", False).value)

        topics = recorded_topics(self._robot, images)
        qos = {topic.name: topic.qos for topic in topics}
        self._recorder = EpisodeRecorder(folder, self._robot.name, qos, compression, max_queue << 20)
        self._software = software_version()
        self._latched: dict[tuple[str, bytes], RawMessage] = {}
        self._reset = EpisodeEvent()  # newest RESET: task, seed and instruction of the episode
        self._events = self.create_publisher(EpisodeEvent, "/episode_events", QoSProfile(depth=50))
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", QoSProfile(depth=10))
        self._task = self._instruction = self._last_failure = ""
        self._silent = {topic.name: topic for topic in topics}  # nothing received yet
        self._sources = {topic.name: self._subscribe(topic) for topic in topics}
        self.create_service(StartEpisode, "/recorder/start", self._on_start)
        self.create_service(StopEpisode, "/recorder/stop", self._on_stop)
        self.create_service(Trigger, "/recorder/discard", self._on_discard)
        # Wall clock: the disk and the graph's discovery do not wait for a paused simulation.
        wall = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(0.1, self._check, clock=wall)
        self.create_timer(1.0, self._diagnose, clock=wall)
        threading.Thread(target=self._recover, args=(folder,), name="recovery", daemon=True).start()
        self.get_logger().info(f"ready to record {len(topics)} topics of {self._robot.name} into {folder}")

    def finish(self) -> None:
        """End a running recording when the node ends; the bag is kept."""
        if self._recorder.recording:
            self._stop("unknown", "the recorder was shut down")

    # ---- topics

    def _subscribe(self, topic: RecordedTopic, reliable: bool = True):
        depth = _IMAGE_DEPTH if topic.type == "sensor_msgs/msg/Image" else _DEPTH
        qos = QoSProfile(
            depth=depth,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if topic.latched else DurabilityPolicy.VOLATILE,
        )
        kind = interfaces.message_class(topic.type)
        return self.create_subscription(
            kind, topic.name, self._callback(topic), qos, event_callbacks=_NO_EVENTS, raw=True
        )

    def _callback(self, topic: RecordedTopic):
        # A function of exactly two arguments: rclpy then passes the message info with its sequence number.
        def take(data: bytes, info: dict) -> None:
            self._take(topic, data, info)

        return take

    def _take(self, topic: RecordedTopic, data: bytes, info: dict) -> None:
        now = self.get_clock().now().nanoseconds
        self._silent.pop(topic.name, None)
        publisher = info["publisher_gid"]["data"]
        sent = now if self._simulated else info["source_timestamp"]
        sequence = info["publication_sequence_number"]
        message = RawMessage(topic.name, topic.type, data, sent, publisher, sequence)
        self._recorder.put(message, now)
        if topic.latched:
            self._latched[topic.name, publisher] = message
        elif topic.name == "/episode_events":
            self._on_event(deserialize_message(data, EpisodeEvent))

    @property
    def _simulated(self) -> bool:
        return self.get_clock().ros_time_is_active

    def _on_event(self, event: EpisodeEvent) -> None:
        if event.event == EpisodeEvent.RESET:
            self._reset = event
            if self._auto:
                if self._recorder.recording:
                    self._stop("unknown", "the scene was reset")
                self._start(event.task, event.instruction)
        elif self._auto and self._recorder.recording:
            if event.event == EpisodeEvent.SUCCESS:
                self._stop("success", event.detail)
            elif event.event == EpisodeEvent.FAILURE:
                self._stop("failure", event.detail)

    # ---- services

    def _on_start(
        self, request: StartEpisode.Request, response: StartEpisode.Response
    ) -> StartEpisode.Response:
        response.success, response.message, response.bag = self._start(request.task, request.instruction)
        return response

    def _on_stop(self, request: StopEpisode.Request, response: StopEpisode.Response) -> StopEpisode.Response:
        outcome = _OUTCOMES.get(request.outcome, "unknown")
        response.success, response.message, response.bag = self._stop(outcome, request.note)
        return response

    def _on_discard(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            bag = self._recorder.discard()
        except RecorderError as error:
            response.success, response.message = False, str(error)
            return response
        self._announce(EpisodeEvent.DISCARDED, bag)
        response.success, response.message = True, f"discarded {bag}"
        return response

    def _start(self, task: str, instruction: str) -> tuple[bool, str, str]:
        self._check()
        task = task or self._reset.task
        instruction = instruction or self._newest_instruction()
        facts = {
            "robot": self._robot.name,
            "policy": self._newest_policy(),
            "task": task,
            "instruction": instruction,
            "seed": self._reset.seed,
            "software": self._software,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "outcome": "unknown",
        }
        now = self.get_clock().now().nanoseconds
        latched = [RawMessage(m.topic, m.type, m.data, now) for m in self._latched.values()]
        try:
            bag = self._recorder.start(task, facts, now, latched)
        except (BagError, RecorderError) as error:
            self.get_logger().error(str(error))
            return False, str(error), str(self._recorder.bag or "")
        self._last_failure = ""
        self._task, self._instruction = task, instruction
        self._announce(EpisodeEvent.RECORDING, bag)
        return True, "recording", str(bag)

    def _stop(self, outcome: str, note: str) -> tuple[bool, str, str]:
        self._check()
        bag = self._recorder.bag
        facts = {"outcome": outcome, "note": note, "policy": self._newest_policy()}
        if not self._instruction:  # given after the start
            facts["instruction"] = self._newest_instruction()
        try:
            self._recorder.stop(facts)
        except (BagError, RecorderError) as error:
            self.get_logger().error(str(error))
            return False, str(error), str(bag or "")
        self._announce(EpisodeEvent.SAVED, bag)
        return True, f"saved as {outcome}", str(bag)

    def _newest_policy(self) -> str:
        return self._newest("/policy_status", PolicyStatus, "active")

    def _newest_instruction(self) -> str:
        return self._newest("/instruction", String, "data") or self._reset.instruction

    def _newest(self, topic: str, kind: type, field: str) -> str:
        messages = [m for (name, _), m in self._latched.items() if name == topic]
        return getattr(deserialize_message(messages[-1].data, kind), field) if messages else ""

    def _announce(self, what: int, bag: Path, detail: str = "") -> None:
        event = EpisodeEvent(event=what, task=self._task, instruction=self._instruction)
        event.seed = self._reset.seed
        event.header.stamp = self.get_clock().now().to_msg()
        event.detail = detail or str(bag)
        self._events.publish(event)
        self.get_logger().info(f"{_VERBS[what]} {event.detail}")

    # ---- watching

    def _check(self) -> None:
        """Notice a recording that ended by itself."""
        failed = self._recorder.take_failure()
        if failed:
            bag, reason = failed
            self._last_failure = reason
            self.get_logger().error(f"recording stopped: {reason}")
            self._announce(EpisodeEvent.SAVED, bag, f"{bag} (ended early: {reason})")

    def _match_publishers(self) -> None:
        """Take topics of which nothing came as best effort when their publishers offer no more than that."""
        for topic in list(self._silent.values()):
            publishers = self.get_publishers_info_by_topic(topic.name)
            if any(p.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT for p in publishers):
                self.get_logger().warning(f"{topic.name}: its publisher offers best effort only; taken so")
                self.destroy_subscription(self._sources[topic.name])
                self._sources[topic.name] = self._subscribe(topic, reliable=False)
                del self._silent[topic.name]

    def _diagnose(self) -> None:
        self._match_publishers()
        lost = self._recorder.lost()
        status = DiagnosticStatus(name="recorder", hardware_id=self._robot.name, level=DiagnosticStatus.OK)
        status.message = "recording" if self._recorder.recording else "idle"
        if self._last_failure:
            status.level, status.message = DiagnosticStatus.ERROR, self._last_failure
        elif lost:
            status.level, status.message = DiagnosticStatus.WARN, f"lost {sum(lost.values())} messages"
        values = {
            "bag": self._recorder.bag or "",
            "received": self._recorder.received,
            "queue_mb": f"{self._recorder.queued_bytes / 2**20:.1f}",
            **{f"lost {topic}": count for topic, count in lost.items()},
        }
        status.values = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        array = DiagnosticArray(status=[status])
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(array)

    def _recover(self, folder: Path) -> None:
        for result in recover_all(folder):
            if result.error:
                self.get_logger().error(f"could not recover {result.folder}: {result.error}")
            elif result.messages:
                self.get_logger().info(f"recovered {result.folder}: {result.messages} messages")
            else:
                self.get_logger().info(f"removed {result.folder}: cut off before its first message")


_VERBS = {
    EpisodeEvent.RECORDING: "recording",
    EpisodeEvent.SAVED: "saved",
    EpisodeEvent.DISCARDED: "discarded",
}


def software_version() -> str:
    """Version of this package, with the git commit where the sources are a checkout."""
    version = f"vla_teleop {metadata.version('vla_teleop')}"
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=2.0).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"{version} {commit}".strip()


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM."""
    run_node(RecorderNode, args)


if __name__ == "__main__":
    main()
