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

from vla_control.drivers.driver import ArmInfo, ArmState, ArmTarget, Capabilities, DriverError
from vla_control.drivers.linked import Link, LinkedArm

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
#: Held while an arm is connected: the library sets the default time-out of every socket of this program.
_SOCKETS = threading.Lock()
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


class _XarmLink(Link):
    """mode, reported: of the newest report, which is the state. window: positions of the last reports, for the
    velocity. sent, last: the newest point that the controller took, and when, s. asked: whether it stopped, and is to
    be asked why. finger: opening that the gripper was last told."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = self.reported = -1
        self.window: deque[tuple[float, np.ndarray]] = deque(maxlen=_WINDOW)
        self.sent: np.ndarray | None = None
        self.last = time.monotonic()
        self.asked = False
        self.finger: float | None = None


class XarmDriver(LinkedArm):
    """The driver "xarm".

    Stops: 2 is state 4 of the controller: it brakes, forgets its targets and holds with the motors on; 1 is that, and
    motors off with the brakes on when the arm stands; 0 is motors off and brakes on at once. All joints have brakes,
    the arm does not fall. The gripper keeps its grip in each of them. effort: N m, as the controller estimates it.
    """

    Config = XarmConfig
    KIND, EVERY = "xarm", 0.01

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

    def _make_link(self) -> _XarmLink:
        link = _XarmLink()
        link.device = XArmAPI(
            self.config.address, is_radian=True, do_not_open=True, report_type="real",
            check_is_pause=False, check_cmdnum_limit=False,
        )  # fmt: skip
        link.device.register_report_location_callback(
            lambda _: self._heard(link), report_cartesian=False, report_joints=False
        )
        return link

    def _open(self, link: _XarmLink) -> None:
        api = link.device

        def find() -> None:
            api.connect()
            if link.ending:  # it came too late
                api.disconnect()

        with _SOCKETS:
            default = socket.getdefaulttimeout()
            try:
                # The library asks a box that does not answer for minutes.
                self.within(find, "a control box that answers")
                self._prepare(link)
                if self.arm.gripper:
                    self._prepare_gripper(link)
            finally:
                socket.setdefaulttimeout(default)

    def _part(self, link: _XarmLink) -> None:
        try:
            self.within(link.device.disconnect, "an end of the connection")
        except DriverError:
            pass  # what is left of the library's threads is daemons, which end with their sockets' time-outs

    def _patience(self) -> float:
        return 2.0 * self.config.timeout + 1.0

    def _do(self, api: XArmAPI, name: str, *arguments: Any, **keywords: Any) -> None:
        code = getattr(api, name)(*arguments, **keywords)
        if code:
            raise self._error(f"{name}: expected code 0, found {code}")

    def _prepare(self, link: _XarmLink) -> None:
        """Check what is there, clear what can be cleared, and let the arm hold in servo mode."""
        api = link.device
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
        while not self._ready(link):
            if time.monotonic() > end:
                found = "none" if link.state is None else f"mode {link.mode}, state {link.reported}"
                raise self._error(f"expected reports of mode {_SERVO} and a state that moves, found {found}")
            time.sleep(0.01)
        if self.config.wrench and link.state.wrench is None:
            raise self._error("expected the readings of a force-torque sensor, found a report without them")

    def _ready(self, link: _XarmLink) -> bool:
        return (
            link.state is not None and link.mode == _SERVO and link.reported not in _STATES
            and len(link.window) == _WINDOW and self.clock() - link.state.stamp < self.config.stale
        )  # fmt: skip

    def _prepare_gripper(self, link: _XarmLink) -> None:
        api = link.device
        # Where the box has it, a second port for the gripper keeps its slow serial line out of the arm's way.
        api.set_rs485_use_503_port(True)
        self._do(api, "clean_gripper_error")
        self._do(api, "set_gripper_mode", 0)
        self._do(api, "set_gripper_enable", True)
        self._do(api, "set_gripper_speed", self.config.gripper_speed)
        self._read_gripper(link)

    def _read_gripper(self, link: _XarmLink) -> None:
        found = link.device.get_gripper_position(check_baud=False)
        # With a fault of the gripper the library returns the code alone.
        code, position = found if isinstance(found, tuple) else (found, None)
        if code or position is None:
            raise self._error(f"get_gripper_position: expected code 0, found {code}")
        closed = self.config.gripper_closed
        link.opened = float(np.clip((position - closed) / (self.config.gripper_open - closed), 0.0, 1.0))

    def _heard(self, link: _XarmLink) -> None:
        """Take a report; the library's thread calls it. Its own properties are not used: they freeze the angles while
        there is an error of a servo or an emergency stop."""
        stamp, data = self.clock(), link.device.report_data
        count = len(self.arm.joints)
        position = np.array(data.actual_joint_angle[:count])
        effort = np.array(data.estimated_joint_torque[:count])
        wrench = np.array(data.ft_ext_force) if self.config.wrench and data.data_size >= 135 else None
        if not np.all(np.isfinite(position)) or not np.all(np.isfinite(effort)):
            return
        link.window.append((stamp, position))
        first, begin = link.window[0]
        velocity = (position - begin) / (stamp - first) if stamp > first else np.zeros(count)
        with link.wake:
            link.state, link.mode, link.reported = (
                ArmState(stamp, position, velocity, effort, wrench),
                data.mode,
                data.state,
            )
            if link.follows and data.mode != _SERVO:
                self._stopped(link, f"in mode {data.mode}, which another client has set")
            elif link.follows and data.state in _STATES:
                self._stopped(link, _STATES[data.state])

    def _stopped(self, link: _XarmLink, why: str) -> None:
        """The controller does not follow any more; the thread asks it why."""
        with link.wake:
            link.asked = link.asked or link.follows
            link.halt(why)

    def _turn(self, link: _XarmLink, target: ArmTarget | None, stop: int | None) -> None:
        api = link.device
        if stop is not None:
            self._stop(link, stop)
        elif link.asked:
            link.asked = False
            self._ask(link)
        elif target is not None and link.follows:
            now = time.monotonic()
            sent = link.state.position if link.sent is None else link.sent
            most = (np.abs(target.velocity) + self.config.catch_up) * min(now - link.last, 2.0 * self.arm.period)
            point = sent + np.clip(target.position - sent, -most, most)
            link.last = now
            if not np.array_equal(point, sent):
                self._go(link, point)
            link.sent = point
        if not api.connected:
            link.fail("expected a connection, found that it is closed")

    def _go(self, link: _XarmLink, point: np.ndarray) -> None:
        code = link.device.set_servo_angle_j(point.tolist(), is_radian=True)
        if code in _REFUSED:
            self._stopped(link, _REFUSED[code])
        elif code:
            link.fail(f"set_servo_angle_j: expected code 0 within {self.config.timeout:g} s, found {code}")

    def _ask(self, link: _XarmLink) -> None:
        """Why the controller stopped."""
        code, found = link.device.get_err_warn_code()
        if not code and found[0]:
            with link.wake:
                link.halted = f"stopped by {_name(found[0])}"

    def _stop(self, link: _XarmLink, category: int) -> None:
        api = link.device
        if category > 0:
            api.set_state(4)
        if category == 1:
            end = time.monotonic() + 0.5
            while time.monotonic() < end and np.abs(link.state.velocity).max() > 0.01:
                time.sleep(0.01)
        if category < 2:
            api.motion_enable(False)
        if category == 0:
            api.set_state(4)

    def _grip(self, link: _XarmLink, opening: float | None) -> None:
        closed, span = self.config.gripper_closed, self.config.gripper_open - self.config.gripper_closed
        if opening is not None and (link.finger is None or abs(opening - link.finger) > 0.005):
            self._do(link.device, "set_gripper_position", closed + opening * span, wait=False, no_check=True)
            link.finger = opening
        self._read_gripper(link)


def _name(code: int) -> str:
    return f"error {code} ({ControllerError(code).title['en']})"
