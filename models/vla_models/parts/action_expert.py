"""A vision-language model with an action expert beside it, trained with flow matching: pi0 and its successors.

    images, text --SigLIP, embedding--> expert 0 (language) --.
    state (pi0 only) -----------------> expert 1 (actions) ----> keys and values of every layer: the context
    noisy actions, flow time ---------> expert 1, which attends to the context and to all actions --> velocity

Attention is block-wise, [images and text][state][actions]: nothing in the context sees an action, so the context is
computed once for all integration steps (pi0, arXiv 2410.24164, appendix B).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_models.lerobot import STATISTICS, LeRobotConfig
from vla_models.normalization import Normalizer
from vla_models.parts.flow import FlowMatching, check_numbers, time_features
from vla_models.parts.mixture import ExpertConfig, Mixture, block_mask, layer_rules
from vla_models.parts.paligemma import Embedder, PaliGemmaConfig, lerobot_spec, paligemma_rules, paligemma_sizes
from vla_models.policy import PolicySpec
from vla_models.published import Rule, TensorFiles, own_shapes, require
from vla_models.torch_policy import FlowPolicy, Inputs


@dataclass(frozen=True)
class ActionExpertConfig(PaliGemmaConfig):
    """A vision-language model (PaliGemmaConfig) and its action expert.

    expert_width, expert_mlp: of the expert's tokens and MLPs. numbers: numbers an action and a state have inside the
    network; those that a robot lacks are 0. prefix_share: part of the training samples that get a clean prefix of 0 to
    `PolicySpec.prefix_limit` actions (training-time RTC, arXiv 2512.05964).
    """

    expert_width: int = 1024
    expert_mlp: int = 4096
    numbers: int = 32
    prefix_share: float = 0.5


class ActionExpert(FlowMatching, nn.Module, ABC):
    """The network; a recipe says how actions and their flow time become tokens (`tokens_of`).

    adaptive: whether the flow time steers the expert's norms (pi0.5) and not its tokens (pi0).
    """

    def __init__(self, spec: PolicySpec, config: ActionExpertConfig, adaptive: bool):
        super().__init__()
        check_numbers(spec, config.numbers, config.numbers)
        self.config, self.width = config, config.numbers
        self.prefix_limit = spec.prefix_limit
        width = config.expert_width
        expert = (
            ExpertConfig(width, config.expert_mlp, "adaptive", condition=width)
            if adaptive
            else ExpertConfig(width, config.expert_mlp)
        )
        self.embedder = Embedder(spec, config)
        self.mixture = Mixture(config.mixture(expert))
        self.action_in = nn.Linear(config.numbers, width)
        self.action_out = nn.Linear(width, config.numbers)
        # Of the language model's last layer only keys and values reach an action.
        last = f"mixture.experts.0.layers.{config.layers - 1}."
        unused = ("query", "out", "mlp", "attention_after")
        self.frozen = (*(last + part for part in unused), "mixture.experts.0.norm.")

    def state_tokens(self, inputs: Inputs) -> Tensor | None:
        """Tokens (B, n, expert_width) that the expert adds to the context."""
        return None

    @abstractmethod
    def tokens_of(self, actions: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """The expert's tokens (B, H, expert_width) and the condition of its norms.

        actions: (B, H, expert_width), projected. time: sines and cosines of the flow time, (B, 1 or H, expert_width).
        """

    def encode(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The context: keys and values (B, layers, 2, kv_heads, S, head_dim), and (B, S) bool, false for padding."""
        tokens, valid = self.embedder.prefix(inputs)
        state = self.state_tokens(inputs)
        blocks = torch.zeros(tokens.shape[1], dtype=torch.long, device=tokens.device)
        if state is not None:
            blocks = torch.cat([blocks, blocks.new_ones(state.shape[1])])
            valid = torch.cat([valid, valid.new_ones(state.shape[:2])], 1)
        positions = valid.long().cumsum(1) - 1
        mask = block_mask(blocks, blocks, valid)
        return self.mixture.prefill([tokens, state], positions, mask, hidden=False)[1], valid

    def velocity(self, context: tuple[Tensor, Tensor], x: Tensor, tau: Tensor) -> Tensor:
        """(B, H, numbers) at the noisy actions x (B, H, numbers); tau (B, 1), or (B, H): each action's own."""
        cache, valid = context
        count, horizon = x.shape[:2]
        time = time_features(tau, self.config.expert_width)
        # Actions and times stay float32 outside, whatever the type of the weights.
        kind = self.action_in.weight.dtype
        tokens, condition = self.tokens_of(self.action_in(x.to(kind)), time.to(kind))
        positions = valid.long().sum(1, keepdim=True) + torch.arange(horizon, device=x.device)
        mask = torch.cat([valid, valid.new_ones(count, horizon)], 1).unsqueeze(1).expand(-1, horizon, -1)
        out = self.mixture([None, tokens], positions, mask, cache, (None, condition))[1]
        return -self.action_out(out).to(x)  # pi0's velocity is noise - data

    def text_loss(self, inputs: Inputs, text: Tensor) -> Tensor:
        """Cross-entropy of `text` (B, L), which continues the prompt and is padded like it, given all before it."""
        tokens, valid = self.embedder.prefix(inputs)
        said = text != self.embedder.padding
        tokens = torch.cat([tokens, self.embedder.words(text[:, :-1])], 1)
        valid_all = torch.cat([valid, said[:, :-1]], 1)
        blocks = torch.arange(tokens.shape[1], device=text.device) - valid.shape[1] + 1
        blocks = blocks.clamp(min=0)
        positions = valid_all.long().cumsum(1) - 1
        hidden = self.mixture([tokens, None], positions, block_mask(blocks, blocks, valid_all))[0]
        hidden = torch.cat([_last(hidden[:, : valid.shape[1]], valid), hidden[:, valid.shape[1] :]], 1)
        loss = nn.functional.cross_entropy(self.embedder.logits(hidden).transpose(1, 2), text, reduction="none")
        return (loss * said).sum() / said.sum().clamp(min=1)

    def ask(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The prompt through the language model, to be continued in words; see TokenNetwork.encode."""
        tokens, valid = self.embedder.prefix(inputs)
        blocks = torch.zeros(tokens.shape[1], dtype=torch.long, device=tokens.device)
        positions = valid.long().cumsum(1) - 1
        outputs, keys = self.mixture.prefill([tokens, None], positions, block_mask(blocks, blocks, valid))
        return keys, valid, self.embedder.logits(_last(outputs[0], valid)[:, 0])

    def say(self, keys: Tensor, valid: Tensor, tail: Tensor, token: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The next word, and the words' cache; see TokenNetwork.step."""
        places = torch.arange(tail.shape[-2], device=tail.device)
        sees = torch.cat([valid, places < index.unsqueeze(1), valid.new_ones(len(valid), 1)], 1)
        positions = valid.long().sum(1, keepdim=True) + index.unsqueeze(1)
        words = [self.embedder.words(token.unsqueeze(1)), None]
        outputs, added = self.mixture.prefill(words, positions, sees.unsqueeze(1), torch.cat([keys, tail], -2))
        here = (places == index.unsqueeze(1))[:, None, None, None, :, None]
        return self.embedder.logits(outputs[0][:, -1]), torch.where(here, added, tail)


def _last(hidden: Tensor, valid: Tensor) -> Tensor:
    """(B, 1, width): the last token (B, T, width) that is there."""
    steps = torch.arange(valid.shape[1], device=valid.device)
    index = (valid * steps).amax(1)
    return hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[-1]))


