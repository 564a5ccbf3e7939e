"""Explaining bags: real ones, written from a real controller's decisions with the recorder's writer."""

import re
from dataclasses import replace

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from rclpy.serialization import serialize_message
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from vla_control import explain as module
from vla_control.explain import explain, main, report
from vla_control.messages import fill_status, status_message, write_command, write_event
from vla_core.robot import Collision, Obstacle
from vla_teleop import bag_writer, interfaces
from vla_teleop.bag_writer import BagError, BagWriter
from vla_teleop.interfaces import type_name

BEGIN = 1000.0


class Recording:
    """A rig whose every period goes into a bag; `drop` leaves out topics."""

    def __init__(self, rig, folder, drop=()):
        self.rig, self.robot, self.drop = rig, rig.robot, drop
        self.bag = BagWriter(folder, sync_period=None)
        self.refused = 0

    def step(self, command=None, joints=True, period=None):
        rig, now = self.rig, BEGIN + self.rig.now
        stamp = Time(sec=int(now), nanosec=round(now % 1 * 1e9))
        if joints:
            self.write("/joint_states", self.joint_state(stamp), now)
        if command is not None:
            self.write("/command", write_command(command, self.robot, stamp), now)
        decision = rig.step(command)
        self.refused += bool(decision.refused)
        targets = {arm.name: rig.controller.target(arm.name) for arm in self.robot.arms}
        status = status_message(self.robot)
        fill_status(status, decision, targets, stamp, period or rig.period, self.refused)
        self.write("/safety_status", status, now)
        for event in decision.events:
            self.write("/safety_events", write_event(event, self.robot, stamp), now)
        return decision

    def joint_state(self, stamp):
        message = JointState()
        message.header.stamp = stamp
        message.name = list(self.robot.joint_names)
        message.position = np.concatenate([self.rig.position[arm.name] for arm in self.robot.arms]).tolist()
        return message

    def write(self, topic, message, time):
        if topic not in self.drop:
            self.bag.write_serialized(topic, type_name(message), serialize_message(message), round(time * 1e9))


@pytest.fixture(scope="module")
def walled(panda):
    """A Panda beside a wall that its tool can be driven towards."""
    wall = replace(panda.arms[0].workspace, lower=np.array([0.2, 0.35, 0.0]), upper=np.array([0.9, 0.6, 1.0]))
    return replace(panda, collision=Collision(0.02, (), (Obstacle("wall", wall, 0.02, ()),)))


def record(robot, make_rig, folder, drop=()):
    """Arm, run into the wall, a stale command, hold, a driver's stop, joint states away for a while."""
    rig = make_rig(robot, armed=False)
    bag = Recording(rig, folder, drop)
    for _ in range(20):
        bag.step()
    rig.arm()
    bag.step()
    for _ in range(100):
        bag.step(rig.delta((0, 6e-3, 0, 0, 0, 0)))
    for _ in range(5):
        bag.step(rig.delta((0, 0, 0, 0, 0, 0), age=0.5))
    for _ in range(80):
        bag.step()
    for _ in range(30):
        bag.step(rig.delta((0, -2e-3, 0, 0, 0, 0)))
    rig.controller.stop(1, "the person at the keyboard", "emergency")
    for _ in range(30):
        bag.step(joints=False)
    bag.step(period=0.065)
    for _ in range(20):
        bag.step()
    bag.bag.close()
    return folder


@pytest.fixture(scope="module")
def bag(walled, make_rig, tmp_path_factory):
    return record(walled, make_rig, tmp_path_factory.mktemp("bags") / "pick_000001")


def of(found, kind):
    return [span for span in found.spans if span.kind == kind]


def test_states_stops_and_refusals_are_told_in_order(bag):
    found = explain(bag)
    assert [s.name for s in of(found, "state")] == [
        "disarmed",
        "armed",
        "running",
        "stopping",
        "holding",
        "running",
        "stopping",
        "stopped",
    ]
    hold, stop = of(found, "stopped")
    assert hold.name == "command" and "brake and hold" in hold.text and "stale command" in hold.text
    assert stop.name == "emergency" and stop.text == "category 1: the person at the keyboard"
    assert stop.before.size == 7 and np.abs(stop.before).max() > 0
    (refused,) = of(found, "refused")
    assert (refused.name, refused.count) == ("stale", 5) and "0.500 s old" in refused.text
    assert 1.2 <= refused.start <= refused.end <= 1.25
    assert [s.start for s in found.spans] == sorted(s.start for s in found.spans)


def test_limits_are_merged_and_say_what_they_changed_and_who_was_near(bag):
    found = explain(bag)
    limited = of(found, "limited")
    assert limited and all(s.arm == "arm" for s in limited)
    (wall,) = [s for s in limited if s.name == "collision"]
    assert wall.count > 10 and wall.end - wall.start >= 0.1
    assert wall.before.shape == wall.after.shape == (7,) and np.abs(wall.before - wall.after).max() > 0
    assert 0.015 < wall.distance < 0.05 and "wall" in wall.nearest
    starts = {}
    for span in limited:
        assert span.start - starts.get(span.name, -1.0) > module.MERGE
        starts[span.name] = span.end


