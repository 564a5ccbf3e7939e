"""The arithmetic of a control period that NumPy would spend most of its time calling, compiled by numba.

Arrays are small here (up to some 14 joints and 60 rows), so a call costs NumPy more than the numbers in it: one period
took nearly twice as long. The functions are compiled at their first call and kept in a cache on disk;
`CellMotion` calls them all as it is made, so that no control period waits for a compiler.
"""

from __future__ import annotations

import math

import numpy as np

from vla_control.geometry import compiled


@compiled
def braking(distance: float, acceleration: float, period: float) -> float:
    """Largest speed for the next period from which one can still stop within `distance` after it.

    u period + u^2 / (2 a) <= d. Whoever obeys it in every period can always brake with `a`: after a period at u the
    distance left is at least u^2 / (2 a), which u - a period satisfies in the next one. So this bound never
    contradicts the acceleration bound, where a plain mix of the two demands more than `a` near a limit.

    distance: to the limit, rad (m), not negative. acceleration: a, rad/s^2 (m/s^2). period: s.
    """
    step, room = acceleration * period, 2.0 * acceleration * distance
    return room / (math.sqrt(step * step + room) + step)


@compiled
def approach(distance: float, acceleration: float, period: float, back: float) -> float:
    """Largest speed towards a limit: `braking` inside; beyond it (distance < 0) a speed away from it, at most `back`.

    The way back is slow, and slower the nearer, so that rounding at the limit moves nothing.
    """
    speed = braking(abs(distance), acceleration, period)
    return speed if distance >= 0.0 else -min(speed, back)


@compiled
def joint_bounds(q, v, lower, upper, most, acceleration, period, ahead, back):
    """See limits.velocity_bounds. Rows (6, n): lower, upper, slowest, fastest, back, on."""
    n = len(q)
    out = np.empty((6, n))
    longest = max(ahead, period)
    for j in range(n):
        change = acceleration[j] * period
        slowest, fastest = v[j] - change, v[j] + change
        down, up = q[j] - lower[j], upper[j] - q[j]
        to_lower, to_upper = approach(down, acceleration[j], period, back), approach(up, acceleration[j], period, back)
        if down >= 0.0:
            to_lower = min(to_lower, down / longest)
        if up >= 0.0:
            to_upper = min(to_upper, up / longest)
        # Coming back from outside a limit asks for more than acceleration allows: acceleration has the last word.
        high = max(min(most[j], fastest, to_upper), slowest)
        low = min(max(-most[j], slowest, -to_lower), fastest)
        out[0, j], out[1, j] = min(low, high), high
        out[2, j], out[3, j], out[4, j], out[5, j] = slowest, fastest, -to_lower, to_upper
    return out


@compiled
def braking_time(velocity, acceleration):
    """In which all joints come to rest together, s."""
    time = 0.0
    for j in range(len(velocity)):
        time = max(time, abs(velocity[j]) / acceleration[j])
    return time


@compiled
def braked(q, v, lower, upper, acceleration, period):
    """Velocities (n,) after a period of braking in which all joints come to rest together.

    A joint whose limit is nearer than that leads (another one came from outside its limits meanwhile, and so the way
    was not straight) brakes as hard as it has to and can.
    """
    n = len(v)
    time = braking_time(v, acceleration)
    share = max(0.0, 1.0 - period / time) if time > 0.0 else 0.0
    out = np.empty(n)
    for j in range(n):
        speed = share * v[j]
        if lower[j] <= q[j] <= upper[j]:
            change = acceleration[j] * period
            speed = min(speed, max(braking(upper[j] - q[j], acceleration[j], period), v[j] - change))
            speed = max(speed, min(-braking(q[j] - lower[j], acceleration[j], period), v[j] + change))
        out[j] = speed
    return out


@compiled
def damper(room, acceleration, period, slack, gain):
    """Least velocity of a distance with so much room; what is short by less than `slack` is brought back."""
    least = -braking(max(room, 0.0), acceleration, period)
    return least - room * gain if -slack < room < 0.0 else least


