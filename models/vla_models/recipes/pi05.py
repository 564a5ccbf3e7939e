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

import copy
import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from vla_models.parts.action_expert import LEROBOT_RULES, ActionExpert, ActionExpertConfig, ActionExpertPolicy
from vla_models.policy import InferenceRequest, PolicyObservation, PolicyOutput, PolicySpec
from vla_models.preprocess import Processor
from vla_models.published import Rule
from vla_models.recipes.pi0 import CAMERAS, TINY
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


class Pi05Policy(ActionExpertPolicy):
    """The recipe "pi05" on torch."""

    Config, Network = Pi05Config, Pi05Network
    parameters = 3.35e9
    normalization = {"state": "quantile", "action": "quantile"}
    #: What the language head reads when it is asked for the subtask.
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

    def infer(self, observation: PolicyObservation, request: InferenceRequest | None = None) -> PolicyOutput:
        """The next chunk; with a `subtask` in the settings, for the subtask that the language head says."""
        return super().infer(self.instructed(observation), request)

    def instructed(self, observation: PolicyObservation) -> PolicyObservation:
        """The observation with the instruction to act on: its own, or the subtask (see Pi05Config)."""
        if not self.config.subtask:
            return observation
        return dataclasses.replace(observation, instruction=self.subtask(observation))

    def subtask(self, observation: PolicyObservation, limit: int = 0) -> str:
        """What to do next for the observation's instruction, in the language head's words: at most `limit` tokens.

        limit 0: as many as the settings say.
        """
        inputs = self.tensors(self.asker.inputs(observation)[0])
        with torch.no_grad():
            said = self.network.generate(inputs, limit or self.config.subtask or 32)[0].tolist()
        kept = said[: said.index(self.config.end)] if self.config.end in said else said
        return self.processor.tokenizer.decode(kept).strip()

    @cached_property
    def asker(self) -> Processor:
        """Prepares inputs whose prompt asks for the subtask."""
        asker = copy.copy(self.processor)
        asker.spec = dataclasses.replace(self.spec, prompt=self.question)
        return asker

    def text_loss(self, batch: Batch, text: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of subtasks `text` (B, L): tokens, their end, padding. The prompts are those of `asker`."""
        return {"loss": self.network.text_loss(batch.inputs, text)}
