"""AgileX Piper: six joints and a gripper on CAN, 1 Mbit/s. Needs python-can.

The frames are those of piper_sdk 0.6.2 (protocol V2, firmware S-V1.5-2 and later; its piper_msgs/msg_v2). Its interface
is not used, because it keeps faults from us: a frame that cannot be sent is only logged, the six joint angles carry the
stamp of the newest of three frames, so that a lost one is not seen, and its threads outlive DisconnectPort, one of
them waiting in recv for ever. The tests hold our frames against its parser.

The arm has no watchdog: when frames cease it goes to the last target it got, and stays. So targets must be near, as the
safety controller's are, and whoever stops must send the place to stay at. It has no brakes: without power it falls.
"""

from __future__ import annotations

import re
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import can
import numpy as np

from vla_control.drivers.driver import ArmDriver, ArmInfo, ArmState, ArmTarget, Capabilities, DriverError

# From the arm (msg_v2/feedback).
STATUS, GRIPPER, FIRMWARE = 0x2A1, 0x2A8, 0x4AF
JOINTS = (0x2A5, 0x2A6, 0x2A7)
MOTORS = tuple(range(0x251, 0x257))
DRIVES = tuple(range(0x261, 0x267))
# To the arm (msg_v2/transmit).
STOP, MODE, GRIPPER_GOAL, ENABLE, JOINT_SETTING = 0x150, 0x151, 0x159, 0x471, 0x475
JOINT_GOALS = (0x155, 0x156, 0x157)

#: Unit of the angles in both directions, 0.001 degree, in rad; of the gripper's stroke, in m.
ANGLE, STROKE = np.deg2rad(0.001), 1e-6
#: Joint torque for each ampere of the motor, N m (ArmMsgFeedbackHighSpd.cal_effort).
TORQUE = np.array([1.18125] * 3 + [0.95844] * 3)

_CONTROL = ("standby", "CAN control", "teach mode", "Ethernet control", "Wi-Fi control", "remote control",
            "linkage teaching input", "offline trajectory")  # fmt: skip
_STATUS = ("normal", "emergency stop", "no solution", "singularity", "target beyond a limit",
           "a joint does not communicate", "a brake is not released", "collision", "too fast while taught",
           "a joint is in error", "another error", "recording while taught", "replaying what was taught",
           "replay is paused", "controller too hot", "release resistor too hot")  # fmt: skip
#: Bits of a drive's and of the gripper's state; the other bits say that it is enabled (6), or has been homed.
_DRIVE = {0: "voltage too low", 1: "motor too hot", 2: "current too high", 3: "drive too hot", 4: "collision",
          5: "drive in error", 7: "stalled"}  # fmt: skip
_FINGERS = {**{bit: text for bit, text in _DRIVE.items() if bit < 4}, 4: "sensor in error", 5: "drive in error"}
_ENABLED = 1 << 6
_MOVE_J = 1
#: Frames that only a controller of the arm sends.
_COMMANDS = frozenset({*range(0x150, 0x160), ENABLE})

#: s, at rest so long at less than so many rad/s before power may go; and at most so long.
_REST, _REST_SPEED, _REST_MOST = 0.3, 0.02, 0.5


@dataclass(frozen=True)
class PiperConfig:
    """interface, channel, bitrate: of python-can ("socketcan" and "can0"; its bit rate is set by `ip link`; other
    interfaces take it from here). firmware: the oldest that is accepted, as in S-V1.5-2.

    zero, rad, and sign (n,): joint = sign * (angle of the arm - zero); empty: the arm's own, which is its URDF's.
    speed: percent of the joints' own largest speed. gripper_closed, gripper_open: stroke, m, at opening 0 and 1.
    gripper_torque: its largest, N m, 0 to 5.

    timeout: age, s, at which the newest frames mean that the arm is cut off; the arm sends 200 a second.
    drive_timeout: the same, s, for the states of the drives, which come slower. start_timeout: s, the longest for each
    step of connecting.
    """

    interface: str = "socketcan"
    channel: str = "can0"
    bitrate: int = 1_000_000
    firmware: str = "S-V1.5-2"
    zero: tuple[float, ...] = ()
    sign: tuple[float, ...] = ()
    speed: int = 100
    gripper_closed: float = 0.0
    gripper_open: float = 0.07
    gripper_torque: float = 1.0
    timeout: float = 0.1
    drive_timeout: float = 1.0
    start_timeout: float = 3.0


