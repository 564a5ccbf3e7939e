"""A chunk of actions with absolute due times.

The time contract between executor and policy, in one place:

- Action k of a chunk is due at `start` + k * `period`: at that time the robot's commanded goal shall be there. In
  training data action k is the goal at t + k * period, so a policy's chunk has start = `observed`, the reference
  time of the observation it was inferred from.
- Actions are consumed by executing. While the arm stands still (before the first chunk, after the plan ran out) the
  executor moves the due times of the chunk it waits for on by that time: from rest a chunk begins with action 0.
- A request's remainder is the running plan on its own due times, absolute, from a little before the request (what
  was executed meanwhile) to its end. The policy samples it at the due times of the chunk to come, observed + k *
  period (`resampled`), so that entry k of the remainder and action k of the new chunk are due at the same time.
- A request's delay is counted from the observation too: the executor measures how many actions of a chunk had
  fallen due when it arrived, ceil((arrival - observed) / period), and asks for two more, the action that the arm is
  then on its way to and the one that bends this way: actions 0 .. delay - 1 of the new chunk shall equal the remainder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from vla_execution.blending import along, curve
from vla_execution.layout import KINDS, POSE_WIDTH, Layout

#: Quaternions may differ from unit length by this much before the chunk is refused; they are normalised then.
UNIT_TOLERANCE = 1e-3
#: Openings may lie outside 0..1 by this much before the chunk is refused; they are clipped then.
OPENING_TOLERANCE = 0.05
#: A time this near to an action's due time is that time, s: present-day times in doubles are good to 0.24 us.
ON_TIME = 1e-6


class ChunkRefused(ValueError):
    """A chunk that must not be executed; the message says what was expected and what was found."""


@dataclass(frozen=True)
class Chunk:
    """H targets at a fixed period with absolute due times.

    targets: (H, D) in the target layout, read-only copy. start: due time of action 0, s. period: s. kind: "pose" or
    "joint". arms: names, in order. widths: numbers of each arm (joints + 1, or 8 for poses); empty: D split evenly.
    observed: reference time of the observation, s; None: `start`. frame: base frame of poses; empty: not stated.
    id: request answered, 0 for none. policy: its name.

    Raises:
        ChunkRefused: shapes that do not fit, numbers that are not finite, quaternions not of unit length, openings
            outside 0..1, a period that is not positive.
    """

    targets: np.ndarray
    start: float
    period: float
    kind: str
    arms: tuple[str, ...]
    widths: tuple[int, ...] = ()
    observed: float | None = None
    frame: str = ""
    id: int = 0
    policy: str = ""
    layout: Layout = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        targets = np.array(self.targets, float)
        if targets.ndim != 2 or len(targets) == 0:
            raise ChunkRefused(f"actions: expected (H, D) with H > 0, found shape {targets.shape}")
        if self.kind not in KINDS:
            raise ChunkRefused(f"representation: expected one of {KINDS}, found {self.kind!r}")
        layout = Layout(self.kind, tuple(self.arms), self._widths(targets.shape[1]))
        if not np.isfinite(targets).all():
            row, column = np.argwhere(~np.isfinite(targets))[0]
            raise ChunkRefused(f"actions: expected finite numbers, found {targets[row, column]} in action {row}")
        if not (math.isfinite(self.start) and math.isfinite(self.period) and self.period > 0):
            found = f"{self.start}, {self.period}"
            raise ChunkRefused(f"due times: expected a finite start and a period > 0, found {found}")
        lengths = np.linalg.norm(targets[:, layout.quaternions], axis=-1, keepdims=True)
        if (np.abs(lengths - 1.0) > UNIT_TOLERANCE).any():
            worst = float(lengths.ravel()[np.argmax(np.abs(lengths - 1.0))])
            raise ChunkRefused(f"actions: expected unit quaternions, found one of length {worst:.6g}")
        targets[:, layout.quaternions] /= lengths
        openings = targets[:, layout.grippers]
        if (openings < -OPENING_TOLERANCE).any() or (openings > 1.0 + OPENING_TOLERANCE).any():
            raise ChunkRefused(
                f"actions: expected openings from 0 to 1, found {openings.min():.4g} to {openings.max():.4g}"
            )
        targets[:, layout.grippers] = np.clip(openings, 0.0, 1.0)
        targets.setflags(write=False)
        put = object.__setattr__
        put(self, "targets", targets)
        put(self, "arms", layout.arms)
        put(self, "widths", layout.widths)
        put(self, "layout", layout)
        if self.observed is None:
            put(self, "observed", self.start)

    def _widths(self, dim: int) -> tuple[int, ...]:
        count = len(self.arms)
        if count == 0:
            raise ChunkRefused("arms: expected at least one, found none")
        if self.kind == "pose":
            widths = (POSE_WIDTH,) * count
        else:
            widths = tuple(self.widths) or (dim // count,) * count
        if len(widths) != count or sum(widths) != dim or min(widths) < 2:
            raise ChunkRefused(f"actions: expected {widths} numbers for arms {tuple(self.arms)}, found {dim}")
        return widths

    @property
    def horizon(self) -> int:
        """Number of actions H."""
        return len(self.targets)

    @property
    def end(self) -> float:
        """Due time of the last action, s."""
        return self.start + (self.horizon - 1) * self.period

    def due(self, step: float) -> float:
        """Due time (s) of action `step`."""
        return self.start + step * self.period

    def index(self, time: float) -> int:
        """Number of the action being executed at `time`: the newest that has fallen due (not limited to 0..H-1)."""
        return math.floor((time - self.start + ON_TIME) / self.period)

    def consumed(self, time: float) -> int:
        """Actions that have fallen due before `time`: those a chunk arriving then has lost."""
        return max(0, math.ceil((time - self.start - ON_TIME) / self.period))

    def at(self, time: float) -> np.ndarray:
        """Target (D,) at `time` (s): on a smooth curve through the actions (`blending.curve`); the gripper keeps the
        opening of the action before. Before the first and after the last action: that action."""
        step = self.index(time)
        if step < 0:
            return self.targets[0].copy()
        if step >= self.horizon - 1:
            return self.targets[-1].copy()
        u = min(max((time - self.due(step)) / self.period, 0.0), 1.0)
        return along(self.layout, self._curve[step], u)

    @cached_property
    def _curve(self) -> np.ndarray:
        return curve(self.layout, self.targets)

    def remainder(self, time: float) -> Chunk | None:
        """What is left at `time`: from the action being executed on; None after the last."""
        step = max(self.index(time), 0)
        if step >= self.horizon:
            return None
        return replace(self, targets=self.targets[step:], start=self.due(step))

    def shifted(self, start: float) -> Chunk:
        """The same actions, the first one due at `start` (s)."""
        return self if start == self.start else replace(self, start=start, observed=self.observed)


def resampled(remainder: Chunk, observed: float, period: float, horizon: int) -> np.ndarray:
    """The remainder (K, D) at observed + k * period for k = 0 .. K - 1 < horizon, up to its end.

    Entry k is due together with action k of a chunk inferred from the observation of time `observed` (s). Entries
    before the remainder's start hold its first target. K is 0 when the remainder ends before `observed`.
    """
    times = observed + period * np.arange(horizon)
    times = times[times <= remainder.end + ON_TIME]
    return np.array([remainder.at(t) for t in times]).reshape(len(times), remainder.layout.dim)
