"""The safety controller under attack, judged by an oracle of its own; and beside MoveIt Servo's scaling law.

    ./vla bench safety [parts:=attack,...] [robots:=panda,dual_panda] [runs:=100] [commands:=50000] [states:=100]
                       [kills:=50] [steps:=2000] [minutes:=1] [realtime:=false] [processes:=1] [first:=0]
                       [out:=FILE]

Parts, each for every robot:

    attack    runs of 3 s at 0.5 m/s into the arm itself, the other arm, the table and every limit, in tool deltas and
              joint targets; distances of what is sent by pinocchio and coal on the meshes of the URDF
    fuzz      commands, joint states, clocks, stops and arming that no sound system makes; position, velocity,
              acceleration and jerk of what is sent by finite differences
    kill      a policy that dies in mid-motion
    leave     states at or beyond a limit, at a wall, near a singularity, nearer than the margin: the way out and in
    resume    arms moved by hand while they are held; and `lag`, arms that follow 100 ms late
    compare   the same attacks, and errands in free space, under Servo's law at 10 Hz and 50 Hz (share of runs: a tenth)
    steps     time of one step while links are close to each other, on one thread, beside a fixed computation
    soak      the real node at 200 Hz with a kinematic simulation of the arms, for `minutes`, and a replay of what its
              controller did; `realtime`: with locked memory and real-time priority

Everything but times and memory follows from seeds: `first` is the number of the first run. Exit status 1 when anything
but a time misses its goal.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

PARTS = ("attack", "fuzz", "kill", "leave", "resume", "lag", "compare", "steps", "soak")
#: Goals of issue and docs: p99 of a step, ms, by number of joints.
STEP_GOAL = {6: 1.0, 7: 1.0, 12: 2.0, 14: 2.0}
#: Commands of one fuzzed controller.
FUZZ_RUN = 5000


def spread(function, items: list, processes: int) -> list:
    """`function` of each item, in order, on several processes."""
    if processes <= 1:
        return [function(item) for item in items]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(function, items, chunksize=max(1, min(8, len(items) // (4 * processes))))


def judge(function, robot: str, count: int, given) -> tuple[list, list, float]:
    """`function(robot, number)` for `count` numbers from the first on: verdicts, those that failed, and s it took."""
    begin = time.perf_counter()
    found = spread(partial(function, robot), list(range(given.first, given.first + count)), given.processes)
    return found, [v for v in found if not v.passed], time.perf_counter() - begin


def show(verdicts: list, failed: int, seconds: float, text: str, name: str, part: str) -> None:
    print(f"{part:9}{name:14}{len(verdicts):6} runs {failed:5} failed  {text}  ({seconds:.0f} s)", flush=True)


def run_attacks(robot: str, given) -> dict:
    from proofs.adversarial import run_attack

    found, failed, seconds = judge(run_attack, robot, given.runs, given)
    nearest, short = min(found, key=lambda v: v.distance), max(found, key=lambda v: v.short)
    configurations = sum(v.configurations for v in found)
    violations = sum(sum(v.violations.values()) for v in found)
    penetrating = sum(v.penetrations > 0 for v in found)
    text = (
        f"{penetrating} penetrating; smallest distance {1e3 * nearest.distance:.1f} mm ({nearest.nearest}); watched "
        f"pairs short of their margin by {1e3 * short.short:.2f} mm at most ({short.short_pair}); {violations} limit "
        f"violations; {sum(v.close > 0 for v in found)} runs drove links close; {configurations} configurations"
    )
    show(found, len(failed), seconds, text, robot, "attack")
    by_kind = {}
    for v in found:
        entry = by_kind.setdefault(v.kind, {"runs": 0, "failed": 0, "distance": np.inf, "short": -np.inf})
        entry["runs"] += 1
        entry["failed"] += not v.passed
        entry["distance"], entry["short"] = min(entry["distance"], v.distance), max(entry["short"], v.short)
    states = sum((Counter(v.states) for v in found), Counter())
    return {
        "runs": len(found), "failed": len(failed), "penetrating": penetrating, "distance_m": nearest.distance,
        "nearest": nearest.nearest, "short_of_margin_m": short.short, "short_pair": short.short_pair,
        "limit_violations": violations, "configurations": configurations, "states": dict(states),
        "driven_close": sum(v.close > 0 for v in found),
        "refused": sum(v.refused for v in found), "travel_rad": round(float(np.mean([v.travel for v in found])), 2),
        "kinds": by_kind, "seconds": round(seconds, 1), "failures": [asdict(v) for v in failed[:20]],
    }  # fmt: skip


def _fuzz(robot: str, seed: int, commands: int):
    from proofs.fuzz import run_fuzz

    return run_fuzz(robot, seed, commands)


def run_fuzzes(robot: str, given) -> dict:
    from proofs.fuzz import FuzzVerdict

    begin = time.perf_counter()
    count = max(1, round(given.commands / FUZZ_RUN))
    jobs = partial(_fuzz, robot, commands=min(FUZZ_RUN, given.commands))
    found = spread(jobs, list(range(given.first, given.first + count)), given.processes)
    total = FuzzVerdict()
    for verdict in found:
        total.add(verdict)
    failed = sum(not v.passed for v in found)
    used = ", ".join(f"{kind} {total.worst[kind]:.6f}" for kind in ("velocity", "acceleration", "jerk"))
    text = (
        f"{total.commands} commands in {total.periods} periods, {total.taken} of them running, {total.histories} times "
        f"armed; violations {sum(total.violations.values()) + total.not_finite}; most used of a limit: {used}; out of "
        f"position limits {total.worst['position']:.1e} rad"
    )
    show(found, failed, time.perf_counter() - begin, text, robot, "fuzz")
    entry = asdict(total) | {"states": dict(total.states), "refusals": dict(total.refusals)}
    return entry | {"runs": len(found), "failed": failed}


def run_kills(robot: str, given) -> dict:
    from proofs.stopping import run_kill

    found, failed, seconds = judge(run_kill, robot, given.kills, given)
    late = max(v.late for v in found)
    text = (
        f"decided {1e3 * late:.2f} ms after the time-out at most; braking {max(v.brake_time for v in found):.2f} s at "
        f"most, from {max(v.speed for v in found):.2f} rad/s; arms apart by {max(v.apart for v in found)} periods; "
        f"{sum(sum(v.violations.values()) for v in found)} limit violations"
    )
    show(found, len(failed), seconds, text, robot, "kill")
    return {
        "runs": len(found), "failed": len(failed), "late_s": late, "apart_periods": max(v.apart for v in found),
        "in_time": sum(v.in_time for v in found), "brake_s": max(v.brake_time for v in found),
        "failures": [asdict(v) for v in failed[:20]],
    }  # fmt: skip


def run_leaves(robot: str, given) -> dict:
    from proofs.leaving import KINDS, run_leave

    found, failed, seconds = judge(run_leave, robot, given.states, given)
    parts, kinds = [], {}
    for kind in KINDS:
        of = [v for v in found if v.kind == kind]
        kinds[kind] = {
            "states": len(of), "left": sum(v.left for v in of), "entered": sum(v.entered for v in of),
            "violations": sum(v.violations for v in of),
        }  # fmt: skip
        parts.append(f"{kind} {kinds[kind]['left']}/{len(of)} left, {kinds[kind]['entered']} entered")
    show(found, len(failed), seconds, "; ".join(parts), robot, "leave")
    return {"runs": len(found), "failed": len(failed), "kinds": kinds, "failures": [asdict(v) for v in failed[:20]]}


def run_resumes(robot: str, given) -> dict:
    from proofs.stopping import run_resume

    found, failed, seconds = judge(run_resume, robot, given.kills, given)
    began = [v for v in found if v.began]
    text = (
        f"{len(began)} began, {max((v.step for v in began), default=0):.4f} rad and "
        f"{1e3 * max((v.tool_step for v in began), default=0):.2f} mm from where the arms were measured at most; "
        f"{sum(bool(v.refused) and not v.began for v in found)} refused; armed again {sum(v.rearmed for v in found)}"
    )
    show(found, len(failed), seconds, text, robot, "resume")
    return {
        "runs": len(found), "failed": len(failed), "began": len(began),
        "step_rad": max((v.step for v in began), default=0),
        "tool_step_m": max((v.tool_step for v in began), default=0), "failures": [asdict(v) for v in failed[:20]],
    }  # fmt: skip


def run_lags(robot: str, given) -> dict:
    from proofs.stopping import run_lag

    found, failed, seconds = judge(run_lag, robot, max(2, given.kills // 5), given)
    most = max(v.difference for v in found)
    text = f"sent with and without 100 ms of lag differ by {most:.1e} rad; {sum(v.stops for v in found)} stops"
    show(found, len(failed), seconds, text, robot, "lag")
    return {"runs": len(found), "failed": len(failed), "difference_rad": most}


def _drive(job: tuple):
    from proofs.compare import run_drive

    return run_drive(*job)


def _errand(job: tuple):
    from proofs.compare import run_errand

    return run_errand(*job)


def run_comparison(robot: str, given) -> dict:
    from proofs.compare import SYSTEMS

    runs, errands = max(8, given.runs // 10), max(4, given.runs // 25)
    report = {}
    for system in SYSTEMS:
        begin = time.perf_counter()
        numbers = range(given.first, given.first + runs)
        drives = spread(_drive, [(system, robot, run) for run in numbers], given.processes)
        ways = spread(_errand, [(system, robot, given.first + run) for run in range(errands)], given.processes)
        times = np.array([way.time for way in ways])
        entry = {
            "runs": runs, "penetrating": sum(v.penetrations > 0 for v in drives),
            "distance_m": min(v.distance for v in drives), "errands": errands,
            "arrived": int(np.isfinite(times).sum()), "time_s": float(np.median(times)),
            "time_mean_s": float(np.mean(times)), "straight_s": float(np.median([way.straight for way in ways])),
        }  # fmt: skip
        report[system] = entry
        text = (
            f"{system:20} {entry['penetrating']} penetrating; smallest distance {1e3 * entry['distance_m']:.1f} mm; "
            f"{entry['arrived']} of {errands} errands done, median {entry['time_s']:.2f} s (straight on "
            f"{entry['straight_s']:.2f} s)"
        )
        failed = entry["penetrating"] if SYSTEMS[system] is None else 0
        show(drives, failed, time.perf_counter() - begin, text, robot, "compare")
    own = next(name for name, rate in SYSTEMS.items() if rate is None)
    return {"failed": report[own]["penetrating"], "systems": report}


def run_timing(robot: str, given) -> dict:
    from proofs.timing import MANNERS, time_steps
    from vla_core.robot import load_robot

    rows = []
    for kind in MANNERS[min(2, len(load_robot(robot).arms))]:
        row = time_steps(robot, kind, given.steps)
        row |= {"goal_p99_ms": STEP_GOAL.get(row["joints"], 2.0), "load": round(os.getloadavg()[0], 2)}
        row["met"] = row["p99_ms"] <= row["goal_p99_ms"]
        rows.append(row)
        print(
            f"steps    {robot:14}{row['joints']:3} joints, {kind:8} median {row['median_ms']:.3f}, p99 "
            f"{row['p99_ms']:.3f}, max {row['max_ms']:.3f} ms (goal: p99 {row['goal_p99_ms']:.1f}), own "
            f"processor time {row['own_median_ms']:.3f}, p99 {row['own_p99_ms']:.3f}; yardstick "
            f"{row['yardstick_median_ms']:.3f}, p99 {row['yardstick_p99_ms']:.3f}; links near in "
            f"{100 * row['near']:.0f} %, limited by collision in {100 * row['limited_by_collision']:.0f} % of steps",
            flush=True,
        )
    return {"failed": 0, "rows": rows}


def run_soak(robot: str, given) -> dict:
    from proofs.soak import measure_soak

    r = measure_soak(robot, given.minutes, realtime=given.realtime == "true")
    print(
        f"soak     {robot:14}{r['minutes']:g} min at {r['rate']:.0f} Hz, {r['steps']} steps, running "
        f"{100 * r['running']:.1f} %: {r['overruns']} overruns over one period, {r['overruns_by_own_time']} of them "
        f"with a step over it by own processor time, {r['overruns_of_controller']} of these in a replay too, so the "
        f"controller's (bare loop: {r['bare_overruns']}); step median, p99, max {r['step_ms']} ms, own processor "
        f"time {r['step_own_ms']} ms, replayed {r['replay_ms']} ms; {r['replay_differs']} steps replayed otherwise; "
        f"memory {r['memory_mb']} MB, growing by {r['memory_growth_mb_per_hour']} MB/h",
        flush=True,
    )
    return r | {"failed": int(r["replay_differs"] > 0)}


RUN = {
    "attack": run_attacks, "fuzz": run_fuzzes, "kill": run_kills, "leave": run_leaves, "resume": run_resumes,
    "lag": run_lags, "compare": run_comparison, "steps": run_timing, "soak": run_soak,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)} (default all)")
    parser.add_argument("--robots", default="panda,dual_panda", help="robot descriptions (default panda,dual_panda)")
    parser.add_argument("--runs", type=int, default=100, help="attacks per robot (default 100)")
    parser.add_argument("--commands", type=int, default=50_000, help="fuzzed, per robot (default 50000)")
    parser.add_argument("--states", type=int, default=100, help="to leave, per robot (default 100)")
    parser.add_argument("--kills", type=int, default=50, help="dead policies and moved arms, per robot (default 50)")
    parser.add_argument("--steps", type=int, default=2000, help="timed, per robot and drive (default 2000)")
    parser.add_argument("--minutes", type=float, default=1.0, help="of the soak, with two arms (default 1)")
    parser.add_argument("--realtime", default="false", choices=("true", "false"), help="for the soak (default false)")
    parser.add_argument("--processes", type=int, default=1, help="side by side, but for times (default 1)")
    parser.add_argument("--first", type=int, default=0, help="number of the first run (default 0)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write (default none)")
    given = parser.parse_args()
    parts, robots = given.parts.split(","), given.robots.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"parts: expected some of {', '.join(PARTS)}, found {', '.join(unknown)}")

    from vla_core.robot import load_robot

    report: dict = {"benchmark": "safety", "cores": os.cpu_count(), "load_before": os.getloadavg()[0], "parts": {}}
    print(f"{os.cpu_count()} cores, load {report['load_before']:.1f}")
    failed = 0
    for part in parts:
        for robot in robots:
            if part == "soak" and len(load_robot(robot).arms) < 2:
                continue
            entry = RUN[part](robot, given)
            failed += entry["failed"]
            report["parts"].setdefault(part, {})[robot] = entry
    report["failed"] = failed
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report, indent=2, default=float) + "\n")
        print(f"written: {given.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
