"""The drivers of a robot's arms as one cell: one clock, one state, one stop. No ROS here.

Each arm has a thread that makes all calls of its driver, for no two of them may run at once, and one that takes long (a
controller takes seconds to connect, a vendor's library may block) must not hold up the other arm. `CellDriver` only
leaves word for the threads and takes what they have found; whatever it does returns within half a period.

It follows while the safety controller is armed, running or holding, and brakes; it begins when every arm is connected
and well, and the first targets are where the arms are. It then stops all arms with category 2 when targets or the
controller's status cease, when the controller reports a fault, or when one arm's driver fails; and with category 0 or 1
when the controller says so. What was stopped stays so until `connect`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from vla_core.robot import Robot, RobotError

from vla_control.drivers import ArmDriver, ArmState, ArmTarget, DriverError, load_driver
from vla_control.safety import State

#: Types that a whole robot may be given in place of its own.
STAND_INS = ("fake", "mujoco")
#: The first targets may be this many times the description's `start.joint` from where the arms are: the controller has
#: compared them with an earlier measurement.
_START = 2.0
_CONNECTING = "connecting"
#: States in which the controller sends targets that may move the arms.
_ACTIVE = (State.ARMED, State.RUNNING, State.HOLDING)


def make_drivers(
    robot: Robot, override: str = "", clock: Callable[[], float] = time.monotonic, node: Any = None
) -> dict[str, ArmDriver]:
    """Arm -> its driver, not connected; empty when the description has no `driver` section.

    override: type of every arm, of STAND_INS; no setting of the description's own drivers counts then. clock: s.
    node: for drivers that speak by ROS topics. Raises RobotError, DriverError.
    """
    if override and override not in STAND_INS:
        raise RobotError(f"driver: expected one of {list(STAND_INS)} or '' (the robot file's), found {override!r}")
    without = [arm.name for arm in robot.arms if not arm.driver]
    if without and not override:
        if len(without) == len(robot.arms):
            return {}
        raise RobotError(
            f"{robot.path}: arms.{without[0]}.driver: missing; expected a driver for every arm or for none"
        )
    drivers = {}
    for arm in robot.arms:
        settings = {} if override else {key: value for key, value in arm.driver.items() if key != "type"}
        common = {
            "name": arm.name, "joints": arm.joints, "period": 1.0 / robot.rates.control, "robot": robot, "node": node,
            "gripper": arm.gripper is not None, "gripper_force": arm.gripper.force if arm.gripper else None,
        }  # fmt: skip
        if doubled := sorted(common.keys() & settings.keys()):
            raise RobotError(
                f"{robot.path}: arms.{arm.name}.driver.{doubled[0]}: unknown key; the arm's own section says it"
            )
        drivers[arm.name] = load_driver(override or str(arm.driver["type"]), common | settings, clock)
    return drivers


@dataclass(frozen=True)
class CellReading:
    """What the arms said in one period.

    stamp: s, of the oldest of the states, so that one arm whose state is old is not hidden by the other; NaN unless
    every arm has a state. states: arm -> its newest. halted: arm -> why it does not follow targets, "" if it does.
    """

    stamp: float
    states: Mapping[str, ArmState]
    halted: Mapping[str, str]


class _Arm:
    """An arm's driver, what its thread is asked for, and what it has found."""

    def __init__(self, driver: ArmDriver):
        self.driver = driver
        self.name = driver.arm.name
        self.connect = self.read = self.close = self.connected = False
        self.stop: int | None = None
        self.target: ArmTarget | None = None
        self.call, self.since = "", math.nan  # the call under way, and since when, s
        self.state: ArmState | None = None
        self.why = "not connected"
        self.error = ""  # of the last connecting
        self.not_sent = ""  # why the last target could not be sent

    def asked(self) -> bool:
        return self.connect or self.read or self.close or self.stop is not None or self.target is not None

    @property
    def halted(self) -> str:
        return self.why or (self.state.halted if self.state else "no state yet")