@compiled
def admit(braked, bounds, q, lower, upper):
    """Braking velocities (n,) and bounds (2, n) that admit them. bounds: of joint_bounds.

    Joints outside their limits lower, upper (n,) come back, whatever the others do.
    """
    n = len(q)
    slower, wider = np.empty(n), np.empty((2, n))
    for j in range(n):
        slow = braked[j]
        if q[j] < lower[j] or q[j] > upper[j]:
            slow = min(max(slow, bounds[0, j]), bounds[1, j])
        slower[j] = slow
        wider[0, j], wider[1, j] = min(bounds[0, j], slow), max(bounds[1, j], slow)
    return slower, wider


@compiled
def _put(kind, where, row, least, most, braked, used, program_rows, lower, upper, labels):
    """Copy a row (n,) with its limits into a program, behind its `used` ones, if there is place: where velocities
    between the program's bounds (the first n of its limits) can break it, and no tighter than braking is. Returns how
    many there are then."""
    n = len(row)
    low = high = brake = 0.0
    for j in range(n):
        r = row[j]
        if r > 0.0:
            low += r * lower[j]
            high += r * upper[j]
        elif r < 0.0:
            low += r * upper[j]
            high += r * lower[j]
        brake += r * braked[j]
    if (low >= least and high <= most) or used == len(program_rows):
        return used
    for j in range(n):
        program_rows[used, j] = row[j]
    lower[n + used], upper[n + used] = min(least, brake), max(most, brake)
    labels[used, 0], labels[used, 1] = kind, where
    return used + 1


@compiled
def put(kind, where, rows, least, most, braked, used, program_rows, lower, upper, labels):
    """Copy rows (k, n) with their limits (k,) into a program as far as they matter; see `_put`."""
    for i in range(len(rows)):
        used = _put(kind, where[i], rows[i], least[i], most[i], braked, used, program_rows, lower, upper, labels)
    return used


@compiled
def put_cell(
    walls, near, corners, margin, acceleration, period, back, slack, gain, v, ahead,
    T, tool_rows, count, pair, distance, pair_rows,
    T_then, tool_rows_then, count_then, pair_then, distance_then, pair_rows_then,
    braked, used, program_rows, lower, upper, labels,
):  # fmt: skip
    """Put into a program, with kinds `walls` and `near`, what keeps tools in their boxes `corners` (arms, 2, 3) and
    watched pairs at their `margin`: where the arms are, and where they would come to rest (`then`) after `ahead` s at
    velocities v (n,), unless they stand (0).

    The rest is of two geometry.Place. Who is outside already goes no farther. Returns how many rows there are then, and
    the speeds (2, arms, 3) that the walls allow the tools.
    """
    arms, n, speeds = len(T), len(v), np.empty((2, len(T), 3))
    for a in range(arms):
        for i in range(3):
            speeds[0, a, i] = -approach(T[a, i, 3] - corners[a, 0, i], acceleration, period, back)
            speeds[1, a, i] = approach(corners[a, 1, i] - T[a, i, 3], acceleration, period, back)
            least, most, row = speeds[0, a, i], speeds[1, a, i], tool_rows[3 * a + i]
            used = _put(walls, a, row, least, most, braked, used, program_rows, lower, upper, labels)
            if ahead > 0.0:
                row, now = tool_rows_then[3 * a + i], 0.0
                for j in range(n):
                    now += row[j] * v[j]
                least = now + (min(corners[a, 0, i], T[a, i, 3]) - T_then[a, i, 3]) / ahead
                most = now + (max(corners[a, 1, i], T[a, i, 3]) - T_then[a, i, 3]) / ahead
                used = _put(walls, a, row, least, most, braked, used, program_rows, lower, upper, labels)
    for k in range(count[0]):
        least = damper(distance[k] - margin[pair[k]], acceleration, period, slack, gain)
        used = _put(near, pair[k], pair_rows[k], least, np.inf, braked, used, program_rows, lower, upper, labels)
    if ahead > 0.0:
        for k in range(count_then[0]):
            row, now = pair_rows_then[k], 0.0
            for j in range(n):
                now += row[j] * v[j]
            least = now - (distance_then[k] - margin[pair_then[k]]) / ahead
            used = _put(near, pair_then[k], row, least, np.inf, braked, used, program_rows, lower, upper, labels)
    return used, speeds


