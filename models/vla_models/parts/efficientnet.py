"""EfficientNet (Tan and Le, arXiv 1905.11946) under FiLM, the image encoder of RT-1.

The blocks are those of `transformers`, so ImageNet weights of google/efficientnet-b3 fit; between them the condition
scales and shifts every channel (Perez et al., arXiv 1709.07871), as in google-research/robotics_transformer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import EfficientNetConfig
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetEmbeddings, EfficientNetEncoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Film(nn.Module):
    """(1 + scale) * x + shift for each channel of x (B, C, h, w), from a condition (B, D); the identity at first."""

    def __init__(self, condition: int, channels: int):
        super().__init__()
        self.scale = nn.Linear(condition, channels)
        self.shift = nn.Linear(condition, channels)
        for layer in (self.scale, self.shift):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return (1 + self.scale(condition)[:, :, None, None]) * x + self.shift(condition)[:, :, None, None]


class BatchNorm(nn.Module):
    """torch's BatchNorm2d without its count of batches, which is no weight. momentum: of the moving statistics.

    With the momentum of `transformers`, 0.99, the statistics would be those of the last batch.
    """

    def __init__(self, channels: int, eps: float, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


class StochasticDepth(nn.Module):
    """Leaves a block out for some samples in training (Huang et al., arXiv 1603.09382). rate: part of them."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        return x * (torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.rate) / (1 - self.rate)


class FilmEfficientNet(nn.Module):
    """(B, 3, h, w) in [0, 1] and a condition (B, D) -> a feature map (B, features, about h/32, w/32).

    FiLM after each block, then a 1x1 convolution to `features` channels and FiLM once more. width_scale, depth_scale:
    of EfficientNet; 1.2 and 1.4 are B3. Images are padded below and at the right only, as RT-1's code does without a
    fixed size: 300 x 300 pixels give 9 x 9 cells.
    """

    def __init__(self, condition: int, features: int = 512, width_scale: float = 1.2, depth_scale: float = 1.4):
        super().__init__()
        config = EfficientNetConfig(width_coefficient=width_scale, depth_coefficient=depth_scale, depthwise_padding=[])
        config.hidden_dim = _rounded(1280 * width_scale)
        self.stem = EfficientNetEmbeddings(config)
        self.body = EfficientNetEncoder(config)
        for parent in list(self.modules()):
            for name, module in parent.named_children():
                if isinstance(module, nn.BatchNorm2d):
                    setattr(parent, name, BatchNorm(module.num_features, module.eps))
                elif isinstance(module, nn.Conv2d):
                    fan_out = module.weight[:, 0].numel() / module.groups
                    nn.init.trunc_normal_(module.weight, std=(2 / fan_out) ** 0.5)
        for block in self.body.blocks:  # in `transformers` it is a plain dropout
            block.projection.dropout = StochasticDepth(block.projection.dropout.p)
        widths = [block.projection.project_conv.out_channels for block in self.body.blocks]
        self.films = nn.ModuleList(Film(condition, width) for width in widths)
        self.out = nn.Conv2d(config.hidden_dim, features, 1, bias=False)
        self.film = Film(condition, features)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        x = self.stem((image - self.mean) / self.std)
        for block, film in zip(self.body.blocks, self.films, strict=True):
            x = film(block(x), condition)
        x = self.body.top_activation(self.body.top_bn(self.body.top_conv(x)))
        return self.film(self.out(x), condition)


def _rounded(width: float, step: int = 8) -> int:
    """A number of channels in whole steps, at most a tenth smaller (EfficientNet's rule)."""
    near = max(step, int(width + step / 2) // step * step)
    return near + step if near < 0.9 * width else near
