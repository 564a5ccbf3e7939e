"""One step of the safety controller, and how evenly the real node keeps its period.

    ./vla bench control [steps:=4000] [seconds:=20] [out:=FILE]

Step: `SafetyController.step` with a command each period, on one thread, the garbage collector frozen as in the node.
Both arms of a pair count as one step. Three robots: the Panda (7 joints), the ALOHA pair (12 arm joints and 2 grippers)
and a pair of Pandas made here (14 joints). Three motions: `free` is a smooth 0.3 m/s tool motion; `limits` drives on
into workspace walls and joint limits, where most constraints are active; `joints` are joint targets.

Loop: safety_controller_node at 100 Hz for the Panda on the wall clock, fed with joint states and commands at 100 Hz by
a process of its own. Jitter is |time between two control periods - 10 ms|, measured by the node (SafetyStatus.period).
It runs as it is, and where that is permitted with real-time priority and locked memory too (`realtime`).

Times hold for an idle machine; the load before each part is written down with it. What the machine itself adds is
measured in the same run: between the steps a fixed computation of about a step's length (`yardstick`), whose p99 would
be its median on a quiet machine; beside the node a bare loop that only sleeps until its next period.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

#: Goals on a 2-core machine: p99 of a step in ms by number of arm joints; p99 of the loop's jitter in ms when idle.
STEP_GOAL = {7: 1.0, 12: 2.0, 14: 2.0}
JITTER_GOAL = 1.0
MOTIONS = ("free", "limits", "joints")
#: First steps (and seconds of the loop) that are not counted.
WARM_UP = 300
SETTLE = 2.0
#: Longest time until the node runs, s.
START = 60.0


# --------------------------------------------------------------------------------------------------------------- steps


def time_steps(robot_name: str, motion: str, steps: int) -> dict:
    """Wall time of each step of one robot in one motion, and of the yardstick between the steps."""
    from vla_control.safety import Measured, SafetyController
    from vla_core.robot import load_robot

    robot = load_robot(robot_name)
    controller = SafetyController(robot)
    position = {arm.name: np.array(arm.home) for arm in robot.arms}
    gripper = {arm.name: 0.5 for arm in robot.arms if arm.gripper}
    controller.arm(Measured(0.0, position, gripper))
    times, yardstick, running, limited = np.zeros(steps), np.zeros(steps), 0, 0
    gc.collect()
    gc.freeze()
    for k in range(WARM_UP + steps):
        now = k * controller.period
        command = make_command(robot, motion, k, controller)
        measured = Measured(now, position, gripper)
        begin = time.perf_counter()
        decision = controller.step(command, measured, now)
        end = time.perf_counter()
        compute_something()
        if k >= WARM_UP:
            times[k - WARM_UP] = end - begin
            yardstick[k - WARM_UP] = time.perf_counter() - end
            running += decision.state.name == "RUNNING"
            limited += any(decision.limited.values())
        position = {name: target.position for name, target in decision.sent.items()}
    gc.unfreeze()
    median, p99, most = np.percentile(times * 1e3, [50, 99, 100]).tolist()
    bare = np.percentile(yardstick * 1e3, [50, 99])
    return {
        "robot": robot.name, "joints": len(robot.joint_names), "motion": motion, "steps": steps,
        "running": running, "limited": limited,
        "median_ms": round(median, 4), "p99_ms": round(p99, 4), "max_ms": round(most, 4),
        "yardstick_median_ms": round(float(bare[0]), 4), "yardstick_p99_ms": round(float(bare[1]), 4),
    }  # fmt: skip


def compute_something() -> None:
    """A fixed computation of some 0.5 ms of the same kind as a step: small arrays and plain Python."""
    matrix = 0.1 * np.eye(7)
    for _ in range(100):
        matrix = matrix @ matrix * 0.1 + 0.1
        sum(range(20))


def make_command(robot, motion: str, k: int, controller):
    """Command of control period k, one for all arms."""
    from vla_control.command import ArmCommand, Command

    period, t = controller.period, k * controller.period
    angle = 2.0 * np.pi * 0.5 * t
    parts = {}
    for arm in robot.arms:
        speed = np.zeros(6)
        if motion == "free":
            speed[:2] = 0.3 * np.cos(angle), 0.3 * np.sin(angle)
            speed[3:] = 0.3 * np.sin(1.3 * angle)
        elif motion == "limits":  # 2 s in each direction, at the tool's speed limits
            direction = np.random.default_rng(int(t / 2.0)).normal(size=6)
            speed[:3] = arm.tool_limits.speed * direction[:3] / np.linalg.norm(direction[:3])
            speed[3:] = 0.5 * arm.tool_limits.rotation * direction[3:] / np.linalg.norm(direction[3:])
        if motion == "joints":
            swing = 0.2 * np.sin(0.5 * angle + np.arange(len(arm.joints)))
            start = 0.2 * np.sin(np.arange(len(arm.joints)))
            parts[arm.name] = ArmCommand(joints=arm.home + swing - start, gripper=0.5 + 0.5 * np.sin(angle))
        else:
            parts[arm.name] = ArmCommand(delta=speed * period, gripper=0.5 + 0.5 * np.sin(angle))
    return Command(t, k + 1, "bench", period, False, parts)


# ---------------------------------------------------------------------------------------------------------------- loop


def feed_and_listen(robot_name: str, seconds: float, out: str) -> None:
    """Publish joint states and commands at the control rate, gather SafetyStatus; write what was seen."""
    import rclpy
    from rclpy.node import Node
    from sensor_msgs.msg import JointState
    from vla_core.robot import load_robot
    from vla_msgs.msg import ArmCommand, Command, SafetyStatus

    robot = load_robot(robot_name)
    period = 1.0 / robot.rates.control
    rclpy.init()
    node = Node("bench_control")
    joints = JointState(name=[*robot.joint_names, *robot.finger_names])
    fingers = [p for arm in robot.arms if arm.gripper for p in arm.gripper.positions(0.5).values()]
    joints.position = [float(q) for arm in robot.arms for q in arm.home] + fingers
    joints_publisher = node.create_publisher(JointState, "/joint_states", 10)
    command_publisher = node.create_publisher(Command, "/command", 5)
    command = Command(source="bench", period=period)
    command.header.frame_id = robot.base_frame
    command.arms = [ArmCommand(arm=arm.name, mode=ArmCommand.DELTA, gripper=float("nan")) for arm in robot.arms]
    heard: list[SafetyStatus] = []
    node.create_subscription(SafetyStatus, "/safety_status", heard.append, 10)

    def publish() -> None:
        joints.header.stamp = command.header.stamp = node.get_clock().now().to_msg()
        command.sequence += 1
        speed = 0.01 * np.cos(2.0 * np.pi * command.sequence * period)  # m/s: within what the standing joints allow
        for part in command.arms:
            part.translation.z = speed * period
        joints_publisher.publish(joints)
        command_publisher.publish(command)

    node.create_timer(period, publish)
    deadline = time.monotonic() + START
    while len(heard) < SETTLE / period and time.monotonic() < deadline:
        rclpy.spin_once(node, timeout_sec=0.1)
    heard.clear()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        rclpy.spin_once(node, timeout_sec=0.1)
    states = [int(status.state) for status in heard]
    Path(out).write_text(json.dumps({"periods": [status.period for status in heard], "states": states}))
    node.destroy_node()
    rclpy.shutdown()


def sleep_evenly(period: float, seconds: float, late: list[float]) -> None:
    """A bare loop: sleep until the next period (s), and note how much longer or shorter it was (s)."""
    start = before = time.perf_counter()
    for k in range(1, int(seconds / period)):
        time.sleep(max(0.0, start + k * period - time.perf_counter()))
        now = time.perf_counter()
        late.append(now - before - period)
        before = now


def may_be_realtime() -> bool:
    """Whether a process may lock its memory and take real-time priority here."""
    code = "from vla_control.loop import take_realtime; take_realtime(50)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def measure_loop(robot: str, seconds: float, folder: Path, realtime: bool = False) -> dict:
    """Jitter of the real node, in ms."""
    from vla_core.robot import load_robot

    period = 1.0 / load_robot(robot).rates.control
    environment = dict(os.environ)
    environment.setdefault("ROS_DOMAIN_ID", str(100 + os.getpid() % 100))
    environment.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    out, log = folder / "periods.json", folder / "node.log"
    parameters = ["--ros-args", "-p", f"robot:={robot}", "-p", "auto_arm:=true", "-p", f"realtime:={realtime}"]
    load = os.getloadavg()[0]
    with log.open("w") as stream:
        node = subprocess.Popen(
            [sys.executable, "-m", "vla_control.safety_controller_node", *parameters],
            env=environment, stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            late: list[float] = []
            bare = threading.Thread(target=sleep_evenly, args=(period, seconds, late))
            bare.start()
            feed = [sys.executable, __file__, "--feed", robot, "--seconds", str(seconds), "--out", str(out)]
            subprocess.run(feed, env=environment, check=True, timeout=START + seconds + 30.0)
            bare.join()
        finally:
            node.send_signal(signal.SIGINT)
            try:
                node.wait(timeout=10.0)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()
    seen = json.loads(out.read_text())
    periods = np.array(seen["periods"]) * 1e3
    if len(periods) < 10:
        raise SystemExit(f"bench control: expected the node's status, found {len(periods)}:\n{log.read_text()[-4000:]}")
    nominal = period * 1e3
    median, p99, most = np.percentile(np.abs(periods - nominal), [50, 99, 100]).tolist()
    bare_p99 = float(np.percentile(np.abs(late), 99)) * 1e3
    return {
        "robot": robot, "seconds": seconds, "periods": len(periods), "nominal_ms": nominal,
        "running": sum(state == 2 for state in seen["states"]),
        "overruns": int((periods > 2.0 * nominal).sum()), "load_before": load,
        "jitter_median_ms": round(median, 4), "jitter_p99_ms": round(p99, 4), "jitter_max_ms": round(most, 4),
        "bare_jitter_p99_ms": round(bare_p99, 4),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="counted per robot and motion (default 4000)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the node's loop; 0: no loop (default 20)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write (default none)")
    parser.add_argument("--feed", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.feed:
        feed_and_listen(given.feed, given.seconds, str(given.out))
        return 0

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    report = {"benchmark": "control", "cores": os.cpu_count(), "load_before": os.getloadavg()[0], "steps": []}
    print(f"{os.cpu_count()} cores, load {report['load_before']:.1f}")
    columns = f"{'median':>10}{'p99':>10}{'max':>10}{'goal p99':>10}{'yardstick, p99':>22}"
    print(f"{'one step [ms]':22}{'joints':>7}{columns}")
    for robot in ("panda", "aloha", "dual_panda"):
        for motion in MOTIONS:
            r = time_steps(robot, motion, given.steps)
            r["goal_p99_ms"] = STEP_GOAL[r["joints"]]
            r["met"] = r["p99_ms"] <= r["goal_p99_ms"]
            report["steps"].append(r)
            label = f"{r['robot']}, {motion}"
            joints = f"{r['joints']}+2" if r["robot"] == "aloha" else str(r["joints"])
            print(
                f"{label:22}{joints:>7}{r['median_ms']:10.3f}{r['p99_ms']:10.3f}{r['max_ms']:10.3f}"
                f"{r['goal_p99_ms']:10.1f}{r['yardstick_median_ms']:12.3f}{r['yardstick_p99_ms']:10.3f}"
            )
    if given.seconds > 0:
        for key in ("loop", "loop_realtime") if may_be_realtime() else ("loop",):
            with tempfile.TemporaryDirectory() as folder:
                loop = measure_loop("panda", given.seconds, Path(folder), key == "loop_realtime")
            loop |= {"goal_p99_ms": JITTER_GOAL, "met": loop["jitter_p99_ms"] <= JITTER_GOAL}
            report[key] = loop
            print(
                f"{key.replace('_', ', ')}: {loop['periods']} periods of {loop['nominal_ms']:.0f} ms, "
                f"{loop['running']} of them running; jitter: median {loop['jitter_median_ms']:.3f}, p99 "
                f"{loop['jitter_p99_ms']:.3f}, max {loop['jitter_max_ms']:.3f} ms; {loop['overruns']} overruns; "
                f"load {loop['load_before']:.1f} (goal: p99 {JITTER_GOAL:.1f} ms on an idle machine; "
                f"p99 of a bare loop: {loop['bare_jitter_p99_ms']:.3f})"
            )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"written: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
