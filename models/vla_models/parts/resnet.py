"""ResNet18 (He et al., arXiv 1512.03385) with torchvision's names of tensors, as ACT and Diffusion Policy have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORMS = ("group", "frozen_batch")
#: Channels of one group of the norm "group" (Diffusion Policy, arXiv 2303.04137, section III.B).
GROUP = 16


class FrozenBatchNorm(nn.Module):
    """Batch norm over (B, channels, h, w) whose scale, shift and statistics are constants, as after pretraining."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: str):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = _norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = _norm(norm, channels)
        self.downsample = None
        if stride > 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), _norm(norm, channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.relu(self.bn1(self.conv1(x)))
        skip = x if self.downsample is None else self.downsample(x)
        return nn.functional.relu(skip + self.bn2(self.conv2(h)))


class ResNet18(nn.Module):
    """(B, 3, h, w), normalised -> (B, 8 width, ceil(h/32), ceil(w/32)): all but the pooling and the classes.

    norm: "group", for training from scratch with few samples and a moving average (groups of 16 channels), or
    "frozen_batch", for pretrained weights. width: channels of the first stage; 64 is the published one. Raises
    ValueError for another norm, or a width that has no whole groups.
    """

    def __init__(self, norm: str = "group", width: int = 64):
        super().__init__()
        if norm not in NORMS or (norm == "group" and width % GROUP):
            raise ValueError(f"ResNet18: expected a norm among {NORMS}, 'group' with a width in steps of {GROUP}, "
                             f"found {norm!r} and {width}")  # fmt: skip
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = _norm(norm, width)
        for stage in range(4):
            before, channels = width * 2 ** max(stage - 1, 0), width * 2**stage
            blocks = BasicBlock(before, channels, 2 if stage else 1, norm), BasicBlock(channels, channels, 1, norm)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.channels = 8 * width

    def forward(self, image: Tensor) -> Tensor:
        x = nn.functional.relu(self.bn1(self.conv1(image)))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def feature_size(pixels: int) -> int:
    """Cells of the feature map along one side of an image."""
    return -(-pixels // 32)


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.GroupNorm(channels // GROUP, channels) if kind == "group" else FrozenBatchNorm(channels)
