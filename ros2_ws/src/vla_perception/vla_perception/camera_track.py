"""The newest images of one camera, and whether the camera is well.

Stamps are capture times, `now` is the time of the call; both are seconds of the ROS clock. Nothing here
reads a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

import numpy as np
from vla_core.robot import Camera
from vla_core.timeline import ClockJump, Stamped, Timeline

#: Encoding of every image in the stack (sensor_msgs/image_encodings).
ENCODING = "rgb8"

#: Images of this many seconds are kept: the most that two cameras' delays may differ.
KEPT = 0.5

#: Every how many bytes two images are compared before they are compared whole. A prime, so that it does not
#: run down one column of the picture.
_STRIDE = 1009

#: Identical images after which joint states are no older than they: a reset moves a simulated arm at once.
_SETTLED = 3


class ImageMessage(Protocol):
    """What is used of sensor_msgs/Image (or of the same message read from a bag)."""

    height: int
    width: int
    encoding: str
    step: int
    data: Any


@dataclass(frozen=True)
class HealthLimits:
    """When a camera counts as unhealthy.

    Attributes:
        silence: periods of the camera without a new image.
        lead: seconds that a stamp may lie in the future (in simulation /clock may come later than the image).
        age: seconds that a stamp may lie in the past when the image arrives.
        frozen_images: identical images in a row, during which
        frozen_motion: metres were moved by a tool, so that the picture must have changed.
    """

    silence: float = 2.5
    lead: float = 0.1
    age: float = 0.5
    frozen_images: int = 10
    frozen_motion: float = 0.03


class CameraTrack:
    """Images of one camera in order of their stamps, and its health."""

    def __init__(self, camera: Camera, limits: HealthLimits, now: float):
        self.camera = camera
        self._limits = limits
        self._images = Timeline(ceil(KEPT * camera.rate) + 2, "object")
        self._previous: tuple[bytes, ImageMessage] | None = None
        self._tools_then: np.ndarray | None = None
        self._fault = ""
        self._frozen = ""
        self.clear(now)

    def clear(self, now: float) -> None:
        """Forget everything, as on the first start at `now`."""
        self._images.clear()
        self._previous = self._tools_then = None
        self._fault = self._frozen = ""
        self._identical = 0
        self._moved = 0.0
        self._message = self._progress = now

    def add(self, stamp: float, image: ImageMessage, now: float, tools: ToolPositions) -> None:
        """Take an image. One that cannot be used is left out, and `fault` says why until a good one comes.

        Args:
            tools: gives the tool positions (arms, 3) in m that this camera should see moving; asked only
                while images are identical.
        """
        self._message = now
        self._fault = self._find_fault(stamp, image, now)
        if self._fault or (len(self._images) and stamp == self._images.newest):
            return
        try:
            self._images.add(stamp, image)
        except ClockJump:
            self._fault = f"clock: stamps went back by {self._images.newest - stamp:.3f} s"
            self._images.clear()
            self._images.add(stamp, image)
        self._progress = now
        self._watch_content(image, tools)

    def fault(self, now: float) -> str:
        """What is wrong with the camera; empty: nothing."""
        if self._fault or self._frozen:
            return self._fault or self._frozen
        allowed = self._limits.silence / self.camera.rate
        if now - self._progress <= allowed:
            return "" if len(self._images) else "waiting for the first image"
        silent = f"for {now - self._progress:.2f} s (expected every {1 / self.camera.rate:.3f} s)"
        if now - self._message <= allowed:
            return f"frozen: images come, but their stamp has not advanced {silent}"
        return f"dead: no image {silent}"

    @property
    def newest(self) -> float | None:
        """Stamp of the newest image, s; None: there is none."""
        return self._images.newest if len(self._images) else None

    def nearest(self, stamp: float) -> Stamped:
        """The image nearest to a time, with its stamp."""
        return self._images.nearest(stamp)

    def _find_fault(self, stamp: float, image: ImageMessage, now: float) -> str:
        camera = self.camera
        if (image.width, image.height, image.encoding) != (camera.width, camera.height, ENCODING):
            return (
                f"configuration: expected {camera.width}x{camera.height} {ENCODING}, "
                f"found {image.width}x{image.height} {image.encoding}"
            )
        if image.step != 3 * image.width or len(image.data) != image.step * image.height:
            return (
                f"configuration: expected {3 * camera.width * camera.height} bytes "
                f"in rows of {3 * camera.width}, found {len(image.data)} in rows of {image.step}"
            )
        if stamp > now + self._limits.lead:
            return f"clock: stamp {stamp - now:.3f} s in the future (allowed {self._limits.lead} s)"
        if stamp < now - self._limits.age:
            return f"clock: stamp {now - stamp:.3f} s old on arrival (allowed {self._limits.age} s)"
        return ""

    def _watch_content(self, image: ImageMessage, tools: ToolPositions) -> None:
        """Count identical images, and how far the tools moved meanwhile."""
        sparse = bytes(image.data[::_STRIDE])
        previous, self._previous = self._previous, (sparse, image)
        if previous is None or previous[0] != sparse or not _same(previous[1], image):
            self._identical, self._moved, self._tools_then, self._frozen = 0, 0.0, None, ""
            return
        self._identical += 1
        positions = tools()
        if positions is not None and (self._tools_then is None or self._identical <= _SETTLED):
            self._tools_then = positions
        if positions is not None and len(positions):
            moved = np.linalg.norm(positions - self._tools_then, axis=1).max()
            self._moved = max(self._moved, float(moved))
        if self._identical >= self._limits.frozen_images and self._moved >= self._limits.frozen_motion:
            self._frozen = f"frozen: {self._identical + 1} identical images while a tool moved by {self._moved:.3f} m"


class ToolPositions(Protocol):
    """Positions of tools (arms, 3) in the base frame now, m; None: unknown."""

    def __call__(self) -> np.ndarray | None: ...


def _same(a: ImageMessage, b: ImageMessage) -> bool:
    return np.array_equal(np.frombuffer(a.data, np.uint8), np.frombuffer(b.data, np.uint8))
