"""What kinds of action heads do when the demonstrations know two ways: keep both, or go between them.

    ./vla bench modes [plot:=FILE.png] [out:=FILE]

One observation, and demonstrations that go left as often as right (a fork). The tiny policy of each kind is trained on
them and then asked 48 times. `left`, `right`: part of the chunks that end near one of the two ways; `between`: near
the mean of both, where no demonstration has ever been.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vla_models import policy_class
from vla_models.policy import ModelInputs, example_spec
from vla_models.torch_policy import Batch, Inputs

#: Recipes that stand for the kinds of heads, with optimisation steps and learning rate.
KINDS = {
    "discrete tokens (rt2)": ("rt2", 150, 3e-3),
    "diffusion (diffusion_policy)": ("diffusion_policy", 300, 2e-3),
    "flow matching (flow)": ("flow", 300, 3e-3),
    "CVAE, z from its prior (act)": ("act", 400, 3e-3),
    "regression (openvla_oft)": ("openvla_oft", 150, 3e-3),
}
ASKED, BATCH = 48, 16


def fork(recipe: str, steps: int, rate: float, seed: int = 0) -> np.ndarray:
    """Chunks (ASKED, H) of the first joint that a tiny policy gives after training on the fork."""
    torch.manual_seed(seed)
    kind = policy_class(recipe)
    example, network = kind.preset("tiny")
    spec = replace(
        example_spec(recipe, arms={"arm": 1}, cameras=dict(example.cameras)),
        **{f: getattr(example, f) for f in ("horizon", "steps", "history", "tokenizer", "prompt", "context", "padding",
                                            "optional", "guidance", "prefix_limit")},
        temperature=1.0,
    )  # fmt: skip
    from vla_models import identity_normalizers

    if recipe == "act":
        network = replace(network, kl_weight=0.1, dropout=0.0)
    policy = kind(spec, identity_normalizers(spec), network)
    ways = np.zeros((BATCH, spec.horizon, spec.action_dim), np.float32)
    ways[:, :, 0] = np.where(np.arange(BATCH) % 2, 0.8, -0.8)[:, None] * np.arange(1, spec.horizon + 1) / spec.horizon
    seen = one_observation(policy)
    batch = Batch(tensors(policy, seen, BATCH), torch.from_numpy(ways), torch.zeros(BATCH, spec.horizon, dtype=bool))
    optimizer = torch.optim.AdamW(policy.network.parameters(), lr=rate, weight_decay=0.0)
    policy.network.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - 0.95 * step / steps)
        optimizer.zero_grad()
        policy.loss(batch, torch.Generator().manual_seed(seed * 10_000 + step))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(policy.network.parameters(), 1.0)
        optimizer.step()
    policy.network.eval()
    return np.stack(list(answers(policy, recipe, seen, seed)))


def answers(policy: Any, recipe: str, seen: ModelInputs, seed: int) -> Iterator[np.ndarray]:
    """The first joint of one chunk after another, each with noise of its own."""
    rng = np.random.default_rng(seed)
    for _ in range(ASKED):
        noise = rng.standard_normal(policy.noise_shape).astype(np.float32)
        if recipe == "act":  # in use z is 0; here it comes from its prior
            with torch.no_grad():
                latent = torch.from_numpy(rng.standard_normal((1, policy.config.latent)).astype(np.float32))
                yield policy.network(tensors(policy, seen, 1), latent).numpy()[0, :, 0]
        else:
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


def tensors(policy: Any, seen: ModelInputs, count: int) -> Inputs:
    """The same observation `count` times."""
    one = policy.tensors(seen)
    return Inputs(tuple(i.repeat(count, *[1] * (i.ndim - 1)) for i in one.images),
                  *(part.repeat(count, *[1] * (part.ndim - 1)) for part in one[1:]))  # fmt: skip


def shares(chunks: np.ndarray) -> dict[str, float]:
    """Part of the chunks (n, H) that end left (near -0.8), right (near 0.8) and between."""
    ends = chunks[:, -1]
    return {
        "left": float((ends < -0.5).mean()),
        "right": float((ends > 0.5).mean()),
        "between": float((np.abs(ends) < 0.3).mean()),
    }


def plot(found: dict[str, np.ndarray], path: Path) -> None:
    """One panel a kind: the chunks it gave, and the two ways of the demonstrations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(found), 3.0), layout="constrained")
    for axes, (label, chunks) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        time = np.arange(1, chunks.shape[1] + 1) / chunks.shape[1]
        axes.plot(time, chunks.T, color="tab:blue", alpha=0.3, linewidth=1)
        for side in (-0.8, 0.8):
            axes.plot(time, side * time, "k--", linewidth=1)
        axes.set_title(label.replace(" (", "\n("), fontsize=9)
        axes.set_xlabel("part of the chunk")
        axes.set_ylim(-1.2, 1.2)
    figure.axes[0].set_ylabel("first action")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, default=None, help="PNG file to draw (default none)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write (default none)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found, report = {}, {"benchmark": "modes", "asked": ASKED, "kinds": {}}
    print(f"{'kind of head':32}{'left':>8}{'right':>8}{'between':>9}")
    for label, (recipe, steps, rate) in KINDS.items():
        found[label] = fork(recipe, steps, rate)
        s = report["kinds"][label] = shares(found[label])
        print(f"{label:32}{s['left']:8.0%}{s['right']:8.0%}{s['between']:9.0%}", flush=True)
    if given.plot:
        plot(found, given.plot)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