@compiled
def holding(rows, lower, upper, labels, used, velocity, slack):
    """Labels (k, 2) of a program's `used` rows that hold velocities (n,) back, within `slack`."""
    n = len(velocity)
    found, count = np.empty((used, 2), np.int64), 0
    for i in range(used):
        value = 0.0
        for j in range(n):
            value += rows[i, j] * velocity[j]
        if value <= lower[n + i] + slack or value >= upper[n + i] - slack:
            found[count, 0], found[count, 1] = labels[i, 0], labels[i, 1]
            count += 1
    return found[:count]


@compiled
def way_to_rest(q, velocity, lower, upper, acceleration, owner, period, slack):
    """The way (n,) of all joints to rest after a period with `velocity`, the share of it that is the period's, and bits
    of the arms (owner: of each joint) with a joint that would leave its limits, or be farther outside than it is."""
    n, found = len(q), 0
    reach = period + 0.5 * braking_time(velocity, acceleration)
    way = np.empty(n)
    for j in range(n):
        way[j] = velocity[j] * reach
        stop = q[j] + way[j]
        if stop < min(lower[j], q[j]) - slack or stop > max(upper[j], q[j]) + slack:
            found |= 1 << owner[j]
    return way, period / reach, found


@compiled
def mean(rows):
    """Of rows (k, n)."""
    k, n = rows.shape
    out = np.zeros(n)
    for i in range(k):
        for j in range(n):
            out[j] += rows[i, j]
    return out / k


@compiled
def clipped(x, lower, upper):
    """x (n,) between the first n of lower and upper; NaN where any of them is not finite."""
    out = np.empty(len(x))
    for j in range(len(x)):
        out[j] = min(max(x[j], lower[j]), upper[j])
        if not math.isfinite(x[j]):
            out[j] = math.nan
    return out


@compiled
def makers(velocity, bounds, most, begin, end, slack):
    """Which of velocity (1), acceleration (2), position (4) make the bounds that velocities are at, of joints from
    begin to end, added up. bounds: of joint_bounds; most (n,): speed limits."""
    found = 0
    for j in range(begin, end):
        if velocity[j] <= bounds[0, j] + slack:
            by = -most[j], bounds[2, j], bounds[4, j]
            found |= 1 if by[0] >= by[1] and by[0] >= by[2] else 2 if by[1] >= by[2] else 4
        if velocity[j] >= bounds[1, j] - slack:
            top = most[j], bounds[3, j], bounds[5, j]
            found |= 1 if top[0] <= top[1] and top[0] <= top[2] else 2 if top[1] <= top[2] else 4
    return found


@compiled
def worst_share(a, b, most):
    """The largest of |a - b| / most (n,), and which; NaN counts as infinity."""
    worst, at = -1.0, 0
    for j in range(len(a)):
        share = abs(a[j] - b[j]) / most[j]
        if not share <= worst:
            worst, at = share if share == share else np.inf, j
    return worst, at


@compiled
def inside(p, lower, upper):
    """Whether a point (3,) is in a box."""
    for i in range(3):
        if p[i] < lower[i] or p[i] > upper[i]:
            return False
    return True


@compiled
def beyond_walls(twist, inward, outward, slack):
    """Whether a tool velocity (6,) asks for more than walls (3,) allow."""
    for i in range(3):
        if twist[i] > outward[i] + slack or twist[i] < inward[i] - slack:
            return True
    return False


@compiled
def correction_rates(displacement, acceleration, period, gain):
    """(n,) rates, 1/s, at which displacements (n,) may be taken away, with this much acceleration (n,)."""
    rates = np.empty(len(displacement))
    for j in range(len(displacement)):
        away = max(abs(displacement[j]), 1e-9)
        rates[j] = min(braking(away, acceleration[j], period) / away, gain)
    return rates


