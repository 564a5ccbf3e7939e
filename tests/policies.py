"""Tiny checkpoints for the system tests: policies that drift to one side, with a network of a few thousand numbers."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import yaml
from vla_core.actions import ActionSpace
from vla_models.checkpoint import Checkpoint, write_checkpoint, write_tensors
from vla_models.normalization import Normalizer
from vla_models.policy import PolicySpec

#: Long chunks, so that a busy machine does not run out of them.
HORIZON, PERIOD = 48, 0.05
#: Optimisation steps in which a tiny network learns which way two phrases mean.
STEPS = 100
NETWORK = {"width": 16, "layers": 1, "heads": 2, "channels": (4, 8), "blocks": (0, 0), "points": 4}


def write_policy(folder: Path, velocity: float = 0.0, **changes) -> Path:
    """Write a flow policy for the Panda with random weights; its tool drifts along y.

    Args:
        folder: of the checkpoint; its name is the policy's.
        velocity: of the tool along the base frame's y axis, m/s; what the network adds is about a millimetre.
        changes: fields of the PolicySpec that differ.
    """
    import torch
    from vla_models import build

    values = {
        "name": folder.name,
        "recipe": "flow",
        "cameras": {"scene": (48, 64), "wrist": (48, 64)},
        "arms": ("arm",),
        "state": "pose",
        "action_space": ActionSpace(("arm",), "pose", (), "chunk", "base", "rotvec"),
        "horizon": HORIZON,
        "period": PERIOD,
        "guidance": ("guided", "prefix"),
        "steps": 2,
        "vocabulary": ("", "the"),
        "prefix_limit": 8,
        "robot": "panda",
    }
    spec = PolicySpec(**(values | changes))
    # The drift is part of the normalisation: action k is expected at velocity * k * period from the anchor.
    offset = np.zeros((spec.horizon, spec.action_dim))
    offset[:, 1] = velocity * spec.period * np.arange(spec.horizon)
    scale = np.full_like(offset, 1e-3)
    if spec.action_space.kind == "pose":
        offset[:, -1], scale[:, 3:6] = 0.5, 2e-3
    normalizers = {
        "state": Normalizer("mean_std", np.zeros(spec.state_dim), np.ones(spec.state_dim)),
        "action": Normalizer("mean_std", offset, scale),
    }
    torch.manual_seed(0)
    policy = build(spec.recipe, NETWORK, spec=spec, normalizers=normalizers)
    rng = np.random.default_rng(0)
    weights = {
        name: value.numpy() if value.any() else rng.normal(0, 0.05, value.shape).astype(np.float32)
        for name, value in policy.network.state_dict().items()
    }
    write_checkpoint(Checkpoint(spec, normalizers, asdict(policy.config)), folder)
    write_tensors(folder / "model.safetensors", weights)
    return folder


def cut_short(folder: Path, source: Path) -> Path:
    """A copy of a checkpoint whose weights end in the middle."""
    folder.mkdir()
    (folder / "policy.json").write_bytes((source / "policy.json").read_bytes())
    weights = (source / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return folder


def describe(checkpoint: Path, **parameters) -> Path:
    """Write the policy description of a checkpoint beside it."""
    path = checkpoint.with_suffix(".yaml")
    values = {"checkpoint": str(checkpoint), "strategy": "rtc_guided", "execution_horizon": 8} | parameters
    path.write_text(yaml.safe_dump({"/**": {"ros__parameters": values}}))
    return path


def write_recipe(folder: Path, recipe: str, velocity: float = 0.03) -> Path:
    """Write a checkpoint of any recipe at its tiny size for the Panda, with random weights; its tool drifts along y.

    A chunk lasts 1.6 s whatever its horizon. What the network adds is about a millimetre.
    """
    policy = make_recipe(folder.name, recipe)
    spec = policy.spec
    offset = np.zeros((spec.horizon, spec.action_dim))
    offset[:, 1] = velocity * spec.period * (spec.lead + np.arange(spec.horizon))
    offset[:, -1] = 0.5
    if spec.action_space.rotation == "rot6d":
        offset[:, 3:9] = 1, 0, 0, 0, 1, 0
    return save(policy, folder, Normalizer("mean_std", offset, np.full_like(offset, 1e-3)))


def write_obedient(folder: Path, instruction: str, distance: float = 0.05) -> Path:
    """Write a checkpoint of the recipe "rth" that has learnt to go left and right along y, as its motion says.

    Which of the two it says itself is left to chance: nothing that it sees tells.

    Args:
        folder: of the checkpoint; its name is the policy's.
        instruction: the only one it has ever read.
        distance: that a chunk goes, m.
    """
    import torch
    from vla_models.torch_policy import Batch, Inputs

    policy = make_recipe(folder.name, "rth")
    spec, count = policy.spec, 2
    scale = np.full(spec.action_dim, 1e-3)
    scale[1] = distance
    offset = np.zeros(spec.action_dim)
    offset[-1] = 0.5
    normalizer = policy.processor.action = Normalizer("mean_std", offset, scale)
    tokens = torch.from_numpy(policy.processor.tokens(instruction, np.zeros(spec.state_dim))).repeat(count, 1)
    state = torch.zeros(count, spec.state_dim)
    state[:, -1] = 0.5
    actions = torch.zeros(count, spec.horizon, spec.action_dim)
    actions[:, :, 1] = torch.tensor([1.0, -1.0] * (count // 2)).unsqueeze(1)
    past, present = torch.zeros(count, spec.horizon, dtype=torch.bool), torch.ones(count, len(spec.cameras)).bool()
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(policy.network.parameters(), 5e-3)
    for _ in range(STEPS):
        images = tuple(torch.rand(count, 3, *size, generator=generator) for size in spec.cameras.values())
        loss = policy.loss(Batch(Inputs(images, tokens, state, present), actions, past), generator)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return save(policy, folder, normalizer)


def save(policy, folder: Path, action: Normalizer) -> Path:
    """Write the checkpoint of a policy, with another normaliser of its actions."""
    normalizers = {"state": policy.processor.state, "action": action}
    write_checkpoint(Checkpoint(policy.spec, normalizers, asdict(policy.config)), folder)
    write_tensors(folder / "model.safetensors", {k: v.numpy() for k, v in policy.network.state_dict().items()})
    return folder


def make_recipe(name: str, recipe: str):
    """A policy of any recipe at its tiny size for the Panda, with random weights; a chunk lasts 1.6 s."""
    import torch
    from vla_core.robot import load_robot
    from vla_models import identity_normalizers, policy_class

    kind = policy_class(recipe)
    example, network = kind.preset("tiny")
    rotation = "rot6d" if recipe == "rdt" else "rotvec"  # the unified vector of RDT knows no other
    names = dict(zip(example.cameras, ("scene", "wrist", *list(example.cameras)[2:]), strict=False))
    spec = replace(
        example,
        name=name,
        cameras={names[camera]: size for camera, size in example.cameras.items()},
        optional=tuple(names[camera] for camera in example.optional),
        arms=("arm",),
        joints={"arm": load_robot("panda").arms[0].joints},
        state="pose",
        action_space=ActionSpace(("arm",), "pose", (), "chunk", "base", rotation),
        vocabulary=("", "the") if example.vocabulary else (),
        period=1.6 / example.horizon,
        fit="pad",
        robot="panda",
    )
    torch.manual_seed(0)
    return kind(spec, identity_normalizers(spec), network)
