"""Proof 6: the same drives and the same errands under this controller and under MoveIt Servo's law."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from vla_control.command import ArmCommand
from vla_core import se3
from vla_core.kinematics import Kinematics

from proofs.adversarial import SECONDS, judge_run
from proofs.cells import Rig, load_cell, load_oracle, needed, random_start
from proofs.drives import ONE_ARM, SPEED, TWO_ARMS, Attacker
from proofs.servo import ServoRig

#: Systems that are compared: this controller, and Servo's law with its distances at 10 Hz (its default) and 50 Hz.
SYSTEMS = {"this controller": None, "Servo's law, 10 Hz": 10.0, "Servo's law, 50 Hz": 50.0}
#: An errand ends this near its goal, m and rad, or is given up after this time, s.
NEAR, TURNED, PATIENCE = 0.005, 0.05, 15.0
#: Rate at which an errand's sender takes away what is left, 1/s.
GAIN = 4.0


def make_rig(system: str, robot_name: str, start):
    robot, oracle = load_cell(robot_name), load_oracle(robot_name)
    rate = SYSTEMS[system]
    return Rig(robot, start=start) if rate is None else ServoRig(robot, oracle, rate, start)


def give(rig, parts) -> None:
    if isinstance(rig, ServoRig):
        rig.step_parts(parts)
    else:
        rig.step(rig.command(parts))


def run_drive(system: str, robot_name: str, run: int, seconds: float = SECONDS):
    """An attack as in proof 1: a Verdict."""
    oracle = load_oracle(robot_name)
    rng = np.random.default_rng([1, run])
    kinds = TWO_ARMS if len(oracle.robot.arms) > 1 else ONE_ARM
    rig = make_rig(system, robot_name, random_start(oracle, rng))
    attacker = Attacker(rig, oracle, kinds[run % len(kinds)], rng)
    for _ in range(round(seconds / rig.period)):
        give(rig, attacker.command())
    return judge_run(run, attacker.kind, rig, oracle, 0)


@dataclass(frozen=True)
class Errand:
    """A free motion of all tools to a pose. time: s, infinite when it was given up; straight: the time that the way
    takes at the speed commanded, s."""

    run: int
    time: float
    straight: float


def run_errand(system: str, robot_name: str, run: int) -> Errand:
    """Tools go from one free configuration to another by deltas towards the goal; the way between is free."""
    robot, oracle = load_cell(robot_name), load_oracle(robot_name)
    kinematics = Kinematics(robot)
    rng = np.random.default_rng([8, run])
    while True:
        start = {a.name: np.clip(a.home + rng.normal(0, 0.25, len(a.home)), a.limits.lower + 0.2, a.limits.upper - 0.2)
                 for a in robot.arms}  # fmt: skip
        end = {n: q + rng.normal(0, 0.25, len(q)) for n, q in start.items()}
        end = {a.name: np.clip(end[a.name], a.limits.lower + 0.2, a.limits.upper - 0.2) for a in robot.arms}
        way = {n: np.linspace(start[n], end[n], 20) for n in start}
        if (oracle.path_distances(way) > needed(oracle)).all():
            break
    rig = make_rig(system, robot_name, start)
    goals = {n: kinematics.forward(n, q) for n, q in end.items()}
    straight = 0.0
    for arm in robot.arms:
        way = se3.delta(kinematics.forward(arm.name, start[arm.name]), goals[arm.name])
        speed, turn = min(SPEED, arm.tool_limits.speed), arm.tool_limits.rotation
        straight = max(straight, np.linalg.norm(way[:3]) / speed, np.linalg.norm(way[3:]) / turn)
    for k in range(round(PATIENCE / rig.period)):
        parts, left = {}, 0.0
        for arm in robot.arms:
            here = kinematics.forward(arm.name, rig.controller.target(arm.name).position)
            error = se3.delta(here, goals[arm.name])
            left = max(left, np.linalg.norm(error[:3]) / NEAR, np.linalg.norm(error[3:]) / TURNED)
            speed, turn = min(SPEED, arm.tool_limits.speed), arm.tool_limits.rotation
            twist = GAIN * error
            twist *= min(1.0, speed / max(np.linalg.norm(twist[:3]), 1e-9), turn / max(np.linalg.norm(twist[3:]), 1e-9))
            parts[arm.name] = ArmCommand(delta=twist * rig.period)
        if left <= 1.0:
            return Errand(run, k * rig.period, float(straight))
        give(rig, parts)
    return Errand(run, np.inf, float(straight))
