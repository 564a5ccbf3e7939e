"""Offscreen pictures of a MuJoCo model, made cheap enough for software rendering."""

from __future__ import annotations

import mujoco
import numpy as np


class Renderer:
    """Renders any camera at any size up to the model's offscreen buffer, in one OpenGL context.

    Shadows, reflections and multisampling are off: in software they cost five times the rest of the picture.
    An instance belongs to the thread that made it.
    """

    def __init__(self, model: mujoco.MjModel):
        self._model = model
        model.vis.quality.offsamples = 0
        self._width, self._height = model.vis.global_.offwidth, model.vis.global_.offheight
        self._context_gl = mujoco.GLContext(self._width, self._height)
        self._context_gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom + 16)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def render(self, data: mujoco.MjData, camera: int, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB picture of camera number `camera`."""
        if not (0 < width <= self._width and 0 < height <= self._height):
            raise ValueError(
                f"picture size: expected at most {self._width}x{self._height}, found {width}x{height} pixels"
            )
        self._camera.fixedcamid = camera
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        picture = np.empty((height, width, 3), np.uint8)
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, self._scene, self._context)
        mujoco.mjr_readPixels(picture, None, viewport, self._context)
        return np.ascontiguousarray(picture[::-1])

    def close(self) -> None:
        self._context.free()
        self._context_gl.free()
