"""Recipe "openvla_oft": OpenVLA fine-tuned to give a whole chunk at once (OpenVLA-OFT, arXiv 2502.19645).

    [BOS][patches of all cameras][state][text][space][H * dim empty actions][stop] --Llama 2, both ways--> hidden
    hidden before each empty action, dim of them side by side --MLP with residuals--> one action of the chunk

Against OpenVLA: attention in both directions over empty (zero) action embeddings, so that one pass gives all actions
(parallel decoding); numbers by regression with an L1 loss instead of tokens; several cameras; the state as one more
token; and, as OFT+, the text that scales and shifts the features of the vision towers (FiLM).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_models import identity_normalizers
from vla_models.normalization import Normalizer
from vla_models.oxe import DataSet
from vla_models.parts.mixture import text_mask
from vla_models.parts.prismatic import RULES, Prismatic, PrismaticConfig, published_sizes
from vla_models.policy import CheckpointError, PolicySpec
from vla_models.published import Rule, TensorFiles
from vla_models.recipes.openvla import PROMPT, STEPS, published_spec, robot_of
from vla_models.torch_policy import Batch, Inputs, OnePassPolicy, Preset


@dataclass(frozen=True)
class OpenVlaOftConfig(PrismaticConfig):
    """Sizes of the vision-language model, and: film: the text modulates the vision towers (OFT+). proprio: the state
    is read. head: blocks of the regression head."""

    crop: float = 0.9
    film: bool = False
    proprio: bool = True
    head: int = 2


class ResidualBlock(nn.Module):
    """Norm, linear, ReLU, and what came in."""

    def __init__(self, width: int):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class RegressionHead(nn.Module):
    """The paper's MLPResNet: hidden states of an action's numbers, side by side, to the action."""

    def __init__(self, dim: int, width: int, blocks: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dim * width)
        self.fc1 = nn.Linear(dim * width, width)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class StateProjector(nn.Module):
    """The state (B, state_dim) as one token (B, 1, width)."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(state))).unsqueeze(1)


