"""Commands that are not whole, or made for another robot, are refused by name."""

import numpy as np
import pytest
from vla_control.command import ArmCommand, Command, CommandRefused, check

WHOLE = ArmCommand(delta=np.zeros(6))


def command(arms=None, **fields):
    fields = {"stamp": 1.0, "sequence": 1, "source": "test", "period": 0.01} | fields
    return Command(arms={"arm": WHOLE} if arms is None else arms, **fields)


BAD = {
    "stamp": [command(stamp=np.nan), command(stamp=np.inf)],
    "period": [command(period=p) for p in (0.0, -0.01, np.nan, np.inf, 1.5)],
    "frame": [command(frame="tool")],
    "arms": [command({}), command({"left": WHOLE}), command({"arm": WHOLE, "left": WHOLE})],
    "size": [
        command({"arm": ArmCommand()}),
        command({"arm": ArmCommand(delta=np.zeros(6), joints=np.zeros(7))}),
        command({"arm": ArmCommand(delta=np.zeros(5))}),
        command({"arm": ArmCommand(delta=np.zeros((6, 1)))}),
        command({"arm": ArmCommand(joints=np.zeros(6))}),
    ],
    "not_finite": [
        command({"arm": ArmCommand(delta=np.array([np.nan, 0, 0, 0, 0, 0]))}),
        command({"arm": ArmCommand(joints=np.full(7, np.inf))}),
        command({"arm": ArmCommand(delta=np.zeros(6), gripper=np.inf)}),
    ],
    "gripper": [command({"arm": ArmCommand(delta=np.zeros(6), gripper=g)}) for g in (-0.2, 1.2)],
}


@pytest.mark.parametrize("code, bad", [(code, bad) for code, cases in BAD.items() for bad in cases])
def test_a_bad_command_is_refused_with_its_code(panda, code, bad):
    with pytest.raises(CommandRefused, match="expected .* found") as refusal:
        check(bad, panda)
    assert refusal.value.code == code


@pytest.mark.parametrize(
    "good",
    [
        command(),
        command(frame="world"),
        command({"arm": ArmCommand(joints=np.zeros(7), gripper=0.3)}),
        command({}, hold=True),
    ],
)
def test_a_whole_command_passes(panda, good):
    check(good, panda)
