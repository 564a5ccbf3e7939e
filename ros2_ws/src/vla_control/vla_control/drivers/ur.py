"""Universal Robots arms of the e-Series (UR3e to UR30) and CB3, over RTDE and a program that runs on the robot.

No library is needed. The program below is sent as URScript and servos at the robot's own rate towards targets that
arrive in RTDE input registers, 24 and up: the range that fieldbuses cannot touch. It ends, with a controlled stop, as
soon as targets cease or its session number is taken from the registers, whether or not the host is still there; so a
program of an earlier connection can never go on.

The library ur_rtde is not used. When its RTDEControlInterface was cut off and mended (1.6.5), it connected again by
itself and started its program anew, without the watchdog that had been set; its sendCommand then repeats the command
(1.6.0). Here nothing may move before `connect` is called. It also keeps Python's lock while it waits for the robot.

Sources: UR, Real-Time Data Exchange (RTDE) guide; UR, Script Manual e-Series, "Module motion" (servoj, stopj) and
"Module interfaces" (registers, rtde_set_watchdog); UR, Dashboard Server e-Series, port 29999.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_control.drivers.driver import ArmDriver, ArmInfo, ArmState, ArmTarget, Capabilities, DriverError

DASHBOARD, SCRIPT, RTDE = 29999, 30002, 30004

#: The program on the robot. Input: integer 24 number of the target, 0 before the first, 25 session; floats 24 to 29
#: target, rad. Output: integer 24 session while it runs, 25 number of the newest target that was taken.
PROGRAM = """\
def vla_servo():
  q = get_target_joint_positions()
  d = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
  number = 0
  last = 0
  left = 0
  idle = 0
  i = 0
  write_output_integer_register(25, 0)
  write_output_integer_register(24, {session})
  while (read_input_integer_register(25) == {session}) and (idle < {idle}):
    number = read_input_integer_register(24)
    if number != last:
      if last == 0:
        q = get_target_joint_positions()
        rtde_set_watchdog("input_int_register_24", {frequency}, "stop")
      end
      i = 0
      while i < 6:
        d[i] = (read_input_float_register(24 + i) - q[i]) / {split}
        i = i + 1
      end
      last = number
      left = {split}
      idle = 0
      write_output_integer_register(25, number)
    elif last > 0:
      idle = idle + 1
    end
    if last > 0:
      if left > 0:
        i = 0
        while i < 6:
          q[i] = q[i] + d[i]
          i = i + 1
        end
        left = left - 1
      end
      servoj(q, t={step}, lookahead_time={lookahead}, gain={gain})
    else:
      sync()
    end
  end
  stopj({deceleration})
  write_output_integer_register(24, 0)
