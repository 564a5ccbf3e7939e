"""Drivers of real arms, one file each; what they have in common is in `driver`. Each imports its vendor's library
when it is loaded, so that nobody needs another's."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from vla_control.drivers.driver import ArmDriver, ArmInfo, ArmState, ArmTarget, Capabilities, DriverError

__all__ = ["DRIVERS", "ArmDriver", "ArmInfo", "ArmState", "ArmTarget", "Capabilities", "DriverError", "load_driver"]

#: Name in a robot file -> module and class; the distribution of the library that it needs, if any, which this
#: package's extra of the driver's name brings too.
DRIVERS = {
    "dynamixel": ("vla_control.drivers.dynamixel:DynamixelDriver", "dynamixel-sdk"),
    "fake": ("vla_control.drivers.fake:FakeDriver", ""),
    "feetech": ("vla_control.drivers.feetech:FeetechDriver", "feetech-servo-sdk"),
    "franka": ("vla_control.drivers.franka:FrankaDriver", "franky-control"),
    "mujoco": ("vla_control.drivers.mujoco:MujocoDriver", ""),
    "piper": ("vla_control.drivers.piper:PiperDriver", "python-can"),
    "ros2_control": ("vla_control.drivers.ros2_control:Ros2ControlDriver", ""),
    "ur": ("vla_control.drivers.ur:UrDriver", ""),
    "xarm": ("vla_control.drivers.xarm:XarmDriver", "xarm-python-sdk"),
}
#: Keys of a configuration that describe the arm, whatever its driver.
_ARM = {
    "name": "arm", "joints": None, "period": 0.01, "gripper": False, "gripper_force": None, "robot": None, "node": None,
}  # fmt: skip


def load_driver(name: str, config: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> ArmDriver:
    """A driver that is not connected yet.

    config: `joints` (names in kinematic order), and what else ArmInfo has of the arm; the rest are settings of the
    driver, see its Config. clock: s. Raises DriverError.
    """
    if name not in DRIVERS:
        raise DriverError(f"driver: expected one of {sorted(DRIVERS)}, found {name!r}")
    place, extra = DRIVERS[name]
    module, kind = place.split(":")
    try:
        driver = getattr(importlib.import_module(module), kind)
    except ImportError as error:
        raise DriverError(f"driver {name}: {error}; its library comes with: pip install {extra}") from error
    arm = {key: config.get(key, default) for key, default in _ARM.items()}
    rest = {key: value for key, value in config.items() if key not in _ARM}
    fields = {field.name: field for field in dataclasses.fields(driver.Config)}
    needed = {key for key, field in fields.items()
              if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING}  # fmt: skip
    if not arm["joints"] or rest.keys() - fields.keys() or needed - rest.keys():
        found = sorted(key for key in config if key == "joints" or key not in _ARM)
        raise DriverError(
            f"driver {name}: expected the settings joints, {', '.join(sorted(needed)) or 'no more'}, and of "
            f"{sorted(fields.keys() - needed)} any, found {found}"
        )
    try:
        settings = driver.Config(**rest)
    except (TypeError, ValueError) as error:
        raise DriverError(f"driver {name}: {error}") from error
    arm |= {"name": str(arm["name"]), "joints": tuple(arm["joints"])}
    return driver(ArmInfo(**arm), settings, clock)
