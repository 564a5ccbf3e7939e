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

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_models.parts.language_model import TINY_LANGUAGE, TINY_VISION
from vla_models.parts.motions import BETWEEN, MotionPolicy, Motions
from vla_models.policy import PolicySpec
from vla_models.recipes.rt2 import Rt2Config, Rt2Network, Rt2Policy, WebBatch
from vla_models.token_policy import stack
from vla_models.torch_policy import Batch, Preset

SKILL = "Q: what skill should the robot do to {task}? A:"


@dataclass(frozen=True)
class RthConfig(Rt2Config):
    """Backbone and tokens: see Rt2Config; and what counts as a motion over a chunk.

    move: smallest way, m. turn: smallest turn of the tool or of a joint, rad. grip: smallest change of the opening.
    """

    move: float = 0.01
    turn: float = 0.1
    grip: float = 0.2


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


class RthPolicy(MotionPolicy, Rt2Policy):
    """The recipe "rth" on torch."""

    Config, Network = RthConfig, RthNetwork
    contract = Rt2Policy.contract | {"prompt": SKILL, "context": 192}
    presets = {
        "paper": Preset(RthConfig(), Rt2Policy.presets["paper"].spec),
        "tiny": Preset(RthConfig(TINY_LANGUAGE, TINY_VISION, start=2, end=2), Rt2Policy.presets["tiny"].spec),
    }

    def __init__(self, spec: PolicySpec, *arguments: Any, **keywords: Any):
        super().__init__(spec, *arguments, **keywords)
        network, config = self.network, self.config
        self.motions = network.motions = Motions(
            self.processor, network.vlm.vocabulary, config.end, config.move, config.turn, config.grip
        )
        network.length = max(network.length, self.motions.answer.length)
