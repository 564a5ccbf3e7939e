"""A double of franky.Robot and franky.Gripper, the two classes of franky that speak to the arm. Everything else of
franky is the real library's: motions, references, modes and exceptions.

The double keeps what franky and libfranka document: one client at a time; asynchronous motions whose exception comes
out of the next poll_motion, join_motion or move (franky issue 63); motions that cannot be used twice; commands that
are rejected in the modes Reflex and UserStopped; recovery that works unless the user stop is pressed; an arm that
brakes and holds when it misses 20 ms of commands; UDP time-outs after the cable was pulled; and a hand whose
asynchronous commands themselves block for a while (franky issue 76).
"""

from __future__ import annotations

import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from driver_rig import RealTimeRig


class FrankaArm:
    """The arm and its hand: joints follow the reference at a limited speed, and stand when nothing controls them."""

    def __init__(self, franky):
        self.franky, self.lock = franky, threading.RLock()
        self.joints = np.array([0.0, -0.6, 0.1, -2.1, 0.0, 1.6, 0.8])
        self.velocity, self.speed, self.time = np.zeros(7), 2.0, time.monotonic()
        self.mode, self.errors = franky.RobotMode.Idle, "[]"
        self.pressed, self.plugged, self.stubborn = False, True, False
        self.motion, self.until, self.stored = None, 0.0, None
        self.client, self.heard = None, time.monotonic()
        self.width, self.width_goal, self.widest, self.gripped, self.object = 0.04, 0.04, 0.08, False, 0.0
        self.elsewhere, self.block = False, 0.0

    def move(self) -> None:
        """Go on to now."""
        with self.lock:
            now = time.monotonic()
            step = now - self.time
            if self.motion is not None and not self.plugged and now - self.heard > 0.02:
                # 20 commands are missing: the arm brakes by itself. What the host gets is a time-out.
                self.motion, self.mode = None, self.franky.RobotMode.Reflex
                self.errors = '["communication_constraints_violation"]'
                self.stored = self.franky.NetworkException("libfranka: UDP receive: Timeout")
            if self.plugged:
                self.heard = now
            goal = self.joints
            if isinstance(self.motion, self.franky.JointImpedanceTrackingMotion):
                goal = np.array(self.motion.get_reference().q)
                if np.abs(goal - self.joints).max() > 0.5:
                    self.reflex("joint_velocity_violation")
                    goal = self.joints
                elif not np.allclose(goal, self.joints, atol=1e-4):
                    self.elsewhere = True
            elif self.motion is not None and now >= self.until:
                self.motion, self.mode = None, self.franky.RobotMode.Idle
            moved = np.clip(goal - self.joints, -self.speed * step, self.speed * step)
            self.velocity = moved / step if step > 0.0 else self.velocity
            self.joints = self.joints + moved
            reach = 0.1 * step
            self.width += float(np.clip(max(self.width_goal, self.object) - self.width, -reach, reach))
            self.time = now

    def reflex(self, error: str) -> None:
        """Stop by itself, as for a collision."""
        with self.lock:
            if self.motion is not None:
                self.stored = self.franky.ControlException(
                    f'libfranka: Move command aborted: motion aborted by reflex! ["{error}"]'
                )
            self.motion, self.mode, self.errors = None, self.franky.RobotMode.Reflex, f'["{error}"]'

    def press(self, down: bool = True) -> None:
        """The user stop (external activation device)."""
        with self.lock:
            self.pressed = down
            if down and self.motion is not None:
                self.stored = self.franky.ControlException("libfranka: Move command aborted: User Stop pressed!")
            self.motion = None
            self.mode = self.franky.RobotMode.UserStopped if down else self.franky.RobotMode.Idle

    def reachable(self) -> None:
        if not self.plugged:
            raise self.franky.NetworkException("libfranka: Connection timeout")


