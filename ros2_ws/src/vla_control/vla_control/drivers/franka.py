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

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import franky
import numpy as np

from vla_control.drivers.driver import ArmInfo, ArmState, ArmTarget, Capabilities, DriverError
from vla_control.drivers.linked import Link, LinkedArm

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
    reflex. realtime: whether a kernel without PREEMPT_RT is refused. hand_speed: m/s; hand_force: N, where the arm's
    description has no gripper.force; hand_grasp: opening at and below which the hand grips with that force. stale: s
    after which a state is too old to be read. patience: s that connecting may take.
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


class _FrankaLink(Link):
    """time: of the newest state, s of the arm. widest: of the hand, m. moving: whether the control loop runs. sent,
    moves: opening that the hand was last told, and that motion."""

    def __init__(self) -> None:
        super().__init__()
        self.hand: Any = None
        self.motion: Any = None
        self.time, self.widest, self.moving = -1.0, 0.0, True
        self.sent: float | None = None
        self.moves: Any = None


class FrankaDriver(LinkedArm):
    """The driver "franka".

    Stops: 2 only. A stop of category 2 lets franky take the torques over into damping until the arm stands, and the
    arm's own controller then holds it; for 1 and 0 the control loop is ended at once and the arm brakes by itself, as
    hard as it can. Neither takes the power away: over FCI that cannot be done, only by the arm's emergency stop input
    (X3, X4) or Desk. The hand keeps its grip.

    effort: N m, measured behind the gears. wrench: what the arm estimates from its joint torques, in the stiffness
    frame (the tool's, if no other was set), as pressed on the arm.
    """

    Config = FrankaConfig
    KIND, EVERY = "franka", 0.001

    def __init__(self, arm: ArmInfo, config: FrankaConfig, clock: Callable[[], float]):
        super().__init__(arm, config, clock)
        if len(arm.joints) != 7 or len(config.stiffness) != 7:
            raise self._error(f"expected 7 joints and stiffnesses, found {len(arm.joints)} and {len(config.stiffness)}")
        self.capabilities = Capabilities(
            frozenset({2}), rate=1000.0, effort=True, wrench=True, gripper=arm.gripper, gripper_force=arm.gripper,
            gripper_newtons=arm.gripper,
        )  # fmt: skip
        self._force = config.hand_force if arm.gripper_force is None else arm.gripper_force

    def _make_link(self) -> _FrankaLink:
        return _FrankaLink()

    def _open(self, link: _FrankaLink) -> None:
        self.within(lambda: self._find(link), "an arm that answers at FCI")
        self.within(lambda: self._start(link), "an arm that starts to follow")

    def _find(self, link: _FrankaLink) -> None:
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
            link.widest = float(hand.max_width)
            if not link.widest > 0.01:
                raise DriverError("a hand that is not homed; do that in Desk, since it moves the fingers")
            link.opened = min(1.0, float(hand.width) / link.widest)
        robot.set_collision_behavior(config.collision_torque, config.collision_force)
        if not link.ending:  # else it came too late, and the arm's only connection is given back
            link.device, link.hand = robot, hand

    def _start(self, link: _FrankaLink) -> None:
        """Let the arm hold where it is, under impedance."""
        robot = link.device
        link.motion = franky.JointImpedanceTrackingMotion(
            stiffness=np.array(self.config.stiffness), max_delta_tau=self.config.torque_step
        )
        link.motion.set_reference(franky.JointReference(q=robot.state.q, dq=np.zeros(7)))
        robot.move(link.motion, asynchronous=True)
        while not (robot.is_in_control and self._hear(link)) and not link.ending:
            robot.poll_motion()
            time.sleep(0.005)

    def _hear(self, link: _FrankaLink) -> bool:
        """Take the newest state, unless it is the one that was there already."""
        state, stamp = link.device.state, self.clock()
        now = state.time.to_sec()
        if now == link.time:
            return False
        read = ArmState(
            stamp, np.array(state.q), np.array(state.dq), np.array(state.tau_J), np.array(state.K_F_ext_hat_K)
        )
        if not all(np.all(np.isfinite(part)) for part in (read.position, read.velocity, read.effort)):
            return False
        with link.wake:
            link.state, link.time = read, now
        return True

    def _turn(self, link: _FrankaLink, target: ArmTarget | None, stop: int | None) -> None:
        robot = link.device
        try:
            if stop is not None and link.moving:
                self._brake(robot, stop)
            elif target is not None:
                link.motion.set_reference(franky.JointReference(q=target.position, dq=target.velocity))
            if link.moving:
                link.moving = robot.poll_motion()  # raises what ended the motion
            self._hear(link)
            if not link.moving:
                link.halt("not in control any more")
        except franky.ControlException as error:
            link.moving = False
            link.halt(f"stopped by itself: {error}")
        if link.ending:
            self._settle(robot)

    def _brake(self, robot: Any, category: int) -> None:
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

    def _grip(self, link: _FrankaLink, opening: float | None) -> None:
        hand = link.hand
        try:
            if opening is not None and (link.sent is None or abs(opening - link.sent) > 0.02):
                if link.moves is not None and not link.moves.wait(0.0):
                    hand.stop()
                link.moves, link.sent = self._move_hand(link, opening), opening
            link.opened = float(np.clip(hand.width / link.widest, 0.0, 1.0))
        except franky.CommandException:
            link.sent = None  # the hand was still busy: again

    def _move_hand(self, link: _FrankaLink, opening: float) -> Any:
        """Begin to move. A move against an object ends early, which is no fault."""
        speed, width = self.config.hand_speed, opening * link.widest
        if opening <= self.config.hand_grasp:
            return link.hand.grasp_async(width, speed, self._force, link.widest, link.widest)
        return link.hand.move_async(width, speed)

    def _part(self, link: _FrankaLink) -> None:
        # The arm takes one client at a time, and franky lets go of it when its object goes.
        link.device = link.hand = link.motion = link.moves = None