end
"""

_OUTPUTS = {
    "actual_q": "VECTOR6D",
    "actual_qd": "VECTOR6D",
    "actual_current": "VECTOR6D",
    "actual_TCP_force": "VECTOR6D",
    "actual_TCP_pose": "VECTOR6D",
    "tcp_offset": "VECTOR6D",
    "robot_mode": "INT32",
    "runtime_state": "UINT32",
    "safety_status_bits": "UINT32",
    "output_int_register_24": "INT32",
    "output_int_register_25": "INT32",
}
_INPUTS = {"input_int_register_24": "INT32", "input_int_register_25": "INT32"} | {
    f"input_double_register_{i}": "DOUBLE" for i in range(24, 30)
}
_FORMATS = {"VECTOR6D": "6d", "DOUBLE": "d", "INT32": "i", "UINT32": "I"}
_PACKAGE = struct.Struct(">B" + "".join(_FORMATS[kind] for kind in _OUTPUTS.values()))
_COMMAND = struct.Struct(">B" + "".join(_FORMATS[kind] for kind in _INPUTS.values()))

#: robot_mode and runtime_state of the RTDE guide.
_RUNNING, _IDLE, _PLAYING, _STOPPED = 7, 5, 2, 1
_MODES = {-1: "no controller", 0: "disconnected", 1: "confirm safety", 2: "booting", 3: "power off", 4: "power on",
          5: "idle, brakes on", 6: "backdrive", 7: "running", 8: "updating firmware"}  # fmt: skip
#: safety_status_bits of the RTDE guide, the gravest first.
_FAULT, _VIOLATION, _EMERGENCY, _PROTECTIVE, _SAFEGUARD = 1 << 9, 1 << 8, 0b1110_0000, 1 << 2, 1 << 4
_SAFETY = {_FAULT: "safety fault", _VIOLATION: "safety violation", _EMERGENCY: "emergency stop",
           _PROTECTIVE: "protective stop", _SAFEGUARD: "safeguard stop", 1 << 3: "recovery mode",
           1 << 10: "stopped due to safety"}  # fmt: skip
#: Of each series: major version, first minor one with all that is used here, Hz of the controller.
_SERIES = {"e": (5, 6, 500), "cb3": (3, 12, 125)}


@dataclass(frozen=True)
class UrConfig:
    """host: address of the controller. series: "e" (500 Hz) or "cb3" (125 Hz). serial: serial number of the arm, ""
    for any (e-Series only).

    watchdog: s without a new target after which the program on the robot stops the arm; the next one needs connect.
    lookahead: s, 0.03 to 0.2, and gain, 100 to 2000, of servoj: how soft it follows. deceleration: rad/s^2 of the
    leading joint, of every stop by the program.
    timeout: s without a state after which the controller counts as cut off. answer: s that connect waits for each
    answer. start: s that switching on, releasing the brakes and starting the program may take.
    power_on: whether connect may switch the arm on and release its brakes; unlock: whether connect may unlock a
    protective stop (look for its cause first). Where they may not, a person does it at the pendant.
    """

    host: str
    series: str = "e"
    serial: str = ""
    watchdog: float = 0.1
    lookahead: float = 0.05
    gain: float = 300.0
    deceleration: float = 8.0
    timeout: float = 0.1
    answer: float = 2.0
    start: float = 30.0
    power_on: bool = True
    unlock: bool = True

    def __post_init__(self) -> None:
        checks = {
            "series": self.series in _SERIES,
            "watchdog": 0.02 <= self.watchdog <= 1.0,
            "lookahead": 0.03 <= self.lookahead <= 0.2,
            "gain": 100.0 <= self.gain <= 2000.0,
            "deceleration": 0.5 <= self.deceleration <= 40.0,
            "timeout": 0.02 <= self.timeout <= 5.0,
            "answer": 0.1 <= self.answer <= 60.0,
            "start": 1.0 <= self.start <= 300.0,
        }
        for name, sound in checks.items():
            if not sound:
                raise ValueError(f"{name}: expected a value in the range that UrConfig names, found "
                                 f"{getattr(self, name)!r}")  # fmt: skip


@dataclass(frozen=True)
class _Package:
    """One data package, as it came. stamp: s of the driver's clock."""

    stamp: float
    position: np.ndarray
    velocity: np.ndarray
    current: np.ndarray
    force: np.ndarray
    pose: np.ndarray
    offset: np.ndarray
    mode: int
    runtime: int
    safety: int
    session: int
    taken: int

    def unsafe(self) -> str:
        """What the safety system or the lack of power forbids, "" for nothing."""
        for bits, text in _SAFETY.items():
            if self.safety & bits:
                return text
        return "" if self.mode == _RUNNING else f"arm not running: {_MODES.get(self.mode, self.mode)}"


