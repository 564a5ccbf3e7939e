"""Recipe "wall_oss": a VLM whose MLPs are chosen by the kind of token, with a flow branch (WALL-OSS, arXiv 2509.11766).

    "Observation: front view: <image> ... Instruction: {task} ... Proprioception: <state>"
        --Qwen2.5-VL: attention, MLP of vision and language--> keys and values of every layer --.
    noisy actions, which of them there are, flow time --MLP-->                                  v
        the same attention, MLP of actions --> velocity

What sets it apart from pi0: vision, language and actions share attention and norms, and only the MLP is an expert's own
(Mixture of Transformers in the feed-forward networks alone); images and state stand inside the text where it speaks of
them; all before the actions is causal, as in the language model, and the actions see each other; positions have three
numbers (M-RoPE). A mask beside the actions tells which of the 20 numbers of the unified action space a robot has.
The other branch, which writes FAST tokens, is the recipe "wall_oss_fast".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_models.lerobot import LeRobotConfig
from vla_models.normalization import Normalizer
from vla_models.parts.attention import sinusoids
from vla_models.parts.flow import FlowMatching
from vla_models.parts.qwen_vision import QwenVisionConfig
from vla_models.parts.qwen_vl import RULES, QwenVl, QwenVlConfig, published_sizes
from vla_models.policy import PolicySpec, example_spec
from vla_models.published import TensorFiles, find_checkpoint, read_config
from vla_models.torch_policy import FlowPolicy, Inputs, Preset


@dataclass(frozen=True)
class WallOssConfig(QwenVlConfig):
    """Sizes (see QwenVlConfig). prefix_share: part of the training samples that get a clean prefix of up to
    `PolicySpec.prefix_limit` actions."""

    prefix_share: float = 0.5


class WallOssNetwork(FlowMatching, QwenVl):
    """The network of the recipe "wall_oss": the backbone and its flow branch."""

    def __init__(self, spec: PolicySpec, config: WallOssConfig):
        super().__init__(spec, config, actions=True)
        self.width, self.dim, self.prefix_limit = config.numbers, spec.action_dim, spec.prefix_limit
        self.action_in = nn.Linear(2 * config.numbers, config.width, bias=False)
        self.time_in = nn.Linear(2 * config.width, config.width, bias=False)
        self.time_out = nn.Linear(config.width, config.width, bias=False)
        self.action_out = nn.Linear(config.width, config.numbers, bias=False)
        # Of the last layer the prefix gives only keys and values; and no language is written.
        self.frozen = ("head.", f"mixture.experts.0.layers.{config.layers - 1}.mlp.")

    def encode(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B, layers, 2, kv_heads, T, head_dim), what of the prefix is there (B, T) bool, and the
        position of the first action (B, 1)."""
        prefix = self.prefix(inputs)
        return self.prefill(prefix)[1], prefix.valid, prefix.following

    def velocity(self, context: tuple[Tensor, Tensor, Tensor], x: Tensor, tau: Tensor) -> Tensor:
        """Velocity (B, H, W) of the noisy actions x (B, H, W) at flow time tau (B, 1) or (B, H)."""
        cache, valid, following = context
        there = (torch.arange(self.width, device=x.device) < self.dim).to(x)
        actions = self.action_in(torch.cat([x, there.expand_as(x)], -1))
        h = self.timed(actions, sinusoids(tau / (2 * torch.pi), self.config.width, 1e4))
        positions = (following + torch.arange(x.shape[1], device=x.device)).expand(3, -1, -1)
        mask = torch.cat([valid, valid.new_ones(x.shape[:2])], 1).unsqueeze(1).expand(-1, x.shape[1], -1)
        return self.action_out(self.mixture([None, h], positions, mask, cache)[1])

    def flow_loss(
        self, context: Any, actions: Tensor, noise: Tensor, tau: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """As FlowMatching's, but numbers that the robot lacks count as 0 in the mean, as in the reference."""
        return super().flow_loss(context, actions, noise, tau, keep) * (actions.shape[-1] / self.width)


#: Characters that stand for an image and for the state where text is read as bytes.
IMAGE, STATE = "\x01", "\x02"
#: LeRobot's and the makers' names of cameras that the text calls otherwise.
VIEWS = {"face_view": "front view", "move1_view": "move view", "move2_view": "move view"}


def views_of(cameras: Iterable[str], image: str) -> str:
    """How the text names the cameras; `image` stands for what each of them sees."""
    names = (
        VIEWS.get(camera) or camera.replace("_", " ") + ("" if "view" in camera else " view") for camera in cameras
    )
    return "".join(f" {name}: {image}" for name in names)


def prompt_of(cameras: Iterable[str]) -> str:
    """The text that WALL-OSS reads, with its special tokens."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nObservation:"
        f"{views_of(cameras, '<|vision_start|><|image_pad|><|vision_end|>')}\nInstruction: {{task}}.\n"
        "Predict the next action in robot action.\nProprioception: <|propri|>\n<|im_end|>\n<|im_start|>assistant\n"
    )


def byte_prompt(cameras: Iterable[str]) -> str:
    """A shorter one for the tokenizer "bytes", in which an image is token 4 and the state token 5.

    Their characters are ones that no instruction has.
    """
    return f"Observation:{views_of(cameras, IMAGE)}\nInstruction: {{task}}.\nProprioception: {STATE}\n"


CAMERAS = ("face_view", "left_wrist_view", "right_wrist_view")
TINY = {
    "vision": QwenVisionConfig(width=16, mlp=24, layers=2, heads=2, patch=7, window=28, full=(1,)), "width": 32,
    "mlp": 48, "action_mlp": 24, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "sections": (2, 3, 3),
    "vocabulary": 259, "numbers": 10, "state_numbers": 10, "image_token": 4, "state_token": 5,
}  # fmt: skip


def text_of(spec: PolicySpec, anew: bool = False) -> PolicySpec:
    """The same specification, with the prompt for its cameras where it has none of its own yet, or `anew`."""
    if spec.tokenizer != "bytes":
        return replace(spec, prompt=prompt_of(spec.cameras)) if anew else spec
    if IMAGE in spec.prompt and not anew:
        return spec
    return replace(spec, prompt=byte_prompt(spec.cameras))


class WallOssPolicy(FlowPolicy):
    """The recipe "wall_oss" on torch. Reads x-square-robot/wall-oss-flow, and LeRobot's wall_x."""

    Config, Network = WallOssConfig, WallOssNetwork
    parameters = 4.22e9
    contract = {
        "steps": 10, "guidance": ("guided", "prefix"), "prefix_limit": 10, "horizon": 32, "period": 0.05,
        "tokenizer": "bytes", "context": 256,
    }  # fmt: skip
    training = {
        "state": "joint", "kind": "joint", "horizon": 32, "period": 0.05, "steps": 10, "lr": 2e-5, "warmup": 1000,
        "decay": 0.01, "guidance": ("guided", "prefix"), "prefix_limit": 10,
    }  # fmt: skip
    presets = {
        "paper": Preset(
            WallOssConfig(image_token=4, state_token=5),
            {"arms": {"left": 6, "right": 6}, "cameras": dict.fromkeys(CAMERAS, (196, 252)), "optional": CAMERAS[1:]},
        ),
        "tiny": Preset(
            WallOssConfig(**TINY),
            {"cameras": {"face_view": (28, 42), "wrist": (28, 28)}, "optional": ("wrist",), "horizon": 8,
             "prefix_limit": 4, "context": 160},
        ),
    }  # fmt: skip
    published = RULES

    def __init__(self, spec: PolicySpec, *args: Any, **kwargs: Any):
        super().__init__(text_of(spec), *args, **kwargs)

    @classmethod
    def for_cameras(cls, spec: PolicySpec) -> PolicySpec:
        return text_of(spec, anew=True)

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, WallOssConfig, dict[str, Normalizer]]:
        spec, sizes, normalizers = read_wall_oss(cls.name(), cls.contract, folder, config, files)
        return spec, WallOssConfig(**sizes), normalizers


