"""Text to numbers: the words of the training set, bytes, or the tokenizer.json of a published model.

Each gives `encode(text) -> (context,) int64`, padded, and refuses a text that is longer than the context.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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


class ByteTokenizer:
    """UTF-8 bytes as tokens 3 to 258, after a 1 for the beginning: no vocabulary to learn or to ship. 2 ends a text."""

    BEGIN, END, FIRST, SIZE = 1, 2, 3, 259

    def __init__(self, context: int, padding: int = 0):
        self.context = context
        self.padding = padding

    def encode(self, text: str) -> np.ndarray:
        """(context,) int64. Raises TokenizerError when the text is longer."""
        return _padded([self.BEGIN, *(self.FIRST + byte for byte in text.encode())], self.context, self.padding, text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens` up to the end; what is no byte is left out."""
        data = []
        for token in tokens:
            if token == self.END:
                break
            if token >= self.FIRST and token < self.SIZE:
                data.append(int(token) - self.FIRST)
        return bytes(data).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json of Hugging Face's `tokenizers`, with the special tokens that it adds by itself."""

    def __init__(self, path: Path, context: int, padding: int):
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise TokenizerError(f"{path}: reading it needs the package tokenizers: pip install tokenizers") from None
        try:
            self.reader: Any = Reader.from_file(str(path))
        except Exception as error:  # the reader's own exception has no class
            raise TokenizerError(f"{path}: expected a tokenizer.json, found: {error}") from error
        self.context = context
        self.padding = padding

    def encode(self, text: str) -> np.ndarray:
        """(context,) int64. Raises TokenizerError when the text has more tokens."""
        return _padded(self.reader.encode(text).ids, self.context, self.padding, text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, without special ones."""
        return self.reader.decode([int(token) for token in tokens])


def make_tokenizer(kind: str, vocabulary: Sequence[str], context: int, padding: int, folder: Path | None) -> Any:
    """The tokeniser of a policy. See PolicySpec.tokenizer; `folder` is where a file of that name lies.

    Raises TokenizerError when it cannot be read.
    """
    if kind == "words":
        return Tokenizer(vocabulary, context)
    if kind == "bytes":
        return ByteTokenizer(context, padding)
    return FileTokenizer(Path(folder or "") / kind, context, padding)


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of `text` and nothing before or behind them. tokenizer: of a Processor, "bytes" or a file.

    Raises TokenizerError for a tokeniser that has no text of its own ("words").
    """
    if hasattr(tokenizer, "reader"):
        return tokenizer.reader.encode(text, add_special_tokens=False).ids
    if hasattr(tokenizer, "FIRST"):
        return [tokenizer.FIRST + byte for byte in text.encode()]
    raise TokenizerError("tokenizer: expected 'bytes' or a tokenizer.json, found words of the instructions alone")


def _padded(tokens: Sequence[int], context: int, padding: int, text: str) -> np.ndarray:
    if len(tokens) > context:
        raise TokenizerError(f"text {text!r:.80}: expected at most {context} tokens, found {len(tokens)}")
    out = np.full(context, padding, np.int64)
    out[: len(tokens)] = tokens
    return out
