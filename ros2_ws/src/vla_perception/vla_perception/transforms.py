"""A transform buffer that never blocks: the tree of frames, read at any time of the last seconds.

What tf2 does for a node, without its listener and without ROS: transforms between a frame and its parent
come in with stamps (or once, for static ones), and `lookup` composes them along the tree at one time,
interpolating each on SE(3) (translation linear, rotation geodesic). A transform that is not there is an
error with its reason, at once; waiting is the caller's business, who knows what else arrives meanwhile.

Threading: one thread may write while others read, with no lock. The values of a frame are a list that
writers only append to or replace whole, so a reader's list stays as it found it.

Inside, a transform is seven plain floats (translation, quaternion xyzw): for single 4x4 products Python's
floats are several times faster than NumPy's arrays.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from enum import Enum
from math import asin, sin, sqrt

import numpy as np
from numpy.typing import ArrayLike
from vla_core import se3

#: Translation x y z (m) and unit quaternion x y z w.
_Pose = tuple[float, float, float, float, float, float, float]

_IDENTITY: _Pose = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)


class TransformError(ValueError):
    """A transform that cannot be put into the tree; the message names the frames."""


class Reason(Enum):
    """Why a transform is unavailable."""

    UNKNOWN_FRAME = "unknown frame"
    NOT_CONNECTED = "not connected"
    EXTRAPOLATION = "extrapolation"


class TransformUnavailable(LookupError):
    """A transform that cannot be given now.

    Attributes:
        reason: what is missing.
        missing: EXTRAPOLATION: how far outside the known times the asked time lies, s (positive: too new);
            else 0.
    """

    def __init__(self, reason: Reason, message: str, missing: float = 0.0):
        super().__init__(f"{reason.value}: {message}")
        self.reason, self.missing = reason, missing


class TransformBuffer:
    """The tree of frames of the last `cache` seconds.

    Every frame has one parent for good. Times are seconds of the ROS clock. A stamp more than `cache` older
    than the frame's newest is dropped silently, as late data is of no use; after a clock that went
    backwards call `clear`.
    """

    def __init__(self, cache: float = 10.0):
        if not cache > 0:
            raise TransformError(f"cache: expected seconds above zero, found {cache}")
        self.cache = float(cache)
        self._edges: dict[str, _Edge] = {}  # child frame -> edge to its parent
        self._parents: set[str] = set()
        self._paths: dict[tuple[str, str], tuple[list[_Edge], list[_Edge]]] = {}

    def set_static(self, parent: str, child: str, T_parent_child: ArrayLike) -> None:
        """Set a transform (4, 4) that holds at all times. A second call replaces it.

        Raises:
            TransformError: `child` has another parent or is a moving frame, the tree would close to a loop,
                or the numbers are no transform.
        """
        edge = self._edge(parent, child, static=True)
        edge.values = [(0.0, _to_pose(T_parent_child, parent, child))]
        self._put(edge)

    def set(self, parent: str, child: str, stamp: float, T_parent_child: ArrayLike) -> None:
        """Add a transform (4, 4) at `stamp`, s. A value with the same stamp is replaced.

        Raises:
            TransformError: as `set_static`, with moving and static exchanged, or a stamp that is not finite.
        """
        stamp = float(stamp)
        if not abs(stamp) < float("inf"):
            raise TransformError(f"stamp of {child!r} in {parent!r}: expected finite seconds, found {stamp}")
        edge = self._edge(parent, child, static=False)
        edge.add(stamp, _to_pose(T_parent_child, parent, child), self.cache)
        self._put(edge)

    def lookup(self, parent: str, child: str, stamp: float | None = None) -> np.ndarray:
        """T_parent_child (4, 4) at `stamp`, s; None: the newest time that all moving frames in between know.

        Raises:
            TransformUnavailable: a frame is unknown, the two are not connected, or the time is outside what
                is cached (there is no extrapolation); the message says which frame and by how much.
        """
        up, down = self._path(parent, child)
        if stamp is None:
            times = [edge.values[-1][0] for edge in up + down if not edge.static]
            stamp = min(times, default=0.0)
        to_child = _IDENTITY
        for edge in down:
            to_child = _compose(to_child, edge.at(stamp))
        if up:
            to_parent = _IDENTITY
            for edge in up:
                to_parent = _compose(to_parent, edge.at(stamp))
            to_child = _compose(_invert(to_parent), to_child)
        return _to_matrix(to_child)

    def clear(self) -> None:
        """Forget all moving frames (after a clock jump); static transforms stay."""
        self._edges = {child: edge for child, edge in self._edges.items() if edge.static}
        self._parents = {edge.parent for edge in self._edges.values()}
        self._paths = {}

    def _edge(self, parent: str, child: str, static: bool) -> _Edge:
        edge = self._edges.get(child)
        if edge is not None:
            if edge.parent != parent:
                raise TransformError(f"frame {child!r}: expected parent {edge.parent!r}, found {parent!r}")
            if edge.static != static:
                kinds = ("static", "moving") if edge.static else ("moving", "static")
                message = f"frame {child!r}: expected a {kinds[0]} transform, found a {kinds[1]} one"
                raise TransformError(message)
            return edge
        ancestors = [parent, *(e.parent for e in self._ancestry(parent))]
        if child in ancestors:
            raise TransformError(f"frame {child!r} in {parent!r}: expected a tree, found a loop")
        return _Edge(parent, child, static)

    def _put(self, edge: _Edge) -> None:
        """Put an edge that has a value into the tree, unless it is there."""
        if edge.child not in self._edges:
            self._edges[edge.child] = edge
            self._parents.add(edge.parent)
            self._paths = {}

    def _ancestry(self, frame: str) -> list[_Edge]:
        """Edges from `frame` up to its root, nearest first."""
        edges = []
        while (edge := self._edges.get(frame)) is not None:
            edges.append(edge)
            frame = edge.parent
        return edges

    def _path(self, parent: str, child: str) -> tuple[list[_Edge], list[_Edge]]:
        """Edges from the frames' nearest common ancestor down to `parent`, and down to `child`."""
        path = self._paths.get((parent, child))
        if path is not None:
            return path
        for frame in (parent, child):
            if frame not in self._edges and frame not in self._parents:
                known = sorted(self._parents | set(self._edges))
                raise TransformUnavailable(Reason.UNKNOWN_FRAME, f"expected one of {known}, found {frame!r}")
        up, down = self._ancestry(parent)[::-1], self._ancestry(child)[::-1]
        roots = [edges[0].parent if edges else frame for edges, frame in ((up, parent), (down, child))]
        if roots[0] != roots[1]:
            raise TransformUnavailable(
                Reason.NOT_CONNECTED,
                f"expected {parent!r} and {child!r} in one tree, found roots {roots[0]!r} and {roots[1]!r}",
            )
        shared = 0
        while shared < min(len(up), len(down)) and up[shared] is down[shared]:
            shared += 1
        path = self._paths[parent, child] = (up[shared:], down[shared:])
        return path


