"""Recording the running graph."""

import subprocess

import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from vla_msgs.msg import EpisodeEvent, SafetyStatus
from vla_msgs.srv import StartEpisode
from vla_teleop import bags


@pytest.fixture
def small_disk(tmp_path):
    """A file system with 12 MiB free, room for some seconds; skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    (place / "other").write_bytes(bytes(4 << 20))
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_ends_the_recording_and_nothing_else(graph, small_disk):
    graph.lines.clear()
    with graph.recorder(small_disk):
        answer = graph.call(StartEpisode, "/recorder/start", StartEpisode.Request(task="pick"))
        assert answer.success, answer.message
        graph.until(lambda: any(e.event == EpisodeEvent.SAVED for e in graph.events), "the disk is full")
        graph.until(
            lambda: "recorder" in graph.diagnostics and graph.diagnostics["recorder"].level == DiagnosticStatus.ERROR,
            "diagnostics name the error",
        )
        assert "No space left" in graph.diagnostics["recorder"].message
        graph.passed(1.0)
    errors = [line for process, line in graph.lines if process == "recorder" and "[ERROR]" in line]
    assert len(errors) == 1 and "No space left" in errors[0]
    graph.until(lambda: graph.state == SafetyStatus.RUNNING, "the arm moves on")
    assert "No space left" in bags.info(answer.bag).facts["note"]
    found = [topic for topic, _, _ in bags.messages(answer.bag)]
    assert found.count("/safety_status") > 50 and found.count("/camera/wrist/image_raw") > 10
