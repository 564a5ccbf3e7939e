"""Actions to tokens and back: uniform bins (RT-1, RT-2), OpenVLA's bins, and FAST; and what an answer of them may be.

Each tokeniser has `encode(chunk) -> int64 tokens` and `decode(tokens) -> chunk`; chunks are normalised actions. Token
sequences that mean no chunk raise TokenizerError; none becomes zeros. An "answer" (`WordAnswer`, `FastAnswer`) says how
a chunk stands in a language model's vocabulary and which tokens may follow those that are there, and `decode_answer`
writes one token after the other. Nothing here needs torch: every runtime decodes with these functions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vla_models.tokenizer import TokenizerError

FAST_FORMAT = "vla-fast/1"
#: Roundings of BinTokenizer.
ROUNDINGS = ("truncate", "centre")


class BinTokenizer:
    """Each number is one of `bins` equal intervals of [low, high]; outside of it the nearest end counts.

    low, high: scalars, or (D,) one for each number of an action. rounding: "truncate" as in RT-1 (arXiv 2212.06817,
    google-research/robotics_transformer): int((a - low)/(high - low)*(bins - 1)), back t/(bins - 1)*(high - low) + low,
    so a number becomes up to one bin smaller; "centre" as in RT-2 (arXiv 2307.15818, "256 bins uniformly"): the bin
    that the number lies in, back to its middle, so the error is half a bin at most.
    """

    def __init__(self, low: Any = -1.0, high: Any = 1.0, bins: int = 256, rounding: str = "centre"):
        self.low, self.high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        if rounding not in ROUNDINGS:
            raise TokenizerError(f"bins: rounding must be one of {ROUNDINGS}, found {rounding!r}")
        if bins < 2 or not np.all(self.low < self.high) or not np.all(np.isfinite(self.high - self.low)):
            raise TokenizerError(f"bins: expected 2 or more with low < high, found {bins}, {low}, {high}")
        self.bins = int(bins)
        self.rounding = rounding

    def encode(self, chunk: Any) -> np.ndarray:
        """(..., D) -> (..., D) int64 from 0 to bins - 1."""
        chunk = _finite(chunk)
        part = (np.clip(chunk, self.low, self.high) - self.low) / (self.high - self.low)
        if self.rounding == "truncate":
            return (part * (self.bins - 1)).astype(np.int64)
        return np.minimum((part * self.bins).astype(np.int64), self.bins - 1)

    def decode(self, tokens: Any) -> np.ndarray:
        """(..., D) -> (..., D) float64. Raises TokenizerError for a token that is no bin."""
        tokens = _whole(tokens, 0, self.bins - 1)
        part = tokens / (self.bins - 1) if self.rounding == "truncate" else (tokens + 0.5) / self.bins
        return part * (self.high - self.low) + self.low

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON types."""
        return {"low": self.low.tolist(), "high": self.high.tolist(), "bins": self.bins, "rounding": self.rounding}


