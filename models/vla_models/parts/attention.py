"""Attention written out (no fused kernels): differentiates under torch.func, traces with make_fx, exports to ONNX."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, D) -> (B, heads, T, D/heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over (B, heads, T, d); heads joined again: (B, T, heads*d).

    mask: (B, T) bool, keys to leave out, or (B, Q, T) for each query its own (B may be 1).
    """
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] if mask.ndim == 2 else mask[:, None], -1e9)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention with its projections. `mask`: see `attend`. head_width: of one head; None: width/heads."""

    def __init__(self, width: int, heads: int, head_width: int | None = None):
        super().__init__()
        self.heads = heads
        inner = heads * head_width if head_width else width
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            split_heads(f(x), self.heads) for f, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        return self.out(attend(q, k, v, mask))


def sinusoids(positions: Tensor, width: int, longest: float) -> Tensor:
    """Sine and cosine features of `positions` (...) -> (..., width); wavelengths 1 to
    `longest`."""
    steps = torch.arange(width // 2, device=positions.device, dtype=torch.float32) / max(width // 2 - 1, 1)
    angles = positions.unsqueeze(-1) * (2 * math.pi * longest ** (-steps))
    return torch.cat([angles.sin(), angles.cos()], -1)
