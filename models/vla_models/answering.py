"""Policies whose chunk is an answer in tokens: what they do on every runtime. Nothing here needs torch."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vla_models.policy import ChunkPrefix, ModelInputs, Policy, PolicyError
from vla_models.tokenizer import TokenizerError
from vla_models.tokenizers import decode_answer

#: step(token, i) -> logits (vocabulary,) of what follows `token`, which is the answer's number i.
Step = Callable[[int, int], np.ndarray]


class AnsweringPolicy(Policy):
    """A policy that decodes its actions token by token; a runtime says how (`prefill`).

    PolicySpec.temperature 0 takes the likeliest token each time; above, tokens are drawn by the request's noise, one
    number each. What does not decode to a chunk is a PolicyError.
    """

    #: Inputs as the runtime's network takes them.
    tensors: Callable[[ModelInputs], Any]
    #: What the tokens mean (see vla_models.tokenizers): WordAnswer, FastAnswer, ...
    answer: Any
    #: Of the last answer.
    tokens: Sequence[int] = ()

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (1, self.answer.length, 1)

    @abstractmethod
    def prefill(self, inputs: Any) -> tuple[np.ndarray, Step]:
        """Read everything before the answer, of a batch of one: logits (vocabulary,) of the first token, and the step
        that goes on from there. inputs: of `tensors`."""

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        self.tokens = self.generate(self.tensors(inputs), self.answer, noise.ravel(), timings)
        try:
            return self.answer.decode(self.tokens)[None].astype(np.float32)
        except TokenizerError as error:
            raise self._undecodable(error) from error

    def generate(self, inputs: Any, answer: Any, noise: np.ndarray, timings: dict[str, float]) -> list[int]:
        """The tokens of one answer. inputs: of `tensors`. Raises PolicyError when it does not come to its end."""
        begin = time.perf_counter()
        logits, step = self.prefill(inputs)
        encoded = time.perf_counter()
        try:
            tokens = decode_answer(answer, logits, step, noise, self.spec.temperature)
        except TokenizerError as error:
            raise self._undecodable(error) from error
        timings["encode"] = timings.get("encode", 0.0) + encoded - begin
        timings["sample"] = timings.get("sample", 0.0) + time.perf_counter() - encoded
        return tokens

    def _undecodable(self, error: TokenizerError) -> PolicyError:
        return PolicyError(f"policy {self.spec.name}: the network's answer is no chunk of actions: {error}")
