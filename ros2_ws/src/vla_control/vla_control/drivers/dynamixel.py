"""Arms of Dynamixel X servos, protocol 2.0, by dynamixel-sdk: ViperX and WidowX, ALOHA's leaders and followers.

Registers: control tables of emanual.robotis.com/docs/en/dxl/x/<model>/, packets: .../docs/en/dxl/protocol2/.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import dynamixel_sdk
import numpy as np

from vla_control.drivers.driver import ArmInfo, DriverError
from vla_control.drivers.servo_bus import NoReplyError, ServoArm, ServoBus, ServoConfig

#: Model -> number and A of one unit of Present Current (126); None where 126 is a load without a unit of current.
MODELS = {
    "xl330-m077": (1190, 0.001), "xl330-m288": (1200, 0.001), "xl430-w250": (1060, None), "xc430-w150": (1070, None),
    "xc430-w240": (1080, None), "xm430-w350": (1020, 0.00269), "xm430-w210": (1030, 0.00269),
    "xm540-w270": (1120, 0.00269), "xm540-w150": (1130, 0.00269),
}  # fmt: skip
#: rad/s of one unit of velocity: 0.229 rev/min.
_VELOCITY = 0.229 * 2.0 * np.pi / 60.0
#: Hardware Error Status (70).
_ERRORS = {
    0x01: "input voltage", 0x04: "overheating", 0x08: "motor encoder", 0x10: "electrical shock", 0x20: "overload",
}  # fmt: skip
# Drive Mode (10): the profile is given as a time; Operating Mode (11).
_TIME_PROFILE, _POSITION, _CURRENT_POSITION = 0x04, 3, 5
# s of one unit of Bus Watchdog (98), and its value when it ran out.
_WATCHDOG_UNIT, _RAN_OUT = 0.02, 0xFF
# Ticks that two servos on one joint may differ, or they work against each other.
_PAIR = 40


@dataclass(frozen=True)
class DynamixelConfig(ServoConfig):
    """The defaults fit a ViperX 300 6DOF as Interbotix sets its servos up (vx300s.yaml: directions are in the servos'
    drive modes, so every sign is 1 and every zero 2048), with the gripper's places of ALOHA's followers (constants.py:
    -0.6213 and 1.491 rad); measure those of your own.

    models: of the joints' servos, then of the gripper's. shadows: pairs (id, id that it follows by its Secondary ID)
    of the second servos of strong joints. watchdog: s without an instruction until each servo stops by itself (Bus
    Watchdog, register 98, firmware 38 or newer; 0.02 to 2.54). gripper_current: A, limit of the gripper's force, in
    current-based position mode; 0: position mode.
    """

    ids: tuple[int, ...] = (1, 2, 4, 6, 7, 8)
    gripper_id: int = 9
    gripper_closed: int = 1643
    gripper_open: int = 3020
    models: tuple[str, ...] = ("xm540-w270",) * 5 + ("xm430-w350",) * 2
    shadows: tuple[tuple[int, int], ...] = ((3, 2), (5, 4))
    watchdog: float = 0.2
    gripper_current: float = 0.5


class DynamixelBus(ServoBus):
    """Status packets of protocol 2.0: FF FF FD 00, id, length of two bytes, 55, error, data, CRC of two bytes."""

    id_at, length_at, error_at, data_at, not_data, more = 4, 5, 8, 9, 4, (False,)


class DynamixelDriver(ServoArm):
    """The driver "dynamixel"."""

    Config = DynamixelConfig
    KIND = "Dynamixel"
    STATE, GOAL, TORQUE = (126, 10), (116, 4), (64, 1)
    #: Torque Enable (64), Hardware Error Status (70) and Bus Watchdog (98) with what lies between them.
    HEALTH = (64, 35)

    def __init__(self, arm: ArmInfo, config: DynamixelConfig, clock: Callable[[], float]):
        moved = [*config.ids, config.gripper_id] if arm.gripper else [*config.ids]
        self._models = dict(zip(moved, config.models))
        self._follows = {int(shadow): int(servo) for shadow, servo in config.shadows}
        self._ticks_of_watchdog = round(config.watchdog / _WATCHDOG_UNIT)
        where = f"arm {arm.name}: {self.KIND} on {config.port}"
        if len(config.models) < len(moved) or not set(config.models) <= MODELS.keys():
            raise DriverError(f"{where}: expected {len(moved)} models of {sorted(MODELS)}, found {config.models}")
        if not set(self._follows.values()) <= set(config.ids) or set(self._follows) & set(moved):
            raise DriverError(f"{where}: expected shadows of joints of {config.ids}, found {config.shadows}")
        if not 1 <= self._ticks_of_watchdog <= 127:
            raise DriverError(f"{where}: expected a watchdog of 0.02 s to 2.54 s, found {config.watchdog}")
        self._models |= {shadow: self._models[servo] for shadow, servo in self._follows.items()}
        super().__init__(arm, config, clock)

    def _make_bus(self) -> ServoBus:
        return DynamixelBus(self.where, dynamixel_sdk, 2.0, self.config)

    def _has_effort(self) -> bool:
        return all(MODELS[self._models[servo]][1] for servo in self.config.ids)

    def _has_gripper_force(self) -> bool:
        return bool(MODELS[self._models[self.config.gripper_id]][1]) and self.config.gripper_current > 0.0

    def _servos(self) -> list[int]:
        return [*self._moved, *self._follows]

    def _prepare(self, servo: int) -> None:
        head = self._bus.read(servo, 0, 13)
        number, firmware, drive, second = (
            int.from_bytes(head[:2], "little"),
            head[6],
            head[10],
            head[12],
        )
        model = self._models[servo]
        self._expect(servo, f"a {model}, number {MODELS[model][0]}", number, number == MODELS[model][0])
        self._expect(servo, "firmware 38 or newer (Bus Watchdog)", firmware, firmware >= 38 or model[:5] == "xl330")
        if servo in self._follows:
            self._expect(servo, f"secondary ID {self._follows[servo]}", second, second == self._follows[servo])
        elif second in self._models:
            raise DriverError(f"{self.where}: servo {servo}: expected no secondary ID, found {second}")
        if self._bus.read(servo, 70, 1)[0] and not self.config.leader:
            # It took its torque off by itself, and keeps the error until it is restarted; it hangs limp either way.
            self._bus.reboot(servo)
        if self.config.leader:
            return
        limited = self.capabilities.gripper_force and servo == self.config.gripper_id
        wanted = bytes([drive & ~_TIME_PROFILE, _CURRENT_POSITION if limited else _POSITION])
        if wanted != head[10:12]:
            if self._bus.read(servo, 64, 1)[0]:
                raise DriverError(
                    f"{self.where}: servo {servo}: expected drive and operating mode {[*wanted]}, found "
                    f"{[*head[10:12]]} and torque on, which keeps them from being set"
                )
            for address, value in zip((10, 11), wanted):
                self._bus.ensure(address, 1, {servo: value}, "drive or operating mode")

    def _power_on(self, goals: Mapping[int, int]) -> None:
        servos = self._servos()
        for servo, tick in goals.items():
            low, high = (int.from_bytes(self._bus.read(servo, at, 4), "little", signed=True) for at in (52, 48))
            # Beyond its limits a servo takes no goal, not even to stay.
            inside = low <= tick <= high or servo == self.config.gripper_id
            self._expect(servo, f"a position of its limits {low} to {high} (else move it by hand)", tick, inside)
        for shadow, servo in self._follows.items():
            tick = int.from_bytes(self._bus.read(shadow, 132, 4), "little", signed=True)
            near = abs(tick - goals[servo]) <= _PAIR
            self._expect(shadow, f"the position of servo {servo}, {goals[servo]} (Homing Offset)", tick, near)
        # What an earlier program left running must not end while goals are written; then at once where they are now.
        self._bus.sync_write(98, 1, dict.fromkeys(servos, 0))
        self._bus.sync_write(*self.GOAL, goals)
        self._bus.ensure(*self.GOAL, goals, "goal position")
        for shadow, servo in self._follows.items():
            goal = int.from_bytes(self._bus.read(shadow, *self.GOAL), "little", signed=True)
            self._expect(shadow, f"the goal of servo {servo}, {goals[servo]}", goal, goal == goals[servo])
        self._bus.ensure(108, 4, dict.fromkeys(servos, 0), "profile acceleration")
        # Velocity Limit (44) bounds it: 131, 3.1 rad/s, on Interbotix' arms.
        most = {servo: int.from_bytes(self._bus.read(servo, 44, 4), "little") for servo in servos}
        speed = max(1, round(self.config.speed / _VELOCITY))
        self._bus.ensure(112, 4, {servo: min(speed, limit) for servo, limit in most.items()}, "profile velocity")
        if self.capabilities.gripper_force:
            gripper = self.config.gripper_id
            unit = MODELS[self._models[gripper]][1]
            self._bus.ensure(102, 2, {gripper: round(self.config.gripper_current / unit)}, "goal current")
        self._bus.ensure(*self.TORQUE, dict.fromkeys(servos, 1), "torque")
        self._bus.ensure(98, 1, dict.fromkeys(servos, self._ticks_of_watchdog), "bus watchdog")

    def _state_of(self, servo: int, block: bytes) -> tuple[int, float, float]:
        current, velocity, position = (
            int.from_bytes(block[begin:end], "little", signed=True) for begin, end in ((0, 2), (2, 6), (6, 10))
        )
        return position, velocity * _VELOCITY, current * (MODELS[self._models[servo]][1] or 0.0)

    def _is_alert(self, error: int) -> bool:
        return bool(error & 0x80)

    def _ill(self, servo: int, block: bytes) -> str:
        found = [name for bit, name in _ERRORS.items() if block[6] & bit]
        if found:
            return f"hardware error: {', '.join(found)}"
        if self.config.leader:
            return ""
        if block[34] == _RAN_OUT:
            return "its bus watchdog ran out: no instruction came in time"
        return "" if block[0] else "its torque is off: its power was lost, or another program took it"

    def _let_go(self) -> None:
        with contextlib.suppress(NoReplyError):
            self._bus.ensure(98, 1, dict.fromkeys(self._servos(), 0), "bus watchdog")

    def _expect(self, servo: int, what: str, found: int, well: bool) -> None:
        if not well:
            raise DriverError(f"{self.where}: servo {servo}: expected {what}, found {found}")
