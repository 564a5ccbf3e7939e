"""A bag that was cut off is finished at the next start and has lost no more than half a second."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rosbags.highlevel import AnyReader
from std_msgs.msg import String
from vla_teleop import bags
from vla_teleop.bag_writer import BagError, BagWriter
from vla_teleop.recover import recover, recover_all, unfinished

WRITER = str(Path(__file__).with_name("crash_writer.py"))


def killed_bag(folder: Path, processes, seconds: float) -> int:
    """Kill -9 a process that writes `folder` after `seconds`; returns the time of death, ns."""
    process = processes([sys.executable, WRITER, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(seconds)
    process.kill()
    died = time.time_ns()
    process.wait()
    return died


@pytest.mark.parametrize("seed", range(3))
def test_kill_9_loses_less_than_half_a_second(bag_folder, processes, seed):
    died = killed_bag(bag_folder, processes, random.Random(seed).uniform(0.4, 1.4))
    assert recover(bag_folder) > 30
    with AnyReader([bag_folder]) as reader:
        times = {c.topic: [t for k, t, _ in reader.messages() if k.id == c.id] for c in reader.connections}
    assert died - max(times["/joint_states"]) < 0.5e9
    assert died - max(times["/camera/scene/image_raw"]) < 0.5e9
    assert bags.info(bag_folder).facts == {"task": "crash", "recovered": "true"}


def test_recovered_messages_have_no_gap(bag_folder, processes):
    from mcap.reader import make_reader

    killed_bag(bag_folder, processes, 0.7)
    count = recover(bag_folder)
    with open(bag_folder / "episode_0001_0.mcap", "rb") as stream:
        numbers = [m.sequence for _, c, m in make_reader(stream).iter_messages() if c.topic == "/joint_states"]
    assert numbers == list(range(1, len(numbers) + 1)) and count > len(numbers)


def test_a_bag_cut_at_any_byte_is_readable(bag_folder):
    bag = BagWriter(bag_folder, chunk_size=200)
    for i in range(20):
        bag.write("/instruction", String(data=f"message {i}"), i + 1)
    bag.poll()
    data = bag.path.read_bytes()
    bag.discard()
    best = 0
    for cut in range(0, len(data), 97):
        bag_folder.mkdir()
        (bag_folder / "episode_0001_0.mcap").write_bytes(data[:cut])
        (result,) = recover_all(bag_folder.parent)
        assert not result.error and result.messages >= best
        best = result.messages
        if best:
            assert [m.data for *_, m in bags.messages(bag_folder)] == [f"message {i}" for i in range(best)]
            (bag_folder / "metadata.yaml").unlink()
            (bag_folder / "episode_0001_0.mcap").unlink()
            bag_folder.rmdir()
        assert not bag_folder.exists()
    assert best > 10


def test_a_flipped_byte_ends_the_readable_part(bag_folder):
    bag = BagWriter(bag_folder, "none", chunk_size=200)
    for i in range(40):
        bag.write("/instruction", String(data=f"message {i:03d}"), i + 1)
    data = bytearray(bag.path.read_bytes())
    bag.discard()
    place = data.index(b"message 020")
    data[place] ^= 1
    bag_folder.mkdir()
    (bag_folder / "episode_0001_0.mcap").write_bytes(data)
    assert 0 < recover(bag_folder) <= 20


def test_recovery_leaves_finished_bags_and_open_ones_alone(tmp_path):
    with BagWriter(tmp_path / "finished") as finished:
        finished.write("/instruction", String(), 1)
    before = finished.path.read_bytes()
    with BagWriter(tmp_path / "open") as still_open:
        still_open.write("/instruction", String(), 1)
        assert unfinished(tmp_path) == [] and recover_all(tmp_path) == []
        with pytest.raises(BagError, match="in use"):
            recover(tmp_path / "open")
    assert finished.path.read_bytes() == before


def test_recovery_killed_before_its_last_step_begins_again(bag_folder):
    with BagWriter(bag_folder) as bag:
        bag.write("/instruction", String(data="kept"), 1)
    (bag_folder / "metadata.yaml").unlink()  # the new file has taken its place, its metadata.yaml has not
    stale = bag_folder.parent / ".recovering" / "episode_0001"
    stale.mkdir(parents=True)
    assert recover(bag_folder) == 1
    assert not stale.parent.exists()
    assert [m.data for *_, m in bags.messages(bag_folder)] == ["kept"]


def test_a_bag_in_the_middle_of_recovery_is_not_found(tmp_path):
    with BagWriter(tmp_path / ".recovering" / "episode_0001"):
        assert bags.find(tmp_path) == []
    assert bags.find(tmp_path) == []


def test_recovery_keeps_facts_and_losses(bag_folder):
    bag = BagWriter(bag_folder, facts={"robot": "panda"}, flush_period=0.0)
    bag.lost = {"/instruction": 5}
    bag.write("/instruction", String(), 1)
    content = bag.path.read_bytes()
    bag.discard()
    bag_folder.mkdir()
    (bag_folder / "episode_0001_0.mcap").write_bytes(content)
    recover(bag_folder)
    found = bags.info(bag_folder)
    assert found.facts == {"robot": "panda", "recovered": "true"} and found.lost == {"/instruction": 5}
