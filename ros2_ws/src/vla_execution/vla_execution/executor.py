"""The executor: turns chunks into one command per control period. Pure: no ROS, the clock is handed in.

At every control period `tick` gives the command, and `tick_early` another one between two ticks when a chunk has come;
whenever it is time, `poll_request` gives the next request; every chunk goes through `on_chunk`, which refuses what must
not be executed and says why. The same object drives the node, the lock-step benchmark and the tests.

Safe by construction: without a plan, an armed controller and a fresh status the answer is hold or silence; no step
is larger than the tool (joint) speed limit allows in one period; a plan that lies farther than `max_jump`,
`max_turn` from the goal is never followed. Failures leave by themselves: a request without answer is sent again, a
clock that was set back drops everything that belonged to the time before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from vla_core import se3
from vla_core.kinematics import Kinematics
from vla_core.robot import Robot

from vla_execution.chunk import ON_TIME, Chunk, ChunkRefused
from vla_execution.delay import DelayEstimator
from vla_execution.goal import ArmStatus, GoalPredictor, Status
from vla_execution.metrics import Metrics
from vla_execution.standstill import Standstill
from vla_execution.strategies import ExecutionConfig, RequestPlan, make_strategy

#: States of the safety controller in which commands are sent. While it brakes they are sent only if it was this
#: executor's own hold that made it brake: a plan that comes then goes on at once; else the plan waits.
RESTING = ("armed", "holding")
READY = (*RESTING, "running")
PAUSED = ("stopping",)
#: An arm that has held for this long is at rest, and so is what a policy sees of it, s.
SETTLE = 0.1
#: A status older than this says nothing any more, s.
STATUS_TIMEOUT = 0.3
#: A chunk whose first action falls due later than this after its arrival came from another clock, s.
FUTURE = 0.5
#: After an answer that could not be used the policy is asked again this much later, s.
RETRY = 0.1
#: An early tick comes at least the first share of a control period after a tick (simulated time may stand still
#: between two) and the second before the next, which else is soon enough.
EARLY = 0.01, 0.1
#: A clock that goes back by more than this was set back, s.
CLOCK_JUMP = 0.05


@dataclass(frozen=True)
class ArmMotion:
    """One arm's part of a command: delta (6,) [m, rad] base axes, or joint goals (n,); opening 0..1."""

    gripper: float
    delta: np.ndarray | None = None
    joints: np.ndarray | None = None


@dataclass(frozen=True)
class ExecutorCommand:
    """One control period of motion (vla_msgs/Command). hold: come to a smooth stop; arms is then empty.

    observed: reference time of the observation it rests on, s (0: none). chunk: number of the chunk it comes from
    (request id; for a policy that runs free the executor's count), 0: none. boundary: jump (m, rad) of the target
    against the plan before, in the first command of a chunk.
    """

    stamp: float
    sequence: int
    period: float
    hold: bool
    arms: Mapping[str, ArmMotion] = field(default_factory=dict)
    observed: float = 0.0
    chunk: int = 0
    boundary: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Request:
    """A request to the policy (vla_msgs/ChunkRequest): its id, time of sending (s) and content."""

    id: int
    stamp: float
    plan: RequestPlan


