"""Where the links of a cell are and how far apart: capsules and boxes on chains of joints, compiled by numba.

Distances are exact: between segments (Ericson, "Real-Time Collision Detection", 2005, section 5.1.9) and between a
segment and a box, from which the distance is convex along the segment. MuJoCo's narrow phase gives the same ones, but
many places on the way to rest are looked at in a period: here one takes 2 and 8 us (7 and 14 joints, 76 and 532 pairs),
where a call of an engine, and of NumPy to read what it found, took 15 to 30.

Functions that call each other stay in one file: numba does not see when a file changes that its cache depends on. A
call costs numba some 0.2 us for every array that it is handed, so layout and place travel packed, in two arrays each.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

compiled = njit(cache=True)

#: Segments shorter than this are points, m; box and axis overlap when nearer than this, m.
_POINT, _TOUCH = 1e-9, 1e-9
#: A way is measured in as many pieces as leave the links this near the straight line, m, and in so many at most.
_BEND, _PIECES = 1e-2, 6
#: What a way to rest may run into first.
FREE, COLLISION, WORKSPACE, CONE = 0, 1, 2, 3


class Layout(NamedTuple):
    """What a cell is made of: n joints in the order of q, each with a frame that it moves, g capsules, and boxes.

    order (n,): joints, parents first. parent (n,): the joint whose frame carries each, -1 for the base. T_parent_joint
    (n, 3, 4): at q = 0, upper rows. axis (n, 3), in the joint's frame; hinge (n,): whether it turns.
    link (g,): the frame each capsule is on, -1 for the base; ends (g, 2, 3) of its axis there; radius (g,); sphere
    (g,): half its length, and its radius; reach (g,): no joint that moves it has its axis farther from its ends, m.
    boxes (boxes, 2, 3): lower and upper corner in the base frame.
    pairs (k, 2): watched ones, a capsule and a capsule, or a box numbered after the capsules; margin (k,), m.
    moves (n + 1, n): whether a joint moves a frame; the last row is the base's.
    begin (arms + 1,): the first joint of each arm, and n. tool (arms,): frames of the tools; T_frame_tool (arms, 3, 4),
    upper rows. workspace (arms, 2, 3): lower and upper corner of each tool's box. cone (arms, 2, 3): an axis in the
    tool's frame and a direction in the base's; cosine (arms,) of the angle between them is this at least (-1: free).
    """

    order: np.ndarray
    parent: np.ndarray
    hinge: np.ndarray
    link: np.ndarray
    pairs: np.ndarray
    begin: np.ndarray
    tool: np.ndarray
    T_parent_joint: np.ndarray
    axis: np.ndarray
    ends: np.ndarray
    radius: np.ndarray
    sphere: np.ndarray
    reach: np.ndarray
    boxes: np.ndarray
    margin: np.ndarray
    moves: np.ndarray
    T_frame_tool: np.ndarray
    workspace: np.ndarray
    cone: np.ndarray
    cosine: np.ndarray


class Place(NamedTuple):
    """Where all that is, in the base frame, m.

    T_base_joint (n, 3, 4), T_base_tool (arms, 3, 4): upper rows. ends (g, 3, 3): of the capsules, and their middle.
    W, L (3, n): joint j moves a point x at L_j + W_j x x, m per rad.
    Of the tools, by `look`: jacobian (6 n,), arm after arm (6, joints), [v, w] at the tool point per velocity of the
    arm's joints; tool_rows (3 arms, n), the velocity of the tool points, arm after arm, per velocity of all joints.
    What `look` found near: count (1,), pair: which of Layout.pairs, distance, normal (.., 3) from the first to the
    second, point (.., 3) of the first one's axis, rows (.., n): change of the distance per joint velocity; at most two
    entries a pair.
    """

    count: np.ndarray
    pair: np.ndarray
    T_base_joint: np.ndarray
    T_base_tool: np.ndarray
    ends: np.ndarray
    W: np.ndarray
    L: np.ndarray
    jacobian: np.ndarray
    tool_rows: np.ndarray
    distance: np.ndarray
    normal: np.ndarray
    point: np.ndarray
    rows: np.ndarray


#: Fields of a layout that are whole numbers, its first ones.
_WHOLE = Layout._fields[: Layout._fields.index("T_parent_joint")]


def pack(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """A layout as two arrays, of whole numbers and of others; `unpack_layout` undoes it."""
    sizes = (len(layout.order), len(layout.link), len(layout.boxes), len(layout.pairs), len(layout.tool))
    parts = [np.ravel(part) for part in layout]
    whole = np.concatenate([sizes, *parts[: len(_WHOLE)]]).astype(np.int64)
    return whole, np.concatenate(parts[len(_WHOLE) :]).astype(float)


def make_place(whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An empty place for a layout, packed as that is; `unpack_place` undoes it."""
    n, g, _, pairs, arms = whole[:5].tolist()
    most = 2 * pairs
    return np.zeros(1 + most, np.int64), np.zeros(24 * n + 12 * arms + 9 * g + 3 * arms * n + (7 + n) * most)


