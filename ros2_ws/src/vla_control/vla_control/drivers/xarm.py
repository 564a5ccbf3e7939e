"""UFACTORY arms: xArm 5, 6 and 7, 850 and Lite 6, with the vendor's library (xarm-python-sdk).

The arm is in servo motion mode (mode 1, `set_servo_angle_j`): its controller goes to the newest joint position at once
and plans nothing of its own. The online planning of mode 6 would bear late targets better, but it brakes for each
target as if it were the last, so that the arm lags behind targets that are smooth already. The velocity modes 4 and 5
are not used: they go on moving when the cable is pulled (xArm-Python-SDK issue 16). In mode 1 an arm that hears no
more stays at its last target, which is less than a period away.

Calls of the library wait for the controller's answer, now and then for 190 ms (xArm-Python-SDK issue 154). So each
connection has a thread that sends the newest target, and the state comes from the 100 Hz report on a socket of its
own. After such a wait the targets are ahead of the arm, and jumping there is what the controller stops for (error 24,
speed): the thread catches up at `catch_up` rad/s more than the target moves.

Source: xArm-Python-SDK 1.18, its code and doc/api.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from xarm.core.config.x_code import ControllerError
from xarm.wrapper import XArmAPI

from vla_control.drivers.driver import ArmDriver, ArmInfo, ArmState, ArmTarget, Capabilities, DriverError

#: Servo motion mode, and the states of the controller in which it does not move: `set_mode`, `get_state`.
_SERVO = 1
_STATES = {3: "paused", 4: "stopped", 5: "stopped, since its mode was changed", 6: "stopped"}
#: Codes of the library (doc/api/xarm_api_code.md) that mean: the controller answered, and it will not move.
_REFUSED = {
    -8: "out of the range of its joints",
    -2: "not ready",
    1: "an error that is not cleared",
    9: "not ready to move",
}
#: Reports that the velocity is taken over: 5 of 10 ms.
_WINDOW = 5


@dataclass(frozen=True)
class XarmConfig:
    """address: of the control box, its IP. Joint angles are the vendor's, which its URDF has too: no zero, no sign.

    wrench: whether there is the vendor's six-axis force-torque sensor. gripper_open, gripper_closed: positions of the
    xArm Gripper, in its own unit, 850 is open; gripper_speed: 1 to 5000 r/min. catch_up: rad/s that a late joint may
    move faster than its target. timeout: s that the controller may take for an answer. stale: s after which a state
    is too old to be read. patience: s that connecting may take.
    """

    address: str
    wrench: bool = False
    gripper_open: float = 850.0
    gripper_closed: float = 0.0
    gripper_speed: float = 3000.0
    catch_up: float = 1.0
    timeout: float = 0.5
    stale: float = 0.2
    patience: float = 8.0


@dataclass(frozen=True)
class _Report:
    """What one report said at `stamp`, s."""

    stamp: float
    position: np.ndarray
    velocity: np.ndarray
    effort: np.ndarray
    wrench: np.ndarray | None
    state: int
    mode: int


class XarmDriver(ArmDriver):
    """The driver "xarm".

    Stops: 2 is state 4 of the controller: it brakes, forgets its targets and holds with the motors on; 1 is that, and
    motors off with the brakes on when the arm stands; 0 is motors off and brakes on at once. All joints have brakes,
    the arm does not fall. The gripper keeps its grip in each of them. effort: N m, as the controller estimates it.
    """

    Config = XarmConfig

    def __init__(self, arm: ArmInfo, config: XarmConfig, clock: Callable[[], float]):
        super().__init__(arm, config, clock)
        if not 5 <= len(arm.joints) <= 7 or config.gripper_open == config.gripper_closed:
            raise self._error(
                f"expected 5 to 7 joints and a gripper that opens, found {len(arm.joints)} joints and a gripper from "
                f"{config.gripper_closed:g} to {config.gripper_open:g}"
            )
        self.capabilities = Capabilities(
            frozenset({0, 1, 2}), rate=250.0, effort=True, wrench=config.wrench, gripper=arm.gripper
        )
        self._api: XArmAPI | None = None
        self._threads: list[threading.Thread] = []
        self._wake = threading.Condition()
        self._forget()

    def _forget(self) -> None:
        self._report: _Report | None = None
        self._window: deque[tuple[float, np.ndarray]] = deque(maxlen=_WINDOW)
        self._target: ArmTarget | None = None
        self._fresh = self._ending = self._asked = False
        self._pending: int | None = None
        self._opening: float | None = None
        self._opened: float | None = None
        self._follows, self._halted, self._fault = False, "", "not connected"

    def connect(self) -> None:
        self.close()
        api = XArmAPI(
            self.config.address, is_radian=True, do_not_open=True, report_type="real",
            check_is_pause=False, check_cmdnum_limit=False,
        )  # fmt: skip
        api.register_report_location_callback(lambda _: self._heard(api), report_cartesian=False, report_joints=False)
        self._forget()
        self._api = api
        default = socket.getdefaulttimeout()
        try:
            # The library asks a box that does not answer for minutes.
            self._within(api.connect, "a control box that answers")
            self._prepare(api)
            if self.arm.gripper:
                self._prepare_gripper(api)
        except BaseException:
            self.close()
            raise
        finally:
            socket.setdefaulttimeout(default)  # the library sets one for every socket of this program
        with self._wake:
            self._follows, self._halted, self._fault = True, "", ""
        self._threads = [threading.Thread(target=self._stream, args=(api,), name=f"{self.arm.name} xarm", daemon=True)]
        if self.arm.gripper:
            self._threads.append(
                threading.Thread(target=self._grip, args=(api,), name=f"{self.arm.name} xarm gripper", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    def read(self) -> ArmState:
        with self._wake:
            report, fault, halted = self._report, self._fault, self._halted
        if fault:
            raise self._error(fault)
        age = self.clock() - report.stamp
        if age > self.config.stale:
            raise self._error(self._fail(self._api, f"expected a report every 0.01 s, found none for {age:.2f} s"))
        return ArmState(
            report.stamp, report.position.copy(), report.velocity.copy(), report.effort.copy(), report.wrench,
            self._opened if self.arm.gripper else None, halted,
        )  # fmt: skip

    def send(self, target: ArmTarget) -> None:
        self.check(target)
        with self._wake:
            if self._fault or not self._follows:
                raise self._error(self._fault or f"expected an arm that follows, found it {self._halted}")
            self._target, self._fresh = target, True
            if target.gripper is not None:
                self._opening = target.gripper
            self._wake.notify_all()

    def stop(self, category: int) -> int:
        done = self.stop_category(category)
        with self._wake:
            self._follows, self._target, self._opening = False, None, None
            self._halted = self._halted or f"stopped, category {done}"
            self._pending = done if self._pending is None else min(done, self._pending)
            self._wake.notify_all()
        return done

    def close(self) -> None:
        with self._wake:
            self._follows, self._ending = False, True
            self._fault = self._fault or "not connected"
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(2.0 * self.config.timeout + 1.0)
        api, self._api, self._threads = self._api, None, []
        if api is not None:
            try:
                self._within(api.disconnect, "an end of the connection")
            except DriverError:
                pass  # what is left of the library's threads is daemons, which end with their sockets' time-outs

    def _error(self, text: str) -> DriverError:
        return DriverError(f"arm {self.arm.name}: xarm {self.config.address}: {text}")

    def _within(self, call: Callable[[], Any], what: str) -> None:
        """Do what may block for `patience` s at most."""
        ended: list[str] = []

        def run() -> None:
            try:
                call()
                ended.append("")
            except Exception as error:
                ended.append(str(error))

        thread = threading.Thread(target=run, name=f"{self.arm.name} xarm {what}", daemon=True)
        thread.start()
        thread.join(self.config.patience)
        if not ended or ended[0]:
            found = ended[0] if ended else f"no end after {self.config.patience:g} s"
            raise self._error(f"expected {what}, found: {found}")

    def _do(self, api: XArmAPI, name: str, *arguments: Any, **keywords: Any) -> None:
        code = getattr(api, name)(*arguments, **keywords)
        if code:
            raise self._error(f"{name}: expected code 0, found {code}")

    def _prepare(self, api: XArmAPI) -> None:
        """Check what is there, clear what can be cleared, and let the arm hold in servo mode."""
        api.set_timeout(self.config.timeout)
        if api.axis != len(self.arm.joints):
            raise self._error(f"expected an arm of {len(self.arm.joints)} joints, found one of {api.axis}")
        api.clean_error()
        api.clean_warn()
        code, found = api.get_err_warn_code()
        if code or found[0]:
            raise self._error(f"expected no error after clearing it, found {_name(found[0]) if not code else code}")
        if self.config.wrench:
            self._do(api, "set_ft_sensor_enable", 1)
        # Each holds where the arm is: neither enabling nor a change of mode brings a target along.
        self._do(api, "motion_enable", True)
        self._do(api, "set_mode", _SERVO)
        self._do(api, "set_state", 0)
        end = time.monotonic() + 2.0
        while not self._ready():
            if time.monotonic() > end:
                found = "none" if self._report is None else f"mode {self._report.mode}, state {self._report.state}"
                raise self._error(f"expected reports of mode {_SERVO} and a state that moves, found {found}")
            time.sleep(0.01)
        if self.config.wrench and self._report.wrench is None:
            raise self._error("expected the readings of a force-torque sensor, found a report without them")

    def _ready(self) -> bool:
        report = self._report
        return (
            report is not None and report.mode == _SERVO and report.state not in _STATES
            and len(self._window) == _WINDOW and self.clock() - report.stamp < self.config.stale
        )  # fmt: skip

    def _prepare_gripper(self, api: XArmAPI) -> None:
        # Where the box has it, a second port for the gripper keeps its slow serial line out of the arm's way.
        api.set_rs485_use_503_port(True)
        self._do(api, "clean_gripper_error")
        self._do(api, "set_gripper_mode", 0)
        self._do(api, "set_gripper_enable", True)
        self._do(api, "set_gripper_speed", self.config.gripper_speed)
        self._read_gripper(api)

    def _read_gripper(self, api: XArmAPI) -> None:
        found = api.get_gripper_position(check_baud=False)
        # With a fault of the gripper the library returns the code alone.
        code, position = found if isinstance(found, tuple) else (found, None)
        if code or position is None:
            raise self._error(f"get_gripper_position: expected code 0, found {code}")
        closed = self.config.gripper_closed
        self._opened = float(np.clip((position - closed) / (self.config.gripper_open - closed), 0.0, 1.0))

    def _heard(self, api: XArmAPI) -> None:
        """Take a report; the library's thread calls it. Its own properties are not used: they freeze the angles while
        there is an error of a servo or an emergency stop."""
        stamp, data = self.clock(), api.report_data
        count = len(self.arm.joints)
        position = np.array(data.actual_joint_angle[:count])
        effort = np.array(data.estimated_joint_torque[:count])
        wrench = np.array(data.ft_ext_force) if self.config.wrench and data.data_size >= 135 else None
        if api is not self._api or not np.all(np.isfinite(position)) or not np.all(np.isfinite(effort)):
            return
        self._window.append((stamp, position))
        first, begin = self._window[0]
        velocity = (position - begin) / (stamp - first) if stamp > first else np.zeros(count)
        with self._wake:
            self._report = _Report(stamp, position, velocity, effort, wrench, data.state, data.mode)
            if self._follows and data.mode != _SERVO:
                self._halt(api, f"in mode {data.mode}, which another client has set")
            elif self._follows and data.state in _STATES:
                self._halt(api, _STATES[data.state])

    def _halt(self, api: XArmAPI, why: str) -> None:
        """The controller does not follow any more, whoever wanted that; it stays so until connect."""
        with self._wake:
            if self._follows and self._api is api:
                self._follows, self._target, self._opening, self._halted = False, None, None, why
                self._asked = True
                self._wake.notify_all()

    def _fail(self, api: XArmAPI, why: str) -> str:
        """The connection is of no use any more. A thread of an earlier one, late from a call, has no say."""
        with self._wake:
            if self._api is api:
                self._follows, self._target = False, None
                self._fault = self._fault or why
            return self._fault

    def _stream(self, api: XArmAPI) -> None:
        """Send the newest target, and do what stop asks for, until the end."""
        sent: np.ndarray | None = None
        last = time.monotonic()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._ending or self._fresh or self._pending is not None, self.arm.period)
                if self._api is not api:
                    return
                stop, self._pending = self._pending, None
                target, self._fresh = self._target, False
                asked, self._asked = self._asked, False
                ending = self._ending
                lost = self._fault not in ("", "not connected")  # close() may have said the latter
            try:
                if lost:
                    pass  # it does not hear a stop either
                elif stop is not None:
                    self._stop(api, stop)
                elif ending:
                    api.set_state(4)
                elif asked:
                    self._ask(api)
                elif target is not None and self._follows:
                    now = time.monotonic()
                    if sent is None:
                        sent = self._report.position
                    most = (np.abs(target.velocity) + self.config.catch_up) * min(now - last, 2.0 * self.arm.period)
                    point = sent + np.clip(target.position - sent, -most, most)
                    last = now
                    if not np.array_equal(point, sent):
                        self._go(api, point)
                        sent = point
            except Exception as error:
                self._fail(api, f"expected an answer, found {error}")
            if ending:
                return
            if not api.connected:
                self._fail(api, "expected a connection, found that it is closed")

    def _go(self, api: XArmAPI, point: np.ndarray) -> None:
        code = api.set_servo_angle_j(point.tolist(), is_radian=True)
        if code in _REFUSED:
            self._halt(api, _REFUSED[code])
        elif code:
            self._fail(api, f"set_servo_angle_j: expected code 0 within {self.config.timeout:g} s, found {code}")

    def _ask(self, api: XArmAPI) -> None:
        """Why the controller stopped."""
        code, found = api.get_err_warn_code()
        if not code and found[0]:
            with self._wake:
                self._halted = f"stopped by {_name(found[0])}"

    def _stop(self, api: XArmAPI, category: int) -> None:
        if category > 0:
            api.set_state(4)
        if category == 1:
            end = time.monotonic() + 0.5
            while time.monotonic() < end and np.abs(self._report.velocity).max() > 0.01:
                time.sleep(0.01)
        if category < 2:
            api.motion_enable(False)
        if category == 0:
            api.set_state(4)

    def _grip(self, api: XArmAPI) -> None:
        """Move the gripper to its newest opening, and read where it is, until the end."""
        sent: float | None = None
        closed, span = self.config.gripper_closed, self.config.gripper_open - self.config.gripper_closed
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._ending, 0.05)
                opening = self._opening if self._follows else None
                if self._ending or self._fault or self._api is not api:
                    return
            try:
                if opening is not None and (sent is None or abs(opening - sent) > 0.005):
                    self._do(api, "set_gripper_position", closed + opening * span, wait=False, no_check=True)
                    sent = opening
                self._read_gripper(api)
            except Exception as error:
                if not self._ending:
                    self._fail(api, f"gripper: {error}")


def _name(code: int) -> str:
    return f"error {code} ({ControllerError(code).title['en']})"
