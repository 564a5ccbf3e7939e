"""A fork: one observation, and demonstrations that go left as often as right.

What a tiny policy does after training on it shows its kind of head: one that describes a distribution keeps both ways,
one that gives the best single answer does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from vla_models import identity_normalizers, policy_class
from vla_models.policy import ModelInputs, example_spec
from vla_models.torch_policy import Batch, Inputs

#: Chunks that are asked for, and where the two ways of the first joint end.
ASKED, END = 48, 0.8
#: Fields of a tiny preset's specification that belong to the system, not to its robot.
CONTRACT = ("horizon", "steps", "history", "tokenizer", "prompt", "context", "padding", "optional", "guidance",
            "prefix_limit")  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of head and the recipe that stands for it.

    steps, rate, batch: of the optimisation. network, spec: settings that differ from those of the recipe's tiny preset.
    """

    recipe: str
    steps: int
    rate: float
    batch: int = 16
    network: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "discrete tokens": Kind("rt2", 80, 1e-2),
    # Each chunk has noise and a time of its own, so that many of them are wanted; a low crop is quick.
    "diffusion": Kind("diffusion_policy", 200, 3e-3, 64, {"crop": (8, 34)}, {"steps": 10}),
    "flow matching": Kind("flow", 200, 3e-3, network={"samples": 8}, spec={"steps": 10}),
    # z is drawn here; in use it is 0, its prior's mean. At the paper's weight of 10 z would say nothing.
    "CVAE": Kind("act", 300, 3e-3, network={"kl_weight": 0.05, "latent": 2, "dropout": 0.0}),
    "regression": Kind("openvla_oft", 60, 3e-3),
}


def fork(kind: Kind, seed: int = 0) -> np.ndarray:
    """Chunks (ASKED, H) of the first joint that a tiny policy gives after training on the fork."""
    torch.manual_seed(seed)
    policy = make_policy(kind)
    count, horizon = kind.batch, policy.spec.horizon
    ways = np.zeros((count, horizon, policy.spec.action_dim), np.float32)
    ways[:, :, 0] = np.where(np.arange(count) % 2, END, -END)[:, None] * np.arange(1, horizon + 1) / horizon
    seen = one_observation(policy)
    batch = Batch(repeated(policy, seen, count), torch.from_numpy(ways), torch.zeros(count, horizon, dtype=torch.bool))
    optimizer = torch.optim.AdamW(policy.network.parameters(), lr=kind.rate, weight_decay=0.0)
    policy.network.train()
    for step in range(kind.steps):
        for group in optimizer.param_groups:
            group["lr"] = kind.rate * (1 - 0.95 * step / kind.steps)
        optimizer.zero_grad()
        policy.loss(batch, torch.Generator().manual_seed(seed * 10_000 + step))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(policy.network.parameters(), 1.0)
        optimizer.step()
    policy.network.eval()
    return np.stack(list(answers(policy, seen, seed)))


def make_policy(kind: Kind) -> Any:
    """The recipe's tiny policy for an arm of one joint, with random weights."""
    recipe = policy_class(kind.recipe)
    example, network = recipe.preset("tiny")
    contract = {name: getattr(example, name) for name in CONTRACT} | {"temperature": 1.0} | kind.spec
    spec = replace(example_spec(kind.recipe, arms={"arm": 1}, cameras=dict(example.cameras)), **contract)
    return recipe(spec, identity_normalizers(spec), replace(network, **kind.network))


def answers(policy: Any, seen: ModelInputs, seed: int) -> Iterator[np.ndarray]:
    """The first joint of one chunk after another, each with noise of its own."""
    rng = np.random.default_rng(seed)
    for _ in range(ASKED):
        if latent := getattr(policy.config, "latent", 0):  # a CVAE's z: the policy takes 0, here it is drawn
            z = torch.from_numpy(rng.standard_normal((1, latent)).astype(np.float32))
            with torch.no_grad():
                yield policy.network(policy.tensors(seen), z).numpy()[0, :, 0]
        else:
            noise = rng.standard_normal(policy.noise_shape).astype(np.float32)
            yield policy.run(seen, noise, None, {})[0, :, 0]
        policy.reset()


def one_observation(policy: Any) -> ModelInputs:
    """Grey images and a state of zeros."""
    spec = policy.spec
    time = (spec.history,) if spec.history > 1 else ()
    images = tuple(np.full((1, *time, 3, *size), 0.5, np.float32) for size in spec.cameras.values())
    state = np.zeros((1, *time, spec.state_dim), np.float32)
    tokens = policy.processor.tokens(spec.example_instruction, np.zeros(spec.state_dim))[None]
    return ModelInputs(images, tokens, state, np.ones((1, len(images)), bool))


def repeated(policy: Any, seen: ModelInputs, count: int) -> Inputs:
    """The same observation `count` times."""
    one = policy.tensors(seen)
    return Inputs(tuple(image.repeat_interleave(count, 0) for image in one.images),
                  *(part.repeat_interleave(count, 0) for part in one[1:]))  # fmt: skip


def shares(chunks: np.ndarray) -> dict[str, float]:
    """Part of the chunks (n, H) that end left (below -0.5), right (above 0.5) and between (within 0.3 of 0)."""
    ends = chunks[:, -1]
    return {
        "left": float((ends < -0.5).mean()),
        "right": float((ends > 0.5).mean()),
        "between": float((np.abs(ends) < 0.3).mean()),
    }
