"""The launch as a person starts it: Ctrl-C ends everything cleanly and quickly."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from graph import LAUNCH, PATIENCE, Listener, own_domain
from vla_msgs.msg import SafetyStatus
from vla_msgs.srv import StartEpisode
from vla_teleop import bags


def session(leader: int) -> list[str]:
    """Commands of the processes that live in a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == leader:
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (OSError, ProcessLookupError):
            continue
    return [command for command in found if command]  # what has ended, but was not waited for, has none


# When a signal reaches the launcher alone, it ends the nodes as it does for every other graph of these tests.
@pytest.mark.parametrize("reaches", ["every process", pytest.param("the launcher", marks=pytest.mark.slow)])
def test_ctrl_c_ends_every_process_cleanly(policies, tmp_path, reaches):
    domain = own_domain()
    command = [sys.executable, "-m", "vla_bringup.launch_file", str(LAUNCH / "sim.launch.yaml"), "runtime:=torch",
               f"policy:={policies / 'left.yaml'}", "record:=true", f"bags:={tmp_path / 'bags'}"]  # fmt: skip
    output = tmp_path / "output.txt"
    with open(output, "w") as file, Listener(domain) as graph:
        process = subprocess.Popen(
            command, env=os.environ | {"ROS_DOMAIN_ID": str(domain)}, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            graph.until(lambda: graph.state == SafetyStatus.RUNNING, "the arm moves under the policy")
            graph.moved()
            bag = graph.call(StartEpisode, "/recorder/start").bag
            graph.passed(0.5)
            # A terminal sends Ctrl-C to the whole group; a supervisor signals the one process it started.
            (os.killpg if reaches == "every process" else os.kill)(process.pid, signal.SIGINT)
            assert process.wait(PATIENCE) == 0
            assert session(process.pid) == []
        finally:
            if session(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    printed = output.read_text()
    assert "Traceback" not in printed and "is still running" not in printed, printed
    ended = dict(re.findall(r"\[launch\] (\S+) has ended with exit status (\S+)", printed))
    assert len(ended) == 7 and set(ended.values()) == {"0"}, printed
    assert bags.info(bag).received["/safety_status"] > 0
