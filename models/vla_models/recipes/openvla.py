"""Recipe "openvla": actions as words of a vision-language model (OpenVLA, arXiv 2406.09246).

    [BOS][256 patches of one image][In: What action should the robot take to ...?\\nOut:][space] --Llama 2--> 7 tokens

DINOv2 and SigLIP look at the image side by side (vla_models.parts.prismatic); each number of the action is one of 256
bins, which are the last 256 tokens of the vocabulary, and the tokens come one after the other. No state, no history,
one action at a time. OpenVLA-OFT (vla_models.recipes.openvla_oft) starts from these weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from vla_core.actions import ActionSpace

from vla_models import identity_normalizers
from vla_models.normalization import Normalizer
from vla_models.oxe import DataSet
from vla_models.parts.prismatic import RULES, Prismatic, PrismaticConfig, published_sizes
from vla_models.policy import CheckpointError, PolicySpec, example_spec
from vla_models.published import TensorFiles, require
from vla_models.token_policy import TokenNetwork, TokenPolicy
from vla_models.tokenizers import BinAnswer, OpenVLATokenizer
from vla_models.torch_policy import Inputs, Preset

PROMPT = "In: What action should the robot take to {lower}?\nOut:"
#: Actions of the training data: steps of the gripper and its turns about fixed axes, the gripper 1 when open.
STEPS = ActionSpace(("arm",), "pose", reference="step", rotation="rpy")


@dataclass(frozen=True)
class OpenVlaConfig(PrismaticConfig):
    """Sizes of the vision-language model, and: bins of each number of an action."""

    bins: int = 256


class OpenVlaNetwork(TokenNetwork):
    """The network of the recipe "openvla": what is computed behind the prompt is TokenNetwork's."""

    def __init__(self, spec: PolicySpec, config: OpenVlaConfig):
        tokenizer = OpenVLATokenizer(config.text, config.bins)
        answer = BinAnswer(tokenizer, (spec.horizon, spec.action_dim), config.vocabulary, config.stop)
        super().__init__(spec, Prismatic(spec, config), answer, config.space, bidirectional=False)

    def prefix(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """[BOS][patches][rest of the text], and which of them are there."""
        return self.vlm.sequence(inputs)


class OpenVlaPolicy(TokenPolicy):
    """The recipe "openvla" on torch."""

    Config, Network = OpenVlaConfig, OpenVlaNetwork
    #: Of openvla/openvla-7b: 7541237184, with layers that are never computed.
    parameters = 7.54e9
    contract = {
        "prompt": PROMPT, "tokenizer": "bytes", "context": 128, "temperature": 0.0, "horizon": 1, "period": 0.2,
        "lead": 1,
    }  # fmt: skip
    presets = {
        "paper": Preset(OpenVlaConfig(), {"action_space": STEPS, "state": "pose"}),
        "tiny": Preset(
            OpenVlaConfig(
                dino=(16, 3, 2, 32), siglip=(16, 3, 2, 24), language=(32, 2, 4, 48), vocabulary=580, text=516, space=35
            ),
            {"cameras": {"scene": (28, 42)}, "prompt": "{lower}", "context": 24, "action_space": STEPS,
             "state": "pose"},
        ),
    }  # fmt: skip
    normalization = {"state": "quantile", "action": "quantile"}
    training = {
        "horizon": 1, "period": 0.2, "reference": "step", "rotation": "rpy", "temperature": 0.0, "batch": 16,
        "lr": 2e-5,
    }  # fmt: skip
    published = RULES

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, OpenVlaConfig, dict[str, Normalizer]]:
        """openvla/openvla-7b and what is fine-tuned from it; `unnorm_key` names the data set of the statistics."""
        data = DataSet.read(folder, config, "unnorm_key")
        robot = robot_of(data.name)
        action = robot.action(data)
        network = OpenVlaConfig(**published_sizes(folder, config, files), bins=int(config.get("n_action_bins", 256)))
        spec = published_spec(cls.name(), folder, config, robot, len(action.offset), 1, ("scene",))
        return spec, network, identity_normalizers(spec) | {"action": action}


@dataclass(frozen=True)
class Robot:
    """What a published checkpoint leaves unsaid about its robot: the published code knows it by names too.

    kind: of normalisation. period: s. rotation: dialect of relative poses. units: of a translation (m) and a rotation
    (rad) of 1. chunk: actions of OpenVLA-OFT. finger: travel of one finger (m), for states of LIBERO.
    """

    kind: str = "quantile"
    period: float = 0.2
    rotation: str = "rpy"
    units: tuple[float, float] = (1.0, 1.0)
    chunk: int = 8
    finger: float = 0.0

    def action(self, data: DataSet) -> Normalizer:
        """Normaliser of actions, in m, rad and openings. Raises CheckpointError."""
        found = data.normalizer("action", self.kind)
        pose = len(found.offset) == 7
        return _times(found, [self.units[0]] * 3 + [self.units[1]] * 3 + [1.0] if pose else 1.0)

    def state(self, data: DataSet, dim: int) -> Normalizer:
        """The same of states of `dim` numbers."""
        found = data.normalizer("proprio", self.kind, dim)
        return _times(found, [1.0] * 6 + [1 / self.finger] * (dim - 6) if self.finger else 1.0)


def _times(normalizer: Normalizer, units: Sequence[float] | float) -> Normalizer:
    """For numbers that are `units` times as large."""
    return Normalizer(normalizer.kind, normalizer.offset * units, normalizer.scale * units)


#: Part of a data set's name -> robot. LIBERO's actions are what robosuite's controller takes, 1 being 5 cm or 0.5 rad.
ROBOTS = {
    "libero": Robot(period=0.05, rotation="rotvec", units=(0.05, 0.5), finger=0.04),
    "aloha": Robot("min_max", 0.04, chunk=25),
    "bridge": Robot(chunk=5),
    "fractal": Robot(period=1 / 3),
}


def robot_of(name: str) -> Robot:
    """The robot of a data set."""
    return next((robot for part, robot in ROBOTS.items() if part in name), Robot())


def published_spec(
    recipe: str, folder: Path, config: Mapping[str, Any], robot: Robot, dim: int, horizon: int,
    cameras: Sequence[str], **more: Any,
) -> PolicySpec:  # fmt: skip
    """The specification of a published checkpoint: 7 numbers an action are relative poses of one arm, 14 the absolute
    joints of ALOHA's two. Raises CheckpointError."""
    where = folder / "config.json"
    if dim not in (7, 14):
        raise CheckpointError(f"{where}: expected statistics of 7 or 14 numbers an action, found {dim}")
    require(where, config, {"image_resize_strategy": "resize-naive"})
    size = config.get("image_sizes", [224, 224])[0]
    size = tuple(size) if isinstance(size, Sequence) else (size, size)
    if dim == 7:
        space = replace(STEPS, rotation=robot.rotation)
        values = {"arms": {"arm": 7}, "action_space": space, "state": "pose", "lead": 1}
    else:
        arms = {"left": 6, "right": 6}
        values = {"arms": arms, "action_space": ActionSpace(tuple(arms), "joint", tuple(arms.values()))}
    fixed = {"prompt": PROMPT, "tokenizer": "tokenizer.json", "context": 64, "temperature": 0.0,
             "padding": int(config.get("pad_token_id", 32000)), "horizon": horizon, "period": robot.period}  # fmt: skip
    return example_spec(recipe, cameras=dict.fromkeys(cameras, size), **{**fixed, **values, **more})
