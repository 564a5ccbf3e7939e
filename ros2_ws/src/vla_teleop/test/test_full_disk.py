"""A full disk: one clear error, the bag so far is finished and readable, the recorder node lives on."""

import errno
import subprocess

import pytest
from diagnostic_msgs.msg import DiagnosticArray
from sensor_msgs.msg import Image
from std_msgs.msg import String
from vla_msgs.msg import EpisodeEvent
from vla_msgs.srv import StartEpisode, StopEpisode
from vla_teleop import bags
from vla_teleop.bag_writer import BagFull, BagWriter
from vla_teleop.reserved_file import ReservedFile

BLOCK = bytes(200_000)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB; skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_the_bag_so_far_is_finished(small_disk):
    with BagWriter(small_disk / "bag", "none") as bag, pytest.raises(BagFull, match="No space left"):
        for i in range(200):
            bag.write_serialized("/image", "sensor_msgs/msg/Image", BLOCK, i)
    assert bags.info(small_disk / "bag").received["/image"] > 30
    assert not (small_disk / "bag" / ".reserve").exists()


def test_nothing_begins_on_a_full_disk(small_disk):
    (small_disk / "other").write_bytes(bytes(12 << 20))
    with pytest.raises(BagFull, match="expected room to begin"):
        BagWriter(small_disk / "bag")
    assert not (small_disk / "bag").exists()


def test_the_reserve_finishes_a_write_that_finds_no_room(tmp_path):
    class Full:
        """Stands for the operating system's file: takes half, then has no room until the reserve is gone."""

        def __init__(self):
            self.data = b""

        def write(self, view):
            if (tmp_path / ".reserve").exists() and self.data:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = bytes(view[: max(1, len(view) // 2)])
            self.data += taken
            return len(taken)

        def close(self):
            """Nothing to close."""

    file = ReservedFile(tmp_path / "file", reserve_bytes=4096)
    file._file.close()
    file._file = Full()
    assert file.write(b"0123456789") == 10
    assert file._file.data == b"0123456789" and file.full.errno == errno.ENOSPC
    file.close()


def test_the_recorder_says_so_once_and_records_again_when_there_is_room(small_disk, recorder, node, call):
    recorder(folder=str(small_disk), compression="none")
    events: list[EpisodeEvent] = []
    errors: list[str] = []
    node.create_subscription(EpisodeEvent, "/episode_events", events.append, 10)
    node.create_subscription(
        DiagnosticArray,
        "/diagnostics",
        lambda m: errors.extend(s.message for s in m.status if s.level == s.ERROR),
        10,
    )
    images = node.create_publisher(Image, "/camera/scene/image_raw", 5)
    words = node.create_publisher(String, "/instruction", 1)
    answer = call(StartEpisode, "/recorder/start", StartEpisode.Request(task="fill"))
    assert answer.success
    picture = Image(height=240, width=320, encoding="rgb8", step=960, data=bytes(230400))

    def ended() -> bool:
        images.publish(picture)
        return any(e.event == EpisodeEvent.SAVED for e in events)

    assert node.spin_until(ended, 20.0)
    assert "No space left" in events[-1].detail
    assert node.spin_until(lambda: bool(errors), 5.0) and "No space left" in errors[0]
    assert not call(StopEpisode, "/recorder/stop", StopEpisode.Request()).success
    found = bags.info(answer.bag)
    assert found.received["/camera/scene/image_raw"] > 20 and "No space left" in found.facts["note"]
    assert not call(StartEpisode, "/recorder/start", StartEpisode.Request()).success

    subprocess.run(["rm", "-r", answer.bag], check=True)
    again = call(StartEpisode, "/recorder/start", StartEpisode.Request(task="again"))
    assert again.success
    words.publish(String(data="hello"))
    node.spin_until(lambda: False, 0.3)
    assert call(StopEpisode, "/recorder/stop", StopEpisode.Request(outcome=1)).success
    assert bags.info(again.bag).facts["outcome"] == "success"