@compiled
def _cut(x, at, shape):
    """An array of this shape out of x, and where it ends."""
    size = 1
    for length in shape:
        size *= length
    return x[at : at + size].reshape(shape), at + size


@compiled
def unpack_layout(whole, others):
    """A view of a packed layout."""
    n, g, boxes, k, arms = whole[0], whole[1], whole[2], whole[3], whole[4]
    order, at = _cut(whole, 5, (n,))
    parent, at = _cut(whole, at, (n,))
    hinge, at = _cut(whole, at, (n,))
    link, at = _cut(whole, at, (g,))
    pairs, at = _cut(whole, at, (k, 2))
    begin, at = _cut(whole, at, (arms + 1,))
    tool, at = _cut(whole, at, (arms,))
    T_parent_joint, at = _cut(others, 0, (n, 3, 4))
    axis, at = _cut(others, at, (n, 3))
    ends, at = _cut(others, at, (g, 2, 3))
    radius, at = _cut(others, at, (g,))
    sphere, at = _cut(others, at, (g,))
    reach, at = _cut(others, at, (g,))
    corners, at = _cut(others, at, (boxes, 2, 3))
    margin, at = _cut(others, at, (k,))
    moves, at = _cut(others, at, (n + 1, n))
    T_frame_tool, at = _cut(others, at, (arms, 3, 4))
    workspace, at = _cut(others, at, (arms, 2, 3))
    cone, at = _cut(others, at, (arms, 2, 3))
    cosine, at = _cut(others, at, (arms,))
    return Layout(
        order, parent, hinge, link, pairs, begin, tool, T_parent_joint, axis, ends, radius, sphere, reach, corners,
        margin, moves, T_frame_tool, workspace, cone, cosine,
    )  # fmt: skip


@compiled
def unpack_place(layout_whole, whole, others):
    """A view of a packed place; layout_whole: the first array of its packed layout."""
    n, g, most, arms = layout_whole[0], layout_whole[1], 2 * layout_whole[3], layout_whole[4]
    count, at = _cut(whole, 0, (1,))
    pair, at = _cut(whole, at, (most,))
    T_base_joint, at = _cut(others, 0, (n, 3, 4))
    T_base_tool, at = _cut(others, at, (arms, 3, 4))
    ends, at = _cut(others, at, (g, 3, 3))
    W, at = _cut(others, at, (3, n))
    L, at = _cut(others, at, (3, n))
    jacobian, at = _cut(others, at, (6 * n,))
    tool_rows, at = _cut(others, at, (3 * arms, n))
    distance, at = _cut(others, at, (most,))
    normal, at = _cut(others, at, (most, 3))
    point, at = _cut(others, at, (most, 3))
    rows, at = _cut(others, at, (most, n))
    return Place(count, pair, T_base_joint, T_base_tool, ends, W, L, jacobian, tool_rows, distance, normal, point, rows)


# ------------------------------------------------------------------------------------------------------ kinematics


@compiled
def _combine(first, second, out):
    """Upper rows (3, 4) of two transforms one after the other."""
    for i in range(3):
        for j in range(4):
            out[i, j] = first[i, 0] * second[0, j] + first[i, 1] * second[1, j] + first[i, 2] * second[2, j]
        out[i, 3] += first[i, 3]


@compiled
def _copy(T, out):
    for i in range(3):
        for j in range(4):
            out[i, j] = T[i, j]


@compiled
def put(layout_whole, layout_others, whole, others, q):
    """Set joint positions q (n,): everything of a place but what only `look` finds. Layout and place are packed."""
    _put(unpack_layout(layout_whole, layout_others), unpack_place(layout_whole, whole, others), q)


