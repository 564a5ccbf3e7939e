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

from vla_models.lerobot import STATISTICS, Statistics, arms_of
from vla_models.normalization import Normalizer
from vla_models.parts.attention import sinusoids
from vla_models.parts.flow import draw_flow, matching_loss
from vla_models.parts.paligemma import layer_rules
from vla_models.parts.qwen_vision import QwenVisionConfig
from vla_models.parts.qwen_vl import QwenVl, QwenVlConfig
from vla_models.policy import CheckpointError, PolicySpec, example_spec
from vla_models.published import Rule, TensorFiles, find_checkpoint, read_config
from vla_models.tokenizer import FileTokenizer, TokenizerError
from vla_models.torch_policy import Batch, FlowPolicy, Inputs, Preset


@dataclass(frozen=True)
class WallOssConfig(QwenVlConfig):
    """Sizes (see QwenVlConfig). prefix_share: part of the training samples that get a clean prefix of up to
    `PolicySpec.prefix_limit` actions."""

    prefix_share: float = 0.5


class WallOssNetwork(QwenVl):
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
        time = sinusoids(tau / (2 * torch.pi), actions.shape[-1], 1e4).expand_as(actions)
        h = self.time_out(nn.functional.silu(self.time_in(torch.cat([actions, time], -1))))
        positions = (following + torch.arange(x.shape[1], device=x.device)).expand(3, -1, -1)
        mask = torch.cat([valid, valid.new_ones(x.shape[:2])], 1).unsqueeze(1).expand(-1, x.shape[1], -1)
        return self.action_out(self.mixture([None, h], positions, mask, cache)[1])

    def flow_loss(
        self, context: Any, actions: Tensor, noise: Tensor, tau: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Flow-matching loss for given noise and flow times; see parts.flow.matching_loss.

        Numbers that the robot lacks count as 0 in the mean, as in the reference.
        """
        share = actions.shape[-1] / self.width
        return matching_loss(self.velocity, context, actions, noise, tau, keep) * share

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Flow-matching loss, flow time = 0.999 (1 - Beta(1.5, 1)), over the actions that count."""
        draw = draw_flow(batch, self.width, generator, self.prefix_limit, self.config.prefix_share)
        return {"loss": self.flow_loss(self.encode(batch.inputs), batch.actions, *draw)}


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
#: Behind the names of LeRobot's files all begin with "model."; the makers' own do not.
THEIRS = r"(?:model\.)?"
PUBLISHED = (
    Rule(THEIRS + r"action_preprocessor\.normalizer.*", None, "statistics of the makers' robots, not weights"),
    Rule(THEIRS + r"visual\.(.+)", r"vision.tower.\1"),
    Rule(THEIRS + r"model\.embed_tokens\.weight", "embedding.weight"),
    Rule(THEIRS + r"lm_head\.weight", "head.weight", "the embedding again"),
    *(
        Rule(
            THEIRS + rf"model\.layers\.(\d+)\.moe\.experts\.([01])\.{part}_proj\.weight",
            rf"mixture.experts.\2.layers.\1.mlp.{part}.weight",
            "the other branch's",
        )
        for part in ("gate", "up", "down")
    ),
    *layer_rules(THEIRS + "model", "mixture.experts.0"),
    *(
        Rule(THEIRS + rf"action_preprocessor\.{theirs}\.weight", f"{ours}.weight", "the other branch's")
        for theirs, ours in {
            "w1": "action_in", "w2": "time_in", "w3": "time_out", "action_proj_back": "action_out",
            "propri_proj": "state_in",
        }.items()
    ),
    STATISTICS,
)  # fmt: skip


def text_of(spec: PolicySpec) -> PolicySpec:
    """The same specification, with the prompt for its cameras where it has none of its own yet."""
    if spec.tokenizer != "bytes" or IMAGE in spec.prompt:
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
    published = PUBLISHED

    def __init__(self, spec: PolicySpec, *args: Any, **kwargs: Any):
        super().__init__(text_of(spec), *args, **kwargs)

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, WallOssConfig, dict[str, Normalizer]]:
        spec, sizes, normalizers = read_wall_oss(cls.name(), cls.contract, folder, config, files)
        return spec, WallOssConfig(**sizes), normalizers


