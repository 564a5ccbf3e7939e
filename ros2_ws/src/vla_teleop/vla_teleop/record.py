"""`./vla record`: starts the recorder and lets the user start and end episodes by keys.

    s start   e end: success   f end: failure   d discard   q quit

A recorder that already runs is used as it is. Other arguments (`--robot panda`, `--folder DIR`, ...) become the
recorder's parameters.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import rclpy
from std_srvs.srv import Trigger
from vla_msgs.srv import StartEpisode, StopEpisode

from vla_teleop.devices import DeviceError
from vla_teleop.keyboard import Terminal

KEYS = "s start   e end: success   f end: failure   d discard   q quit"


def main(arguments: list[str] | None = None) -> int:
    """Run until `q` or Ctrl-C; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vla record", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--robot", default="panda", help="robot description, a name or a YAML file")
    parser.add_argument("--folder", default="", help="where the bags go (~/vla_bags)")
    parser.add_argument("--compression", default="zstd", help="zstd, lz4 or none")
    parser.add_argument("--record-images", "--record_images", default="raw", help="raw or none")
    parser.add_argument("--auto", default="false", help="true records every episode of the simulator by itself")
    parser.add_argument("--use-sim-time", "--use_sim_time", default="false", help="true follows /clock")
    parser.add_argument("--task", default="", help="task name written into the bags")
    parser.add_argument("--instruction", default="", help="instruction written into the bags")
    options = parser.parse_args(arguments)
    try:
        terminal = Terminal()
    except DeviceError as error:
        print(f"record: {error}", file=sys.stderr)
        return 1
    recorder = None
    rclpy.init(args=[])
    node = rclpy.create_node("record_keys")
    try:
        start = node.create_client(StartEpisode, "/recorder/start")
        if not start.wait_for_service(1.5):
            recorder = _start_recorder(options)
            if not start.wait_for_service(15.0):
                print("record: expected the recorder's services within 15 s, found none", file=sys.stderr)
                return 1
        stop = node.create_client(StopEpisode, "/recorder/stop")
        discard = node.create_client(Trigger, "/recorder/discard")
        requests = {
            "s": (start, StartEpisode.Request(task=options.task, instruction=options.instruction)),
            "e": (stop, StopEpisode.Request(outcome=StopEpisode.Request.SUCCESS)),
            "f": (stop, StopEpisode.Request(outcome=StopEpisode.Request.FAILURE)),
            "d": (discard, Trigger.Request()),
        }
        print(KEYS, flush=True)
        while rclpy.ok() and (recorder is None or recorder.poll() is None):
            for key in terminal.read():
                if key == "q":
                    return 0
                if key in requests:
                    _call(node, *requests[key])
            time.sleep(0.05)
        if recorder is None or recorder.poll() is None:
            return 0
        print(f"record: the recorder ended with status {recorder.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        terminal.close()
        if recorder is not None:
            recorder.terminate()
            recorder.wait()
        node.destroy_node()
        rclpy.try_shutdown()


def _start_recorder(options: argparse.Namespace) -> subprocess.Popen:
    names = ("robot", "folder", "compression", "record_images", "auto", "use_sim_time")
    values = [f"{name}:={getattr(options, name)}" for name in names if getattr(options, name)]
    command = [sys.executable, "-m", "vla_teleop.recorder_node", "--ros-args"]
    for value in values:
        command += ["-p", value]
    # Its own process group: Ctrl-C reaches this program only, which then ends the recorder in order.
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _call(node, client, request) -> None:
    future = client.call_async(request)
    rclpy.spin_until_future_complete(node, future, timeout_sec=30.0)
    answer = future.result()
    print(answer.message if answer else "record: the recorder does not answer", flush=True)


if __name__ == "__main__":
    sys.exit(main())
