"""A bag opens in the readers people use, with indexes, definitions, counts and facts."""

import array
import json
from pathlib import Path

import numpy as np
import pytest
import vla_msgs.msg
import yaml
from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory
from rclpy.serialization import deserialize_message
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import Reader
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from vla_teleop import interfaces
from vla_teleop.bag_metadata import Qos
from vla_teleop.bag_writer import BagError, BagWriter

VLA_TYPES = [name for name in dir(vla_msgs.msg) if name[0].isupper()]
START = 1_700_000_000_000_000_000


def image(seed: int) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)
    return Image(height=24, width=32, encoding="rgb8", step=96, data=array.array("B", pixels.tobytes()))


def write_some(folder: Path, compression: str = "zstd") -> None:
    with BagWriter(folder, compression, chunk_size=4096, qos={"/instruction": Qos(durability="transient_local")},
                   facts={"task": "pick", "seed": 7}) as bag:
        bag.write("/instruction", String(data="pick the red cube"), START)
        for i in range(20):
            bag.write("/camera/scene/image_raw", image(i), START + i * 1_000_000)
        bag.lost = {"/camera/scene/image_raw": 3}
        bag.facts["outcome"] = "success"


@pytest.mark.parametrize("compression", ["zstd", "lz4", "none"])
def test_rosbags_reads_every_message(bag_folder, compression):
    write_some(bag_folder, compression)
    with AnyReader([bag_folder]) as reader:
        images = [c for c in reader.connections if c.topic.endswith("image_raw")]
        found = [reader.deserialize(data, c.msgtype).data for c, _, data in reader.messages(images)]
    assert len(found) == 20
    assert all(np.array_equal(found[i], np.frombuffer(image(i).data, np.uint8)) for i in range(20))


def test_rosbags_knows_types_hashes_qos_and_custom_data(bag_folder):
    write_some(bag_folder)
    with Reader(bag_folder) as reader:
        text = next(c for c in reader.connections if c.topic == "/instruction")
        assert text.msgtype == "std_msgs/msg/String" and text.digest.startswith("RIHS01_") and text.msgcount == 1
        assert text.ext.offered_qos_profiles[0].durability.name == "TRANSIENT_LOCAL"
        assert (reader.start_time, reader.message_count) == (START, 21)


def test_mcap_finds_chunk_indexes_statistics_and_metadata(bag_folder):
    write_some(bag_folder)
    with open(bag_folder / "episode_0001_0.mcap", "rb") as stream:
        reader = make_reader(stream, decoder_factories=[DecoderFactory()])
        summary = reader.get_summary()
        assert reader.get_header().profile == "ros2"
        assert len(summary.chunk_indexes) > 3 and all(c.message_index_offsets for c in summary.chunk_indexes)
        assert summary.statistics.message_count == 21
        records = {m.name: m.metadata for m in reader.iter_metadata()}
        assert records["received"] == {"/instruction": "1", "/camera/scene/image_raw": "20"}
        assert records["lost"] == {"/instruction": "0", "/camera/scene/image_raw": "3"}
        assert records["episode"] == {"task": "pick", "seed": "7", "outcome": "success"}
        decoded = [d for *_, d in reader.iter_decoded_messages(topics=["/instruction"])]
        assert decoded[0].data == "pick the red cube"


def test_metadata_yaml_is_version_9_with_facts_and_counts(bag_folder):
    write_some(bag_folder)
    tree = yaml.safe_load((bag_folder / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert tree["version"] == 9 and tree["storage_identifier"] == "mcap"
    assert tree["relative_file_paths"] == ["episode_0001_0.mcap"]
    assert tree["duration"]["nanoseconds"] == 19_000_000
    assert tree["custom_data"]["outcome"] == "success"
    assert json.loads(tree["custom_data"]["lost"])["/camera/scene/image_raw"] == 3


@pytest.mark.parametrize("name", VLA_TYPES)
def test_every_vla_message_round_trips(bag_folder, name):
    kind = getattr(vla_msgs.msg, name)
    message = filled(kind)
    with BagWriter(bag_folder) as bag:
        bag.write("/topic", message, START)
    with AnyReader([bag_folder]) as reader:
        ((connection, time_ns, data),) = reader.messages()
        assert time_ns == START and connection.msgtype == f"vla_msgs/msg/{name}"
        assert deserialize_message(data, kind) == message
        reader.deserialize(data, connection.msgtype)
    with open(bag_folder / "episode_0001_0.mcap", "rb") as stream:
        assert len(list(make_reader(stream, decoder_factories=[DecoderFactory()]).iter_decoded_messages())) == 1


def filled(kind: type):
    """A message with something other than the default in its plain fields, one element in each sequence."""
    message = kind()
    for field, type_ in kind.get_fields_and_field_types().items():
        if type_.startswith("sequence<"):
            inner = type_[len("sequence<") : -1]
            element = filled(interfaces.message_class(inner.replace("/", "/msg/"))) if "/" in inner else plain(inner)
            setattr(message, field, [element])
        elif "/" in type_:
            setattr(message, field, filled(interfaces.message_class(type_.replace("/", "/msg/"))))
        elif "[" not in type_:
            setattr(message, field, plain(type_))
    return message


def plain(type_: str):
    return {"string": "text", "boolean": True}.get(type_, 1.5 if type_ in ("double", "float") else 3)


def test_definition_names_every_type_used_once():
    text = interfaces.definition("vla_msgs/msg/Observation")
    heads = [line for line in text.splitlines() if line.startswith("MSG: ")]
    assert "MSG: sensor_msgs/Image" in heads and "MSG: builtin_interfaces/Time" in heads
    assert len(heads) == len(set(heads))


def test_a_folder_that_exists_is_refused(tmp_path):
    with pytest.raises(BagError, match="expected a new folder"):
        BagWriter(tmp_path)


def test_an_unknown_compression_is_refused(bag_folder):
    with pytest.raises(BagError, match=r"lz4.*found 'gzip'"):
        BagWriter(bag_folder, "gzip")
    assert not bag_folder.exists()


def test_a_topic_with_two_types_is_refused(bag_folder):
    with BagWriter(bag_folder) as bag:
        bag.write("/topic", String(), START)
        with pytest.raises(BagError, match="expected type std_msgs/msg/String"):
            bag.write("/topic", JointState(), START)


def test_a_type_that_is_not_installed_is_refused():
    with pytest.raises(interfaces.InterfaceError, match="no_such_msgs"):
        interfaces.definition("no_such_msgs/msg/Nothing")


def test_discard_leaves_nothing(bag_folder):
    bag = BagWriter(bag_folder)
    bag.write("/topic", String(), START)
    bag.discard()
    assert not bag_folder.exists()