class PiperDriver(ArmDriver):
    """The driver "piper".

    Stops: 2 sends the measured position as the target, and the drives hold it. 0 is the arm's own emergency stop
    (0x150): the drives leave position control and only damp, the arm sinks slowly; cutting its power, which would let
    it fall, is not used. 1 is 2, then 0 when the arm is at rest, at most 0.5 s later.

    An emergency stop is ended by a reset, which lets go of the joints for a moment: connect does it only when the arm
    rests, and then takes hold of it where it is.
    """

    Config = PiperConfig

    def __init__(self, arm: ArmInfo, config: PiperConfig, clock: Callable[[], float]):
        super().__init__(arm, config, clock)
        self._device = f"arm {arm.name}: piper on {config.interface} {config.channel}"
        self._zero = np.array(config.zero or [0.0] * 6, float)
        self._sign = np.array(config.sign or [1.0] * 6, float)
        sound = (len(arm.joints) == 6 and self._zero.shape == self._sign.shape == (6,)
                 and np.all(np.isfinite(self._zero)) and np.all(np.abs(self._sign) == 1.0))  # fmt: skip
        if not sound:
            raise self._error("6 joints, 6 finite zeros or none, 6 signs of 1 or -1 or none",
                              f"{len(arm.joints)} joints, zero {config.zero}, sign {config.sign}")  # fmt: skip
        strokes = (config.gripper_closed, config.gripper_open)
        if not (all(np.isfinite(strokes)) and strokes[0] != strokes[1] and 0.0 <= config.gripper_torque <= 5.0):
            raise self._error("two strokes of the gripper, m, that differ, and a torque of 0 to 5 N m",
                              f"{strokes} and {config.gripper_torque}")  # fmt: skip
        if not (isinstance(config.speed, int) and 1 <= config.speed <= 100):
            raise self._error("a speed of 1 to 100 percent", str(config.speed))
        times = (config.timeout, config.drive_timeout, config.start_timeout)
        if not all(np.isfinite(value) and value > 0.0 for value in times):
            raise self._error("times above 0 s", str(times))
        self._oldest = _version(config.firmware)
        if self._oldest is None:
            raise self._error("a firmware like S-V1.5-2", repr(config.firmware))
        self.capabilities = Capabilities(frozenset({0, 1, 2}), rate=200.0, effort=True, gripper=arm.gripper,
                                         gripper_force=arm.gripper)  # fmt: skip
        self._needed = (STATUS, *JOINTS, *MOTORS, *DRIVES, *((GRIPPER,) if arm.gripper else ()))
        self._bus: can.BusABC | None = None
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()
        self._sending = threading.Lock()
        self._clear()

    def connect(self) -> None:
        self._release()
        self._clear()
        try:
            self._open()
            self._await_frames()
            self._check_firmware()
            self._end_emergency_stop()
            self._take_hold()
        except BaseException:
            self._release()
            raise
        self._halt = ""

    def read(self) -> ArmState:
        self._check_link()
        halted = self._halt or self._halted()
        # What the arm once refused to follow it is not to resume by itself.
        self._halt = halted
        frames = self._frames
        position = self._sign * (self._angles() * ANGLE - self._zero)
        speed, current = np.array([struct.unpack_from(">hh", frames[i][1]) for i in MOTORS], float).T * 1e-3
        gripper = None
        if self.arm.gripper:
            stroke = struct.unpack_from(">i", frames[GRIPPER][1])[0] * STROKE
            span = self.config.gripper_open - self.config.gripper_closed
            gripper = float(np.clip((stroke - self.config.gripper_closed) / span, 0.0, 1.0))
        return ArmState(min(frames[i][0] for i in JOINTS), position, self._sign * speed,
                        effort=self._sign * current * TORQUE, gripper=gripper, halted=halted)  # fmt: skip

    def send(self, target: ArmTarget) -> None:
        self.check(target)
        self._check_link()
        self._halt = self._halt or self._halted()
        if self._halt:
            raise self._error("an arm that follows targets", self._halt)
        angles = (self._sign * np.asarray(target.position, float) + self._zero) / ANGLE
        if np.any(np.abs(angles) > 2**31 - 1):
            raise ValueError(f"arm {self.arm.name}: target position: expected rad, found {target.position}")
        self._send_angles(np.rint(angles).astype(int))
        if self.arm.gripper and target.gripper is not None:
            stroke = self.config.gripper_closed + target.gripper * (
                self.config.gripper_open - self.config.gripper_closed
            )
            self._send_gripper(round(stroke / STROKE))

    def stop(self, category: int) -> int:
        done = self.stop_category(category)
        self._halt = self._halt or f"stopped, category {done}"
        if self._bus is None:
            return done
        try:
            # An old measurement may be far from where the arm is; without it the arm stays at its last target.
            if done > 0 and not self._cut():
                self._send_angles(self._angles())
        except DriverError:
            pass
        if done == 1 and not self._cut():
            self._stop_at = self.clock() + _REST_MOST
        elif done < 2:
            self._emergency_stop()
        return done

    def close(self) -> None:
        if self._bus is not None and not self._halt:
            self.stop(2)
        self._release()
        self._halt = "not connected"

    def _error(self, expected: str, found: str) -> DriverError:
        return DriverError(f"{self._device}: expected {expected}, found {found}")

    def _clear(self) -> None:
        #: Newest frame of each id: when it came, s, and its 8 bytes. Written by the thread, whole entries at a time.
        self._frames: dict[int, tuple[float, bytes]] = {}
        self._text = b""
        self._halt, self._lost, self._other = "not connected", "", 0
        #: When the stop of category 1 ends in the emergency stop, s.
        self._stop_at: float | None = None

    # The bus.

    def _open(self) -> None:
        config = self.config
        try:
            self._bus = can.Bus(interface=config.interface, channel=config.channel, bitrate=config.bitrate)
        except (can.CanError, OSError, ValueError, ImportError) as error:
            raise self._error("a CAN bus that opens", str(error)) from error
        self._ending.clear()
        self._thread = threading.Thread(target=self._listen, args=(self._bus,), daemon=True, name=self._device)
        self._thread.start()

    def _release(self) -> None:
        """End the thread and let go of the bus; a stop that is under way is finished first."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._stop_at is not None:
            self._emergency_stop()
        if self._bus is not None:
            try:
                self._bus.shutdown()
            except (can.CanError, OSError):
                pass
            self._bus = None

    def _listen(self, bus: can.BusABC) -> None:
        while not self._ending.is_set():
            try:
                message = bus.recv(0.02)
            except Exception as error:  # whatever python-can's back end raises, the bus is gone
                self._lost = self._lost or f"that it cannot be read: {error}"
                return
            if message is not None and not (message.is_error_frame or message.is_extended_id):
                # Frames may have waited here for this thread; some interfaces' stamps are of another clock.
                age = time.time() - message.timestamp
                stamp = self.clock() - (age if 0.0 < age < 1.0 else 0.0)
                self._take(message.arbitration_id, bytes(message.data), stamp)
            if self._stop_at is not None and (self.clock() >= self._stop_at or self._slow()):
                self._emergency_stop()

    def _take(self, identifier: int, data: bytes, stamp: float) -> None:
        if identifier == FIRMWARE:
            self._text += data
        elif identifier in _COMMANDS:
            self._other = self._other or identifier
        if len(data) == 8:
            self._frames[identifier] = (stamp, data)

    def _transmit(self, identifier: int, data: bytes) -> None:
        message = can.Message(arbitration_id=identifier, data=data.ljust(8, b"\0"), is_extended_id=False)
        try:
            with self._sending:
                self._bus.send(message)
        except Exception as error:
            self._lost = self._lost or f"that 0x{identifier:03X} cannot be sent: {error}"
            raise self._error("a bus that works", self._lost) from error

    def _send_angles(self, angles: np.ndarray) -> None:
        for k, identifier in enumerate(JOINT_GOALS):
            self._transmit(identifier, struct.pack(">ii", int(angles[2 * k]), int(angles[2 * k + 1])))

    def _send_gripper(self, stroke: int, code: int = 1) -> None:
        self._transmit(GRIPPER_GOAL, struct.pack(">iHB", stroke, round(self.config.gripper_torque * 1000), code))

    def _send_mode(self, speed: int) -> None:
        """CAN control, MOVE J by position and speed, at most `speed` percent."""
        self._transmit(MODE, bytes([1, _MOVE_J, speed]))

    def _emergency_stop(self) -> None:
        self._stop_at = None
        try:
            self._transmit(STOP, bytes([1]))
        except DriverError:
            pass

    # What the arm says.

    def _angles(self) -> np.ndarray:
        """Measured, (6,), 0.001 degree."""
        return np.array([angle for i in JOINTS for angle in struct.unpack(">ii", self._frames[i][1])])

    def _slow(self) -> bool:
        speeds = [struct.unpack_from(">h", self._frames[i][1])[0] * 1e-3 for i in MOTORS]
        return bool(np.all(np.abs(speeds) < _REST_SPEED))

    def _cut(self) -> bool:
        return bool(self._lost) or bool(self._late())

    def _late(self) -> list[int]:
        """Ids of the frames that are missing or too old."""
        now, frames = self.clock(), self._frames
        late = []
        for identifier in self._needed:
            limit = self.config.drive_timeout if identifier in DRIVES else self.config.timeout
            if identifier not in frames or now - frames[identifier][0] > limit:
                late.append(identifier)
        return late

    def _check_link(self) -> None:
        if self._bus is None:
            raise self._error("a connected arm", "none")
        if not self._lost and (late := self._late()):
            ages = ", ".join(f"0x{i:03X}" for i in late[:4]) + (", ..." if len(late) > 4 else "")
            self._lost = f"that no new frame {ages} came"
        if self._lost:
            self._halt = self._halt or "cut off"
            raise self._error(f"an arm that answers within {self.config.timeout} s", self._lost)

    def _halted(self) -> str:
        """Why the arm does not follow targets, "" if it does."""
        found = [f"0x{self._other:03X} of another controller on its bus"] if self._other else []
        control, status, move = self._frames[STATUS][1][:3]
        beyond, silent = self._frames[STATUS][1][6:8]
        if control != 1:
            found.append(_word(_CONTROL, control))
        elif move != _MOVE_J:
            found.append(f"move mode {move}")
        if status:
            found.append(_word(_STATUS, status))
        for k, joint in enumerate(self.arm.joints):
            state = self._frames[DRIVES[k]][1][5]
            found += [f"{joint}: {text}" for bit, text in _DRIVE.items() if state >> bit & 1]
            found += [f"{joint}: torque is off"] * (not state & _ENABLED)
            found += [f"{joint}: beyond its limit"] * (beyond >> k & 1)
            found += [f"{joint}: does not communicate"] * (silent >> k & 1)
        if self.arm.gripper:
            state = self._frames[GRIPPER][1][6]
            found += [f"gripper: {text}" for bit, text in _FINGERS.items() if state >> bit & 1]
            found += ["gripper: torque is off"] * (not state & _ENABLED)
        return ", ".join(found)

    # The steps of connecting.

    def _until(self, done: Callable[[], Any], step: float = 0.01) -> bool:
        """Whether `done` became true in time. Raises DriverError when the bus is lost."""
        end = self.clock() + self.config.start_timeout
        while not done():
            if self._lost:
                raise self._error("a bus that works", self._lost)
            if self.clock() > end:
                return False
            time.sleep(step)
        return True

    def _await_frames(self) -> None:
        if self._until(lambda: not self._late()):
            return
        others = self._frames.keys() - set(self._needed)
        seen = ", ".join(f"0x{i:03X}" for i in sorted(others)[:6]) if others else "no others"
        if others & {*JOINT_GOALS, *(offset + i for offset in (0x10, 0x20, 0x100) for i in JOINTS)}:
            seen += ": the arm is set as a teaching (leader) arm; set it as a motion output arm (0x470: FC)"
        missing = ", ".join(f"0x{i:03X}" for i in self._late()[:4])
        raise self._error(f"an arm with power that sends its state, {missing} too", seen if self._frames else "nothing")

    def _check_firmware(self) -> None:
        def asked() -> bool:
            self._text = b""
            self._transmit(FIRMWARE, bytes([1]))
            time.sleep(0.05)
            return _version(self._text.decode("ascii", "replace")) is not None

        if not self._until(asked):
            raise self._error("a firmware version on 0x4AF", repr(self._text))
        found = _version(self._text.decode("ascii", "replace"))
        if found < self._oldest:
            raise self._error(f"firmware {self.config.firmware} or newer", "S-V{}.{}-{}".format(*found))

    def _end_emergency_stop(self) -> None:
        """Reset the arm where it is in emergency stop. It lets go of the joints, so it has to be at rest."""
        if self._frames[STATUS][1][1] != 1:
            return
        before, since = self._angles(), self.clock()

        def rests() -> bool:
            nonlocal before, since
            if np.any(np.abs(self._angles() - before) * ANGLE > _REST * _REST_SPEED):
                before, since = self._angles(), self.clock()
            return self.clock() - since >= _REST

        if not self._until(rests):
            raise self._error("an arm that rests after its emergency stop", "that it still sinks")
        self._transmit(STOP, bytes([2]))
        if not self._until(lambda: self._frames[STATUS][1][1] != 1):
            raise self._error("the emergency stop to end", "that it stays")
        # What the drives said before the reset, that they are on, is not so any more.
        for identifier in DRIVES:
            self._frames.pop(identifier, None)
        if not self._until(lambda: not self._late()):
            raise self._error("the states of the drives after the reset", "none")

    def _take_hold(self) -> None:
        """Make the arm hold where it is, under CAN control.

        Until the last drive is on, the target is where the arm is now; from then on it stays, so that a joint that
        sags is not followed down.
        """
        if (control := self._frames[STATUS][1][0]) > 1:
            raise self._error("an arm in standby or under CAN control; end the other mode at the arm first",
                              _word(_CONTROL, control))  # fmt: skip
        angles = self._angles()
        stroke = struct.unpack_from(">i", self._frames[GRIPPER][1])[0] if self.arm.gripper else 0

        def holds() -> bool:
            nonlocal angles
            self._check_link()
            states = [self._frames[i][1][5] for i in DRIVES]
            if not all(state & _ENABLED for state in states):
                angles = self._angles()
            # The target first: whatever the arm held before is gone when it begins to follow. Should it take targets
            # only under CAN control, the old one lasts for the 0.5 ms to the next frames, at a hundredth of its speed.
            self._send_angles(angles)
            if self._halted():
                self._send_mode(1)
                self._send_angles(angles)
                for k, state in enumerate(states):
                    if any(state >> bit & 1 for bit in _DRIVE):
                        # Clears the error; neither sets the zero nor the acceleration (0x7FFF: none).
                        self._transmit(JOINT_SETTING, bytes([k + 1, 0, 0, 0x7F, 0xFF, 0xAE]))
                    if not state & _ENABLED:
                        self._transmit(ENABLE, bytes([k + 1, 2]))
            if self.arm.gripper:
                # 3 also clears its error; 1 keeps it on.
                self._send_gripper(stroke, 3 if self._frames[GRIPPER][1][6] & 0x3F else 1)
            time.sleep(0.04)
            return not self._halted()

        if not self._until(holds):
            found = self._halted()
            if found == _CONTROL[0]:
                found += "; after teaching it takes a reset (0x150: 02: the arm falls), or its power off and on"
            raise self._error("an arm that can be enabled", found)
        self._send_mode(self.config.speed)


def _version(text: str) -> tuple[int, int, int] | None:
    found = re.search(r"S-V(\d+)\.(\d+)-(\d+)", text)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


def _word(words: tuple[str, ...], code: int) -> str:
    return words[code] if code < len(words) else f"code 0x{code:02X}"
