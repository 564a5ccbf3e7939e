"""A conditional variational auto-encoder over chunks of actions: its latent and its losses (ACT, arXiv 2304.13705)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vla_models.torch_policy import Batch


def read_latent(
    blocks: Iterable[nn.Module], out: nn.Module, tokens: Tensor, actions: Tensor, padded: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and log variance of z, (B, latent) each, which `out` reads off the first token behind DETR's blocks.

    tokens (B, n, width): of what was seen. actions (B, H, width): tokens of what was done, of which those `padded`
    (B, H) do not count. places (n + H, width): embedding of their order.
    """
    mask = torch.cat([padded.new_zeros(tokens.shape[:2]), padded], 1)
    x = torch.cat([tokens, actions], 1)
    for block in blocks:
        x = block(x, places, mask)
    mean, log_variance = out(x[:, 0]).chunk(2, -1)
    return mean, log_variance


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