#: What an image's longer side becomes before it is cut to whole tokens, pixels.
RESOLUTION = 256


def image_size(height: int, width: int, step: int = 28) -> tuple[int, int]:
    """Size in which the network sees a camera's image: the longer side 256 pixels, then multiples of `step`."""
    scale = RESOLUTION / max(height, width)
    return tuple(max(1, round(int(side * scale) / step)) * step for side in (height, width))


def read_wall_oss(
    recipe: str, contract: Mapping[str, Any], folder: Path, config: Mapping[str, Any], files: TensorFiles
) -> tuple[PolicySpec, dict[str, Any], dict[str, Normalizer]]:
    """Specification, fields of QwenVlConfig and normalisers of the makers' or of LeRobot's checkpoint.

    LeRobot's config.json names the makers' folder, where the sizes and the tokenizer.json are; its own tells cameras
    and numbers. The makers' has none of them: it is taken for three cameras and two arms of six joints, not
    normalised, unless it has LeRobot's `input_features` and `output_features` beside its own settings.
    """
    base, inner = folder, config
    if "vision_config" not in config:
        base = find_checkpoint(config.get("pretrained_name_or_path") or folder, ("*.json",))
        inner = read_config(base)
    sizes, padding = published_sizes(base, inner, files)
    robot = LeRobotConfig(folder, {**DEFAULT, **config}, files, bare=True)
    step = sizes["vision"].patch * sizes["vision"].merge
    cameras = {name: image_size(*size, step) for name, size in robot.cameras.items()}
    fields = {
        "horizon": config.get("chunk_size", contract["horizon"]), "padding": padding, "prompt": prompt_of(cameras),
        "tokenizer": "tokenizer.json" if base == folder else str(base / "tokenizer.json"),
        "optional": tuple(cameras)[1:], "guidance": contract.get("guidance", ())[:1], "prefix_limit": 0,
    }  # fmt: skip
    spec = example_spec(recipe, robot.arms, cameras, **{**contract, **fields})
    return spec, sizes, robot.normalizers()


#: What is taken of a robot of which config.json says nothing.
DEFAULT = {
    "input_features": {"observation.state": {"shape": (14,)}}
    | {f"observation.images.{name}": {"shape": (3, 480, 640)} for name in CAMERAS},
    "output_features": {"action": {"shape": (14,)}},
    "normalization_mapping": {},
}
