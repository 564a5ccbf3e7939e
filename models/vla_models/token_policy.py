"""Policies whose actions are words of a language model, predicted one after the other.

    images, text, start --encode--> cache of the prefix (once a chunk, never changed), logits of the first token
    token, its number   --step----> logits of the next one, cache of the answer (as long as the longest answer)

`TokenNetwork` is the network of such a policy and `TokenPolicy` decodes it; a recipe says what the answer looks like
(vla_models.tokenizers.WordAnswer, FastAnswer). `encode` and `step` are functions of tensors with fixed shapes, so each
becomes one exported graph; which token is taken is decided outside of them (vla_models.answering), in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_models.answering import AnsweringPolicy, Step
from vla_models.parts.language_model import VisionLanguageModel
from vla_models.policy import PolicySpec
from vla_models.tokenizers import FastTokenizer
from vla_models.torch_policy import Batch, Inputs, TorchPolicy


class TokenNetwork(nn.Module):
    """A vision-language model that answers with the words of `answer`.

    start: token after the prompt that opens the answer. bidirectional: the tokens of the prefix see each other
    (prefix-LM, PaliGemma); otherwise each sees those before it. start_seen: the prefix sees the opening token too, in
    use, though not in training (LeRobot's pi0-FAST); only with `bidirectional`.
    """

    def __init__(
        self, spec: PolicySpec, vlm: VisionLanguageModel, answer: Any, start: int, bidirectional: bool = True,
        start_seen: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.vlm, self.answer = vlm, answer
        #: Tokens of the longest answer.
        self.length = answer.length
        self.start, self.padding = start, spec.padding
        self.bidirectional, self.start_seen = bidirectional, start_seen

    def prefix(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Images, then text: (B, P, width), and which of them are there (B, P) bool."""
        parts = [self.vlm.see(image) for image in inputs.images] + [self.vlm.read(inputs.tokens)]
        valid = [inputs.present[:, i : i + 1].expand(-1, part.shape[1]) for i, part in enumerate(parts[:-1])]
        text = (inputs.tokens != self.padding).long().flip(1).cumsum(1).flip(1) > 0
        return torch.cat(parts, 1), torch.cat([*valid, text], 1)

    def hidden(self, inputs: Inputs, tokens: Tensor, start_seen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix and `tokens` (B, n) behind it: hidden states, keys and values, validity, all (P + n) long."""
        prefix, valid = self.prefix(inputs)
        valid = torch.cat([valid, valid.new_ones(tokens.shape)], 1)
        embedded = torch.cat([prefix, self.vlm.read(tokens)], 1)
        places = torch.arange(embedded.shape[1], device=embedded.device)
        ends = prefix.shape[1] + int(start_seen)
        sees = places <= places.unsqueeze(1)
        if self.bidirectional:
            sees = sees | (places < ends)
        hidden, keys = self.vlm(embedded, valid.cumsum(1) - 1, sees & valid.unsqueeze(1))
        return hidden, keys, valid

    def encode(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The prefix and the opening token: what they leave to the steps, and logits (B, vocabulary) of what comes.

        That is keys and values (B, layers, 2, heads, P, d), and which of the P are no padding (B, P) bool.
        """
        start = torch.full_like(inputs.tokens[:, :1], self.start)
        hidden, keys, valid = self.hidden(inputs, start, self.start_seen)
        return keys, valid, self.vlm.logits(hidden[:, -1])

    def blank(self, keys: Tensor) -> Tensor:
        """The cache of an answer that has no tokens yet: (B, layers, 2, heads, length, d)."""
        layers, two, heads, size = self.vlm.cache_shape
        return keys.new_zeros(keys.shape[0], layers, two, heads, self.length, size)

    def step(self, keys: Tensor, valid: Tensor, tail: Tensor, token: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, vocabulary) of what follows `token` (B,), the answer's number `index` (B,), and the new tail.

        keys, valid: of `encode`. tail: cache of the tokens before, of `blank` at first; the new one has `token` too.
        """
        places = torch.arange(tail.shape[-2], device=tail.device)
        sees = torch.cat([valid, places < index.unsqueeze(1), valid.new_ones(valid.shape[0], 1)], 1)
        positions = valid.sum(1, keepdim=True) + index.unsqueeze(1)
        past = torch.cat([keys, tail], -2)
        hidden, added = self.vlm(self.vlm.read(token.unsqueeze(1)), positions, sees.unsqueeze(1), past)
        here = (places == index.unsqueeze(1))[:, None, None, None, :, None]
        return self.vlm.logits(hidden[:, -1]), torch.where(here, added, tail)

    def text_loss(self, inputs: Inputs, answers: Tensor, counted: Tensor) -> Tensor:
        """Cross-entropy of `answers` (B, n) int64 behind the prefix, mean over those that are `counted` (B, n) bool."""
        start = torch.full_like(answers[:, :1], self.start)
        hidden, _, _ = self.hidden(inputs, torch.cat([start, answers[:, :-1]], 1))
        logits = self.vlm.logits(hidden[:, -answers.shape[1] :]).float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), answers, reduction="none")
        weights = counted.to(losses)
        return (losses * weights).sum() / weights.sum().clamp(min=1)

    def answers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens (B, n) of the actions, and which count: those of steps inside the episode."""
        chunks, padded = batch.actions.detach().float().cpu().numpy(), batch.padded.cpu().numpy()
        rows = [self.answer.encode(chunk) for chunk in chunks]
        inside = [self.answer.inside(row, past) for row, past in zip(rows, padded, strict=True)]
        return stack(rows, inside, batch.actions.device)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy of the tokens of the actions."""
        return {"loss": self.text_loss(batch.inputs, *self.answers(batch))}


class TokenPolicy(AnsweringPolicy, TorchPolicy):
    """An AnsweringPolicy on torch; `Network` is a TokenNetwork."""

    @property
    def answer(self) -> Any:
        return self.network.answer

    def prefill(self, inputs: Inputs) -> tuple[np.ndarray, Step]:
        with torch.no_grad():
            keys, valid, logits = self.network.encode(inputs)
            tail = self.network.blank(keys)
        return logits[0].float().cpu().numpy(), steps_of(self.network.step, keys, valid, tail)


def steps_of(go_on: Callable[..., tuple[Tensor, Tensor]], keys: Tensor, valid: Tensor, tail: Tensor) -> Step:
    """The steps of an answer: go_on(keys, valid, tail, token, index) -> logits, tail (see TokenNetwork.step)."""

    def step(token: int, index: int) -> np.ndarray:
        nonlocal tail
        number = torch.tensor([token, index], device=keys.device)
        with torch.no_grad():
            logits, tail = go_on(keys, valid, tail, number[:1], number[1:])
        return logits[0].float().cpu().numpy()

    return step


class FastPolicy(TokenPolicy):
    """A TokenPolicy whose answers are FAST tokens; its Config has `fast` (FastTokenizer.to_dict) and `merges`."""

    @classmethod
    def fitted(cls, network: Mapping[str, Any], chunks: Callable[[], np.ndarray]) -> Mapping[str, Any]:
        """The settings with a FAST tokeniser of the recorded chunks, unless they have one already."""
        if network.get("fast"):
            return network
        fast = FastTokenizer.fit(chunks(), vocabulary=network.get("merges", cls.Config.merges))
        return {**network, "fast": fast.to_dict()}


def stack(rows: Sequence[np.ndarray], counted: Sequence[np.ndarray], device: Any) -> tuple[Tensor, Tensor]:
    """Token sequences of different lengths as (B, n) int64, filled up with 0, and `counted` (B, n) bool with false."""
    tokens = np.zeros((len(rows), max(len(row) for row in rows)), np.int64)
    mask = np.zeros(tokens.shape, bool)
    for i, (row, count) in enumerate(zip(rows, counted, strict=True)):
        tokens[i, : len(row)], mask[i, : len(row)] = row, count
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)
