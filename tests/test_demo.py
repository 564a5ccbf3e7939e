"""`./vla demo` on a policy of one's own: the report, the video and the bag are there and hold what they promise."""

import base64
import json
import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
from graph import PATIENCE, own_domain
from rosbags.highlevel import AnyReader

KEYS = {
    "episodes", "successes", "success_rate", "command_age_ms", "control_jitter_ms", "boundary_step_mm", "policy",
    "runtime", "strategy", "robot", "seed",
}  # fmt: skip


@pytest.fixture(scope="module")
def demo(policies, tmp_path_factory):
    """(folder, report.json) of a demo of one episode."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "vla_bringup.demo", f"policy:={policies / 'left.yaml'}", "runtime:=torch",
               "episodes:=1", "seed:=7", f"out:={out}"]  # fmt: skip
    environment = os.environ | {"ROS_DOMAIN_ID": str(own_domain())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3 * PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "graph.log").read_text()
    assert "success" in done.stdout and "observation to command age" in done.stdout
    return out, json.loads((out / "report.json").read_text())


def test_the_report_has_the_agreed_keys(demo):
    _, report = demo
    assert KEYS <= set(report)
    found = [report[k] for k in ("policy", "runtime", "strategy", "robot", "seed", "episodes")]
    assert found == ["left", "torch", "rtc_guided", "panda", 7, 1]
    assert report["successes"] == 0 and report["results"][0]["detail"] == "time limit"
    for name in ("command_age_ms", "control_jitter_ms"):
        assert 0 <= report[name]["median"] <= report[name]["p99"]


def test_the_video_shows_the_episode(demo):
    out, report = demo
    video = cv2.VideoCapture(str(out / "episode_000.mp4"))
    frames = []
    while (read := video.read())[0]:
        frames.append(read[1])
    rate = video.get(cv2.CAP_PROP_FPS)
    assert len(frames) / rate == pytest.approx(report["results"][0]["duration_s"], rel=0.2)
    assert np.std(frames[0]) > 10 and np.abs(frames[-1].astype(int) - frames[0]).max() > 50


def test_the_bag_opens_with_rosbags(demo):
    out, report = demo
    with AnyReader([out / report["results"][0]["bag"]]) as reader:
        counts = {topic: info.msgcount for topic, info in reader.topics.items()}
    # Less than half of what a machine with nothing else to do records.
    assert counts["/safety_status"] > 200 and counts["/camera/scene/image_raw"] > 50
    assert counts["/action_chunk"] > 5 and counts["/command"] > 200 and counts["/episode_events"] >= 1


def test_the_page_has_plots_and_the_video(demo):
    out, report = demo
    page = (out / "report.html").read_text()
    pictures = [base64.b64decode(p) for p in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert len(pictures) == 2
    for picture in pictures:
        assert np.std(cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)) > 5
    assert 'src="episode_000.mp4"' in page and report["results"][0]["instruction"] in page
