"""Image encoders and the language embedding: small, trained from scratch, quick on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LanguageEncoder(nn.Module):
    """Word embeddings with positions, pooled by learned attention, and a small MLP.

    vocabulary: number of words with the padding (0: no language, a constant learned vector). context: words at most.
    """

    def __init__(self, vocabulary: int, context: int, width: int):
        super().__init__()
        self.words = nn.Embedding(max(vocabulary, 1), width)
        self.positions = nn.Parameter(torch.randn(context, width) * 0.02)
        self.score = nn.Linear(width, 1)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, context) int64, 0 padded -> (B, width)."""
        words = self.words(tokens) + self.positions
        score = self.score(torch.tanh(words)).squeeze(-1)
        # The first place always counts, so that an empty instruction pools the padding word and not nothing.
        score = score - 1e4 * (tokens == 0).to(score) * (torch.arange(tokens.shape[1], device=tokens.device) > 0)
        return self.mlp((torch.softmax(score, -1).unsqueeze(1) @ words).squeeze(1))


class FilmBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions; the condition scales and shifts its hidden features."""

    def __init__(self, channels: int, condition: int, groups: int = 8):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(condition, 2 * channels)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, 1)
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return x + self.conv2(nn.functional.silu(h))


class FilmEncoder(nn.Module):
    """(B, 3, h, w) in [0, 1] and a condition (B, c) -> a feature map (B, channels[1], h/8, w/8).

    A stem of stride 4 (8x8 kernel) and one of stride 2, each followed by residual blocks under FiLM (Perez et al.,
    arXiv 1709.07871). blocks: residual blocks after each of the two.
    """

    def __init__(self, channels: tuple[int, int], blocks: tuple[int, int], condition: int):
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 8, stride=4, padding=2)
        self.early = nn.ModuleList(FilmBlock(channels[0], condition) for _ in range(blocks[0]))
        self.down = nn.Conv2d(channels[0], channels[1], 3, stride=2, padding=1)
        self.late = nn.ModuleList(FilmBlock(channels[1], condition) for _ in range(blocks[1]))
        self.norm = nn.GroupNorm(8, channels[1])

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        x = self.stem((image - 0.5) * 4.0)
        for block in self.early:
            x = block(x, condition)
        x = self.down(nn.functional.silu(x))
        for block in self.late:
            x = block(x, condition)
        return nn.functional.silu(self.norm(x))


class SpatialSoftmax(nn.Module):
    """Feature map -> expected image coordinates of `points` learned keypoints (Levine et al., arXiv 1504.00702).

    Returns (B, points, 2), x and y from -1 to 1. sharpness: whether each keypoint learns a factor of its own before
    the softmax.
    """

    def __init__(self, channels: int, points: int, size: tuple[int, int], sharpness: bool = True):
        super().__init__()
        self.heat = nn.Conv2d(channels, points, 1)
        self.sharpness = nn.Parameter(torch.ones(points, 1)) if sharpness else 1.0
        y, x = torch.meshgrid(torch.linspace(-1, 1, size[0]), torch.linspace(-1, 1, size[1]), indexing="ij")
        self.register_buffer("grid", torch.stack([x.flatten(), y.flatten()], -1), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        heat = self.heat(features).flatten(2) * self.sharpness
        return torch.softmax(heat, -1) @ self.grid


class ResidualBlock(nn.Module):
    """ResNet's basic block with group instead of batch normalisation, so that training and use do not differ."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, channels)
        self.skip = (
            nn.Identity() if stride == 1 and channels_in == channels else nn.Conv2d(channels_in, channels, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.relu(self.norm1(self.conv1(x)))
        return nn.functional.relu(self.skip(x) + self.norm2(self.conv2(h)))


class SmallResNet(nn.Module):
    """(B, 3, h, w) in [0, 1] -> (B, channels[-1], h/s, w/s), s = 4 * 2**(len(channels) - 1).

    ResNet (He et al., arXiv 1512.03385) with a stem of stride 4, `blocks` basic blocks a stage, the first of each
    stage but the first with stride 2.
    """

    def __init__(self, channels: tuple[int, ...], blocks: int):
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 8, stride=4, padding=2, bias=False)
        self.norm = nn.GroupNorm(8, channels[0])
        stages, before = [], channels[0]
        for i, width in enumerate(channels):
            for j in range(blocks):
                stages.append(ResidualBlock(before, width, 2 if i > 0 and j == 0 else 1))
                before = width
        self.stages = nn.Sequential(*stages)

    def forward(self, image: Tensor) -> Tensor:
        return self.stages(nn.functional.relu(self.norm(self.stem((image - 0.5) * 4.0))))
