"""How the Gemma family's vision-language models read images and text: SigLIP, a projector, Gemma's embedding.

The language model behind it is a `vla_models.parts.mixture.Mixture`. PaliGemma (arXiv 2407.07726) projects each patch;
Gemma 3 (arXiv 2503.19786) pools them first and normalises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vla_models.lerobot import LeRobotConfig
from vla_models.parts.mixture import ExpertConfig, MixtureConfig, RmsNorm, layer_rules, layer_sizes, text_mask
from vla_models.parts.siglip import see, siglip, siglip_sizes, square_side
from vla_models.policy import PolicySpec, example_spec
from vla_models.published import Rule
from vla_models.torch_policy import Inputs


@dataclass(frozen=True)
class PaliGemmaConfig:
    """Sizes of a vision-language model; the defaults are PaliGemma-3B's: SigLIP-so400m and Gemma-2B.

    vision_width, vision_mlp, vision_layers, vision_heads, patch: of SigLIP; patch in pixels. pool: patches that are
    averaged to one token, rows and columns alike (Gemma 3); 0: each is a token, through a projector with a bias
    (PaliGemma). width, mlp, layers, heads, kv_heads, head_dim: of the language model. vocabulary: tokens.
    """

    vision_width: int = 1152
    vision_mlp: int = 4304
    vision_layers: int = 27
    vision_heads: int = 16
    patch: int = 14
    pool: int = 0
    width: int = 2048
    mlp: int = 16384
    layers: int = 18
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    vocabulary: int = 257152

    def mixture(self, *experts: ExpertConfig) -> MixtureConfig:
        """The language model with further experts beside it."""
        language = ExpertConfig(self.width, self.mlp)
        return MixtureConfig((language, *experts), self.layers, self.heads, self.kv_heads, self.head_dim)


class Embedder(nn.Module):
    """Images and text to the tokens of the language model.

    size: of the cameras' images, all alike and square, as SigLIP's learned positions want. Raises PolicyError.
    """

    def __init__(self, spec: PolicySpec, config: PaliGemmaConfig):
        super().__init__()
        side = square_side(spec, config.patch * max(config.pool, 1))
        self.config, self.padding = config, spec.padding
        self.vision = siglip(config, side)
        self.projector = nn.Linear(config.vision_width, config.width, bias=not config.pool)
        self.projector_norm = RmsNorm(config.vision_width, "gemma") if config.pool else None
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def images(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) in [0, 1] -> (B, tokens, width)."""
        x = self.vision(2 * images - 1).last_hidden_state
        if self.projector_norm is not None:
            side = images.shape[-1] // self.config.patch
            grid = x.transpose(1, 2).unflatten(2, (side, side))
            x = nn.functional.avg_pool2d(grid, self.config.pool).flatten(2).transpose(1, 2)
            x = self.projector_norm(x)[0]
        return self.projector(x)

    def words(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, width); Gemma scales them by the root of the width, images it does not."""
        return self.embedding(tokens) * self.config.width**0.5

    def prefix(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """All cameras' tokens, then the text's: (B, T, width), and (B, T) bool, false for what is not there."""
        pictures, present = see(self.images, inputs)
        tokens = torch.cat([pictures, self.words(inputs.tokens)], 1)
        return tokens, torch.cat([present, text_mask(inputs.tokens, self.padding)], 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., width) -> (..., vocabulary): the language head, tied to the embedding."""
        return hidden @ self.embedding.weight.T


def paligemma_rules(theirs: str, embedder: str = "embedder", language: str = "mixture.experts.0") -> tuple[Rule, ...]:
    """Rules for PaliGemma as transformers names it behind `theirs` (a regular expression, with its last dot)."""
    return (
        Rule(rf"{theirs}(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)", rf"{embedder}.vision.\1"),
        Rule(rf"{theirs}(?:model\.)?multi_modal_projector\.linear\.(.+)", rf"{embedder}.projector.\1"),
        # The head is tied to the embedding; a published file holds one of the two or both.
        Rule(rf"{theirs}(?:language_model\.)?lm_head\.weight", f"{embedder}.embedding.weight"),
        Rule(rf"{theirs}(?:model\.)?language_model\.(?:model\.)?embed_tokens\.weight", f"{embedder}.embedding.weight"),
        *layer_rules(rf"{theirs}(?:model\.)?language_model(?:\.model)?", language),
    )


def paligemma_sizes(shapes: Mapping[str, tuple[int, ...]], heads: int = 8, vision_heads: int = 16) -> dict[str, int]:
    """The fields of PaliGemmaConfig that the shapes of `embedder.*` and `mixture.experts.0.*` tensors tell.

    shapes: our names. The numbers of heads cannot be told from them.
    """
    return {
        **siglip_sizes(shapes, "embedder.vision", vision_heads),
        **layer_sizes(shapes, "mixture.experts.0", heads),
        "vocabulary": shapes["embedder.embedding.weight"][0],
    }


def lerobot_spec(kind: Any, robot: LeRobotConfig, config: Mapping[str, Any], **more: Any) -> PolicySpec:
    """The specification of LeRobot's policies that read with PaliGemma, of which `more` are fields.

    PaliGemma's tokenizer.json must lie beside the weights. All cameras but the first may be missing. The period is not
    published; pi0's is 0.02 s.
    """
    height, width = config.get("image_resolution", (224, 224))
    fields = {
        "horizon": int(config["chunk_size"]), "context": int(config["tokenizer_max_length"]), "period": 0.02,
        "tokenizer": "tokenizer.json", "optional": tuple(robot.cameras)[1:],
    }  # fmt: skip
    cameras = dict.fromkeys(robot.cameras, (int(height), int(width)))
    return example_spec(kind.name(), robot.arms, cameras, **{**kind.contract, **fields, **more})