#: Rules for what all of LeRobot's checkpoints of this kind have; a base model lacks the prefix "model.".
LEROBOT_RULES = (
    STATISTICS,
    Rule(r"(?:model\.)?paligemma_with_expert\.gemma_expert\.lm_head\.weight", None, "the action expert says no words"),
    *paligemma_rules(r"(?:model\.)?paligemma_with_expert\.paligemma\."),
    *layer_rules(r"(?:model\.)?paligemma_with_expert\.gemma_expert\.model", "mixture.experts.1"),
    Rule(r"(?:model\.)?action_in_proj\.(.+)", r"action_in.\1"),
    Rule(r"(?:model\.)?action_out_proj\.(.+)", r"action_out.\1"),
    Rule(r"(?:model\.)?(?:action_)?time_mlp_in\.(.+)", r"time_in.\1"),
    Rule(r"(?:model\.)?(?:action_)?time_mlp_out\.(.+)", r"time_out.\1"),
)


class ActionExpertPolicy(FlowPolicy):
    """What the policies of this kind share: LeRobot's way to publish them, and how openpi fine-tunes them."""

    training = {"lr": 2.5e-5, "warmup": 1000, "decay": 1e-10, "clip": 1.0, "batch": 32}

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, ActionExpertConfig, dict[str, Normalizer]]:
        """A checkpoint of LeRobot, see lerobot_spec. Sizes are those of the tensors, with 8 heads (SigLIP 16)."""
        robot = LeRobotConfig(folder, config, files, bare=True)
        spec = lerobot_spec(
            cls, robot, config, steps=int(config.get("num_inference_steps", 10)), guidance=("guided",), prefix_limit=0
        )
        if config.get("use_relative_actions"):
            require(robot.where, config, {"relative_exclude_joints": ["gripper"]})
            spec = replace(spec, action_space=replace(spec.action_space, reference="chunk"))
        shapes = own_shapes(files, cls.published)
        network = cls.Config(
            **paligemma_sizes(shapes),
            expert_width=shapes["action_in.weight"][0],
            expert_mlp=shapes["mixture.experts.1.layers.0.mlp.gate.weight"][0],
            numbers=shapes["action_in.weight"][1],
        )
        return spec, network, robot.normalizers()