def doubles(arm: FrankaArm):
    """The classes that stand for franky.Robot and franky.Gripper, with `arm` behind them."""
    franky = arm.franky

    class Robot:
        def __init__(self, fci_hostname, relative_dynamics_factor=1.0, realtime_config=None, **_):
            arm.reachable()
            with arm.lock:
                if arm.client is not None and arm.client() is not None:
                    raise franky.NetworkException("libfranka: Connection refused: another client is connected")
                arm.client, arm.stored, arm.motion = weakref.ref(self), None, None
            self._used, self._frozen = [], None

        @property
        def state(self):
            with arm.lock:
                arm.move()
                if not arm.plugged:
                    if arm.motion is None or self._frozen is None:
                        arm.reachable()
                    return self._frozen
                self._frozen = SimpleNamespace(
                    q=arm.joints.copy(), dq=arm.velocity.copy(), tau_J=np.arange(7.0),
                    K_F_ext_hat_K=np.array([1.0, 2.0, 3.0, 0.1, 0.2, 0.3]), robot_mode=arm.mode,
                    current_errors=arm.errors, time=franky.Duration(int(arm.time * 1000.0)),
                )  # fmt: skip
                return self._frozen

        @property
        def has_errors(self):
            return self.state.robot_mode == franky.RobotMode.Reflex

        @property
        def is_in_control(self):
            arm.move()
            return arm.motion is not None

        def _raise(self):
            with arm.lock:
                error, arm.stored = arm.stored, None
            try:
                if error is not None:
                    raise error
            finally:
                del error  # else its traceback keeps this object, and with it the arm's only connection

        def poll_motion(self):
            time.sleep(arm.block)
            arm.move()
            self._raise()
            return arm.motion is not None

        def move(self, motion, asynchronous=False, limit_rate=False, cutoff_frequency=100.0):
            assert asynchronous, "the driver never waits in a motion"
            with arm.lock:
                arm.move()
                self._raise()
                arm.reachable()
                if any(motion is used for used in self._used):
                    raise franky.MotionReuseException("The same motion instance cannot be used twice.")
                if arm.mode not in (franky.RobotMode.Idle, franky.RobotMode.Move):
                    raise franky.CommandException(
                        f"libfranka: Move command rejected: command not possible in the current mode ({arm.mode.name})!"
                    )
                self._used.append(motion)
                arm.motion, arm.mode, arm.heard = motion, franky.RobotMode.Move, time.monotonic()
                arm.until = time.monotonic() + 0.15

        def stop(self):
            with arm.lock:
                arm.move()
                arm.reachable()
                if arm.motion is not None:
                    arm.stored = franky.ControlException("libfranka: Move command preempted!")
                arm.motion, arm.mode = None, franky.RobotMode.Idle

        def recover_from_errors(self):
            arm.reachable()
            if arm.pressed or arm.stubborn:
                return False
            arm.mode, arm.errors = franky.RobotMode.Idle, "[]"
            return True

        def set_collision_behavior(self, *thresholds):
            arm.reachable()
            assert len(thresholds) in (2, 4, 8)

    class Future:
        def __init__(self, done):
            self._done = done

        def wait(self, timeout=None):
            end = time.monotonic() + (10.0 if timeout is None else timeout)
            while not self._done() and time.monotonic() < end:
                time.sleep(0.005)
            return self._done()

    class Gripper:
        def __init__(self, fci_hostname):
            arm.reachable()

        @property
        def max_width(self):
            return arm.widest

        @property
        def width(self):
            arm.move()
            arm.reachable()
            return arm.width

        def _go(self, width):
            arm.reachable()
            time.sleep(0.2)
            with arm.lock:
                arm.move()
                arm.width_goal = width
            return Future(lambda: abs(arm.width - arm.width_goal) < 1e-4)

        def move_async(self, width, speed):
            arm.gripped = False
            return self._go(width)

        def grasp_async(self, width, speed, force, epsilon_inner=0.005, epsilon_outer=0.005):
            arm.gripped = True
            return self._go(width)

        def stop(self):
            with arm.lock:
                arm.move()
                arm.width_goal = arm.width
            return True

    return Robot, Gripper


class FrankaRig(RealTimeRig):
    driver = "franka"
    boundary = "a recorded-session double at the vendor's library: franky.Robot and franky.Gripper are doubles"
    joints, gripper, resolution = 7, True, 1e-6

    def __init__(self, **config):
        self.franky = pytest.importorskip("franky")
        self.arm, self.extra = FrankaArm(self.franky), config
        self._real = self.franky.Robot, self.franky.Gripper
        self.franky.Robot, self.franky.Gripper = doubles(self.arm)

    def config(self):
        # Far above what the hardware needs, since the machine that runs the tests may be busy.
        return {
            "name": "left", "joints": [f"joint{i + 1}" for i in range(7)], "gripper": True, "address": "172.16.0.2",
            "stale": 3.0, **self.extra,
        }  # fmt: skip

    def position(self):
        self.arm.move()
        return self.arm.joints.copy()

    def place(self, position):
        with self.arm.lock:
            self.arm.move()
            self.arm.joints = np.array(position)

    def moved_by_commands(self):
        self.arm.move()
        return self.arm.elsewhere

    def cut(self):
        self.arm.move()
        self.arm.plugged = False

    def mend(self):
        self.arm.plugged = True

    def close(self):
        self.franky.Robot, self.franky.Gripper = self._real
