"""Recorded bags to training episodes, sampled at the times and with the timelines of the live observation node.

One episode has a tick for each image of the policy's first camera. At tick time t, as in use: each camera's image
nearest to t, joints interpolated at t, tool poses by forward kinematics of those joints. Action k is what was really
commanded at t + k * period: the controller's goal (SafetyStatus.arms[].goal, pose policies) or the joint targets it
sent (SafetyStatus.arms[].joints, joint policies); past the end of the bag the last one is held. Reads MCAP with the
types stored in the file, no ROS needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from vla_core import se3
from vla_core.kinematics import Kinematics
from vla_core.robot import Robot, load_robot
from vla_core.timeline import Timeline

from vla_models.policy import ArmState, PolicySpec
from vla_models.preprocess import anchor_vector, resize_image, state_vector

#: Raised with every change of what an episode holds, so that old caches are not taken for new ones.
VERSION = 3
#: An image further than this from the tick is missing, s.
LARGEST_SKEW = 0.1


class DataError(ValueError):
    """Bags that cannot be trained on; the message names the bag, the expected and the found."""


@dataclass(frozen=True)
class Episode:
    """One demonstration with T ticks.

    images: camera -> (T, h, w, 3) uint8 at the network's size; cameras that the policy can do without may be missing.
    state (T, state_dim) and anchor (T, target_dim) float64, raw. targets (T, H, target_dim) float32, absolute. valid
    (T,): actions that lie inside the episode. times (T,): s, rising.
    """

    name: str
    instruction: str
    images: Mapping[str, np.ndarray]
    state: np.ndarray
    anchor: np.ndarray
    targets: np.ndarray
    valid: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.state)


def read_episode(folder: str | os.PathLike, robot: Robot, kinematics: Kinematics, spec: PolicySpec) -> Episode:
    """Decode one bag for a policy of the specification `spec`. Raises DataError."""
    from vla_teleop import bags

    topics = {name: [f"/camera/{name}/image_raw", f"/camera/{name}/image_raw/compressed"] for name in spec.cameras}
    cameras = {topic: name for name, both in topics.items() for topic in both}
    wanted = {"/joint_states", "/safety_status", "/instruction", "/episode_events", *cameras}
    found: dict[str, list[tuple[float, Any]]] = {topic: [] for topic in wanted}
    try:
        for topic, stamp, message in bags.messages(folder, wanted):
            found[topic].append((stamp, message))
    except bags.BagError as error:
        raise DataError(str(error)) from error
    topics = {n: both for n, both in topics.items() if n not in spec.optional or any(found[t] for t in both)}
    images = {
        name: _track([(s, m) for topic in both for s, m in found[topic]], "object", f"{folder}: camera {name}")
        for name, both in topics.items()
    }
    if not images:
        raise DataError(f"bag {folder}: expected images of one of {list(spec.cameras)}, found none")
    joints = {name: _joint_track(found["/joint_states"], robot, name, folder) for name in spec.arms}
    goals = {name: _goal_tracks(found["/safety_status"], name, spec.action_space.kind, folder) for name in spec.arms}
    commands = [track for pair in goals.values() for track in pair]
    first = max(track.oldest for track in (*joints.values(), *commands))
    last = max(track.newest for track in commands)
    stamps = sorted({stamp for topic in topics[next(iter(topics))] for stamp, _ in found[topic]})
    end = min(track.newest for track in (*joints.values(), *commands))
    ticks = [
        t
        for t in stamps
        if first <= t <= end and all(abs(track.nearest(t).stamp - t) <= LARGEST_SKEW for track in images.values())
    ]
    if not ticks:
        raise DataError(f"bag {folder}: no time at which all of cameras, joints and safety status are there")

    frames = {
        name: np.stack([_picture(track.nearest(t).value, spec.cameras[name], spec.fit) for t in ticks])
        for name, track in images.items()
    }
    states = [{name: _arm_state(robot, kinematics, name, joints[name].sample(t)) for name in spec.arms} for t in ticks]
    due = np.array(ticks)[:, None] + spec.period * (spec.lead + np.arange(spec.horizon))
    return Episode(
        name=Path(folder).name,
        instruction=_instruction(found),
        images=frames,
        state=np.stack([state_vector(spec, state) for state in states]),
        anchor=np.stack([anchor_vector(spec, state) for state in states]),
        targets=np.concatenate([_targets(goals[name], due, spec.action_space.kind) for name in spec.arms], -1).astype(
            np.float32
        ),
        valid=(due <= last + 1e-9).sum(-1).astype(np.int32),
        times=np.array(ticks),
    )


def fingerprint(folder: Path, spec: PolicySpec) -> str:
    """Name of a bag's cached episode: of its content and of all that decides how it is decoded."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".mcap", ".yaml"):
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            with open(path, "rb") as file:
                digest.update(file.read(1 << 16))
                file.seek(max(path.stat().st_size - (1 << 16), 0))
                digest.update(file.read())
    how = [
        VERSION,
        {k: list(v) for k, v in spec.cameras.items()},
        spec.arms,
        spec.state,
        spec.action_space.kind,
        {k: list(v) for k, v in spec.joints.items()},
        spec.horizon,
        spec.period,
        spec.robot,
        spec.fit,
        spec.optional,
        spec.lead,
    ]
    digest.update(json.dumps(how).encode())
    return digest.hexdigest()


