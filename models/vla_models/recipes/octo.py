"""Recipe "octo": Octo 1.5, a block-wise causal transformer with a small diffusion head (arXiv 2405.12213).

    instruction --T5-base, frozen--> 16 task tokens --.
    each step of the window:                           .
      camera images --convolutional stem--> patches --- > transformer --> readout of the newest step --.
      the task tokens again, one readout token -------'                                                 > MLP --> noise
                                                          noisy actions, time --------------------------'

A token sees the task and what is observed at its own step and before; no one but readouts sees readouts, so they only
read. The transformer runs once for a chunk; the head, an MLP of three residual blocks over the whole chunk, in each of
20 DDPM steps. It predicts the noise; the state is kept within +-5 deviations; mean/std normalisation. The loss is
summed over the numbers of an action.

As in the public code: padded steps and missing cameras are masked, but readouts and repeated task tokens of a padded
step are not, nor is the padding behind an instruction (T5 itself does not attend to it). A stem also takes a goal
image, which is black where there is an instruction: always, here. Octo 1.5 does not look at the arm's state. The paper
trains every step of the window to predict; here the newest one does, whose actions a batch holds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vla_core.actions import ActionSpace

from vla_models.denoising_policy import DenoisingPolicy, denoising_loss, draw_noise
from vla_models.diffusion import Diffusion
from vla_models.normalization import NormalizationError, Normalizer
from vla_models.parts.attention import Attention
from vla_models.parts.text_encoder import T5_BASE, T5Size, TextEncoder, t5_size
from vla_models.parts.window import real_steps, with_window
from vla_models.policy import CheckpointError, PolicyError, PolicySpec, example_spec
from vla_models.published import Rule, TensorFiles
from vla_models.torch_policy import Batch, Inputs, Preset

#: Kinds of tokens, of which the attention's rules speak.
TASK, OBSERVED, READOUT = range(3)
#: The actions are kept within so many deviations.
BOUND = 5.0
#: Beginnings of flax's names.
TRUNK, HEAD = "octo_transformer/", "heads_action/diffusion_model/"
BLOCK = rf"{TRUNK}BlockTransformer_0/Transformer_0/encoderblock_(\d+)/"
T5 = f"{TRUNK}task_tokenizers_language/hf_model/"


@dataclass(frozen=True)
class OctoConfig:
    """Sizes of the network.

    width, layers, heads, mlp: of the transformer. window: longest history that has embeddings of its places. channels,
    features: of the stem's four convolutions of stride 2, and of a patch behind them; groups: of their group norm.
    text: of the frozen T5. head_width, head_blocks, time_width: of the diffusion head. steps: of its diffusion.
    samples: pairs of noise and time that training draws for each observation (the public code's n_diffusion_samples).
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    window: int = 10
    channels: tuple[int, ...] = (32, 96, 192, 384)
    features: int = 512
    groups: int = 32
    text: T5Size = T5_BASE
    head_width: int = 256
    head_blocks: int = 3
    time_width: int = 32
    steps: int = 20
    samples: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", T5Size.of(self.text))


class StandardConv(nn.Conv2d):
    """A convolution whose weights have mean 0 and deviation 1 in each output channel (arXiv 1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        deviation = weight.square().mean((1, 2, 3), keepdim=True).sqrt()
        return self._conv_forward(x, weight / (deviation + 1e-5), self.bias)


class SmallStem(nn.Module):
    """Images (N, 6, h, w) in [-1, 1], a goal's behind what is seen, to patches (N, h/16 * w/16, features)."""

    def __init__(self, config: OctoConfig):
        super().__init__()
        inputs = (6, *config.channels)
        self.convs = nn.ModuleList(
            StandardConv(a, b, 3, stride=2, padding=1) for a, b in zip(inputs, config.channels, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(config.groups, channels, eps=1e-6) for channels in config.channels)
        self.out = nn.Conv2d(config.channels[-1], config.features, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.out(x).flatten(2).transpose(1, 2)


class CameraTokens(nn.Module):
    """Images of one camera (B, T, 3, h, w) in [0, 1] to tokens (B, T, h/16 * w/16, width)."""

    def __init__(self, size: tuple[int, int], config: OctoConfig):
        super().__init__()
        self.stem = SmallStem(config)
        self.out = nn.Linear(config.features, config.width)
        self.places = nn.Parameter(0.02 * torch.randn(config.window, size[0] * size[1] // 256, config.width))

    def forward(self, images: Tensor) -> Tensor:
        pixels = torch.cat([2 * images - 1, torch.full_like(images, -1.0)], 2)
        tokens = self.out(self.stem(pixels.flatten(0, 1)))
        return tokens.unflatten(0, images.shape[:2]) + self.places[: images.shape[1]]


class OctoBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: OctoConfig):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(config.width, eps=1e-6) for _ in range(2))
        self.attention = Attention(config.width, config.heads)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.mlp), nn.GELU("tanh"), nn.Linear(config.mlp, config.width)
        )

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, hidden)
        return x + self.mlp(self.norms[1](x))


