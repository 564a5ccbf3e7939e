"""Recipe "pi0": a vision-language-action flow model (Black et al., arXiv 2410.24164).

PaliGemma-3B reads up to three cameras and the instruction; an expert of 300 M parameters beside its language model
denoises a chunk of 50 actions. What is pi0's own, compared with pi0.5:

    state    one token of the expert, a block between the instruction and the actions
    time     joins each action: MLP([action, sines of the flow time]) is the action's token
    numbers  mean/std normalised; actions and state are filled up to 32

Checkpoints: lerobot/pi0_base and what LeRobot trained from it.
"""

from __future__ import annotations

from torch import Tensor, nn

from vla_models.parts.action_expert import LEROBOT_RULES, ActionExpert, ActionExpertConfig, ActionExpertPolicy
from vla_models.parts.flow import pad_last
from vla_models.policy import PolicySpec
from vla_models.published import Rule
from vla_models.torch_policy import Inputs, Preset


class Pi0Config(ActionExpertConfig):
    """pi0's sizes are the defaults; see ActionExpertConfig."""


class Pi0Network(ActionExpert):
    """The network of the recipe "pi0"."""

    def __init__(self, spec: PolicySpec, config: Pi0Config):
        super().__init__(spec, config, adaptive=False)
        width = config.expert_width
        self.state_in = nn.Linear(config.numbers, width)
        self.time_in = nn.Linear(2 * width, width)
        self.time_out = nn.Linear(width, width)

    def state_tokens(self, inputs: Inputs) -> Tensor:
        state = pad_last(inputs.state, self.config.numbers)
        return self.state_in(state.to(self.state_in.weight)).unsqueeze(1)

    def tokens_of(self, actions: Tensor, time: Tensor) -> tuple[Tensor, None]:
        return self.timed(actions, time), None


TINY = {
    "vision_width": 32, "vision_mlp": 48, "vision_layers": 1, "vision_heads": 2, "width": 32, "mlp": 64, "layers": 2,
    "heads": 2, "head_dim": 16, "vocabulary": 259, "expert_width": 32, "expert_mlp": 64,
}  # fmt: skip
CAMERAS = ("base", "left_wrist", "right_wrist")


class Pi0Policy(ActionExpertPolicy):
    """The recipe "pi0" on torch."""

    Config, Network = Pi0Config, Pi0Network
    parameters = 3.24e9
    published = (*LEROBOT_RULES, Rule(r"(?:model\.)?state_proj\.(.+)", r"state_in.\1"))
    contract = {
        "steps": 10, "guidance": ("guided", "prefix"), "prefix_limit": 10, "prompt": "{task}\n", "tokenizer": "bytes",
        "context": 48, "fit": "pad",
    }  # fmt: skip
    presets = {
        "paper": Preset(
            Pi0Config(),
            {"cameras": dict.fromkeys(CAMERAS, (224, 224)), "optional": CAMERAS[1:], "horizon": 50, "period": 0.02},
        ),
        "tiny": Preset(
            Pi0Config(**TINY),
            {"cameras": dict.fromkeys(CAMERAS[:2], (28, 28)), "optional": CAMERAS[1:2], "horizon": 8, "steps": 5,
             "prefix_limit": 4},
        ),
    }  # fmt: skip
