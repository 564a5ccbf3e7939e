"""Policies that denoise: what a network of a diffusion policy owes, and how its chunks are sampled and guided."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_models.diffusion import diffusion_guidance, sample_diffusion
from vla_models.policy import ChunkPrefix, ModelInputs
from vla_models.torch_policy import TorchPolicy


class DenoisingPolicy(TorchPolicy):
    """A policy that undoes a diffusion, from noise to actions.

    Its network has `diffusion` (a vla_models.diffusion.Diffusion), `encode(inputs) -> context`, run once for a chunk
    (a tensor, or a tuple of tensors), and `denoise(context, x, t) -> prediction`, x (B, L, W), t (B,) int64 from 0
    (nearly clean) to T - 1. Where they differ from the chunk's own it states `width`, W numbers an action, `length`, L
    actions, and `past`, those of them before the observation's time.

    The noise is (1 + draws, L, W): the sampler's first state, then what DDPM adds after each step but the last.
    "guided" is Real-Time Chunking with the true vector-Jacobian product of the estimated clean actions (see
    vla_models.diffusion.RtcDiffusionGuidance), "prefix" inpainting, which needs no training.
    """

    @property
    def noise_shape(self) -> tuple[int, ...]:
        network, spec = self.network, self.spec
        length, width = getattr(network, "length", spec.horizon), getattr(network, "width", spec.action_dim)
        return (1 + network.diffusion.draws(self.steps), length, width)

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        start = time.perf_counter()
        network, past = self.network, getattr(self.network, "past", 0)
        states = torch.from_numpy(noise).to(self.device).unsqueeze(1)
        with torch.no_grad():
            context = network.encode(self.tensors(inputs))
            encoded = time.perf_counter()
            sample = sample_diffusion(
                denoise_of(network, context),
                network.diffusion,
                states[0],
                states[1:],
                self.steps,
                diffusion_guidance(prefix, past, noise.shape[1]),
            )
        actions = sample[:, past : past + self.spec.horizon].float().cpu().numpy()
        timings["encode"] = encoded - start
        timings["sample"] = time.perf_counter() - encoded
        return actions


def denoise_of(network: Any, context: Any):
    """The network of a DenoisingPolicy as the sampler wants it: denoise(x, t), t an int or a tensor (B,)."""

    def denoise(x: Tensor, t) -> Tensor:
        if not isinstance(t, Tensor):
            t = torch.full((x.shape[0],), int(t), dtype=torch.int64, device=x.device)
        return network.denoise(context, x, t)

    return denoise


def draw_noise(network: Any, actions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For training: noise shaped as `actions` and times t (B,), each equally likely."""
    noise = torch.randn(actions.shape, generator=generator).to(actions)
    t = torch.randint(0, network.diffusion.steps, (len(actions),), generator=generator).to(actions.device)
    return noise, t


def denoising_loss(network: Any, context: Any, actions: Tensor, noise: Tensor, t: Tensor, padded: Tensor) -> Tensor:
    """Mean square of what the network says less what it should say, over the actions that are not padded.

    actions, noise: (B, L, W). t: (B,) int64. padded: (B, L) bool.
    """
    diffusion = network.diffusion
    said = network.denoise(context, diffusion.noisy(actions, noise, t), t)
    error = (said - diffusion.target(actions, noise, t)).square().mean(-1)
    inside = (~padded).to(error)
    return (error * inside).sum() / inside.sum().clamp_min(1)
