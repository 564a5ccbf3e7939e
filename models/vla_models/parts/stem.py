"""A small convolutional stem that makes patches of images (Xiao et al., arXiv 2106.14881), as Octo has it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StandardConv(nn.Conv2d):
    """A convolution whose weights have mean 0 and deviation 1 in each output channel (arXiv 1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        deviation = weight.square().mean((1, 2, 3), keepdim=True).sqrt()
        return self._conv_forward(x, weight / (deviation + 1e-5), self.bias)


class SmallStem(nn.Module):
    """Images (N, inputs, h, w) to patches (N, n, features), n = h/16 * w/16 with four convolutions of stride 2.

    channels: of each convolution. groups: of their group norms.
    """

    def __init__(self, inputs: int, channels: Sequence[int], features: int, groups: int):
        super().__init__()
        self.convs = nn.ModuleList(
            StandardConv(a, b, 3, stride=2, padding=1) for a, b in zip((inputs, *channels), channels, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(groups, count, eps=1e-6) for count in channels)
        self.out = nn.Conv2d(channels[-1], features, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.out(x).flatten(2).transpose(1, 2)
