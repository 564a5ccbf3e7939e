"""Qwen2.5-VL with images, and a robot's state, inside the text, and MLPs of their own for action tokens (WALL-OSS).

    "... front view: <image> ... Instruction: {task} ... Proprioception: <state> ..."
        --words, image tower, linear--> tokens with three positions each (M-RoPE) --mixture, causal--> keys and values

Qwen2.5-VL: arXiv 2502.13923. All shapes are fixed: where in the sequence a token of the text or of an image lands is
computed from the text, with no loop over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vla_models.parts.flow import pad_last
from vla_models.parts.mixture import ExpertConfig, Mixture, MixtureConfig, block_mask, text_mask
from vla_models.parts.qwen_vision import QwenVision, QwenVisionConfig
from vla_models.policy import PolicyError, PolicySpec
from vla_models.torch_policy import Inputs


@dataclass(frozen=True)
class QwenVlConfig:
    """Sizes; the defaults are Qwen2.5-VL-3B's and, for what Qwen lacks, WALL-OSS's.

    vision: the image tower. width, mlp, layers, heads, kv_heads, head_dim: of the language model. action_mlp: of the
    MLPs of action tokens. sections: frequencies that turn with time, row and column. vocabulary: tokens. numbers,
    state_numbers: of an action and of a state inside the network; those that a robot lacks are 0 and masked.
    image_token, state_token: mark in the text where an image, where the state stands. tied: the language head is the
    embedding.
    """

    vision: Mapping[str, Any] | QwenVisionConfig = field(default_factory=QwenVisionConfig)
    width: int = 2048
    mlp: int = 11008
    action_mlp: int = 2048
    layers: int = 36
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    sections: tuple[int, ...] = (16, 24, 24)
    vocabulary: int = 153715
    numbers: int = 20
    state_numbers: int = 20
    image_token: int = 151655
    state_token: int = 151665
    tied: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.vision, Mapping):
            values = {name: tuple(v) if isinstance(v, list) else v for name, v in self.vision.items()}
            object.__setattr__(self, "vision", QwenVisionConfig(**values))


class Prefix(NamedTuple):
    """What is read before the answer. tokens (B, T, width); valid (B, T) bool; positions (3, B, T); following (B, 1):
    the position of what comes next."""

    tokens: Tensor
    valid: Tensor
    positions: Tensor
    following: Tensor


class QwenVl(nn.Module):
    """Qwen2.5-VL, and MLPs of action tokens beside its own (with `actions`).

    Raises PolicyError for cameras, states and actions that do not fit.
    """

    def __init__(self, spec: PolicySpec, config: QwenVlConfig, actions: bool):
        super().__init__()
        if spec.state_dim > config.state_numbers or spec.action_dim > config.numbers:
            raise PolicyError(
                f"policy {spec.name}: expected at most {config.state_numbers} numbers of state and {config.numbers} of "
                f"action, found {spec.state_dim} and {spec.action_dim}"
            )
        self.config, self.padding = config, spec.padding
        width, sizes = config.width, list(spec.cameras.values())
        self.vision = QwenVision(sizes, config.vision, width)
        grids = torch.tensor([self.vision.grid(size) for size in sizes])
        self.register_buffer("grids", grids, persistent=False)
        self.pictured = sum(rows * columns for rows, columns in map(self.vision.grid, sizes))
        self.embedding = nn.Embedding(config.vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head = None if config.tied else nn.Linear(width, config.vocabulary, bias=False)
        language = ExpertConfig(width, config.mlp, "llama", "silu", bias=True)
        action = ExpertConfig(width, config.action_mlp, "llama", "silu", shared=True)
        self.mixture = Mixture(
            MixtureConfig(
                experts=(language, action) if actions else (language,),
                layers=config.layers,
                heads=config.heads,
                kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                rope=((1e6, 1.0),),
                sections=config.sections,
            )
        )
        self.state_in = nn.Linear(2 * config.state_numbers, width, bias=False)
        #: Of a token in the cache: layers, keys and values, KV heads, numbers.
        self.cache_shape = (config.layers, 2, config.kv_heads, config.head_dim)

    def prefix(self, inputs: Inputs) -> Prefix:
        """The text with images and state in their places: one token that marks an image becomes all of its tokens.

        An image's tokens have the position where it begins, plus row and column; what follows it begins behind the
        longer of its sides (M-RoPE, arXiv 2409.12191, section 2.1).
        """
        tokens, (rows, columns) = inputs.tokens, self.grids.unbind(1)
        marked = tokens == self.config.image_token
        which = (marked.long().cumsum(1) - 1).clamp(0, len(rows) - 1)
        words = text_mask(tokens, self.padding)
        starts, _ = _begins(torch.where(marked, (rows * columns)[which], 1))
        places, following = _begins(torch.where(marked, torch.maximum(rows, columns)[which], 1) * words)

        # Token j of the sequence comes from token `source` of the text, as the `inside`-th of its tokens.
        steps = torch.arange(tokens.shape[1] + self.pictured - len(rows), device=tokens.device)
        source = (starts.unsqueeze(1) <= steps.unsqueeze(1)).sum(-1) - 1
        inside = steps - starts.gather(1, source)
        which, picture = which.gather(1, source), marked.gather(1, source)

        state = self.state_in(with_mask(inputs.state, self.config.state_numbers)).unsqueeze(1)
        text = torch.where((tokens == self.config.state_token).unsqueeze(-1), state, self.embedding(tokens))
        seen = torch.cat([self.vision(image) for image in inputs.images], 1)
        first, _ = _begins((rows * columns).unsqueeze(0))
        pixel = torch.where(picture, first[0][which] + inside, 0)
        x = torch.where(picture.unsqueeze(-1), _pick(seen, pixel), _pick(text, source))
        # Written without a choice between truth values, which ONNX Runtime does not have.
        valid = (picture & inputs.present.gather(1, which)) | (~picture & words.gather(1, source))
        within = torch.where(picture, inside, 0)
        offset = torch.stack([torch.zeros_like(within), within // columns[which], within % columns[which]])
        return Prefix(x, valid, places.gather(1, source) + offset, following)

    def prefill(self, prefix: Prefix, hidden: bool = False) -> tuple[Tensor | None, Tensor]:
        """The prefix through the language model: tokens (with `hidden`), and keys and values of every layer."""
        steps = torch.arange(prefix.tokens.shape[1], device=prefix.tokens.device)
        mask = block_mask(steps, steps, prefix.valid)
        streams = [prefix.tokens, None][: len(self.mixture.experts)]
        outputs, cache = self.mixture.prefill(streams, prefix.positions, mask, hidden=hidden)
        return outputs[0], cache

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., width) -> (..., vocabulary)."""
        return hidden @ self.embedding.weight.T if self.head is None else self.head(hidden)


def with_mask(values: Tensor, width: int) -> Tensor:
    """(..., dim) -> (..., 2 * width): filled up with zeros, then 1 for each of the dim numbers and 0 for the others."""
    return torch.cat([pad_last(values, width), pad_last(torch.ones_like(values), width)], -1)


def _begins(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of the parts (B, n) begins when laid end to end, and the sum (B, 1)."""
    ends = lengths.cumsum(1)
    return ends - lengths, ends[:, -1:]


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """values (B, n, width), index (B, T) -> (B, T, width)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
