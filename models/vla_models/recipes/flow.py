"""Recipe "flow": a small language-conditioned flow-matching policy.

    images --FiLM CNN--> keypoints + pooled tokens --.
    instruction --> embedding ----------------------- > context --keys, values--> transformer over H noisy actions
    state --> MLP -----------------------------------'                            and their flow times

The encoding is made once for each chunk; only the action transformer runs in every integration step. Trained with
flow matching (Lipman et al., arXiv 2210.02747; as an action head: pi0, arXiv 2410.24164) and with clean prefixes
(training-time RTC, arXiv 2512.05964), so it supports both "guided" and "prefix".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_models.parts.attention import Attention, attend, sinusoids, split_heads
from vla_models.parts.vision import FilmEncoder, LanguageEncoder, SpatialSoftmax
from vla_models.policy import PolicyError, PolicySpec
from vla_models.torch_policy import Batch, FlowPolicy, Inputs, Preset


@dataclass(frozen=True)
class FlowConfig:
    """Sizes of the network and settings of its loss.

    width, layers, heads, expansion: of the action transformer. channels, blocks: of the image encoders (see
    FilmEncoder). points: keypoints a camera. pool: pooled tokens a camera, rows and columns. samples: (noise, time)
    pairs drawn for each encoded observation in training. prefix_share: part of the training samples that get a clean
    prefix of 0 to `PolicySpec.prefix_limit` steps.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    expansion: int = 2
    channels: tuple[int, int] = (24, 48)
    blocks: tuple[int, int] = (1, 2)
    points: int = 32
    pool: tuple[int, int] = (3, 4)
    samples: int = 2
    prefix_share: float = 0.5


