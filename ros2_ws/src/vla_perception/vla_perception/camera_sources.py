"""Where pictures come from: a V4L2 device, a file, a RealSense. No ROS.

The `driver` section of a camera in the robot description chooses and sets up the source; every key is checked:

    driver: {type: v4l2, device: /dev/video0, latency: 0.05}
    driver: {type: file, path: recording.mp4, loop: true}       # or a folder of pictures, read in order of their names
    driver: {type: file, path: episode.mcap, topic: /camera/scene/image_raw}
    driver: {type: realsense, serial: "012345678901"}           # needs the package pyrealsense2; serial may be absent

`latency` (s, 0 when absent) is the constant from exposure to the frame's time as the driver reports it; it is taken
off the stamp.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from vla_core.robot import Camera

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp")

#: Keys of each type of driver and what they must be; those after `latency` may be absent.
_KEYS = {
    "v4l2": {"device": (str, int)},
    "file": {"path": (str,), "topic": (str,), "loop": (bool,)},
    "realsense": {"serial": (str,)},
}
_REQUIRED = {"v4l2": ("device",), "file": ("path",), "realsense": ()}


class CameraError(ValueError):
    """A camera or its description that cannot be used; the message names it, the expected and the found."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture (H, W, 3) uint8 RGB, captured `age` seconds before it was returned."""

    picture: np.ndarray
    age: float


class CameraSource(Protocol):
    """A camera that is open."""

    def read(self) -> Frame:
        """Wait for the next frame. Raises CameraError when the camera gives none or one of another size."""

    def close(self) -> None:
        """Release the device."""


def open_source(camera: Camera, folder: Path = Path()) -> CameraSource:
    """Open the source that a camera's description names; relative file paths begin in `folder`.

    Raises:
        CameraError: an unknown type or key, or a source that does not open.
    """
    driver = check_driver(camera)
    match driver["type"]:
        case "v4l2":
            return _V4l2(camera, driver)
        case "file":
            return _File(camera, driver, folder)
        case _:
            return _RealSense(camera, driver)


def check_driver(camera: Camera) -> Mapping[str, Any]:
    """The driver section with every key checked.

    Raises:
        CameraError: an unknown type, an unknown or missing key, or a value of another kind.
    """
    driver, where = camera.driver, f"camera {camera.name!r}: driver"
    kind = driver.get("type")
    if kind not in _KEYS:
        raise CameraError(f"{where}.type: expected one of {sorted(_KEYS)}, found {kind!r}")
    allowed = {"type": (str,), "latency": (int, float)} | _KEYS[kind]
    for key, value in driver.items():
        if key not in allowed:
            raise CameraError(f"{where}.{key}: unknown key; expected one of {sorted(allowed)}")
        if not isinstance(value, allowed[key]) or (isinstance(value, bool) and bool not in allowed[key]):
            expected = " or ".join(t.__name__ for t in allowed[key])
            raise CameraError(f"{where}.{key}: expected {expected}, found {value!r}")
    for key in _REQUIRED[kind]:
        if key not in driver:
            raise CameraError(f"{where}.{key}: missing; expected a value for type {kind!r}")
    return driver


class _V4l2:
    """A video device through OpenCV. The kernel stamps each buffer with its monotonic clock."""

    def __init__(self, camera: Camera, driver: Mapping[str, Any]):
        self._camera, self._device = camera, driver["device"]
        self._capture = cv2.VideoCapture(self._device, cv2.CAP_V4L2)
        if not self._capture.isOpened():
            raise CameraError(f"camera {camera.name!r}: expected a video device at {self._device}, found none")
        for key, value in (
            (cv2.CAP_PROP_FRAME_WIDTH, camera.width),
            (cv2.CAP_PROP_FRAME_HEIGHT, camera.height),
            (cv2.CAP_PROP_FPS, camera.rate),
            (cv2.CAP_PROP_BUFFERSIZE, 1),
        ):
            self._capture.set(key, value)

    def read(self) -> Frame:
        good, picture = self._capture.read()
        if not good:
            raise CameraError(f"camera {self._camera.name!r}: video device {self._device} gives no more frames")
        age = kernel_age(self._capture.get(cv2.CAP_PROP_POS_MSEC), time.monotonic())
        return Frame(_sized(self._camera, cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)), age)

    def close(self) -> None:
        self._capture.release()


def kernel_age(milliseconds: float, monotonic: float) -> float:
    """Age in s of a V4L2 buffer by its stamp on the monotonic clock; 0 when the driver's stamp is on another clock."""
    age = monotonic - milliseconds * 1e-3
    return age if 0.0 <= age < 1.0 else 0.0


