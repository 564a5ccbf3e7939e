"""A U-Net over time (1D convolutions) with FiLM, as Diffusion Policy has it (Chi et al., arXiv 2303.04137)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_block(channels_in: int, channels: int, kernel: int, groups: int) -> nn.Sequential:
    """(B, channels_in, L) -> (B, channels, L): convolution, group norm, Mish."""
    return nn.Sequential(
        nn.Conv1d(channels_in, channels, kernel, padding=kernel // 2), nn.GroupNorm(groups, channels), nn.Mish()
    )


class FilmBlock1d(nn.Module):
    """Residual block of two convolutions; the condition shifts, and with `scale` also scales, the features between
    (FiLM, Perez et al., arXiv 1709.07871)."""

    def __init__(self, channels_in: int, channels: int, condition: int, kernel: int, groups: int, scale: bool):
        super().__init__()
        self.scale = scale
        self.conv1 = conv_block(channels_in, channels, kernel, groups)
        self.film = nn.Linear(condition, 2 * channels if scale else channels)
        self.conv2 = conv_block(channels, channels, kernel, groups)
        self.skip = nn.Identity() if channels_in == channels else nn.Conv1d(channels_in, channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, channels_in, L), condition (B, condition) -> (B, channels, L)."""
        film = self.film(nn.functional.mish(condition)).unsqueeze(-1)
        h = self.conv1(x)
        if self.scale:
            scale, shift = film.chunk(2, 1)
            h = scale * h + shift
        else:
            h = h + film
        return self.conv2(h) + self.skip(x)


class ConditionalUnet1d(nn.Module):
    """x (B, L, width), condition (B, condition) -> (B, L, width).

    channels: of each level; L must be a multiple of 2**(levels - 1). kernel, groups: of the convolutions and their
    group norms. scale: whether FiLM also scales.
    """

    def __init__(
        self,
        width: int,
        condition: int,
        channels: tuple[int, ...],
        kernel: int = 5,
        groups: int = 8,
        scale: bool = True,
    ):
        super().__init__()
        self.factor = 2 ** (len(channels) - 1)

        def block(channels_in: int, channels_out: int) -> FilmBlock1d:
            return FilmBlock1d(channels_in, channels_out, condition, kernel, groups, scale)

        pairs = list(zip((width, *channels[:-1]), channels, strict=True))
        self.down = nn.ModuleList(nn.ModuleList([block(a, b), block(b, b)]) for a, b in pairs)
        self.shrink = nn.ModuleList(nn.Conv1d(b, b, 3, 2, 1) for b in channels[:-1])
        self.middle = nn.ModuleList(block(channels[-1], channels[-1]) for _ in range(2))
        self.up = nn.ModuleList(nn.ModuleList([block(2 * b, a), block(a, a)]) for a, b in reversed(pairs[1:]))
        self.grow = nn.ModuleList(nn.ConvTranspose1d(a, a, 4, 2, 1) for a, _ in reversed(pairs[1:]))
        self.last = conv_block(channels[0], channels[0], kernel, 8)
        self.out = nn.Conv1d(channels[0], width, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        skips = []
        for level, (first, second) in enumerate(self.down):
            x = second(first(x, condition), condition)
            if level < len(self.shrink):
                # The skip connection of the first level is not used: the paper's U-Net ends before it.
                skips.append(x)
                x = self.shrink[level](x)
        skips = [*skips[1:], x]
        for block in self.middle:
            x = block(x, condition)
        for (first, second), grow in zip(self.up, self.grow, strict=True):
            x = grow(second(first(torch.cat([x, skips.pop()], 1), condition), condition))
        return self.out(self.last(x)).transpose(1, 2)