def cached_episode(folder: Path, cache: Path, spec: PolicySpec) -> Episode:
    """The episode of a bag, memory-mapped from `cache`; decoded first when it is not there. Raises DataError."""
    place = cache / fingerprint(folder, spec)
    if not (place / "episode.json").is_file():
        robot, kinematics = _robot(spec.robot)
        episode = read_episode(folder, robot, kinematics, spec)
        draft = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for name, frames in episode.images.items():
            np.save(draft / f"camera_{name}.npy", frames)
        for name in ("state", "anchor", "targets", "valid", "times"):
            np.save(draft / f"{name}.npy", getattr(episode, name))
        (draft / "episode.json").write_text(json.dumps({"name": episode.name, "instruction": episode.instruction}))
        shutil.rmtree(place, ignore_errors=True)
        os.replace(draft, place)
    facts = json.loads((place / "episode.json").read_text())
    return Episode(
        name=facts["name"],
        instruction=facts["instruction"],
        images={
            name: np.load(place / f"camera_{name}.npy", mmap_mode="r")
            for name in spec.cameras
            if (place / f"camera_{name}.npy").is_file()
        },
        **{name: np.load(place / f"{name}.npy") for name in ("state", "anchor", "targets", "valid", "times")},
    )


def load_episodes(
    data: str | os.PathLike, spec: PolicySpec, cache: Path | None = None, workers: int = 2, limit: int | None = None
) -> list[Episode]:
    """Episodes of every successful bag below `data`, in order of their paths, with a progress bar.

    cache: folder of decoded episodes; by default `data`/.decoded. limit: take the first so many.
    Raises DataError when there is no bag, or for a bag that cannot be used.
    """
    from tqdm import tqdm
    from vla_teleop import bags

    data = Path(data).expanduser()
    cache = Path(cache) if cache else data / ".decoded"
    folders = [folder for folder in bags.find(data) if bags.info(folder).facts.get("outcome") != "failure"]
    folders = folders[:limit]
    if not folders:
        raise DataError(f"{data}: expected finished bags (folders with metadata.yaml), found none")
    cache.mkdir(parents=True, exist_ok=True)
    return list(
        tqdm(_all(folders, cache, spec, workers), total=len(folders), unit="bag", desc="episodes", mininterval=1.0)
    )


def _all(folders: list[Path], cache: Path, spec: PolicySpec, workers: int) -> Iterator[Episode]:
    missing = [f for f in folders if not (cache / fingerprint(f, spec) / "episode.json").is_file()]
    if workers <= 1 or len(missing) < 2:
        yield from (cached_episode(folder, cache, spec) for folder in folders)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        jobs = {folder: pool.submit(_decode, folder, cache, spec.to_dict()) for folder in missing}
        for folder in folders:
            if folder in jobs:
                jobs[folder].result()
            yield cached_episode(folder, cache, spec)


def _decode(folder: Path, cache: Path, spec: Mapping[str, Any]) -> None:
    cached_episode(folder, cache, PolicySpec.from_dict(spec))


_robots: dict[str, tuple[Robot, Kinematics]] = {}


def _robot(name: str) -> tuple[Robot, Kinematics]:
    if name not in _robots:
        robot = load_robot(name)
        _robots[name] = robot, Kinematics(robot)
    return _robots[name]


