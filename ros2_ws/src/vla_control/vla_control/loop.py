"""The control loop: a thread of its own that keeps time whatever the rest of the process does. No ROS.

What else runs in a Python process can hold the loop up in three ways; each has its answer here.

- Other threads hold the interpreter. Who wants it waits for the switch interval, in plain Python 5 ms: SWITCH.
- The garbage collector stops everybody, at any allocation of any thread. It is switched off while the loop runs; the
  loop collects by itself, in the time left after a period's work: young objects whenever there are enough of them, old
  ones when the arms are at rest. `vla_ros.run` has frozen what lives as long as the process.
- The operating system runs others, or has swapped memory out. When asked, memory is locked and the loop gets real-time
  priority (`take_realtime`).
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

#: Control periods over which times are reported.
WINDOW = 1000
#: A thread that wants the interpreter waits for another one at most so long, beyond a call into C, s. Shorter ones
#: cost more than they gain: a switch takes some 10 us.
SWITCH = 0.5e-3
#: New containers after which young garbage is collected, and young collections after which old garbage is.
YOUNG, OLD = 700, 10
#: Lock all pages, those of now and those to come (Linux, mman.h).
_MCL_CURRENT, _MCL_FUTURE = 1, 2


class RealtimeError(ValueError):
    """Locked memory or real-time priority was asked for and cannot be had."""


class Deadlines:
    """The absolute deadlines of a loop, `period` s apart from `now` on, and whose fault it is when one is missed. Pure.

    deadline: when the next period is to begin, s. late: how late the newest one began, s. overruns: periods that began
    a period or more after their deadline. exhausted: those of them whose lateness is for more than half the loop's own
    work, by the CPU time that it used; the others were kept waiting: for the processor, for another thread, for the
    middleware.
    """

    def __init__(self, period: float, now: float):
        self.period, self.deadline = period, now
        self.overruns = self.exhausted = 0
        self.late = 0.0
        self._own = 0.0  # how late the next period would begin by the loop's own work alone, s

    def begin(self, now: float) -> None:
        """A period begins. One begun late moves none of those after it; those missed altogether are left out."""
        self.late = now - self.deadline
        missed = max(0, math.floor(self.late / self.period))
        if missed:
            self.overruns += 1
            self.exhausted += self._own > 0.5 * self.late
        self.deadline += (missed + 1) * self.period
        self._own = max(0.0, self._own - missed * self.period)

    def worked(self, cpu: float) -> None:
        """The period's work is done and has used so much CPU time, s."""
        self._own = max(0.0, self._own + cpu - self.period)


@dataclass(frozen=True)
class Timing:
    """How the loop kept time since it was made, and over the newest WINDOW periods (arrays of at most that length, s).

    overruns, exhausted: see Deadlines. late: beginnings after their deadlines. jitter: |time from one beginning to the
    next - period|. wall, cpu: time from beginning to end of the work, and CPU time in it. collected: garbage
    collections; collecting: longest of them, s.
    """

    periods: int
    overruns: int
    exhausted: int
    late: np.ndarray
    jitter: np.ndarray
    wall: np.ndarray
    cpu: np.ndarray
    collected: int
    collecting: float