def test_gaps_and_overruns(bag):
    found = explain(bag)
    (gap,) = of(found, "gap")
    assert gap.end - gap.start == pytest.approx(0.31, abs=0.03)
    (overrun,) = of(found, "overrun")
    assert "65.0 ms instead of 10.0 ms" in overrun.text


def test_a_bag_without_events_is_explained_from_the_status(walled, make_rig, tmp_path, bag):
    full = explain(bag)
    found = explain(record(walled, make_rig, tmp_path / "old", drop=("/safety_events",)))
    assert [s.name for s in of(found, "state")] == [s.name for s in of(full, "state")]
    assert sum(s.count for s in of(found, "refused")) == sum(s.count for s in of(full, "refused"))
    for name in {s.name for s in of(full, "limited")}:
        periods = [sum(s.count for s in of(f, "limited") if s.name == name) for f in (full, found)]
        assert periods[0] == periods[1]
    assert [s.text for s in of(found, "stopped")] == [s.text for s in of(full, "stopped")]
    assert "no /safety_events" in report("old", found)


#: The status before there were events, stop categories and distances; its states had other numbers.
OLD_STATUS = """uint8 DISARMED=0
uint8 HOLDING=1
uint8 RUNNING=2
uint8 STOPPING=3
uint8 STOPPED=4
uint8 FAULT=5
std_msgs/Header header
uint8 state
string reason
string source
uint64 sequence
float64 command_age
float64 period
uint64 refused
vla_msgs/ArmSafety[] arms
"""


def test_an_old_bag_is_read_by_its_own_definition(tmp_path, monkeypatch):
    kind = "vla_msgs/msg/SafetyStatus"
    text = OLD_STATUS + interfaces.SEPARATOR + interfaces.definition(kind).split(interfaces.SEPARATOR, 1)[1]
    monkeypatch.setattr(bag_writer.interfaces, "definition", lambda name: text)
    monkeypatch.setattr(bag_writer.interfaces, "type_hash", lambda name: "")
    store = get_typestore(Stores.EMPTY)
    store.register(get_types_from_msg(text, kind))
    types = store.types
    bag = BagWriter(tmp_path / "old", sync_period=None)
    for k, (state, reason, refused) in enumerate([(0, "not armed", 0), (1, "", 0), (2, "", 2), (4, "tracking", 2)]):
        header = types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](7, k * 10**7), "world")
        message = types[kind](header, state, reason, "teleop", 3, 0.01, 0.01, refused, [])
        bag.write_serialized("/safety_status", kind, bytes(store.serialize_cdr(message, kind)), 7 * 10**9 + k * 10**7)
    bag.close()
    found = explain(tmp_path / "old")
    assert [s.name for s in of(found, "state")] == ["disarmed", "holding", "running", "stopped"]
    assert [(s.name, s.text) for s in of(found, "stopped")] == [("unknown", "tracking")]
    assert sum(s.count for s in of(found, "refused")) == 2 and not np.isfinite(found.distance).any()
    assert "stopped (times): unknown 1" in report("old", found)


def test_the_report_is_complete(bag, capsys, tmp_path):
    picture = tmp_path / "plots" / "explain.png"
    assert main([str(bag), f"plot:={picture}"]) == 0
    out = capsys.readouterr().out
    assert "/command 135 (test 135)" in out
    assert re.search(r"limited \(periods\): .*arm collision \d+", out)
    assert "refused (commands): stale 5" in out
    assert "stopped (times): command 1, emergency 1" in out
    assert re.search(r"in state: disarmed 0\.20 s, .*stopped \d", out)
    assert "gaps of joint states: 1" in out and "control periods too long: 1" in out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_two_arms(aloha, make_rig, tmp_path):
    rig = make_rig(aloha)
    bag = Recording(rig, tmp_path / "two")
    for _ in range(50):
        bag.step(rig.delta((0, 0, 0.02, 0, 0, 0)))
    bag.bag.close()
    found = explain(tmp_path / "two")
    assert set(found.speed) == {"left", "right"}
    assert {s.arm for s in of(found, "limited")} == {"left", "right"}
    assert np.nanmax(found.speed["left"]) > 0.05


def test_what_cannot_be_explained_is_one_clear_error(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err
    other = BagWriter(tmp_path / "other", sync_period=None)
    other.write_serialized("/instruction", "std_msgs/msg/String", serialize_message(String(data="pick")), 10**9)
    other.close()
    assert main([str(tmp_path / "other")]) == 1
    assert "expected messages of /safety_status, found /instruction" in capsys.readouterr().err
    with pytest.raises(BagError):
        explain(tmp_path)
