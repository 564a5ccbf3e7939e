"""A vision-language model of `transformers`: any decoder, any vision tower, and a projector between them.

    images --vision tower--> patches --projector--.
    tokens --embedding--------------------------- > decoder --head--> logits of the next token
                                keys, values (cache)'

The modules are those of `transformers`, built from their settings with random weights (nothing is downloaded) and with
attention written out. Masks, positions and the cache are made here: masks are four-dimensional, so the decoder makes
none of its own, and the cache is a plain tensor, so that prefix and step become graphs of fixed shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vla_models.policy import PolicyError

#: PaliGemma-3B-224 (Beyer et al., arXiv 2407.07726): SigLIP-so400m and Gemma-2B, as in openpi and LeRobot.
PALIGEMMA_LANGUAGE = {
    "model_type": "gemma", "vocab_size": 257152, "hidden_size": 2048, "intermediate_size": 16384,
    "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
PALIGEMMA_VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "patch_size": 14, "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False,
}  # fmt: skip
#: The same kind at a size for tests.
TINY_LANGUAGE = {
    "model_type": "gemma", "vocab_size": 768, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
TINY_VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
PROJECTORS = ("linear", "mlp")


class PastKeys:
    """What a decoder of transformers takes for its cache: gives each layer the past, keeps what the layer adds.

    past: keys and values (B, layers, 2, heads, S, d), or None.
    """

    def __init__(self, past: Tensor | None = None):
        self.past = past
        self.added: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.added.append(torch.stack([keys, values], 1))
        if self.past is None:
            return keys, values
        return torch.cat([self.past[:, layer, 0], keys], 2), torch.cat([self.past[:, layer, 1], values], 2)

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.past is None else self.past.shape[-2]


class VisionLanguageModel(nn.Module):
    """language, vision: settings of transformers' AutoConfig with their `model_type`. cameras: (h, w) in pixels, all
    the same square. projector: "linear" (PaliGemma) or "mlp" (LLaVA). tied: the head's weights are the embedding's.

    Raises PolicyError for settings that transformers does not take, and for cameras that the tower cannot see.
    """

    def __init__(
        self, language: Mapping[str, Any], vision: Mapping[str, Any], cameras: Sequence[tuple[int, int]],
        projector: str = "linear", tied: bool = True,
    ):  # fmt: skip
        super().__init__()
        if len(set(cameras)) > 1 or any(h != w for h, w in cameras):
            raise PolicyError(f"cameras: expected squares of one size, found {sorted(set(cameras))}")
        if projector not in PROJECTORS:
            raise PolicyError(f"projector: expected one of {PROJECTORS}, found {projector!r}")
        self.language = _model("language", language)
        settings = self.language.config
        self.width, self.vocabulary = settings.hidden_size, settings.vocab_size
        heads = settings.num_attention_heads
        #: Shape of one token's keys and values: layers, keys and values, heads, d.
        self.cache_shape = (settings.num_hidden_layers, 2, getattr(settings, "num_key_value_heads", None) or heads,
                            getattr(settings, "head_dim", None) or self.width // heads)  # fmt: skip
        self.head = None if tied else nn.Linear(self.width, self.vocabulary, bias=False)
        self.patches = 0
        if cameras:
            size = cameras[0][0]
            self.vision = _model("vision", {**vision, "image_size": size})
            self.patches = (size // self.vision.config.patch_size) ** 2
            wide = self.vision.config.hidden_size
            self.projector = nn.Linear(wide, self.width)
            if projector == "mlp":
                self.projector = nn.Sequential(
                    nn.Linear(wide, self.width), nn.GELU(), nn.Linear(self.width, self.width)
                )

    def see(self, image: Tensor) -> Tensor:
        """(B, 3, h, w) in [0, 1] -> (B, patches, width). What comes before the patches (a class token) is left out."""
        seen = self.vision(pixel_values=2.0 * image - 1.0).last_hidden_state
        return self.projector(seen[:, -self.patches :])

    def read(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, width), scaled as the decoder wants it."""
        return self.language.get_input_embeddings()(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., width) -> (..., vocabulary)."""
        weight = self.language.get_input_embeddings().weight if self.head is None else self.head.weight
        return nn.functional.linear(hidden, weight)

    def forward(
        self, embedded: Tensor, positions: Tensor, mask: Tensor, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (B, T, width) behind the last norm, and keys and values (B, layers, 2, heads, T, d) of them.

        embedded (B, T, width); positions (B, T) int64; mask (B, T, S + T) bool, true where a token (row) sees another;
        past: keys and values of the S tokens before.
        """
        keys = PastKeys(past)
        added = torch.zeros(mask.shape, dtype=embedded.dtype, device=embedded.device).masked_fill(~mask, -1e9)
        hidden = self.language(
            inputs_embeds=embedded, position_ids=positions, attention_mask=added.unsqueeze(1), past_key_values=keys,
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        return hidden, torch.stack(keys.added, 1)


def _model(name: str, settings: Mapping[str, Any]) -> nn.Module:
    """A model of transformers with random weights. Raises PolicyError."""
    from transformers import AutoConfig, AutoModel

    values = dict(settings)
    kind = values.pop("model_type", None)
    try:
        return AutoModel.from_config(AutoConfig.for_model(kind, **values), attn_implementation="eager")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PolicyError(f"network.{name}: transformers cannot build {kind!r}: {error}") from error