class CameraTokens(nn.Module):
    """One camera: image -> tokens (B, 4 + pool, width), from its keypoints and from its pooled features.

    size: (height, width), pixels. The feature grid, an eighth of it, is pooled in equal windows; what is left over at
    its right and lower edge is not pooled. Raises PolicyError when `config.pool` windows are not what fits in.
    """

    def __init__(self, size: tuple[int, int], config: FlowConfig):
        super().__init__()
        grid = tuple(-(-(pixels // 4) // 2) for pixels in size)  # of FilmEncoder
        self.window = tuple(cells // max(pooled, 1) for cells, pooled in zip(grid, config.pool, strict=True))
        if 0 in self.window or tuple(c // w for c, w in zip(grid, self.window, strict=True)) != tuple(config.pool):
            raise PolicyError(
                f"network.pool: expected rows and columns that fit the feature grid {grid} of a camera of "
                f"{size[0]} x {size[1]} pixels, found {tuple(config.pool)}"
            )
        channels = config.channels[1]
        self.encoder = FilmEncoder(config.channels, config.blocks, config.width)
        self.keypoints = SpatialSoftmax(channels, config.points, grid)
        self.point_tokens = nn.Sequential(
            nn.Linear(2 * config.points, config.width), nn.SiLU(), nn.Linear(config.width, 4 * config.width)
        )
        self.pooled = nn.Linear(channels, config.width)
        self.positions = nn.Parameter(torch.randn(4 + config.pool[0] * config.pool[1], config.width) * 0.02)

    def forward(self, image: Tensor, language: Tensor) -> Tensor:
        features = self.encoder(image, language)
        points = self.point_tokens(self.keypoints(features).flatten(1)).unflatten(1, (4, -1))
        pooled = nn.functional.avg_pool2d(features, self.window).flatten(2).transpose(1, 2)
        return torch.cat([points, self.pooled(pooled)], 1) + self.positions


class ActionBlock(nn.Module):
    """Self-attention over the actions, cross-attention to the context, MLP; pre-norm."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, config.heads)
        self.query = nn.Linear(width, width)
        self.context = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.expansion * width), nn.SiLU(), nn.Linear(config.expansion * width, width)
        )

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x (B*m, H, width); keys, values (B, heads, T, d): m samples share one context."""
        h = self.norms[0](x)
        x = x + self.attention(h, h, h)
        q = self.query(self.norms[1](x)).reshape(keys.shape[0], -1, x.shape[-1])
        x = x + self.out(attend(split_heads(q, self.heads), keys, values)).reshape(x.shape)
        return x + self.mlp(self.norms[2](x))


class FlowNetwork(nn.Module):
    """The network of the recipe "flow"."""

    def __init__(self, spec: PolicySpec, config: FlowConfig):
        super().__init__()
        width = config.width
        self.config = config
        self.horizon = spec.horizon
        self.prefix_limit = spec.prefix_limit
        self.language = LanguageEncoder(len(spec.vocabulary), spec.context, width)
        self.cameras = nn.ModuleList(CameraTokens(size, config) for size in spec.cameras.values())
        self.state = nn.Sequential(nn.Linear(spec.state_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.action_in = nn.Linear(spec.action_dim, width)
        self.places = nn.Parameter(torch.randn(spec.horizon, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(ActionBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.action_out = nn.Linear(width, spec.action_dim)
        nn.init.zeros_(self.action_out.weight)
        nn.init.zeros_(self.action_out.bias)

    def encode(self, inputs: Inputs) -> Tensor:
        """Keys and values of the context for every block, (B, 2*layers, heads, T, width/heads)."""
        language = self.language(inputs.tokens)
        parts = [language.unsqueeze(1), self.state(inputs.state).unsqueeze(1)]
        parts += [camera(image, language) for camera, image in zip(self.cameras, inputs.images, strict=True)]
        context = torch.cat(parts, 1)
        pairs = [part for block in self.blocks for part in block.context(context).chunk(2, -1)]
        return torch.stack([split_heads(part, self.config.heads) for part in pairs], 1)

    def velocity(self, context: Tensor, x: Tensor, tau: Tensor) -> Tensor:
        """Velocity (B*m, H, dim) of the noisy actions x (B*m, H, dim) at flow time tau.

        tau: (B*m, 1), one time for the chunk, or (B*m, H), one for each action. It enters with each action, through
        an MLP (as in pi0), not by adaLN: as good here, and half the cost of a training step on a CPU.
        """
        h = self.mix(self.action_in(x) + self.time(sinusoids(tau, 64, 100.0))) + self.places
        for i, block in enumerate(self.blocks):
            h = block(h, context[:, 2 * i], context[:, 2 * i + 1])
        return self.action_out(self.norm(h))

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Flow-matching loss: mean square of velocity - (actions - noise) over the actions that are not prefix."""
        context = self.encode(batch.inputs)
        actions = batch.actions.repeat_interleave(self.config.samples, 0)
        count, device = len(actions), actions.device
        noise = torch.randn(actions.shape, generator=generator).to(device)
        # More weight on the noisy end, where the decisions fall (pi0: 1 - tau ~ Beta(1.5, 1)).
        tau = 1 - torch.rand(count, 1, generator=generator).to(device) ** (1 / 1.5)
        length = torch.randint(0, self.prefix_limit + 1, (count, 1), generator=generator)
        length = length * (torch.rand(count, 1, generator=generator) < self.config.prefix_share)
        known = (torch.arange(self.horizon) < length).to(device)
        tau = torch.where(known, 1.0, tau)
        x = noise + tau.unsqueeze(-1) * (actions - noise)
        error = (self.velocity(context, x, tau) - (actions - noise)).square().mean(-1)
        free = (~known).to(error)
        return {"loss": (error * free).sum() / free.sum()}


class SmallFlowPolicy(FlowPolicy):
    """The recipe "flow" on torch."""

    Config, Network = FlowConfig, FlowNetwork
    contract = {"steps": 5, "guidance": ("guided", "prefix"), "prefix_limit": 10}
    presets = {
        "paper": Preset(FlowConfig(), {"cameras": {"scene": (96, 128), "wrist": (96, 128)}, "horizon": 32}),
        "tiny": Preset(
            FlowConfig(width=32, layers=2, heads=2, channels=(8, 16), blocks=(0, 1), points=8),
            {"cameras": {"scene": (24, 32)}, "horizon": 8, "prefix_limit": 4},
        ),
    }
