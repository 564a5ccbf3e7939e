"""What the safety controller limited, refused and stopped is in the bag, with the numbers before and after."""

import numpy as np
from std_msgs.msg import Bool
from vla_core.robot import load_robot
from vla_msgs.msg import ArmCommand, Command, SafetyStatus
from vla_msgs.srv import StartEpisode, StopEpisode
from vla_teleop import bags


def drive(graph, publisher, speed: float, frame: str = "") -> None:
    """One command of a second sender, moving the tool up by `speed` (m/s) for a control period."""
    drive.sequence += 1
    period = 1.0 / load_robot("panda").rates.control
    command = Command(sequence=drive.sequence, source="second", period=period)
    command.header.stamp, command.header.frame_id = graph.safety[-1].header.stamp, frame
    command.arms = [ArmCommand(arm="arm", gripper=float("nan"))]
    command.arms[0].translation.z = speed * period
    publisher.publish(command)


drive.sequence = 0


def test_a_bag_keeps_what_was_limited_refused_and_stopped(graph, tmp_path):
    commands = graph.node.create_publisher(Command, "/command", 5)
    stops = graph.node.create_publisher(Bool, "/emergency_stop", 10)
    graph.until(lambda: commands.get_subscription_count() and stops.get_subscription_count(), "the controller listens")
    with graph.recorder(tmp_path):
        bag = graph.call(StartEpisode, "/recorder/start").bag
        graph.passed(2.0)  # until the recorder hears every topic
        graph.forget()  # what was limited before the recording
        graph.until(lambda: graph.safety, "the controller reports")
        graph.until(
            lambda: drive(graph, commands, 2.0) or any("acceleration" in s.arms[0].limited for s in graph.safety),
            "a command is limited",
        )
        refused = graph.safety[-1].refused
        graph.until(
            lambda: drive(graph, commands, 0.1, "elsewhere") or graph.safety[-1].refused > refused, "one is refused"
        )
        graph.until(lambda: graph.state == SafetyStatus.RUNNING, "the arm moves under the policy")
        stops.publish(Bool(data=True))
        graph.until(lambda: graph.state == SafetyStatus.STOPPED, "the arm is stopped")
        graph.passed(0.3)
        assert graph.call(StopEpisode, "/recorder/stop").success
    found = {}
    for topic, _, message in bags.messages(bag, ["/safety_events", "/emergency_stop"]):
        if topic == "/safety_events":
            found.setdefault(message.kind, []).append(message)
        else:
            assert message.data
    # The tool's speed and the goal's lead are limited before joint velocities are asked for: these events show none.
    limited = next(event for event in found["limited"] if "acceleration" in event.reasons)
    assert limited.arm == "arm" and limited.reasons and len(limited.before) == len(limited.after) == 7
    assert not np.allclose(limited.before, limited.after)
    refused = next(event for event in found["refused"] if list(event.reasons) == ["frame"])
    np.testing.assert_allclose(refused.before, [0, 0, 0.1 / load_robot("panda").rates.control, 0, 0, 0])
    assert len(refused.after) == 0 and "elsewhere" in refused.text
    (stopped,) = [event for event in found["stopped"] if list(event.reasons) == ["emergency_stop"]]
    assert stopped.text == "emergency stop" and np.abs(stopped.before).max() > 0.0
    assert np.abs(stopped.after).max() <= np.abs(stopped.before).max() + 1e-9  # rounding of an average
    states = [event.reasons[0] for event in found["state"]]
    assert states[-2:] == ["stopping", "stopped"]
    assert bags.info(bag).lost.get("/safety_events", 0) == 0
