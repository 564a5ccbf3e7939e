"""The unified vector of RDT-1B (arXiv 2410.07864, appendix C): 128 numbers in which each quantity of any robot has a
place of its own, with a mask of the places that a robot fills.

    right arm   0 joints (10)  10 gripper (5)  15 joint and 25 gripper velocities
                30 position of the tool (3)  33 its rotation (6D)  39 linear and 42 angular velocity
    left arm    the same, 50 later
    base        100 velocity along x and y, 102 around z

Units as ours: rad, m, openings from 0 to 1; a single arm is the right one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vla_models.policy import PolicyError, PolicySpec

SIZE = 128
#: Places of the right arm: quantity -> (first, count).
PLACES = {"joints": (0, 10), "gripper": (10, 5), "position": (30, 3), "rotation": (33, 6)}
LEFT = 50
#: Velocities of the base; and a place that RDT leaves free, for the gripper a base does not have.
BASE, FREE = (100, 101, 102), 103


def sides(arms: Sequence[str]) -> dict[str, str]:
    """Arm -> "right", "left" or "base". An arm called "base" is the base, two others say in their names which they are.

    Raises PolicyError for arms that have no place.
    """
    others = [arm for arm in arms if arm != "base"]
    found = {arm: next((side for side in ("left", "right") if side in arm.lower()), "") for arm in others}
    if len(others) == 1:
        found = dict.fromkeys(others, "right")
    elif sorted(found.values()) != ["left", "right"]:
        raise PolicyError(f"arms: expected one, or a left and a right one by their names, and 'base', found {others}")
    return {arm: found.get(arm, "base") for arm in arms}


def unified_places(spec: PolicySpec, what: str) -> tuple[int, ...]:
    """Place of each number of the state vector (what "state") or of an action ("action").

    A base is an arm of three joints, whose numbers are its velocities (m/s, m/s, rad/s); its gripper is a number that
    means nothing. Raises PolicyError for what has no place.
    """
    kind = spec.state if what == "state" else spec.action_space.kind
    rotation = "rot6d" if what == "state" else spec.action_space.rotation
    if kind not in ("pose", "joint"):
        raise PolicyError(f"policy {spec.name}: {what}: expected 'pose' or 'joint', found {kind!r}")
    if kind == "pose" and rotation != "rot6d":
        raise PolicyError(f"policy {spec.name}: action_space.rotation: expected 'rot6d', found {rotation!r}")
    places: list[int] = []
    for arm, side in sides(spec.arms).items():
        joints = len(spec.joints.get(arm, ()))
        if what == "action" and kind == "joint":
            joints = spec.action_space.joints[spec.arms.index(arm)]
        if side == "base":
            if kind != "joint" or joints != len(BASE):
                raise PolicyError(
                    f"policy {spec.name}: arm 'base': expected 3 joints (velocities in x, y and yaw), found {joints}"
                )
            places += [*BASE, FREE]
            continue
        if kind == "joint" and joints > PLACES["joints"][1]:
            raise PolicyError(f"policy {spec.name}: arm {arm!r}: expected at most 10 joints, found {joints}")
        counts = {"joints": joints} if kind == "joint" else {"position": 3, "rotation": 6}
        for name, count in (counts | {"gripper": 1}).items():
            first = PLACES[name][0] + (LEFT if side == "left" else 0)
            places += range(first, first + count)
    return tuple(places)


class Unified(nn.Module):
    """From the numbers of a robot to the unified vector and back.

    places: of the robot's D numbers (unified_places). A "wide" vector (..., 128) has those numbers first, in the
    robot's order, and the rest of the places behind them; it is the unified vector in another order.
    """

    def __init__(self, places: Sequence[int]):
        super().__init__()
        order = [*places, *(place for place in range(SIZE) if place not in places)]
        mask = torch.zeros(SIZE)
        mask[[place for place in places if place != FREE]] = 1.0
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("inverse", torch.tensor(order).argsort(), persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def spread(self, values: Tensor) -> Tensor:
        """The robot's numbers (..., D) to the unified vector (..., 128), 0 where the robot has nothing."""
        return self.of_wide(nn.functional.pad(values, (0, SIZE - values.shape[-1]))) * self.mask

    def of_wide(self, wide: Tensor) -> Tensor:
        return wide[..., self.inverse]

    def to_wide(self, unified: Tensor) -> Tensor:
        return unified[..., self.order]
