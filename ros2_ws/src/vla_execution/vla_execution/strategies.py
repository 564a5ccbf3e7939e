"""Strategies: when to ask for the next chunk, and what to do of the chunks that came.

A strategy is asked at every control period: `request` (is it time for the next inference?), `target` (where shall
the robot be now?), and told of every chunk that passed the executor's checks: `accept`. Times are seconds of the ROS
clock. A strategy never waits: without a plan `target` is None, and the executor lets the arm come to a smooth hold.
Policies that run free (answer no requests) work with every strategy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vla_execution.blending import average
from vla_execution.chunk import ON_TIME, Chunk
from vla_execution.delay import DelayEstimator
from vla_execution.ensembling import ensemble_weights
from vla_execution.plan import Plan
from vla_execution.rtc import SCHEDULES

#: Actions that shape the way to an action (`blending.curve`): itself and the next.
SHAPING = 2


class StrategyError(ValueError):
    """A configuration that cannot be used; the message names the parameter, the expected and the found."""


@dataclass(frozen=True)
class ExecutionConfig:
    """How chunks are executed.

    execution_horizon: s, steps of a chunk executed between two inferences (RTC's s_min); kept within 1 .. H - d - 1.
    schedule, beta: soft mask and largest weight of the guidance (`rtc_guided`). decay: m of temporal ensembling.
    blend_window: length of the cross-fade (`linear_blend`), s. max_chunk_age: an observation older than this gives
    no chunk to execute, s. request_timeout: a request unanswered so long is sent again, s. max_jump, max_turn: a
    chunk that begins farther than this from where the tool is sent now is refused, m, rad.
    """

    execution_horizon: int = 8
    schedule: str = "exp"
    beta: float = 5.0
    decay: float = 0.01
    blend_window: float = 0.2
    max_chunk_age: float = 2.0
    request_timeout: float = 2.0
    max_jump: float = 0.15
    max_turn: float = 0.7

    def __post_init__(self) -> None:
        if self.execution_horizon < 1:
            raise StrategyError(f"execution_horizon: expected at least 1 step, found {self.execution_horizon}")
        if self.schedule not in SCHEDULES:
            raise StrategyError(f"schedule: expected one of {SCHEDULES}, found {self.schedule!r}")
        for name in ("max_chunk_age", "request_timeout", "max_jump", "max_turn", "beta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise StrategyError(f"{name}: expected a finite number above 0, found {value}")
        if not (math.isfinite(self.blend_window) and self.blend_window >= 0):
            raise StrategyError(f"blend_window: expected at least 0 s, found {self.blend_window}")
        if not math.isfinite(self.decay):
            raise StrategyError(f"decay: expected a finite number, found {self.decay}")


@dataclass(frozen=True)
class RequestPlan:
    """What the next inference shall start from (vla_msgs/ChunkRequest). Counts are in steps of the running chunk.

    delay: actions of the new chunk, counted from its observation, that the running plan has committed: those that
    will have fallen due when the answer arrives, the one that the arm is then approaching, and the one after it, which
    bends the way there.
    """

    remainder: Chunk | None = None
    delay: int = 0
    execution_horizon: int = 0
    guidance: str = ""
    schedule: str = "exp"
    beta: float = 5.0


class Strategy:
    """Asks for the next chunk once `execution_horizon` steps of the running one are executed; switches by time.

    guidance: what the policy must support: "" nothing, "guided", "prefix". at_rest: whether it asks for chunks only
    while the arm stands still.
    """

    guidance = ""
    at_rest = False

    def __init__(self, config: ExecutionConfig):
        self.config = config
        self._plan: Plan | None = None

    @property
    def chunk(self) -> Chunk | None:
        """The newest chunk in force."""
        return self._plan.chunk if self._plan else None

    def reset(self) -> None:
        """Drop every plan."""
        self._plan = None

    def request(self, now: float, delays: DelayEstimator) -> RequestPlan | None:
        """What to ask for now, or None when it is too early."""
        if self._plan is None or not self._plan.covers(now):
            return RequestPlan(execution_horizon=self.config.execution_horizon)
        chunk = self._plan.chunk
        delay = delays.steps(chunk.period)
        # d <= s <= H - d; one step less, so that the answer comes before the last action falls due.
        steps = min(self.config.execution_horizon, max(chunk.horizon - delay - 1, 1))
        if now < chunk.due(steps) - ON_TIME:
            return None
        committed = min(delay + SHAPING, chunk.horizon)
        return RequestPlan(
            remainder=self._plan.remainder(now) if self.guidance else None,
            delay=committed,
            # A larger s would end the guidance before the committed actions do.
            execution_horizon=min(max(steps, delay), chunk.horizon - committed),
            guidance=self.guidance,
            schedule=self.config.schedule,
            beta=self.config.beta,
        )

    def accept(self, chunk: Chunk, now: float) -> bool:
        """Put a chunk in force; actions that fell due before `now` are thereby dropped.

        False when the strategy has no use for it now (a policy that runs free sent it unasked).
        """
        if self._plan is None or not self._plan.covers(now) or self._plan.chunk.layout != chunk.layout:
            self._plan = Plan(chunk, now)
        else:
            self._plan.switch(chunk, now, self._window())
        return True

    def target(self, now: float) -> np.ndarray | None:
        """Target (D,) at `now`; None when nothing is planned for this time."""
        return self._plan.at(now) if self._plan is not None and self._plan.covers(now) else None

    def _window(self) -> float:
        return 0.0


class Naive(Strategy):
    """Switches to a new chunk the moment it arrives, by time, whatever the jump."""


class LinearBlend(Strategy):
    """Cross-fades from the running plan to a new chunk over `blend_window`."""

    def _window(self) -> float:
        return self.config.blend_window


class RtcGuided(Strategy):
    """Real-time chunking: the sampler is guided to continue the running plan (arXiv 2506.07339)."""

    guidance = "guided"


class RtcTrained(Strategy):
    """Training-time RTC: the policy takes the actions that will be executed meanwhile as prefix (arXiv 2512.05964)."""

    guidance = "prefix"


class Synchronous(Strategy):
    """Stop, infer, execute: the arm stands still while the policy thinks.

    A chunk is executed from its first action on: nothing was consumed while the arm stood still. After
    `execution_horizon` steps the arm stops, and once it is at rest the policy is asked again.
    """

    at_rest = True

    def __init__(self, config: ExecutionConfig):
        super().__init__(config)
        self._until = -math.inf  # when the arm stops, s

    def reset(self) -> None:
        super().reset()
        self._until = -math.inf

    def request(self, now: float, delays: DelayEstimator) -> RequestPlan | None:
        if now <= self._until + ON_TIME:
            return None
        return RequestPlan(execution_horizon=self.config.execution_horizon)

    def accept(self, chunk: Chunk, now: float) -> bool:
        if now <= self._until + ON_TIME:
            return False  # the arm did not stand still for this one
        self._plan = Plan(chunk, now)
        self._until = chunk.due(min(self.config.execution_horizon, chunk.horizon - 1))
        return True

    def target(self, now: float) -> np.ndarray | None:
        return super().target(now) if now <= self._until + ON_TIME else None


class TemporalEnsemble(Strategy):
    """ACT's temporal ensembling: asks for chunks as fast as they come, averages all that predict this moment.

    By time instead of by step, so chunks need no common grid and may be of any age: the weights are ACT's,
    exp(-decay i), i = 0 the oldest chunk.
    """

    def __init__(self, config: ExecutionConfig):
        super().__init__(config)
        self._chunks: list[Chunk] = []
        self._asked = -math.inf  # when the newest request was made, s

    @property
    def chunk(self) -> Chunk | None:
        return self._chunks[-1] if self._chunks else None

    def reset(self) -> None:
        self._chunks, self._asked = [], -math.inf

    def request(self, now: float, delays: DelayEstimator) -> RequestPlan | None:
        # At most one request per step, as ACT does.
        if self._chunks and now < self._asked + self._chunks[-1].period - ON_TIME:
            return None
        self._asked = now
        return RequestPlan(execution_horizon=1)

    def accept(self, chunk: Chunk, now: float) -> bool:
        alike = [
            c for c in self._chunks
            if c.end >= now and (c.layout, c.horizon, c.period) == (chunk.layout, chunk.horizon, chunk.period)
        ]  # fmt: skip
        self._chunks = [*alike, chunk]
        return True

    def target(self, now: float) -> np.ndarray | None:
        predictions = [c.at(now) for c in self._chunks if now <= c.end + ON_TIME]
        if not predictions:
            return None
        weights = ensemble_weights(len(predictions), self.config.decay)
        return average(self._chunks[-1].layout, np.array(predictions), weights)


STRATEGIES: dict[str, type[Strategy]] = {
    "synchronous": Synchronous,
    "naive": Naive,
    "temporal_ensemble": TemporalEnsemble,
    "linear_blend": LinearBlend,
    "rtc_guided": RtcGuided,
    "rtc_trained": RtcTrained,
}


def make_strategy(name: str, config: ExecutionConfig | None = None) -> Strategy:
    """The strategy called `name`. Raises StrategyError when there is none."""
    if name not in STRATEGIES:
        raise StrategyError(f"strategy: expected one of {sorted(STRATEGIES)}, found {name!r}")
    return STRATEGIES[name](config or ExecutionConfig())
