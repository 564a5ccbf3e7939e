"""Qwen2.5-VL with images, and a robot's state, inside the text, and MLPs of their own for action tokens (WALL-OSS).

    "... front view: <image> ... Instruction: {task} ... Proprioception: <state> ..."
        --words, image tower, linear--> tokens with three positions each (M-RoPE) --mixture, causal--> keys and values

Qwen2.5-VL: arXiv 2502.13923. All shapes are fixed: where in the sequence a token of the text or of an image lands is
computed from the text, with no loop over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vla_models.lerobot import STATISTICS
from vla_models.parts.flow import check_numbers, pad_last
from vla_models.parts.mixture import ExpertConfig, Mixture, MixtureConfig, block_mask, layer_rules, text_mask
from vla_models.parts.qwen_vision import QwenVision, QwenVisionConfig
from vla_models.policy import CheckpointError, PolicySpec
from vla_models.published import Rule, TensorFiles, require
from vla_models.tokenizer import FileTokenizer, TokenizerError
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

    vision: QwenVisionConfig = field(default_factory=QwenVisionConfig)
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
        check_numbers(spec, config.state_numbers, config.numbers)
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


#: Names in LeRobot's files begin with "model.", those of the makers do not.
THEIRS = r"(?:model\.)?"
RULES = (
    Rule(THEIRS + r"action_preprocessor\.normalizer.*", None, "statistics of the makers' robots, not weights"),
    Rule(THEIRS + r"visual\.(.+)", r"vision.tower.\1"),
    Rule(THEIRS + r"model\.embed_tokens\.weight", "embedding.weight"),
    Rule(THEIRS + r"lm_head\.weight", "head.weight", "the embedding again"),
    *(
        Rule(
            THEIRS + rf"model\.layers\.(\d+)\.moe\.experts\.([01])\.{part}_proj\.weight",
            rf"mixture.experts.\2.layers.\1.mlp.{part}.weight",
            "the other branch's",
        )
        for part in ("gate", "up", "down")
    ),
    *layer_rules(THEIRS + "model", "mixture.experts.0"),
    *(
        Rule(THEIRS + rf"action_preprocessor\.{theirs}\.weight", f"{ours}.weight", "the other branch's")
        for theirs, ours in {
            "w1": "action_in", "w2": "time_in", "w3": "time_out", "action_proj_back": "action_out",
            "propri_proj": "state_in",
        }.items()
    ),
    STATISTICS,
)  # fmt: skip
#: Settings that the network has no choice of, with what is taken where config.json is silent.
FIXED = {"num_experts": 2, "mlp_moe": True, "attention_moe": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6}


def published_sizes(base: Path, inner: Mapping[str, Any], files: TensorFiles) -> tuple[dict[str, Any], int]:
    """Fields of QwenVlConfig, and the token after the end of a text, of WALL-OSS's makers' folder `base`.

    They are those of its config.json (`inner`), its tokenizer.json and, where two files may differ, the shapes. Raises
    CheckpointError.
    """
    require(base / "config.json", inner, FIXED)
    vision, experts, shapes = inner["vision_config"], inner["experts"], files.shapes
    root = "model." if any(name.startswith("model.visual.") for name in shapes) else ""
    embedding, head = f"{root}model.embed_tokens.weight", f"{root}lm_head.weight"
    state, padding = word_tokens(base / "tokenizer.json", "<|propri|>", "<|endoftext|>")
    sizes = {
        "vision": QwenVisionConfig(
            vision["hidden_size"], vision["intermediate_size"], vision["depth"], vision["num_heads"],
            vision["patch_size"], vision["spatial_merge_size"], vision["window_size"],
            tuple(vision["fullatt_block_indexes"]),
        ),
        "width": inner["hidden_size"],
        "mlp": experts[0]["intermediate_size"],
        "action_mlp": experts[1]["intermediate_size"],
        "layers": inner["num_hidden_layers"],
        "heads": inner["num_attention_heads"],
        "kv_heads": inner["num_key_value_heads"],
        "head_dim": inner["hidden_size"] // inner["num_attention_heads"],
        "sections": tuple(inner["rope_scaling"]["mrope_section"]),
        "vocabulary": shapes[embedding][0],
        "numbers": shapes[f"{root}action_preprocessor.action_proj_back.weight"][0],
        "state_numbers": shapes[f"{root}action_preprocessor.propri_proj.weight"][1] // 2,
        "image_token": inner["image_token_id"],
        "state_token": state,
        "tied": head not in shapes or torch.equal(files[head], files[embedding]),
    }  # fmt: skip
    return sizes, padding


def word_tokens(path: Path, *words: str) -> list[int]:
    """Tokens of words that a tokenizer.json has whole. Raises CheckpointError."""
    try:
        reader = FileTokenizer(path, 0, 0).reader
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    tokens = [reader.token_to_id(word) for word in words]
    if None in tokens:
        raise CheckpointError(f"{path}: expected a tokeniser with {', '.join(words)}, found one without")
    return tokens