def _track(values: list[tuple[float, Any]], kind: str, what: str) -> Timeline:
    if not values:
        raise DataError(f"bag {what}: expected messages, found none")
    track = Timeline(len(values), kind)
    for stamp, value in sorted(values, key=lambda pair: pair[0]):
        track.add(stamp, value)
    return track


def _joint_track(messages: list[tuple[float, Any]], robot: Robot, arm: str, folder: Any) -> Timeline:
    """[arm joints, finger joints] of one arm."""
    gripper = robot.arm(arm).gripper
    names = [*robot.arm(arm).joints, *(joint.name for joint in (gripper.joints if gripper else ()))]
    values = []
    for stamp, message in messages:
        where = {name: i for i, name in enumerate(message.name)}
        if missing := [name for name in names if name not in where]:
            raise DataError(f"bag {folder}: /joint_states: expected joint {missing[0]!r}, found {list(message.name)}")
        values.append((stamp, np.asarray(message.position, float)[[where[name] for name in names]]))
    return _track(values, "vector", f"{folder}: /joint_states of arm {arm}")


def _goal_tracks(messages: list[tuple[float, Any]], arm: str, kind: str, folder: Any) -> tuple[Timeline, Timeline]:
    """What was commanded: (poses or joints, gripper opening)."""
    values = [(stamp, part) for stamp, message in messages for part in message.arms if part.arm == arm]
    what = f"{folder}: /safety_status of arm {arm}"
    if kind == "pose":
        goals = _track([(stamp, se3.pose_to_matrix(_pose(part.goal))) for stamp, part in values], "pose", what)
    else:
        goals = _track([(stamp, np.asarray(part.joints, float)) for stamp, part in values], "vector", what)
    return goals, _track([(stamp, np.array([part.gripper])) for stamp, part in values], "vector", what)


def _targets(tracks: tuple[Timeline, Timeline], due: np.ndarray, kind: str) -> np.ndarray:
    """One arm's targets (T, H, d) at the times `due` (T, H); the last one is held."""
    goals, gripper = tracks
    times = np.minimum(due, goals.newest)
    values = goals.sample(times)
    if kind == "pose":
        values = se3.matrix_to_pose(values)
    return np.concatenate([values, gripper.sample(times)], -1)


def _arm_state(robot: Robot, kinematics: Kinematics, name: str, values: np.ndarray) -> ArmState:
    arm = robot.arm(name)
    count = len(arm.joints)
    opening = 0.0
    if arm.gripper:
        fingers = zip([joint.name for joint in arm.gripper.joints], values[count:], strict=True)
        opening = min(max(arm.gripper.opening(dict(fingers)), 0.0), 1.0)
    return ArmState(values[:count], se3.matrix_to_pose(kinematics.forward(name, values[:count])), opening)


def _picture(message: Any, size: tuple[int, int], fit: str = "stretch") -> np.ndarray:
    """sensor_msgs/Image (rgb8, bgr8) or CompressedImage -> (h, w, 3) uint8 RGB at `size`."""
    if hasattr(message, "format"):
        image = cv2.imdecode(np.asarray(message.data, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise DataError(
                f"image: expected a compressed picture, found {len(message.data)} bytes of {message.format!r}"
            )
        return resize_image(np.ascontiguousarray(image[..., ::-1]), size, fit)
    if message.encoding not in ("rgb8", "bgr8"):
        raise DataError(f"image: expected encoding rgb8 or bgr8, found {message.encoding!r}")
    rows = np.asarray(message.data, np.uint8).reshape(message.height, message.step)[:, : 3 * message.width]
    image = rows.reshape(message.height, message.width, 3)
    return resize_image(image if message.encoding == "rgb8" else np.ascontiguousarray(image[..., ::-1]), size, fit)


def _instruction(found: Mapping[str, list[tuple[float, Any]]]) -> str:
    texts = [message.data for _, message in found["/instruction"]]
    texts += [message.instruction for _, message in found["/episode_events"]]
    texts = [text for text in texts if text.strip()]
    return texts[0] if texts else ""


def _pose(message: Any) -> np.ndarray:
    p, q = message.position, message.orientation
    return np.array([p.x, p.y, p.z, q.x, q.y, q.z, q.w])
