"""Camera stamp to command out, without inference, through the real nodes; with the DDS profile and with the defaults.

    ./vla bench latency [seconds:=20] [cameras:=2] [out:=FILE]

Two 640x480 cameras at 30 Hz and joint states at 101 Hz (one process, wall-clock stamps, the images as random bytes
made beforehand) feed observation_node; a policy process that answers every observation at once with a chunk that keeps
the arm where it is; chunk_executor_node (strategy naive) and safety_controller_node at 100 Hz. The policy process hears
everything and takes the times:

    observation     image stamp to observation received by the policy
    chunk           ... to the chunk published (nothing is inferred)
    command         ... to the first /command that rests on that observation, received
    joint targets   ... to the stamp of the control period in which the controller took that command

From the newest image stamp in the observation, so the phase between the cameras does not count. Chunk to command is
the executor's wait for its next 10 ms tick (0 to 10 ms), command to joint targets the controller's.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / "launch" / "dds_profile.xml"
STAGES = ("observation", "chunk", "command", "joint targets")
NAMES = ("policy", "observation", "executor", "controller", "cameras")
WIDTH, HEIGHT, RATE = 640, 480, 30.0
#: Of the joint states, s: not quite 10 ms, so that their phase against the 100 Hz of the executor and the controller
#: runs through all values.
JOINT_PERIOD = 0.0099
#: First seconds of a graph that runs, not counted.
SETTLE = 2.0
#: Longest time until the first command, s.
START = 60.0


# ------------------------------------------------------------------------------------------- the processes of the bench


def play_cameras(robot_path: str) -> None:
    """Publish both cameras' images and the joint states until the context ends."""
    import rclpy
    from rclpy.node import Node
    from sensor_msgs.msg import Image, JointState
    from vla_core.memory import keep_freed_memory
    from vla_core.robot import load_robot

    keep_freed_memory()
    robot = load_robot(robot_path)
    rclpy.init()
    node = Node("latency_cameras")
    joints = JointState(name=[*robot.joint_names, *robot.finger_names])
    fingers = [p for arm in robot.arms for p in arm.gripper.positions(0.5).values()]
    joints.position = [q for arm in robot.arms for q in arm.home] + fingers
    joints.velocity = [0.0] * len(joints.name)
    joints_publisher = node.create_publisher(JointState, "/joint_states", 10)
    publishers = [node.create_publisher(Image, f"/camera/{c.name}/image_raw", 5) for c in robot.cameras]
    rng = np.random.default_rng(0)
    size = 3 * WIDTH * HEIGHT
    pictures = [array.array("B", rng.integers(0, 256, size, np.uint8).tobytes()) for _ in range(4)]
    image = Image(width=WIDTH, height=HEIGHT, encoding="rgb8", step=3 * WIDTH)
    ticks, images, begin = 0, 0, time.monotonic()
    while rclpy.ok():
        time.sleep(max(0.0, begin + ticks * JOINT_PERIOD - time.monotonic()))
        joints.header.stamp = image.header.stamp = node.get_clock().now().to_msg()
        joints_publisher.publish(joints)
        # As in the simulator an image belongs to a control period: its joint states are out before it.
        if ticks * JOINT_PERIOD >= images / RATE:
            for publisher, camera in zip(publishers, robot.cameras, strict=True):
                image.header.frame_id = camera.frame
                image.data = pictures[images % len(pictures)]
                publisher.publish(image)
            images += 1
        ticks += 1


