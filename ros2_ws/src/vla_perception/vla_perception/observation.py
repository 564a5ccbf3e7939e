"""Synchronised observations: one reference time, the image of each camera nearest to it, the arms
interpolated at it.

The sampler is fed with images and joint states in the order in which they arrive and is asked for an
observation after each; it never waits and reads no clock. The observation node feeds it live, a bag reader
feeds it the same log, and both get bit-identical observations.

The reference time is the newest time for which every camera has an image: the least of the cameras' newest
stamps. An observation is due when

- every camera is healthy (otherwise the policy gets none, its actions run out and the arm holds),
- every camera's image is newer than the one in the observation before,
- the largest rate allows it, and
- joint states lie on both sides of every time that is read, so that nothing is extrapolated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from vla_calibration.files import CameraCalibration
from vla_core.kinematics import Kinematics
from vla_core.robot import Arm, Camera, Robot
from vla_core.timeline import ClockJump, Timeline

from vla_perception.camera_track import CameraTrack, HealthLimits, ImageMessage
from vla_perception.transforms import TransformBuffer, TransformUnavailable

#: Name under which `faults` speaks of the joint states.
JOINTS = "joint_states"

#: Joint states kept: two seconds at 1 kHz.
_JOINT_STATES = 2000

#: Joint states that stop for so many seconds are a fault.
_JOINT_SILENCE = 0.25

#: `now` may go back by so many seconds before it counts as a jump (a clock that is being disciplined).
_CLOCK_SLACK = 0.05


class PerceptionError(ValueError):
    """Input that cannot be used; the message names it, the expected and the found."""


@dataclass(frozen=True, eq=False)
class CameraSample:
    """One camera's part: `stamp` s, `skew` s = stamp - reference time, K (3, 3) (zeros: not calibrated),
    T_base_camera (4, 4) at the stamp, m (NaN: unknown)."""

    camera: str
    stamp: float
    image: ImageMessage
    skew: float
    K: np.ndarray
    T_base_camera: np.ndarray


@dataclass(frozen=True, eq=False)
class ArmSample:
    """One arm's part at the reference time: position and velocity (n,) in rad (m), rad/s (m/s), tool =
    T_base_tool (4, 4), m, gripper opening 0 .. 1 (0 without a gripper)."""

    arm: str
    joints: tuple[str, ...]
    position: np.ndarray
    velocity: np.ndarray
    tool: np.ndarray
    gripper: float


@dataclass(frozen=True, eq=False)
class ObservationSample:
    """Everything at reference time `time`, s. `skew`: the largest |skew| of its images, s; `age`: now -
    time, s."""

    time: float
    images: tuple[CameraSample, ...]
    arms: tuple[ArmSample, ...]
    skew: float
    age: float


class ObservationSampler:
    """Timelines of every camera and arm of a robot, and observations out of them.

    All times are seconds of the ROS clock; `now` is the time at which a message arrives (in a bag: its log
    time). When `now` goes backwards (the simulation starts anew) every timeline is cleared. Not
    thread-safe.

    Args:
        robot: the robot; its `rates.observation` is the largest rate, Hz.
        calibrations: by camera name; cameras without one get zeros for K and NaN for their pose.
        transforms: asked for the parent of a camera that is fixed neither to the base nor to a tool.
        limits: when a camera counts as unhealthy.

    Raises:
        PerceptionError: a calibration of another camera or another image size.
    """

    def __init__(
        self,
        robot: Robot,
        calibrations: Mapping[str, CameraCalibration],
        transforms: TransformBuffer | None = None,
        limits: HealthLimits | None = None,
    ):
        self.robot = robot
        kinematics = Kinematics(robot)
        self._arms = [_ArmTrack(arm, kinematics) for arm in robot.arms]
        transforms = transforms or TransformBuffer()
        self._mounts = [_Mount(robot, c, calibrations.get(c.name), self._arms, transforms) for c in robot.cameras]
        limits = limits or HealthLimits()
        self._cameras = [CameraTrack(camera, limits, -np.inf) for camera in robot.cameras]
        self._by_name = {t.camera.name: (t, m) for t, m in zip(self._cameras, self._mounts, strict=True)}
        self._period = 1.0 / robot.rates.observation
        self._now: float | None = None
        self._joint_fault = ""
        self._joint_names: Sequence[str] = ()
        self._clear_choice()

    # ------------------------------------------------------------------------------------------------------
    # input

    def add_image(self, camera: str, stamp: float, image: ImageMessage, now: float) -> None:
        """Take an image (kept as it is, not copied) of a camera of the robot, captured at `stamp`."""
        self._advance(now)
        if camera not in self._by_name:
            raise PerceptionError(f"image: expected a camera among {sorted(self._by_name)}, found {camera!r}")
        track, mount = self._by_name[camera]
        track.add(stamp, image, now, mount.tool_positions)
        self._fresh = True

    def add_joints(
        self, stamp: float, names: Sequence[str], position: ArrayLike, velocity: ArrayLike, now: float
    ) -> None:
        """Take joint positions and velocities (N,) by name, rad (m), measured at `stamp`.

        A message may hold some of the arms only (one driver per arm), but each with all of its joints and
        fingers. Joints of no arm are passed over; without velocities they are the differences of the
        positions. A message that cannot be used is left out, and `faults` says why until a good one comes.
        """
        self._advance(now)
        if names != self._joint_names:
            self._match_joints(names)
        position, velocity = np.asarray(position, float), np.asarray(velocity, float)
        self._joint_fault = self._find_joint_fault(stamp, position, velocity, now)
        if self._joint_fault:
            return
        for arm in self._arms:
            if arm.index is not None:
                arm.add(stamp, position, velocity)

    def clear(self) -> None:
        """Forget all images and joint states."""
        for track in self._cameras:
            track.clear(self._now if self._now is not None else -np.inf)
        for arm in self._arms:
            arm.clear()
        self._joint_fault = ""
        self._clear_choice()

    # -----------------------------------------------------------------------------------------------------
    # output

    def sample(self, now: float) -> ObservationSample | None:
        """The next observation, when one is due."""
        self._advance(now)
        if not self._fresh or any(track.fault(now) for track in self._cameras):
            return None
        reference = self._reference()
        chosen = [track.nearest(reference) for track in self._cameras] if reference is not None else []
        if reference is None or not self._is_next(reference, [c.stamp for c in chosen]):
            self._fresh = False
            return None
        read = [reference, *(c.stamp for c, m in zip(chosen, self._mounts, strict=True) if m.arm is not None)]
        if not all(arm.reaches(max(read)) for arm in self._arms):
            return None
        self._fresh = False
        if not all(arm.begins_before(min(read)) for arm in self._arms):
            return None
        self._last, self._last_stamps = reference, [c.stamp for c in chosen]
        self._due = max(self._due, reference - 0.25 * self._period) + self._period
        images = tuple(
            CameraSample(t.camera.name, c.stamp, c.value, c.stamp - reference, m.K, m.pose(c.stamp))
            for t, m, c in zip(self._cameras, self._mounts, chosen, strict=True)
        )
        return ObservationSample(
            time=reference,
            images=images,
            arms=tuple(arm.sample(reference) for arm in self._arms),
            skew=max((abs(image.skew) for image in images), default=0.0),
            age=now - reference,
        )

    def faults(self, now: float) -> dict[str, str]:
        """What is wrong with each camera and with the joint states ("joint_states"); empty texts: nothing."""
        self._advance(now)
        return {t.camera.name: t.fault(now) for t in self._cameras} | {JOINTS: self._joints_wrong(now)}

    def tool_poses(self) -> dict[str, tuple[float, np.ndarray]]:
        """Arm name -> (stamp s, T_base_tool (4, 4)) of its newest joint state, for arms that have one."""
        return {arm.arm.name: (arm.newest, arm.tool(arm.newest)) for arm in self._arms if arm.newest is not None}

    # -----------------------------------------------------------------------------------------------------
    # choice

    def _clear_choice(self) -> None:
        self._fresh = False
        self._last = self._due = -np.inf
        self._last_stamps = [-np.inf] * len(self._cameras)

    def _reference(self) -> float | None:
        newest = [track.newest for track in (self._cameras or self._arms)]
        return None if None in newest else min(newest)

    def _is_next(self, reference: float, stamps: list[float]) -> bool:
        # A quarter of a period early is on time: stamps jitter. The mean rate stays below the largest.
        advanced = all(stamp > last for stamp, last in zip(stamps, self._last_stamps, strict=True))
        return reference > self._last and advanced and reference >= self._due - 0.25 * self._period

    def _advance(self, now: float) -> None:
        if self._now is None or now < self._now - _CLOCK_SLACK:
            self._now = now
            self.clear()
        self._now = max(self._now, now)

    # -----------------------------------------------------------------------------------------------------
    # joints

    def _match_joints(self, names: Sequence[str]) -> None:
        """Find each arm's joints and fingers in the message; an arm that is not in it gets None."""
        self._joint_names = names
        where = {name: i for i, name in enumerate(names)}
        for arm in self._arms:
            arm.match(where)

    def _find_joint_fault(self, stamp: float, position: np.ndarray, velocity: np.ndarray, now: float) -> str:
        partly = [arm for arm in self._arms if arm.index is None and arm.missing != arm.names]
        if partly or all(arm.index is None for arm in self._arms):
            missing = (partly or self._arms)[0].missing
            return f"configuration: expected joints {list(missing)}, found {list(self._joint_names)}"
        count = len(self._joint_names)
        if position.shape != (count,) or velocity.shape not in ((count,), (0,)):
            return (
                f"configuration: expected {count} positions and velocities (or no velocities), "
                f"found {position.size} and {velocity.size}"
            )
        if not np.isfinite(position).all() or not np.isfinite(velocity).all():
            return f"not finite: position {position.tolist()}, velocity {velocity.tolist()}"
        if abs(now - stamp) > 0.5:
            return f"clock: stamp {abs(now - stamp):.3f} s {'old' if stamp < now else 'in the future'}"
        return ""

    def _joints_wrong(self, now: float) -> str:
        if self._joint_fault:
            return self._joint_fault
        for arm in self._arms:
            if arm.newest is None:
                return f"waiting for the first joint state of arm {arm.arm.name!r}"
            if now - arm.newest > _JOINT_SILENCE:
                return f"dead: no joint state of arm {arm.arm.name!r} for {now - arm.newest:.2f} s"
        return ""


