"""The contract between a policy and a robot, checked before the policy may drive.

A policy that was trained for other cameras, another arm or another action space would move the robot in ways that
nobody meant; every mismatch is named, in one message.
"""

from __future__ import annotations

from vla_core.robot import Robot
from vla_models.policy import ASPECT_TOLERANCE


class ContractError(ValueError):
    """A policy and a robot that do not fit; the message lists every mismatch as expected and found."""


def mismatches(spec, robot: Robot) -> list[str]:
    """What keeps `spec` (vla_models.policy.PolicySpec) from driving `robot`; empty when nothing does."""
    found: list[str] = []
    arms = {arm.name: arm for arm in robot.arms}
    space = spec.action_space
    if tuple(space.arms) != robot.arm_names:
        found.append(f"arms: the policy drives {list(space.arms)}, the robot has {list(robot.arm_names)}")
    elif space.kind == "joint":
        for name, joints in zip(space.arms, space.joints):
            if joints != len(arms[name].joints):
                found.append(f"arm {name}: the policy drives {joints} joints, the robot has {len(arms[name].joints)}")
    for name in space.arms:
        if name in arms and arms[name].gripper is None:
            found.append(f"arm {name}: the policy drives a gripper, the robot has none")
    cameras = {camera.name: camera for camera in robot.cameras}
    for name, (height, width) in spec.cameras.items():
        camera = cameras.get(name)
        if camera is None and name in spec.optional:
            continue
        if camera is None:
            found.append(f"camera {name}: the policy needs it, the robot has {sorted(cameras)}")
        elif spec.fit == "stretch" and abs((camera.width / camera.height) / (width / height) - 1.0) > ASPECT_TOLERANCE:
            found.append(
                f"camera {name}: the policy was trained on images of {width}x{height}, "
                f"the robot gives {camera.width}x{camera.height}, another shape"
            )
    if spec.period < 1.0 / robot.rates.control - 1e-9:
        found.append(
            f"period: the policy acts every {spec.period:.4f} s, the robot is commanded every "
            f"{1.0 / robot.rates.control:.4f} s only"
        )
    if spec.length < 2:
        found.append(f"horizon: expected two actions or more a chunk, or a lead, found {spec.horizon}")
    return found


def check(spec, robot: Robot) -> None:
    """Raise ContractError unless `spec` fits `robot`."""
    found = mismatches(spec, robot)
    if found:
        raise ContractError(f"policy {spec.name} does not fit robot {robot.name}: " + "; ".join(found))
