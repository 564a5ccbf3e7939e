"""The encoder of T5 (Raffel et al., arXiv 1910.10683), from transformers, as a frozen reader of instructions.

Octo reads with T5-base, RDT-1B with T5-XXL (of version 1.1, with a gated feed-forward). Neither trains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from vla_models.parts.mixture import text_mask
from vla_models.policy import CheckpointError


@dataclass(frozen=True)
class T5Size:
    """Sizes of an encoder of T5.

    vocabulary: tokens. width: of a token. layers, heads: of its blocks. head: numbers a head. hidden: of the
    feed-forward. gated: tanh-GELU gate times linear (version 1.1) instead of ReLU.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    head: int
    hidden: int
    gated: bool

    @classmethod
    def of(cls, value: T5Size | Mapping[str, Any]) -> T5Size:
        """From plain values, as a checkpoint holds them."""
        return value if isinstance(value, cls) else cls(**value)


#: 109.6 million parameters.
T5_BASE = T5Size(32128, 768, 12, 12, 64, 3072, gated=False)
#: 4.76 billion parameters.
T5_XXL = T5Size(32128, 4096, 24, 64, 64, 10240, gated=True)


class TextEncoder(nn.Module):
    """Tokens (B, L) -> features (B, L, width). Padding is not attended to, but has features too.

    padding: token after a text's end.
    """

    def __init__(self, size: T5Size, padding: int = 0):
        super().__init__()
        config = T5Config(
            vocab_size=size.vocabulary, d_model=size.width, d_kv=size.head, d_ff=size.hidden, num_layers=size.layers,
            num_heads=size.heads, feed_forward_proj="gated-gelu" if size.gated else "relu", dropout_rate=0.0,
            attn_implementation="eager",
        )  # fmt: skip
        self.stack = T5EncoderModel(config).encoder
        self.padding = padding
        self.requires_grad_(False)

    def inside(self, tokens: Tensor) -> Tensor:
        """(B, L) bool, true up to the text's end. The first place always counts, that of an empty text too."""
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        return text_mask(tokens, self.padding) | first

    def forward(self, tokens: Tensor) -> Tensor:
        # A finished mask: transformers would make its own of the tokens' values, which no tracer can follow.
        mask = torch.where(self.inside(tokens), 0.0, -1e9)[:, None, None]
        return self.stack(input_ids=tokens, attention_mask=mask).last_hidden_state


def t5_size(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> T5Size:
    """The sizes that T5's tensors tell, under transformers' names behind `prefix`. Raises CheckpointError."""

    def shape(name: str) -> tuple[int, ...]:
        if prefix + name not in shapes or len(shapes[prefix + name]) != 2:
            raise CheckpointError(f"tensor {prefix + name!r}: expected a matrix, found {shapes.get(prefix + name)}")
        return shapes[prefix + name]

    block = "encoder.block.0.layer."
    gated = f"{prefix}{block}1.DenseReluDense.wi_0.weight" in shapes
    vocabulary, width = shape("shared.weight")
    heads = shape(f"{block}0.SelfAttention.relative_attention_bias.weight")[1]
    inner = shape(f"{block}0.SelfAttention.q.weight")[0]
    hidden = shape(f"{block}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight")[0]
    start = f"{prefix}encoder.block."
    layers = 1 + max(int(name[len(start) :].split(".")[0]) for name in shapes if name.startswith(start))
    return T5Size(vocabulary, width, layers, heads, inner // heads, hidden, gated)