class _ArmTrack:
    """Joint states of one arm: a timeline of [position (n), velocity (n), fingers (m)]."""

    def __init__(self, arm: Arm, kinematics: Kinematics):
        self.arm = arm
        self.names = arm.joints + tuple(j.name for j in (arm.gripper.joints if arm.gripper else ()))
        self.missing = self.names
        self.index: np.ndarray | None = None
        self._kinematics = kinematics
        self._states = Timeline(_JOINT_STATES)
        self._n = len(arm.joints)

    def match(self, where: Mapping[str, int]) -> None:
        self.missing = tuple(name for name in self.names if name not in where)
        self.index = None if self.missing else np.array([where[name] for name in self.names])

    def clear(self) -> None:
        self._states.clear()

    def add(self, stamp: float, position: np.ndarray, velocity: np.ndarray) -> None:
        position = position[self.index]
        if velocity.size:
            velocity = velocity[self.index[: self._n]]
        else:
            velocity = np.zeros(self._n)
            if self.newest is not None and stamp > self.newest:
                before = self._states.sample(self.newest)[: self._n]
                velocity = (position[: self._n] - before) / (stamp - self.newest)
        state = np.concatenate([position[: self._n], velocity, position[self._n :]])
        try:
            self._states.add(stamp, state)
        except ClockJump:
            self._states.clear()
            self._states.add(stamp, state)

    @property
    def newest(self) -> float | None:
        return self._states.newest if len(self._states) else None

    def reaches(self, stamp: float) -> bool:
        return len(self._states) > 0 and self._states.newest >= stamp

    def begins_before(self, stamp: float) -> bool:
        return self._states.oldest <= stamp

    def tool(self, stamp: float) -> np.ndarray:
        return self._kinematics.forward(self.arm.name, self._states.sample(stamp)[: self._n])

    def sample(self, stamp: float) -> ArmSample:
        state = self._states.sample(stamp)
        position, velocity, fingers = np.split(state, [self._n, 2 * self._n])
        gripper = 0.0
        if self.arm.gripper:
            gripper = self.arm.gripper.opening(dict(zip(self.names[self._n :], fingers, strict=True)))
        tool = self._kinematics.forward(self.arm.name, position)
        return ArmSample(self.arm.name, self.arm.joints, position, velocity, tool, min(max(gripper, 0.0), 1.0))


