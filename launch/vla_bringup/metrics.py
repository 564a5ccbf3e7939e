"""What a recorded episode says about timing and smoothness. No ROS: reads the bag."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from vla_core.time import seconds
from vla_teleop.bags import messages

DISARMED = 0  # vla_msgs/SafetyStatus
TOPICS = ("/safety_status", "/command", "/action_chunk")


@dataclass
class EpisodeMetrics:
    """Series of one episode; times in s of the robot's clock from the first control period."""

    time: np.ndarray  # (N,) of the control periods
    position: dict[str, np.ndarray]  # arm -> (N, 3) commanded tool position, m
    gripper: dict[str, np.ndarray]  # arm -> (N,) commanded opening
    state: np.ndarray  # (N,) SafetyStatus.state
    limited: dict[str, int]  # limit -> control periods in which it was active
    jitter: np.ndarray  # (N,) |period - nominal|, s
    command_time: np.ndarray  # (M,)
    command_age: np.ndarray  # (M,) command stamp minus observation stamp, s
    boundary_time: np.ndarray  # (B,)
    boundary_translation: np.ndarray  # (B,) m
    boundary_rotation: np.ndarray  # (B,) rad
    empty_ticks: int  # commands that hold because no plan was there, between the first chunk and the end
    inference: dict[str, np.ndarray] = field(default_factory=dict)  # stage -> (C,) wall time, s
    refused: int = 0

    def speed(self, arm: str) -> np.ndarray:
        """(N - 1,) commanded tool speed, m/s."""
        return np.linalg.norm(_rate(self.position[arm], self.time), axis=1)

    def acceleration(self, arm: str) -> np.ndarray:
        """(N - 2,) commanded tool acceleration, m/s^2."""
        return np.linalg.norm(_rate(_rate(self.position[arm], self.time), self.time[1:]), axis=1)

    def jerk(self, arm: str) -> np.ndarray:
        """(N - 3,) commanded tool jerk, m/s^3."""
        second = _rate(_rate(self.position[arm], self.time), self.time[1:])
        return np.linalg.norm(_rate(second, self.time[2:]), axis=1)


def episode_metrics(bag: Path, control_rate: float) -> EpisodeMetrics:
    """Measure one episode.

    Args:
        bag: folder of the recorded episode.
        control_rate: nominal rate of the safety controller, Hz.

    Raises:
        ValueError: the bag holds no control period.
    """
    times, states, jitter, refused = [], [], [], 0
    position: dict[str, list] = {}
    gripper: dict[str, list] = {}
    limited: dict[str, int] = {}
    commands, boundaries, stages = [], [], {}
    empty, chunk = 0, 0
    for topic, _, message in messages(bag, TOPICS):
        if topic == "/safety_status":
            # Disarmed, nothing is commanded: what is reported jumps to the measured state when it is armed.
            if message.state == DISARMED:
                continue
            times.append(seconds(message.header.stamp))
            states.append(message.state)
            jitter.append(abs(message.period - 1.0 / control_rate))
            refused = message.refused
            for arm in message.arms:
                p = arm.commanded.position
                position.setdefault(arm.arm, []).append((p.x, p.y, p.z))
                gripper.setdefault(arm.arm, []).append(arm.gripper)
                for name in arm.limited:
                    limited[name] = limited.get(name, 0) + 1
        elif topic == "/command":
            now, observed = seconds(message.header.stamp), seconds(message.observation)
            if message.hold:
                empty += chunk > 0
            elif observed > 0:
                commands.append((now, now - observed))
            if message.chunk and message.chunk != chunk:
                if chunk:
                    boundaries.append((now, message.boundary_translation, message.boundary_rotation))
                chunk = message.chunk
        else:
            for timing in message.timings:
                stages.setdefault(timing.stage, []).append(timing.duration)
    if not times:
        raise ValueError(f"{bag}: expected control periods on /safety_status, found none")
    order = np.argsort(times, kind="stable")
    time, keep = np.unique(np.array(times)[order], return_index=True)
    index = order[keep]
    begin = time[0]
    commands_array = np.array(commands).reshape(-1, 2)
    boundaries_array = np.array(boundaries).reshape(-1, 3)
    return EpisodeMetrics(
        time=time - begin,
        position={arm: np.array(p)[index] for arm, p in position.items()},
        gripper={arm: np.array(g)[index] for arm, g in gripper.items()},
        state=np.array(states)[index],
        limited=limited,
        jitter=np.array(jitter)[index][1:],
        command_time=commands_array[:, 0] - begin,
        command_age=commands_array[:, 1],
        boundary_time=boundaries_array[:, 0] - begin,
        boundary_translation=boundaries_array[:, 1],
        boundary_rotation=boundaries_array[:, 2],
        empty_ticks=empty,
        inference={stage: np.array(v) for stage, v in stages.items()},
        refused=int(refused),
    )


def distribution(values: np.ndarray, scale: float = 1.0) -> dict[str, float | None]:
    """Median, 99th percentile and largest of `values` times `scale`; None where there are no values."""
    if len(values) == 0:
        return {"median": None, "p99": None, "max": None}
    scaled = np.asarray(values) * scale
    return {
        "median": round(float(np.median(scaled)), 4),
        "p99": round(float(np.percentile(scaled, 99)), 4),
        "max": round(float(scaled.max()), 4),
    }


def summary(episodes: list[EpisodeMetrics]) -> dict:
    """The table's numbers over all episodes of a run."""

    def joined(get) -> np.ndarray:
        parts = [np.atleast_1d(get(m)) for m in episodes]
        return np.concatenate(parts) if parts else np.zeros(0)

    def moved(name: str) -> np.ndarray:
        return joined(lambda m: np.concatenate([getattr(m, name)(arm) for arm in m.position]))

    def stage(name: str) -> np.ndarray:
        return joined(lambda m: m.inference.get(name, np.zeros(0)))

    stages = sorted({s for m in episodes for s in m.inference})
    return {
        "command_age_ms": distribution(joined(lambda m: m.command_age), 1e3),
        "control_jitter_ms": distribution(joined(lambda m: m.jitter), 1e3),
        "inference_ms": {s: distribution(stage(s), 1e3) for s in stages},
        "boundary_step_mm": distribution(joined(lambda m: m.boundary_translation), 1e3),
        "boundary_step_deg": distribution(np.degrees(joined(lambda m: m.boundary_rotation))),
        "speed_m_s": distribution(moved("speed")),
        "acceleration_m_s2": distribution(moved("acceleration")),
        "jerk_m_s3": distribution(moved("jerk")),
        "empty_ticks": int(sum(m.empty_ticks for m in episodes)),
        "refused_commands": int(max((m.refused for m in episodes), default=0)),
        "limited_periods": {
            k: sum(m.limited.get(k, 0) for m in episodes) for k in sorted({k for m in episodes for k in m.limited})
        },
    }


def _rate(values: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Differences per second along the first axis; `time` has the same length as `values`."""
    return np.diff(values, axis=0) / np.diff(time)[:, None]
