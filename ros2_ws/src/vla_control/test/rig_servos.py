"""An arm on an emulated servo bus: what the rigs of Dynamixel and Feetech share."""

from __future__ import annotations

import numpy as np
from driver_rig import RealTimeRig
from servo_emulator import Bus


class ServoRig(RealTimeRig):
    """ids, zero, sign: of the joints' servos, as the settings say them. followers: servo -> those on the same joint."""

    gripper = True
    resolution = 2 * np.pi / 4096
    ids: list[int]
    zero: list[int]
    sign: list[int]
    followers: dict[int, list[int]] = {}
    gripper_id: int
    bus: Bus

    def _places(self) -> np.ndarray:
        self.bus.advance()
        with self.bus.lock:
            return np.array([self.bus.servos[servo].place for servo in self.ids])

    def position(self):
        return np.array(self.sign) * (self._places() - self.zero) * self.resolution

    def place(self, position):
        """By hand: the power goes off and on first, for held joints do not give way."""
        self.bus.cycle_power()
        ticks = np.array(self.zero) + np.array(self.sign) * np.asarray(position) / self.resolution
        with self.bus.lock:
            for servo, tick in zip(self.ids, ticks):
                for one in (servo, *self.followers.get(servo, [])):
                    self.bus.servos[one].place = float(tick)

    def moved_by_commands(self):
        return self.bus.jumps > 0

    def cut(self):
        self.bus.pull()

    def mend(self):
        self.bus.plug()

    def powered(self):
        with self.bus.lock:
            torques = {self.bus.servos[servo].torque for servo in self.ids}
        assert len(torques) == 1
        return torques.pop()

    def close(self):
        self.bus.close()
