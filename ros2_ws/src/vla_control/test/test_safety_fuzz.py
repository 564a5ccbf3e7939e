"""Whatever comes in, what goes out keeps every limit (the rig judges each target that is sent)."""

import numpy as np
import pytest
from vla_control.command import ArmCommand, CommandRefused
from vla_control.safety import Measured, State

STEPS = {"panda": 4_000, "aloha": 4_000}


class Attacker:
    """Stretches of hard driving, strewn with commands that no sound sender makes and with stops."""

    def __init__(self, rig, seed):
        self.rig, self.rng = rig, np.random.default_rng(seed)

    def run(self, steps):
        rig, rng = self.rig, self.rng
        for k in range(steps):
            if k % 120 == 0:
                self.turn()
            if rig.controller.state in (State.DISARMED, State.STOPPED, State.FAULT) and rng.random() < 0.2:
                rig.arm()
            if rng.random() < 0.004:
                self.interfere()
            silent = k % 120 < self.silence or rng.random() < 0.05
            command = None if silent else self.command()
            rig.step(command, self.measured())
            if rng.random() < 0.001:
                rig.ticks = max(0, rig.ticks + int(rng.integers(-200, 200)))  # the clock jumps

    def turn(self):
        rng = self.rng
        self.silence = rng.choice([0, 0, 0, 80])
        self.joint_mode = rng.random() < 0.4
        self.period = rng.choice([0.01, 0.01, 0.02, 0.033, 0.1])
        self.push = {a.name: rng.normal(size=6) for a in self.rig.robot.arms}
        self.speed = rng.uniform(0.1, 5.5)
        self.aim = {a.name: rng.uniform(a.limits.lower - 0.3, a.limits.upper + 0.3) for a in self.rig.robot.arms}

    def interfere(self):
        what = self.rng.integers(5)
        try:
            (
                lambda: self.rig.controller.stop(int(self.rng.integers(3)), "fuzz"),
                self.rig.controller.disarm,
                lambda: self.rig.arm(),
                lambda: self.rig.controller.stop(2, "fuzz"),
                lambda: self.rig.controller.offer(self.command(), self.rig.now),
            )[what]()
        except CommandRefused as refusal:
            assert refusal.code == "state"

    def measured(self):
        rig, rng, x = self.rig, self.rng, self.rng.random()
        if x < 0.002:
            return None
        if x < 0.004:
            return Measured(rig.now, {n: np.full(len(q), np.nan) for n, q in rig.position.items()})
        if x < 0.006:
            return Measured(rig.now - rng.uniform(0, 1), rig.position, rig.gripper)
        if x < 0.008:
            return Measured(rig.now, {})
        return rig.measured

    def parts(self):
        rig, rng, parts = self.rig, self.rng, {}
        for arm in rig.robot.arms:
            push = self.push[arm.name]
            tool = arm.tool_limits
            if self.joint_mode:
                q = rig.controller.target(arm.name).position
                part = {"joints": q + np.clip(self.aim[arm.name] - q, -0.45, 0.45)}
            else:
                scale = np.repeat([tool.speed / np.linalg.norm(push[:3]), tool.rotation / np.linalg.norm(push[3:])], 3)
                part = {"delta": push * scale * self.period * self.speed * rng.uniform(0.5, 1.0)}
            parts[arm.name] = ArmCommand(**part, gripper=rng.choice([np.nan, 0.0, 1.0, rng.random()]))
        return parts

    def command(self):
        rig, rng, x = self.rig, self.rng, self.rng.random()
        parts, name = self.parts(), rig.robot.arms[0].name
        if x > 0.12:
            return rig.command(parts, self.period)
        n = len(rig.robot.arms[0].joints)
        broken = [
            {name: ArmCommand(delta=np.full(6, np.nan))},
            {name: ArmCommand(delta=np.array([0, np.inf, 0, 0, 0, 0]))},
            {name: ArmCommand(joints=np.full(n, np.nan))},
            {name: ArmCommand(joints=np.zeros(n + 1))},
            {name: ArmCommand(delta=np.zeros(7))},
            {name: ArmCommand(delta=rng.normal(size=6) * 10)},
            {name: ArmCommand(joints=rng.normal(size=n) * 10)},
            {"other": ArmCommand(delta=np.zeros(6))},
            {name: ArmCommand()},
            {name: ArmCommand(delta=np.zeros(6), gripper=rng.choice([-9.0, np.inf]))},
        ]
        return rng.choice(
            [
                lambda: rig.command(parts | broken[rng.integers(len(broken))]),
                lambda: rig.command(parts, age=rng.choice([0.5, -0.5, 1e9, np.nan])),
                lambda: rig.command(parts, period=rng.choice([1e-12, 1e-6, 1e-3, 0.7, 1.0, 1e9, -1.0, np.nan, np.inf])),
                lambda: rig.command(parts, sequence=int(rng.integers(0, 5))),
                lambda: rig.command(parts, frame="elsewhere"),
                lambda: rig.command(parts, source="other"),
                lambda: rig.command({}, hold=True),
            ]
        )()


@pytest.mark.parametrize("name", ["panda", "aloha"])
def test_no_limit_is_broken_by_fuzzed_commands(name, request, make_rig):
    rig = make_rig(request.getfixturevalue(name))
    Attacker(rig, 1).run(STEPS[name])
    states = {d.state for d in rig.history}
    assert states >= {State.DISARMED, State.ARMED, State.HOLDING, State.RUNNING, State.STOPPING, State.STOPPED}
    assert State.FAULT not in states
    assert sum(d.state == State.RUNNING for d in rig.history) > 0.3 * STEPS[name]
    assert rig.controller.refusals.keys() >= {
        "arms", "frame", "gripper", "jump", "not_finite", "order", "period", "size", "stale", "stamp", "state",
    }  # fmt: skip