@compiled
def _put(layout, place, q):
    frames, still = place.T_base_joint, np.empty((3, 4))
    for k in layout.order:
        T = frames[k]
        if layout.parent[k] < 0:
            _copy(layout.T_parent_joint[k], still)
        else:
            _combine(frames[layout.parent[k]], layout.T_parent_joint[k], still)
        a, b, c = layout.axis[k, 0], layout.axis[k, 1], layout.axis[k, 2]
        u = still[0, 0] * a + still[0, 1] * b + still[0, 2] * c
        v = still[1, 0] * a + still[1, 1] * b + still[1, 2] * c
        w = still[2, 0] * a + still[2, 1] * b + still[2, 2] * c
        if layout.hinge[k]:
            sine, cosine = math.sin(q[k]), math.cos(q[k])
            rest = 1.0 - cosine
            for i in range(3):
                x, y, z = still[i, 0], still[i, 1], still[i, 2]
                along = rest * (x * a + y * b + z * c)
                T[i, 0] = cosine * x + along * a + sine * (y * c - z * b)
                T[i, 1] = cosine * y + along * b + sine * (z * a - x * c)
                T[i, 2] = cosine * z + along * c + sine * (x * b - y * a)
                T[i, 3] = still[i, 3]
            place.W[0, k], place.W[1, k], place.W[2, k] = u, v, w
            place.L[0, k] = T[1, 3] * w - T[2, 3] * v
            place.L[1, k] = T[2, 3] * u - T[0, 3] * w
            place.L[2, k] = T[0, 3] * v - T[1, 3] * u
        else:
            _copy(still, T)
            T[0, 3] += q[k] * u
            T[1, 3] += q[k] * v
            T[2, 3] += q[k] * w
            place.L[0, k], place.L[1, k], place.L[2, k] = u, v, w
    for g in range(len(layout.link)):
        k, ends, out = layout.link[g], layout.ends[g], place.ends[g]
        for e in range(2):
            for i in range(3):
                if k < 0:
                    out[e, i] = ends[e, i]
                else:
                    T = frames[k]
                    out[e, i] = T[i, 0] * ends[e, 0] + T[i, 1] * ends[e, 1] + T[i, 2] * ends[e, 2] + T[i, 3]
        for i in range(3):
            out[2, i] = 0.5 * (out[0, i] + out[1, i])
    for a in range(len(layout.tool)):
        _combine(frames[layout.tool[a]], layout.T_frame_tool[a], place.T_base_tool[a])


@compiled
def _find_jacobians(layout, place):
    W, L, n = place.W, place.L, place.W.shape[1]
    for a in range(len(layout.tool)):
        begin, end, T = layout.begin[a], layout.begin[a + 1], place.T_base_tool[a]
        J, px, py, pz = place.jacobian[6 * begin : 6 * end].reshape((6, end - begin)), T[0, 3], T[1, 3], T[2, 3]
        for k in range(begin, end):
            j, x, y, z = k - begin, W[0, k], W[1, k], W[2, k]
            J[0, j] = L[0, k] + y * pz - z * py
            J[1, j] = L[1, k] + z * px - x * pz
            J[2, j] = L[2, k] + x * py - y * px
            J[3, j], J[4, j], J[5, j] = x, y, z
        for i in range(3):
            for k in range(n):
                place.tool_rows[3 * a + i, k] = J[i, k - begin] if begin <= k < end else 0.0


