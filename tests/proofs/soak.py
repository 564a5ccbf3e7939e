"""Proof 7: the real node for a long time, with a kinematic simulation of the arms and a sender on the same machine.

    python -m proofs.soak ROLE ...          (roles of `measure_soak`, which starts them)

The node's process is the real safety_controller_node; only its SafetyController is wrapped (`Recorder`), to note when
each step began, its wall time, the processor time of its own thread and what it sent, and to write down every call. A
process that only sleeps until its next period runs beside.

A period that took more than twice its length is an overrun over one period. Whose it is cannot be told from its step's
own processor time alone: a virtual machine's processor time holds what the host took meanwhile, and neighbours slow the
caches down. But the controller is pure: the same calls in the same order are the same work. So afterwards a process of
its own makes them again (`replay`), which must send the same bit for bit, and an overrun is the controller's own when
its step took more than a period of its own processor time both then and live; what was slow only once was the machine
(other processes, other threads, garbage, the host). When an overrun is over in that replay too, there is a second one,
and the least counts. A replay goes from step to step with nothing else between, so its caches are warm and all its
steps are quicker than live. `replay_ms` beside `step_own_ms` tells by how much, `overruns_replay_ms` how near to a
period the overruns' steps came in it, and `overruns_by_own_time` how many there are by the live processor time alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import yaml
from vla_control.safety import SafetyController, SafetyDecision

#: Seconds that are not counted at first: discovery, arming, first commands; longest time for that.
SETTLE, START = 5.0, 90.0
#: Share of the run after which memory is taken to be warm.
WARM = 0.2
#: Calls that change a SafetyController, besides `step`.
CHANGES = ("arm", "disarm", "stop", "offer")
#: A recording goes to its file in pieces of this many bytes; calls of a replay between two collections of garbage.
PIECE, TIDY = 1 << 16, 100


def at_rate(robot_name: str, rate: float, folder: Path) -> Path:
    """The robot description with its control rate set to `rate`, Hz, and no drivers: the arms are simulated here."""
    from vla_core.robot import load_robot

    robot = load_robot(robot_name)
    tree = yaml.safe_load(robot.path.read_text())
    tree["rates"]["control"] = float(rate)
    parts = tree["model"] if isinstance(tree["model"], list) else [tree["model"]]
    for part, known in zip(parts, robot.parts):
        part["file"] = str(known.file)
    for arm in tree["arms"].values():
        arm.pop("driver", None)
    path = folder / f"{robot.name}_soak.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


# ----------------------------------------------------------------------------------------------------- recorded calls


def digest(decision: SafetyDecision | None) -> int:
    """Of a decision's state and what it sends: positions, velocities, openings; -1 for a step without a decision."""
    if decision is None:
        return -1
    found = int(decision.state)
    for target in decision.sent.values():
        found = zlib.crc32(target.position, found)
        found = zlib.crc32(target.velocity, found)
        found = zlib.crc32(struct.pack("d", target.gripper), found)
    return found


class Recorder:
    """A SafetyController that writes down the calls that change it, for `replay`, and what its steps took.

    Each call is written before it is made, since its arguments may be used again for the next; writing is in none of
    the times of a step.

    Args:
        controller: made anew, used by nobody else. calls: file for the calls. times: (N, 4), a row for each step:
            [begin, wall time, own processor time of its thread, all in s; digest]. Whatever comes after N steps is not
            recorded.
    """

    def __init__(self, controller: SafetyController, calls: BinaryIO, times: np.ndarray):
        self._controller, self._calls, self._times = controller, calls, times
        self._count = 0
        pickle.dump((controller.robot, controller.limits, len(times)), calls, pickle.HIGHEST_PROTOCOL)

    def __getattr__(self, name: str):
        return partial(self._change, name) if name in CHANGES else getattr(self._controller, name)

    def step(self, *given) -> SafetyDecision:
        entered = time.perf_counter()
        self._write("step", given)
        decision = None
        begin, own = time.perf_counter(), time.thread_time()
        try:
            decision = self._controller.step(*given)
        finally:
            own, wall = time.thread_time() - own, time.perf_counter() - begin
            if self._count < len(self._times):
                self._times[self._count] = entered, wall, own, digest(decision)
                self._count += 1
        return decision

    def _change(self, name: str, *given):
        self._write(name, given)
        return getattr(self._controller, name)(*given)

    def _write(self, name: str, given: tuple) -> None:
        if self._count < len(self._times):
            # A pickle of its own for each call: nothing is remembered from one to the next, so memory does not grow.
            pickle.dump((name, given), self._calls, pickle.HIGHEST_PROTOCOL)


