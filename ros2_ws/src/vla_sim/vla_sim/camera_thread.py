"""Pictures in a thread of their own, so that drawing never holds up physics."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import numpy as np

from vla_sim.renderer import Renderer, Shot
from vla_sim.world import World


class CameraThread:
    """Draws shots in the order they were taken and hands them over, from its own thread.

    Each camera has one shot: while that waits to be drawn, further pictures of the camera are skipped and counted.

    Args:
        world: whose cameras to draw.
        deliver: called in the thread with (camera name, capture time s, picture (H, W, 3) uint8).

    Attributes:
        skipped: pictures not taken since the previous one of that camera was still waiting.
    """

    def __init__(self, world: World, deliver: Callable[[str, float, np.ndarray], None]):
        self._world = world
        self._deliver = deliver
        self._shots = {camera.name: Shot(world.model) for camera in world.robot.cameras}
        self._idle = set(self._shots)
        self._waiting: queue.SimpleQueue[tuple[str, float] | None] = queue.SimpleQueue()
        self.skipped = 0
        self._thread = threading.Thread(target=self._run, name="cameras", daemon=True)
        self._thread.start()

    def take(self, camera: str) -> None:
        """Take a picture of the world as it is now; to be called from the world's thread."""
        if camera not in self._idle:
            self.skipped += 1
            return
        self._idle.discard(camera)
        self._world.take(camera, self._shots[camera])
        self._waiting.put((camera, self._world.time))

    def close(self) -> None:
        """Draw what is waiting and end the thread."""
        self._waiting.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        renderer = Renderer(self._world.model)
        sizes = {camera.name: (camera.width, camera.height) for camera in self._world.robot.cameras}
        while (item := self._waiting.get()) is not None:
            camera, stamp = item
            picture = renderer.draw(self._shots[camera], *sizes[camera])
            self._idle.add(camera)
            self._deliver(camera, stamp, picture)
        renderer.close()
