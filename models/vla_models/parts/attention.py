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


class TransformerBlock(nn.Module):
    """Attention and MLP with the norms before them and tanh-GELU, as in GPT-2. `mask`: see `attend`."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float = 1e-5, dropout: float = 0.0):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=eps) for _ in range(2))
        self.attention = Attention(width, heads)
        self.mlp = mlp(width, hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norms[0](x)
        x = x + self.dropout(self.attention(h, h, h, mask))
        return x + self.dropout(self.mlp(self.norms[1](x)))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers between `widths`, with tanh-GELU in between."""
    parts = [nn.Linear(widths[0], widths[1])]
    for before, after in zip(widths[1:], widths[2:], strict=False):
        parts += [nn.GELU("tanh"), nn.Linear(before, after)]
    return nn.Sequential(*parts)


def waves(values: Tensor, width: int) -> Tensor:
    """(...) -> (..., width): cosines, then sines, with periods from 2 pi to nearly 2 pi 10^4 (arXiv 1706.03762)."""
    steps = torch.arange(width // 2, device=values.device, dtype=torch.float32) / (width // 2)
    angles = values.float().unsqueeze(-1) * 10000.0**-steps
    return torch.cat([angles.cos(), angles.sin()], -1)


def sinusoids(positions: Tensor, width: int, longest: float) -> Tensor:
    """Sine and cosine features of `positions` (...) -> (..., width); wavelengths 1 to
    `longest`."""
    steps = torch.arange(width // 2, device=positions.device, dtype=torch.float32) / max(width // 2 - 1, 1)
    angles = positions.unsqueeze(-1) * (2 * math.pi * longest ** (-steps))
    return torch.cat([angles.sin(), angles.cos()], -1)