@compiled
def path_bends(W, L, carries, begin, end, T, directions):
    """(k, 6): derivative of the twist at the origin of T (3, 4) that the joints from begin to end make, along each of
    the joint directions (k, joints). carries (n + 1, n): Layout.moves.

    What carries a joint with twist (w, l) turns its axis by w x W and moves its L by w x L + l x W.
    """
    bends, p = np.zeros((len(directions), 6)), T[:, 3]
    for d in range(len(directions)):
        speed = np.zeros(3)  # of the tool point
        for j in range(begin, end):
            v = directions[d, j - begin]
            speed[0] += v * (L[0, j] + W[1, j] * p[2] - W[2, j] * p[1])
            speed[1] += v * (L[1, j] + W[2, j] * p[0] - W[0, j] * p[2])
            speed[2] += v * (L[2, j] + W[0, j] * p[1] - W[1, j] * p[0])
        for j in range(begin, end):
            w, l = np.zeros(3), np.zeros(3)
            for i in range(begin, end):
                if i != j and carries[j, i] != 0.0:
                    for r in range(3):
                        w[r] += directions[d, i - begin] * W[r, i]
                        l[r] += directions[d, i - begin] * L[r, i]
            v = directions[d, j - begin]
            for r in range(3):
                s, t = (r + 1) % 3, (r + 2) % 3
                bends[d, r] += v * (w[s] * L[t, j] - w[t] * L[s, j] + l[s] * W[t, j] - l[t] * W[s, j])
                bends[d, r] += v * (W[s, j] * speed[t] - W[t, j] * speed[s])
                turn = v * (w[s] * W[t, j] - w[t] * W[s, j])
                bends[d, 3 + r] += turn
                bends[d, t] += turn * p[s]
                bends[d, s] -= turn * p[t]
    return bends


# ------------------------------------------------------------------------------------------------------- distances


@compiled
def _share(x):
    return min(max(x, 0.0), 1.0)


@compiled
def segments(a, b, c, d):
    """Shares s, t of the segments a-b and c-d where they are nearest; points (3,)."""
    aa = cc = ac = af = cf = 0.0
    for i in range(3):
        u, v, r = b[i] - a[i], d[i] - c[i], a[i] - c[i]
        aa += u * u
        cc += v * v
        ac += u * v
        af += u * r
        cf += v * r
    if aa <= _POINT * _POINT:
        return 0.0, 0.0 if cc <= _POINT * _POINT else _share(cf / cc)
    if cc <= _POINT * _POINT:
        return _share(-af / aa), 0.0
    apart = aa * cc - ac * ac
    s = _share((ac * cf - af * cc) / apart) if apart > 1e-14 * aa * cc else 0.0
    t = (ac * s + cf) / cc
    if t < 0.0:
        return _share(-af / aa), 0.0
    if t > 1.0:
        return _share((ac - af) / aa), 1.0
    return s, t


@compiled
def _climb(a, b, t, lower, upper):
    """Half the slope of the squared distance from a box, t along a segment, and half its curvature there."""
    slope = curvature = 0.0
    for i in range(3):
        u = b[i] - a[i]
        x = a[i] + t * u
        beyond = min(x - lower[i], 0.0) + max(x - upper[i], 0.0)
        slope += u * beyond
        if beyond != 0.0:
            curvature += u * u
    return slope, curvature


@compiled
def _depth(a, b, t, lower, upper):
    """How far a point t along a segment is outside the face of a box that it is outside of most, and that face."""
    most, face = -np.inf, 0
    for i in range(3):
        x = a[i] + t * (b[i] - a[i])
        if lower[i] - x > most:
            most, face = lower[i] - x, -i - 1
        if x - upper[i] > most:
            most, face = x - upper[i], i + 1
    return most, face


@compiled
def segment_box(a, b, lower, upper):
    """Share t of the segment a-b where it is nearest to a box, or deepest in it. The squared distance is convex along
    the segment, its slope made of straight pieces, on which Newton's steps end after a few."""
    low, high, t = 0.0, 1.0, 0.0
    slope, curvature = _climb(a, b, 0.0, lower, upper)
    last, _ = _climb(a, b, 1.0, lower, upper)
    if last <= 0.0:
        t, slope = 1.0, 0.0
    elif slope > 0.0:
        slope = 0.0
    for _ in range(60):
        if slope == 0.0 or high - low < 1e-13:
            break
        step = t - slope / curvature if curvature > 0.0 else low
        t = step if low < step < high else 0.5 * (low + high)
        slope, curvature = _climb(a, b, t, lower, upper)
        if slope < 0.0:
            low = t
        else:
            high = t
    away = 0.0
    for i in range(3):
        x = a[i] + t * (b[i] - a[i])
        away += (min(x - lower[i], 0.0) + max(x - upper[i], 0.0)) ** 2
    if away > _TOUCH * _TOUCH:
        return t
    # Inside, depth is a convex function of t too, without a slope to follow: golden section.
    low, high, golden = 0.0, 1.0, 0.5 * (math.sqrt(5.0) - 1.0)
    for _ in range(50):
        one, two = high - golden * (high - low), low + golden * (high - low)
        if _depth(a, b, one, lower, upper)[0] <= _depth(a, b, two, lower, upper)[0]:
            high = two
        else:
            low = one
    return 0.5 * (low + high)