class OpenVlaOftNetwork(nn.Module):
    """The network of the recipe "openvla_oft"."""

    def __init__(self, spec: PolicySpec, config: OpenVlaOftConfig):
        super().__init__()
        self.config = config
        self.horizon, self.dim = spec.horizon, spec.action_dim
        self.vlm = Prismatic(spec, config, config.film, head=False)
        self.proprio_projector = StateProjector(spec.state_dim, config.language[0]) if config.proprio else None
        self.action_head = RegressionHead(spec.action_dim, config.language[0], config.head)

    def forward(self, inputs: Inputs) -> Tensor:
        """Normalised actions (B, H, dim)."""
        count, actions = len(inputs.state), self.horizon * self.dim
        ends = self.vlm.read(inputs.tokens.new_tensor([self.config.space, self.config.stop]))
        space, stop = (end.expand(count, 1, -1) for end in ends)
        text = self.summary(inputs.tokens, ends) if self.config.film else None
        state = [self.proprio_projector(inputs.state)] if self.proprio_projector is not None else []
        x, there = self.vlm.sequence(inputs, state, text)
        x = torch.cat([x, space, x.new_zeros(count, actions, x.shape[-1]), stop], 1)
        there = torch.cat([there, there.new_ones(count, actions + 2)], 1)
        mask = there.unsqueeze(1).expand(-1, there.shape[1], -1)
        hidden, _ = self.vlm(x, (there.cumsum(1) - 1).clamp(min=0), mask)
        # As with next tokens, the state that becomes a number is that of the token before it.
        return self.action_head(hidden[:, -actions - 2 : -2].reshape(count, self.horizon, -1))

    def summary(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Mean embedding (B, width) of the text from BOS to stop, without the padding: what FiLM listens to."""
        there = text_mask(tokens, self.vlm.padding).to(ends).unsqueeze(-1)
        return ((self.vlm.read(tokens) * there).sum(1) + ends.sum(0)) / (there.sum(1) + len(ends))

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Mean L1 distance over the actions inside the episode."""
        inside = (~batch.padded).to(batch.actions).unsqueeze(-1)
        error = (self(batch.inputs) - batch.actions).abs() * inside
        return {"loss": error.sum() / (inside.sum() * self.dim).clamp(min=1)}


#: Actions of LIBERO.
LIBERO = dataclasses.replace(STEPS, rotation="rotvec")
#: Parts of a published checkpoint that lie in files of their own, and those that are not read.
PARTS = ("action_head", "proprio_projector")
OTHERS = {
    "vision_backbone": "expected the towers with FiLM in model.safetensors, with LoRA merged into them",
    "noisy_action_projector": "expected the head of the L1 regression, this one is for a diffusion",
}


class OpenVlaOftPolicy(OnePassPolicy):
    """The recipe "openvla_oft" on torch.

    Settings of the paper: LIBERO, chunks of 8 at 20 Hz, two cameras (the presets); ALOHA, chunks of 25 at 25 Hz, three
    cameras, two arms of absolute joints, min/max normalisation, and film (OFT+).
    """

    Config, Network = OpenVlaOftConfig, OpenVlaOftNetwork
    #: No count is published. OpenVLA's 7541237184, less the head for tokens (131.3 M) and what is never computed
    #: (43.1 M), with the action head (151.1 M) and the projector of the state (16.8 M).
    parameters = 7.535e9
    contract = {"prompt": PROMPT, "tokenizer": "bytes", "context": 128, "horizon": 8, "period": 0.05, "lead": 1}
    presets = {
        "paper": Preset(
            OpenVlaOftConfig(),
            {"cameras": {"scene": (224, 224), "wrist": (224, 224)}, "optional": ("wrist",), "action_space": LIBERO,
             "state": "libero"},
        ),
        "tiny": Preset(
            OpenVlaOftConfig(
                dino=(16, 3, 2, 32), siglip=(16, 3, 2, 24), language=(32, 2, 4, 48), vocabulary=580, text=516, space=35,
                film=True,
            ),
            {"cameras": {"scene": (28, 42), "wrist": (28, 42)}, "optional": ("wrist",), "prompt": "{lower}",
             "context": 24, "action_space": LIBERO, "state": "libero"},
        ),
    }  # fmt: skip
    normalization = {"state": "quantile", "action": "quantile"}
    training = {"horizon": 8, "reference": "step", "batch": 8, "lr": 5e-4}  # the paper trains adapters (LoRA)
    published = (
        *(Rule(part + r"\.(?:module\.)?" + theirs, ours)
          for part, theirs, ours in (("action_head", r"model\.(.+)", r"action_head.\1"),
                                     ("proprio_projector", r"(fc.+)", r"proprio_projector.\1"))),
        *(dataclasses.replace(rule, pattern=r"(?:vision_backbone\.)?" + rule.pattern) for rule in RULES),
    )  # fmt: skip

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, OpenVlaOftConfig, dict[str, Normalizer]]:
        """moojink/openvla-7b-oft-finetuned-libero-* and its like, with their parts as safetensors.

        The published parts are pickles (action_head--150000_checkpoint.pt), which are never read.
        """
        for part, why in OTHERS.items():
            if other := sorted(folder.glob(f"{part}*")):
                raise CheckpointError(f"{other[0]}: {why}")
        for part in PARTS:
            found = sorted(folder.glob(f"{part}*.safetensors"))
            if len(found) > 1:
                raise CheckpointError(f"{folder}: expected one {part}*.safetensors, found {len(found)}")
            if found:
                files.join(f"{part}.", found[0])
            elif pickled := [path for path in sorted(folder.glob(f"{part}*")) if path.is_file()]:
                raise CheckpointError(
                    f"{pickled[0]}: a pickle, which is never read; convert it where you trust it: "
                    f"safetensors.torch.save_file(torch.load({pickled[0].name!r}, weights_only=True), "
                    f"{part + '.safetensors'!r})"
                )
        data = DataSet.read(folder, config, "unnorm_key")
        robot = robot_of(data.name)
        action = robot.action(data)
        proprio = any(key.startswith("proprio_projector.") for key in files.shapes)
        network = OpenVlaOftConfig(
            **published_sizes(folder, config, files),
            film=any(re.search(r"blocks\.0\.scale\.weight$", key) for key in files.shapes),
            proprio=proprio,
        )
        cameras = ("scene", "wrist") if len(action.offset) == 7 else ("top", "left_wrist", "right_wrist")
        cameras = cameras[: int(config.get("num_images_in_input", len(cameras)))]
        more = {"state": "libero"} if "libero" in data.name else {}
        spec = published_spec(cls.name(), folder, config, robot, len(action.offset), robot.chunk, cameras, **more)
        state = {"state": robot.state(data, spec.state_dim)} if proprio else {}
        return spec, network, {**identity_normalizers(spec), "action": action, **state}
