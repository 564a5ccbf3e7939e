"""A VQ-GAN's auto-encoder (Esser et al., arXiv 2012.09841): images to codes of a learnt codebook, and back.

The layout, and the names of tensors, are those of the published one (CompVis/taming-transformers). Trained here with
reconstruction and codebook losses (van den Oord et al., arXiv 1711.00937); the perceptual and adversarial losses of the
paper, which sharpen pictures, are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VqAutoencoder(nn.Module):
    """(B, 3, h, w) in [0, 1] <-> codes (B, h/f * w/f), row by row; f = 2 ** (len(multipliers) - 1).

    channels, multipliers: of the levels; blocks: residual blocks a level; codes, width: of the codebook. Attention at
    the coarsest level. The defaults are the published f = 16 with 1024 codes.
    """

    def __init__(
        self,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        codes: int = 1024,
        width: int = 256,
    ):
        super().__init__()
        self.factor = 2 ** (len(multipliers) - 1)
        self.encoder = Encoder(channels, multipliers, blocks, width)
        self.decoder = Decoder(channels, multipliers, blocks, width)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(codes, width)
        nn.init.uniform_(self.quantize.embedding.weight, -1 / codes, 1 / codes)
        self.quant_conv = nn.Conv2d(width, width, 1)
        self.post_quant_conv = nn.Conv2d(width, width, 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of codes of an image."""
        return height // self.factor, width // self.factor

    def features(self, image: Tensor) -> Tensor:
        """(B, width, rows, columns), before they are replaced by their codes."""
        return self.quant_conv(self.encoder(2 * image - 1))

    def nearest(self, features: Tensor) -> Tensor:
        """(B, width, rows, columns) -> codes (B, rows * columns) int64."""
        x, book = features.flatten(2).transpose(1, 2), self.quantize.embedding.weight
        return (book.square().sum(-1) - 2 * x @ book.T).argmin(-1)

    def encode(self, image: Tensor) -> Tensor:
        """Codes (B, rows * columns) int64. No gradient passes."""
        return self.nearest(self.features(image))

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images (B, 3, h, w) in [0, 1] of codes on a grid of rows and columns."""
        return self.render(self.quantize.embedding(codes).transpose(1, 2).unflatten(2, grid))

    def render(self, features: Tensor) -> Tensor:
        """Images of quantised features (B, width, rows, columns)."""
        return (self.decoder(self.post_quant_conv(features)) + 1) / 2

    def loss(self, image: Tensor, commitment: float = 0.25) -> Tensor:
        """Mean absolute error of the reconstruction, and squared distances of features and codes to each other."""
        features = self.features(image)
        chosen = self.quantize.embedding(self.nearest(features)).transpose(1, 2).unflatten(2, features.shape[2:])
        distance = (chosen - features.detach()).square().mean()
        distance = distance + commitment * (chosen.detach() - features).square().mean()
        back = self.render(features + (chosen - features).detach())  # straight through
        return (back - image).abs().mean() + distance


class ResidualBlock(nn.Module):
    """Two pre-activated 3x3 convolutions and a skip connection."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(channels_in), _norm(channels)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(nn.functional.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """One head of self-attention over all places."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, -1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each with attention at the coarsest, then a change of resolution."""

    def __init__(self, channels_in: int, channels: int, blocks: int, attention: bool, change: nn.Module | None):
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(channels_in if i == 0 else channels, channels) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(channels) for _ in range(blocks if attention else 0))
        name = "upsample" if isinstance(change, Upsample) else "downsample"
        setattr(self, name, change or nn.Identity())
        self.change = name

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        return getattr(self, self.change)(x)


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.block_2 = ResidualBlock(channels, channels), ResidualBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, channels: int, multipliers: tuple[int, ...], blocks: int, width: int):
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(before, own, blocks, i == last, Downsample(own) if i < last else None)
            for i, (before, own) in enumerate(zip([channels, *widths[:-1]], widths, strict=True))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(nn.functional.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, channels: int, multipliers: tuple[int, ...], blocks: int, width: int):
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(width, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(  # counted from the finest, as published
            Level(before, own, blocks + 1, i == last, Upsample(own) if i else None)
            for i, (before, own) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)