class ScoreNetwork(nn.Module):
    """The noise in a flattened chunk: time in learned Fourier features, then residual blocks over everything."""

    def __init__(self, config: OctoConfig, size: int):
        super().__init__()
        time, width = config.time_width, config.head_width
        self.frequencies = nn.Parameter(0.2 * torch.randn(time // 2, 1))
        self.time = nn.Sequential(nn.Linear(time, 2 * time), nn.SiLU(), nn.Linear(2 * time, time))
        self.input = nn.Linear(time + config.width + size, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * width), nn.SiLU(),
                          nn.Linear(4 * width, width))
            for _ in range(config.head_blocks)
        )  # fmt: skip
        self.output = nn.Sequential(nn.SiLU(), nn.Linear(width, size))

    def forward(self, readout: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """readout (B, width), x (B, size), t (B,) -> (B, size)."""
        turns = 2 * math.pi * t.to(x).unsqueeze(-1) @ self.frequencies.T
        time = self.time(torch.cat([turns.cos(), turns.sin()], -1))
        h = self.input(torch.cat([time, readout, x], -1))
        for block in self.blocks:
            h = h + block(h)
        return self.output(h)


class OctoNetwork(nn.Module):
    """The network of the recipe "octo"."""

    frozen = ("text.",)

    def __init__(self, spec: PolicySpec, config: OctoConfig):
        super().__init__()
        if bad := {name: size for name, size in spec.cameras.items() if size[0] % 16 or size[1] % 16}:
            raise PolicyError(f"policy {spec.name}: cameras: expected multiples of 16 pixels, found {bad}")
        if spec.history > config.window:
            raise PolicyError(f"policy {spec.name}: history: expected at most {config.window}, found {spec.history}")
        self.config = config
        width, context = config.width, spec.context
        patches = [height * columns // 256 for height, columns in spec.cameras.values()]
        self.text = TextEncoder(config.text, spec.padding)
        self.task_in = nn.Linear(config.text.width, width)
        self.task_places = nn.Parameter(0.02 * torch.randn(context, width))
        self.cameras = nn.ModuleDict({f"{name}_": CameraTokens(size, config) for name, size in spec.cameras.items()})
        self.readout = nn.Parameter(0.02 * torch.randn(config.window, 1, width))
        self.blocks = nn.ModuleList(OctoBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = ScoreNetwork(config, spec.horizon * spec.action_dim)
        self.diffusion = Diffusion(config.steps, "cosine", "epsilon", "ddpm", clip=0.0, bound=BOUND, variance="large")
        self.register_buffer("pattern", attention_pattern(context, patches, spec.history), persistent=False)

    def transform(self, inputs: Inputs, real: Tensor | None = None) -> Tensor:
        """What the readout of each step of the window says, (B, T, width).

        real: (B, T) bool, false for padded steps; None: those that repeat the one after them (real_steps).
        """
        inputs = with_window(inputs)
        real = real_steps(inputs) if real is None else real
        count, window = real.shape
        task = self.task_in(self.text(inputs.tokens)) + self.task_places
        groups, valid = [], []
        for i, (image, camera) in enumerate(zip(inputs.images, self.cameras.values(), strict=True)):
            groups.append(camera(image))
            valid.append((real & inputs.present[:, i : i + 1]).unsqueeze(-1).expand(-1, -1, groups[-1].shape[2]))
        groups.append(task.unsqueeze(1).expand(-1, window, -1, -1))
        groups.append(self.readout[:window].expand(count, -1, -1, -1))
        steps = torch.cat(groups, 2)
        size = steps.shape[2]
        always = torch.ones_like(real).unsqueeze(-1)
        valid = torch.cat([*valid, always.expand(-1, -1, size - sum(v.shape[2] for v in valid))], 2)
        x = torch.cat([task, steps.flatten(1, 2)], 1)
        valid = torch.cat([torch.ones_like(task[..., 0], dtype=torch.bool), valid.flatten(1)], 1)
        hidden = ~(self.pattern & valid.unsqueeze(1))
        for block in self.blocks:
            x = block(x, hidden)
        return self.norm(x)[:, task.shape[1] :].unflatten(1, (window, size))[:, :, -1]

    def encode(self, inputs: Inputs) -> Tensor:
        """What the newest step's readout says, (B, width)."""
        return self.transform(inputs)[:, -1]

    def denoise(self, context: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise in the actions x (B, H, dim) at the diffusion's time t (B,)."""
        return self.head(context, x.flatten(1), t).reshape(x.shape)

    def noise_loss(self, context: Tensor, actions: Tensor, noise: Tensor, t: Tensor, padded: Tensor) -> Tensor:
        """Square error of the noise, summed over the numbers of an action, mean over the actions of the episode."""
        actions = actions.clamp(-BOUND, BOUND)
        return denoising_loss(self, context, actions, noise, t, padded) * actions.shape[-1]

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """`noise_loss` at random times."""
        context, actions, padded = (
            value.repeat_interleave(self.config.samples, 0)
            for value in (self.encode(batch.inputs), batch.actions, batch.padded)
        )
        noise, t = draw_noise(self, actions, generator)
        return {"loss": self.noise_loss(context, actions, noise, t, padded)}


def attention_pattern(task: int, patches: Sequence[int], window: int) -> Tensor:
    """(N, N) bool: which token (row) may see which, [task, then each step's cameras, task again, readout].

    Everything sees the task; what is observed at a step sees what was observed then and before; readouts see that too,
    and earlier readouts.
    """
    step = [OBSERVED] * (sum(patches) + task) + [READOUT]
    kind = torch.tensor([TASK] * task + step * window)
    time = torch.cat([torch.full((task,), -1), torch.arange(window).repeat_interleave(len(step))])
    before = time[None] <= time[:, None]
    allowed = (kind[None] != READOUT) | (kind[:, None] == READOUT)
    return before & allowed


def _dense(theirs: str, ours: str, change: Callable[[Tensor], Tensor] = torch.t) -> tuple[Rule, Rule]:
    """Rules for kernel and bias of one of flax's layers. theirs: a pattern; change: of the kernel."""
    return (
        Rule(rf"{theirs}/kernel", f"{ours}.weight", change=change),
        Rule(rf"{theirs}/bias", f"{ours}.bias", change=torch.flatten),
    )


def _norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{theirs}/scale", f"{ours}.weight"), Rule(f"{theirs}/bias", f"{ours}.bias")


def _conv(kernel: Tensor) -> Tensor:
    """(h, w, in, out) -> (out, in, h, w)."""
    return kernel.movedim((-1, -2), (0, 1))


#: Flax keeps kernels as (inputs, outputs), those of attention with the heads apart.
RULES = (
    *(Rule(rf"{T5}encoder/block/(\d+)/layer/0/SelfAttention/{name}/kernel",
           rf"text.stack.block.\1.layer.0.SelfAttention.{name}.weight", change=torch.t) for name in "qkvo"),
    *(Rule(rf"{T5}encoder/block/(\d+)/layer/1/DenseReluDense/{name}/kernel",
           rf"text.stack.block.\1.layer.1.DenseReluDense.{name}.weight", change=torch.t) for name in ("wi", "wo")),
    Rule(rf"{T5}encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding",
         "text.stack.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    Rule(rf"{T5}encoder/block/(\d+)/layer/([01])/layer_norm/weight", r"text.stack.block.\1.layer.\2.layer_norm.weight"),
    Rule(f"{T5}encoder/final_layer_norm/weight", "text.stack.final_layer_norm.weight"),
    Rule(f"{T5}shared/embedding", "text.stack.embed_tokens.weight"),
    *_dense(f"{TRUNK}task_language_projection", "task_in"),
    Rule(f"{TRUNK}task_language_pos_embedding", "task_places", change=lambda x: x.squeeze(0)),
    *_dense(rf"{TRUNK}obs_(\w+)_projection", r"cameras.\1_.out"),
    Rule(rf"{TRUNK}obs_(\w+)_pos_embedding", r"cameras.\1_.places", change=lambda x: x.squeeze(0)),
    *_dense(rf"{TRUNK}observation_tokenizers_(\w+)/SmallStem16_0/StdConv_(\d+)", r"cameras.\1_.stem.convs.\2", _conv),
    *_norm(rf"{TRUNK}observation_tokenizers_(\w+)/SmallStem16_0/GroupNorm_(\d+)", r"cameras.\1_.stem.norms.\2"),
    *_dense(rf"{TRUNK}observation_tokenizers_(\w+)/SmallStem16_0/embedding", r"cameras.\1_.stem.out", _conv),
    Rule(f"{TRUNK}readout_action_pos_embedding", "readout", change=lambda x: x.squeeze(0)),
    *_norm(rf"{BLOCK}LayerNorm_([01])", r"blocks.\1.norms.\2"),
    *_dense(rf"{BLOCK}MlpBlock_0/Dense_0", r"blocks.\1.mlp.0"),
    *_dense(rf"{BLOCK}MlpBlock_0/Dense_1", r"blocks.\1.mlp.2"),
    *(rule for name in ("query", "key", "value")
      for rule in _dense(rf"{BLOCK}MultiHeadDotProductAttention_0/{name}", rf"blocks.\1.attention.{name}",
                         lambda kernel: kernel.flatten(1).T)),
    *_dense(rf"{BLOCK}MultiHeadDotProductAttention_0/out", r"blocks.\1.attention.out", lambda x: x.flatten(0, -2).T),
    *_norm(f"{TRUNK}BlockTransformer_0/Transformer_0/encoder_norm", "norm"),
    Rule(f"{HEAD}time_preprocess/kernel", "head.frequencies"),
    *_dense(f"{HEAD}cond_encoder/Dense_0", "head.time.0"),
    *_dense(f"{HEAD}cond_encoder/Dense_1", "head.time.2"),
    *_dense(f"{HEAD}reverse_network/Dense_0", "head.input"),
    *_dense(f"{HEAD}reverse_network/Dense_1", "head.output.1"),
    *_norm(rf"{HEAD}reverse_network/MLPResNetBlock_(\d+)/LayerNorm_0", r"head.blocks.\1.0"),
    *_dense(rf"{HEAD}reverse_network/MLPResNetBlock_(\d+)/Dense_0", r"head.blocks.\1.1"),
    *_dense(rf"{HEAD}reverse_network/MLPResNetBlock_(\d+)/Dense_1", r"head.blocks.\1.3"),
)  # fmt: skip


class OctoPolicy(DenoisingPolicy):
    """The recipe "octo" on torch."""

    Config, Network = OctoConfig, OctoNetwork
    #: 93 million as published, of which T5-base is no part; T5-base's encoder has 109.6 million.
    parameters = 93e6 + 109.6e6
    contract = {
        "steps": 20,
        "history": 2,
        "horizon": 4,
        "period": 0.2,
        "context": 64,
        "tokenizer": "bytes",
        "guidance": ("guided", "prefix"),
        "prefix_limit": 3,
        "state": "pose",
    }
    #: Numbers of an action: the tool's step in position and angles, in the base's axes, and the gripper's opening.
    space = ActionSpace(("arm",), "pose", reference="step", rotation="rpy")
    training = {"horizon": 4, "period": 0.2, "lr": 3e-4, "warmup": 2000, "decay": 0.1, "clip": 1.0}
    published = RULES
    _paper = {
        "cameras": {"primary": (256, 256), "wrist": (128, 128)},
        "optional": ("primary", "wrist"),
        "context": 16,
        "action_space": space,
    }
    presets = {
        "paper": Preset(OctoConfig(), _paper),
        "small": Preset(OctoConfig(width=384, heads=6, mlp=1536), _paper),
        "tiny": Preset(
            OctoConfig(
                width=32, layers=2, heads=2, mlp=64, window=3, channels=(8, 16, 16, 16), features=16, groups=8,
                text=T5Size(259, 16, 1, 2, 8, 32, gated=False), head_width=256, head_blocks=2, time_width=16, steps=10,
                samples=16,
            ),
            {"cameras": {"primary": (32, 48), "wrist": (32, 32)}, "optional": ("wrist",), "horizon": 8,
             "context": 32, "state": "joint", "prefix_limit": 4, "steps": 5},
        ),
    }  # fmt: skip

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, OctoConfig, dict[str, Normalizer]]:
        """Octo 1.5 (rail-berkeley/octo-base-1.5, octo-small-1.5), its parameters as safetensors under flax's names.

        tokenizer.json is T5's, which is not part of the public folder. The statistics of an action are those of the
        data set that `dataset` in config.json names, by default its first `eval_datasets`. Public statistics say no
        period: actions are taken to be 0.2 s apart, as BridgeData's. Only actions of 7 numbers are known here.
        """
        where = folder / "config.json"
        try:
            model = config["model"]
            head, tower = model["heads"]["action"], model["transformer_kwargs"]
            known = {
                "heads.action": (head["name"], "DiffusionActionHead"),
                "repeat_task_tokens": (model["repeat_task_tokens"], True),
                "use_correct_attention": (model["use_correct_attention"], True),
                "readouts": (dict(model["readouts"]), {"action": 1}),
                "action_dim": (head["kwargs"]["action_dim"], cls.space.dim),
                "use_map": (head["kwargs"].get("use_map", False), False),
                "max_action": (head["kwargs"].get("max_action", BOUND), BOUND),
            }
            horizon = head["kwargs"].get("action_horizon") or head["kwargs"]["pred_horizon"]
            names = list(model["observation_tokenizers"])
            steps, history = head["kwargs"].get("diffusion_steps", 20), config["window_size"]
            shapes = files.shapes
            stem = f"{TRUNK}observation_tokenizers_{names[0]}/SmallStem16_0/"
            convs = sorted(name for name in shapes if re.fullmatch(rf"{stem}StdConv_\d+/kernel", name))
            network = OctoConfig(
                width=model["token_embedding_size"],
                layers=tower["num_layers"],
                heads=tower["num_attention_heads"],
                mlp=tower["mlp_dim"],
                window=model["max_horizon"],
                channels=tuple(shapes[name][-1] for name in convs),
                features=shapes[f"{stem}embedding/kernel"][-1],
                text=t5_size({as_torch(name): shape[::-1] if name.endswith("kernel") else shape
                              for name, shape in shapes.items()}, as_torch(T5)),
                head_width=head["kwargs"].get("hidden_dim", 256),
                head_blocks=head["kwargs"].get("num_blocks", 3),
                time_width=head["kwargs"].get("time_dim", 32),
                steps=steps,
            )  # fmt: skip
            sides = {name: 16 * math.isqrt(shapes[f"{TRUNK}obs_{name}_pos_embedding"][2]) for name in names}
            context = shapes[f"{TRUNK}task_language_pos_embedding"][1]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{where}: expected settings and tensors of Octo 1.5, found no {error}") from error
        if bad := {name: value for name, (value, wanted) in known.items() if value != wanted}:
            raise CheckpointError(f"{where}: expected { ({name: known[name][1] for name in bad}) }, found {bad}")
        contract = {**cls.contract, "horizon": horizon, "steps": steps, "history": history, "context": context,
                    "prefix_limit": horizon - 1, "tokenizer": "tokenizer.json"}  # fmt: skip
        cameras = {name: (side, side) for name, side in sides.items()}
        spec = example_spec(
            cls.name(), cameras=cameras, optional=tuple(cameras), action_space=cls.space, joints={}, **contract
        )
        return spec, network, read_statistics(folder, config, spec)


def as_torch(name: str) -> str:
    """A name of flax's as torch writes it."""
    return name.replace("/kernel", "/weight").replace("/embedding", "/weight").replace("/", ".")


def read_statistics(folder: Path, config: Mapping[str, Any], spec: PolicySpec) -> dict[str, Normalizer]:
    """Normalisers of Octo's dataset_statistics.json, of one data set or of many. Raises CheckpointError."""
    path = folder / "dataset_statistics.json"
    try:
        found = json.loads(path.read_text())
        wanted = config.get("dataset") or next(iter(config.get("eval_datasets") or ()), None)
        if "action" not in found:
            name = wanted if wanted in found or len(found) != 1 else next(iter(found))
            if name not in found:
                raise CheckpointError(f"{path}: dataset: expected one of {sorted(found)}, found {name!r}")
            found = found[name]
        action = found["action"]
        mean, std = np.asarray(action["mean"], float), np.asarray(action["std"], float)
        mask = np.asarray(action.get("mask", np.ones(len(mean))), bool)
        scale = np.where(mask, np.maximum(std, 1e-8), 1.0)
        actions = Normalizer("mean_std", np.where(mask, mean, 0.0), scale)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, NormalizationError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: expected mean and std of the data set's actions, found {error!r}") from error
    if actions.offset.shape != (spec.action_dim,):
        raise CheckpointError(f"{path}: expected {spec.action_dim} numbers of an action, found {actions.offset.shape}")
    state = Normalizer("mean_std", np.zeros(spec.state_dim), np.ones(spec.state_dim))
    return {"state": state, "action": actions}