class _Edge:
    """A frame in its parent: values (stamp, pose) in order of their stamps; a static one has a single
    value."""

    __slots__ = ("child", "parent", "static", "values")

    def __init__(self, parent: str, child: str, static: bool):
        self.parent, self.child, self.static = parent, child, static
        self.values: list[tuple[float, _Pose]] = []

    def add(self, stamp: float, pose: _Pose, cache: float) -> None:
        values = self.values
        newest = values[-1][0] if values else stamp
        if not values or stamp > newest:
            values.append((stamp, pose))
            # Half as old again before a cut, so that the copy is rare.
            if stamp - values[0][0] > 1.5 * cache:
                self.values = values[bisect_left(values, stamp - cache, key=_stamp) :]
        elif stamp >= newest - cache:
            changed = [value for value in values if value[0] != stamp]
            insort(changed, (stamp, pose))
            self.values = changed

    def at(self, stamp: float) -> _Pose:
        values = self.values
        if self.static:
            return values[0][1]
        oldest, newest = values[0][0], values[-1][0]
        if stamp < oldest or stamp > newest:
            missing = stamp - (oldest if stamp < oldest else newest)
            raise TransformUnavailable(
                Reason.EXTRAPOLATION,
                f"{self.child!r} in {self.parent!r}: expected a time in [{oldest:.6f}, {newest:.6f}] s, "
                f"found {stamp:.6f} s, {abs(missing):.6f} s too {'old' if missing < 0 else 'new'}",
                missing,
            )
        right = bisect_left(values, stamp, key=_stamp)
        time, pose = values[right]
        if time == stamp:
            return pose
        before, previous = values[right - 1]
        return _interpolate(previous, pose, (stamp - before) / (time - before))


