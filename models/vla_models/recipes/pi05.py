"""Recipe "pi05": pi0.5, co-trained to say what to do next and to do it (arXiv 2504.16054).

The network is pi0's; what differs:

    state    256 bins as text in the prompt, "Task: ..., State: 12 200 ...;", no token of its own
    time     scale, shift and gate of the expert's norms (adaRMS), an MLP of the sines of the flow time
    numbers  1 % and 99 % quantiles to -1 and 1
    text     the language head may first say the subtask ("pick up the plate"), which then stands for the task

Trained with flow matching of the actions and cross-entropy of the subtask (`text_loss`); the weights of the language
head are those of the embedding. Checkpoints: lerobot/pi05_base and what LeRobot trained from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vla_models.answering import Step
from vla_models.parts.action_expert import LEROBOT_RULES, ActionExpert, ActionExpertConfig, ActionExpertPolicy
from vla_models.parts.instructed import InstructedPolicy
from vla_models.policy import ModelInputs, PolicySpec
from vla_models.published import Rule
from vla_models.recipes.pi0 import CAMERAS, TINY
from vla_models.token_policy import steps_of
from vla_models.tokenizers import TextAnswer
from vla_models.torch_policy import Batch, Preset


@dataclass(frozen=True)
class Pi05Config(ActionExpertConfig):
    """pi0.5's sizes are the defaults; see ActionExpertConfig.

    subtask: most tokens of a subtask that the language head says before each chunk; 0: none, the instruction is
    followed as it is. end: token that ends a text (PaliGemma's <eos>).
    """

    subtask: int = 0
    end: int = 1


class Pi05Network(ActionExpert):
    """The network of the recipe "pi05"."""

    def __init__(self, spec: PolicySpec, config: Pi05Config):
        super().__init__(spec, config, adaptive=True)
        width = config.expert_width
        self.time_in = nn.Linear(width, width)
        self.time_out = nn.Linear(width, width)

    def tokens_of(self, actions: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        silu = nn.functional.silu
        return actions, silu(self.time_out(silu(self.time_in(time))))


class Pi05Policy(InstructedPolicy, ActionExpertPolicy):
    """The recipe "pi05" on torch."""

    Config, Network = Pi05Config, Pi05Network
    parameters = 3.35e9
    normalization = {"state": "quantile", "action": "quantile"}
    question = "Task: {task}, State: {state};\nSubtask: "
    contract = {
        "steps": 10, "guidance": ("guided", "prefix"), "prefix_limit": 10, "tokenizer": "bytes", "context": 200,
        "prompt": "Task: {task}, State: {state};\nAction: ", "fit": "pad",
    }  # fmt: skip
    presets = {
        "paper": Preset(
            Pi05Config(),
            {"cameras": dict.fromkeys(CAMERAS, (224, 224)), "optional": CAMERAS[1:], "horizon": 50, "period": 0.02},
        ),
        "tiny": Preset(
            Pi05Config(**TINY, end=2),
            {"cameras": dict.fromkeys(CAMERAS[:2], (28, 28)), "optional": CAMERAS[1:2], "horizon": 8, "steps": 5,
             "prefix_limit": 4, "context": 112},
        ),
    }  # fmt: skip
    published = (
        Rule(r"(?:model\.)?state_proj\..+", None, "of pi0: pi0.5 reads the state as text"),
        *LEROBOT_RULES,
    )

    @property
    def talk(self) -> TextAnswer | None:
        config = self.config
        return TextAnswer(config.end, config.vocabulary, config.subtask) if config.subtask else None

    def ask(self, inputs: ModelInputs) -> tuple[np.ndarray, Step]:
        network, length = self.network, self.config.subtask
        with torch.no_grad():
            keys, valid, logits = network.ask(self.tensors(inputs))
        tail = keys.new_zeros(*keys.shape[:-2], length, keys.shape[-1])
        return logits[0].float().cpu().numpy(), steps_of(network.say, keys, valid, tail)

    def text_loss(self, batch: Batch, text: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of subtasks `text` (B, L): tokens, their end, padding. The prompts are those of `asker`."""
        return {"loss": self.network.text_loss(batch.inputs, text)}
