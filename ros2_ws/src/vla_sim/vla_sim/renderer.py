"""Offscreen pictures of a MuJoCo model, made cheap enough for software rendering."""

from __future__ import annotations

import atexit
import copy
import weakref

import mujoco
import numpy as np

#: Corners of a mesh nearer than this to one another are drawn as one, m: finer than a pixel at table distance, and
#: software rendering spends its time on triangles.
MESH_DETAIL = 0.003


class Shot:
    """What one camera sees at one moment: a scene ready to be drawn, independent of the data it was taken from."""

    def __init__(self, model: mujoco.MjModel):
        self._model = model
        self.scene = mujoco.MjvScene(model, maxgeom=model.ngeom + 16)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.scene.flags[flag] = 0
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def take(self, data: mujoco.MjData, camera: int) -> None:
        """Point the shot at what camera number `camera` sees now; takes microseconds and needs no OpenGL."""
        self._camera.fixedcamid = camera
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self.scene
        )


class Renderer:
    """Draws shots at any size up to the model's offscreen buffer, in one OpenGL context.

    Shadows, reflections and multisampling are off: in software they cost several times the rest of the picture.
    An instance belongs to the thread that made it.
    """

    def __init__(self, model: mujoco.MjModel):
        model.vis.quality.offsamples = 0
        self._width, self._height = model.vis.global_.offwidth, model.vis.global_.offheight
        self._gl = mujoco.GLContext(self._width, self._height)
        self._gl.make_current()
        self._context = mujoco.MjrContext(_coarsened(model), mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._free = weakref.finalize(self, _free, self._context, self._gl)
        # Before EGL's own exit handler, which was registered when the first context was made; that of `weakref` may
        # be an older one and come after it.
        self._free.atexit = False
        atexit.register(self._free)

    def draw(self, shot: Shot, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB picture."""
        if not (0 < width <= self._width and 0 < height <= self._height):
            raise ValueError(
                f"picture size: expected at most {self._width}x{self._height}, found {width}x{height} pixels"
            )
        picture = np.empty((height, width, 3), np.uint8)
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, shot.scene, self._context)
        mujoco.mjr_readPixels(picture, None, viewport, self._context)
        return np.ascontiguousarray(picture[::-1])

    def close(self) -> None:
        """Free the context; the renderer cannot be used afterwards."""
        self._free()


def _free(context: mujoco.MjrContext, gl: mujoco.GLContext) -> None:
    gl.make_current()
    context.free()
    gl.free()


def _coarsened(model: mujoco.MjModel) -> mujoco.MjModel:
    """A copy whose meshes carry fewer triangles, to draw from (vertex clustering, Rossignac and Borrel 1993)."""
    coarse = copy.copy(model)
    for mesh in range(model.nmesh):
        first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        cells = np.round(model.mesh_vert[first : first + count] / MESH_DETAIL).astype(np.int64)
        _, kept, cell = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
        face = kept[cell.reshape(-1)][model.mesh_face[faces]]
        whole = (face[:, 0] != face[:, 1]) & (face[:, 1] != face[:, 2]) & (face[:, 2] != face[:, 0])
        used = slice(faces.start, faces.start + int(whole.sum()))
        coarse.mesh_face[used] = face[whole]
        coarse.mesh_facenormal[used] = model.mesh_facenormal[faces][whole]
        coarse.mesh_facenum[mesh] = whole.sum()
    return coarse
