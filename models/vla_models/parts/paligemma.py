"""How the Gemma family's vision-language models read images and text: SigLIP, a projector, Gemma's embedding.

The language model behind it is a `vla_models.parts.mixture.Mixture`. PaliGemma (arXiv 2407.07726) projects each patch;
Gemma 3 (arXiv 2503.19786) pools them first and normalises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from vla_models.parts.mixture import ExpertConfig, MixtureConfig, RmsNorm, text_mask
from vla_models.policy import PolicyError, PolicySpec
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
        sizes = set(spec.cameras.values())
        if len(sizes) != 1 or any(h != w or h % (config.patch * max(config.pool, 1)) for h, w in sizes):
            raise PolicyError(
                f"policy {spec.name}: cameras: expected square images of one size, a multiple of "
                f"{config.patch * max(config.pool, 1)} pixels, found {dict(spec.cameras)}"
            )
        self.config, self.padding = config, spec.padding
        ((side, _),) = sizes
        self.vision = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=config.vision_width,
                intermediate_size=config.vision_mlp,
                num_hidden_layers=config.vision_layers,
                num_attention_heads=config.vision_heads,
                patch_size=config.patch,
                image_size=side,
                vision_use_head=False,
                attn_implementation="eager",
            )
        )
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
        count, cameras = inputs.present.shape
        pictures = self.images(torch.cat(inputs.images)).unflatten(0, (cameras, count)).transpose(0, 1)
        present = inputs.present.unsqueeze(-1).expand(-1, -1, pictures.shape[2]).flatten(1)
        tokens = torch.cat([pictures.flatten(1, 2), self.words(inputs.tokens)], 1)
        return tokens, torch.cat([present, text_mask(inputs.tokens, self.padding)], 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., width) -> (..., vocabulary): the language head, tied to the embedding."""
        return hidden @ self.embedding.weight.T


def layer_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Rules for a stack of Gemma's layers as transformers names it; `theirs` is a regular expression."""
    names = {
        "self_attn.q_proj": "query", "self_attn.k_proj": "key", "self_attn.v_proj": "value", "self_attn.o_proj": "out",
        "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm",
    }  # fmt: skip
    layers = (Rule(rf"{theirs}\.layers\.(\d+)\.{published.replace('.', '[.]')}\.(.+)", rf"{ours}.layers.\1.{name}.\2")
              for published, name in names.items())  # fmt: skip
    return (*layers, Rule(rf"{theirs}\.norm\.(.+)", rf"{ours}.norm.\1"))


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


def paligemma_sizes(shapes: dict[str, tuple[int, ...]], heads: int = 8, vision_heads: int = 16) -> dict[str, int]:
    """The fields of PaliGemmaConfig that the shapes of `embedder.*` and `mixture.experts.0.*` tensors tell.

    shapes: our names. The numbers of heads cannot be told from them.
    """
    layer, vision = "mixture.experts.0.layers.0", "embedder.vision"
    head_dim = shapes[f"{layer}.query.weight"][0] // heads
    return {
        "vision_width": shapes[f"{vision}.post_layernorm.weight"][0],
        "vision_mlp": shapes[f"{vision}.encoder.layers.0.mlp.fc1.weight"][0],
        "vision_layers": _count(shapes, f"{vision}.encoder.layers."),
        "vision_heads": vision_heads,
        "patch": shapes[f"{vision}.embeddings.patch_embedding.weight"][-1],
        "width": shapes[f"{layer}.query.weight"][1],
        "mlp": shapes[f"{layer}.mlp.gate.weight"][0],
        "layers": _count(shapes, "mixture.experts.0.layers."),
        "heads": heads,
        "kv_heads": shapes[f"{layer}.key.weight"][0] // head_dim,
        "head_dim": head_dim,
        "vocabulary": shapes["embedder.embedding.weight"][0],
    }


def _count(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    return 1 + max(int(name[len(prefix) :].partition(".")[0]) for name in shapes if name.startswith(prefix))
