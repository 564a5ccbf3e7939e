"""The policy node: answers chunk requests with chunks of the active policy.

A lifecycle node. Configuring loads the policy, checks it against the robot and warms it up; activating lets it
answer. Further policies are loaded (/policy/load) while the first still drives, and take over between two chunks
(/policy/switch). Inference runs in a thread of its own, so that observations keep coming in meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.time import Time
from std_msgs.msg import String
from vla_core.robot import load_robot
from vla_core.time import seconds
from vla_models.policy import PolicyError
from vla_msgs.msg import ActionChunk, ChunkRequest, EpisodeEvent, Observation, PolicyStatus, StageTiming
from vla_msgs.srv import LoadPolicy, SwitchPolicy
from vla_ros.run import run_node

from vla_policy.description import load_description
from vla_policy.host import PolicyHost
from vla_policy.messages import inference_request, policy_observation, trajectory_message

#: Observations kept so that a request may name one; more for a policy with a longer history, s.
OBSERVATIONS_KEPT = 0.4
#: Latched topics: who comes late still gets the newest.
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class PolicyNode(LifecycleNode):
    def __init__(self) -> None:
        super().__init__("policy_node")
        declare = self.declare_parameter
        self.robot = load_robot(declare("robot", "panda").value)
        self.checkpoint = declare("checkpoint", "").value
        self.instruction = declare("instruction", "").value
        self.seed = declare("seed", 0).value
        self.inject_delay = declare("inject_delay", 0.0).value
        self.free_rate = declare("free_rate", 0.0).value
        self.max_observation_age = declare("max_observation_age", 0.5).value
        self.host = PolicyHost(
            self.robot,
            declare("runtime", "onnx").value,
            declare("provider", "cpu").value,
            declare("threads", 1).value,
            declare("precision", "fp32").value,
        )
        self.autostart = declare("autostart", True).value
        self.error = ""
        self._answering = False
        self._count = 0
        self._observations: deque[Observation] = deque()
        self._new_episode = False
        self._request: ChunkRequest | None = None
        self._wake = threading.Condition()
        self._closing = False

        self.chunk_publisher = self.create_publisher(ActionChunk, "/action_chunk", 5)
        self.status_publisher = self.create_publisher(PolicyStatus, "/policy_status", LATCHED)
        self.create_subscription(Observation, "/observation", self.on_observation, 2)
        self.create_subscription(ChunkRequest, "/chunk_request", self.on_request, 5)
        self.create_subscription(String, "/instruction", self.on_instruction, LATCHED)
        self.create_subscription(String, "/correction", self.on_correction, 5)
        self.create_subscription(EpisodeEvent, "/episode_events", self.on_event, 50)
        # Loading takes seconds: beside everything else (LeanExecutor) it holds up nothing.
        loading = ReentrantCallbackGroup()
        self.create_service(LoadPolicy, "/policy/load", self.on_load, callback_group=loading)
        self.create_service(SwitchPolicy, "/policy/switch", self.on_switch)
        self.create_timer(1.0, self.publish_status)
        if self.free_rate > 0:
            self.create_timer(1.0 / self.free_rate, lambda: self.on_request(None))
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    # ---------------------------------------------------------------------------------------------- lifecycle
    def on_configure(self, state) -> TransitionCallbackReturn:
        try:
            description = load_description(self.checkpoint)
            self.host.load(description)
            self.host.switch(description.name)
        except Exception as error:  # whatever is wrong with a checkpoint, the node says so and stays inactive
            return self._failed(error)
        self.error = ""
        spec = self.host.policy.spec
        self.get_logger().info(
            f"policy {self.host.active} is warm: {self.host.policy.runtime} on {self.host.policy.provider}, "
            f"{spec.horizon} actions of {spec.period:.3f} s"
        )
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state) -> TransitionCallbackReturn:
        self._answering = True
        self.publish_status()
        return super().on_activate(state)

    def on_deactivate(self, state) -> TransitionCallbackReturn:
        self._answering = False
        self.publish_status()
        return super().on_deactivate(state)

    def on_cleanup(self, state) -> TransitionCallbackReturn:
        self.host.clear()
        self.publish_status()
        return TransitionCallbackReturn.SUCCESS

    def _failed(self, error: Exception) -> TransitionCallbackReturn:
        self.error = f"{type(error).__name__}: {error}"
        self.get_logger().error(self.error)
        self.publish_status()
        return TransitionCallbackReturn.FAILURE

    # ------------------------------------------------------------------------------------------------- topics
    def on_observation(self, message: Observation) -> None:
        with self._wake:
            if self._observations and seconds(message.header.stamp) < seconds(self._observations[-1].header.stamp):
                self._observations.clear()  # the clock was set back: a new episode
            self._observations.append(message)
            policy = self.host.policy
            kept = OBSERVATIONS_KEPT + (policy.spec.history * policy.spec.period if policy else 0.0)
            while seconds(message.header.stamp) - seconds(self._observations[0].header.stamp) > kept:
                self._observations.popleft()
            self._wake.notify()

    def on_event(self, message: EpisodeEvent) -> None:
        if message.event == EpisodeEvent.RESET:
            with self._wake:
                self._observations.clear()
                self._new_episode = True

    def on_correction(self, message: String) -> None:
        try:
            if self.host.policy is not None:
                self.host.policy.correct(message.data)
        except PolicyError as error:
            self.get_logger().warning(str(error))

    def on_request(self, message: ChunkRequest | None) -> None:
        with self._wake:
            self._request = message if message is not None else ChunkRequest()
            self._wake.notify()

    def on_instruction(self, message: String) -> None:
        self.instruction = message.data
        self.publish_status()

    def on_load(self, request: LoadPolicy.Request, response: LoadPolicy.Response) -> LoadPolicy.Response:
        try:
            description = load_description(request.policy)
            self.host.load(description, request.runtime)
            response.success, response.message = True, f"policy {description.name} is loaded and warm"
        except Exception as error:  # reported to the caller; the running policy goes on
            response.success, response.message = False, f"{type(error).__name__}: {error}"
            self.get_logger().error(response.message)
        self.publish_status()
        return response

    def on_switch(self, request: SwitchPolicy.Request, response: SwitchPolicy.Response) -> SwitchPolicy.Response:
        try:
            self.host.switch(request.policy)
            response.success, response.message = (
                True,
                f"policy {request.policy} drives from the next chunk on",
            )
        except KeyError as error:
            response.success, response.message = False, error.args[0]
        self.publish_status()
        return response

    def publish_status(self) -> None:
        message = PolicyStatus()
        message.header.stamp = self.get_clock().now().to_msg()
        message.loaded = self.host.loaded
        message.instruction = self.instruction
        message.error = self.error
        policy = self.host.policy
        if policy is not None and self._answering:
            message.active = self.host.active
            message.runtime, message.provider = policy.runtime, policy.provider
            message.period, message.horizon = float(policy.spec.period), int(policy.spec.length)
            message.guidance = list(policy.spec.guidance)
        self.status_publisher.publish(message)

    # ---------------------------------------------------------------------------------------------- inference
    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or (self._answering and self._take_observation()))
                if self._closing:
                    return
                request, self._request = self._request, None
                observation = self._chosen(request)
                stamp = seconds(observation.header.stamp)
                before = [m for m in self._observations if seconds(m.header.stamp) < stamp]
                new_episode, self._new_episode = self._new_episode, False
            if new_episode:
                self.host.reset()
            answer = self._answer(request, observation, before)
            if self._closing or not self.context.ok():
                return
            self.chunk_publisher.publish(answer)

    def _take_observation(self) -> bool:
        """True when a request waits and there is what it takes to answer it: a fresh observation, an instruction."""
        if self._request is None or not self._observations:
            return False
        if self.host.policy.spec.reads_instruction and not self.instruction:
            return False
        age = self.get_clock().now().nanoseconds * 1e-9 - seconds(self._observations[-1].header.stamp)
        return age <= self.max_observation_age

    def _chosen(self, request: ChunkRequest) -> Observation:
        wanted = seconds(request.observation)
        for observation in self._observations:
            if wanted and abs(seconds(observation.header.stamp) - wanted) < 1e-6:
                return observation
        return self._observations[-1]

    def _answer(self, request: ChunkRequest, observation: Observation, before: list[Observation]) -> ActionChunk:
        chunk = ActionChunk()
        chunk.header = observation.header
        chunk.request_id = request.id
        chunk.policy = self.host.active
        begin = time.perf_counter()
        clock_begin = self.get_clock().now()
        self._count += 1
        try:
            spec = self.host.policy.spec
            observed = seconds(observation.header.stamp)
            output, policy, chunk.warm_up = self.host.infer(
                policy_observation(observation, spec, self.instruction, before),
                inference_request(request if request.id else None, spec, observed, self.seed + self._count),
            )
            chunk.actions = trajectory_message(
                output.targets, observation.header.stamp, policy.spec, self.robot.base_frame
            )
            chunk.prefix_steps = int(output.prefix_steps)
            timings = dict(output.timings)
            if self.error:
                self.error = ""
                self.publish_status()
        except Exception as error:  # a failed inference is an answer too: the executor holds and says why
            chunk.error = f"{type(error).__name__}: {error}"
            timings = {}
            if chunk.error != self.error:
                self.error = chunk.error
                self.get_logger().error(self.error)
                self.publish_status()
        if self.inject_delay > 0:
            self._sleep_until(clock_begin, self.inject_delay)
        timings["total"] = time.perf_counter() - begin
        chunk.timings = [StageTiming(stage=k, duration=float(v)) for k, v in timings.items()]
        return chunk

    def _sleep_until(self, begin: Time, delay: float) -> None:
        """Until `delay` s after `begin` on the node's clock, so that it is the same delay in simulated time."""
        while not self._closing and (self.get_clock().now() - begin).nanoseconds * 1e-9 < delay:
            time.sleep(0.001)

    def finish(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._worker.join(timeout=5.0)


def make_node() -> PolicyNode:
    """The node; with the parameter autostart configured and activated."""
    node = PolicyNode()
    if node.autostart and node.trigger_configure() == TransitionCallbackReturn.SUCCESS:
        node.trigger_activate()
    return node


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM."""
    run_node(make_node, args)


if __name__ == "__main__":
    main()