def made(times: np.ndarray) -> np.ndarray:
    """The rows of a Recorder's `times`, NaN at first, that were written."""
    return times[~np.isnan(times[:, 0])]


def replay(calls: Path) -> np.ndarray:
    """Make the calls of a recording again, on a fresh SafetyController. Returns times of its steps as a Recorder's.

    What is recorded is taken for our own: unpickling runs what it is told to.
    """
    # Recorded again, to nowhere, so that a step finds the caches as it did live.
    with calls.open("rb") as file, open(os.devnull, "wb", PIECE) as nowhere:
        robot, limits, room = pickle.load(file)
        times = np.full((room, 4), np.nan)
        again = Recorder(SafetyController(robot, limits), nowhere, times)
        count = 0
        with suppress(EOFError):
            while True:
                name, given = pickle.load(file)
                with suppress(Exception):  # as it was raised live
                    getattr(again, name)(*given)
                count += 1
                if count % TIDY == 0:
                    gc.collect(0)
    return made(times)


# --------------------------------------------------------------------------------------------------------------- roles


def run_node(robot: str, seconds: float, out: str, calls: str, realtime: bool) -> None:
    """The real node; its steps' times go to `out`, the calls of its controller to `calls`."""
    from vla_control import safety_controller_node
    from vla_core.robot import load_robot

    room = int((seconds + START + 60.0) * load_robot(robot).rates.control * 1.2)
    times = np.full((room, 4), np.nan)  # written to, so that its memory is there from the first step
    with open(calls, "wb", PIECE) as file:
        safety_controller_node.SafetyController = lambda *given: Recorder(SafetyController(*given), file, times)
        try:
            parameters = {"robot": robot, "auto_arm": "true", "realtime": str(realtime).lower()}
            safety_controller_node.main(
                ["--ros-args", *(part for name, value in parameters.items() for part in ("-p", f"{name}:={value}"))]
            )
        finally:
            np.save(out, made(times))


def run_replay(calls: str, out: str) -> None:
    """Make a node's calls again; times of the steps go to `out`. Garbage is collected between steps, as in the node."""
    gc.collect()
    gc.freeze()
    gc.disable()
    np.save(out, replay(Path(calls)))


def run_arms(robot_name: str, seconds: float, out: str) -> None:
    """Arms that are where they were sent, and a sender that drives them about and at each other."""
    import rclpy
    from rclpy.node import Node
    from sensor_msgs.msg import JointState
    from vla_core.robot import load_robot
    from vla_msgs.msg import ArmCommand, Command, SafetyStatus

    robot = load_robot(robot_name)
    period = 1.0 / robot.rates.control
    rclpy.init()
    node = Node("soak_arms")
    names = [*robot.joint_names, *robot.finger_names]
    fingers = {n: p for arm in robot.arms if arm.gripper for n, p in arm.gripper.positions(0.5).items()}
    position = {j: float(q) for arm in robot.arms for j, q in zip(arm.joints, arm.home)} | fingers
    joints = JointState(name=names)
    joints_publisher = node.create_publisher(JointState, "/joint_states", 10)
    command_publisher = node.create_publisher(Command, "/command", 5)
    command = Command(source="soak", period=period)
    command.header.frame_id = robot.base_frame
    command.arms = [ArmCommand(arm=arm.name, mode=ArmCommand.DELTA, gripper=float("nan")) for arm in robot.arms]
    states: dict[int, int] = {}
    reasons: dict[str, int] = {}
    nearest = float("inf")

    def on_target(message: JointState) -> None:
        position.update(zip(message.name, message.position))

    def on_status(message: SafetyStatus) -> None:
        nonlocal nearest
        states[message.state] = states.get(message.state, 0) + 1
        nearest = min(nearest, message.distance)
        reasons[message.reason] = reasons.get(message.reason, 0) + 1

    for arm in robot.arms:
        node.create_subscription(JointState, f"/{arm.name}/joint_targets", on_target, 5)
    node.create_subscription(SafetyStatus, "/safety_status", on_status, 10)

    def publish() -> None:
        joints.header.stamp = command.header.stamp = node.get_clock().now().to_msg()
        joints.position = [position[n] for n in names]
        joints_publisher.publish(joints)
        command.sequence += 1
        t = command.sequence * period
        for k, part in enumerate(command.arms):
            # To and fro across the cell, against each other, slowly up and down, and a turn.
            side = (-1.0) ** k
            part.translation.y = side * 0.25 * np.sin(2 * np.pi * 0.11 * t) * period
            part.translation.x = 0.12 * np.sin(2 * np.pi * 0.17 * t + k) * period
            part.translation.z = 0.08 * np.sin(2 * np.pi * 0.07 * t) * period
            part.rotation.z = side * 0.3 * np.sin(2 * np.pi * 0.13 * t) * period
        command_publisher.publish(command)

    node.create_timer(period, publish)
    deadline = time.monotonic() + START
    while sum(states.values()) < SETTLE / period and time.monotonic() < deadline:
        rclpy.spin_once(node, timeout_sec=0.1)
    states.clear()
    reasons.clear()
    began = time.perf_counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        rclpy.spin_once(node, timeout_sec=0.1)
    seen = {"began": began, "ended": time.perf_counter(), "states": states, "nearest": nearest, "reasons": reasons}
    Path(out).write_text(json.dumps(seen))
    node.destroy_node()
    rclpy.shutdown()


