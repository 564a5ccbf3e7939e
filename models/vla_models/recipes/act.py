"""Recipe "act": Action Chunking with Transformers, a conditional VAE (Zhao et al., arXiv 2304.13705).

    training only:  [CLS, state, actions] -> encoder -> mean, log variance of z
    images --ResNet--> tokens --.
    state ---------------------- > encoder --> decoder with H queries --> H actions
    z (0 in use) --------------'

The structure is the paper's: post-norm transformer blocks (DETR), positions added to queries and keys, H learned
queries, L1 loss + `kl_weight` times the KL divergence, mean/std normalisation with the deviation clipped at 1e-2.

Two sizes share it. The preset "paper" is the published one: ResNet18 with frozen batch norm, one for all cameras, on
480x640 images (stride 32), DETR's sine positions, width 512, feed-forward 3200, 51.6 M parameters; the published code
says 7 decoder layers but uses the output of the first alone, so there is 1. It reads LeRobot's checkpoints. The
defaults of `ActConfig` are a small network for training from scratch on a CPU: a ResNet with group norm for each
camera on small images, width 192, 3.4 M parameters. With a vocabulary in the specification one language token joins
the encoder (not in the paper).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_models.lerobot import STATISTICS, LeRobotConfig
from vla_models.normalization import Normalizer
from vla_models.parts.attention import sinusoids
from vla_models.parts.cvae import divergence, draw_latent, mean_l1, read_latent
from vla_models.parts.detr import DecoderBlock, EncoderBlock, sines
from vla_models.parts.resnet import ResNet18
from vla_models.parts.vision import LanguageEncoder, SmallResNet
from vla_models.policy import PolicyError, PolicySpec, example_spec
from vla_models.published import Rule, TensorFiles, require
from vla_models.torch_policy import Batch, Inputs, OnePassPolicy, Preset

BACKBONES = ("small", "resnet18")
#: ALOHA's, s.
PERIOD = 0.02
#: Settings of LeRobot's ACT that could say otherwise and change the network.
LEROBOT = {
    "vision_backbone": "resnet18", "pre_norm": False, "use_vae": True, "feedforward_activation": "relu",
    "replace_final_stride_with_dilation": False, "n_obs_steps": 1,
}  # fmt: skip


@dataclass(frozen=True)
class ActConfig:
    """Sizes of the network and weights of its loss.

    width, heads, feedforward: of every transformer block. encoder_layers, decoder_layers, posterior_layers: blocks
    (the posterior is the CVAE's encoder). latent: length of z. backbone: "small", a SmallResNet for each camera with
    `channels` and `blocks`, or "resnet18", the paper's. kl_weight: of the KL divergence in the loss. dropout: of the
    transformer blocks. image_mean, image_std: what ResNet18 subtracts from images and divides them by, three numbers
    for all cameras or three for each (ImageNet's). resnet_width: channels of ResNet18's first stage.
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
    backbone: str = "small"
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resnet_width: int = 64

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise PolicyError(f"network.backbone: expected one of {BACKBONES}, found {self.backbone!r}")


#: The published sizes.
PAPER = ActConfig(512, 8, 3200, 4, 1, 4, 32, backbone="resnet18")


class ActNetwork(nn.Module):
    """The network of the recipe "act"."""

    def __init__(self, spec: PolicySpec, config: ActConfig):
        super().__init__()
        width = config.width
        block = (width, config.heads, config.feedforward, config.dropout)
        self.config = config
        # The CVAE's encoder: actions -> z.
        self.cls = nn.Parameter(torch.randn(1, width) * 0.02)
        self.posterior_state = nn.Linear(spec.state_dim, width)
        self.posterior_action = nn.Linear(spec.action_dim, width)
        self.posterior = nn.ModuleList(EncoderBlock(*block) for _ in range(config.posterior_layers))
        self.posterior_out = nn.Linear(width, 2 * config.latent)
        published = config.backbone == "resnet18"
        steps = torch.arange(spec.horizon + 2, dtype=torch.float32)
        places = sines(steps, width) if published else sinusoids(steps, width, 1e4)
        self.register_buffer("posterior_places", places, persistent=False)
        # The policy.
        if published:
            self.backbones = nn.ModuleList([ResNet18("frozen_batch", config.resnet_width)])
            for name in ("mean", "std"):
                values = torch.tensor(getattr(config, f"image_{name}")).reshape(-1, 3, 1, 1)
                self.register_buffer(name, values.expand(len(spec.cameras), 3, 1, 1), persistent=False)
        else:
            self.backbones = nn.ModuleList(SmallResNet(config.channels, config.blocks) for _ in spec.cameras)
        self.image_in = nn.Conv2d(self.backbones[0].channels if published else config.channels[-1], width, 1)
        self.latent_in = nn.Linear(config.latent, width)
        self.state_in = nn.Linear(spec.state_dim, width)
        self.language = LanguageEncoder(len(spec.vocabulary), spec.context, width) if spec.vocabulary else None
        self.vector_places = nn.Parameter(torch.randn(3 if spec.vocabulary else 2, width) * 0.02)
        stride = 32 if published else 4 * 2 ** (len(config.channels) - 1)
        image_places = torch.cat([_image_places(h, w, stride, width, published) for h, w in spec.cameras.values()])
        self.register_buffer("image_places", image_places, persistent=False)
        self.encoder = nn.ModuleList(EncoderBlock(*block) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderBlock(*block) for _ in range(config.decoder_layers))
        self.queries = nn.Parameter(torch.randn(spec.horizon, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.action_out = nn.Linear(width, spec.action_dim)

    def posterior_of(self, state: Tensor, actions: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of z, (B, latent) each, from what was done."""
        seen = torch.cat([self.cls.expand(len(state), 1, -1), self.posterior_state(state).unsqueeze(1)], 1)
        done = self.posterior_action(actions)
        return read_latent(self.posterior, self.posterior_out, seen, done, padded, self.posterior_places)

    def features(self, images: tuple[Tensor, ...]) -> list[Tensor]:
        """A feature map (B, channels, rows, columns) of each camera."""
        if self.config.backbone == "resnet18":
            images = tuple((image - self.mean[i]) / self.std[i] for i, image in enumerate(images))
            return [self.backbones[0](image) for image in images]
        return [backbone(image) for backbone, image in zip(self.backbones, images, strict=True)]

    def forward(self, inputs: Inputs, latent: Tensor | None = None) -> Tensor:
        """Normalised actions (B, H, dim). latent (B, latent): z; None: 0, the prior's mean, as in use."""
        images, tokens, state, _ = inputs
        if latent is None:
            latent = state.new_zeros(state.shape[0], self.config.latent)
        vectors = [self.latent_in(latent), self.state_in(state)]
        if self.language is not None:
            vectors.append(self.language(tokens))
        maps = [self.image_in(features).flatten(2).transpose(1, 2) for features in self.features(images)]
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
            l1 = mean_l1(self(batch.inputs), batch)
            return {"loss": l1, "l1": l1}
        mean, log_variance = self.posterior_of(batch.inputs.state, batch.actions, batch.padded)
        latent = draw_latent(mean, log_variance, generator)
        l1 = mean_l1(self(batch.inputs, latent), batch)
        kl = divergence(mean, log_variance)
        return {"loss": l1 + self.config.kl_weight * kl, "l1": l1, "kl": kl}


def _rules() -> Iterator[Rule]:
    """From LeRobot's names of tensors to ours."""
    attention = ("query", "key", "value")
    blocks = {
        "vae_encoder": ("posterior", {"self_attn": "attention"}, 2),
        "encoder": ("encoder", {"self_attn": "attention"}, 2),
        "decoder": ("decoder", {"self_attn": "self_attention", "multihead_attn": "cross_attention"}, 3),
    }
    for theirs, (ours, attentions, norms) in blocks.items():
        start = rf"model\.{theirs}\.layers\.(\d+)\."
        for module, name in attentions.items():
            for kind in ("weight", "bias"):
                parts = tuple(rf"{ours}.\1.{name}.{part}.{kind}" for part in attention)
                yield Rule(rf"{start}{module}\.in_proj_{kind}", parts)
            yield Rule(rf"{start}{module}\.out_proj\.(.*)", rf"{ours}.\1.{name}.out.\2")
        yield Rule(rf"{start}linear1\.(.*)", rf"{ours}.\1.mlp.0.\2")
        yield Rule(rf"{start}linear2\.(.*)", rf"{ours}.\1.mlp.3.\2")
        for i in range(norms):
            yield Rule(rf"{start}norm{i + 1}\.(.*)", rf"{ours}.\1.norms.{i}.\2")
    names = {
        r"backbone\.(.*)": r"backbones.0.\1",
        r"decoder\.norm\.(.*)": r"norm.\1",
        r"vae_encoder_cls_embed\.weight": "cls",
        r"vae_encoder_robot_state_input_proj\.(.*)": r"posterior_state.\1",
        r"vae_encoder_action_input_proj\.(.*)": r"posterior_action.\1",
        r"vae_encoder_latent_output_proj\.(.*)": r"posterior_out.\1",
        r"encoder_robot_state_input_proj\.(.*)": r"state_in.\1",
        r"encoder_latent_input_proj\.(.*)": r"latent_in.\1",
        r"encoder_img_feat_input_proj\.(.*)": r"image_in.\1",
        r"encoder_1d_feature_pos_embed\.weight": "vector_places",
        r"decoder_pos_embed\.weight": "queries",
        r"action_head\.(.*)": r"action_out.\1",
    }
    for theirs, ours in names.items():
        yield Rule(rf"model\.{theirs}", ours)
    yield Rule(r"model\.vae_encoder_pos_enc", None, "sine positions, computed")
    yield STATISTICS


class ActPolicy(OnePassPolicy):
    """The recipe "act" on torch. One pass, z = 0: deterministic, and with no guidance."""

    Config, Network = ActConfig, ActNetwork
    presets = {
        "paper": Preset(
            PAPER, {"arms": {"left": 6, "right": 6}, "cameras": {"top": (480, 640)}, "horizon": 100, "period": PERIOD}
        ),
        "tiny": Preset(
            ActConfig(width=32, heads=2, feedforward=48, encoder_layers=1, posterior_layers=1, channels=(8, 16)),
            {"cameras": {"scene": (24, 32)}, "horizon": 8},
        ),
    }
    parameters = 51.6e6
    published = tuple(_rules())
    training = {
        "robot": "aloha", "cameras": {"top": (120, 160)}, "state": "joint", "kind": "joint", "reference": "absolute",
        "horizon": 100, "period": PERIOD, "batch": 16, "lr": 2e-4, "decay": 1e-4, "clip": 10.0, "jitter": 0.1,
    }  # fmt: skip

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, ActConfig, dict[str, Normalizer]]:
        """LeRobot's ACT (lerobot/act_aloha_sim_transfer_cube_human)."""
        require(folder / "config.json", config, LEROBOT)
        robot = LeRobotConfig(folder, config, files)
        network = ActConfig(
            width=config["dim_model"],
            heads=config["n_heads"],
            feedforward=config["dim_feedforward"],
            encoder_layers=config["n_encoder_layers"],
            decoder_layers=config["n_decoder_layers"],
            posterior_layers=config["n_vae_encoder_layers"],
            latent=config["latent_dim"],
            kl_weight=config["kl_weight"],
            dropout=config["dropout"],
            backbone="resnet18",
            resnet_width=files.shapes["model.backbone.conv1.weight"][0],
            **robot.image_numbers(),
        )
        spec = example_spec(cls.name(), robot.arms, robot.cameras, horizon=int(config["chunk_size"]), period=PERIOD)
        return spec, network, robot.normalizers()


def _image_places(height: int, width: int, stride: int, features: int, detr: bool) -> Tensor:
    """2D sine embedding of the feature map of one image, row by row: (rows*columns, features)."""
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    y, x = (torch.arange(1, count + 1, dtype=torch.float32) / count for count in (rows, columns))
    if detr:
        y, x = (sines(2 * math.pi * values, features // 2) for values in (y, x))
    else:
        y, x = (sinusoids(100.0 * y, features // 2, 1e4), sinusoids(100.0 * x, features - features // 2, 1e4))
    return torch.cat([y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)], -1).flatten(0, 1)