def answer_and_measure(out: str) -> None:
    """Answer each observation with a chunk and take the times of every stage; write them when the context ends."""
    import rclpy
    from rclpy.executors import ExternalShutdownException
    from rclpy.node import Node
    from rclpy.qos import DurabilityPolicy, QoSProfile
    from vla_core.memory import keep_freed_memory
    from vla_core.time import seconds
    from vla_msgs.msg import ActionChunk, ActionTrajectory, Command, Observation, PolicyStatus, SafetyStatus

    keep_freed_memory()
    horizon = 16
    times: dict[int, dict[str, float]] = {}
    running = Path(out).with_suffix(".running")
    waiting: dict[int, int] = {}  # command sequence -> observation
    ages, lost = [], {"sequence": 0, "missed": 0}

    rclpy.init()
    node = Node("latency_policy")
    chunks = node.create_publisher(ActionChunk, "/action_chunk", 5)
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    status = node.create_publisher(PolicyStatus, "/policy_status", latched)
    status.publish(PolicyStatus(active="echo", period=1 / RATE, horizon=horizon))

    def key(stamp) -> int:
        return stamp.sec * 1_000_000_000 + stamp.nanosec

    def on_observation(message: Observation) -> None:
        received = time.time()
        actions = ActionTrajectory(representation=ActionTrajectory.POSE, period=1 / RATE, horizon=horizon)
        actions.frame_id, actions.start = message.header.frame_id, message.header.stamp
        row = []
        for arm in message.arms:
            p, q = arm.tool.position, arm.tool.orientation
            actions.arms.append(arm.arm)
            row += [p.x, p.y, p.z, q.x, q.y, q.z, q.w, arm.gripper]
        actions.dimension, actions.data = len(row), array.array("d", row * horizon)
        chunks.publish(ActionChunk(header=message.header, policy="echo", actions=actions))
        newest = max(seconds(image.image.header.stamp) for image in message.images)
        times[key(message.header.stamp)] = {
            "stamp": newest, "observation": received - newest, "chunk": time.time() - newest,
        }  # fmt: skip
        ages.append(message.age)
        if lost["sequence"]:
            lost["missed"] += message.sequence - lost["sequence"] - 1
        lost["sequence"] = message.sequence

    def on_command(message: Command) -> None:
        observation = times.get(key(message.observation))
        if observation is not None and "command" not in observation:
            observation["command"] = time.time() - observation["stamp"]
            waiting[message.sequence] = key(message.observation)

    def on_status(message: SafetyStatus) -> None:
        for sequence in [s for s in waiting if s <= message.sequence]:
            observation = times[waiting.pop(sequence)]
            observation["joint targets"] = seconds(message.header.stamp) - observation["stamp"]
            running.touch()

    node.create_subscription(Observation, "/observation", on_observation, 2)
    node.create_subscription(Command, "/command", on_command, 5)
    node.create_subscription(SafetyStatus, "/safety_status", on_status, 10)
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        begin = min((t["stamp"] for t in times.values() if "joint targets" in t), default=0.0) + SETTLE
        counted = [t for t in times.values() if t["stamp"] >= begin]
        stages = {stage: [t[stage] for t in counted if stage in t] for stage in STAGES}
        Path(out).write_text(json.dumps({"stages": stages, "missed": lost["missed"], "observations": len(counted)}))
        rclpy.try_shutdown()


# --------------------------------------------------------------------------------------------------------------- runs


