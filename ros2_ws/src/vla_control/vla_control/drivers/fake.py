"""An arm that is not there: its joints follow targets at a limited speed. For wiring tests; no physics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vla_control.drivers.driver import ArmDriver, ArmInfo, ArmState, ArmTarget, Capabilities, DriverError


@dataclass(frozen=True)
class FakeConfig:
    """start: positions, rad, empty: the description's home, or zeros without one. speed: of a joint, rad/s, and of the
    gripper's opening, 1/s."""

    start: tuple[float, ...] = ()
    speed: float = 3.0


class FakeDriver(ArmDriver):
    """The driver "fake"."""

    Config = FakeConfig

    def __init__(self, arm: ArmInfo, config: FakeConfig, clock: Callable[[], float]):
        super().__init__(arm, config, clock)
        described = arm.described()
        home = described.home if described else np.zeros(len(arm.joints))
        start = np.array(config.start if len(config.start) else home, np.float64)
        if start.shape != (len(arm.joints),) or not config.speed > 0.0:
            raise DriverError(
                f"arm {arm.name}: fake: expected {len(arm.joints)} positions to start from and a speed above 0, found "
                f"{list(config.start)} and {config.speed}"
            )
        self.capabilities = Capabilities(frozenset({0, 1, 2}), rate=1.0 / arm.period, gripper=arm.gripper)
        self._position, self._opening = start, 1.0
        self._velocity = np.zeros_like(start)
        self._target = ArmTarget(start, np.zeros_like(start), self._opening)
        self._follows, self._halted, self._time = False, "not connected", clock()

    def connect(self) -> None:
        self._move()
        self._stay()
        self._follows, self._halted = True, ""

    def read(self) -> ArmState:
        if self._halted == "not connected":
            raise DriverError(f"arm {self.arm.name}: fake: expected a connected arm, found none")
        self._move()
        gripper = self._opening if self.arm.gripper else None
        return ArmState(self._time, self._position.copy(), self._velocity.copy(), gripper=gripper, halted=self._halted)

    def send(self, target: ArmTarget) -> None:
        self.check(target)
        if not self._follows:
            raise DriverError(f"arm {self.arm.name}: fake: expected an arm that follows, found: {self._halted}")
        self._move()
        self._target = target

    def stop(self, category: int) -> int:
        self._move()
        self._stay()
        self._follows, self._halted = False, f"stopped, category {self.stop_category(category)}"
        return self.stop_category(category)

    def close(self) -> None:
        self._move()
        self._stay()
        self._follows, self._halted = False, "not connected"

    def _stay(self) -> None:
        self._target = ArmTarget(self._position.copy(), np.zeros_like(self._position), self._opening)

    def _move(self) -> None:
        """Go on to now."""
        now = self.clock()
        most = self.config.speed * max(0.0, now - self._time)
        step = np.clip(self._target.position - self._position, -most, most)
        self._velocity = step / (now - self._time) if now > self._time else self._velocity
        self._position = self._position + step
        wanted = self._opening if self._target.gripper is None else self._target.gripper
        self._opening += float(np.clip(wanted - self._opening, -most, most))
        self._time = now
