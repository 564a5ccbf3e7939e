"""Recipe "rt2": a vision-language model that writes its actions as text (Brohan et al., arXiv 2307.15818).

    image, "Q: what action should the robot take to {task}? A:" --VLM--> "0 128 91 241 5 101 127 200"

The answer is one word for the end of the episode (terminate) and one for each number of the action, of 256 bins over
the range between the 1 % and the 99 % quantile. What a word is depends on the language model (section 3.2):
`words` empty: the least-used tokens of the vocabulary are overwritten with the 256 bins (PaLM-E); or the tokens of each
integer (PaLI-X), which `integers` finds. Only such words are decoded when a robot asks. Training goes on with pictures
and text of the web beside the robot's data (co-fine-tuning), so that the model does not forget what it knew.

RT-2-X (arXiv 2310.08864) is the same network trained on the Open X-Embodiment mixture: another data set, no other code.

PaLI-X (5 B and 55 B) and PaLM-E (12 B), which the paper fine-tunes, were not published. The preset "paper" is therefore
the method on PaliGemma-3B (arXiv 2407.07726, 2.92 B parameters), their open successor in `transformers`; any other
decoder and vision tower that `transformers` has can stand in `language` and `vision`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vla_core.actions import ActionSpace

from vla_models.parts.language_model import (
    PALIGEMMA_LANGUAGE,
    PALIGEMMA_VISION,
    TINY_LANGUAGE,
    TINY_VISION,
    VisionLanguageModel,
)
from vla_models.policy import PolicySpec
from vla_models.preprocess import image_tensor, resize_image
from vla_models.token_policy import TokenNetwork, TokenPolicy, stack
from vla_models.tokenizer import text_tokens
from vla_models.tokenizers import BinTokenizer, WordAnswer
from vla_models.torch_policy import Batch, Inputs, Preset

QUESTION = "Q: what action should the robot take to {task}? A:"


@dataclass(frozen=True)
class Rt2Config:
    """The backbone, and how actions stand in its vocabulary.

    language, vision, projector, tied, bidirectional: see VisionLanguageModel and TokenNetwork. bins: of each number.
    words: the tokens of each bin, see `integers`; empty: bin i overwrites token vocabulary - 1 - skip - i. skip: tokens
    at the end of the vocabulary that stay (PaliGemma: 128 of segmentation). start: token between prompt and answer
    (PaliGemma: the end of a line). end: token behind an answer in words. web_share: of text in the loss of
    co-fine-tuning (paper: about half).
    """

    language: Mapping[str, Any] = field(default_factory=lambda: dict(PALIGEMMA_LANGUAGE))
    vision: Mapping[str, Any] = field(default_factory=lambda: dict(PALIGEMMA_VISION))
    projector: str = "linear"
    tied: bool = True
    bidirectional: bool = True
    bins: int = 256
    words: tuple[tuple[int, ...], ...] = ()
    skip: int = 128
    start: int = 108
    end: int = 1
    web_share: float = 0.5


class WebBatch(NamedTuple):
    """Pictures with questions and answers: inputs of one camera; answers (B, n) int64, counted (B, n) bool."""

    inputs: Inputs
    answers: Tensor
    counted: Tensor


class Rt2Network(TokenNetwork):
    """The network of the recipe "rt2"."""

    def __init__(self, spec: PolicySpec, config: Rt2Config):
        vlm = VisionLanguageModel(
            config.language, config.vision, list(spec.cameras.values()), config.projector, config.tied
        )
        words = config.words or [(vlm.vocabulary - 1 - config.skip - i,) for i in range(config.bins)]
        bins = BinTokenizer(bins=config.bins)
        answer = WordAnswer(bins, words, (spec.horizon, spec.action_dim), vlm.vocabulary, lead=(0, 1))
        super().__init__(spec, vlm, answer, config.start, config.bidirectional)
        self.config = config

    def answers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens of the actions; the leading word says whether the episode ends within them."""
        chunks, padded = batch.actions.detach().float().cpu().numpy(), batch.padded.cpu().numpy()
        rows = [self.answer.encode(chunk, int(past.any())) for chunk, past in zip(chunks, padded, strict=True)]
        inside = [self.answer.inside(row, past) for row, past in zip(rows, padded, strict=True)]
        return stack(rows, inside, batch.actions.device)

    def loss(self, batch: Batch, generator: torch.Generator, web: WebBatch | None = None) -> dict[str, Tensor]:
        """Cross-entropy of the action tokens, mixed with that of `web`'s answers when there are some."""
        robot = self.text_loss(batch.inputs, *self.answers(batch))
        if web is None:
            return {"loss": robot}
        text, share = self.text_loss(*web), self.config.web_share
        return {"loss": (1 - share) * robot + share * text, "robot": robot, "web": text}


class Rt2Policy(TokenPolicy):
    """The recipe "rt2" on torch. `terminated` says whether the last answer ended the episode."""

    Config, Network = Rt2Config, Rt2Network
    parameters = 2.9235e9
    normalization = {"state": "quantile", "action": "quantile"}
    contract = {"tokenizer": "bytes", "prompt": QUESTION, "context": 96, "temperature": 0.0, "fit": "pad", "lead": 1}
    presets = {
        "paper": Preset(
            Rt2Config(),
            {"cameras": {"scene": (224, 224)}, "horizon": 1, "period": 1 / 3,
             "action_space": ActionSpace(("arm",), "pose", (), "chunk", "base", "rpy")},
        ),
        "tiny": Preset(
            Rt2Config(TINY_LANGUAGE, TINY_VISION, start=2, end=2),
            {"cameras": {"scene": (28, 28)}, "horizon": 1},
        ),
    }  # fmt: skip
    training = {"horizon": 1, "period": 1 / 3, "rotation": "rpy", "lr": 1e-4, "cameras": {"scene": (224, 224)}}

    @property
    def terminated(self) -> bool:
        return bool(self.tokens) and self.network.answer.leading(self.tokens) == 1

    def web_batch(self, images: Sequence[np.ndarray], questions: Sequence[str], answers: Sequence[str]) -> WebBatch:
        """Samples of the web. images: (H, W, 3) uint8. Raises PolicyError or TokenizerError for what cannot be read."""
        spec, tokenizer = self.spec, self.processor.tokenizer
        size = next(iter(spec.cameras.values()))
        pictures = image_tensor(np.stack([resize_image(image, size, spec.fit) for image in images]))
        tokens = np.stack([tokenizer.encode(f"Q: {question} A:") for question in questions])
        rows = [np.array([*text_tokens(tokenizer, answer), self.config.end], np.int64) for answer in answers]

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        nothing = tensor(np.zeros((len(tokens), spec.state_dim), np.float32))
        present = tensor(np.ones((len(tokens), 1), bool))
        inputs = Inputs((tensor(pictures),), tensor(tokens), nothing, present)
        return WebBatch(inputs, *stack(rows, [np.ones(len(row), bool) for row in rows], self.device))


def integers(tokenizer: Any, bins: int = 256) -> tuple[tuple[int, ...], ...]:
    """How a tokeniser writes each bin as an integer and a space: Rt2Config.words. tokenizer: of a Processor."""
    return tuple(tuple(text_tokens(tokenizer, f"{number} ")) for number in range(bins))