@compiled
def _note(place, k, distance, nx, ny, nz, px, py, pz):
    at = place.count[0]
    place.pair[at], place.distance[at] = k, distance
    place.normal[at, 0], place.normal[at, 1], place.normal[at, 2] = nx, ny, nz
    place.point[at, 0], place.point[at, 1], place.point[at, 2] = px, py, pz
    place.count[0] = at + 1


@compiled
def _note_box(place, k, t, a, b, lower, upper, radius, reach):
    """Note a capsule's point t along its axis near a box."""
    x, y, z = a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), a[2] + t * (b[2] - a[2])
    u = min(x - lower[0], 0.0) + max(x - upper[0], 0.0)
    v = min(y - lower[1], 0.0) + max(y - upper[1], 0.0)
    w = min(z - lower[2], 0.0) + max(z - upper[2], 0.0)
    away = math.sqrt(u * u + v * v + w * w)
    if away - radius >= reach:
        return
    if away > _TOUCH:
        _note(place, k, away - radius, -u / away, -v / away, -w / away, x, y, z)
    else:
        depth, face = _depth(a, b, t, lower, upper)
        side, i = (-1.0, face - 1) if face > 0 else (1.0, -face - 1)
        normal = (side if i == 0 else 0.0, side if i == 1 else 0.0, side if i == 2 else 0.0)
        _note(place, k, depth - radius, normal[0], normal[1], normal[2], x, y, z)


@compiled
def _search(layout, place, chosen, influence):
    """Find which of the `chosen` pairs, by number, are nearer than `influence`, m, beyond their margin. A capsule along
    a box is found twice, where it is nearest and at its far end, so that what keeps it off does not change from end to
    end.

    Returns the smallest distance, m, its pair, and the least distance beyond a margin, m; infinity and -1 when nothing
    is near."""
    capsules, all_ends = len(layout.link), place.ends
    place.count[0] = 0
    for k in chosen:
        i, j = layout.pairs[k, 0], layout.pairs[k, 1]
        reach = layout.margin[k] + influence
        far = reach + layout.sphere[i]
        x, y, z = all_ends[i, 2, 0], all_ends[i, 2, 1], all_ends[i, 2, 2]
        if j < capsules:
            far += layout.sphere[j]
            u, v, w = all_ends[j, 2, 0] - x, all_ends[j, 2, 1] - y, all_ends[j, 2, 2] - z
            if u * u + v * v + w * w >= far * far:
                continue
            a, b, c, d = all_ends[i, 0], all_ends[i, 1], all_ends[j, 0], all_ends[j, 1]
            s, t = segments(a, b, c, d)
            x, y, z = a[0] + s * (b[0] - a[0]), a[1] + s * (b[1] - a[1]), a[2] + s * (b[2] - a[2])
            u = c[0] + t * (d[0] - c[0]) - x
            v = c[1] + t * (d[1] - c[1]) - y
            w = c[2] + t * (d[2] - c[2]) - z
            away = math.sqrt(u * u + v * v + w * w)
            distance = away - layout.radius[i] - layout.radius[j]
            if distance >= reach:
                continue
            if away > _TOUCH:
                _note(place, k, distance, u / away, v / away, w / away, x, y, z)
            else:
                _note(place, k, distance, 0.0, 0.0, 1.0, x, y, z)  # axes that cross: any way is as good
        else:
            lower, upper = layout.boxes[j - capsules, 0], layout.boxes[j - capsules, 1]
            u = min(x - lower[0], 0.0) + max(x - upper[0], 0.0)
            v = min(y - lower[1], 0.0) + max(y - upper[1], 0.0)
            w = min(z - lower[2], 0.0) + max(z - upper[2], 0.0)
            if u * u + v * v + w * w >= far * far:
                continue
            a, b = all_ends[i, 0], all_ends[i, 1]
            t, before = segment_box(a, b, lower, upper), place.count[0]
            _note_box(place, k, t, a, b, lower, upper, layout.radius[i], reach)
            if place.count[0] > before and layout.sphere[i] > layout.radius[i] + _POINT:
                _note_box(place, k, 1.0 if t < 0.5 else 0.0, a, b, lower, upper, layout.radius[i], reach)
    least, at, room = np.inf, -1, np.inf
    for k in range(place.count[0]):
        if place.distance[k] < least:
            least, at = place.distance[k], place.pair[k]
        room = min(room, place.distance[k] - layout.margin[place.pair[k]])
    return least, at, room


