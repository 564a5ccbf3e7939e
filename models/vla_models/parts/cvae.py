"""Losses of a conditional variational auto-encoder over chunks of actions (as in ACT, arXiv 2304.13705)."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_models.torch_policy import Batch


def draw_latent(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    """A sample of the posterior, (B, latent), through which gradients flow."""
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return mean + torch.exp(log_variance / 2) * noise


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of the posterior from the standard normal: sum over the latent, mean over the batch."""
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1).mean()


def mean_l1(actions: Tensor, batch: Batch) -> Tensor:
    """Mean absolute error of actions (B, H, dim) inside the episode."""
    inside = (~batch.padded).to(actions).unsqueeze(-1)
    return ((actions - batch.actions).abs() * inside).sum() / (inside.sum() * actions.shape[-1])
