"""The soft mask of real-time chunking: how strongly each step of a new chunk is held to the running one.

Black, Galliker, Levine, "Real-time execution of action chunking flow policies", arXiv 2506.07339, equation 5.
"""

from __future__ import annotations

import operator

import numpy as np

SCHEDULES = ("exp", "linear", "ones", "zeros")


class ScheduleError(ValueError):
    """Arguments that describe no mask; the message names the argument, the expected and the found."""


def prefix_weights(horizon: int, delay: int, execution_horizon: int, schedule: str = "exp") -> np.ndarray:
    """Weights (H,) in [0, 1] of the running chunk's remainder on the steps of a new chunk.

    Steps before `delay` will be executed before the new chunk arrives: weight 1. Steps from `end` = H - s on have no
    remainder: weight 0. Between them the weight falls by the schedule: "exp" (the paper's), "linear", "ones" (stays
    1), "zeros" (hard mask, 0 at once).

    The paper needs d <= s <= H - d. A robot cannot choose its delay, so d > H - s is no error: all that remains,
    H - s steps, is then frozen (start = min(d, end)), which is the best that can be asked. d > s needs no care here;
    the executor asks for s >= d.

    Args:
        horizon: chunk length H, steps, at least 1.
        delay: inference delay d, steps, at least 0.
        execution_horizon: steps s executed between two inferences, 0 to H.

    Raises:
        ScheduleError: a number that is not whole or out of its range, or an unknown schedule.
    """
    horizon = _whole("horizon", horizon, 1, None)
    delay = _whole("delay", delay, 0, None)
    execution_horizon = _whole("execution_horizon", execution_horizon, 0, horizon)
    if schedule not in SCHEDULES:
        raise ScheduleError(f"schedule: expected one of {SCHEDULES}, found {schedule!r}")
    end = horizon - execution_horizon
    start = min(delay, end)
    steps = np.arange(horizon)
    if schedule == "ones":
        return (steps < end).astype(float)
    if schedule == "zeros":
        return (steps < start).astype(float)
    ramp = np.clip((end - steps) / (end - start + 1), 0.0, 1.0)
    return ramp if schedule == "linear" else ramp * np.expm1(ramp) / np.expm1(1.0)


def _whole(name: str, value: int, least: int, most: int | None) -> int:
    wanted = f"a whole number of at least {least}" + (f" and at most {most}" if most is not None else "")
    try:
        number = operator.index(value)
    except TypeError:
        raise ScheduleError(f"{name}: expected {wanted}, found {value!r}") from None
    if number < least or (most is not None and number > most):
        raise ScheduleError(f"{name}: expected {wanted}, found {number}")
    return number
