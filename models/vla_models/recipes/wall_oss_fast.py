"""Recipe "wall_oss_fast": the branch of WALL-OSS that writes FAST tokens (arXiv 2509.11766).

    "Observation: front view: <image> ... <|im_start|>assistant\\n" --Qwen2.5-VL, causal--> FAST tokens <|im_end|>

The text, its images and its state are those of the recipe "wall_oss"; the answer is written by the language model
alone, whose vocabulary has a word for each FAST token, in their order. It is trained by cross-entropy on the answer.
See the recipe "pi0_fast" for what becomes of an answer that is no chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_models.normalization import Normalizer
from vla_models.parts.qwen_vl import RULES, Prefix, QwenVl, QwenVlConfig, word_tokens
from vla_models.policy import CheckpointError, PolicyError, PolicySpec
from vla_models.published import TensorFiles
from vla_models.recipes.wall_oss import CAMERAS, TINY, read_wall_oss, text_of
from vla_models.token_policy import FastPolicy, TokenNetwork
from vla_models.tokenizer import FileTokenizer, TokenizerError
from vla_models.tokenizers import FastTokenizer, OrderedFastAnswer
from vla_models.torch_policy import Inputs, Preset


@dataclass(frozen=True)
class WallOssFastConfig(QwenVlConfig):
    """Sizes (see QwenVlConfig) and how actions stand in the vocabulary.

    fast: the FAST tokeniser as plain values (FastTokenizer.to_dict); empty: one that is fitted to nothing. merges:
    tokens of a tokeniser that is fitted to recorded data. first: word of FAST token 0. start: the prompt's last token,
    a new line. end: of the end of a turn and a new line. length: most tokens of an answer. free: decode whatever comes.
    """

    fast: Mapping[str, Any] = field(default_factory=dict)
    merges: int = 2048
    first: int = 151667
    start: int = 198
    end: tuple[int, ...] = (151645, 198)
    length: int = 512
    free: bool = False


class WallOssFastNetwork(TokenNetwork):
    """The network of the recipe "wall_oss_fast". Raises PolicyError for a FAST tokeniser that does not fit."""

    vlm: QwenVl

    def __init__(self, spec: PolicySpec, config: WallOssFastConfig):
        shape = (spec.horizon, spec.action_dim)
        try:
            fast = FastTokenizer.from_dict(config.fast) if config.fast else FastTokenizer.unfitted(shape)
            answer = OrderedFastAnswer(
                fast, shape, config.vocabulary, config.first, config.end, config.length, config.free
            )
        except TokenizerError as error:
            raise PolicyError(f"policy {spec.name}: {error}") from error
        super().__init__(spec, QwenVl(spec, config, actions=False), answer, config.start, bidirectional=False)

    def hidden(self, inputs: Inputs, tokens: Tensor, start_seen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """See TokenNetwork. Of a token in the cache the last tensor has its position + 1, 0 if it is not there."""
        prefix = self.vlm.prefix(inputs)
        places = (prefix.following + torch.arange(tokens.shape[1], device=tokens.device)).expand(3, -1, -1)
        whole = Prefix(
            torch.cat([prefix.tokens, self.vlm.embedding(tokens)], 1),
            torch.cat([prefix.valid, prefix.valid.new_ones(tokens.shape)], 1),
            torch.cat([prefix.positions, places], 2),
            prefix.following + tokens.shape[1],
        )
        hidden, keys = self.vlm.prefill(whole, hidden=True)
        return hidden, keys, (whole.positions.amax(0) + 1) * whole.valid

    def step(self, keys: Tensor, valid: Tensor, tail: Tensor, token: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """See TokenNetwork. The answer goes on from the largest position: an image has fewer of them than tokens."""
        places = torch.arange(tail.shape[-2], device=tail.device)
        sees = torch.cat([valid > 0, places < index.unsqueeze(1), valid[:, -1:] > 0], 1)
        positions = (valid.amax(1, keepdim=True) + index.unsqueeze(1)).expand(3, -1, -1)
        embedded = self.vlm.embedding(token.unsqueeze(1))
        (hidden,), added = self.vlm.mixture.prefill(
            [embedded], positions, sees.unsqueeze(1), torch.cat([keys, tail], -2)
        )
        here = (places == index.unsqueeze(1))[:, None, None, None, :, None]
        return self.vlm.logits(hidden[:, -1]), torch.where(here, added, tail)


class WallOssFastPolicy(FastPolicy):
    """The recipe "wall_oss_fast" on torch. Reads WALL-OSS with a FAST tokeniser in the folder `fast` beside it."""

    Config, Network = WallOssFastConfig, WallOssFastNetwork
    #: Qwen2.5-VL-3B's; the published file holds the flow branch's too.
    parameters = 3.75e9
    normalization = {"state": "quantile", "action": "quantile"}
    contract = {"horizon": 32, "period": 0.05, "tokenizer": "bytes", "context": 256, "temperature": 0.0}
    training = {"state": "joint", "kind": "joint", "horizon": 32, "period": 0.05, "lr": 2e-5, "decay": 0.01}
    presets = {
        "paper": Preset(
            WallOssFastConfig(image_token=4, state_token=5),
            {"arms": {"left": 6, "right": 6}, "cameras": dict.fromkeys(CAMERAS, (196, 252)), "optional": CAMERAS[1:]},
        ),
        "tiny": Preset(
            WallOssFastConfig(**{**TINY, "vocabulary": 768}, first=259, start=13, end=(2, 13), length=140),
            {"cameras": {"face_view": (28, 42), "wrist": (28, 28)}, "optional": ("wrist",), "horizon": 8,
             "context": 160},
        ),
    }  # fmt: skip
    published = tuple(replace(rule, name=rule.name and f"vlm.{rule.name}") for rule in RULES)

    def __init__(self, spec: PolicySpec, *args: Any, **kwargs: Any):
        super().__init__(without_last(text_of(spec)), *args, **kwargs)

    @classmethod
    def for_cameras(cls, spec: PolicySpec) -> PolicySpec:
        return text_of(spec, anew=True)

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, WallOssFastConfig, dict[str, Normalizer]]:
        """See recipes.wall_oss.read_wall_oss. The FAST tokeniser lies in the folder `fast`."""
        spec, sizes, normalizers = read_wall_oss(cls.name(), cls.contract, folder, config, files)
        tokenizer = Path(folder, spec.tokenizer)
        first, turn = word_tokens(tokenizer, "<|action_token_0|>", "<|im_end|>")
        try:
            (line,) = FileTokenizer(tokenizer, 0, 0).reader.encode("\n", add_special_tokens=False).ids
            fast = FastTokenizer.load(folder / "fast")
        except (TokenizerError, ValueError) as error:
            raise CheckpointError(f"{folder}: tokeniser: {error}") from error
        answer = {"fast": fast.to_dict(), "first": first, "start": line, "end": (turn, line)}
        return without_last(spec), WallOssFastConfig(**sizes, **answer, free=True), normalizers


def without_last(spec: PolicySpec) -> PolicySpec:
    """The same specification without the prompt's last new line, which opens the answer."""
    return replace(spec, prompt=spec.prompt.removesuffix("\n"))
