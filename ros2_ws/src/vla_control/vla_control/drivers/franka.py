"""Franka arms: Panda (FER) and Research 3, with the Franka Hand, through franky (franky-control 2, on libfranka).

The arm is under joint impedance with a reference that streams (`JointImpedanceTrackingMotion`): franky computes
torques at 1 kHz in a thread of its own, without Python, towards the newest joint positions and velocities. A target
that is late changes nothing but the time, and no target makes the arm plan anew, as joint waypoints would that are
replaced every period; the position interfaces stop with a reflex for every target that is not smooth enough for them.

When this program is gone the arm misses its 1 kHz of commands: after 20 in a row it brakes and holds by itself
(communication_constraints_violation), and follows again only after the recovery that `connect` does.

Sources: franky 2.0 API (Robot, tracker), libfranka (FCI) documentation: errors, robot state.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import franky
import numpy as np

from vla_control.drivers.driver import ArmDriver, ArmInfo, ArmState, ArmTarget, Capabilities, DriverError

#: Modes of the arm that only a person ends.
_BLOCKED = {
    franky.RobotMode.UserStopped: "stopped by its user stop (the enabling device is not in the middle position)",
    franky.RobotMode.Guiding: "guided by hand (the buttons at its flange are pressed)",
}


@dataclass(frozen=True)
class FrankaConfig:
    """address: of the arm's control (FCI), IP or host name. Joint angles are the vendor's, as in its URDF.

    stiffness: N m/rad of each joint, those of libfranka's joint impedance example; damping is critical. torque_step:
    N m, the most that a torque changes in 1 ms. collision_torque, N m, collision_force, N: above them the arm stops by
    reflex. realtime: whether a kernel without PREEMPT_RT is refused. hand_speed: m/s; hand_force: N; hand_grasp:
    opening at and below which the hand grips with hand_force. stale: s after which a state is too old to be read.
    patience: s that connecting may take.
    """

    address: str
    stiffness: tuple[float, ...] = (600.0, 600.0, 600.0, 600.0, 250.0, 150.0, 50.0)
    torque_step: float = 1.0
    collision_torque: float = 20.0
    collision_force: float = 30.0
    realtime: bool = True
    hand_speed: float = 0.1
    hand_force: float = 30.0
    hand_grasp: float = 0.1
    stale: float = 0.2
    patience: float = 8.0


class FrankaDriver(ArmDriver):
    """The driver "franka".

    Stops: 2 only. A stop of category 2 lets franky take the torques over into damping until the arm stands, and the
    arm's own controller then holds it; for 1 and 0 the control loop is ended at once and the arm brakes by itself, as
    hard as it can. Neither takes the power away: over FCI that cannot be done, only by the arm's emergency stop input
    (X3, X4) or Desk. The hand keeps its grip.

    effort: N m, measured behind the gears. wrench: what the arm estimates from its joint torques, in the stiffness
    frame (the tool's, if no other was set), as pressed on the arm.
    """

    Config = FrankaConfig

    def __init__(self, arm: ArmInfo, config: FrankaConfig, clock: Callable[[], float]):
        super().__init__(arm, config, clock)
        if len(arm.joints) != 7 or len(config.stiffness) != 7:
            raise self._error(f"expected 7 joints and stiffnesses, found {len(arm.joints)} and {len(config.stiffness)}")
        self.capabilities = Capabilities(
            frozenset({2}), rate=1000.0, effort=True, wrench=True, gripper=arm.gripper, gripper_force=arm.gripper
        )
        self._robot: Any = None
        self._hand: Any = None
        self._motion: Any = None
        self._threads: list[threading.Thread] = []
        self._wake = threading.Condition()
        self._forget()

    def _forget(self) -> None:
        self._state: ArmState | None = None
        self._time = -1.0
        self._target: ArmTarget | None = None
        self._opening: float | None = None
        self._opened: float | None = None
        self._widest = 0.0
        self._ending = False
        self._pending: int | None = None
        self._follows, self._halted, self._fault = False, "", "not connected"

    def connect(self) -> None:
        self.close()
        self._forget()
        try:
            self._within(self._open, "an arm that answers at FCI")
            self._within(self._start, "an arm that starts to follow")
        except BaseException:
            self.close()
            raise
        with self._wake:
            self._follows, self._halted, self._fault = True, "", ""
        self._threads = [threading.Thread(target=self._stream, name=f"{self.arm.name} franka", daemon=True)]
        if self.arm.gripper:
            self._threads.append(threading.Thread(target=self._grip, name=f"{self.arm.name} hand", daemon=True))
        for thread in self._threads:
            thread.start()

    def read(self) -> ArmState:
        with self._wake:
            state, fault, halted = self._state, self._fault, self._halted
        if fault:
            raise self._error(fault)
        age = self.clock() - state.stamp
        if age > self.config.stale:
            raise self._error(self._fail(self._robot, f"expected a state every 0.001 s, found none for {age:.2f} s"))
        gripper = self._opened if self.arm.gripper else None
        return ArmState(
            state.stamp, state.position.copy(), state.velocity.copy(), state.effort, state.wrench, gripper, halted
        )

    def send(self, target: ArmTarget) -> None:
        self.check(target)
        with self._wake:
            if self._fault or not self._follows:
                raise self._error(self._fault or f"expected an arm that follows, found it {self._halted}")
            self._target = target
            if target.gripper is not None:
                self._opening = target.gripper
            self._wake.notify_all()

    def stop(self, category: int) -> int:
        with self._wake:
            self._follows, self._target, self._opening = False, None, None
            self._halted = self._halted or "stopped, category 2"
            self._pending = category if self._pending is None else min(category, self._pending)
            self._wake.notify_all()
        return self.stop_category(category)

    def close(self) -> None:
        with self._wake:
            if self._follows:
                self._pending = 2
            self._follows, self._ending = False, True
            self._fault = self._fault or "not connected"
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(self.config.patience)
        # The arm takes one client at a time, and franky lets go of it when its object goes.
        self._robot = self._hand = self._motion = None
        self._threads = []

    def _error(self, text: str) -> DriverError:
        return DriverError(f"arm {self.arm.name}: franka {self.config.address}: {text}")

    def _within(self, call: Callable[[], Any], what: str) -> None:
        """Do what may block for `patience` s at most."""
        ended: list[str] = []

        def run() -> None:
            try:
                call()
                ended.append("")
            except Exception as error:
                ended.append(str(error))

        thread = threading.Thread(target=run, name=f"{self.arm.name} franka {what}", daemon=True)
        thread.start()
        thread.join(self.config.patience)
        if not ended or ended[0]:
            found = ended[0] if ended else f"no end after {self.config.patience:g} s"
            raise self._error(f"expected {what}, found: {found}")

    def _open(self) -> None:
        config = self.config
        realtime = franky.RealtimeConfig.Enforce if config.realtime else franky.RealtimeConfig.Ignore
        robot = franky.Robot(config.address, realtime_config=realtime)
        hand = franky.Gripper(config.address) if self.arm.gripper else None
        mode = robot.state.robot_mode
        if mode in _BLOCKED:
            raise DriverError(f"an arm {_BLOCKED[mode]}")
        if (robot.has_errors or mode == franky.RobotMode.Reflex) and not robot.recover_from_errors():
            raise DriverError(f"errors that cannot be cleared: {robot.state.current_errors}")
        if hand is not None:
            self._widest = float(hand.max_width)
            if not self._widest > 0.01:
                raise DriverError("a hand that is not homed; do that in Desk, since it moves the fingers")
            self._opened = min(1.0, float(hand.width) / self._widest)
        robot.set_collision_behavior(config.collision_torque, config.collision_force)
        if not self._ending:  # else it came too late, and the arm's only connection is given back
            self._robot, self._hand = robot, hand

    def _start(self) -> None:
        """Let the arm hold where it is, under impedance."""
        self._motion = franky.JointImpedanceTrackingMotion(
            stiffness=np.array(self.config.stiffness), max_delta_tau=self.config.torque_step
        )
        self._motion.set_reference(franky.JointReference(q=self._robot.state.q, dq=np.zeros(7)))
        self._robot.move(self._motion, asynchronous=True)
        while not (self._robot.is_in_control and self._hear()) and not self._ending:
            self._robot.poll_motion()
            time.sleep(0.005)

    def _hear(self) -> bool:
        """Take the newest state, unless it is the one that was there already."""
        state, stamp = self._robot.state, self.clock()
        now = state.time.to_sec()
        if now == self._time:
            return False
        read = ArmState(
            stamp, np.array(state.q), np.array(state.dq), np.array(state.tau_J), np.array(state.K_F_ext_hat_K)
        )
        if not all(np.all(np.isfinite(part)) for part in (read.position, read.velocity, read.effort)):
            return False
        with self._wake:
            self._state, self._time = read, now
        return True

    def _halt(self, robot: Any, why: str) -> None:
        """The arm does not follow any more, whoever wanted that; it stays so until connect."""
        with self._wake:
            if self._follows and self._robot is robot:
                self._follows, self._target, self._opening, self._halted = False, None, None, why

    def _fail(self, robot: Any, why: str) -> str:
        """The connection is of no use any more. A thread of an earlier one, late from a call, has no say."""
        with self._wake:
            if self._robot is robot:
                self._follows, self._target = False, None
                self._fault = self._fault or why
            return self._fault

    def _stream(self) -> None:
        """Hand the newest target on, read the state and do what stop asks for, until the end."""
        robot, motion, moving = self._robot, self._motion, True
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._ending or self._target is not None or self._pending is not None, self.arm.period
                )
                if self._robot is not robot:
                    return
                target, self._target = self._target, None
                stop, self._pending = self._pending, None
                ending = self._ending
            try:
                if stop is not None and moving and self._fault in ("", "not connected"):
                    self._stop(robot, stop)
                elif target is not None:
                    motion.set_reference(franky.JointReference(q=target.position, dq=target.velocity))
                if moving:
                    moving = robot.poll_motion()  # raises what ended the motion
                self._hear()
                if not moving:
                    self._halt(robot, "not in control any more")
            except franky.ControlException as error:
                moving = False
                self._halt(robot, f"stopped by itself: {error}")
            except Exception as error:
                self._fail(robot, f"expected an arm that answers, found {type(error).__name__}: {error}")
            if ending:
                break
        self._settle(robot)

    def _stop(self, robot: Any, category: int) -> None:
        if category == 2:
            robot.move(franky.TorqueStopMotion(ramp_duration=0.1), asynchronous=True)
        else:
            robot.stop()

    def _settle(self, robot: Any) -> None:
        """Wait until the arm stands, before it is let go."""
        end = time.monotonic() + 2.5
        try:
            while time.monotonic() < end and robot.poll_motion():
                time.sleep(0.01)
        except Exception:
            return  # it has stopped by itself

    def _grip(self) -> None:
        """Move the hand to its newest opening, and read where it is, until the end."""
        robot, hand, sent, moves = self._robot, self._hand, None, None
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._ending, 0.05)
                opening = self._opening if self._follows else None
                if self._ending or self._fault or self._robot is not robot:
                    return
            try:
                if opening is not None and (sent is None or abs(opening - sent) > 0.02):
                    if moves is not None and not moves.wait(0.0):
                        hand.stop()
                    moves, sent = self._move_hand(hand, opening), opening
                self._opened = float(np.clip(hand.width / self._widest, 0.0, 1.0))
            except franky.CommandException:
                sent = None  # the hand was still busy: again
            except Exception as error:
                if not self._ending:
                    self._fail(robot, f"hand: expected an answer, found {type(error).__name__}: {error}")

    def _move_hand(self, hand: Any, opening: float) -> Any:
        """Begin to move. A move against an object ends early, which is no fault."""
        speed, width = self.config.hand_speed, opening * self._widest
        if opening <= self.config.hand_grasp:
            return hand.grasp_async(width, speed, self.config.hand_force, self._widest, self._widest)
        return hand.move_async(width, speed)