class Executor:
    """Executes chunks on `robot` by the strategy called `strategy`. Not thread-safe."""

    def __init__(self, robot: Robot, strategy: str, config: ExecutionConfig | None = None, source: str = "executor"):
        self.robot = robot
        self.config = config or ExecutionConfig()
        self.name = strategy
        self.strategy = make_strategy(strategy, self.config)
        self.period = 1.0 / robot.rates.control
        self.source = source
        self.metrics = Metrics()
        self.delays = DelayEstimator()
        self.reason = ""  # why the arm holds, or the newest refusal; empty when all is well
        self._kinematics = Kinematics(robot)
        self._goals = GoalPredictor(source)
        self._policy = ""
        self._unsuited = ""  # why the active policy cannot serve this strategy
        self._sequence = 0
        self._next_id = 1
        self._now = -np.inf
        self._forget(-np.inf)

    # ------------------------------------------------------------------------------------------------------ inputs

    def reset(self, now: float) -> None:
        """Drop every plan, request and count; what was asked before is not accepted any more."""
        self._forget(now)
        self.metrics = Metrics()
        self.reason = ""

    def on_policy(self, name: str, period: float, horizon: int, guidance: tuple[str, ...]) -> None:
        """The active policy (vla_msgs/PolicyStatus). Its name is empty when none is active.

        A policy that lacks the guidance of the strategy is asked for nothing. After a change of policy the next
        request carries no remainder and the delays are measured anew.
        """
        if not name:
            return
        if name != self._policy:
            self._policy = name
            self._fresh = True
            self.delays.clear()
        needed = self.strategy.guidance
        unsuited = ""
        if needed and needed not in guidance:
            unsuited = (
                f"strategy {self.name}: expected a policy that supports {needed!r}, found {name!r}, which supports "
                f"{', '.join(guidance) or 'no guidance'}"
            )
        if unsuited != self._unsuited:
            self._unsuited = unsuited
            self.reason = unsuited

    def on_chunk(self, chunk: Chunk | None, now: float, warm_up: bool = False, error: str = "") -> str:
        """Take or refuse an answer of the policy at `now`.

        Args:
            chunk: None with an `error`.
            warm_up: the policy's first inferences, whose delay is not counted.
            error: why the policy could not answer.

        Returns:
            Why it was refused; empty when it is in force.
        """
        if not self._ready:
            return "the safety controller is not ready for commands"
        if chunk is None:
            return self.refuse(f"the policy failed: {error or 'no actions'}", now)
        try:
            self._take(chunk, now, warm_up)
        except ChunkRefused as refusal:
            return self.refuse(str(refusal), now, chunk.id)
        return ""

    def refuse(self, reason: str, now: float, request_id: int = 0) -> str:
        """Count an answer that cannot be executed or even read, and soon ask again. Returns the reason."""
        self.metrics.refused += 1
        self.reason = reason
        if self._outstanding is not None and request_id in (0, self._next_id - 1):
            self._outstanding = None
            self._retry = now + RETRY
        return reason

    @property
    def executing(self) -> bool:
        """Whether a plan covers the newest tick."""
        return self._ready and self.strategy.target(self._now) is not None

    def poll_request(self, now: float) -> Request | None:
        """The request to send now, if it is time for one. Call it after `tick`."""
        if not self._ready or self._unsuited or now < self._retry:
            return None
        if self._outstanding is not None and now - self._outstanding < self.config.request_timeout:
            return None
        if self.strategy.at_rest and now - self._moved < SETTLE:
            return None
        plan = self.strategy.request(now, self.delays)
        if plan is None:
            return None
        if self._fresh or plan.remainder is None:
            plan = RequestPlan(execution_horizon=plan.execution_horizon)
        request = Request(self._next_id, now, plan)
        self._next_id += 1
        self._outstanding = now
        self.metrics.requests += 1
        return request

    # -------------------------------------------------------------------------------------------------------- tick

    def tick(self, now: float, status: Status | None) -> ExecutorCommand | None:
        """The command of this control period; None when nothing must be sent.

        Nothing is sent while the controller is not ready or its status is missing, and before the first chunk: the
        controller then holds by itself, and others may command.
        """
        period, self._spent, self._ticked = self.period - self._spent, 0.0, now
        return self._decide(now, status, period)

    def tick_early(self, now: float, status: Status | None) -> ExecutorCommand | None:
        """The command of the part of this control period that has passed, for a chunk that has just come.

        It need not wait for the next tick, whose command then covers the rest of the period only. None: nothing to be
        sent early.
        """
        period = now - self._ticked - self._spent
        first, last = EARLY[0] * self.period, (1.0 - EARLY[1]) * self.period - self._spent
        if not first <= period <= last:
            return None
        if not self._ready or self.strategy.target(now) is None:
            return None
        self._spent += period
        return self._decide(now, status, period)

    def _decide(self, now: float, status: Status | None, period: float) -> ExecutorCommand | None:
        command = self._command(now, status, period)
        self._standstill.update(now, command is None or command.hold)
        return command

    def _command(self, now: float, status: Status | None, period: float) -> ExecutorCommand | None:
        if now < self._now - CLOCK_JUMP:
            self.reset(now)
            self.delays.clear()
            self.reason = "the clock was set back: starting over"
        self._now = now
        self._ready = False
        if status is None or now - status.stamp > STATUS_TIMEOUT:
            self._drop("no safety status", now)
            return None
        if status.state not in READY + PAUSED:
            self._drop(f"the safety controller is {status.state}", now)
            return None
        if self._dropped and self._dropped == self.reason:
            self.reason = self._unsuited
        self._dropped = ""
        self._ready = True
        if status.source == self.source:
            self._sequence = max(self._sequence, status.sequence)  # after a restart: go on counting
        goals = self._goals.predict(status, now)
        self._goal = goals or self._goal
        if status.state not in RESTING:
            self._moved = now
        if status.state in PAUSED and not self._holding:
            return None
        target = None if self._unsuited else self.strategy.target(now)
        if target is not None and goals is not None:
            far = self._too_far(self.strategy.chunk, target, goals)
            if not far:
                return self._move(now, target, goals, period)
            self.strategy.reset()
            self.reason = f"plan dropped: {far}"
        if not self._started:
            return None
        self.metrics.empty_ticks += 1
        self._holding = True
        self._sequence += 1
        self._goals.record(self._sequence, now, None, {})
        return ExecutorCommand(now, self._sequence, period, hold=True)

    def _move(self, now: float, target: np.ndarray, goals: Mapping[str, ArmStatus], period: float) -> ExecutorCommand:
        chunk = self.strategy.chunk
        arms = {}
        limited = False
        for name, part in chunk.layout.slices.items():
            arm, goal, wanted = self.robot.arm(name), goals[name], target[part]
            if chunk.kind == "pose":
                delta = se3.delta(goal.goal, se3.pose_to_matrix(wanted[:7]))
                for half, speed in ((delta[:3], arm.tool_limits.speed), (delta[3:], arm.tool_limits.rotation)):
                    size = float(np.linalg.norm(half))
                    if size > speed * period:
                        half *= speed * period / size
                        limited = True
                arms[name] = ArmMotion(gripper=float(wanted[-1]), delta=delta)
            else:
                largest = arm.limits.velocity * period
                step = wanted[:-1] - goal.joints
                limited |= bool((np.abs(step) > largest).any())
                arms[name] = ArmMotion(gripper=float(wanted[-1]), joints=goal.joints + np.clip(step, -largest, largest))
        self._holding = False
        self.metrics.limited_ticks += limited
        self.metrics.append("command_age", now - chunk.observed)
        self._sequence += 1
        deltas = {name: arm.delta for name, arm in arms.items() if arm.delta is not None}
        joints = {name: arm.joints for name, arm in arms.items() if arm.joints is not None}
        self._goals.record(self._sequence, now, deltas, joints)
        boundary, self._boundary = self._boundary, (0.0, 0.0)
        return ExecutorCommand(now, self._sequence, period, False, arms, chunk.observed, self._chunk_number, boundary)

    # ------------------------------------------------------------------------------------------------------ chunks

    def _take(self, chunk: Chunk, now: float, warm_up: bool) -> None:
        if chunk.id:
            if not self._oldest_id <= chunk.id < self._next_id:
                raise ChunkRefused(
                    f"request id: expected {self._oldest_id} to {self._next_id - 1}, found {chunk.id} "
                    "(an answer to an older request)"
                )
        self._check(chunk, now)
        if not warm_up:
            self.delays.record(max(now - chunk.observed, 0.0))
        self.metrics.append("delay", now - chunk.observed)
        # What the arm did not execute it did not consume: due times move on by the time it stood still.
        timed = chunk.shifted(chunk.start + self._standstill.within(chunk.observed, now))
        if timed.end < now:
            late = now - timed.end
            raise ChunkRefused(f"due times: expected actions still to come, found the last due {late:.3f} s ago")
        if timed.start > now + FUTURE:
            raise ChunkRefused(f"due times: expected the first about now, found it due in {timed.start - now:.3f} s")
        after = timed.at(now)
        before = self.strategy.target(now)
        running = self.strategy.chunk
        if before is not None and running.layout == chunk.layout:
            reference = self._tools(running, before)
        else:
            before, reference = None, {name: arm.goal for name, arm in self._goal.items()}
        far = self._too_far(timed, after, self._goal)
        if far:
            raise ChunkRefused(far)
        if chunk.id == self._next_id - 1:
            self._outstanding = None
        if not self.strategy.accept(timed, now):
            return
        if chunk.id:
            self._oldest_id = chunk.id + 1
        self.metrics.chunks += 1
        self._chunk_number = chunk.id or self._chunk_number + 1
        if not self._policy or chunk.policy in ("", self._policy):
            self._fresh = False
        if self._started:
            # After the switch by the strategy's own rule: a cross-fade or an ensemble has no step, or a smaller one.
            jump = self._distance(reference, self._tools(timed, self.strategy.target(now)))
            self._boundary = (max(self._boundary[0], jump[0]), max(self._boundary[1], jump[1]))
            self.metrics.append("boundary_translation", jump[0])
            self.metrics.append("boundary_rotation", jump[1])
        self._started = True
        self.reason = self._unsuited

    def _check(self, chunk: Chunk, now: float) -> None:
        robot = self.robot
        if chunk.arms != robot.arm_names:
            raise ChunkRefused(f"arms: expected {list(robot.arm_names)}, found {list(chunk.arms)}")
        if chunk.kind == "joint":
            widths = tuple(len(arm.joints) + 1 for arm in robot.arms)
            if chunk.widths != widths:
                raise ChunkRefused(f"actions: expected {widths} numbers for the arms' joints, found {chunk.widths}")
        elif chunk.frame and chunk.frame != robot.base_frame:
            raise ChunkRefused(f"frame: expected {robot.base_frame!r}, found {chunk.frame!r}")
        if chunk.observed < self._since:
            raise ChunkRefused("observation: expected one made after the reset, found one made before it")
        age = now - chunk.observed
        if age > self.config.max_chunk_age:
            most = self.config.max_chunk_age
            raise ChunkRefused(f"age of the observation: expected at most {most} s, found {age:.3f}")
        running = self.strategy.chunk
        if running is not None and chunk.observed < running.observed - ON_TIME:
            raise ChunkRefused(
                f"observation: expected one not older than the running chunk's, found it "
                f"{running.observed - chunk.observed:.3f} s older"
            )

    def _too_far(self, chunk: Chunk, target: np.ndarray, goals: Mapping[str, ArmStatus]) -> str:
        """Why `target` must not be followed from `goals`; empty when it may."""
        if not goals:
            return "the arms' goal is not known yet"
        jump, turn = self._distance({name: arm.goal for name, arm in goals.items()}, self._tools(chunk, target))
        if jump > self.config.max_jump or turn > self.config.max_turn:
            return (
                f"distance of the plan from the goal: expected at most {self.config.max_jump} m and "
                f"{self.config.max_turn} rad, found {jump:.3f} m and {turn:.3f} rad"
            )
        return ""

    def _tools(self, chunk: Chunk, target: np.ndarray) -> dict[str, np.ndarray]:
        """Arm -> T_base_tool (4, 4) at a target of the chunk's layout."""
        parts = {name: target[part] for name, part in chunk.layout.slices.items()}
        if chunk.kind == "pose":
            return {name: se3.pose_to_matrix(part[:7]) for name, part in parts.items()}
        return {name: self._kinematics.forward(name, part[:-1]) for name, part in parts.items()}

    @staticmethod
    def _distance(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> tuple[float, float]:
        """Largest distance of the arms' tools, (m, rad)."""
        deltas = [se3.delta(first[name], second[name]).tolist() for name in second]
        return max(math.hypot(*d[:3]) for d in deltas), max(math.hypot(*d[3:]) for d in deltas)

    # ----------------------------------------------------------------------------------------------------- the end

    def _drop(self, reason: str, now: float) -> None:
        """The controller does not follow: whatever was planned is void."""
        if self._dropped != reason:
            self._forget(now)
            self._dropped = self.reason = reason

    def _forget(self, now: float) -> None:
        self.strategy.reset()
        self._goals.clear()
        self._goal: Mapping[str, ArmStatus] = {}
        self._since = now  # observations made before belong to the past
        self._oldest_id = self._next_id
        self._outstanding: float | None = None
        self._retry = -np.inf
        self._fresh = True
        self._ready = False
        self._started = False
        self._holding = False  # the newest command was a hold
        self._moved = -np.inf  # when the arm moved last
        self._standstill = Standstill()
        self._ticked, self._spent = -np.inf, 0.0  # the newest tick, s; what of its period is commanded already, s
        self._dropped = ""
        self._chunk_number = 0
        self._boundary = (0.0, 0.0)
