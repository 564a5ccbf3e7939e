"""The real recorder node, with real publishers."""

import signal
import threading
import time

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from vla_msgs.msg import EpisodeEvent, PolicyStatus
from vla_msgs.srv import StartEpisode, StopEpisode
from vla_teleop import bags

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def test_latched_topics_begin_every_bag(recorder, node, call):
    recorder()
    node.create_publisher(String, "/instruction", LATCHED).publish(String(data="pick the blue cube"))
    node.create_publisher(PolicyStatus, "/policy_status", LATCHED).publish(PolicyStatus(active="flow"))
    for number in (1, 2):
        bag = call(StartEpisode, "/recorder/start", StartEpisode.Request()).bag
        node.spin_until(lambda: False, 1.0 if number == 1 else 0.0)
        call(StopEpisode, "/recorder/stop", StopEpisode.Request())
        assert bag.endswith(f"_panda_task_{number:04d}")
        found = {topic: message for topic, _, message in bags.messages(bag)}
        assert found["/instruction"].data == "pick the blue cube"
        assert found["/policy_status"].active == "flow"
        facts = bags.info(bag).facts
        assert (facts["policy"], facts["instruction"]) == ("flow", "pick the blue cube")


def test_auto_records_from_reset_to_success_or_failure(recorder, node, tmp_path):
    recorder(auto="true")
    saved: list[EpisodeEvent] = []

    def keep(event: EpisodeEvent) -> None:
        if event.event == EpisodeEvent.SAVED:
            saved.append(event)

    node.create_subscription(EpisodeEvent, "/episode_events", keep, 10)
    publisher = node.create_publisher(EpisodeEvent, "/episode_events", 50)
    assert node.spin_until(lambda: publisher.get_subscription_count() >= 2, 15.0)
    for seed, ends in enumerate(([EpisodeEvent.SUCCESS], [EpisodeEvent.FAILURE], [])):
        publisher.publish(EpisodeEvent(event=EpisodeEvent.RESET, task="pick", seed=seed, instruction="red"))
        for end in ends:
            publisher.publish(EpisodeEvent(event=end, task="pick", seed=seed))
    publisher.publish(EpisodeEvent(event=EpisodeEvent.RESET, task="pick", seed=9))
    assert node.spin_until(lambda: len(saved) == 3, 10.0)
    facts = [bags.info(folder).facts for folder in bags.find(tmp_path / "bags")]
    found = [(f["seed"], f["outcome"], f["task"], f["instruction"]) for f in facts]
    assert found == [("0", "success", "pick", "red"), ("1", "failure", "pick", "red"), ("2", "unknown", "pick", "red")]


def test_sigterm_keeps_the_running_recording(recorder, call):
    process = recorder()
    bag = call(StartEpisode, "/recorder/start", StartEpisode.Request(task="pick")).bag
    process.send_signal(signal.SIGTERM)
    assert process.wait(10.0) == 0
    assert bags.info(bag).facts["note"] == "the recorder was shut down"


def test_kill_9_is_recovered_by_the_next_recorder(recorder, robot, node, call, tmp_path):
    process = recorder()
    assert node.spin_until(robot.matched, 15.0)
    kept = call(StartEpisode, "/recorder/start", StartEpisode.Request(task="kept")).bag
    call(StopEpisode, "/recorder/stop", StopEpisode.Request(outcome=1))
    bag = call(StartEpisode, "/recorder/start", StartEpisode.Request(task="pick")).bag
    thread = threading.Thread(target=robot.run, args=(1.37,))
    thread.start()
    thread.join()
    process.kill()
    died = time.time()
    process.wait()
    assert len(bags.find(tmp_path / "bags")) == 1
    recorder()
    assert node.spin_until(lambda: len(bags.find(tmp_path / "bags")) == 2, 15.0)
    times = [at for topic, at, _ in bags.messages(bag, ["/joint_states"])]
    assert died - times[-1] < 0.5
    facts = bags.info(bag).facts
    assert facts["recovered"] == "true" and facts["task"] == "pick" and facts["outcome"] == "unknown"
    assert "recovered" not in bags.info(kept).facts


def test_best_effort_publishers_are_recorded_too(recorder, node, call):
    recorder()
    publisher = node.create_publisher(
        JointState, "/joint_states", QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
    )
    assert node.spin_until(lambda: publisher.get_subscription_count() == 1, 15.0)
    bag = call(StartEpisode, "/recorder/start", StartEpisode.Request()).bag
    for _ in range(10):
        publisher.publish(JointState())
        node.spin_until(lambda: False, 0.02)
    call(StopEpisode, "/recorder/stop", StopEpisode.Request())
    assert bags.info(bag).received["/joint_states"] >= 8