class _Mount:
    """Where a camera is fixed: to the base frame, to a tool (`arm`), or to a frame of the transform
    buffer."""

    def __init__(
        self,
        robot: Robot,
        camera: Camera,
        calibration: CameraCalibration | None,
        arms: Sequence[_ArmTrack],
        transforms: TransformBuffer,
    ):
        self.K = np.zeros((3, 3)) if calibration is None else calibration.K
        self.arm: _ArmTrack | None = None
        self._base, self._calibration, self._transforms = robot.base_frame, calibration, transforms
        self._watched = arms
        if calibration is None:
            return
        found, expected = (
            (c.width, c.height, n) for c, n in ((calibration, calibration.camera), (camera, camera.name))
        )
        if found != expected:
            raise PerceptionError(
                f"calibration of camera {camera.name!r}: expected one of {expected[2]!r} at "
                f"{expected[0]}x{expected[1]} pixels, found {found[2]!r} at {found[0]}x{found[1]}"
            )
        for arm in arms:
            if arm.arm.tool.frame == calibration.parent:
                # A camera on a tool need not see the other arm.
                self.arm, self._watched = arm, (arm,)

    def pose(self, stamp: float) -> np.ndarray:
        """T_base_camera (4, 4) at a time inside the joint states; NaN when unknown."""
        if self._calibration is None:
            return np.full((4, 4), np.nan)
        T_parent_camera = self._calibration.T_parent_camera
        if self.arm is not None:
            return self.arm.tool(stamp) @ T_parent_camera
        if self._calibration.parent == self._base:
            return T_parent_camera
        try:
            return self._transforms.lookup(self._base, self._calibration.parent, stamp) @ T_parent_camera
        except TransformUnavailable:
            return np.full((4, 4), np.nan)

    def tool_positions(self) -> np.ndarray | None:
        """Newest positions (arms, 3) of the tools that the camera should see moving, m; None: not known
        yet."""
        if any(arm.newest is None for arm in self._watched):
            return None
        return np.array([arm.tool(arm.newest)[:3, 3] for arm in self._watched])
