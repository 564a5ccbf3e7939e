"""Words to numbers: a lower-case word-level vocabulary built from the instructions of the training set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

WORD = re.compile(r"[a-z0-9']+")


class TokenizerError(ValueError):
    """An instruction that cannot be read; the message names it."""


class Tokenizer:
    """Maps an instruction to `context` word indices, padded with 0.

    vocabulary: words; index 0 is the padding and is the empty word. An empty vocabulary ignores the instruction.
    """

    def __init__(self, vocabulary: Sequence[str], context: int):
        if vocabulary and vocabulary[0] != "":
            raise TokenizerError(f"vocabulary: the first word must be the padding '', found {vocabulary[0]!r}")
        self.vocabulary = tuple(vocabulary)
        self.context = context
        self._index = {word: i for i, word in enumerate(self.vocabulary) if word}

    @staticmethod
    def build(instructions: Iterable[str]) -> tuple[str, ...]:
        """The vocabulary of all `instructions`: padding, then their words in alphabetical order."""
        words = sorted({word for text in instructions for word in WORD.findall(text.lower())})
        return ("", *words) if words else ()

    def encode(self, instruction: str) -> np.ndarray:
        """(context,) int64. Unknown words are dropped.

        Raises TokenizerError when no word is known (an empty instruction too) or the known ones exceed the context.
        """
        tokens = np.zeros(self.context, np.int64)
        if not self.vocabulary:
            return tokens
        known = [self._index[word] for word in WORD.findall(instruction.lower()) if word in self._index]
        if not known:
            raise TokenizerError(
                f"instruction {instruction!r}: no word of it is known to the policy; it knows: "
                f"{' '.join(self.vocabulary[1:])}"
            )
        if len(known) > self.context:
            raise TokenizerError(
                f"instruction {instruction!r:.60}: expected at most {self.context} words, found {len(known)}"
            )
        tokens[: len(known)] = known
        return tokens