def run_bare(period: float, seconds: float, out: str) -> None:
    """Sleep until the next period, again and again: what the machine adds by itself."""
    count = int(seconds / period)
    begun = np.ones(count)
    start = time.perf_counter()
    for k in range(count):
        time.sleep(max(0.0, start + k * period - time.perf_counter()))
        begun[k] = time.perf_counter()
    np.save(out, begun[:, None])


# ------------------------------------------------------------------------------------------------------------- measure


def resident(pid: int) -> float:
    """Resident memory of a process, MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_soak(robot_name: str, minutes: float, rate: float = 200.0, realtime: bool = False) -> dict:
    """Overruns by whose they are, times of a step and memory of the node's process, over `minutes`; its calls are
    replayed afterwards. realtime: with the node's memory locked and real-time priority.

    Raises:
        RuntimeError: the node said nothing, or ended by itself, or the replay failed; the log is in the message.
    """
    seconds = 60.0 * minutes
    environment = dict(os.environ)
    environment.setdefault("ROS_DOMAIN_ID", str(10 + os.getpid() % 80))
    environment.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    environment["OMP_NUM_THREADS"] = "1"
    here = Path(__file__).resolve().parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(here), environment.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        robot = at_rate(robot_name, rate, folder)
        period = 1.0 / rate
        log = folder / "node.log"

        def start(role: str, out: Path, stream=None) -> subprocess.Popen:
            given = ["--robot", str(robot), "--period", str(period), "--seconds", str(seconds), "--out", str(out)]
            given += ["--calls", str(folder / "calls.pickle"), *(["--realtime"] if realtime else [])]
            return subprocess.Popen(
                [sys.executable, "-m", "proofs.soak", role, *given], env=environment,
                stdout=stream, stderr=subprocess.STDOUT if stream else None,
            )  # fmt: skip

        def replayed(number: int) -> np.ndarray:
            out = folder / f"replay_{number}.npy"
            with log.open("w") as stream, start("replay", out, stream) as process:
                try:
                    process.wait()
                finally:
                    process.kill()
            if process.returncode:
                raise RuntimeError(f"soak: the replay ended with {process.returncode}:\n{log.read_text()[-4000:]}")
            return np.load(out)

        load = os.getloadavg()[0]
        with log.open("w") as stream:
            node = start("node", folder / "node.npy", stream)
            others = []
            memory = []
            try:
                others = [start("arms", folder / "arms.json"), start("bare", folder / "bare.npy")]
                while others[0].poll() is None:
                    time.sleep(1.0)
                    if node.poll() is not None:
                        raise RuntimeError(f"soak: the node ended with {node.returncode}:\n{log.read_text()[-4000:]}")
                    memory.append((time.perf_counter(), resident(node.pid)))
                others[1].wait(timeout=60.0)
                node.send_signal(signal.SIGINT)
                node.wait(timeout=60.0)
            finally:
                for process in (node, *others):
                    if process.poll() is None:
                        process.kill()
                        process.wait()
        if not (folder / "arms.json").is_file() or not (folder / "node.npy").is_file():
            raise RuntimeError(f"soak: expected times of the node, found none:\n{log.read_text()[-4000:]}")
        seen = json.loads((folder / "arms.json").read_text())
        steps, bare = np.load(folder / "node.npy"), np.load(folder / "bare.npy")[:, 0]
        replays = [replayed(1)]
        if find_overruns(steps, replays, period)[2].any():
            replays.append(replayed(2))
    memory = np.array(memory)
    head = {"robot": robot_name, "minutes": minutes, "rate": rate, "realtime": realtime, "load_before": round(load, 2)}
    return head | judge_soak(steps, replays, bare, memory, period, seen)


def find_overruns(
    steps: np.ndarray, replays: list[np.ndarray], period: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N - 1,) bool each: periods that took more than twice their length; those of them whose step took more than a
    period of its own processor time; and those of these where it did so in all replays, too. Arguments: `judge_soak`.
    """
    if any(len(again) != len(steps) for again in replays):
        raise RuntimeError(f"soak: expected {len(steps)} steps in a replay, found {[len(a) for a in replays]}")
    over = np.diff(steps[:, 0]) > 2.0 * period
    by_own_time = over & (steps[:-1, 2] > period)
    return over, by_own_time, by_own_time & (np.min([again[:-1, 2] for again in replays], axis=0) > period)