class CellDriver:
    """All arms of a robot. Its methods may be called from any thread.

    watchdog: s without targets or without the controller's status, or for one call of a driver, after which the arms
    are stopped. clock: s, the one that the drivers were given. errors: by arm, how often its driver failed.
    """

    def __init__(
        self,
        robot: Robot,
        drivers: Mapping[str, ArmDriver],
        watchdog: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ):
        if not watchdog > 1.0 / robot.rates.control:
            raise RobotError(
                f"watchdog: expected more than a period, {1.0 / robot.rates.control:g} s, found {watchdog}"
            )
        self.robot, self.watchdog, self.clock = robot, watchdog, clock
        self.period = 1.0 / robot.rates.control
        self.errors: Counter[str] = Counter()
        self._arms = {name: _Arm(driver) for name, driver in drivers.items()}
        self._lock = threading.Condition()
        self._following = False
        self._since = math.inf  # stamp of the status by which following began, s
        self._state, self._category = State.DISARMED, -1
        self._status_at = -math.inf
        self._target_at: dict[str, float] = {}
        self._begun: set[str] = set()
        self._threads = [
            threading.Thread(target=self._serve, args=(arm,), name=f"driver of {arm.name}", daemon=True)
            for arm in self._arms.values()
        ]
        for thread in self._threads:
            thread.start()

    @property
    def following(self) -> bool:
        """Whether targets are handed on."""
        return self._following

    # ------------------------------------------------------------------------------------------------ connecting

    def begin_connect(self) -> str:
        """Let every arm connect (again); nothing moves. Returns why not, "" if it has begun.

        Refused while the controller is armed or in motion: its targets are from before.
        """
        with self._lock:
            heard = self.clock() - self._status_at <= self.watchdog
            if heard and self._state in (*_ACTIVE, State.STOPPING):
                return f"expected a safety controller that is disarmed or stopped, found it {self._state.name.lower()}"
            if any(arm.why == _CONNECTING for arm in self._arms.values()):
                return "expected arms that are not connecting already"
            self._following = False
            for arm in self._arms.values():
                arm.connect, arm.connected, arm.state, arm.target = True, False, None, None
                arm.why, arm.error, arm.not_sent = _CONNECTING, "", ""
            self._lock.notify_all()
        return ""

    def connect(self) -> str:
        """`begin_connect`, and wait for its end. Returns what went wrong, "" if every arm is connected."""
        if refused := self.begin_connect():
            return refused
        with self._lock:
            self._lock.wait_for(lambda: not any(arm.connect for arm in self._arms.values()))
            return "; ".join(arm.error for arm in self._arms.values() if arm.error)

    # ----------------------------------------------------------------------------------------- the controller's word

    def status(self, state: int, category: int, stamp: float) -> None:
        """The controller's status: its state, the category of its stop (-1 for none), the stamp of both, s."""
        state = State(state)
        with self._lock:
            before, self._state = self._state, state
            stopped, self._category = self._category, category
            self._status_at = self.clock()
            power_off = state == State.STOPPED and category in (0, 1)
            if power_off and (before != State.STOPPED or stopped not in (0, 1) or category < stopped):
                self._stop(category, f"stopped by the safety controller, category {category}")
            elif state == State.FAULT and self._following:
                self._stop(2, "stopped, since the safety controller is in fault")
            elif state == State.DISARMED:
                self._following = False
            elif state in _ACTIVE and not self._following and not any(arm.halted for arm in self._arms.values()):
                self._following, self._since, self._begun = True, stamp, set()
                self._target_at = dict.fromkeys(self._arms, self._status_at)

    def target(self, name: str, target: ArmTarget, stamp: float) -> bool:
        """Hand a target on at once. stamp: the controller's, s. Returns whether it was."""
        with self._lock:
            arm = self._arms[name]
            # Older ones are from before the controller was armed.
            if not self._following or stamp < self._since - 1e-6:
                return False
            self._target_at[name] = self.clock()
            if arm.halted:
                return False  # the controller hears so, and brakes the others
            if name not in self._begun:
                own = self.robot.arm(name)
                position = np.asarray(target.position, float)
                far = np.abs(position - arm.state.position) if position.shape == arm.state.position.shape else np.inf
                if not np.all(far <= _START * own.start.joint):
                    self._stop(
                        2,
                        f"stopped: arm {name}: expected a first target within {_START * own.start.joint:g} rad of "
                        f"{np.round(arm.state.position, 4).tolist()}, found {np.round(position, 4).tolist()}",
                    )
                    return False
                self._begun.add(name)
            arm.target = target
            self._lock.notify_all()
            return True

    def stop(self, category: int, why: str) -> None:
        """Stop every arm now; they stay so until `connect`. why: a sentence."""
        with self._lock:
            self._stop(category, why)

    # --------------------------------------------------------------------------------------------------- a period

    def tick(self) -> CellReading:
        """Once a period: look at the watchdogs and read every arm. Waits half a period for the arms at most; one that
        answers later is there with its state of before."""
        with self._lock:
            now = self.clock()
            if self._following:
                late = [name for name, at in self._target_at.items() if now - at > self.watchdog]
                if now - self._status_at > self.watchdog:
                    self._stop(2, f"stopped: expected a safety status every period, found none for {self.watchdog:g} s")
                elif late:
                    self._stop(
                        2,
                        f"stopped: arm {late[0]}: expected joint targets every period, found none for "
                        f"{self.watchdog:g} s",
                    )
            for arm in self._arms.values():
                if arm.call not in ("", "connect") and now - arm.since > self.watchdog and arm.connected:
                    self._fail(
                        arm, f"arm {arm.name}: expected an end of {arm.call}, found none for {self.watchdog:g} s"
                    )
                arm.read = arm.read or arm.connected
            self._lock.notify_all()
            self._lock.wait_for(lambda: not any(arm.read for arm in self._arms.values()), 0.5 * self.period)
            states = {name: arm.state for name, arm in self._arms.items() if arm.state is not None}
            every = len(states) == len(self._arms)
            stamp = min(state.stamp for state in states.values()) if every else math.nan
            return CellReading(stamp, states, {name: arm.halted for name, arm in self._arms.items()})

    def close(self, patience: float = 5.0) -> None:
        """Stop with category 2, let go of the devices and end the threads; waits `patience` s at most."""
        with self._lock:
            self._stop(2, "the driver node has ended")
            for arm in self._arms.values():
                arm.close = True
            self._lock.notify_all()
        end = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    # ---------------------------------------------------------------------------------------------------- inside

    def _stop(self, category: int, why: str) -> None:
        """With the lock held."""
        self._following = False
        for arm in self._arms.values():
            arm.target = None
            arm.stop = category if arm.stop is None else min(arm.stop, category)
            if arm.why in ("", _CONNECTING):
                arm.why = why
        self._lock.notify_all()

    def _fail(self, arm: _Arm, why: str) -> None:
        """With the lock held: an arm's driver is of no use until it is connected again, and no arm moves without it."""
        self.errors[arm.name] += 1
        # A state that is not its newest any more is not shown as if it were.
        arm.connected, arm.state, arm.read = False, None, False
        if arm.why in ("", _CONNECTING):
            arm.why = why
        self._stop(2, f"stopped with {why}")

    def _serve(self, arm: _Arm) -> None:
        """An arm's thread: one call after the other, the gravest first."""
        while True:
            with self._lock:
                self._lock.wait_for(arm.asked)
                call, argument = self._take(arm)
                arm.call, arm.since = call, self.clock()
            found, error = None, ""
            try:
                found = getattr(arm.driver, call)(*argument)
            except (DriverError, ValueError) as raised:
                error = str(raised)
            except Exception as raised:  # a driver's own mistake must not end its thread
                error = f"arm {arm.name}: expected {call} to work, found {type(raised).__name__}: {raised}"
            with self._lock:
                arm.call, arm.since = "", math.nan
                self._note(arm, call, found, error)
                self._lock.notify_all()
                if call == "close":
                    return

    def _take(self, arm: _Arm) -> tuple[str, tuple]:
        """The gravest of what an arm is asked for."""
        if arm.stop is not None:
            category, arm.stop = arm.stop, None
            return "stop", (category,)
        if arm.close:
            return "close", ()
        if arm.connect:
            return "connect", ()
        if arm.target is not None:
            target, arm.target = arm.target, None
            return "send", (target,)
        return "read", ()

    def _note(self, arm: _Arm, call: str, found: Any, error: str) -> None:
        """What came of a call. With the lock held."""
        if call == "connect":
            arm.connect, arm.connected, arm.error = False, not error, error
            if error:
                self.errors[arm.name] += 1
                arm.why = error
            elif arm.why == _CONNECTING:
                arm.why = ""
        elif call == "read":
            arm.read = False
            if error and arm.connected:
                self._fail(arm, error)
            elif arm.connected:
                arm.state = found
                if arm.not_sent and not found.halted:
                    self._fail(arm, arm.not_sent)
                arm.not_sent = ""
        elif call == "send" and error and not arm.why:
            # An arm that has halted by itself takes no targets either, and its state says why.
            arm.not_sent, arm.read = error, True
