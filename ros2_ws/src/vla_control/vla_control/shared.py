"""The safety controller as the threads of its node share it: inputs by callbacks, steps by the control loop. No ROS.

SafetyController itself is for one thread. One lock stands around it: the loop holds it while it decides a period, and
who arms, disarms or stops holds it for that one call. So every request has taken effect when it is answered, however
the loop is driven, and an emergency stop never waits for more than the step under way. Inputs that come often
(commands, joint states, wrenches, driver status) take no lock: each is one reference put in place, or one more in a
queue.
"""

from __future__ import annotations

import math
import threading
import traceback
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from vla_control.command import Command, CommandRefused
from vla_control.safety import Event, JointTarget, Measured, SafetyController, SafetyDecision, State
from vla_control.stops import Stop, Stops

#: Commands kept between two control periods.
QUEUE = 10
#: States in which an emergency stop from outside has something to stop.
_ARMED = (State.ARMED, State.RUNNING, State.HOLDING, State.STOPPING)


@dataclass(frozen=True)
class Period:
    """What a control period came to. targets: arm -> its target as commanded, whether or not it is sent. refused:
    commands refused so far. error: traceback of an exception in it, or nothing."""

    decision: SafetyDecision
    targets: Mapping[str, JointTarget]
    refused: int
    error: str = ""

    @property
    def resting(self) -> bool:
        """Whether the arms are at rest."""
        return self.decision.state not in (State.RUNNING, State.STOPPING)


@dataclass(frozen=True)
class Counts:
    """What there is to count, and the state, at one time."""

    state: State
    reason: str
    refused: Mapping[str, int]
    stopped: Mapping[str, int]
    limited: Mapping[str, int]


