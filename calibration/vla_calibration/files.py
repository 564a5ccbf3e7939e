"""Calibration files: intrinsics and extrinsics of one camera, read strictly.

`calibration/<robot>/<camera>.yaml`, for an image of `width` x `height` pixels:

    camera: scene
    width: 320                     # pixels
    height: 240
    k:                             # intrinsic matrix, pixels; (0, 0) is the centre of the upper left pixel
      - [fx, 0.0, cx]
      - [0.0, fy, cy]
      - [0.0, 0.0, 1.0]
    distortion: [k1, k2, p1, p2, k3]   # plumb_bob, as OpenCV and sensor_msgs/CameraInfo have them
    parent: world                  # base frame of the robot, or a tool frame `<arm>_tool` for a wrist camera
    T_parent_camera:               # optical frame (z forward, x right, y down) in the parent, m
      - [r00, r01, r02, x]
      - [r10, r11, r12, y]
      - [r20, r21, r22, z]
      - [0.0, 0.0, 0.0, 1.0]

A key that is unknown or missing is refused with the file and the key.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

#: Largest error of R^T R against the identity: files carry 7 digits or more.
ROTATION_TOLERANCE = 1e-6

_KEYS = ("camera", "width", "height", "k", "distortion", "parent", "T_parent_camera")


class CalibrationError(ValueError):
    """A calibration that cannot be used; the message names the file, the key, the expected and the found."""


@dataclass(frozen=True, eq=False)
class CameraCalibration:
    """Calibration of one camera.

    Attributes:
        camera: name of the camera in the robot description.
        width, height: size of the calibrated image, pixels.
        K: intrinsic matrix (3, 3), pixels, zero skew.
        distortion: (k1, k2, p1, p2, k3) of the plumb_bob model, (5,).
        parent: frame the camera is fixed to: the robot's base frame, or `<arm>_tool`.
        T_parent_camera: optical frame in the parent (4, 4), m.

    Raises:
        CalibrationError: on making one with numbers that are no calibration.
    """

    camera: str
    width: int
    height: int
    K: np.ndarray
    distortion: np.ndarray
    parent: str
    T_parent_camera: np.ndarray

    def __post_init__(self) -> None:
        for key in ("camera", "parent"):
            value = getattr(self, key)
            if not isinstance(value, str) or not value:
                raise CalibrationError(f"{key}: expected a non-empty string, found {value!r}")
        for key in ("width", "height"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise CalibrationError(f"{key}: expected whole pixels above zero, found {value!r}")
        K = _array(self.K, "k", (3, 3))
        distortion = _array(self.distortion, "distortion", (5,))
        T = _array(self.T_parent_camera, "T_parent_camera", (4, 4))
        _check_intrinsics(K, self.width, self.height)
        _check_rigid(T)
        for key, array in (("K", K), ("distortion", distortion), ("T_parent_camera", T)):
            object.__setattr__(self, key, array)


def load_camera(path: str | os.PathLike) -> CameraCalibration:
    """Read a calibration file.

    Raises:
        CalibrationError: the file is missing, is no YAML, or holds no valid calibration.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise CalibrationError(f"{path}: expected a calibration file, found: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise CalibrationError(f"{path}: top level: expected a mapping, found {tree!r}")
    unknown = [key for key in tree if key not in _KEYS]
    if unknown:
        raise CalibrationError(f"{path}: {unknown[0]}: unknown key; expected one of {list(_KEYS)}")
    missing = [key for key in _KEYS if key not in tree]
    if missing:
        raise CalibrationError(f"{path}: {missing[0]}: missing; expected a value, found keys {list(tree)}")
    try:
        return CameraCalibration(**{("K" if key == "k" else key): value for key, value in tree.items()})
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from error


def save_camera(path: str | os.PathLike, calibration: CameraCalibration) -> None:
    """Write a calibration file, whole or not at all; its folder is made. Numbers come back bit for bit."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    c = calibration
    text = (
        f"camera: {c.camera}\n"
        f"width: {c.width}    # pixels\n"
        f"height: {c.height}\n"
        f"k:    # pixels\n{_rows(c.K)}"
        f"distortion: {_row(c.distortion)}    # k1 k2 p1 p2 k3 (plumb_bob)\n"
        f"parent: {c.parent}\n"
        f"T_parent_camera:    # optical frame (z forward, x right, y down) in the parent, m\n"
        f"{_rows(c.T_parent_camera)}"
    )
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    os.replace(draft, path)


def _array(value: Any, key: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.array(value, float)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != shape:
        raise CalibrationError(f"{key}: expected numbers of shape {shape}, found {value!r}")
    if not np.isfinite(array).all():
        raise CalibrationError(f"{key}: expected finite numbers, found {value!r}")
    array.setflags(write=False)
    return array


def _check_intrinsics(K: np.ndarray, width: int, height: int) -> None:
    (fx, skew, cx), (lower, fy, cy), last = K
    if skew != 0 or lower != 0 or list(last) != [0, 0, 1]:
        raise CalibrationError(f"k: expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], found {K.tolist()}")
    if not (fx > 0 and fy > 0):
        raise CalibrationError(f"k: expected focal lengths above zero, found fx {fx}, fy {fy}")
    if not (0 <= cx < width and 0 <= cy < height):
        raise CalibrationError(
            f"k: expected a principal point inside {width} x {height} pixels, found cx {cx}, cy {cy}"
        )


def _check_rigid(T: np.ndarray) -> None:
    R = T[:3, :3]
    error = np.abs(R.T @ R - np.eye(3)).max()
    if list(T[3]) != [0, 0, 0, 1]:
        raise CalibrationError(f"T_parent_camera: expected a last row [0, 0, 0, 1], found {T[3].tolist()}")
    if error > ROTATION_TOLERANCE:
        raise CalibrationError(f"T_parent_camera: expected orthonormal axes, found R^T R off by {error:.2g}")
    if np.linalg.det(R) < 0:
        raise CalibrationError("T_parent_camera: expected right-handed axes, found mirrored ones (det -1)")


def _row(values: np.ndarray) -> str:
    return "[" + ", ".join(map(_number, values)) + "]"


def _rows(matrix: np.ndarray) -> str:
    return "".join(f"  - {_row(row)}\n" for row in matrix)


def _number(value: float) -> str:
    """Shortest text that gives the float back; YAML 1.1 reads 1e-7, without a point, as text."""
    text = repr(float(value))
    mantissa, e, exponent = text.partition("e")
    return text if not e or "." in mantissa else f"{mantissa}.0e{exponent}"