class _File:
    """A video, a folder of pictures or an image topic of a bag, at the camera's rate."""

    def __init__(self, camera: Camera, driver: Mapping[str, Any], folder: Path):
        self._camera = camera
        self._path = folder / Path(driver["path"]).expanduser()
        self._loop, self._topic = driver.get("loop", True), driver.get("topic")
        if not self._path.exists():
            raise CameraError(f"camera {camera.name!r}: driver.path: expected a file or folder, found no {self._path}")
        if (self._path.suffix == ".mcap") != (self._topic is not None):
            raise CameraError(f"camera {camera.name!r}: driver.topic: expected with an .mcap file, and only there")
        self._pictures = self._open()
        self._count = 0
        self._next = time.monotonic()

    def read(self) -> Frame:
        try:
            picture = next(self._pictures)
        except StopIteration:
            if not self._loop or not self._count:
                found = "the end" if self._count else "no pictures"
                raise CameraError(f"camera {self._camera.name!r}: {self._path}: found {found}") from None
            self._pictures = self._open()
            picture = next(self._pictures)
        self._count += 1
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = max(self._next + 1.0 / self._camera.rate, time.monotonic() - 1.0)
        return Frame(_sized(self._camera, picture), 0.0)

    def close(self) -> None:
        self._pictures.close()

    def _open(self) -> Iterator[np.ndarray]:
        if self._topic is not None:
            return _bag_pictures(self._path, self._topic)
        return _folder_pictures(self._path) if self._path.is_dir() else _video_pictures(self._path)


def _folder_pictures(folder: Path) -> Iterator[np.ndarray]:
    for file in sorted(f for f in folder.iterdir() if f.suffix.lower() in _PICTURES):
        picture = cv2.imread(str(file), cv2.IMREAD_COLOR)
        if picture is None:
            raise CameraError(f"{file}: expected a picture, found something else")
        yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _video_pictures(file: Path) -> Iterator[np.ndarray]:
    capture = cv2.VideoCapture(str(file))
    try:
        while True:
            good, picture = capture.read()
            if not good:
                return
            yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


def _bag_pictures(file: Path, topic: str) -> Iterator[np.ndarray]:
    from mcap.reader import make_reader
    from rclpy.serialization import deserialize_message
    from sensor_msgs.msg import Image

    with file.open("rb") as stream:
        for schema, _, message in make_reader(stream).iter_messages(topics=[topic]):
            image = deserialize_message(message.data, Image) if schema.name == "sensor_msgs/msg/Image" else None
            if image is None or image.encoding != "rgb8":
                found = schema.name if image is None else image.encoding
                raise CameraError(f"{file}: {topic}: expected sensor_msgs/msg/Image in rgb8, found {found}")
            rows = np.frombuffer(image.data, np.uint8).reshape(image.height, image.step)
            yield rows[:, : 3 * image.width].reshape(image.height, image.width, 3)


class _RealSense:
    """The colour stream of a RealSense. Frames stamped on the host's clock keep that time."""

    def __init__(self, camera: Camera, driver: Mapping[str, Any]):
        self._camera = camera
        try:
            import pyrealsense2
        except ImportError:
            raise CameraError(
                f"camera {camera.name!r}: driver.type realsense: expected the package pyrealsense2, found none"
            ) from None
        self._library = pyrealsense2
        config = pyrealsense2.config()
        if "serial" in driver:
            config.enable_device(driver["serial"])
        stream, colour = pyrealsense2.stream.color, pyrealsense2.format.rgb8
        config.enable_stream(stream, camera.width, camera.height, colour, round(camera.rate))
        self._pipeline = pyrealsense2.pipeline()
        try:
            self._pipeline.start(config)
        except RuntimeError as error:
            raise CameraError(f"camera {camera.name!r}: RealSense: {error}") from error

    def read(self) -> Frame:
        try:
            frame = self._pipeline.wait_for_frames(1000).get_color_frame()
        except RuntimeError as error:
            raise CameraError(f"camera {self._camera.name!r}: RealSense: {error}") from error
        domain = self._library.timestamp_domain
        on_host = frame.get_frame_timestamp_domain() in (domain.system_time, domain.global_time)
        age = time.time() - frame.get_timestamp() * 1e-3 if on_host else 0.0
        return Frame(_sized(self._camera, np.asanyarray(frame.get_data())), age)

    def close(self) -> None:
        self._pipeline.stop()


def _sized(camera: Camera, picture: np.ndarray) -> np.ndarray:
    if picture.shape != (camera.height, camera.width, 3):
        height, width = picture.shape[:2]
        raise CameraError(
            f"camera {camera.name!r}: expected {camera.width}x{camera.height} pixels, found {width}x{height}"
        )
    return np.ascontiguousarray(picture)