class SharedController:
    """The safety controller of one robot, its inputs and its emergency stops. Every method may be called by any thread.

    An exception in a step, which none should have, brakes the arms within all limits and stops them, latched. When
    braking raises one too, the controller is given up: state FAULT, nothing is sent any more (the drivers then stop by
    their own watchdogs), and no arming.

    Args:
        controller: used by nobody else from now on.
        watch_drivers: whether the arms' drivers say that they are alive (`drivers`); if so they must.
    """

    def __init__(self, controller: SafetyController, stops: Stops | None = None, watch_drivers: bool = False):
        self.robot, self.period, self.limits = controller.robot, controller.period, controller.limits
        self.stops, self.watch_drivers = stops or Stops(), watch_drivers
        self._controller = controller
        self._lock = threading.Lock()
        self._commands: deque[Command] = deque(maxlen=QUEUE)
        self._joints: Measured | None = None
        self._wrenches: dict[str, tuple[float, np.ndarray]] = {}
        self._drivers: tuple[float, Mapping[str, str]] = (-math.inf, {})
        self._stopped = False  # by `stops.watch`, since it was armed
        self._failed = False  # a step has raised an exception since it was armed
        self._given_up = ""
        self._last: SafetyDecision | None = None

    # ----------------------------------------------------------------------------------------- inputs, never waiting
    def command(self, command: Command) -> None:
        """A command that came; those between two periods are all taken, QUEUE at most."""
        self._commands.append(command)

    def joints(self, measured: Measured) -> None:
        """The newest joint states (stamp, position, gripper, effort)."""
        self._joints = measured

    def wrench(self, arm: str, wrench: np.ndarray, stamp: float) -> None:
        """The newest wrench (6,) of an arm's tool, N and N m, tool frame, measured at `stamp`, s.

        An arm's wrench that has come once must go on coming, as joint states must.
        """
        self._wrenches = self._wrenches | {arm: (stamp, wrench)}  # not in place: the loop may be reading it

    def drivers(self, halted: Mapping[str, str], stamp: float) -> None:
        """A sign of life of the drivers, s, and why arms do not follow."""
        self._drivers = (stamp, halted)

    def enable(self, on: bool, now: float) -> None:
        """What the enabling device says, at `now` of the steady clock, s."""
        self.stops.enable(on, now)

    # ------------------------------------------------------------------------------------------------------ requests
    def arm(self, now: float, steady: float) -> None:
        """Be ready to follow commands from where the arms are.

        Args:
            now: s of the ROS clock, as the stamps of all inputs. steady: s of a clock that never jumps.

        Raises:
            CommandRefused: why not; see SafetyController.arm.
        """
        with self._lock:
            if self._given_up:
                raise CommandRefused("fault", f"the controller has failed, start it again: {self._given_up}")
            missing = self.stops.missing(steady)
            if missing:
                raise CommandRefused("enabling_device", missing)
            measured = self._measured()
            for name, stamp, limit in (
                ("joint_states", measured.stamp if measured else -math.inf, self.limits.joint_state_timeout),
                ("drivers", measured.drivers if measured else math.nan, self.limits.driver_timeout),
            ):
                if abs(now - stamp) > limit:
                    found = "none have come" if math.isinf(stamp) else f"they are {now - stamp:.2f} s old"
                    raise CommandRefused(name, f"expected them at most {limit:g} s old, found: {found}")
            self._controller.arm(measured)
            self._commands.clear()
            self._stopped = self._failed = False

    def disarm(self) -> State:
        """Brake, then send nothing. Returns the state it is in now."""
        with self._lock:
            if not self._given_up:
                self._controller.disarm()
            return self._state()

    def stop(self, stop: Stop) -> State:
        """Make a stop. Returns the state it is in now."""
        with self._lock:
            if not self._given_up:
                self._controller.stop(stop.category, stop.reason, stop.code)
            return self._state()

    def fail(self, error: Exception) -> str:
        """Take notice of an exception in a period, outside `step`. Returns the traceback."""
        with self._lock:
            return self._fail(error)

    def counts(self) -> Counts:
        """Counters since the start, copied, and the state."""
        with self._lock:
            c = self._controller
            return Counts(
                self._state(), self._given_up or c.reason, Counter(c.refusals), Counter(c.stops), Counter(c.limitations)
            )

    @property
    def felt(self) -> set[str]:
        """Arms of which a wrench has come."""
        return set(self._wrenches)

    @property
    def state(self) -> State:
        return self._state()

    # ---------------------------------------------------------------------------------------------------- the loop's
    def step(self, now: float, steady: float) -> Period:
        """Decide one control period.

        Args:
            now: s of the ROS clock. steady: s of a clock that never jumps.
        """
        with self._lock:
            commands = [self._commands.popleft() for _ in range(len(self._commands))]
            error = ""
            if not self._given_up:
                try:
                    self._last = self._decide(commands, now, steady)
                except Exception as first:
                    error = self._fail(first)
            if error and not self._given_up:
                try:
                    self._last = self._decide([], now, steady)  # the first period of braking is this one
                except Exception as second:
                    error += self._fail(second)
            if self._given_up:
                self._last = self._fault(self._last, bool(error))
            return Period(
                self._last,
                {arm.name: self._controller.target(arm.name) for arm in self.robot.arms},
                self._controller.refusals.total(),
                error,
            )

    # ---------------------------------------------------------------------------------------- private, under the lock
    def _state(self) -> State:
        return State.FAULT if self._given_up else self._controller.state

    def _decide(self, commands: list[Command], now: float, steady: float) -> SafetyDecision:
        stop = self.stops.watch(steady)
        if stop and not self._stopped and self._controller.state in _ARMED:
            self._stopped = True
            self._controller.stop(stop.category, stop.reason, stop.code)
        for command in commands[:-1]:
            self._controller.offer(command, now)
        return self._controller.step(commands[-1] if commands else None, self._measured(), now)

    def _measured(self) -> Measured | None:
        """All that was measured, put together, and as old as the oldest of joint states and wrenches."""
        joints, wrenches, (drivers, halted) = self._joints, self._wrenches, self._drivers
        if joints is None:
            return None
        return replace(
            joints,
            stamp=min([joints.stamp, *(stamp for stamp, _ in wrenches.values())]),
            wrench={arm: wrench for arm, (_, wrench) in wrenches.items()},
            halted=halted,
            drivers=drivers if self.watch_drivers else math.nan,
        )

    def _fail(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        told = "".join(traceback.format_exception(error))
        if self._failed:
            self._given_up = self._given_up or f"braking failed: {text}"
            return told
        self._failed = True
        try:
            self._controller.stop(2, f"the controller failed: {text}", "exception")
        except Exception as second:
            self._given_up = f"stopping failed: {second!r}"
            told += "".join(traceback.format_exception(second))
        return told

    def _fault(self, last: SafetyDecision | None, new: bool) -> SafetyDecision:
        """What is decided once the controller was given up; `last`: before that."""
        text, nothing = self._given_up, np.zeros(0)
        return SafetyDecision(
            sent={},
            state=State.FAULT,
            reasons=("exception",),
            distance=math.nan,
            reason=text,
            nearest="",
            stop_category=2,
            goal=last.goal if last else {},
            commanded=last.commanded if last else {},
            limited={},
            source=last.source if last else "",
            sequence=last.sequence if last else 0,
            command_age=math.nan,
            refused="",
            events=(Event("stopped", "", ("exception",), text, nothing, nothing),) if new else (),
        )