def _stamp(value: tuple[float, _Pose]) -> float:
    return value[0]


def _to_pose(T: ArrayLike, parent: str, child: str) -> _Pose:
    T = np.asarray(T, float)
    if T.shape != (4, 4) or not np.isfinite(T).all():
        raise TransformError(f"{child!r} in {parent!r}: expected finite numbers of shape (4, 4), found {T}")
    return tuple(se3.matrix_to_pose(T).tolist())


def _to_matrix(pose: _Pose) -> np.ndarray:
    px, py, pz, x, y, z, w = pose
    return np.array(
        (
            (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w), px),
            (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w), py),
            (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y), pz),
            (0.0, 0.0, 0.0, 1.0),
        )
    )


def _rotate(x: float, y: float, z: float, w: float, vx: float, vy: float, vz: float) -> tuple[float, float, float]:
    """Vector v turned by the unit quaternion: v + w t + q x t with t = 2 q x v."""
    tx, ty, tz = 2 * (y * vz - z * vy), 2 * (z * vx - x * vz), 2 * (x * vy - y * vx)
    return vx + w * tx + y * tz - z * ty, vy + w * ty + z * tx - x * tz, vz + w * tz + x * ty - y * tx


def _compose(a: _Pose, b: _Pose) -> _Pose:
    ax, ay, az, x1, y1, z1, w1 = a
    bx, by, bz, x2, y2, z2, w2 = b
    rx, ry, rz = _rotate(x1, y1, z1, w1, bx, by, bz)
    return (
        ax + rx,
        ay + ry,
        az + rz,
        w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
        w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
        w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
        w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
    )


def _invert(a: _Pose) -> _Pose:
    px, py, pz, x, y, z, w = a
    rx, ry, rz = _rotate(-x, -y, -z, w, px, py, pz)
    return -rx, -ry, -rz, -x, -y, -z, w


def _interpolate(a: _Pose, b: _Pose, u: float) -> _Pose:
    """Translation linear, rotation by slerp on the shorter arc."""
    ax, ay, az, x1, y1, z1, w1 = a
    bx, by, bz, x2, y2, z2, w2 = b
    if x1 * x2 + y1 * y2 + z1 * z2 + w1 * w2 < 0:
        x2, y2, z2, w2 = -x2, -y2, -z2, -w2
    # Half of the chord between the quaternions: precise for small angles, which acos of the dot product is
    # not.
    half = 0.5 * sqrt((x2 - x1) ** 2 + (y2 - y1) ** 2 + (z2 - z1) ** 2 + (w2 - w1) ** 2)
    v = 1 - u
    if half < 1e-9:
        f, g = v, u
    else:
        angle = 2 * asin(min(half, 1.0))
        f, g = sin(v * angle) / sin(angle), sin(u * angle) / sin(angle)
    return (
        v * ax + u * bx,
        v * ay + u * by,
        v * az + u * bz,
        f * x1 + g * x2,
        f * y1 + g * y2,
        f * z1 + g * z2,
        f * w1 + g * w2,
    )
