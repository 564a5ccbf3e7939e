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

from vla_models.lerobot import STATISTICS, Statistics, arms_of
from vla_models.normalization import Normalizer
from vla_models.parts.mixture import Mixture
from vla_models.parts.paligemma import Embedder, PaliGemmaConfig, paligemma_rules, paligemma_sizes
from vla_models.policy import CheckpointError, PolicyError, PolicySpec, example_spec
from vla_models.published import Rule, TensorFiles, find_checkpoint, translate
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
IMAGES = "observation.images."


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

        Beside it must lie PaliGemma's tokenizer.json; the FAST tokeniser is the folder `fast` beside it, or the one
        that config.json names (a folder or a hub name). All cameras but the first may be missing.
        """
        spec, normalizers = _specification(cls, folder, config, files)
        base = next((name.removesuffix(HEAD) for name in files.shapes if name.endswith(HEAD)), "")
        if base and base + EMBEDDING not in files.shapes:  # saved once for the two
            files.alias(base + EMBEDDING, base + HEAD)
        tied = not base or torch.equal(files[base + EMBEDDING], files[base + HEAD])
        beside = folder / "fast"
        try:
            fast = FastTokenizer.load(beside if beside.exists() else find_checkpoint(config["action_tokenizer_name"]))
            answer = {"fast": fast.to_dict(), **_words(folder)}
        except (TokenizerError, KeyError) as error:
            raise CheckpointError(f"{folder}: the FAST tokeniser: {error}") from error
        more = {"skip": int(config["fast_skip_tokens"]), "length": int(config["max_decoding_steps"]), "tied": tied}
        sizes = _sizes(files, cls.published)
        return spec, Pi0FastConfig(**sizes, **answer, **more, free=True, start_seen=True), normalizers


def _specification(
    kind: type[Pi0FastPolicy], folder: Path, config: Mapping[str, Any], files: TensorFiles
) -> tuple[PolicySpec, dict[str, Normalizer]]:
    """What LeRobot's config.json says of cameras, numbers and horizon. Raises CheckpointError.

    14 numbers are ALOHA's two arms, N others one arm of N - 1 joints and a gripper. A base model has no statistics;
    then numbers are not normalised. The period is not published; pi0's is 0.02 s.
    """
    where = folder / "config.json"
    try:
        features = {name: list(value["shape"]) for name, value in config["input_features"].items()}
        numbers = int(config["output_features"]["action"]["shape"][0])
        state = int(features.pop("observation.state")[0])
        size = tuple(int(side) for side in config["image_resolution"])
        modes = dict(config["normalization_mapping"])
        contract = dict(kind.contract) | {
            "horizon": int(config["chunk_size"]), "context": int(config["tokenizer_max_length"]), "period": 0.02,
            "temperature": float(config["temperature"]), "tokenizer": "tokenizer.json",
        }  # fmt: skip
        needed = {name: config[name] for name in ("fast_skip_tokens", "max_decoding_steps", "action_tokenizer_name")}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{where}: expected the settings of LeRobot's pi0_fast, found {error!r}") from error
    cameras = {name.removeprefix(IMAGES): size for name in features if name.startswith(IMAGES)}
    if len(cameras) < len(features) or not cameras or state != numbers or not all(needed.values()):
        raise CheckpointError(
            f"{where}: expected images, as many numbers in observation.state as in action ({numbers}), and settings of "
            f"the answer, found {sorted(features)}, {state} and {needed}"
        )
    if config.get("use_relative_actions"):
        raise CheckpointError(f"{where}: use_relative_actions: expected false, found true")
    statistics = Statistics(folder, files)
    normalizers = statistics.normalizers(modes, numbers, numbers, bare=True)
    arms = arms_of(numbers)
    return example_spec(kind.name(), arms, cameras, **contract, optional=tuple(cameras)[1:]), normalizers


def _words(folder: Path) -> dict[str, tuple[int, ...]]:
    """How PaliGemma's tokeniser beside the weights writes the answer's frame. Raises TokenizerError."""
    reader = FileTokenizer(folder / "tokenizer.json", 0, 0).reader
    lead, bar = (tuple(reader.encode(text, add_special_tokens=False).ids) for text in ("Action: ", "|"))
    begin, stop = (reader.token_to_id(name) for name in ("<bos>", "<eos>"))
    if begin is None or stop is None or len(bar) != 1:
        raise TokenizerError(f"{folder / 'tokenizer.json'}: expected PaliGemma's, found one without <bos>, <eos> or |")
    return {"lead": lead, "end": (*bar, stop), "start": begin}


def _sizes(files: TensorFiles, rules: tuple[Rule, ...]) -> dict[str, int]:
    """The fields of PaliGemmaConfig that the shapes tell. Raises CheckpointError for a tensor that is missing."""
    try:
        ours, _ = translate(files.shapes, rules)
        return paligemma_sizes({n.removeprefix("vlm."): files.shapes[of[0][0]] for n, of in ours.items()})
    except (CheckpointError, KeyError, ValueError) as error:
        raise CheckpointError(f"{files.path}: expected the tensors of PaliGemma, found {error}") from error