class ControlLoop:
    """Does `work` once each period.

    Either in a thread of its own (`start`, `stop`), at absolute deadlines of the monotonic clock; or by `once`, called
    by whoever keeps another time, such as a simulation's.

    Args:
        period: s.
        work: what is done each period, given the time since the beginning of the period before, s (NaN for the first);
            says whether the arms are at rest, so that there is time to tidy up.
        failed: told of an exception in `work`; the loop goes on.
        priority: of SCHED_FIFO for the thread, None: as it is.
    """

    def __init__(
        self,
        period: float,
        work: Callable[[float], bool],
        failed: Callable[[Exception], None],
        priority: int | None = None,
    ):
        self.period = period
        self._work, self._failed, self._priority = work, failed, priority
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()
        self._began = math.nan
        self._periods = self._collected = 0
        self._deadlines = Deadlines(period, 0.0)
        self._cost = [0.0, 0.0, 0.0]  # CPU time of the newest collection of each generation, s
        self._collecting = 0.0
        self._late, self._jitter, self._wall, self._cpu = np.full((4, WINDOW), np.nan)

    @property
    def running(self) -> bool:
        """Whether the thread is there."""
        return self.started and self._thread.is_alive()

    @property
    def started(self) -> bool:
        """Whether the thread was ever started."""
        return self._thread is not None

    def start(self) -> None:
        """Begin, in a thread of its own."""
        self._ending.clear()
        self._thread = threading.Thread(target=self._run, name="control loop", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; returns when the period under way is done."""
        self._ending.set()
        if self._thread:
            self._thread.join()

    def once(self) -> bool:
        """One period, now. Returns what `work` does, False when it failed."""
        begin, cpu = time.monotonic(), time.thread_time()
        elapsed, self._began = begin - self._began, begin
        try:
            resting = self._work(elapsed)
        except Exception as error:
            resting = False
            self._failed(error)
        slot = self._periods % WINDOW
        self._jitter[slot] = abs(elapsed - self.period)
        self._wall[slot] = time.monotonic() - begin
        self._cpu[slot] = time.thread_time() - cpu
        self._periods += 1
        return resting

    def timing(self) -> Timing:
        """How time was kept; may be asked for by any thread."""
        windows = [a.copy() for a in (self._late, self._jitter, self._wall, self._cpu)]
        late, jitter, wall, cpu = (a[~np.isnan(a)] for a in windows)
        missed = self._deadlines
        return Timing(
            self._periods, missed.overruns, missed.exhausted, late, jitter, wall, cpu, self._collected, self._collecting
        )

    # ---------------------------------------------------------------------------------------------------- private
    def _run(self) -> None:
        if self._priority is not None:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(self._priority))
        enabled, interval = gc.isenabled(), sys.getswitchinterval()
        gc.disable()
        sys.setswitchinterval(SWITCH)
        try:
            deadlines = self._deadlines = Deadlines(self.period, time.monotonic())
            while not self._ending.is_set():
                deadlines.begin(time.monotonic())
                self._late[self._periods % WINDOW] = deadlines.late
                cpu = time.thread_time()
                resting = self.once()
                self._tidy(deadlines.deadline - time.monotonic(), resting)
                deadlines.worked(time.thread_time() - cpu)
                # To an absolute time of the monotonic clock: Python's own doing since 3.11.
                time.sleep(max(0.0, deadlines.deadline - time.monotonic()))
        finally:
            sys.setswitchinterval(interval)
            if enabled:
                gc.enable()

    def _tidy(self, left: float, resting: bool) -> None:
        """Collect garbage, if there is enough of it and time for that, s."""
        young, middle, old = gc.get_count()
        if young < YOUNG:
            return
        generation = 0 if middle <= OLD else 1 if old <= OLD or not resting else 2
        if self._cost[generation] > left:
            self._cost[generation] *= 0.9  # the next period may leave more time, but memory must not grow for ever
            return
        begin, cpu = time.monotonic(), time.thread_time()
        gc.collect(generation)
        self._cost[generation] = time.thread_time() - cpu
        self._collected += 1
        self._collecting = max(self._collecting, time.monotonic() - begin)


def take_realtime(priority: int) -> None:
    """Lock this process's memory, now and to come, and give all its threads SCHED_FIFO priority `priority` - 1.

    The loop's thread then takes `priority`. The others come right below it: the loop cannot wait for the interpreter,
    or for joint states, of a thread that any other process may push aside.

    Raises:
        RealtimeError: not a priority, or not permitted.
    """
    if not 2 <= priority <= 99:
        raise RealtimeError(f"priority: expected 2 to 99, found {priority}")
    if not hasattr(os, "sched_setscheduler"):
        raise RealtimeError(f"realtime: expected Linux, found {sys.platform}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE):
        error = os.strerror(ctypes.get_errno())
        raise RealtimeError(f"realtime: expected the right to lock memory (ulimit -l unlimited), found: {error}")
    try:
        for task in Path("/proc/self/task").iterdir():
            os.sched_setscheduler(int(task.name), os.SCHED_FIFO, os.sched_param(priority - 1))
    except OSError as error:
        libc.munlockall()
        raise RealtimeError(
            f"realtime: expected the right to SCHED_FIFO priority {priority} (ulimit -r), found: {error.strerror}"
        ) from None
