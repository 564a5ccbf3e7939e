"""Arms of serial servos on one bus: what Dynamixel and Feetech have in common. A driver file shows only its protocol.

One thread talks to the bus, for a lost reply waits longer than a period: it writes the newest goals, reads all joints
by one sync read, and looks at the health of one servo more, in turn. `read` and `send` only exchange values with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import termios
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vla_control.drivers.driver import ArmDriver, ArmInfo, ArmState, ArmTarget, Capabilities, DriverError

#: Both families count 4096 ticks a turn; rad of one.
TICK = 2.0 * np.pi / 4096
#: Under this, rad/s, a joint stands; after so many s of a stop it is taken to.
_STANDS, _STOPPING = 0.05, 0.25


class NoReplyError(DriverError):
    """A reply was lost, late or spoilt; asking again may help."""


@dataclass(frozen=True)
class ServoConfig:
    """What every arm of serial servos is told. Lists are in the order of the joints; empty ones take the default.

    port, baud: the serial adapter and its speed, bit/s. ids: of the joints' servos. zero: tick at 0 rad, 2048. sign:
    1, or -1 where ticks grow against the joint, 1. low, high: ticks that targets stay between, 0 and 4095; from a
    place beyond, targets may only lead back. gripper_id: its servo. gripper_closed, gripper_open: its ticks at opening
    0 and 1. speed: most that a servo makes of itself, rad/s, above what the controller asks for. leader: torque stays
    off, the arm is only read. reply: s to wait for a reply, beyond its bytes; the latency timer of an FTDI adapter
    alone is 16 ms. stale: s without a state until the arm counts as lost.
    """

    port: str = "/dev/ttyUSB0"
    baud: int = 1_000_000
    ids: tuple[int, ...] = ()
    zero: tuple[int, ...] = ()
    sign: tuple[int, ...] = ()
    low: tuple[int, ...] = ()
    high: tuple[int, ...] = ()
    gripper_id: int = 0
    gripper_closed: int = 2048
    gripper_open: int = 3072
    speed: float = 3.5
    leader: bool = False
    reply: float = 0.02
    stale: float = 0.1


class PatientPort:
    """Mixed into the PortHandler of either SDK, which are of one descent: bytes that came late are thrown away before
    an instruction (Feetech's throws nothing away), reading waits for bytes instead of spinning, time does not jump
    with the wall clock, and how long to wait for a reply is a setting."""

    reply = 0.02

    def setupPort(self, cflag_baud: int) -> bool:
        done = super().setupPort(cflag_baud)
        self.ser.exclusive = True  # Two programs on one bus would read each other's replies.
        self.ser.timeout, self.ser.write_timeout = 0.001, 1.0
        return done

    def clearPort(self) -> None:
        self.ser.reset_input_buffer()

    def getCurrentTime(self) -> float:
        return time.monotonic() * 1e3

    def setPacketTimeout(self, packet_length: int) -> None:
        self.setPacketTimeoutMillis(1e3 * self.reply + self.tx_time_per_byte * packet_length)


class ServoBus:
    """Registers of servos, by either SDK. Raises NoReplyError for a reply that did not come or was spoilt, DriverError
    for a port that is gone. Replies to what was asked before are passed over (the SDKs only look at who replied).

    where: names arm and port in errors. Of a status packet: index of the id, of the length, of the error and of the
    data, and how many of the bytes that the length counts are not data.
    """

    id_at: ClassVar[int]
    length_at: ClassVar[int]
    error_at: ClassVar[int]
    data_at: ClassVar[int]
    not_data: ClassVar[int]
    #: Arguments that one SDK's syncReadTx and rxPacket have more than the other's.
    more: ClassVar[tuple[Any, ...]] = ()

    def __init__(self, where: str, sdk: Any, protocol: float, config: ServoConfig):
        self.where, self.sdk, self.config = where, sdk, config
        self._packets = sdk.PacketHandler(protocol)
        self._handler = type("Port", (PatientPort, sdk.PortHandler), {"reply": config.reply})
        self._port: Any = None
        self._misses = 0
        #: Error byte of each servo's last reply.
        self.errors: dict[int, int] = {}

    def open(self) -> None:
        self.close()
        port = self._handler(self.config.port)
        port.baudrate = self.config.baud
        self._port, self.errors = port, {}
        with self._port_errors():
            if not port.openPort():
                raise DriverError(f"{self.where}: expected a speed of the adapter, found {self.config.baud} bit/s")

    def close(self) -> None:
        port, self._port = self._port, None
        if port is not None and port.ser is not None:
            with contextlib.suppress(OSError, termios.error):
                port.closePort()

    def read(self, servo: int, address: int, size: int) -> bytes:
        """`size` bytes at `address` of one servo; asks twice."""
        try:
            return self._read(servo, address, size)
        except NoReplyError:
            return self._read(servo, address, size)

    def sync_read(self, servos: Iterable[int], address: int, size: int) -> dict[int, bytes]:
        """`size` bytes at `address` of every servo, by one instruction."""
        servos, more = list(servos), self._more_bytes(address)
        with self._port_errors():
            asked = address - more, size + more
            self._sent(self._packets.syncReadTx(self._port, *asked, servos, len(servos), *self.more))
            return {servo: self._reply(servo, size + more)[more:] for servo in servos}

    def sync_write(self, address: int, size: int, values: Mapping[int, int]) -> None:
        """Write to every servo by one instruction, which none replies to. values: by servo, unsigned or two's
        complement."""
        data: list[int] = []
        for servo, value in values.items():
            data += [servo, *(value & (1 << 8 * size) - 1).to_bytes(size, "little")]
        with self._port_errors():
            self._sent(self._packets.syncWriteTxOnly(self._port, address, size, data, len(data)))

    def ensure(self, address: int, size: int, values: Mapping[int, int], what: str) -> None:
        """Write and read back: right whatever a servo's level of status replies, and certain."""
        wrong = ""
        for _ in range(3):
            self.sync_write(address, size, values)
            for servo, value in values.items():
                found = int.from_bytes(self.read(servo, address, size), "little")
                if found != value & (1 << 8 * size) - 1:
                    wrong = f"{self.where}: servo {servo}: expected {what} to become {value}, found {found}"
                    break
            else:
                return
        raise DriverError(wrong)

    def reboot(self, servo: int) -> None:
        """Restart a servo and wait until it replies again."""
        with self._port_errors():
            self._packets.reboot(self._port, servo)
        end = time.monotonic() + 2.0
        while True:
            time.sleep(0.1)
            try:
                self.read(servo, 0, 2)
                return
            except NoReplyError:
                if time.monotonic() > end:
                    raise

    def _read(self, servo: int, address: int, size: int) -> bytes:
        more = self._more_bytes(address)
        with self._port_errors():
            self._sent(self._packets.readTx(self._port, servo, address - more, size + more))
            return self._reply(servo, size + more)[more:]

    def _more_bytes(self, address: int) -> int:
        """Bytes before `address` to read too: another number after each miss, by which a reply to an earlier question
        is known from one to this, for replies have no numbers."""
        return self._misses % 4 if address >= 4 else 0

    def _sent(self, result: int) -> None:
        if result != self.sdk.COMM_SUCCESS:
            self._port.is_using = False
            raise NoReplyError(f"{self.where}: expected an instruction to be sent, found {self._says(result)}")

    def _reply(self, servo: int, size: int) -> bytes:
        while True:
            packet, result = self._packets.rxPacket(self._port, *self.more)
            if result != self.sdk.COMM_SUCCESS:
                self._misses += 1
                raise NoReplyError(f"{self.where}: servo {servo}: expected {size} bytes, found {self._says(result)}")
            if packet[self.id_at] == servo and packet[self.length_at] - self.not_data == size:
                break
        self.errors[servo] = packet[self.error_at]
        return bytes(packet[self.data_at : self.data_at + size])

    def _says(self, result: int) -> str:
        return self._packets.getTxRxResult(result).split("]")[-1].strip().rstrip("!").lower()

    @contextlib.contextmanager
    def _port_errors(self):
        """What a port that is gone raises, as one DriverError."""
        if self._port is None:
            raise DriverError(f"{self.where}: expected an open port, found a closed one")
        try:
            yield
        except (OSError, termios.error) as error:
            raise DriverError(f"{self.where}: expected a serial port, found: {error}") from error
        finally:
            self._port.is_using = False


class ServoArm(ArmDriver):
    """An arm of serial servos. A protocol's driver says what its registers are, and what of a servo must be set."""

    #: In errors.
    KIND: ClassVar[str]
    #: Address and size of: position, velocity and current in one block; goal position; torque enable; what tells
    #: whether a servo is well, torque enable first.
    STATE: ClassVar[tuple[int, int]]
    GOAL: ClassVar[tuple[int, int]]
    TORQUE: ClassVar[tuple[int, int]] = (0, 1)
    HEALTH: ClassVar[tuple[int, int]]

    def __init__(self, arm: ArmInfo, config: ServoConfig, clock: Callable[[], float]):
        super().__init__(arm, config, clock)
        count = len(arm.joints)
        self.where = f"arm {arm.name}: {self.KIND} on {config.port}"
        ids = [int(servo) for servo in config.ids]
        self._moved = [*ids, config.gripper_id] if arm.gripper else ids
        self._zero, self._sign, self._low, self._high = (
            np.array(values or [default] * count, np.float64)
            for values, default in ((config.zero, 2048), (config.sign, 1), (config.low, 0), (config.high, 4095))
        )
        if (
            len(ids) != count
            or len(set(self._moved)) != len(self._moved)
            or any(len(values) != count for values in (self._zero, self._sign, self._low, self._high))
            or not (set(self._sign) <= {-1.0, 1.0} and np.all(self._low < self._high) and config.speed > 0.0)
            or (arm.gripper and config.gripper_closed == config.gripper_open)
        ):
            raise DriverError(
                f"{self.where}: expected for {count} joints as many different ids, and zero, sign (1 or -1), low and "
                f"high of as many or none, low below high, a speed above 0, and a gripper whose two places differ; "
                f"found {config}"
            )
        self.capabilities = Capabilities(
            frozenset({0}) if config.leader else frozenset({0, 1, 2}),
            rate=1.0 / arm.period,
            effort=self._has_effort(),
            gripper=arm.gripper,
            gripper_force=arm.gripper and not config.leader and self._has_gripper_force(),
        )
        self._bus = self._make_bus()
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: DriverError | None = DriverError(f"{self.where}: expected a connected arm, found none")
        self._halted, self._state = "not connected", None
        self._goal: dict[int, int] | None = None
        self._stop: int | None = None
        self._ends = False
        self._ticks = self._speeds = np.zeros(0)
        self._seen: dict[int, float] = {}
        #: Replies that were lost, late or spoilt since connect, each made up for by asking again.
        self.lost = 0

    # What a protocol says.

    @abstractmethod
    def _make_bus(self) -> ServoBus:
        """A closed bus."""

    @abstractmethod
    def _has_effort(self) -> bool:
        """Whether every joint's servo measures its current."""

    @abstractmethod
    def _has_gripper_force(self) -> bool:
        """Whether the gripper's largest force can be set."""

    @abstractmethod
    def _servos(self) -> list[int]:
        """All servos, those too that only follow another."""

    @abstractmethod
    def _prepare(self, servo: int) -> None:
        """Check model and settings of a servo before anything is written to all; end a fault where it can be."""

    @abstractmethod
    def _power_on(self, goals: Mapping[int, int]) -> None:
        """Set goals, speeds and watchdogs, and torque on."""

    @abstractmethod
    def _state_of(self, servo: int, block: bytes) -> tuple[int, float, float]:
        """Position, ticks, velocity, rad/s, and current, A, of a STATE block."""

    @abstractmethod
    def _is_alert(self, error: int) -> bool:
        """Whether the error byte of a reply says that the servo is not well."""

    @abstractmethod
    def _ill(self, servo: int, block: bytes) -> str:
        """Why the servo of a HEALTH block does not follow, "" if it does."""

    def _let_go(self) -> None:
        """The arm holds and the port will be closed: end what would then be a fault."""

    # What every arm does.

    def connect(self) -> None:
        self._finish()
        self.lost = 0
        try:
            self._bus.open()
            for servo in self._servos():
                self._prepare(servo)
            self._look(tries=5)
            if self.config.leader:
                for servo in self._servos():
                    if self._bus.read(servo, self.TORQUE[0], 1)[0]:
                        # Letting go by ourselves would drop an arm that another program holds.
                        raise DriverError(f"{self.where}: servo {servo}: expected a leader's torque off, found it on")
            else:
                self._power_on(dict(zip(self._moved, (int(tick) for tick in self._ticks))))
            self._halted = "leader: its torque is off" if self.config.leader else ""
            self._seen = dict.fromkeys(self._servos(), time.monotonic())
            for servo in self._servos():
                self._examine(servo, tries=3)
            if self._halted and not self.config.leader:
                raise DriverError(f"{self.where}: expected servos that are well, found {self._halted}")
            self._look(tries=5)
        except DriverError as error:
            self._error, self._halted = error, "not connected"
            self._bus.close()
            raise
        self._error, self._goal, self._stop, self._ends = None, None, None, False
        self._thread = threading.Thread(target=self._run, name=f"servos of {self.arm.name}", daemon=True)
        self._thread.start()

    def read(self) -> ArmState:
        with self._change:
            self._check_alive()
            return dataclasses.replace(self._state, halted=self._halted)

    def send(self, target: ArmTarget) -> None:
        self.check(target)
        ticks = np.rint(self._zero + self._sign * np.asarray(target.position, np.float64) / TICK)
        with self._change:
            self._check_alive()
            if self._halted:
                raise DriverError(f"{self.where}: expected an arm that follows, found: {self._halted}")
            here = self._ticks[: len(ticks)]
            low, high = np.minimum(self._low, here), np.maximum(self._high, here)
            if np.any(ticks < low) or np.any(ticks > high):
                raise ValueError(
                    f"{self.where}: target position: expected ticks from {low.tolist()} to {high.tolist()}, found "
                    f"{ticks.tolist()}"
                )
            goal = dict(zip(self._moved, (int(tick) for tick in ticks)))
            if target.gripper is not None and self.arm.gripper:
                closed, opened = self.config.gripper_closed, self.config.gripper_open
                goal[self.config.gripper_id] = round(closed + target.gripper * (opened - closed))
            self._goal = goal
            self._change.notify_all()

    def stop(self, category: int) -> int:
        done = self.stop_category(category)
        with self._change:
            self._goal = None
            if self._thread is not None and self._thread.is_alive():
                self._halted = f"stopped, category {done}"
                self._stop = done
                self._change.notify_all()
                # A hold or a power-off is on the wire after one cycle; the slowing down of category 1 is not awaited.
                self._change.wait_for(lambda: self._stop is None, timeout=5 * self.config.reply + 0.05)
                return done
        if done < 2 and not self.config.leader:
            # The thread ended with a fault; other servos may still listen. This is not replied to.
            with contextlib.suppress(DriverError):
                self._torque_off()
        return done

    def close(self) -> None:
        self._finish()
        self._error = DriverError(f"{self.where}: expected a connected arm, found a closed one")
        self._halted = "not connected"

    def _check_alive(self) -> None:
        """Raises DriverError unless there is a state that is not old. With the lock held."""
        if self._error is not None:
            raise DriverError(str(self._error)) from self._error
        age = self.clock() - self._state.stamp
        if age > 2.0 * self._patience():
            raise DriverError(f"{self.where}: expected a state of the last {self._patience():.2g} s, found {age:.2g} s")

    def _patience(self) -> float:
        return max(self.config.stale, 3.0 * self.arm.period)

    def _finish(self) -> None:
        """Hold, end the thread and close the port."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with self._change:
                self._ends = True
                self._change.notify_all()
            thread.join()
        self._bus.close()

    def _run(self) -> None:
        """The thread."""
        last = begin = time.monotonic()
        turn = 0
        try:
            while True:
                with self._change:
                    wait = self.arm.period - (time.monotonic() - begin)
                    self._change.wait_for(
                        lambda: self._goal is not None or self._stop is not None or self._ends, max(0.0, wait)
                    )
                    goal, self._goal = self._goal, None
                    stop, ends = self._stop, self._ends
                begin = time.monotonic()
                if ends:
                    if not self._halted:
                        self._hold()
                    if not self.config.leader:
                        self._let_go()
                    return
                try:
                    if stop is not None and not self.config.leader:
                        self._do_stop(stop)
                    elif goal is not None and not self._halted:
                        self._bus.sync_write(*self.GOAL, goal)
                    self._look()
                    last = time.monotonic()
                    ill = [servo for servo, error in self._bus.errors.items() if self._is_alert(error)]
                    servos = self._servos()
                    turn = (turn + 1) % len(servos)
                    self._examine(ill[0] if ill and not self._halted else servos[turn])
                except NoReplyError as error:
                    self.lost += 1
                    now = time.monotonic()
                    if now - last > self._patience():
                        raise error
                    quiet = [servo for servo, seen in self._seen.items() if now - seen > 10.0 * self._patience()]
                    if quiet:
                        raise DriverError(f"{self.where}: servo {quiet[0]}: expected a reply, found none") from error
                finally:
                    self._stopped(stop)
        except DriverError as error:
            with self._change:
                self._error, self._stop = error, None
                self._change.notify_all()

    def _look(self, tries: int = 1) -> None:
        """Read all joints and the gripper."""
        while True:
            try:
                begin = self.clock()
                blocks = self._bus.sync_read(self._moved, *self.STATE)
                break
            except NoReplyError:
                tries -= 1
                self.lost += tries > 0
                if tries <= 0:
                    raise
        parts = np.array([self._state_of(servo, block) for servo, block in blocks.items()])
        count = len(self.arm.joints)
        position = self._sign * (parts[:count, 0] - self._zero) * TICK
        velocity = self._sign * parts[:count, 1]
        effort = self._sign * parts[:count, 2] if self.capabilities.effort else None
        opening = None
        if self.arm.gripper:
            closed, opened = self.config.gripper_closed, self.config.gripper_open
            opening = float(np.clip((parts[count, 0] - closed) / (opened - closed), 0.0, 1.0))
        now = time.monotonic()
        with self._change:
            self._seen.update(dict.fromkeys(self._moved, now))
            self._ticks, self._speeds = parts[:, 0], parts[:, 1]
            self._state = ArmState(
                0.5 * (begin + self.clock()), position, velocity, effort, gripper=opening, halted=self._halted
            )

    def _examine(self, servo: int, tries: int = 1) -> None:
        """Look at one servo's health; hold the arm when it is not well."""
        while True:
            try:
                block = self._bus.read(servo, *self.HEALTH)
                break
            except NoReplyError:
                tries -= 1
                if tries <= 0:
                    raise
        self._seen[servo] = time.monotonic()
        why = self._ill(servo, block)
        if why and not self._halted:
            with self._change:
                self._halted, self._goal = f"servo {servo}: {why}", None
            with contextlib.suppress(NoReplyError):
                self._hold()
                self._look()

    def _hold(self) -> None:
        """Stay where the arm is now. A gripper that stands keeps its goal, for it may grip something by it."""
        self._look(tries=3)
        joints = len(self.arm.joints)
        self._bus.sync_write(
            *self.GOAL,
            {
                servo: int(tick)
                for i, (servo, tick) in enumerate(zip(self._moved, self._ticks))
                if i < joints or abs(self._speeds[i]) > _STANDS
            },
        )

    def _do_stop(self, category: int) -> None:
        if category > 0:
            # Unread positions are no reason to keep the power on; the goal is at most a period ahead.
            with contextlib.suppress(NoReplyError):
                self._hold()
            self._stopped(category)
        end = time.monotonic() + _STOPPING
        while category == 1 and self._stop is None and time.monotonic() < end:
            with contextlib.suppress(NoReplyError):
                self._look()
                if np.all(np.abs(self._state.velocity) < _STANDS):
                    break
        if category < 2:
            self._torque_off()

    def _stopped(self, category: int | None) -> None:
        """A stop of `category` is on the wire; another that was asked for meanwhile is still to be done."""
        with self._change:
            if self._stop == category:
                self._stop = None
            self._change.notify_all()

    def _torque_off(self) -> None:
        # Twice: nobody replies to it, and a spoilt one must not leave the torque on.
        for _ in range(2):
            self._bus.sync_write(*self.TORQUE, dict.fromkeys(self._servos(), 0))