def write_robot(folder: Path, cameras: int) -> Path:
    """The Panda with `cameras` uncalibrated cameras of 640x480 at 30 Hz."""
    from vla_core.robot import load_robot

    panda = load_robot("panda")
    tree = yaml.safe_load(panda.path.read_text())
    camera = {"width": WIDTH, "height": HEIGHT, "rate": RATE, "driver": {"type": "mujoco"}}
    tree["cameras"] = {f"camera{i}": dict(camera) for i in range(cameras)}
    path = folder / "panda_640.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(robot: Path, seconds: float, profile: bool, folder: Path) -> dict:
    """One run of the graph; the times of its stages in ms."""
    environment = dict(os.environ)
    environment.pop("FASTDDS_DEFAULT_PROFILES_FILE", None)
    if profile:
        environment["FASTDDS_DEFAULT_PROFILES_FILE"] = str(PROFILE)
    environment.setdefault("ROS_DOMAIN_ID", str(100 + os.getpid() % 100))
    environment.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    out = folder / "times.json"
    running = out.with_suffix(".running")
    out.unlink(missing_ok=True)
    running.unlink(missing_ok=True)

    def node(module: str, **parameters: str) -> list[str]:
        settings = [a for k, v in ({"robot": robot} | parameters).items() for a in ("-p", f"{k}:={v}")]
        return [sys.executable, "-m", module, "--ros-args", *settings]

    commands = [
        [sys.executable, __file__, "--measure", str(out)],
        node("vla_perception.observation_node"),
        node("vla_execution.chunk_executor_node", strategy="naive"),
        node("vla_control.safety_controller_node", auto_arm="true"),
        [sys.executable, __file__, "--cameras-of", str(robot)],
    ]
    log = folder / f"nodes_{'profile' if profile else 'defaults'}.log"
    with log.open("w") as stream:
        processes = [subprocess.Popen(c, env=environment, stdout=stream, stderr=subprocess.STDOUT) for c in commands]
        try:
            deadline = time.monotonic() + START
            while not running.exists():
                if time.monotonic() > deadline:
                    raise SystemExit(f"bench latency: no command in {START:.0f} s:\n{log.read_text()[-4000:]}")
                time.sleep(0.1)
            time.sleep(SETTLE)
            before = [_cpu_seconds(process.pid) for process in processes]
            time.sleep(seconds)
            used = [_cpu_seconds(process.pid) for process in processes]
        finally:
            for process in processes:
                process.send_signal(signal.SIGINT)
            for process in processes:
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    measured = json.loads(out.read_text())
    result = {
        "observations": measured["observations"],
        "observations_missed": measured["missed"],
        "cpu": {n: round((b - a) / seconds, 3) for n, a, b in zip(NAMES, before, used, strict=True)},
        "stages": {},
    }
    for stage, values in measured["stages"].items():
        median, p99, most = np.percentile(np.array(values) * 1e3, [50, 99, 100])
        result["stages"][stage] = {
            "median_ms": round(median, 2), "p99_ms": round(p99, 2), "max_ms": round(most, 2), "count": len(values),
        }  # fmt: skip
    return result


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process since it began, s."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="counted per run (default 20)")
    parser.add_argument("--cameras", type=int, default=2, help="640x480 at 30 Hz (default 2)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write (default none)")
    parser.add_argument("--cameras-of", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cameras_of:
        play_cameras(given.cameras_of)
        return 0
    if given.measure:
        answer_and_measure(given.measure)
        return 0

    report = {
        "benchmark": "latency", "cameras": given.cameras, "width": WIDTH, "height": HEIGHT, "rate_hz": RATE,
        "control_rate_hz": 100.0, "cores": os.cpu_count(), "load_before": os.getloadavg()[0], "seconds": given.seconds,
    }  # fmt: skip
    cores = os.cpu_count()
    print(f"{given.cameras} cameras {WIDTH}x{HEIGHT} at {RATE:.0f} Hz, {given.seconds:.0f} s a run, {cores} cores")
    print(f"{'image stamp to':16}" + "".join(f"{n:>22}" for n in ("DDS profile [ms]", "DDS defaults [ms]")))
    print(f"{'':16}" + f"{'median':>14}{'p99':>8}" * 2)
    with tempfile.TemporaryDirectory() as folder:
        robot = write_robot(Path(folder), given.cameras)
        for name, profile in (("profile", True), ("defaults", False)):
            report[name] = run(robot, given.seconds, profile, Path(folder))
    for stage in STAGES:
        cells = [report[name]["stages"][stage] for name in ("profile", "defaults")]
        print(f"{stage:16}" + "".join(f"{c['median_ms']:14.2f}{c['p99_ms']:8.2f}" for c in cells))
    for name in ("profile", "defaults"):
        r = report[name]
        cpu = ", ".join(f"{n} {100 * c:.0f}" for n, c in r["cpu"].items())
        print(f"{name}: {r['observations']} observations, {r['observations_missed']} missed; CPU in % of a core: {cpu}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"written: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
