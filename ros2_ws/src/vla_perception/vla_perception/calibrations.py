"""The calibrations of a robot's cameras, from the files that its description names."""

from __future__ import annotations

from vla_calibration.files import CameraCalibration, load_camera
from vla_core.robot import Robot


def load_calibrations(robot: Robot) -> tuple[dict[str, CameraCalibration], list[str]]:
    """Read what there is.

    Returns: calibrations by camera name, and the names of the cameras without one (no file named, or none there).

    Raises:
        CalibrationError: a file that is there and cannot be used.
    """
    calibrations, missing = {}, []
    for camera in robot.cameras:
        if camera.calibration is not None and camera.calibration.is_file():
            calibrations[camera.name] = load_camera(camera.calibration)
        else:
            missing.append(camera.name)
    return calibrations, missing