@compiled
def straight(wanted, v, acceleration, period):
    """Velocities (n,) on the straight way from v to the wanted ones, as far as `acceleration` lets all joints go."""
    n, share = len(v), 1.0
    for j in range(n):
        change = abs(wanted[j] - v[j])
        if change > acceleration[j] * period:
            share = min(share, acceleration[j] * period / change)
    out = np.empty(n)
    for j in range(n):
        out[j] = v[j] + share * (wanted[j] - v[j])
    return out


@compiled
def decompose(jacobian, weights, error, acceleration, period, gain, damping, fading, error_damping, posture):
    """The singular directions of W J and what to do about a tool error (6,); see ik.ArmTask.correction.

    Returns U (6, k), sizes (k,), V (k, n), squares (k,), the damping of what the tool does not feel, the twist (6,).
    """
    n = jacobian.shape[1]
    weighted = np.empty((6, n))
    for i in range(6):
        for j in range(n):
            weighted[i, j] = weights[i] * jacobian[i, j]
    U, sizes, V = np.linalg.svd(weighted, False)
    V = np.ascontiguousarray(V)
    k = len(sizes)
    left, squares, free = np.zeros(k), np.empty(k), posture
    for i in range(k):
        for r in range(6):
            left[i] += weights[r] * error[r] * U[r, i]
        squares[i] = sizes[i] * sizes[i] + damping
    if sizes[k - 1] < fading:
        for i in range(k):
            share = 1.0 - (sizes[i] / fading) ** 2
            if share > 0.0:
                extra = error_damping * abs(left[i]) * share
                squares[i] += extra
                free += extra
    twist = np.zeros(6)
    for i in range(k):
        rate = gain
        for j in range(n):
            away = max(abs(sizes[i] / squares[i] * left[i] * V[i, j]), 1e-9)
            rate = min(rate, braking(away, acceleration[j], period) / away)
        for r in range(6):
            twist[r] += U[r, i] * rate * left[i] / weights[r]
    return U, sizes, V, squares, free, twist


@compiled
def tool_cost(V, squares, pull, free, posture, weight):
    """Hessian (n, n) and linear (n,) of a cost that pulls along V (k, n); see ik.ArmTask.twist."""
    k, n = V.shape
    hessian, linear = np.zeros((n, n)), np.zeros(n)
    redundant = n > 6
    for i in range(k):
        along = squares[i] - free if redundant else squares[i]
        for a in range(n):
            linear[a] -= pull[i] * V[i, a]
            for b in range(n):
                hessian[a, b] += along * V[i, a] * V[i, b]
    if redundant:
        for a in range(n):
            hessian[a, a] += free
            linear[a] -= weight * posture[a]
        for i in range(k):
            felt = 0.0
            for a in range(n):
                felt += V[i, a] * posture[a]
            for a in range(n):
                linear[a] += weight * felt * V[i, a]
    return hessian, linear


@compiled
def follow(U, sizes, V, squares, free, weights, twist, posture, bends, weight, fading, bent, speed, slow):
    """Cost of a tool velocity, see ik.ArmTask.twist: hessian (n, n), linear (n,), and whether a singularity slows it.

    bends (k, 6): of the directions V. fading, bent, speed, slow: FADING, BENT, LEAVING_SPEED, LEAVING_TWIST.
    """
    k, n = V.shape
    pull, squares, slowed = np.empty(k), squares.copy(), False
    for i in range(k):
        wanted = 0.0
        for r in range(6):
            wanted += weights[r] * twist[r] * U[r, i]
        pull[i] = sizes[i] * wanted
        if sizes[i] < fading and abs(wanted) > slow:
            curve = side = 0.0
            for r in range(6):
                curve += U[r, i] * weights[r] * bends[i, r]
            for a in range(n):
                side += posture[a] * V[i, a]
            faster = min(abs(wanted) / max(sizes[i], 1e-9), speed)
            if abs(curve) < bent:
                continue  # a wrist that is straight: the damped motion passes it
            if curve * wanted < 0.0:
                slowed = True
            elif faster > abs(pull[i]) / squares[i]:
                # Far from straight the Jacobian tells the side; dead straight, home does.
                squares[i] = fading * fading
                pull[i] = math.copysign(squares[i] * faster, wanted if sizes[i] > 1e-3 else side)
    hessian, linear = tool_cost(V, squares, pull, free, posture, weight)
    return hessian, linear, slowed


