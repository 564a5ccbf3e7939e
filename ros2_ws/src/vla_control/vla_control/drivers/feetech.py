"""Arms of Feetech STS servos, by scservo_sdk of feetech-servo-sdk: SO-100 and SO-101.

That library is used for packets only: its sync read drops the servos' error bytes, and its port never throws late
replies away (see servo_bus.PatientPort). Registers: Feetech's memory table of the STS series ("Magnetic Encoder STS
Servo, memory table"), sections 2.2 EPROM, 2.3 SRAM control, 2.4 SRAM feedback, 3.1 phase, 3.2 status.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import scservo_sdk

from vla_control.drivers.driver import DriverError
from vla_control.drivers.servo_bus import TICK, ServoArm, ServoBus, ServoConfig

#: Model number of the STS3215.
STS3215 = 777
#: Status (65), and the error byte of every reply.
_ERRORS = {0x01: "voltage", 0x02: "magnetic encoder", 0x04: "overheating", 0x08: "overcurrent", 0x20: "overload"}
# Phase (18): velocities are in ticks/s, else in 50 ticks/s; positions count turns.
_FINE_SPEED, _TURNS = 0x04, 0x10
# A of one unit of Present Current (69).
_CURRENT = 0.0065
# Of Acceleration (41), 100 ticks/s^2 each: the most.
_ACCELERATION = 254


@dataclass(frozen=True)
class FeetechConfig(ServoConfig):
    """The defaults fit an SO-101 whose servos were centred (Homing Offset) at the middle of every joint, as LeRobot's
    calibration leaves them.

    gripper_torque: largest torque of the gripper, of all that it has, 0 to 1 (Torque Limit, register 48).
    """

    port: str = "/dev/ttyACM0"
    ids: tuple[int, ...] = (1, 2, 3, 4, 5)
    gripper_id: int = 6
    gripper_closed: int = 2048
    gripper_open: int = 3400
    gripper_torque: float = 0.5


class FeetechBus(ServoBus):
    """Status packets: FF FF, id, length, error, data, checksum."""

    id_at, length_at, error_at, data_at, not_data = 2, 3, 4, 5, 2


def _signed(word: bytes, bit: int = 15) -> int:
    """A number whose sign is one bit, not a two's complement."""
    value = int.from_bytes(word, "little")
    return -(value & (1 << bit) - 1) if value >> bit & 1 else value


class FeetechDriver(ServoArm):
    """The driver "feetech". These servos have no watchdog: cut off, they go to their last goal, at most one period's
    motion away, and hold."""

    Config = FeetechConfig
    KIND = "Feetech"
    STATE, GOAL, TORQUE = (56, 15), (42, 2), (40, 1)
    #: From Torque Enable (40) to Status (65).
    HEALTH = (40, 26)

    def _make_bus(self) -> ServoBus:
        if not 0.0 < self.config.gripper_torque <= 1.0:
            raise DriverError(f"{self.where}: expected a gripper_torque of 0 to 1, found {self.config.gripper_torque}")
        self._speed_unit: dict[int, int] = {}
        return FeetechBus(self.where, scservo_sdk, 0, self.config)

    def _has_effort(self) -> bool:
        return True

    def _has_gripper_force(self) -> bool:
        return True

    def _servos(self) -> list[int]:
        return self._moved

    def _prepare(self, servo: int) -> None:
        head = self._bus.read(servo, 0, 34)
        model, phase, mode = int.from_bytes(head[3:5], "little"), head[18], head[33]
        for what, found, well in (
            (f"an STS3215, number {STS3215}", model, model == STS3215),
            ("a phase without turns counted, bit 4", phase, not phase & _TURNS),
            ("position mode, 0", mode, mode == 0),
        ):
            if not well:
                raise DriverError(f"{self.where}: servo {servo}: expected {what}, found {found}")
        self._speed_unit[servo] = 1 if phase & _FINE_SPEED else 50

    def _power_on(self, goals: Mapping[int, int]) -> None:
        for servo, tick in goals.items():
            if not 0 <= tick <= 4095:
                raise DriverError(f"{self.where}: servo {servo}: expected a position of 0 to 4095, found {tick}")
        self._bus.sync_write(*self.GOAL, goals)
        self._bus.ensure(*self.GOAL, goals, "goal position")
        speeds = {servo: round(self.config.speed / TICK / unit) for servo, unit in self._speed_unit.items()}
        self._bus.ensure(41, 1, dict.fromkeys(goals, _ACCELERATION), "acceleration")
        self._bus.ensure(46, 2, speeds, "goal speed")
        if self.arm.gripper:
            self._bus.ensure(48, 2, {self.config.gripper_id: round(1000 * self.config.gripper_torque)}, "torque limit")
        self._bus.ensure(*self.TORQUE, dict.fromkeys(goals, 1), "torque")

    def _state_of(self, servo: int, block: bytes) -> tuple[int, float, float]:
        position, velocity, current = _signed(block[0:2]), _signed(block[2:4]), _signed(block[13:15])
        return position, velocity * self._speed_unit[servo] * TICK, current * _CURRENT

    def _is_alert(self, error: int) -> bool:
        return bool(error)

    def _ill(self, servo: int, block: bytes) -> str:
        found = [name for bit, name in _ERRORS.items() if block[25] & bit]
        if found:
            return f"its status: {', '.join(found)}"
        off = not block[0] and not self.config.leader
        return "its torque is off: its power was lost, or another program took it" if off else ""
