"""A camera that stops, freezes, lies about the time or is set up wrongly is named, and no observation
comes."""

from dataclasses import replace

import numpy as np
import pytest
from perception_logs import feed, image, joints_at, log, names, robot
from vla_perception.observation import JOINTS, ObservationSampler

PERIOD = 1 / 30


def run(change, seconds=2.0, fault_at=101.0):
    """Feed a log whose events from `fault_at` on `change` may alter or drop.

    Returns: (sampler, observation times, first time of a named fault and its text or None, last arrival)
    """
    panda = robot()
    sampler = ObservationSampler(panda, {})
    times, named = [], None
    for event in log(panda, seconds):
        event = change(event) if event[0] >= fault_at else event
        if event is None:
            continue
        times += [s.time for s in feed(sampler, panda, [event])]
        faults = sampler.faults(event[0])
        if event[0] > 100.2 and named is None and any(faults.values()):
            named = (event[0], faults)
    return sampler, times, named, event[0]


def only(camera, alter):
    return lambda event: alter(event) if event[1] == camera else event


def test_healthy_cameras_have_no_fault():
    _, times, named, _ = run(lambda event: event)
    assert named is None
    assert len(times) > 55


@pytest.mark.parametrize(
    ("alter", "text"),
    [
        (lambda e: None, "dead: no image"),
        (lambda e: (*e[:2], 100.9, e[3]), "clock: stamps went back|frozen"),
        (lambda e: (*e[:2], e[2] + 1.0, e[3]), "in the future"),
        (lambda e: (*e[:2], e[2] - 1.0, e[3]), "old on arrival"),
        (lambda e: (*e[:3], replace(e[3], width=64)), "expected 32x24 rgb8, found 64x24 rgb8"),
        (lambda e: (*e[:3], replace(e[3], encoding="bgr8")), "found 32x24 bgr8"),
        (lambda e: (*e[:3], replace(e[3], data=e[3].data[:-1])), "found 2303"),
    ],
)
def test_fault_is_named_within_two_periods_and_starves_the_policy(alter, text):
    import re

    _, times, (at, faults), _ = run(only("wrist", alter))
    assert re.search(text, faults["wrist"])
    assert not faults["scene"] and not faults[JOINTS]
    # The first event that is wrong is due within a period after 101.0.
    assert at <= 101.0 + 3 * PERIOD + 0.005
    assert max(times) < at


def test_stamp_that_stands_still_is_frozen():
    last = {}

    def stuck(event):
        last.setdefault("stamp", event[2])
        return (*event[:2], last["stamp"], event[3])

    sampler, _, (at, faults), end = run(only("wrist", stuck))
    assert "frozen: images come, but their stamp has not advanced" in faults["wrist"]
    assert at <= 101.0 + 4 * PERIOD
    assert sampler.sample(end) is None


def test_same_picture_while_the_arm_moves_is_frozen_and_recovers():
    picture = image(0)
    panda = robot()
    sampler = ObservationSampler(panda, {})

    def replaced(event):
        return (*event[:3], picture) if event[1] == "wrist" and 100.5 < event[0] < 101.5 else event

    samples, frozen = [], []
    for event in log(panda, 2.5):
        samples += feed(sampler, panda, [replaced(event)])
        if sampler.faults(event[0])["wrist"].startswith("frozen"):
            frozen.append(event[0])
    assert 100.5 + 9 * PERIOD < frozen[0] < 100.5 + 13 * PERIOD
    assert 101.5 < frozen[-1] < 101.5 + 2 * PERIOD
    assert not any(frozen[0] < s.time + s.age < frozen[-1] for s in samples)
    assert samples[-1].time > 102.0


def test_same_picture_while_nothing_moves_is_well():
    panda = robot(["scene"])
    sampler, picture = ObservationSampler(panda, {}), image(0)
    for event in log(panda, 1.0):
        event = (*event[:3], joints_at(panda, 0.0) if event[1] == "joints" else picture)
        feed(sampler, panda, [event])
        assert not sampler.faults(event[0])["scene"].startswith("frozen")


def test_an_arm_that_is_put_elsewhere_and_stands_still_is_no_frozen_camera():
    """The image of a simulated arm that was reset may come before its joint states."""
    panda = robot(["scene"])
    sampler = ObservationSampler(panda, {})
    for event in log(panda, 1.5):
        time = event[0] - 100.0
        if event[1] == "joints":
            event = (*event[:3], joints_at(panda, 0.0 if time < 0.59 else 1.0, speed=0.9))
        elif time > 0.5:
            event = (*event[:3], image(1000))
        feed(sampler, panda, [event])
        assert not sampler.faults(event[0])["scene"].startswith("frozen")


def test_camera_that_comes_back_is_well_again():
    _, times, named, _ = run(only("wrist", lambda e: e if e[0] > 101.5 else None), seconds=2.5)
    assert "dead" in named[1]["wrist"]
    assert not [t for t in times if 101.1 < t < 101.45]
    assert len([t for t in times if t > 101.5]) > 20


def test_clock_that_jumps_back_clears_the_timelines():
    panda = robot()
    sampler = ObservationSampler(panda, {})
    feed(sampler, panda, log(panda, 1.0))
    again = feed(sampler, panda, log(panda, 1.0, start=2.0))
    assert len(again) > 25
    assert again[0].time < 2.1


def test_clock_that_jumps_forward_recovers():
    panda = robot()
    sampler = ObservationSampler(panda, {})
    feed(sampler, panda, log(panda, 1.0))
    assert len(feed(sampler, panda, log(panda, 1.0, start=900.0))) > 25


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda n, q: (n[:-1], q[:-1]), "expected joints \\['panda_finger_joint2'\\]"),
        (lambda n, q: (n, q[:-1]), "expected 9 positions"),
        (lambda n, q: (n, np.where(np.arange(9) == 3, np.nan, q)), "not finite"),
    ],
)
def test_joint_states_that_cannot_be_used_are_named(make, text):
    panda = robot()
    sampler = ObservationSampler(panda, {})
    joints, q = make(names(panda), np.zeros(9))
    sampler.add_joints(100.0, joints, q, np.zeros(len(q)), 100.0)
    import re

    assert re.search(text, sampler.faults(100.0)[JOINTS])


def test_joint_states_that_stop_are_named():
    panda = robot()
    sampler = ObservationSampler(panda, {})
    sampler.add_joints(100.0, names(panda), *joints_at(panda, 0.0), 100.0)
    assert not sampler.faults(100.1)[JOINTS]
    assert "dead: no joint state of arm 'arm'" in sampler.faults(100.4)[JOINTS]