@compiled
def unbounded(hessian, linear):
    """Where a cost of joint velocities (n,) is least, by Cholesky's factors of its hessian."""
    n = len(linear)
    root, out = np.zeros((n, n)), np.empty(n)
    for i in range(n):
        for j in range(i + 1):
            rest = hessian[i, j]
            for k in range(j):
                rest -= root[i, k] * root[j, k]
            root[i, j] = math.sqrt(rest) if i == j else rest / root[j, j]
    for i in range(n):
        rest = -linear[i]
        for k in range(i):
            rest -= root[i, k] * out[k]
        out[i] = rest / root[i, i]
    for i in range(n - 1, -1, -1):
        for k in range(i + 1, n):
            out[i] -= root[k, i] * out[k]
        out[i] /= root[i, i]
    return out


@compiled
def change(T_from, T_to):
    """As se3.delta."""
    out = np.empty(6)
    R = np.zeros((3, 3))
    for i in range(3):
        out[i] = T_to[i, 3] - T_from[i, 3]
        for j in range(3):
            for k in range(3):
                R[i, j] += T_to[i, k] * T_from[j, k]
    a, b, c = R[0, 0], R[1, 1], R[2, 2]
    p, q, r, s = 1.0 + a - b - c, 1.0 - a + b - c, 1.0 - a - b + c, 1.0 + a + b + c
    if s >= max(p, q, r):
        x, y, z, w = R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1], s
    elif p >= max(q, r):
        x, y, z, w = p, R[1, 0] + R[0, 1], R[0, 2] + R[2, 0], R[2, 1] - R[1, 2]
    elif q >= r:
        x, y, z, w = R[1, 0] + R[0, 1], q, R[2, 1] + R[1, 2], R[0, 2] - R[2, 0]
    else:
        x, y, z, w = R[0, 2] + R[2, 0], R[2, 1] + R[1, 2], r, R[1, 0] - R[0, 1]
    sine = math.sqrt(x * x + y * y + z * z)
    factor = 2.0 * math.atan2(sine, abs(w)) / sine if sine > 0.0 else 0.0
    if w < 0.0:
        factor = -factor
    out[3], out[4], out[5] = factor * x, factor * y, factor * z
    return out


@compiled
def changed(T, d):
    """As se3.apply_delta."""
    x, y, z = d[3], d[4], d[5]
    angle = math.sqrt(x * x + y * y + z * z)
    one, two = 1.0, 0.5
    if angle >= 1e-8:
        one, two = math.sin(angle) / angle, 2.0 * (math.sin(0.5 * angle) / angle) ** 2
    turn = np.empty((3, 3))
    turn[0, 0], turn[0, 1], turn[0, 2] = 1.0 - two * (y * y + z * z), two * x * y - one * z, two * x * z + one * y
    turn[1, 0], turn[1, 1], turn[1, 2] = two * x * y + one * z, 1.0 - two * (x * x + z * z), two * y * z - one * x
    turn[2, 0], turn[2, 1], turn[2, 2] = two * x * z - one * y, two * y * z + one * x, 1.0 - two * (x * x + y * y)
    out = T.copy()
    for i in range(3):
        out[i, 3] += d[i]
        for j in range(3):
            out[i, j] = turn[i, 0] * T[0, j] + turn[i, 1] * T[1, j] + turn[i, 2] * T[2, j]
    return out


