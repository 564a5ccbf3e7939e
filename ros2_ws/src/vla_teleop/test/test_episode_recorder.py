"""EpisodeRecorder: queue bound, clock jumps, and requests that do not fit its state."""

import pytest
from mcap.reader import make_reader
from rclpy.serialization import serialize_message
from std_msgs.msg import String
from vla_teleop import bags
from vla_teleop.episode_recorder import EpisodeRecorder, RawMessage, RecorderError

TEXT = serialize_message(String(data="x" * 1000))


def message(stamp: int = 0) -> RawMessage:
    return RawMessage("/instruction", "std_msgs/msg/String", TEXT, stamp)


def test_what_the_queue_cannot_take_is_counted_as_lost(tmp_path):
    recorder = EpisodeRecorder(tmp_path, "panda", {}, max_queue_bytes=10 * len(TEXT))
    bag = recorder.start("pick", {}, 0)
    with recorder._lock:
        recorder._queued_bytes = 10 * len(TEXT)  # a disk that takes nothing
    for _ in range(5):
        recorder.put(message(), 1)
    with recorder._lock:
        recorder._queued_bytes = 0
    recorder.put(message(), 2)
    recorder.stop({"outcome": "success"})
    found = bags.info(bag)
    assert found.received == {"/instruction": 1} and found.lost == {"/instruction": 5}


def test_log_times_go_on_when_the_clock_jumps_back(tmp_path):
    recorder = EpisodeRecorder(tmp_path, "panda", {})
    bag = recorder.start("pick", {}, 0)
    for now in (100, 200, 5, 15):
        recorder.put(message(), now)
    recorder.stop({})
    with open(bag / f"{bag.name}_0.mcap", "rb") as stream:
        assert [m.log_time for *_, m in make_reader(stream).iter_messages()] == [100, 200, 200, 210]
    assert bags.info(bag).facts["clock_jumps"] == "1"


def test_requests_out_of_order_are_refused(tmp_path):
    recorder = EpisodeRecorder(tmp_path, "panda", {})
    for request in (lambda: recorder.stop({}), recorder.discard):
        with pytest.raises(RecorderError, match="expected a running recording, found none"):
            request()
    recorder.start("pick", {}, 0)
    with pytest.raises(RecorderError, match="expected no recording"):
        recorder.start("pick", {}, 0)
    recorder.discard()


def test_folder_names_sort_and_count_up(tmp_path):
    recorder = EpisodeRecorder(tmp_path, "My Robot", {})
    names = []
    for task in ("Pick & place", "pick"):
        names.append(recorder.start(task, {}, 0).name)
        recorder.stop({})
    assert names == sorted(names)
    assert [n.split("_", 2)[2] for n in names] == ["my-robot_pick-place_0001", "my-robot_pick_0002"]
