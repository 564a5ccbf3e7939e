"""The encoder of T5 (Raffel et al., arXiv 1910.10683), from transformers, as a frozen reader of instructions.

Octo reads with T5-base, RDT-1B with T5-XXL of version 1.1, the descendants of Wan2.2 with UMT5-XXL (arXiv 2304.09151).
None of them trains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from vla_models.parts.mixture import text_mask
from vla_models.policy import PolicyError
from vla_models.published import Rule, count_layers

#: Kind -> its modules in transformers, and its feed-forward.
KINDS = {
    "t5": (T5Config, T5EncoderModel, "relu"),
    "t5-v1.1": (T5Config, T5EncoderModel, "gated-gelu"),
    "umt5": (UMT5Config, UMT5EncoderModel, "gated-gelu"),
}


@dataclass(frozen=True)
class T5Size:
    """Sizes of an encoder of T5.

    vocabulary: tokens. width: of a token. layers, heads: of its blocks. head: numbers a head. hidden: of the
    feed-forward. kind: "t5" (feed-forward with ReLU), "t5-v1.1" (tanh-GELU gate times linear), or "umt5" (the same, and
    a bias by distance in every layer instead of the first alone).
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    head: int
    hidden: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PolicyError(f"network.text.kind: expected one of {sorted(KINDS)}, found {self.kind!r}")


#: 109.6 million parameters.
T5_BASE = T5Size(32128, 768, 12, 12, 64, 3072, "t5")
#: 4.76 billion parameters.
T5_XXL = T5Size(32128, 4096, 24, 64, 64, 10240, "t5-v1.1")
#: 5.68 billion parameters.
UMT5_XXL = T5Size(256384, 4096, 24, 64, 64, 10240, "umt5")


class TextEncoder(nn.Module):
    """Tokens (B, L) -> features (B, L, width). Padding is not attended to, but has features too, or zeros (`blank`).

    padding: token after a text's end.
    """

    def __init__(self, size: T5Size, padding: int = 0, blank: bool = False):
        super().__init__()
        config, model, feed_forward = KINDS[size.kind]
        values = config(
            vocab_size=size.vocabulary, d_model=size.width, d_kv=size.head, d_ff=size.hidden, num_layers=size.layers,
            num_heads=size.heads, feed_forward_proj=feed_forward, dropout_rate=0.0, attn_implementation="eager",
        )  # fmt: skip
        self.stack = model(values).encoder
        self.padding, self.blank = padding, blank
        self.requires_grad_(False)

    def inside(self, tokens: Tensor) -> Tensor:
        """(B, L) bool, true up to the text's end. The first place always counts, that of an empty text too."""
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        return text_mask(tokens, self.padding) | first

    def forward(self, tokens: Tensor) -> Tensor:
        # Given whole: transformers would make its own, or look at the values of a smaller one, and could not be traced.
        inside = self.inside(tokens)
        mask = torch.where(inside, 0.0, -1e9)[:, None, None].expand(-1, 1, tokens.shape[1], -1)
        features = self.stack(input_ids=tokens, attention_mask=mask).last_hidden_state
        return features * inside.unsqueeze(-1) if self.blank else features


def t5_size(shapes: Mapping[str, tuple[int, ...]], ours: str = "text.stack") -> T5Size:
    """The sizes that the shapes behind our name `ours` tell; UMT5 looks like "t5-v1.1"."""
    block = f"{ours}.block.0.layer"
    gated = f"{block}.1.DenseReluDense.wi_0.weight" in shapes
    vocabulary, width = shapes[f"{ours}.embed_tokens.weight"]
    heads = shapes[f"{block}.0.SelfAttention.relative_attention_bias.weight"][1]
    inner = shapes[f"{block}.0.SelfAttention.q.weight"][0]
    hidden = shapes[f"{block}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"][0]
    layers = count_layers(shapes, f"{ours}.block.")
    return T5Size(vocabulary, width, layers, heads, inner // heads, hidden, "t5-v1.1" if gated else "t5")


def t5_rules(theirs: str) -> tuple[Rule, ...]:
    """Rules for T5 as transformers names it behind `theirs` (a regular expression, with its last dot), as `text`."""
    return (
        Rule(rf"{theirs}(?:shared|encoder\.embed_tokens)\.weight", "text.stack.embed_tokens.weight"),
        Rule(rf"{theirs}encoder\.(.+)", r"text.stack.\1"),
        Rule(rf"{theirs}(?:decoder\..+|lm_head\.weight)", None, "the encoder alone reads"),
    )
