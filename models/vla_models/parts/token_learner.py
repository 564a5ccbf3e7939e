"""TokenLearner (Ryoo et al., arXiv 2106.11297): a feature map becomes a few tokens, each with its own attention map."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenLearner(nn.Module):
    """(B, N, width) -> (B, tokens, width), version 1.1: maps from a two-layer MLP, softmax over the N places.

    bottleneck: hidden width of the MLP.
    """

    def __init__(self, width: int, tokens: int, bottleneck: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, bottleneck), nn.GELU(approximate="tanh"), nn.Linear(bottleneck, tokens)
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.softmax(self.mlp(self.norm(x)).transpose(1, 2), -1)
        return maps @ x
