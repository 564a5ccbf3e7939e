"""Motions in words: a step between a task and its actions that tasks share and a person can correct (RT-H, 2403.01823).

Nothing here needs torch, so both runtimes ask, read and correct with the same code.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from vla_models.answering import AnsweringPolicy
from vla_models.policy import ChunkPrefix, ModelInputs, PolicyError
from vla_models.preprocess import Processor
from vla_models.tokenizer import TokenizerError, text_tokens
from vla_models.tokenizers import PhraseAnswer

ACTION = "Q: what action should the robot do to {task}, with current skill: {motion}? A:"
#: Axes of the base frame (x forward, y left, z up), and turns about them: towards plus and towards minus.
MOVES = (("forward", "backward"), ("left", "right"), ("up", "down"))
TURNS = (("roll right", "roll left"), ("tilt down", "tilt up"), ("turn left", "turn right"))
GRIPS = ("open gripper", "close gripper")
JOINT = ("forward", "back")
STAY = "stay"
#: Between the phrases of several arms.
BETWEEN = "; "


class Motions:
    """The phrases of a specification, which of them a movement is, and both questions in tokens.

    processor: of the policy; its normalisers give movements in m and rad. vocabulary: of the language model. end: token
    behind an answer in words. move, turn, grip: what counts as a motion over a chunk; smallest way, m, smallest turn of
    the tool or of a joint, rad, and smallest change of the opening. Raises PolicyError for a prompt that is not about
    one task, and for a state that does not end with the opening.
    """

    def __init__(
        self, processor: Processor, vocabulary: int, end: int, move: float = 0.01, turn: float = 0.1, grip: float = 0.2
    ):
        spec = processor.spec
        if spec.prompt.count("{task}") != 1 or "{state}" in spec.prompt:
            raise PolicyError(f"policy {spec.name}: prompt: expected {{task}} once and no more, found {spec.prompt!r}")
        if spec.state not in ("pose", "joint"):
            raise PolicyError(f"policy {spec.name}: state: expected 'pose' or 'joint', found {spec.state!r}")
        self.settings = {"vocabulary": vocabulary, "end": end, "move": move, "turn": turn, "grip": grip}
        self.processor, self.space = processor, processor.spec.action_space
        self.move, self.turn, self.grip = move, turn, grip
        tokenizer = processor.tokenizer
        self.turned = self.space.rotation in ("rpy", "rotvec") and self.space.reference != "absolute"
        self.arms = list(self.space.arm_slices("action").values())
        sizes = [10 if spec.state == "pose" else len(spec.joints[arm]) + 1 for arm in spec.arms]
        self.states = np.cumsum(sizes)[:-1]
        self.phrases = [self._phrases(part.stop - part.start - 1) for part in self.arms]
        ends = [*[text_tokens(tokenizer, BETWEEN)] * (len(self.arms) - 1), [end]]
        words = [[(*text_tokens(tokenizer, phrase), *end) for phrase in phrases]
                 for phrases, end in zip(self.phrases, ends, strict=True)]  # fmt: skip
        self.answer = PhraseAnswer(words, vocabulary)

    def of(self, actions: np.ndarray, state: np.ndarray) -> list[str]:
        """The phrase of each arm for what it does in a chunk. actions (H, dim), state (state_dim,): normalised."""
        ways = self.processor.action.denormalize(actions)
        states = np.split(self.processor.state.denormalize(state), self.states)
        return [self._phrase(ways[:, part], start) for part, start in zip(self.arms, states, strict=True)]

    def spell(self, phrases: Sequence[str]) -> np.ndarray:
        """The tokens of an answer, (n,) int64."""
        return self.answer.spell([known.index(phrase) for known, phrase in zip(self.phrases, phrases, strict=True)])

    def read(self, tokens: Sequence[int]) -> str:
        """The words of an answer."""
        places = self.answer.read(tokens)
        return BETWEEN.join(known[place] for known, place in zip(self.phrases, places, strict=True))

    def question(self, tokens: np.ndarray, motion: str) -> np.ndarray:
        """(context,) int64: the second question, for the task of the first one. Raises TokenizerError."""
        spec, tokenizer = self.processor.spec, self.processor.tokenizer
        text = tokenizer.decode(np.trim_zeros(tokens - spec.padding, "b") + spec.padding).strip()
        before, after = spec.prompt.split("{task}")
        if not (text.startswith(before) and text.endswith(after)):
            raise TokenizerError(f"question: expected {spec.prompt!r}, found {text!r:.80}")
        return tokenizer.encode(ACTION.format(task=text[len(before) : len(text) - len(after)], motion=motion))

    def _phrases(self, joints: int) -> list[str]:
        turns: list[str] = []
        if self.space.kind == "joint":
            moves = [f"turn joint {k + 1} {way}" for k in range(joints) for way in JOINT]
        else:
            ways = itertools.product(*((*pair, "") for pair in MOVES))
            moves = ["move arm " + " and ".join(filter(None, way)) for way in ways if any(way)]
            turns = [phrase for pair in TURNS for phrase in pair] if self.turned else []
        parts = itertools.product(("", *moves), ("", *turns), ("", *GRIPS))
        return [" and ".join(filter(None, part)) or STAY for part in parts]

    def _phrase(self, way: np.ndarray, start: np.ndarray) -> str:
        """way: (H, n) actions of one arm, gripper last. start: its state, opening last."""
        space = self.space
        total = way[:, :-1].sum(0) if space.reference == "step" else way[-1, :-1].copy()
        if space.reference == "absolute":
            count = 3 if space.kind == "pose" else len(total)
            total[:count] -= start[:count] if space.kind == self.processor.spec.state else way[0, :count]
        closed, opened = space.gripper
        grip = (way[-1, -1] - closed) / (opened - closed) - start[-1]
        parts = []
        if space.kind == "joint":
            k = int(np.abs(total).argmax())
            parts += [f"turn joint {k + 1} {JOINT[int(total[k] < 0)]}"] if abs(total[k]) >= self.turn else []
        else:
            least = max(self.move, 0.5 * np.abs(total[:3]).max())
            ways = [pair[int(x < 0)] for x, pair in zip(total[:3], MOVES, strict=True) if abs(x) >= least]
            parts += ["move arm " + " and ".join(ways)] if ways else []
            k = int(np.abs(total[3:6]).argmax())
            if self.turned and abs(total[3 + k]) >= self.turn:
                parts.append(TURNS[k][int(total[3 + k] < 0)])
        parts += [GRIPS[int(grip < 0)]] if abs(grip) >= self.grip else []
        return " and ".join(parts) or STAY


class MotionPolicy(AnsweringPolicy):
    """A policy that says its motion in words, then acts on it. `motion`: the words that the last chunk followed."""

    motions: Motions
    motion = correction = ""

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (1, self.motions.answer.length + self.answer.length, 1)

    def correct(self, words: str) -> None:
        """What the arm shall do, in words, in place of the predicted motion; "" takes it back. Raises PolicyError."""
        words = " ".join(words.split())
        try:
            if words:
                self.processor.tokenizer.encode(ACTION.format(task="", motion=words))
        except TokenizerError as error:
            raise PolicyError(f"policy {self.spec.name}: correction: {error}") from error
        self.correction = words

    def reset(self) -> None:
        """A new episode: no correction is in force."""
        self.motion = self.correction = ""

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        noise, first = noise.ravel(), self.motions.answer
        try:
            self.motion = self.correction or self.motions.read(
                self.generate(self.tensors(inputs), first, noise[: first.length], timings)
            )
            question = self.motions.question(inputs.tokens[0], self.motion)
        except TokenizerError as error:
            raise PolicyError(f"policy {self.spec.name}: {error}") from error
        inputs = dataclasses.replace(inputs, tokens=question[None])
        return super().run(inputs, noise[first.length :], prefix, timings)
