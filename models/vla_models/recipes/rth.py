"""Recipe "rth": action hierarchies in language (Belkhale et al., RT-H, arXiv 2403.01823).

    image, "Q: what skill should the robot do to {task}? A:" --VLM--> "move arm forward and left and close gripper"
    image, "... to {task}, with current skill: {motion}? A:" --VLM--> action tokens, as in RT-2

One network answers both questions. The motion in words is a step between task and action that tasks share, and that a
person can correct: `correct("move arm up")` stands in for the predicted motion until it is taken back.

What the motions of a demonstration were is told by its own movement (section III-B), so nobody labels anything: the
main directions of an arm over the chunk, its main turn, and what its gripper does; for joint actions, the joint that
turns most. The answer to the first question is one of these phrases; a correction may be any words.

Backbone and action tokens are those of the recipe "rt2" (the paper has PaLI-X 55B, which is not published).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_models.parts.language_model import TINY_LANGUAGE, TINY_VISION
from vla_models.policy import ChunkPrefix, ModelInputs, PolicyError, PolicySpec
from vla_models.preprocess import Processor
from vla_models.recipes.rt2 import Rt2Config, Rt2Network, Rt2Policy, WebBatch
from vla_models.token_policy import stack, text_tokens
from vla_models.tokenizer import TokenizerError
from vla_models.tokenizers import PhraseAnswer
from vla_models.torch_policy import Batch, Preset

SKILL = "Q: what skill should the robot do to {task}? A:"
ACTION = "Q: what action should the robot do to {task}, with current skill: {motion}? A:"
#: Axes of the base frame (x forward, y left, z up), and turns about them: towards plus and towards minus.
MOVES = (("forward", "backward"), ("left", "right"), ("up", "down"))
TURNS = (("roll right", "roll left"), ("tilt down", "tilt up"), ("turn left", "turn right"))
GRIPS = ("open gripper", "close gripper")
JOINT = ("forward", "back")
STAY = "stay"
#: Between the phrases of several arms.
BETWEEN = "; "


@dataclass(frozen=True)
class RthConfig(Rt2Config):
    """Backbone and tokens: see Rt2Config; and what counts as a motion over a chunk.

    move: smallest way, m. turn: smallest turn of the tool or of a joint, rad. grip: smallest change of the opening.
    """

    move: float = 0.01
    turn: float = 0.1
    grip: float = 0.2


class Motions:
    """The phrases of a specification, which of them a movement is, and both questions in tokens.

    processor: of the policy; its normalisers give movements in m and rad.
    """

    def __init__(self, processor: Processor, config: RthConfig, vocabulary: int):
        self.processor, self.config, self.space = processor, config, processor.spec.action_space
        spec, tokenizer = processor.spec, processor.tokenizer
        self.turned = self.space.rotation in ("rpy", "rotvec") and self.space.reference != "absolute"
        self.arms = list(self.space.arm_slices("action").values())
        sizes = [10 if spec.state == "pose" else len(spec.joints[arm]) + 1 for arm in spec.arms]
        self.states = np.cumsum(sizes)[:-1]
        self.phrases = [self._phrases(part.stop - part.start - 1) for part in self.arms]
        ends = [*[text_tokens(tokenizer, BETWEEN)] * (len(self.arms) - 1), [config.end]]
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
        config, space = self.config, self.space
        total = way[:, :-1].sum(0) if space.reference == "step" else way[-1, :-1].copy()
        if space.reference == "absolute":
            count = 3 if space.kind == "pose" else len(total)
            total[:count] -= start[:count] if space.kind == self.processor.spec.state else way[0, :count]
        closed, opened = space.gripper
        grip = (way[-1, -1] - closed) / (opened - closed) - start[-1]
        parts = []
        if space.kind == "joint":
            k = int(np.abs(total).argmax())
            parts += [f"turn joint {k + 1} {JOINT[int(total[k] < 0)]}"] if abs(total[k]) >= config.turn else []
        else:
            least = max(config.move, 0.5 * np.abs(total[:3]).max())
            ways = [pair[int(x < 0)] for x, pair in zip(total[:3], MOVES, strict=True) if abs(x) >= least]
            parts += ["move arm " + " and ".join(ways)] if ways else []
            k = int(np.abs(total[3:6]).argmax())
            if self.turned and abs(total[3 + k]) >= config.turn:
                parts.append(TURNS[k][int(total[3 + k] < 0)])
        parts += [GRIPS[int(grip < 0)]] if abs(grip) >= config.grip else []
        return " and ".join(parts) or STAY


class RthNetwork(Rt2Network):
    """The network of the recipe "rth"; its policy gives it `motions`."""

    motions: Motions

    def loss(self, batch: Batch, generator: torch.Generator, web: WebBatch | None = None) -> dict[str, Tensor]:
        """Mean of the cross-entropies of both answers; the second one is mixed with that of `web` when there is some.

        Raises TokenizerError when a question exceeds the context.
        """
        device = batch.actions.device
        actions, states, tokens = (
            value.detach().cpu().numpy() for value in (batch.actions, batch.inputs.state, batch.inputs.tokens)
        )
        phrases = [self.motions.of(chunk, state) for chunk, state in zip(actions, states, strict=True)]
        rows = [self.motions.spell(phrase) for phrase in phrases]
        motion = self.text_loss(batch.inputs, *stack(rows, [np.ones(len(row), bool) for row in rows], device))
        questions = np.stack([self.motions.question(row, BETWEEN.join(phrase))
                              for row, phrase in zip(tokens, phrases, strict=True)])  # fmt: skip
        inputs = batch.inputs._replace(tokens=torch.from_numpy(questions).to(device))
        action = super().loss(batch._replace(inputs=inputs), generator, web)
        return action | {"loss": (motion + action["loss"]) / 2, "motion": motion, "action": action["loss"]}


class RthPolicy(Rt2Policy):
    """The recipe "rth" on torch. `motion`: the words that the last chunk followed."""

    Config, Network = RthConfig, RthNetwork
    contract = Rt2Policy.contract | {"prompt": SKILL, "context": 192}
    presets = {
        "paper": Preset(RthConfig(), Rt2Policy.presets["paper"].spec),
        "tiny": Preset(RthConfig(TINY_LANGUAGE, TINY_VISION, start=2, end=2), Rt2Policy.presets["tiny"].spec),
    }

    def __init__(self, spec: PolicySpec, *arguments: Any, **keywords: Any):
        super().__init__(spec, *arguments, **keywords)
        if spec.prompt.count("{task}") != 1 or "{state}" in spec.prompt:
            raise PolicyError(f"policy {spec.name}: prompt: expected {{task}} once and no more, found {spec.prompt!r}")
        network = self.network
        self.motions = network.motions = Motions(self.processor, self.config, network.vlm.vocabulary)
        network.length = max(network.length, self.motions.answer.length)
        self.motion = self.correction = ""

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (1, self.motions.answer.length + self.network.answer.length, 1)

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
