"""The emulated ViperX 300."""

from __future__ import annotations

import pytest
from rig_servos import ServoRig
from servo_emulator import Dynamixel, DynamixelBus


class DynamixelRig(ServoRig):
    driver, boundary = "dynamixel", "Dynamixel protocol 2.0 on a pseudo-terminal"
    joints = 6
    ids, zero, sign = [1, 2, 4, 6, 7, 8], [2048, 2048, 2048, 2000, 2048, 2048], [1, 1, 1, -1, 1, 1]
    followers = {2: [3], 4: [5]}
    gripper_id = 9

    def __init__(self) -> None:
        pytest.importorskip("dynamixel_sdk")
        places = {1: 2100, 2: 1900, 3: 1900, 4: 2300, 5: 2300, 6: 2048, 7: 1800, 8: 2048, 9: 2000}
        shadows = {3: 2, 5: 4}
        self.bus = DynamixelBus(
            [
                Dynamixel(number, place, 1020 if number in (8, 9) else 1120, shadows.get(number, 255))
                for number, place in places.items()
            ]
        )

    def config(self):
        return {
            "name": "left", "joints": ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate"],
            "gripper": True, "period": 0.02, "port": str(self.bus.path), "zero": self.zero, "sign": self.sign,
            "reply": 0.3, "stale": 2.0, "watchdog": 2.0,  # a busy machine
            "models": ("xm540-w270",) * 5 + ("xm430-w350",) * 2,
        }  # fmt: skip