@compiled
def look(layout_whole, layout_others, whole, others, q, influence):
    """Set joint positions q (n,): everything of a place, with the watched pairs nearer than `influence`, m, beyond
    their margin. Layout and place are packed. Returns the smallest distance of a watched pair, m, which, and the least
    distance beyond a margin, m; infinity and -1 when none is near."""
    layout, place = unpack_layout(layout_whole, layout_others), unpack_place(layout_whole, whole, others)
    _put(layout, place, q)
    _find_jacobians(layout, place)
    found = _search(layout, place, np.arange(len(layout.pairs)), influence)
    capsules, W, L, rows = len(layout.link), place.W, place.L, place.rows
    for k in range(place.count[0]):
        i, j = layout.pairs[place.pair[k], 0], layout.pairs[place.pair[k], 1]
        one, other = layout.link[i], layout.link[j] if j < capsules else -1
        x, y, z = place.normal[k, 0], place.normal[k, 1], place.normal[k, 2]
        f, g, h = place.point[k, 0], place.point[k, 1], place.point[k, 2]
        u, v, w = g * z - h * y, h * x - f * z, f * y - g * x
        for m in range(W.shape[1]):
            sign = layout.moves[other, m] - layout.moves[one, m]
            rows[k, m] = 0.0
            if sign != 0.0:
                turn = u * W[0, m] + v * W[1, m] + w * W[2, m]
                rows[k, m] = sign * (turn + x * L[0, m] + y * L[1, m] + z * L[2, m])
    return found


# ----------------------------------------------------------------------------------------------------- way to rest


@compiled
def _least_room(place, kept):
    """The least of distance - kept, and which pair has it; infinity and -1 when nothing is near. kept: of each pair."""
    best, at = np.inf, -1
    for k in range(place.count[0]):
        room = place.distance[k] - kept[place.pair[k]]
        if room < best:
            best, at = room, place.pair[k]
    return best, at


@compiled
def _away(layout, ends, place, away):
    """Raise `away` (g,) to how far the ends of each capsule are in a place from other ends (g, 3, 3), m."""
    for g in range(len(layout.link)):
        if layout.link[g] >= 0:
            begin = end = 0.0
            for i in range(3):
                begin += (place.ends[g, 0, i] - ends[g, 0, i]) ** 2
                end += (place.ends[g, 1, i] - ends[g, 1, i]) ** 2
            away[g] = max(away[g], math.sqrt(max(begin, end)))


@compiled
def _travel(layout, there, here, q, way):
    """How far each capsule's ends on the straight way (n,) from q (n,), where `here` is, are at most from where it ends
    (g,), m, and the greatest distance of them between its ends. `there` ends where that is.

    Along a way of turns that add up to w, a point within r of the axes leaves the straight line between its ends by
    w^2 r / 8 at most: its second derivative is at most w^2 r. A way that bends is measured in pieces.
    """
    capsules, turned, bend = len(layout.link), np.empty(len(way)), np.zeros(len(layout.link))
    for k in layout.order:
        turned[k] = abs(way[k]) + (turned[layout.parent[k]] if layout.parent[k] >= 0 else 0.0)
    for g in range(capsules):
        if layout.link[g] >= 0:
            bend[g] = turned[layout.link[g]] ** 2 * layout.reach[g] / 8.0
    pieces = min(max(1, math.ceil(math.sqrt(bend.max() / _BEND))), _PIECES)
    between = np.empty((pieces - 1, capsules, 3, 3))
    for k in range(1, pieces):
        _put(layout, there, q + k / pieces * way)
        between[k - 1] = there.ends
    _put(layout, there, q + way)
    far = np.zeros(capsules)
    _away(layout, here.ends, there, far)
    length = far.max()
    for k in range(pieces - 1):
        _away(layout, between[k], there, far)
    return far + bend / pieces**2, length