class UrDriver(ArmDriver):
    """The driver "ur". No gripper: on a UR that is a device of its own."""

    Config = UrConfig

    def __init__(self, arm: ArmInfo, config: UrConfig, clock: Callable[[], float]):
        super().__init__(arm, config, clock)
        self._name = f"arm {arm.name}: ur {config.host}"
        if len(arm.joints) != 6 or arm.gripper:
            raise DriverError(f"{self._name}: expected 6 joints and no gripper, found {len(arm.joints)} and gripper: "
                              f"{str(arm.gripper).lower()}")  # fmt: skip
        self._rate = _SERIES[config.series][2]
        if not 1.0 / self._rate <= arm.period <= config.watchdog / 2:
            raise DriverError(
                f"{self._name}: expected a period of {1.0 / self._rate:g} s to {config.watchdog / 2:g} s, half the "
                f"watchdog, found {arm.period:g} s"
            )
        self.capabilities = Capabilities(frozenset({0, 1, 2}), rate=float(self._rate), effort=True, wrench=True)
        self._socket: socket.socket | None = None
        self._receiver: threading.Thread | None = None
        self._stopper: threading.Thread | None = None
        self._ends = threading.Event()
        self._forget()

    def _forget(self) -> None:
        self._newest: _Package | None = None
        self._fault = "not connected"  # Why there is no state.
        self._halted = "not connected"  # Why targets are not taken.
        self._session = self._number = self._recipe = 0
        self._taken, self._taken_at, self._waits = 0, 0.0, False
        self._buffer = b""

    # What a driver does.

    def connect(self) -> None:
        self._let_go()
        try:
            with self._dashboard(self.config.answer) as dashboard:
                self._identify(dashboard)
                self._open_rtde()
                self._session = random.randrange(1, 2**31)
                # Takes the session from any program of this driver that is paused, so that it ends when it goes on.
                self._command(0, np.zeros(6))
                self._ready_arm(dashboard)
                self._start_program()
        except (OSError, struct.error) as error:
            self._let_go()
            raise DriverError(f"{self._name}: expected an answer, found: {error or type(error).__name__}") from error
        except DriverError:
            self._let_go()
            raise
        self._halted = ""

    def read(self) -> ArmState:
        package, fault = self._newest, self._fault
        if package is None or fault:
            raise DriverError(f"{self._name}:{RTDE}: expected a state, found: {fault}")
        age = self.clock() - package.stamp
        if age > self.config.timeout:
            self._halted = self._halted or "cut off"
            raise DriverError(
                f"{self._name}:{RTDE}: expected a state every {1.0 / self._rate:g} s, found none for {age:.2f} s"
            )
        return ArmState(
            package.stamp,
            package.position,
            package.velocity,
            effort=package.current,
            wrench=_wrench(package, at_flange=self.config.series == "e"),
            halted=package.unsafe() or self._halted,
        )

    def send(self, target: ArmTarget) -> None:
        self.check(target)
        if target.gripper is not None:
            raise ValueError(f"{self._name}: target gripper: expected none, found {target.gripper}")
        package = self._newest
        if self._fault or self._halted or package is None:
            raise DriverError(
                f"{self._name}: expected an arm that follows, found: {self._fault or self._halted or 'no state'}"
            )
        if self._waits and self.clock() - self._taken_at > self.config.watchdog + self.config.timeout:
            self._halted = "the program on the robot takes no targets"
            raise DriverError(f"{self._name}: expected target {self._number} to be taken, found {self._taken}")
        if not self._waits:
            self._waits, self._taken_at = True, self.clock()
        self._number = self._number % (2**31 - 1) + 1
        try:
            self._command(self._number, target.position)
        except OSError as error:
            self._fault = f"{error or type(error).__name__}"
            raise DriverError(f"{self._name}:{RTDE}: expected to send a target, found: {error}") from error

    def stop(self, category: int) -> int:
        done = self.stop_category(category)
        if self._socket is None:
            return done
        self._halted = f"stopped, category {done}"
        self._session = 0
        with contextlib.suppress(OSError):
            self._command(self._number, np.zeros(6))
        if done < 2 and (self._stopper is None or not self._stopper.is_alive()):
            self._stopper = threading.Thread(target=self._power_off, args=(done,), name=f"{self.arm.name}-stop")
            self._stopper.daemon = True
            self._stopper.start()
        return done

    def close(self) -> None:
        self._let_go()

    # Connecting, step by step.

    def _identify(self, dashboard: _Dashboard) -> None:
        """That it is this arm, and that it may be controlled from here."""
        if self.config.series == "e" and "true" not in (answer := dashboard.ask("is in remote control")).lower():
            raise DriverError(f"{self._name}:{DASHBOARD}: expected remote control to be on, found {answer!r}; "
                              "choose Remote Control at the pendant")  # fmt: skip
        if self.config.serial and (answer := dashboard.ask("get serial number")) != self.config.serial:
            raise DriverError(
                f"{self._name}:{DASHBOARD}: expected serial number {self.config.serial}, found {answer!r}"
            )

    def _open_rtde(self) -> None:
        """Protocol, version, recipes, start; then the receiver runs."""
        self._socket = socket.create_connection((self.config.host, RTDE), self.config.answer)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._ask(b"V", struct.pack(">H", 2)) != b"\1":
            raise DriverError(f"{self._name}:{RTDE}: expected RTDE protocol version 2, found that it is refused")
        version = struct.unpack(">4I", self._ask(b"v"))
        major, minor, rate = _SERIES[self.config.series]
        if version[0] != major or version[1] < minor:
            raise DriverError(
                f"{self._name}:{RTDE}: expected a controller of series {self.config.series}, version {major}.{minor} "
                f"or a later {major}, found {'.'.join(map(str, version))}"
            )
        self._set_up(b"O", struct.pack(">d", rate), _OUTPUTS)
        self._recipe = self._set_up(b"I", b"", _INPUTS)
        if self._ask(b"S") != b"\1":
            raise DriverError(f"{self._name}:{RTDE}: expected the data to start, found that it is refused")
        self._ends.clear()
        self._fault = ""
        self._receiver = threading.Thread(target=self._receive, name=f"{self.arm.name}-rtde", daemon=True)
        self._receiver.start()
        self._until(lambda state: True, self.config.answer, "a first state")

    def _set_up(self, kind: bytes, head: bytes, wanted: dict[str, str]) -> int:
        answer = self._ask(kind, head + ",".join(wanted).encode())
        found = answer[1:].decode("latin-1").split(",")
        if not answer[0] or found != list(wanted.values()):
            wrong = [f"{name} {own}" for (name, expected), own in zip(wanted.items(), found) if own != expected]
            raise DriverError(
                f"{self._name}:{RTDE}: expected every variable to be there and free (IN_USE: another client, or this "
                f"one before it was cut off, has it), found {', '.join(wrong) or answer}"
            )
        return answer[0]

    def _ready_arm(self, dashboard: _Dashboard) -> None:
        """No other program, no stop, power on, brakes off."""
        state = self._state()
        if state.safety & (_FAULT | _VIOLATION | _EMERGENCY | _SAFEGUARD):
            raise DriverError(f"{self._name}: expected an arm free to move, found: {state.unsafe()}; a person ends it "
                              "at the arm")  # fmt: skip
        if state.runtime != _STOPPED:
            dashboard.ask("stop")
            self._until(lambda state: state.runtime == _STOPPED, self.config.start, "the running program to stop")
        if state.safety & _PROTECTIVE:
            if not self.config.unlock:
                raise DriverError(f"{self._name}: expected an arm free to move, found: protective stop; unlock it at "
                                  "the pendant")  # fmt: skip
            self._unlock(dashboard)
        if self._state().mode != _RUNNING:
            if not self.config.power_on:
                raise DriverError(f"{self._name}: expected an arm with power on, found: {self._state().unsafe()}")
            if self._state().mode < _IDLE:
                dashboard.ask("power on")
                self._until(lambda state: state.mode >= _IDLE, self.config.start, "the arm to switch on")
            dashboard.ask("brake release")
            self._until(lambda state: state.mode == _RUNNING, self.config.start, "the brakes to release")
        if unsafe := self._state().unsafe():
            raise DriverError(f"{self._name}: expected an arm free to move, found: {unsafe}")

    def _unlock(self, dashboard: _Dashboard) -> None:
        """The controller refuses for 5 s after a protective stop."""
        end = time.monotonic() + 6.0 + self.config.answer
        dashboard.ask("close safety popup")
        while "releasing" not in (answer := dashboard.ask("unlock protective stop")):
            if time.monotonic() > end:
                raise DriverError(f"{self._name}:{DASHBOARD}: expected the protective stop to unlock, found {answer!r}")
            time.sleep(0.25)
        self._until(lambda state: not state.safety & _PROTECTIVE, self.config.start, "the protective stop to end")

    def _start_program(self) -> None:
        """Send the program and wait until it runs; the socket stays open until then, so that nothing of it is lost."""
        split = max(1, round(self.arm.period * self._rate))
        # The controller's own watchdog comes second: its stop is not as soft as the program's.
        frequency = 1.0 / (self.config.watchdog + 0.1)
        program = PROGRAM.format(
            session=self._session, idle=max(2, round(self.config.watchdog * self._rate)), split=split,
            step=1.0 / self._rate, frequency=round(frequency, 3), lookahead=self.config.lookahead,
            gain=self.config.gain, deceleration=self.config.deceleration,
        )  # fmt: skip
        with socket.create_connection((self.config.host, SCRIPT), self.config.answer) as script:
            script.sendall(program.encode())
            session = self._session
            self._until(
                lambda state: state.session == session and state.runtime == _PLAYING, self.config.start,
                f"the program sent to port {SCRIPT} to run",
            )  # fmt: skip

    def _until(self, reached: Callable[[_Package], bool], wait: float, what: str) -> None:
        end = time.monotonic() + wait
        while self._newest is None or not reached(self._newest):
            if time.monotonic() > end or self._fault:
                found = self._fault or "no state"
                if self._newest and not self._fault:
                    found = f"{self._newest.unsafe() or 'no stop'}, program state {self._newest.runtime}"
                raise DriverError(f"{self._name}: expected {what}, found after {wait:g} s: {found}")
            time.sleep(0.002)

    def _state(self) -> _Package:
        if self._newest is None:
            raise DriverError(f"{self._name}:{RTDE}: expected a state, found: {self._fault or 'none'}")
        return self._newest

    # RTDE.

    def _ask(self, kind: bytes, body: bytes = b"") -> bytes:
        """The answer to one request, before the data starts. Raises OSError, DriverError."""
        self._socket.sendall(struct.pack(">Hc", 3 + len(body), kind) + body)
        end = time.monotonic() + self.config.answer
        while time.monotonic() < end:
            for found, answer in self._packages():
                if found == kind:
                    return answer
            data = self._socket.recv(4096)
            if not data:
                break
            self._buffer += data
        raise DriverError(f"{self._name}:{RTDE}: expected an answer to request {kind.decode()}, found none")

    def _packages(self) -> Iterator[tuple[bytes, bytes]]:
        """The whole packages that have come. Raises DriverError for what cannot be one."""
        while len(self._buffer) >= 3:
            size, kind = struct.unpack_from(">Hc", self._buffer)
            if size < 3 or kind not in b"VvMUOISP":
                raise DriverError(f"{self._name}:{RTDE}: expected an RTDE package, found {self._buffer[:16].hex()}")
            if len(self._buffer) < size:
                return
            body, self._buffer = self._buffer[3:size], self._buffer[size:]
            yield kind, body

    def _receive(self) -> None:
        """The receiver: keeps the newest state, and why the arm does not follow, until `close` or a fault."""
        own = self._socket
        try:
            while not self._ends.is_set():
                if not select.select([own], [], [], 0.05)[0]:
                    continue
                data = own.recv(65536)
                if not data:
                    raise DriverError("the controller closed the connection")
                self._buffer += data
                for kind, body in self._packages():
                    if kind == b"U":
                        self._take(body)
        except (OSError, ValueError, DriverError) as error:
            if not self._ends.is_set():
                self._fault = str(error) or type(error).__name__

    def _take(self, body: bytes) -> None:
        if len(body) != _PACKAGE.size:
            raise DriverError(f"a data package of {len(body)} B instead of {_PACKAGE.size} B")
        values = _PACKAGE.unpack(body)[1:]
        vectors = np.array(values[:36], np.float64).reshape(6, 6)
        package = _Package(self.clock(), *vectors, *values[36:])
        # Bytes that slipped would be numbers too.
        if not (np.abs(vectors) < 1e5).all() or package.mode not in _MODES or package.runtime not in range(6):
            raise DriverError(f"a state that makes no sense: {body.hex()}")
        if package.taken != self._taken:
            self._taken, self._taken_at = package.taken, package.stamp
        if not self._halted:
            # What halts an arm, halts it until `connect`, even if it comes to an end by itself.
            ran = package.session == self._session and package.runtime == _PLAYING
            self._halted = package.unsafe() or ("" if ran else "the program on the robot has ended")
        self._newest = package

    def _command(self, number: int, position: np.ndarray) -> None:
        """Write the registers. Raises OSError; does not wait."""
        body = _COMMAND.pack(self._recipe, number, self._session, *map(float, position))
        package = struct.pack(">Hc", 3 + len(body), b"U") + body
        if self._socket.send(package, socket.MSG_DONTWAIT) != len(package):
            raise OSError("the controller takes no more data")

    # Stopping.

    def _power_off(self, category: int) -> None:
        """Category 1 waits until the arm stands, at most for 2 s."""
        end = self.clock() + (2.0 if category == 1 else 0.0)
        while self.clock() < end and not self._fault:
            package = self._newest
            if package and package.session == 0 and np.abs(package.velocity).max() < 0.01:
                break
            time.sleep(0.005)
        with contextlib.suppress(OSError, DriverError), self._dashboard(1.0) as dashboard:
            dashboard.ask("power off")

    def _let_go(self) -> None:
        """Stop the program, end the threads, close the sockets."""
        if self._stopper is not None:
            self._stopper.join(5.0)
            self._stopper = None
        self._halted = self._halted or "not connected"
        if self._socket is not None:
            self._session = 0
            with contextlib.suppress(OSError):
                self._command(self._number, np.zeros(6))
                # Half a close: to close with data unread would throw away what the controller has not read yet.
                self._socket.shutdown(socket.SHUT_WR)
            if self._receiver is not None:
                self._receiver.join(0.2)
                self._ends.set()
                self._receiver.join(2.0)
                self._receiver = None
            self._socket.close()
            self._socket = None
        self._forget()

    @contextlib.contextmanager
    def _dashboard(self, timeout: float) -> Iterator[_Dashboard]:
        with socket.create_connection((self.config.host, DASHBOARD), timeout) as own:
            dashboard = _Dashboard(own, self._name)
            dashboard.line()  # "Connected: Universal Robots Dashboard Server"
            yield dashboard