class OpenVLATokenizer:
    """OpenVLA's bins (arXiv 2406.09246): the last `bins` tokens of the vocabulary, counted from its end.

    np.digitize of [-1, 1] with 256 edges gives 1 to 256, and the token vocabulary - that; back to one of the 255
    centres between the edges, so that the two outermost tokens at the upper end mean the same. vocabulary: of the
    language model's tokeniser, 32000 for Llama 2.
    """

    def __init__(self, vocabulary: int = 32000, bins: int = 256):
        if not 2 <= bins < vocabulary:
            raise TokenizerError(f"bins: expected 2 to {vocabulary - 1}, found {bins}")
        self.vocabulary, self.bins = int(vocabulary), int(bins)
        self.edges = np.linspace(-1.0, 1.0, self.bins)
        self.centres = (self.edges[:-1] + self.edges[1:]) / 2.0

    def encode(self, chunk: Any) -> np.ndarray:
        """(..., D) -> (..., D) int64, token ids of the language model."""
        return self.vocabulary - np.digitize(np.clip(_finite(chunk), -1.0, 1.0), self.edges).astype(np.int64)

    def decode(self, tokens: Any) -> np.ndarray:
        """(..., D) -> (..., D) float64. Raises TokenizerError for a token that is none of an action."""
        tokens = _whole(tokens, self.vocabulary - self.bins, self.vocabulary - 1)
        return self.centres[np.clip(self.vocabulary - tokens - 1, 0, self.bins - 2)]

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON types."""
        return {"vocabulary": self.vocabulary, "bins": self.bins}


class FastTokenizer:
    """FAST (Pertsch et al., arXiv 2501.09747): cosine transform over time, rounding, byte-pair encoding.

    A chunk (T, D) becomes the coefficients around(dct(chunk, axis=time, "ortho")*scale), read row by row (the lowest
    frequency of all dimensions first), each one a character chr(max(c - min_token, 0)); a byte-level BPE joins what
    occurs together. Rounding moves each coefficient by 0.5/scale at most, and what lies under min_token becomes
    min_token. bpe: a `tokenizers.Tokenizer`. shape: (T, D) of a chunk; None: `decode` is told (the universal FAST+).
    """

    def __init__(self, bpe: Any, scale: float = 10.0, min_token: int = 0, shape: Sequence[int] | None = None):
        if not 0 < scale < math.inf:
            raise TokenizerError(f"FAST: scale must be positive, found {scale}")
        self.bpe, self.scale, self.min_token = bpe, float(scale), int(min_token)
        self.shape = tuple(int(n) for n in shape) if shape else None

    @classmethod
    def fit(cls, chunks: Any, scale: float = 10.0, vocabulary: int = 1024) -> FastTokenizer:
        """A tokeniser of recorded chunks (N, T, D), normalised as the policy sees them. vocabulary: tokens at most."""
        from tokenizers import Tokenizer, models, trainers

        chunks = _finite(chunks)
        if chunks.ndim != 3 or 0 in chunks.shape:
            raise TokenizerError(f"FAST: chunks to fit: expected (N, T, D), found {chunks.shape}")
        if vocabulary < 257:
            raise TokenizerError(f"FAST: expected a vocabulary of 257 or more (256 are bytes), found {vocabulary}")
        coefficients = _coefficients(chunks, scale)
        low = int(coefficients.min())
        texts = [_text(row - low) for row in coefficients.reshape(len(chunks), -1)]
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder, alphabet = _byte_level()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, min_frequency=2, show_progress=False, special_tokens=[], initial_alphabet=alphabet,
            max_token_length=10_000,
        )  # fmt: skip
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe, scale, low, chunks.shape[1:])

    @classmethod
    def unfitted(cls, shape: Sequence[int], scale: float = 10.0) -> FastTokenizer:
        """A tokeniser with no pairs: one token for a coefficient from -64 to 63, two for one to 1983."""
        from tokenizers import Tokenizer, models

        pre_tokenizer, decoder, alphabet = _byte_level()
        bpe = Tokenizer(models.BPE({character: i for i, character in enumerate(sorted(alphabet))}, []))
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizer, decoder
        return cls(bpe, scale, -64, shape)

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.bpe.get_vocab_size()

    def encode(self, chunk: Any) -> np.ndarray:
        """(T, D) -> (n,) int64. Raises TokenizerError for another shape, and for what the tokeniser cannot write."""
        chunk = _finite(chunk)
        if chunk.ndim != 2 or (self.shape and chunk.shape != self.shape):
            raise TokenizerError(f"FAST: chunk: expected {self.shape or '(T, D)'}, found {chunk.shape}")
        coefficients = np.maximum(_coefficients(chunk[None], self.scale)[0].ravel() - self.min_token, 0)
        text = _text(coefficients)
        tokens = np.asarray(self.bpe.encode(text, add_special_tokens=False).ids, np.int64)
        if self._characters(tokens) != text:
            raise TokenizerError("FAST: the tokeniser has no tokens for some coefficients of the chunk; fit it anew")
        return tokens

    def decode(self, tokens: Any, shape: Sequence[int] | None = None) -> np.ndarray:
        """(n,) -> (T, D) float64. shape: (T, D) where the tokeniser has none of its own.

        Raises TokenizerError for unknown tokens, for bytes that are no characters, and for a wrong number of them.
        """
        shape = tuple(shape or self.shape or ())
        if len(shape) != 2:
            raise TokenizerError("FAST: decode: expected the shape (T, D) of a chunk, found none")
        text = self._characters(_whole(np.ravel(tokens), 0, self.vocabulary - 1))
        if len(text) != shape[0] * shape[1]:
            raise TokenizerError(
                f"FAST: expected the {shape[0]} x {shape[1]} = {shape[0] * shape[1]} coefficients of a chunk, found "
                f"{len(text)} in {np.size(tokens)} tokens"
            )
        from scipy.fft import idct

        coefficients = np.array([ord(character) for character in text], np.float64).reshape(shape) + self.min_token
        return idct(coefficients / self.scale, axis=0, norm="ortho")

    @cached_property
    def spellings(self) -> tuple[bytes | None, ...]:
        """The bytes that each token stands for; None for one that stands for none."""
        table = _byte_table()
        out = []
        for token in range(self.vocabulary):
            text = self.bpe.id_to_token(token)
            known = text is not None and all(character in table for character in text)
            out.append(bytes(table[character] for character in text) if known else None)
        return tuple(out)

    def _characters(self, tokens: np.ndarray) -> str:
        pieces = [self.spellings[token] for token in tokens]
        if None in pieces:
            raise TokenizerError(f"FAST: token {int(tokens[pieces.index(None)])} stands for no bytes")
        try:
            return b"".join(pieces).decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"FAST: the {len(tokens)} tokens do not decode: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives the equal tokeniser back."""
        shape = list(self.shape) if self.shape else None
        return {"format": FAST_FORMAT, "scale": self.scale, "min_token": self.min_token, "shape": shape,
                "bpe": json.loads(self.bpe.to_str())}  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FastTokenizer:
        """Strict inverse of `to_dict`. Raises TokenizerError."""
        from tokenizers import Tokenizer

        expected = {"format", "scale", "min_token", "shape", "bpe"}
        if not isinstance(values, Mapping) or set(values) != expected or values["format"] != FAST_FORMAT:
            raise TokenizerError(f"FAST tokeniser: expected {sorted(expected)}, {FAST_FORMAT!r}, found {values!r:.80}")
        try:
            bpe = Tokenizer.from_str(json.dumps(values["bpe"]))
            return cls(bpe, values["scale"], values["min_token"], values["shape"])
        except TokenizerError:
            raise
        except Exception as error:  # the reader's own exception has no class
            raise TokenizerError(f"FAST tokeniser: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write it as one JSON file."""
        from vla_models.checkpoint import write_atomically

        write_atomically(Path(path), (json.dumps(self.to_dict()) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> FastTokenizer:
        """From a file of `save`, or from a folder with the published tokenizer.json and processor_config.json.

        Raises TokenizerError.
        """
        path = Path(path)
        try:
            if not path.is_dir():
                return cls.from_dict(json.loads(path.read_text()))
            said = json.loads((path / "processor_config.json").read_text())
            bpe = json.loads((path / "tokenizer.json").read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise TokenizerError(f"FAST tokeniser {path}: not readable: {error}") from error
        shape = [said.get("time_horizon"), said.get("action_dim")]
        values = {"scale": said.get("scale", 10), "min_token": said.get("min_token", 0), "bpe": bpe}
        return cls.from_dict({"format": FAST_FORMAT, "shape": None if None in shape else shape, **values})


class PhraseAnswer:
    """An answer of a fixed number of words, each of its own set, written with tokens of the language model.

    slots: for each word of the answer those that it may be, each one or more tokens; none of a set may begin another
    of it. vocabulary: of the language model.
    """

    def __init__(self, slots: Sequence[Sequence[Sequence[int]]], vocabulary: int):
        self.vocabulary = int(vocabulary)
        self.slots = list(slots)
        sets = {id(words): self._set(words) for words in self.slots}
        self._sets = [sets[id(words)] for words in self.slots]
        #: Most tokens of an answer.
        self.length = sum(max(len(word) for word in words) for words in self.slots)

    def spell(self, places: Sequence[int]) -> np.ndarray:
        """(n,) int64. places: for each word its place in its set."""
        chosen = (words[place] for words, place in zip(self.slots, places, strict=True))
        return np.array([token for word in chosen for token in word], np.int64)

    def read(self, tokens: Sequence[int]) -> list[int]:
        """The inverse of `spell`. Raises TokenizerError for what is not exactly an answer."""
        places, rest = self._parse(tokens)
        if rest or len(places) != len(self.slots):
            raise TokenizerError(
                f"answer: expected {len(self.slots)} words, found {len(places)} and {len(rest)} more tokens"
            )
        return places

    def allowed(self, tokens: Sequence[int]) -> np.ndarray | None:
        """(vocabulary,) bool: what may follow `tokens`; None: the answer is complete."""
        places, rest = self._parse(tokens)
        if len(places) == len(self.slots) and not rest:
            return None
        mask = np.zeros(self.vocabulary, bool)
        if len(places) < len(self.slots):
            mask[list(self._sets[len(places)][1].get(rest, ()))] = True
        return mask

    def _parse(self, tokens: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
        """Places of the complete words, and the tokens behind them."""
        places, rest = [], ()
        for token in tokens:
            rest = (*rest, int(token))
            if len(places) < len(self.slots) and rest in self._sets[len(places)][0]:
                places.append(self._sets[len(places)][0][rest])
                rest = ()
        return places, rest

    def _set(self, words: Sequence[Sequence[int]]) -> tuple[dict, dict]:
        """(word -> its place, beginning of a word -> tokens that may follow it)."""
        index = {tuple(int(token) for token in word): place for place, word in enumerate(words)}
        nexts: dict[tuple[int, ...], set[int]] = {}
        for word in index:
            for i, token in enumerate(word):
                nexts.setdefault(word[:i], set()).add(token)
        if not all(0 <= token < self.vocabulary for word in index for token in word) or not index or () in index:
            raise TokenizerError(f"answer: expected words of tokens from 0 to {self.vocabulary - 1}, found others")
        if len(index) != len(words) or set(index) & set(nexts):
            raise TokenizerError("answer: expected different words none of which begins another; end them with a space")
        return index, nexts


class WordAnswer(PhraseAnswer):
    """A chunk as words: each number is one of `words`.

    tokenizer: BinTokenizer of the numbers, or another with one word a number. words: of each bin, its tokens. shape:
    (H, D) of a chunk. lead: bins that a word before the chunk may be (RT-2's flag of termination); empty: there is
    none. vocabulary: of the language model.
    """

    def __init__(
        self, tokenizer: BinTokenizer, words: Sequence[Sequence[int]], shape: Sequence[int], vocabulary: int,
        lead: Sequence[int] = (),
    ):  # fmt: skip
        words = list(words)
        if len(words) != tokenizer.bins:
            raise TokenizerError(f"answer: expected {tokenizer.bins} words, found {len(words)}")
        self.tokenizer, self.words, self.shape, self.lead = tokenizer, words, tuple(shape), tuple(lead)
        first = [[words[i] for i in lead]] if self.lead else []
        super().__init__([*first, *[words] * (self.shape[0] * self.shape[1])], vocabulary)

    def encode(self, chunk: np.ndarray, lead: int = 0) -> np.ndarray:
        """(H, D) -> (n,) int64. lead: which of the leading words, by its place in them."""
        return self.spell([*([lead] if self.lead else []), *self.tokenizer.encode(chunk).ravel()])

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """(n,) -> (H, D) float64. Raises TokenizerError for what is not exactly a chunk."""
        return self.tokenizer.decode(np.reshape(self.read(tokens)[bool(self.lead) :], self.shape))

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON types."""
        words = [[int(token) for token in word] for word in self.words]
        return {"tokenizer": self.tokenizer.to_dict(), "words": words, "shape": list(self.shape),
                "vocabulary": self.vocabulary, "lead": list(self.lead)}  # fmt: skip

    def leading(self, tokens: Sequence[int]) -> int:
        """Place of the answer's leading word among `lead`."""
        return self.read(tokens)[0]

    def inside(self, tokens: Sequence[int], padded: np.ndarray) -> np.ndarray:
        """(n,) bool: which of an answer's tokens belong to steps that are not `padded` (H,), or to the lead."""
        kept = [True] * bool(self.lead) + [not past for past in padded for _ in range(self.shape[1])]
        places = self.read(tokens)
        sizes = (len(words[place]) for words, place in zip(self.slots, places, strict=True))
        return np.repeat(kept, list(sizes))


class FastAnswer:
    """A chunk as FAST tokens in a language model's vocabulary, as pi0-FAST and LeRobot write it.

    The answer is `prefix` ("Action: "), vocabulary - 1 - skip - token for each FAST token, and `end` ("|" and the end
    of the text). shape: (T, D) of a chunk. length: most tokens of an answer. free: any token may follow, as in the
    reference; otherwise only those with which the answer can still become a chunk.
    """

    def __init__(
        self, tokenizer: FastTokenizer, shape: Sequence[int], vocabulary: int, skip: int, prefix: Sequence[int],
        end: Sequence[int], length: int, free: bool = False,
    ):  # fmt: skip
        self.tokenizer, self.vocabulary, self.length, self.free = tokenizer, int(vocabulary), int(length), free
        self.shape, self.prefix, self.end = tuple(shape), tuple(prefix), tuple(end)
        self.last = self.vocabulary - 1 - skip  # stands for FAST token 0
        if tokenizer.shape and tokenizer.shape != self.shape:
            raise TokenizerError(f"FAST tokeniser: expected one for chunks of {self.shape}, found {tokenizer.shape}")
        if self.last - tokenizer.vocabulary < -1:
            raise TokenizerError(
                f"FAST tokeniser: expected at most {self.last + 1} tokens, as many as the language model has room for, "
                f"found {tokenizer.vocabulary}"
            )

    def encode(self, chunk: np.ndarray) -> np.ndarray:
        """(T, D) -> (n,) int64. Raises TokenizerError when the answer is longer than `length`."""
        tokens = [*self.prefix, *(self.last - self.tokenizer.encode(chunk)), *self.end]
        if len(tokens) > self.length:
            raise TokenizerError(f"FAST: chunk: expected at most {self.length} tokens, found {len(tokens)}")
        return np.array(tokens, np.int64)

    def inside(self, tokens: Sequence[int], padded: np.ndarray) -> np.ndarray:
        """(n,) bool, all true: each token is of the whole chunk, whose last action is held where it is padded."""
        return np.ones(len(tokens), bool)

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """(n,) -> (T, D) float64. Raises TokenizerError for what is not exactly a chunk."""
        tokens = [int(token) for token in tokens]
        if tuple(tokens[: len(self.prefix)]) != self.prefix:
            raise TokenizerError(f"FAST: expected an answer that begins with {self.prefix}, found {tokens[:4]}")
        tokens = tokens[len(self.prefix) :]
        if self.end[0] not in tokens:
            raise TokenizerError(f"FAST: expected the end {self.end[0]} within {self.length} tokens, found none")
        codes = self.last - np.array(tokens[: tokens.index(self.end[0])], np.int64)
        return self.tokenizer.decode(codes, self.shape)

    def allowed(self, tokens: Sequence[int]) -> np.ndarray | None:
        """(vocabulary,) bool: what may follow `tokens`; None: the answer is complete. The end is one token here."""
        begin = len(self.prefix)
        if self.end[0] in tokens[0 if self.free else begin :]:
            return None
        mask = np.ones(self.vocabulary, bool)
        if self.free:
            return mask
        mask[:] = False
        if len(tokens) < begin:
            mask[self.prefix[len(tokens)]] = True
            return mask
        state, left = 0, self.shape[0] * self.shape[1]
        for token in tokens[begin:]:
            code = self.last - token
            left -= self._begun[state, code]
            state = self._after[state, code]
        if state == 0 and left == 0:
            mask[self.end[0]] = True
            return mask
        fits = (self._after[state] >= 0) & (self._begun[state] <= left)
        mask[self.last - np.flatnonzero(fits)] = True
        return mask

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON types."""
        return {"tokenizer": self.tokenizer.to_dict(), "shape": list(self.shape), "vocabulary": self.vocabulary,
                "skip": self.vocabulary - 1 - self.last, "prefix": list(self.prefix), "end": list(self.end),
                "length": self.length, "free": self.free}  # fmt: skip

    @cached_property
    def _automaton(self) -> tuple[np.ndarray, np.ndarray]:
        """What a FAST token does in UTF-8, (3, tokens) each: by the bytes of a character that are still missing."""
        after = np.full((3, self.tokenizer.vocabulary), -1, np.int64)
        begun = np.zeros_like(after)
        for token, spelling in enumerate(self.tokenizer.spellings):
            for state in range(3 if spelling else 0):
                after[state, token], begun[state, token] = _utf8(spelling, state)
        return after, begun

    @property
    def _after(self) -> np.ndarray:
        return self._automaton[0]

    @property
    def _begun(self) -> np.ndarray:
        return self._automaton[1]


class OrderedFastAnswer(FastAnswer):
    """A FastAnswer whose words have the order of the FAST tokens: word first + token. Arguments: see FastAnswer."""

    def __init__(
        self, tokenizer: FastTokenizer, shape: Sequence[int], vocabulary: int, first: int, end: Sequence[int],
        length: int, free: bool,
    ):  # fmt: skip
        if first + tokenizer.vocabulary > vocabulary:
            raise TokenizerError(
                f"FAST tokeniser: expected at most {vocabulary - first} tokens, as many as the language model has room "
                f"for, found {tokenizer.vocabulary}"
            )
        self.first = first
        super().__init__(tokenizer, shape, vocabulary, vocabulary - first - tokenizer.vocabulary, (), end, length, free)

    def _turned(self, tokens: Sequence[int]) -> list[int]:
        """FastAnswer counts from the last word down; this turns its words around, either way."""
        return [self.first + self.last - t if self.first <= t <= self.last else t for t in map(int, tokens)]

    def encode(self, chunk: np.ndarray) -> np.ndarray:
        return np.array(self._turned(super().encode(chunk)), np.int64)

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        return super().decode(self._turned(tokens))

    def allowed(self, tokens: Sequence[int]) -> np.ndarray | None:
        mask = super().allowed(self._turned(tokens))
        if mask is not None:
            mask[self.first : self.last + 1] = mask[self.first : self.last + 1][::-1].copy()
        return mask

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict() | {"first": self.first}
        return {name: value for name, value in values.items() if name not in ("skip", "prefix")}


class BinAnswer:
    """A chunk as one token a number, and then, in training, the end. shape: (H, D) of a chunk."""

    def __init__(self, tokenizer: OpenVLATokenizer, shape: Sequence[int], rows: int, stop: int):
        self.tokenizer, self.shape, self.stop = tokenizer, tuple(shape), stop
        #: Most tokens of an answer.
        self.length = self.shape[0] * self.shape[1]
        self._mask = np.zeros(rows, bool)
        self._mask[tokenizer.vocabulary - tokenizer.bins : tokenizer.vocabulary] = True

    def encode(self, chunk: np.ndarray) -> np.ndarray:
        """(H, D) -> (n + 1,) int64."""
        return np.append(self.tokenizer.encode(chunk).ravel(), self.stop)

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """(n,) or, with the end, (n + 1,) -> (H, D) float64. Raises TokenizerError for a token that is no bin."""
        return self.tokenizer.decode(np.reshape(tokens[: self.length], self.shape))

    def inside(self, tokens: Sequence[int], padded: np.ndarray) -> np.ndarray:
        """(n + 1,) bool: which tokens belong to steps that are not `padded` (H,); the end belongs to the last."""
        return ~np.append(np.repeat(padded, self.shape[1]), padded[-1])

    def allowed(self, tokens: Sequence[int]) -> np.ndarray | None:
        """(rows,) bool: what may follow `tokens`; None: the answer is complete."""
        return self._mask if len(tokens) < self.length else None

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON types."""
        return {"tokenizer": self.tokenizer.to_dict(), "shape": list(self.shape), "rows": len(self._mask),
                "stop": self.stop}  # fmt: skip


class TextAnswer:
    """Any text up to the token `end`, of at most `length` tokens. vocabulary: of the language model."""

    def __init__(self, end: int, vocabulary: int, length: int):
        self.end, self.vocabulary, self.length = int(end), int(vocabulary), int(length)
        self._mask = np.ones(self.vocabulary, bool)

    def allowed(self, tokens: Sequence[int]) -> np.ndarray | None:
        """(vocabulary,) bool: what may follow `tokens`; None: the text is complete."""
        return None if len(tokens) == self.length or self.end in tokens[-1:] else self._mask

    def decode(self, tokens: Sequence[int]) -> list[int]:
        """The tokens without the end."""
        return list(tokens[:-1] if self.end in tokens[-1:] else tokens)

    def to_dict(self) -> dict[str, Any]:
        return {"end": self.end, "vocabulary": self.vocabulary, "length": self.length}


#: Answers that can be written as plain values, and how their tokenisers are read.
ANSWERS: Mapping[str, tuple[type, Callable[..., Any] | None]] = {
    "words": (WordAnswer, lambda values: BinTokenizer(**values)),
    "bins": (BinAnswer, lambda values: OpenVLATokenizer(**values)),
    "fast": (FastAnswer, FastTokenizer.from_dict),
    "ordered fast": (OrderedFastAnswer, FastTokenizer.from_dict),
    "text": (TextAnswer, None),
}


def plain_answer(answer: Any) -> dict[str, Any]:
    """An answer as plain JSON types, which `make_answer` reads. Raises TokenizerError for one of an unknown kind."""
    name = next((name for name, (kind, _) in ANSWERS.items() if kind is type(answer)), None)
    if name is None:
        raise TokenizerError(f"answer: expected one of {sorted(ANSWERS)}, found {type(answer).__name__}")
    return {"kind": name, **answer.to_dict()}


def make_answer(values: Mapping[str, Any]) -> Any:
    """The answer that `plain_answer` wrote. Raises TokenizerError."""
    arguments = dict(values)
    name = arguments.pop("kind", None)
    if name not in ANSWERS:
        raise TokenizerError(f"answer: expected one of {sorted(ANSWERS)}, found {name!r}")
    kind, read = ANSWERS[name]
    if read is not None:
        arguments["tokenizer"] = read(arguments["tokenizer"])
    return kind(**arguments)


def decode_answer(
    answer: PhraseAnswer | FastAnswer,
    logits: np.ndarray,
    step: Callable[[int, int], np.ndarray],
    noise: np.ndarray,
    temperature: float,
) -> list[int]:
    """The answer's tokens, one after the other, of those that `answer` allows.

    logits (vocabulary,): of the first token. step(token, i) -> logits of the token that follows `token`, which is the
    answer's number i. noise (length,): normal with deviation `temperature`; each number picks one token, the most
    likely one at temperature 0. Raises TokenizerError when the answer is not complete after `answer.length` tokens.
    """
    tokens: list[int] = []
    while (mask := answer.allowed(tokens)) is not None:
        if len(tokens) == answer.length:
            raise TokenizerError(f"answer: expected its end within {answer.length} tokens, found none")
        if not mask.any():
            raise TokenizerError(f"answer: no token may follow the {len(tokens)} that are there")
        if tokens:
            logits = step(tokens[-1], len(tokens) - 1)
        if not np.all(np.isfinite(logits)):
            raise TokenizerError(f"answer: token {len(tokens)}: the network's output is not finite")
        tokens.append(pick(np.where(mask, logits, -np.inf), float(noise[len(tokens)]), temperature))
    return tokens


def pick(logits: np.ndarray, noise: float, temperature: float) -> int:
    """A token of softmax(logits/temperature), by one number `noise` of a normal of deviation `temperature`."""
    if temperature == 0:
        return int(np.argmax(logits))
    chances = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    share = 0.5 * (1 + math.erf(noise / temperature / math.sqrt(2.0)))
    token = int(np.searchsorted(np.cumsum(chances), share * chances.sum(), side="right"))
    return min(token, int(np.flatnonzero(chances)[-1]))


def _finite(values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not np.all(np.isfinite(values)):
        raise TokenizerError("chunk: expected finite numbers, found others")
    return values


def _whole(tokens: Any, low: int, high: int) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.size == 0:
        return tokens.astype(np.int64)
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.min() < low or tokens.max() > high:
        found = sorted({token for token in tokens.ravel().tolist() if not low <= token <= high})[:3]
        raise TokenizerError(f"tokens: expected whole numbers from {low} to {high}, found {found or tokens.dtype}")
    return tokens.astype(np.int64)


def _coefficients(chunks: np.ndarray, scale: float) -> np.ndarray:
    from scipy.fft import dct

    return np.around(dct(chunks, axis=1, norm="ortho") * scale).astype(np.int64)


def _text(codes: np.ndarray) -> str:
    if codes.max(initial=0) > 0xD7FF:  # then come the surrogates, which are no characters
        raise TokenizerError(f"FAST: expected coefficients in a range of {0xD7FF}, found one of {codes.max()}")
    return "".join(map(chr, codes.tolist()))


def _byte_level() -> tuple[Any, Any, list[str]]:
    from tokenizers import decoders, pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return level, decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()


def _byte_table() -> dict[str, int]:
    """Byte-level BPE writes bytes as printable characters (GPT-2): character -> byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _utf8(spelling: bytes, missing: int) -> tuple[int, int]:
    """(bytes still missing after `spelling`, characters that begin in it); (-1, 0) when it cannot follow."""
    begun = 0
    for byte in spelling:
        if missing:
            if not 0x80 <= byte < 0xC0:
                return -1, 0
            missing -= 1
            continue
        begun += 1
        if byte < 0x80:
            continue
        if 0xC2 <= byte < 0xE0:
            missing = 1
        elif 0xE1 <= byte < 0xF0 and byte != 0xED:
            missing = 2
        else:
            return -1, 0
    return missing, begun
