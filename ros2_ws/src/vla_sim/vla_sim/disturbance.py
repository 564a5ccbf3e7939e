"""Disturbances of the executed motion, so that demonstrations show how to recover.

As in DART (Laskey et al. 2017, "DART: noise injection for robust imitation learning"): the arm executes disturbed
targets, the recorded commands are clean, so every recorded state beside the way comes with the command back to it.
"""

from __future__ import annotations

import numpy as np
from vla_core.robot import Robot

from vla_sim.experts import Expert


class Disturbance:
    """Slow joint offsets: three sines a joint, faded out where the expert is not to be disturbed.

    Args:
        robot: whose arms to disturb.
        expert: says how steady the motion has to be.
        amplitude: standard deviation of a joint's offset, rad.
        seed: of frequencies, phases and amplitudes.
        begin: time at which the offset starts to grow from zero, s.
    """

    FREQUENCY = (0.15, 0.8)  # Hz
    RISE = 0.5  # s

    def __init__(self, robot: Robot, expert: Expert, amplitude: float, seed: int, begin: float):
        rng = np.random.default_rng([seed, 200])
        self._expert, self._begin = expert, begin
        self._waves = {}
        for arm in robot.arms:
            shape = (3, len(arm.joints))
            size = rng.normal(0.0, amplitude * np.sqrt(2.0 / 3.0), shape)
            self._waves[arm.name] = (size, rng.uniform(*self.FREQUENCY, shape), rng.uniform(0.0, 2 * np.pi, shape))

    def offset(self, arm: str, now: float) -> np.ndarray:
        """Offset (n,) of an arm's joints at a time, rad."""
        size, frequency, phase = self._waves[arm]
        t = now - self._begin
        fade = min(1.0, max(0.0, t / self.RISE)) * (1.0 - self._expert.steadiness(now))
        return fade * (size * np.sin(2 * np.pi * frequency * t + phase)).sum(axis=0)
