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

from vla_models.lerobot import STATISTICS, Statistics, arms_of
from vla_models.normalization import Normalizer
from vla_models.parts.attention import sinusoids
from vla_models.parts.flow import draw_flow, matching_loss
from vla_models.parts.mixture import ExpertConfig, Mixture, block_mask
from vla_models.parts.paligemma import Embedder, PaliGemmaConfig, layer_rules, paligemma_rules, paligemma_sizes
from vla_models.policy import CheckpointError, PolicyError, PolicySpec, example_spec
from vla_models.published import Rule, TensorFiles, translate
from vla_models.torch_policy import Batch, FlowPolicy, Inputs


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


class ActionExpert(nn.Module, ABC):
    """The network; a recipe says how actions and their flow time become tokens (`tokens_of`).

    adaptive: whether the flow time steers the expert's norms (pi0.5) and not its tokens (pi0).
    """

    def __init__(self, spec: PolicySpec, config: ActionExpertConfig, adaptive: bool):
        super().__init__()
        if max(spec.action_dim, spec.state_dim) > config.numbers:
            raise PolicyError(
                f"policy {spec.name}: network.numbers: expected at least {max(spec.action_dim, spec.state_dim)} (of "
                f"actions and state), found {config.numbers}"
            )
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
        # Periods of 4 ms to 4 s, as if flow time were seconds; pi0's t is 1 - tau, and its velocity has the other sign.
        time = sinusoids((1 - tau) / 4e-3, self.config.expert_width, 1e3)
        # Actions and times stay float32 outside, whatever the type of the weights.
        kind = self.action_in.weight.dtype
        tokens, condition = self.tokens_of(self.action_in(x.to(kind)), time.to(kind))
        positions = valid.long().sum(1, keepdim=True) + torch.arange(horizon, device=x.device)
        mask = torch.cat([valid, valid.new_ones(count, horizon)], 1).unsqueeze(1).expand(-1, horizon, -1)
        out = self.mixture([None, tokens], positions, mask, cache, (None, condition))[1]
        return -self.action_out(out).to(x)

    def flow_loss(
        self, context: tuple[Tensor, Tensor], actions: Tensor, noise: Tensor, tau: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Flow-matching loss for given noise and flow times; see parts.flow.matching_loss."""
        return matching_loss(self.velocity, context, actions, noise, tau, keep)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Flow-matching loss over the actions inside the episode that are not given as a prefix."""
        draw = draw_flow(batch, self.width, generator, self.prefix_limit, self.config.prefix_share)
        return {"loss": self.flow_loss(self.encode(batch.inputs), batch.actions, *draw)}

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

    def generate(self, inputs: Inputs, limit: int) -> Tensor:
        """(B, limit) tokens of the language head that continue the prompt, the most probable each time."""
        tokens, valid = self.embedder.prefix(inputs)
        blocks = torch.zeros(tokens.shape[1], dtype=torch.long, device=tokens.device)
        positions = valid.long().cumsum(1) - 1
        outputs, cache = self.mixture.prefill([tokens, None], positions, block_mask(blocks, blocks, valid))
        hidden, place, said = _last(outputs[0], valid), valid.long().sum(1, keepdim=True), []
        while True:
            said.append(self.embedder.logits(hidden).argmax(-1))
            if len(said) == limit:
                return torch.cat(said, 1)
            valid = torch.cat([valid, valid.new_ones(len(valid), 1)], 1)
            step = [self.embedder.words(said[-1]), None]
            outputs, new = self.mixture.prefill(step, place + len(said) - 1, valid.unsqueeze(1), cache)
            hidden, cache = outputs[0], torch.cat([cache, new], -2)


def _last(hidden: Tensor, valid: Tensor) -> Tensor:
    """(B, 1, width): the last token (B, T, width) that is there."""
    steps = torch.arange(valid.shape[1], device=valid.device)
    index = (valid * steps).amax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index].unsqueeze(1)


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
IMAGES = "observation.images."


class ActionExpertPolicy(FlowPolicy):
    """What the policies of this kind share: LeRobot's way to publish them."""

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, ActionExpertConfig, dict[str, Normalizer]]:
        """A checkpoint of LeRobot; a tokenizer.json (PaliGemma's) must lie beside it.

        Sizes are those of the tensors, with 8 heads (SigLIP 16). 14 numbers are ALOHA's two arms of six joints and a
        gripper, N others one arm of N - 1 joints and a gripper. All cameras but the first may be missing. A base model
        has no statistics; then numbers are not normalised. The period is not published; pi0's is 0.02 s.
        """
        where = folder / "config.json"
        try:
            features = {name: list(value["shape"]) for name, value in config["input_features"].items()}
            numbers = config["output_features"]["action"]["shape"][0]
            state = features.pop("observation.state")[0]
            size = tuple(int(side) for side in config.get("image_resolution", (224, 224)))
            horizon, context = int(config["chunk_size"]), int(config["tokenizer_max_length"])
            modes = dict(config["normalization_mapping"])
            relative = bool(config.get("use_relative_actions", False))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            message = f"{where}: expected the settings of LeRobot's {cls.name()}, found {error!r}"
            raise CheckpointError(message) from error
        cameras = {name.removeprefix(IMAGES): size for name in features if name.startswith(IMAGES)}
        if len(cameras) < len(features) or not cameras or state != numbers:
            raise CheckpointError(
                f"{where}: input_features: expected images and as many numbers in observation.state as in action "
                f"({numbers}), found {sorted(features)} and {state}"
            )
        if relative and config.get("relative_exclude_joints") != ["gripper"]:
            raise CheckpointError(
                f"{where}: relative_exclude_joints: expected ['gripper'], found {config.get('relative_exclude_joints')}"
            )
        statistics = Statistics(folder, files)
        normalizers = statistics.normalizers(modes, numbers, numbers, bare=True)
        contract = dict(cls.contract) | {
            "steps": int(config.get("num_inference_steps", 10)), "context": context, "tokenizer": "tokenizer.json",
            "guidance": ("guided",), "prefix_limit": 0, "optional": tuple(cameras)[1:], "horizon": horizon,
            "period": 0.02,
        }  # fmt: skip
        spec = example_spec(cls.name(), arms_of(numbers), cameras,
                            **contract)  # fmt: skip
        if relative:
            spec = replace(spec, action_space=replace(spec.action_space, reference="chunk"))
        return spec, cls.Config(**_sizes(files, cls.published)), normalizers


def _sizes(files: TensorFiles, rules: tuple[Rule, ...]) -> dict[str, int]:
    """The fields of ActionExpertConfig that the shapes tell. Raises CheckpointError for a tensor that is missing."""
    try:
        ours, _ = translate(files.shapes, rules)
        shapes = {name: files.shapes[sources[0][0]] for name, sources in ours.items()}
        return paligemma_sizes(shapes) | {
            "expert_width": shapes["action_in.weight"][0],
            "expert_mlp": shapes["mixture.experts.1.layers.0.mlp.gate.weight"][0],
            "numbers": shapes["action_in.weight"][1],
        }
    except CheckpointError as error:
        raise CheckpointError(f"{files.path}: {error}") from None
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{files.path}: tensors missing, first {error} (our name)") from error
