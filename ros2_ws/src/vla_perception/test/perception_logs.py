"""Synthetic logs for the tests: a robot whose tool moves, its cameras and joint states, in order of
arrival."""

from dataclasses import dataclass, replace

import numpy as np
from vla_core.robot import load_robot


@dataclass(eq=False)
class FakeImage:
    """What the sampler uses of sensor_msgs/Image; `number` tells the test which image it is."""

    number: int
    width: int = 32
    height: int = 24
    encoding: str = "rgb8"
    step: int = 96
    data: bytes = b""


def image(number, seed=0, **fields):
    picture = np.random.default_rng([number, seed]).integers(0, 256, 24 * 96, np.uint8).tobytes()
    return FakeImage(number, data=picture, **fields)


def robot(cameras=("scene", "wrist"), rate=30.0):
    """The Panda with small cameras that have no calibration."""
    panda = load_robot("panda")
    small = [replace(panda.cameras[0], name=n, width=32, height=24, rate=rate, calibration=None) for n in cameras]
    return replace(panda, cameras=tuple(small))


def names(panda):
    return [*panda.joint_names, *panda.finger_names]


def joints_at(panda, t, speed=0.3):
    """Positions and velocities at time t: every joint swings about home, fingers open and close."""
    arm = panda.arms[0]
    phase = 2.0 * t + np.arange(len(arm.joints))
    fingers = 0.02 + 0.02 * np.sin(t) * np.ones(2)
    position = np.concatenate([arm.home + speed / 2.0 * np.sin(phase), fingers])
    velocity = np.concatenate([speed * np.cos(phase), 0.02 * np.cos(t) * np.ones(2)])
    return position, velocity


def log(panda, seconds, delay=0.02, jitter=0.0, joint_rate=200.0, start=100.0, seed=0):
    """(arrival, kind, stamp, payload) in order of arrival. Free-running cameras, `delay` s from capture to
    arrival.

    The image's number says its true capture time in microseconds; its stamp is that plus jitter.
    """
    rng, events = np.random.default_rng(seed), []
    for stamp in np.arange(start - 0.05, start + seconds, 1.0 / joint_rate):
        events.append((stamp + 0.001, "joints", stamp, joints_at(panda, stamp)))
    for camera in panda.cameras:
        period, newest = 1.0 / camera.rate, -1.0
        for captured in np.arange(start + rng.uniform(0, period), start + seconds, period):
            stamp = max(captured + rng.normal(0, jitter) if jitter else captured, newest + 1e-6)
            newest = stamp
            arrival = max(captured, stamp) + delay + rng.uniform(0, 0.005)
            events.append((arrival, camera.name, stamp, image(round(captured * 1e6), seed=len(camera.name))))
    return sorted(events, key=lambda e: e[0])


def feed(sampler, panda, events):
    """Every observation of a log, as the node takes them."""
    samples = []
    for arrival, kind, stamp, payload in events:
        if kind == "joints":
            sampler.add_joints(stamp, names(panda), *payload, arrival)
        else:
            sampler.add_image(kind, stamp, payload, arrival)
        sample = sampler.sample(arrival)
        if sample is not None:
            samples.append(sample)
    return samples
