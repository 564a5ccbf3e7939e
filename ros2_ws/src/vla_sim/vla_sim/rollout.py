"""Lock-step rollouts: a world driven through the safety controller, without ROS, deterministic, as fast as it goes.

Per control period: measure, ask for a target, command, let the controller decide, step physics. It is the way of the
running graph with no time passing between its parts; `delay` of the targets is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from vla_control.command import ArmCommand, Command
from vla_control.safety import Measured, SafetyController, SafetyDecision
from vla_core import se3
from vla_core.robot import Robot

from vla_sim.disturbance import Disturbance
from vla_sim.world import World

#: Absolute target (target_dim,) in target layout at a time (s).
Target = Callable[[float], np.ndarray]


@dataclass(frozen=True)
class Period:
    """One control period: what was measured and seen at its beginning, what was commanded and sent for it.

    `pictures` holds (H, W, 3) uint8 of the cameras that were due; `tools` T_base_tool (4, 4) of each arm as measured.
    """

    time: float
    joint_state: tuple[tuple[str, ...], np.ndarray, np.ndarray]
    tools: Mapping[str, np.ndarray]
    pictures: Mapping[str, np.ndarray]
    command: Command
    decision: SafetyDecision


def rollout(
    world: World,
    target: Target,
    kind: str,
    cameras: tuple[str, ...] = (),
    camera_rate: float | None = None,
    disturbance: Disturbance | None = None,
    observe: Callable[[float, Mapping[str, np.ndarray]], None] | None = None,
    tail: float = 0.0,
) -> Iterator[Period]:
    """Run the world's episode until it succeeds or fails (its time limit at the latest).

    Args:
        world: freshly reset.
        target: where to be at a time; asked for the end of each period.
        kind: of the targets, "pose" or "joint".
        cameras: to render; each at the robot's rate or at `camera_rate` (Hz).
        disturbance: added to what the arm executes, never to what is commanded.
        observe: called with (time, pictures) before the target is asked for, for a policy that sees.
        tail: how long to go on after a success, s.

    Yields:
        Every control period, before physics goes through it.
    """
    robot = world.robot
    controller = SafetyController(robot)
    controller.arm(measure(world))
    begin = world.time
    rates = {name: camera_rate or robot.camera(name).rate for name in cameras}
    taken = dict.fromkeys(cameras, 0)
    decision: SafetyDecision | None = None
    sequence = 0
    end = np.inf
    while not world.outcome().failed and world.time < end - 1e-9:
        now = world.time
        due = [name for name in cameras if now - begin >= taken[name] / rates[name] - 1e-9]
        pictures = {name: world.render(name) for name in due}
        for name in due:
            taken[name] += 1
        if observe is not None:
            observe(now, pictures)
        sequence += 1
        goals = decision.goal if decision else {arm.name: world.tool_pose(arm.name) for arm in robot.arms}
        command = command_towards(robot, target(now + world.period), kind, goals, now, sequence)
        decision = controller.step(command, measure(world), now)
        tools = {arm.name: world.tool_pose(arm.name) for arm in robot.arms}
        yield Period(now, world.joint_state(), tools, pictures, command, decision)
        targets = joint_targets(robot, decision)
        if disturbance is not None:
            for arm in robot.arms:
                for joint, offset in zip(arm.joints, disturbance.offset(arm.name, now), strict=True):
                    targets[joint] += offset
        world.set_targets(targets)
        world.step()
        if world.outcome().success and end == np.inf:
            end = world.time + tail


def measure(world: World) -> Measured:
    """What the controller measures now."""
    positions = world.positions()
    arms = world.robot.arms
    return Measured(
        stamp=world.time,
        position={arm.name: np.array([positions[joint] for joint in arm.joints]) for arm in arms},
        gripper={arm.name: arm.gripper.opening(positions) for arm in arms if arm.gripper},
    )


def command_towards(
    robot: Robot, target: np.ndarray, kind: str, goals: Mapping[str, np.ndarray], now: float, sequence: int
) -> Command:
    """The command that moves the controller's goals T_base_tool (4, 4) to a target within one control period."""
    arms, at = {}, 0
    for arm in robot.arms:
        size = 7 if kind == "pose" else len(arm.joints)
        part, gripper = target[at : at + size], float(target[at + size])
        at += size + 1
        if kind == "pose":
            arms[arm.name] = ArmCommand(delta=se3.delta(goals[arm.name], se3.pose_to_matrix(part)), gripper=gripper)
        else:
            arms[arm.name] = ArmCommand(joints=part, gripper=gripper)
    return Command(now, sequence, "rollout", 1.0 / robot.rates.control, False, arms)


def joint_targets(robot: Robot, decision: SafetyDecision) -> dict[str, float]:
    """Physical joint targets of arms and fingers that a decision sends, rad or m by joint name."""
    targets: dict[str, float] = {}
    for arm in robot.arms:
        sent = decision.sent[arm.name]
        targets |= dict(zip(arm.joints, map(float, sent.position), strict=True))
        if arm.gripper is not None:
            targets |= arm.gripper.positions(float(sent.gripper))
    return targets
