"""Where the controller's goal will be once it has taken every command sent so far.

The controller integrates deltas from its own goal and reports that goal with the sequence of the newest command it
took. The next delta must lead from the goal it will then have: the reported one plus all deltas sent since. So the
sum stays exact however the transport delays, and a goal that the controller pulled back is noticed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from vla_core import se3

#: A command whose sequence the status has not reached after this time was lost or refused, s.
PATIENCE = 0.25


@dataclass(frozen=True)
class ArmStatus:
    """One arm's part of the safety status: goal (4, 4) T_base_tool, joints (n,) sent, opening sent."""

    goal: np.ndarray
    joints: np.ndarray
    gripper: float


@dataclass(frozen=True)
class Status:
    """What the safety controller reports (vla_msgs/SafetyStatus). state: lower-case name, for example "running"."""

    stamp: float
    state: str
    source: str
    sequence: int
    arms: Mapping[str, ArmStatus]


@dataclass(frozen=True)
class _Sent:
    sequence: int
    time: float
    deltas: Mapping[str, np.ndarray] | None  # arm -> (6,); None: hold
    joints: Mapping[str, np.ndarray]  # arm -> (n,) joint goals


class GoalPredictor:
    """Keeps the commands that the controller has not confirmed yet. source: the sender's name."""

    def __init__(self, source: str):
        self.source = source
        self._sent: deque[_Sent] = deque()

    def clear(self) -> None:
        """Forget what was sent: the controller dropped it too (a stop, a reset)."""
        self._sent.clear()

    def record(self, sequence: int, time: float, deltas: Mapping[str, np.ndarray] | None,
               joints: Mapping[str, np.ndarray]) -> None:  # fmt: skip
        """A command that was sent: deltas arm -> (6,) or None for hold; joints arm -> (n,) for joint goals."""
        self._sent.append(_Sent(sequence, time, deltas, joints))

    def predict(self, status: Status, now: float) -> Mapping[str, ArmStatus] | None:
        """Arm -> goal after everything sent; None while a motion is unconfirmed that a hold has cut short."""
        sent = self._sent
        while sent and (
            now - sent[0].time > PATIENCE or (status.source == self.source and sent[0].sequence <= status.sequence)
        ):
            sent.popleft()
        goals = dict(status.arms)
        moved = False
        for command in sent:
            if command.deltas is None:
                if moved:
                    return None  # where the brake leaves the goal is known from the next status on
                continue
            moved = True
            for name, arm in goals.items():
                goals[name] = ArmStatus(
                    goal=se3.apply_delta(arm.goal, command.deltas[name]) if name in command.deltas else arm.goal,
                    joints=command.joints.get(name, arm.joints),
                    gripper=arm.gripper,
                )
        return goals
