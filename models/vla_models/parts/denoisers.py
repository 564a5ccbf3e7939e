"""Networks that denoise actions: the two of Diffusion Policy (arXiv 2303.04137) and Octo's (arXiv 2405.12213)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vla_models.parts.attention import Attention, sinusoids
from vla_models.parts.unet import ConditionalUnet1d


class UnetDenoiser(nn.Module):
    """Context (B, history, features), x (B, L, dim), t (B,) -> (B, L, dim): context and time are one condition.

    channels, kernel, groups, film_scale: see ConditionalUnet1d. width: features of the time.
    """

    def __init__(
        self,
        dim: int,
        features: int,
        history: int,
        channels: tuple[int, ...],
        kernel: int,
        groups: int,
        film_scale: bool,
        width: int,
    ):
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        condition = width + history * features
        self.unet = ConditionalUnet1d(dim, condition, channels, kernel, groups, film_scale)

    def forward(self, context: Tensor, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(_time_features(t, self.width)).expand(len(x), -1)
        return self.unet(x, torch.cat([time, context.flatten(1)], -1))


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention, MLP; pre-norm."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, later: Tensor, unseen: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.dropout(self.self_attention(h, h, h, later))
        x = x + self.dropout(self.cross_attention(self.norms[1](x), memory, memory, unseen))
        return x + self.dropout(self.mlp(self.norms[2](x)))


class TransformerDenoiser(nn.Module):
    """As `UnetDenoiser`; the actions attend to those before them, to the time, and to the observations until then.

    length: L. dropout: after attention and MLP (the paper's also drops attention weights).
    """

    def __init__(
        self, dim: int, features: int, history: int, length: int, width: int, layers: int, heads: int, dropout: float
    ):
        super().__init__()
        self.width = width
        self.action_in = nn.Linear(dim, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        self.context_in = nn.Linear(features, width)
        self.context_places = nn.Parameter(torch.zeros(1 + history, width))
        self.context_mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.action_out = nn.Linear(width, dim)
        step = torch.arange(length)
        self.register_buffer("later", step[None] > step[:, None], persistent=False)
        # Token 0 of the context is the time, token s the observation of step s - 1.
        self.register_buffer("unseen", torch.arange(1 + history)[None] - 1 > step[:, None], persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.places, std=0.02)
        nn.init.normal_(self.context_places, std=0.02)

    def forward(self, context: Tensor, x: Tensor, t: Tensor) -> Tensor:
        time = _time_features(t, self.width).unsqueeze(1).expand(len(x), -1, -1)
        memory = self.context_mlp(torch.cat([time, self.context_in(context)], 1) + self.context_places)
        h = self.action_in(x) + self.places
        for block in self.blocks:
            h = block(h, memory, self.later[None], self.unseen[None])
        return self.action_out(self.norm(h))


class MlpDenoiser(nn.Module):
    """What is said of all numbers of a chunk at once: time in learned Fourier features, then residual blocks.

    condition: width of what it is said for. size: numbers in a chunk. width, blocks: of the residual blocks. time:
    features of the time.
    """

    def __init__(self, condition: int, size: int, width: int, blocks: int, time: int):
        super().__init__()
        self.frequencies = nn.Parameter(0.2 * torch.randn(time // 2, 1))
        self.time = nn.Sequential(nn.Linear(time, 2 * time), nn.SiLU(), nn.Linear(2 * time, time))
        self.input = nn.Linear(time + condition + size, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * width), nn.SiLU(),
                          nn.Linear(4 * width, width))
            for _ in range(blocks)
        )  # fmt: skip
        self.output = nn.Sequential(nn.SiLU(), nn.Linear(width, size))

    def forward(self, context: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """context (B, condition), x (B, size), t (B,) -> (B, size)."""
        turns = 2 * math.pi * t.to(x).unsqueeze(-1) @ self.frequencies.T
        time = self.time(torch.cat([turns.cos(), turns.sin()], -1))
        h = self.input(torch.cat([time, context, x], -1))
        for block in self.blocks:
            h = h + block(h)
        return self.output(h)


def _time_features(t: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width): sines and cosines of t, wavelengths 2 pi to 2 pi 10^4."""
    return sinusoids(t.to(torch.float32) / (2 * math.pi), width, 1e4)
