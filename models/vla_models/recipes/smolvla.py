"""Recipe "smolvla": a small VLM and a cross-attending flow expert (Shukor et al., arXiv 2506.01844).

    images --SigLIP, pixel shuffle--.
    instruction --words------------- > first layers of SmolVLM2 --keys, values of each layer--.
    state --linear------------------'                                                         v
    noisy actions and their flow times --MLP--> expert: self, cross, self, cross ... attention --> velocity

What sets it apart from pi0: a VLM of half a billion parameters of which only the first half of the layers is used,
large images that become few tokens (512 pixels, 64 tokens), the state as the last token of the prefix and not beside
the actions, an expert of 0.75 times the width, and two kinds of layers in it: in every second one the actions attend to
the prefix and, causally, to each other; in the others to the prefix alone, through projections of the VLM's own keys
and values. Only the expert and the projections of state and actions are trained (section 3.1).
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
from vla_models.parts.flow import FlowMatching, check_numbers, pad_last, time_features
from vla_models.parts.mixture import (
    ExpertConfig,
    Mixture,
    MixtureConfig,
    block_mask,
    layer_rules,
    layer_sizes,
    text_mask,
)
from vla_models.parts.siglip import see, siglip, siglip_sizes, square_side
from vla_models.policy import CheckpointError, PolicySpec, example_spec
from vla_models.published import Rule, TensorFiles, find_checkpoint, own_shapes, require
from vla_models.torch_policy import FlowPolicy, Inputs, Preset

#: Heads of the published VLMs, which shapes of tensors do not tell: of the tower and of the decoder (64 numbers each).
BACKBONES = {
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": {"vision_heads": 12, "head_dim": 64},
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": {"vision_heads": 12, "head_dim": 64},
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": {"vision_heads": 16, "head_dim": 64},
}
#: Settings of LeRobot's SmolVLA that could say otherwise and change the network.
LEROBOT = {"attention_mode": "cross_attn", "add_image_special_tokens": False, "adapt_to_pi_aloha": False}
#: SmolVLM2's token after the end of a text, <|im_end|>.
PADDING = 2


@dataclass(frozen=True)
class SmolVlaConfig:
    """Sizes of the network.

    width, mlp, heads, kv_heads, head_dim: of the VLM's decoder. layers: how many of its layers are used. vocabulary:
    tokens it knows. expert_width, expert_mlp: of the action expert, whose heads are the VLM's. self_every: the expert's
    layers 0, n, 2n, ... attend to the actions too. vision_*: of the SigLIP tower. patch: side of a patch, pixels.
    shuffle: side of the square of patches that becomes one token. state_width, action_width: what states and actions
    are filled up to with zeros. freeze: whether training leaves the VLM as it is. prefix_share: part of the training
    samples that get a clean prefix of up to `PolicySpec.prefix_limit` actions.
    """

    width: int = 960
    mlp: int = 2560
    heads: int = 15
    kv_heads: int = 5
    head_dim: int = 64
    layers: int = 16
    vocabulary: int = 49280
    expert_width: int = 720
    expert_mlp: int = 2048
    self_every: int = 2
    vision_width: int = 768
    vision_mlp: int = 3072
    vision_layers: int = 12
    vision_heads: int = 12
    patch: int = 16
    shuffle: int = 4
    state_width: int = 32
    action_width: int = 32
    freeze: bool = True
    prefix_share: float = 0.5


class SmolVlaNetwork(FlowMatching, nn.Module):
    """The network of the recipe "smolvla". Raises PolicyError for cameras, states and actions that do not fit."""

    def __init__(self, spec: PolicySpec, config: SmolVlaConfig):
        super().__init__()
        self.config, self.width, self.padding = config, config.action_width, spec.padding
        self.prefix_limit = spec.prefix_limit
        check_numbers(spec, config.state_width, config.action_width)
        self.vision = siglip(config, square_side(spec, config.patch * config.shuffle))
        width, expert = config.width, config.expert_width
        self.connector = nn.Linear(config.vision_width * config.shuffle**2, width, bias=False)
        self.embedding = nn.Embedding(config.vocabulary, width)
        self.language_head = nn.Linear(width, config.vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.mixture = Mixture(
            MixtureConfig(
                experts=(
                    ExpertConfig(width, config.mlp, "llama", "silu"),
                    ExpertConfig(expert, config.expert_mlp, "llama", "silu"),
                ),
                layers=config.layers,
                heads=config.heads,
                kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                cross=tuple(layer for layer in range(config.layers) if layer % config.self_every),
                eps=1e-5,
            )
        )
        self.state_in = nn.Linear(config.state_width, width)
        self.action_in = nn.Linear(config.action_width, expert)
        self.time_in = nn.Linear(2 * expert, expert)
        self.time_out = nn.Linear(expert, expert)
        self.action_out = nn.Linear(expert, config.action_width)
        for parameter in self.unused() if not config.freeze else self.backbone():
            parameter.requires_grad_(False)

    def backbone(self) -> Iterator[nn.Parameter]:
        """Parameters of the VLM."""
        for part in (self.vision, self.connector, self.embedding, self.language_head, self.mixture.experts[0]):
            yield from part.parameters()

    def unused(self) -> Iterator[nn.Parameter]:
        """Parameters of the VLM that actions do not depend on: of its last layer only keys and values are read."""
        last = self.mixture.experts[0].layers[-1]
        for part in (self.language_head, self.mixture.experts[0].norm, last.query, last.out, last.mlp, last.mlp_norm):
            yield from part.parameters()

    def images(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) in [0, 1] -> (B, tokens, width). A square of patches becomes one token (pixel shuffle)."""
        side, shuffle = images.shape[-1] // self.config.patch, self.config.shuffle
        x = self.vision(2 * images - 1).last_hidden_state
        x = x.reshape(len(x), side // shuffle, shuffle, side // shuffle, -1).transpose(2, 3)
        return self.connector(x.reshape(len(x), -1, self.connector.in_features))

    def encode(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix, (B, layers, 2, kv_heads, T, head_dim), and (B, T) bool, what of it is there.

        The prefix is [images, text][state]: images and text do not see the state.
        """
        pictures, present = see(self.images, inputs)
        words, state = self.embedding(inputs.tokens), pad_last(inputs.state, self.config.state_width)
        root = self.config.width**0.5
        prefix = torch.cat([root * pictures, root * words, self.state_in(state).unsqueeze(1)], 1)
        there = torch.ones_like(present[:, :1])
        valid = torch.cat([present, text_mask(inputs.tokens, self.padding), there], 1)
        blocks = (torch.arange(prefix.shape[1], device=prefix.device) == prefix.shape[1] - 1).long()
        mask = block_mask(blocks, blocks, valid)
        _, cache = self.mixture.prefill([prefix, None], valid.long().cumsum(1) - 1, mask, hidden=False)
        return cache, valid

    def velocity(self, context: tuple[Tensor, Tensor], x: Tensor, tau: Tensor) -> Tensor:
        """Velocity (B, H, W) of the noisy actions x (B, H, W) at flow time tau (B, 1) or (B, H)."""
        cache, valid = context
        h = self.timed(self.action_in(x), time_features(tau, self.config.expert_width))
        steps = torch.arange(x.shape[1], device=x.device)
        causal = (steps <= steps.unsqueeze(1)).expand(len(x), -1, -1)
        mask = torch.cat([valid.unsqueeze(1).expand(-1, x.shape[1], -1), causal], 2)
        positions = valid.long().sum(1, keepdim=True) + steps
        return -self.action_out(self.mixture([None, h], positions, mask, cache)[1])  # pi0's velocity is noise - data


VLM = r"model\.vlm_with_expert\.vlm\."


class SmolVlaPolicy(FlowPolicy):
    """The recipe "smolvla" on torch. Reads LeRobot's checkpoints (lerobot/smolvla_base)."""

    Config, Network = SmolVlaConfig, SmolVlaNetwork
    parameters = 450.0e6
    contract = {
        "steps": 10, "guidance": ("guided", "prefix"), "prefix_limit": 10, "horizon": 50, "period": 1 / 30,
        "context": 48, "prompt": "{task}\n", "fit": "pad_corner",
    }  # fmt: skip
    presets = {
        "paper": Preset(
            SmolVlaConfig(),
            {"cameras": dict.fromkeys(("top", "wrist", "side"), (512, 512)), "optional": ("wrist", "side"),
             "tokenizer": "bytes"},
        ),
        "tiny": Preset(
            SmolVlaConfig(
                width=32, mlp=48, heads=4, kv_heads=2, head_dim=8, layers=2, vocabulary=259, expert_width=24,
                expert_mlp=48, vision_width=24, vision_mlp=32, vision_layers=1, vision_heads=2, patch=8, shuffle=2,
                state_width=16, action_width=16, freeze=False,
            ),
            {"cameras": {"scene": (32, 32), "wrist": (32, 32)}, "optional": ("wrist",), "horizon": 8,
             "prefix_limit": 4, "tokenizer": "bytes"},
        ),
    }  # fmt: skip
    training = {
        "state": "joint", "kind": "joint", "horizon": 50, "period": 1 / 30, "steps": 10, "lr": 1e-4, "warmup": 1000,
        "decay": 1e-10, "clip": 10.0, "guidance": ("guided", "prefix"), "prefix_limit": 10,
    }  # fmt: skip
    published = (
        Rule(rf"{VLM}model\.vision_model\.(.+)", r"vision.\1"),
        Rule(rf"{VLM}model\.connector\.modality_projection\.proj\.weight", "connector.weight"),
        Rule(rf"{VLM}model\.text_model\.embed_tokens\.weight", "embedding.weight"),
        Rule(rf"{VLM}lm_head\.weight", "language_head.weight"),
        *layer_rules(rf"{VLM}model\.text_model", "mixture.experts.0"),
        *layer_rules(r"model\.vlm_with_expert\.lm_expert", "mixture.experts.1"),
        Rule(r"model\.state_proj\.(weight|bias)", r"state_in.\1"),
        Rule(r"model\.action_(in|out)_proj\.(weight|bias)", r"action_\1.\2"),
        Rule(r"model\.action_time_mlp_(in|out)\.(weight|bias)", r"time_\1.\2"),
        STATISTICS,
    )

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, SmolVlaConfig, dict[str, Normalizer]]:
        """LeRobot's SmolVLA. The tokenizer.json of the VLM is taken from the folder, or else from the hub."""
        where, backbone = folder / "config.json", config["vlm_model_name"]
        require(where, config, LEROBOT)
        if backbone not in BACKBONES:
            raise CheckpointError(f"{where}: vlm_model_name: expected one of {sorted(BACKBONES)}, found {backbone!r}")
        robot = LeRobotConfig(folder, config, files, bare=True)
        width, height = config["resize_imgs_with_padding"]
        cameras = dict.fromkeys(robot.cameras, (height, width))
        tokenizer = folder / "tokenizer.json"
        if not tokenizer.is_file():
            tokenizer = find_checkpoint(backbone, ("tokenizer.json",)) / "tokenizer.json"
        contract = cls.contract | {
            "steps": config["num_steps"], "horizon": config["chunk_size"], "context": config["tokenizer_max_length"],
            "guidance": ("guided",), "prefix_limit": 0, "padding": PADDING, "optional": tuple(cameras)[1:],
            "tokenizer": tokenizer.name if tokenizer.parent == folder else str(tokenizer),
        }  # fmt: skip
        sizes = sizes_of(own_shapes(files, cls.published), **BACKBONES[backbone])
        network = SmolVlaConfig(**sizes, self_every=config["self_attn_every_n_layers"])
        return example_spec(cls.name(), robot.arms, cameras, **contract), network, robot.normalizers()


def sizes_of(shapes: Mapping[str, tuple[int, ...]], vision_heads: int, head_dim: int) -> dict[str, int]:
    """The fields of SmolVlaConfig that the tensors' shapes, under our names, tell; see BACKBONES for the rest."""
    tower = siglip_sizes(shapes, "vision", vision_heads)
    heads = shapes["mixture.experts.0.layers.0.query.weight"][0] // head_dim
    return {
        **tower,
        **layer_sizes(shapes, "mixture.experts.0", heads),
        "vocabulary": shapes["embedding.weight"][0],
        "expert_width": shapes["mixture.experts.1.norm.weight"][0],
        "expert_mlp": shapes["mixture.experts.1.layers.0.mlp.gate.weight"][0],
        "shuffle": math.isqrt(shapes["connector.weight"][1] // tower["vision_width"]),
        "state_width": shapes["state_in.weight"][1],
        "action_width": shapes["action_in.weight"][1],
    }