@compiled
def keep_inside(T, p, lower, upper, step):
    """Move the point of a pose (in place) into a box; while p is outside, only `step` (m) nearer than that."""
    for i in range(3):
        nearer = p[i] + min(max(min(max(p[i], lower[i]), upper[i]) - p[i], -step), step)
        T[i, 3] = min(max(T[i, 3], min(lower[i], nearer)), max(upper[i], nearer))


@compiled
def led_on(T, goal, delta, moves, turns, lower, upper):
    """A goal after a delta, kept within its lead and the workspace, see goal.ArmGoal; and whether the lead cut it."""
    lead, cut = change(T, goal), False
    kept, moved, turned = np.empty(6), within(lead[:3], delta[:3], moves), within(lead[3:], delta[3:], turns)
    for i in range(3):
        kept[i], kept[3 + i] = moved[i], turned[i]
        cut |= kept[i] != delta[i] or kept[3 + i] != delta[3 + i]
    goal = changed(goal, kept)
    keep_inside(goal, T[:3, 3], lower, upper, 0.0)
    return goal, cut


@compiled
def lead_cut(T, goal, setpoint, moves, turns, lower, upper, step):
    """Goal and set-point that lead the tool by at most moves, m, and turns, rad, and lie in the workspace where the
    tool does not; and whether the lead was cut, and whether anything changed."""
    lead = change(T, goal)
    far = math.sqrt(lead[0] ** 2 + lead[1] ** 2 + lead[2] ** 2), math.sqrt(lead[3] ** 2 + lead[4] ** 2 + lead[5] ** 2)
    one, two = min(1.0, moves / max(far[0], 1e-9)), min(1.0, turns / max(far[1], 1e-9))
    cut = min(one, two) < 1.0 - 1e-9
    if cut:
        behind = change(T, setpoint)
        for i in range(3):
            lead[i], behind[i] = one * lead[i], one * behind[i]
            lead[3 + i], behind[3 + i] = two * lead[3 + i], two * behind[3 + i]
        goal, setpoint = changed(T, lead), changed(T, behind)
    p = T[:3, 3]
    outside = not inside(p, lower, upper)
    if outside:
        goal, setpoint = goal.copy(), setpoint.copy()
        keep_inside(goal, p, lower, upper, step)
        keep_inside(setpoint, p, lower, upper, 0.0)
    return goal, setpoint, cut, cut or outside


@compiled
def setpoint_on(T, goal, setpoint, share):
    """The set-point a share of the way to the goal on; that change, and by how much the tool lagged behind before."""
    step, lag = share * change(setpoint, goal), change(T, setpoint)
    return (goal if share == 1.0 else changed(setpoint, step)), step, lag


@compiled
def slowed_twist(twist, speed, rotation):
    """A tool velocity (6,) within speeds, m/s and rad/s, and whether it was faster."""
    moves = math.sqrt(twist[0] ** 2 + twist[1] ** 2 + twist[2] ** 2)
    turns = math.sqrt(twist[3] ** 2 + twist[4] ** 2 + twist[5] ** 2)
    one, two = min(1.0, speed / max(moves, 1e-9)), min(1.0, rotation / max(turns, 1e-9))
    out = np.empty(6)
    for i in range(3):
        out[i], out[3 + i] = one * twist[i], two * twist[3 + i]
    return out, min(one, two) < 1.0


@compiled
def within(lead, step, most):
    """As much of a step (3,) as keeps |lead + step| <= most, or leads no farther; of the rest what is across that."""
    a = b = c = 0.0
    for i in range(3):
        a += step[i] * step[i]
        b += lead[i] * step[i]
        c += lead[i] * lead[i]
    c -= most * most
    if a + 2.0 * b + c <= 0.0 or (c >= 0.0 and b < 0.0):
        return step.copy()
    share = 0.0 if c >= 0.0 else min(1.0, (math.sqrt(b * b - a * c) - b) / a)
    then, rest = lead + share * step, (1.0 - share) * step
    along = squared = 0.0
    for i in range(3):
        along += rest[i] * then[i]
        squared += then[i] * then[i]
    return share * step + rest - along / squared * then