def judge_soak(
    steps: np.ndarray, replays: list[np.ndarray], bare: np.ndarray, memory: np.ndarray, period: float, seen: dict
) -> dict:
    """The report of a soak, times in ms.

    What is said of times and memory is of the time from `began` to `ended`; replays are compared from the first step to
    the last. overruns: periods of more than twice their length; overruns_by_own_time: those of them whose step took
    more than a period of its own processor time; overruns_of_controller: those of these where the same step did so in
    every replay. replay_differs: steps that decided anything else in a replay. step_ms, step_own_ms, replay_ms: median,
    p99 and maximum of a step's wall time, of its own processor time, and of the least of that in the replays;
    overruns_replay_ms: of the latter for the steps of overruns_by_own_time, empty when there are none.

    Args:
        steps: (N, 4) [begin, wall time, own processor time, s; digest]. replays: as steps, with begins of their own, s.
        bare: (M,) begins of a bare loop, s. memory: (K, 2) [time, s; MB]. period: s.
        seen: by the arms: began, ended, s; states and reasons, how often; nearest, m.
    """
    over, by_own_time, by_controller = find_overruns(steps, replays, period)
    differs = np.any([again[:, 3] != steps[:, 3] for again in replays], axis=0)
    counted = (steps[:, 0] >= seen["began"]) & (steps[:, 0] <= seen["ended"])
    if counted.sum() < 10:
        raise RuntimeError(f"soak: expected the node's steps, found {counted.sum()}")
    between = counted[:-1] & counted[1:]
    least = np.min([again[:, 2] for again in replays], axis=0)
    slow = least[:-1][by_own_time & between]
    wall, own, again, slow = (
        [round(float(x), 3) for x in np.percentile(values * 1e3, [50, 99, 100])] if len(values) else []
        for values in (steps[counted, 1], steps[counted, 2], least[counted], slow)
    )
    memory = memory[(memory[:, 0] >= seen["began"]) & (memory[:, 0] <= seen["ended"])]
    warm = memory[int(WARM * len(memory)) :]
    slope = float(np.polyfit(warm[:, 0] / 3600.0, warm[:, 1], 1)[0]) if len(warm) > 2 else float("nan")
    states = {int(k): v for k, v in seen["states"].items()}
    return {
        "steps": int(counted.sum()),
        "running": round(states.get(2, 0) / max(sum(states.values()), 1), 4),
        "reasons": seen["reasons"],
        "nearest_m": seen["nearest"],
        "overruns": int(over[between].sum()),
        "overruns_by_own_time": int(by_own_time[between].sum()),
        "overruns_of_controller": int(by_controller[between].sum()),
        "steps_over_period_by_own_time": int((steps[counted, 2] > period).sum()),
        "bare_overruns": int((np.diff(bare) > 2.0 * period).sum()),
        "step_ms": wall,
        "step_own_ms": own,
        "replays": len(replays),
        "replay_ms": again,
        "overruns_replay_ms": slow,
        "replay_differs": int(differs.sum()),
        "memory_mb": [round(float(x), 2) for x in (warm[0, 1], warm[-1, 1], warm[:, 1].max())] if len(warm) else [],
        "memory_growth_mb_per_hour": round(slope, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["node", "arms", "bare", "replay"])
    parser.add_argument("--robot")
    parser.add_argument("--period", type=float)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--out")
    parser.add_argument("--calls")
    parser.add_argument("--realtime", action="store_true")
    given = parser.parse_args()
    if given.role == "bare":
        run_bare(given.period, given.seconds, given.out)
    elif given.role == "node":
        run_node(given.robot, given.seconds, given.out, given.calls, given.realtime)
    elif given.role == "replay":
        run_replay(given.calls, given.out)
    else:
        run_arms(given.robot, given.seconds, given.out)


if __name__ == "__main__":
    main()