#: What an image's longer side becomes before it is cut to whole tokens, pixels.
RESOLUTION = 256
#: Settings that the network has no choice of, with what is taken where config.json is silent.
FIXED = {"num_experts": 2, "mlp_moe": True, "attention_moe": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6}


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
    where = folder / "config.json"
    base, inner = folder, config
    if "vision_config" not in config:
        base = find_checkpoint(config.get("pretrained_name_or_path") or folder, ("*.json",))
        inner = read_config(base)
    if "experts" not in inner:
        raise CheckpointError(f"{base / 'config.json'}: expected the settings of WALL-OSS, found no 'experts'")
    for name, needed in FIXED.items():
        if inner.get(name, needed) != needed:
            raise CheckpointError(f"{base / 'config.json'}: {name}: expected {needed!r}, found {inner[name]!r}")
    try:
        sizes = _sizes(inner, files)
        inputs, outputs = config.get("input_features", DEFAULT_INPUTS), config.get("output_features", DEFAULT_OUTPUTS)
        shapes = {name: tuple(value["shape"]) for name, value in inputs.items()}
        state, dim = shapes.pop("observation.state")[0], outputs["action"]["shape"][0]
        step = sizes["vision"].patch * sizes["vision"].merge
        cameras = {name.rpartition(".")[2]: image_size(*shape[1:], step) for name, shape in shapes.items()}
        modes = config.get("normalization_mapping", {})
        ids = {"image_token": inner["image_token_id"], **_marks(base / "tokenizer.json")}
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{where}: expected settings of WALL-OSS, found no {error}") from error
    if not cameras or state != dim:
        raise CheckpointError(
            f"{where}: input_features: expected images and as many numbers in observation.state as in action ({dim}), "
            f"found {sorted(shapes)} and {state}"
        )
    statistics = Statistics(folder, files)
    normalizers = statistics.normalizers(modes, dim, dim, bare=True)
    tokenizer = base / "tokenizer.json"
    fields = {
        "horizon": config.get("chunk_size", contract["horizon"]), "padding": ids.pop("padding"),
        "tokenizer": tokenizer.name if base == folder else str(tokenizer), "prompt": prompt_of(cameras),
        "optional": tuple(cameras)[1:], "guidance": contract.get("guidance", ())[:1], "prefix_limit": 0,
    }  # fmt: skip
    arms = arms_of(dim)
    return example_spec(recipe, arms, cameras, **{**contract, **fields}), {**sizes, **ids}, normalizers


DEFAULT_INPUTS = {"observation.state": {"shape": (14,)}} | {
    f"observation.images.{name}": {"shape": (3, 480, 640)} for name in CAMERAS
}
DEFAULT_OUTPUTS = {"action": {"shape": (14,)}}


def _sizes(inner: Mapping[str, Any], files: TensorFiles) -> dict[str, Any]:
    """Fields of QwenVlConfig from the makers' config.json, and from shapes where the two may differ."""
    vision, experts, shapes = inner["vision_config"], inner["experts"], files.shapes
    root = "model." if any(name.startswith("model.visual.") for name in shapes) else ""

    def shape(name: str) -> tuple[int, ...]:
        if root + name not in shapes:
            raise CheckpointError(f"{files.path}: tensors missing, first {root + name!r}")
        return shapes[root + name]

    embedding, head = f"{root}model.embed_tokens.weight", f"{root}lm_head.weight"
    return {
        "vision": QwenVisionConfig(
            vision["hidden_size"], vision["intermediate_size"], vision["depth"], vision["num_heads"],
            vision["patch_size"], vision["spatial_merge_size"], vision["window_size"],
            tuple(vision["fullatt_block_indexes"]),
        ),
        "width": inner["hidden_size"],
        "mlp": experts[0]["intermediate_size"],
        "action_mlp": experts[1]["intermediate_size"],
        "layers": inner["num_hidden_layers"],
        "heads": inner["num_attention_heads"],
        "kv_heads": inner["num_key_value_heads"],
        "head_dim": inner["hidden_size"] // inner["num_attention_heads"],
        "sections": tuple(inner["rope_scaling"]["mrope_section"]),
        "vocabulary": shape("model.embed_tokens.weight")[0],
        "numbers": shape("action_preprocessor.action_proj_back.weight")[0],
        "state_numbers": shape("action_preprocessor.propri_proj.weight")[1] // 2,
        "tied": head not in shapes or torch.equal(files[head], files[embedding]),
    }  # fmt: skip


def _marks(path: Path) -> dict[str, int]:
    """Tokens of the makers' tokenizer.json: that which stands for the state, and that after the end of a text."""
    try:
        reader = FileTokenizer(path, 0, 0).reader
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    found = {"state_token": reader.token_to_id("<|propri|>"), "padding": reader.token_to_id("<|endoftext|>")}
    if None in found.values():
        raise CheckpointError(f"{path}: expected WALL-OSS's, found one without <|propri|> or <|endoftext|>")
    return found
