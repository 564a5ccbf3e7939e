"""Transformer blocks of DETR (Carion et al., arXiv 2005.12872): post-norm, positions added to queries and keys only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla_models.parts.attention import Attention


class EncoderBlock(nn.Module):
    """Self-attention and MLP. mask: keys to leave out (see `attend`)."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.attention = Attention(width, heads)
        self.mlp = _mlp(width, feedforward, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        placed = x + positions
        x = self.norms[0](x + self.dropout(self.attention(placed, placed, x, mask)))
        return self.norms[1](x + self.dropout(self.mlp(x)))


class DecoderBlock(nn.Module):
    """Self-attention of the queries, cross-attention to the memory, MLP. mask: keys of the memory to leave out."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.self_attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads)
        self.mlp = _mlp(width, feedforward, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, queries: Tensor, memory: Tensor, placed_memory: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        placed = x + queries
        x = self.norms[0](x + self.dropout(self.self_attention(placed, placed, x)))
        x = self.norms[1](x + self.dropout(self.cross_attention(x + queries, placed_memory, memory, mask)))
        return self.norms[2](x + self.dropout(self.mlp(x)))


def _mlp(width: int, feedforward: int, dropout: float) -> nn.Module:
    return nn.Sequential(nn.Linear(width, feedforward), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feedforward, width))


def sines(positions: Tensor, width: int) -> Tensor:
    """(N,) -> (N, width): sine and cosine in turn, wavelengths 2 pi to 2 pi 10^4 (Vaswani et al., arXiv 1706.03762)."""
    angles = positions[:, None] / 1e4 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
