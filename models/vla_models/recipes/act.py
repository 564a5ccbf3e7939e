"""Recipe "act": Action Chunking with Transformers, a conditional VAE (Zhao et al., arXiv 2304.13705).

    training only:  [CLS, state, actions] -> encoder -> mean, log variance of z
    images --ResNet--> tokens --.
    state ---------------------- > encoder --> decoder with H queries --> H actions
    z (0 in use) --------------'

The structure is the paper's: post-norm transformer blocks (DETR), positions added to queries and keys, H learned
queries, L1 loss + `kl_weight` times the KL divergence, mean/std normalisation with the deviation clipped at 1e-2.
What differs is size: the paper has a pretrained ResNet18 with frozen batch norm on 480x640 images (stride 32), width
512, feed-forward 3200, 4 + 4 encoder layers, 51.6 M parameters. Here everything is configurable, and the default is a
small ResNet with group norm, trained from scratch on small images, width 192: 3.4 M parameters. With a vocabulary in
the specification one language token joins the encoder (not in the paper).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_models.parts.attention import Attention, sinusoids
from vla_models.parts.vision import LanguageEncoder, SmallResNet
from vla_models.policy import PolicySpec
from vla_models.torch_policy import Batch, Inputs, OnePassPolicy, Preset


@dataclass(frozen=True)
class ActConfig:
    """Sizes of the network and weights of its loss.

    width, heads, feedforward: of every transformer block. encoder_layers, decoder_layers, posterior_layers: blocks
    (the posterior is the CVAE's encoder). latent: length of z. channels, blocks: of the image encoder (SmallResNet).
    kl_weight: of the KL divergence in the loss. dropout: of the transformer blocks.
    """

    width: int = 192
    heads: int = 6
    feedforward: int = 640
    encoder_layers: int = 3
    decoder_layers: int = 1
    posterior_layers: int = 2
    latent: int = 32
    channels: tuple[int, ...] = (32, 64, 128)
    blocks: int = 1
    kl_weight: float = 10.0
    dropout: float = 0.1


class EncoderBlock(nn.Module):
    """DETR's encoder layer, post-norm."""

    def __init__(self, config: ActConfig):
        super().__init__()
        self.attention = Attention(config.width, config.heads)
        self.mlp = _mlp(config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        placed = x + positions
        x = self.norms[0](x + self.dropout(self.attention(placed, placed, x, mask)))
        return self.norms[1](x + self.dropout(self.mlp(x)))


class DecoderBlock(nn.Module):
    """DETR's decoder layer, post-norm."""

    def __init__(self, config: ActConfig):
        super().__init__()
        self.self_attention = Attention(config.width, config.heads)
        self.cross_attention = Attention(config.width, config.heads)
        self.mlp = _mlp(config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, placed_memory: Tensor) -> Tensor:
        placed = x + queries
        x = self.norms[0](x + self.dropout(self.self_attention(placed, placed, x)))
        x = self.norms[1](x + self.dropout(self.cross_attention(x + queries, placed_memory, memory)))
        return self.norms[2](x + self.dropout(self.mlp(x)))


class ActNetwork(nn.Module):
    """The network of the recipe "act"."""

    def __init__(self, spec: PolicySpec, config: ActConfig):
        super().__init__()
        width = config.width
        self.config = config
        # The CVAE's encoder: actions -> z.
        self.cls = nn.Parameter(torch.randn(1, width) * 0.02)
        self.posterior_state = nn.Linear(spec.state_dim, width)
        self.posterior_action = nn.Linear(spec.action_dim, width)
        self.posterior = nn.ModuleList(EncoderBlock(config) for _ in range(config.posterior_layers))
        self.posterior_out = nn.Linear(width, 2 * config.latent)
        places = sinusoids(torch.arange(spec.horizon + 2, dtype=torch.float32), width, 1e4)
        self.register_buffer("posterior_places", places, persistent=False)
        # The policy.
        self.backbones = nn.ModuleList(SmallResNet(config.channels, config.blocks) for _ in spec.cameras)
        self.image_in = nn.Conv2d(config.channels[-1], width, 1)
        self.latent_in = nn.Linear(config.latent, width)
        self.state_in = nn.Linear(spec.state_dim, width)
        self.language = LanguageEncoder(len(spec.vocabulary), spec.context, width) if spec.vocabulary else None
        self.vector_places = nn.Parameter(torch.randn(3 if spec.vocabulary else 2, width) * 0.02)
        stride = 4 * 2 ** (len(config.channels) - 1)
        image_places = torch.cat([_image_places(h, w, stride, width) for h, w in spec.cameras.values()])
        self.register_buffer("image_places", image_places, persistent=False)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_layers))
        self.queries = nn.Parameter(torch.randn(spec.horizon, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.action_out = nn.Linear(width, spec.action_dim)

    def posterior_of(self, state: Tensor, actions: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of z, (B, latent) each, from what was done."""
        count = len(state)
        tokens = torch.cat(
            [self.cls.expand(count, 1, -1), self.posterior_state(state).unsqueeze(1), self.posterior_action(actions)], 1
        )
        mask = torch.cat([padded.new_zeros(count, 2), padded], 1)
        for block in self.posterior:
            tokens = block(tokens, self.posterior_places, mask)
        mean, log_variance = self.posterior_out(tokens[:, 0]).chunk(2, -1)
        return mean, log_variance

    def forward(self, inputs: Inputs, latent: Tensor | None = None) -> Tensor:
        """Normalised actions (B, H, dim). latent (B, latent): z; None: 0, the prior's mean, as in use."""
        images, tokens, state, _ = inputs
        if latent is None:
            latent = state.new_zeros(state.shape[0], self.config.latent)
        vectors = [self.latent_in(latent), self.state_in(state)]
        if self.language is not None:
            vectors.append(self.language(tokens))
        maps = [
            self.image_in(backbone(image)).flatten(2).transpose(1, 2)
            for backbone, image in zip(self.backbones, images, strict=True)
        ]
        memory = torch.cat([torch.stack(vectors, 1), *maps], 1)
        places = torch.cat([self.vector_places, self.image_places])
        for block in self.encoder:
            memory = block(memory, places)
        placed = memory + places
        x = state.new_zeros(state.shape[0], *self.queries.shape)
        for block in self.decoder:
            x = block(x, self.queries, memory, placed)
        return self.action_out(self.norm(x))

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """L1 over the actions inside the episode + kl_weight * KL(posterior, standard normal).

        In evaluation mode z is 0 as in use, and the loss is the L1 part alone.
        """
        if not self.training:
            l1 = _mean_l1(self(batch.inputs), batch)
            return {"loss": l1, "l1": l1}
        mean, log_variance = self.posterior_of(batch.inputs.state, batch.actions, batch.padded)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        latent = mean + torch.exp(log_variance / 2) * noise
        l1 = _mean_l1(self(batch.inputs, latent), batch)
        kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1).mean()
        return {"loss": l1 + self.config.kl_weight * kl, "l1": l1, "kl": kl}


class ActPolicy(OnePassPolicy):
    """The recipe "act" on torch. One pass, z = 0: deterministic, and with no guidance."""

    Config, Network = ActConfig, ActNetwork
    presets = {
        "tiny": Preset(
            ActConfig(width=32, heads=2, feedforward=48, encoder_layers=1, posterior_layers=1, channels=(8, 16)),
            {"cameras": {"scene": (24, 32)}, "horizon": 8},
        )
    }
    training = {
        "robot": "aloha",
        "cameras": {"top": (120, 160)},
        "state": "joint",
        "kind": "joint",
        "reference": "absolute",
        "horizon": 100,
        "period": 0.02,
        "batch": 16,
        "lr": 2e-4,
        "decay": 1e-4,
        "clip": 10.0,
        "jitter": 0.1,
    }


def _mlp(config: ActConfig) -> nn.Module:
    return nn.Sequential(
        nn.Linear(config.width, config.feedforward),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.feedforward, config.width),
    )


def _mean_l1(actions: Tensor, batch: Batch) -> Tensor:
    inside = (~batch.padded).to(actions).unsqueeze(-1)
    return ((actions - batch.actions).abs() * inside).sum() / (inside.sum() * actions.shape[-1])


def _image_places(height: int, width: int, stride: int, features: int) -> Tensor:
    """2D sine embedding of the feature map of one image, row by row: (rows*columns, features)."""
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    y = sinusoids((torch.arange(rows) + 1) / rows * 100.0, features // 2, 1e4)
    x = sinusoids((torch.arange(columns) + 1) / columns * 100.0, features - features // 2, 1e4)
    return torch.cat([y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)], -1).flatten(0, 1)
