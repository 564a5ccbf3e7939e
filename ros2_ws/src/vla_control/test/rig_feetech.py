"""The emulated SO-101."""

from __future__ import annotations

import pytest
from rig_servos import ServoRig
from servo_emulator import Feetech, FeetechBus


class FeetechRig(ServoRig):
    driver, boundary = "feetech", "Feetech SCS protocol on a pseudo-terminal"
    joints = 5
    ids, zero, sign = [1, 2, 3, 4, 5], [2048, 2047, 2048, 2048, 2060], [1, 1, -1, 1, 1]
    gripper_id = 6

    def __init__(self) -> None:
        pytest.importorskip("scservo_sdk")
        places = {1: 2100, 2: 1500, 3: 2600, 4: 2048, 5: 1800, 6: 2500}
        self.bus = FeetechBus([Feetech(number, place) for number, place in places.items()])

    def config(self):
        return {
            "name": "right", "joints": ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll"],
            "gripper": True, "period": 0.02, "port": str(self.bus.path), "zero": self.zero, "sign": self.sign,
            "reply": 0.3, "stale": 2.0,  # a busy machine
        }  # fmt: skip