class _Dashboard:
    """One connection to the dashboard server: a line out, a line back."""

    def __init__(self, own: socket.socket, name: str):
        self._own, self._name, self._buffer = own, name, b""

    def ask(self, command: str) -> str:
        self._own.sendall(command.encode() + b"\n")
        return self.line()

    def line(self) -> str:
        while b"\n" not in self._buffer:
            data = self._own.recv(4096)
            if not data:
                raise DriverError(f"{self._name}:{DASHBOARD}: expected an answer, found that the connection was closed")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode("utf-8", "replace").strip()


def _rotation(vector: np.ndarray) -> np.ndarray:
    """(3, 3) of a rotation vector, rad."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross


def _wrench(package: Any, at_flange: bool) -> np.ndarray:
    """actual_TCP_force about the tool centre point and in its frame, (6,).

    The controller gives it along the axes of the base; about the flange on an e-Series, about the tool centre point on
    a CB3 (Universal_Robots_ROS2_Driver, pull request 1287).
    """
    tool = _rotation(package.pose[3:])
    force, torque = tool.T @ package.force[:3], tool.T @ package.force[3:]
    if at_flange:
        lever = _rotation(package.offset[3:]).T @ package.offset[:3]  # Flange to tool centre point, in the tool frame.
        torque = torque - np.cross(lever, force)
    return np.concatenate([force, torque])
