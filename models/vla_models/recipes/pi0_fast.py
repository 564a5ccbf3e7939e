"""Recipe "pi0_fast": pi0's backbone that writes FAST tokens instead of denoising (Pertsch et al., arXiv 2501.09747).

    images, "Task: {task}, State: 12 200 ...;\n" --PaliGemma (prefix-LM)--> "Action: " FAST tokens "|"

There is no action expert: the chunk is compressed by the FAST tokeniser (`vla_models.tokenizers.FastTokenizer`: cosine
transform, rounding, byte-pair encoding) and its tokens overwrite the last ones of PaliGemma's vocabulary. Cross-entropy
on the answer; greedy decoding. The tokeniser is fitted to the recorded chunks before training and lies in policy.json,
beside the weights; unfitted, each coefficient is a token or two.

In use only tokens with which the answer can still become a chunk are decoded; with `free`, as in the reference, any
token is, and an answer that is no chunk is an error (the reference takes zeros for it).
Checkpoints: lerobot/pi0fast-base and what LeRobot trained from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_models.lerobot import STATISTICS, LeRobotConfig
from vla_models.normalization import Normalizer
from vla_models.parts.mixture import Mixture
from vla_models.parts.paligemma import Embedder, PaliGemmaConfig, lerobot_spec, paligemma_rules, paligemma_sizes
from vla_models.policy import CheckpointError, PolicyError, PolicySpec
from vla_models.published import Rule, TensorFiles, find_checkpoint, own_shapes, require
from vla_models.token_policy import FastPolicy, TokenNetwork
from vla_models.tokenizer import FileTokenizer, TokenizerError
from vla_models.tokenizers import FastAnswer, FastTokenizer
from vla_models.torch_policy import Preset


@dataclass(frozen=True)
class Pi0FastConfig(PaliGemmaConfig):
    """Sizes (see PaliGemmaConfig) and how actions stand in the vocabulary.

    fast: the FAST tokeniser as plain values (FastTokenizer.to_dict); empty: one that is fitted to nothing. merges:
    tokens of a tokeniser that is fitted to recorded data. skip: tokens at the end of the vocabulary that stay
    (segmentation). lead: tokens of "Action: ", before the chunk's. end: of "|" and the end of the text. start: between
    prompt and answer. length: most tokens of an answer. free: decode whatever comes. start_seen: see TokenNetwork; as
    LeRobot decodes. tied: the language head is the embedding.
    """

    fast: Mapping[str, Any] = field(default_factory=dict)
    merges: int = 1024
    skip: int = 128
    lead: tuple[int, ...] = (4022, 235292, 235248)
    end: tuple[int, ...] = (235371, 1)
    start: int = 2
    length: int = 256
    free: bool = False
    start_seen: bool = False
    tied: bool = True


class PaliGemma(nn.Module):
    """PaliGemma as the backbone of a TokenNetwork: the embedder of pi0 and its mixture with one expert."""

    def __init__(self, spec: PolicySpec, config: Pi0FastConfig):
        super().__init__()
        self.embedder = Embedder(spec, config)
        self.mixture = Mixture(config.mixture())
        self.head = None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)
        self.vocabulary = config.vocabulary
        self.cache_shape = (config.layers, 2, config.kv_heads, config.head_dim)
        self.see, self.read = self.embedder.images, self.embedder.words

    def logits(self, hidden: Tensor) -> Tensor:
        return self.embedder.logits(hidden) if self.head is None else self.head(hidden)

    def forward(
        self, embedded: Tensor, positions: Tensor, mask: Tensor, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        (hidden,), keys = self.mixture.prefill([embedded], positions, mask, past)
        return hidden, keys


class Pi0FastNetwork(TokenNetwork):
    """The network of the recipe "pi0_fast". Raises PolicyError for a FAST tokeniser that does not fit."""

    def __init__(self, spec: PolicySpec, config: Pi0FastConfig):
        shape = (spec.horizon, spec.action_dim)
        try:
            fast = FastTokenizer.from_dict(config.fast) if config.fast else FastTokenizer.unfitted(shape)
            answer = FastAnswer(
                fast, shape, config.vocabulary, config.skip, config.lead, config.end, config.length, config.free
            )
        except TokenizerError as error:
            raise PolicyError(f"policy {spec.name}: {error}") from error
        super().__init__(spec, PaliGemma(spec, config), answer, config.start, start_seen=config.start_seen)


THEIRS = r"(?:model\.)?paligemma_with_expert\.paligemma\."
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


class Pi0FastPolicy(FastPolicy):
    """The recipe "pi0_fast" on torch."""

    Config, Network = Pi0FastConfig, Pi0FastNetwork
    parameters = 2.9235e9
    normalization = {"state": "quantile", "action": "quantile"}
    contract = {
        "prompt": "Task: {task}, State: {state};\n", "tokenizer": "bytes", "context": 200, "temperature": 0.0,
        "fit": "pad",
    }  # fmt: skip
    published = (
        Rule(THEIRS + r"lm_head\.weight", "vlm.head.weight", "the embedding again"),
        *paligemma_rules(THEIRS, "vlm.embedder", "vlm.mixture.experts.0"),
        STATISTICS,
    )
    presets = {
        "paper": Preset(
            Pi0FastConfig(),
            {"cameras": dict.fromkeys(("base", "left_wrist", "right_wrist"), (224, 224)),
             "optional": ("left_wrist", "right_wrist"), "horizon": 50, "period": 0.02},
        ),
        "tiny": Preset(
            Pi0FastConfig(32, 48, 1, 2, width=32, mlp=64, layers=2, heads=2, head_dim=16, vocabulary=768, skip=16,
                          lead=(68, 61), end=(127, 2), length=140),
            {"cameras": {"base": (28, 28), "wrist": (28, 28)}, "optional": ("wrist",), "horizon": 8, "context": 96},
        ),
    }  # fmt: skip
    training = {"horizon": 50, "period": 0.02, "lr": 2.5e-5, "state": "joint", "kind": "joint"}

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, Pi0FastConfig, dict[str, Normalizer]]:
        """A checkpoint of LeRobot's pi0_fast.

        The FAST tokeniser is the folder `fast` beside it, or the one that config.json names (a folder or a hub name);
        for the rest see lerobot_spec.
        """
        robot = LeRobotConfig(folder, config, files, bare=True)
        require(robot.where, config, {"use_relative_actions": False})
        spec = lerobot_spec(cls, robot, config, temperature=float(config["temperature"]))
        base = next((name.removesuffix(HEAD) for name in files.shapes if name.endswith(HEAD)), "")
        if base and base + EMBEDDING not in files.shapes:  # saved once for the two
            files.alias(base + EMBEDDING, base + HEAD)
        tied = not base or torch.equal(files[base + EMBEDDING], files[base + HEAD])
        beside = folder / "fast"
        try:
            fast = FastTokenizer.load(beside if beside.exists() else find_checkpoint(config["action_tokenizer_name"]))
            answer = {"fast": fast.to_dict(), **_words(folder)}
        except TokenizerError as error:
            raise CheckpointError(f"{folder}: the FAST tokeniser: {error}") from error
        shapes = own_shapes(files, cls.published)
        network = Pi0FastConfig(
            **paligemma_sizes({name.removeprefix("vlm."): shape for name, shape in shapes.items()}),
            **answer,
            skip=int(config["fast_skip_tokens"]),
            length=int(config["max_decoding_steps"]),
            tied=tied,
            free=True,
            start_seen=True,
        )
        return spec, network, robot.normalizers()


def _words(folder: Path) -> dict[str, tuple[int, ...]]:
    """How PaliGemma's tokeniser beside the weights writes the answer's frame. Raises TokenizerError."""
    reader = FileTokenizer(folder / "tokenizer.json", 0, 0).reader
    lead, bar = (tuple(reader.encode(text, add_special_tokens=False).ids) for text in ("Action: ", "|"))
    begin, stop = (reader.token_to_id(name) for name in ("<bos>", "<eos>"))
    if begin is None or stop is None or len(bar) != 1:
        raise TokenizerError(f"{folder / 'tokenizer.json'}: expected PaliGemma's, found one without <bos>, <eos> or |")
    return {"lead": lead, "end": (*bar, stop), "start": begin}