@compiled
def _at_risk(layout, place, far, kept):
    """Numbers of the pairs that may come nearer than `kept`, m, on a way that ends at this place, when the ends of
    their capsules are never farther than `far` (g,), m, from where they are here. The others need no look on the way.
    `_search` found what is near of all pairs, to twice the greatest of `far` at least.
    """
    capsules, chosen, many = len(layout.link), np.empty(place.count[0], np.int64), 0
    for at in range(place.count[0]):
        k = place.pair[at]
        i, j = layout.pairs[k, 0], layout.pairs[k, 1]
        if place.distance[at] - kept[k] < far[i] + (far[j] if j < capsules else 0.0):
            if many == 0 or chosen[many - 1] != k:
                chosen[many] = k
                many += 1
    return chosen[:many]


@compiled
def _plan(place, chosen, due, kept, share, influence, step, length):
    """After a look at a share of a way: the share of the next one, and which of the `chosen` pairs to look at then.

    due (k,): at which share each is to be looked at again when nothing near is found of it; brought up to date. A way
    is `length` long, m; steps are `step` at least and `influence` at most.
    """
    farthest, c = max(influence, step) / length, 0
    for at in range(place.count[0]):
        while c < len(chosen) and chosen[c] < place.pair[at]:
            c += 1
        if c < len(chosen) and chosen[c] == place.pair[at]:
            room = place.distance[at] - kept[chosen[c]]
            due[c] = max(due[c], share - max(min(room, influence), step) / length)
    following = share - farthest
    for c in range(len(chosen)):
        following = max(following, due[c])
    looked, many = np.empty(len(chosen), np.int64), 0
    for c in range(len(chosen)):
        if due[c] >= following - step / length:
            due[c] = following - farthest
            looked[many] = chosen[c]
            many += 1
    return following, looked[:many]


@compiled
def _left_box(layout, there, here, exact):
    """Bits of the arms whose tool point leaves its box and goes farther out than `here`."""
    found = 0
    for a in range(len(layout.tool)):
        for i in range(3):
            x, now, box = there.T_base_tool[a, i, 3], here.T_base_tool[a, i, 3], layout.workspace[a]
            if x < min(box[0, i], now) - exact or x > max(box[1, i], now) + exact:
                found |= 1 << a
    return found


@compiled
def _upright(layout, place, a):
    """Cosine between the axis and the direction of the a-th tool's cone."""
    cosine = 0.0
    for i in range(3):
        for j in range(3):
            cosine += layout.cone[a, 1, i] * place.T_base_tool[a, i, j] * layout.cone[a, 0, j]
    return cosine


@compiled
def first_broken(
    layout_whole, layout_others, there_whole, there_others, here_whole, here_others, q, way, first, kept, influence,
    step, exact,
):  # fmt: skip
    """What arms that are `here` run into on the straight way (n,) from q (n,) to rest: FREE, COLLISION and the pair, or
    WORKSPACE or CONE and the arms, as bits. Layout and places are packed; `there` ends where that is.

    The way is looked at from its end to its share `first`, in steps within which little can come nearer than was found,
    of at least `step`, m; after its end only at pairs that are at risk there, each when it may be near. kept: distances
    of the pairs, m. What is outside already counts only when it would get farther out.
    """
    layout = unpack_layout(layout_whole, layout_others)
    there = unpack_place(layout_whole, there_whole, there_others)
    here = unpack_place(layout_whole, here_whole, here_others)
    far, length = _travel(layout, there, here, q, way)
    length = max(2.0 * length, step)  # both of a pair move
    share, looked, reach = 1.0, np.arange(len(layout.pairs)), max(influence, 2.0 * far.max())
    chosen, due = looked, np.ones(0)
    while True:
        _search(layout, there, looked, reach)
        room, pair = _least_room(there, kept)
        if room < -exact:
            return COLLISION, pair
        out = _left_box(layout, there, here, exact)
        if out != 0:
            return WORKSPACE, out
        for a in range(len(layout.tool)):
            if layout.cosine[a] > -1.0:
                least = min(layout.cosine[a], _upright(layout, here, a))
                if _upright(layout, there, a) < least - exact:
                    return CONE, 1 << a
        if share <= first:
            return FREE, 0
        if share == 1.0:
            chosen, reach = _at_risk(layout, there, far, kept), influence
            due = np.full(len(chosen), 1.0 - max(influence, step) / length)
        share, looked = _plan(there, chosen, due, kept, share, influence, step, length)
        share = max(first, share)
        _put(layout, there, q + share * way)
