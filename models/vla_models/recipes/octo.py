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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vla_core.actions import ActionSpace

from vla_models import flax, identity_normalizers
from vla_models.denoising_policy import DenoisingPolicy, denoising_loss, draw_noise
from vla_models.diffusion import Diffusion
from vla_models.normalization import Normalizer
from vla_models.oxe import DataSet
from vla_models.parts.attention import TransformerBlock
from vla_models.parts.denoisers import MlpDenoiser
from vla_models.parts.stem import SmallStem
from vla_models.parts.text_encoder import T5_BASE, T5Size, TextEncoder, t5_size
from vla_models.parts.window import real_steps, with_window
from vla_models.policy import PolicyError, PolicySpec, example_spec
from vla_models.published import Rule, TensorFiles, count_layers, own_shapes, require
from vla_models.torch_policy import Batch, Inputs, Preset

#: Kinds of tokens, of which the attention's rules speak.
TASK, OBSERVED, READOUT = range(3)
#: The actions are kept within so many deviations.
BOUND = 5.0
#: Beginnings of flax's names.
TRUNK, HEAD = "octo_transformer/", "heads_action/diffusion_model/"
BLOCK = rf"{TRUNK}BlockTransformer_0/Transformer_0/encoderblock_(\d+)/"
STEM = rf"{TRUNK}observation_tokenizers_(\w+)/SmallStem16_0/"


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


class CameraTokens(nn.Module):
    """Images of one camera (B, T, 3, h, w) in [0, 1] to tokens (B, T, h/16 * w/16, width)."""

    def __init__(self, size: tuple[int, int], config: OctoConfig):
        super().__init__()
        self.stem = SmallStem(6, config.channels, config.features, config.groups)  # a goal's colours too
        self.out = nn.Linear(config.features, config.width)
        self.places = nn.Parameter(0.02 * torch.randn(config.window, size[0] * size[1] // 256, config.width))

    def forward(self, images: Tensor) -> Tensor:
        pixels = torch.cat([2 * images - 1, torch.full_like(images, -1.0)], 2)
        tokens = self.out(self.stem(pixels.flatten(0, 1)))
        return tokens.unflatten(0, images.shape[:2]) + self.places[: images.shape[1]]


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
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.heads, config.mlp, eps=1e-6) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = MlpDenoiser(
            width, spec.horizon * spec.action_dim, config.head_width, config.head_blocks, config.time_width
        )
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


#: From the names of the public code, which is flax, to ours.
RULES = (
    *flax.t5(rf"{TRUNK}task_tokenizers_language/hf_model/", "text.stack"),
    *flax.dense(rf"{TRUNK}task_language_projection", "task_in"),
    flax.places(rf"{TRUNK}task_language_pos_embedding", "task_places"),
    *flax.dense(rf"{TRUNK}obs_(\w+)_projection", r"cameras.\1_.out"),
    flax.places(rf"{TRUNK}obs_(\w+)_pos_embedding", r"cameras.\1_.places"),
    *flax.conv(rf"{STEM}StdConv_(\d+)", r"cameras.\1_.stem.convs.\2"),
    *flax.norm(rf"{STEM}GroupNorm_(\d+)", r"cameras.\1_.stem.norms.\2"),
    *flax.conv(rf"{STEM}embedding", r"cameras.\1_.stem.out"),
    flax.places(rf"{TRUNK}readout_action_pos_embedding", "readout"),
    *flax.norm(rf"{BLOCK}LayerNorm_([01])", r"blocks.\1.norms.\2"),
    *flax.dense(rf"{BLOCK}MlpBlock_0/Dense_0", r"blocks.\1.mlp.0"),
    *flax.dense(rf"{BLOCK}MlpBlock_0/Dense_1", r"blocks.\1.mlp.2"),
    *flax.attention(rf"{BLOCK}MultiHeadDotProductAttention_0", r"blocks.\1.attention"),
    *flax.norm(rf"{TRUNK}BlockTransformer_0/Transformer_0/encoder_norm", "norm"),
    Rule(rf"{HEAD}time_preprocess/kernel", "head.frequencies"),
    *flax.dense(rf"{HEAD}cond_encoder/Dense_0", "head.time.0"),
    *flax.dense(rf"{HEAD}cond_encoder/Dense_1", "head.time.2"),
    *flax.dense(rf"{HEAD}reverse_network/Dense_0", "head.input"),
    *flax.dense(rf"{HEAD}reverse_network/Dense_1", "head.output.1"),
    *flax.norm(rf"{HEAD}reverse_network/MLPResNetBlock_(\d+)/LayerNorm_0", r"head.blocks.\1.0"),
    *flax.dense(rf"{HEAD}reverse_network/MLPResNetBlock_(\d+)/Dense_0", r"head.blocks.\1.1"),
    *flax.dense(rf"{HEAD}reverse_network/MLPResNetBlock_(\d+)/Dense_1", r"head.blocks.\1.3"),
)
#: Settings of the public code of which only these values are known here.
KNOWN = {
    "head": "DiffusionActionHead", "repeat_task_tokens": True, "use_correct_attention": True, "readouts": {"action": 1},
    "action_dim": 7, "use_map": False, "max_action": BOUND,
}  # fmt: skip


class OctoPolicy(DenoisingPolicy):
    """The recipe "octo" on torch."""

    Config, Network = OctoConfig, OctoNetwork
    #: 93 million as published, of which T5-base is no part; T5-base's encoder has 109.6 million.
    parameters = 93e6 + 109.6e6
    contract = {
        "steps": 20, "history": 2, "horizon": 4, "period": 0.2, "context": 64, "tokenizer": "bytes",
        "guidance": ("guided", "prefix"), "prefix_limit": 3, "state": "pose",
    }  # fmt: skip
    #: Numbers of an action: the tool's step in position and angles, in the base's axes, and the gripper's opening.
    space = ActionSpace(("arm",), "pose", reference="step", rotation="rpy")
    training = {"horizon": 4, "period": 0.2, "lr": 3e-4, "warmup": 2000, "decay": 0.1, "clip": 1.0}
    published = RULES
    _paper = {
        "cameras": {"primary": (256, 256), "wrist": (128, 128)}, "optional": ("primary", "wrist"), "context": 16,
        "action_space": space,
    }  # fmt: skip
    presets = {
        "paper": Preset(OctoConfig(), _paper),
        "small": Preset(OctoConfig(width=384, heads=6, mlp=1536), _paper),
        "tiny": Preset(
            OctoConfig(
                width=32, layers=2, heads=2, mlp=64, window=3, channels=(8, 16, 16, 16), features=16, groups=8,
                text=T5Size(259, 16, 1, 2, 8, 32, "t5"), head_width=256, head_blocks=2, time_width=16, steps=10,
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
        model, shapes = config["model"], own_shapes(files, cls.published)
        head, tower = model["heads"]["action"], model["transformer_kwargs"]
        settings = {"diffusion_steps": 20, "hidden_dim": 256, "num_blocks": 3, "time_dim": 32} | head["kwargs"]
        older = {"repeat_task_tokens": False, "use_correct_attention": False}  # those that do not say it
        require(folder / "config.json", older | model | settings | {"head": head["name"]}, KNOWN)
        names = list(model["observation_tokenizers"])
        stem = f"cameras.{names[0]}_.stem."
        network = OctoConfig(
            width=model["token_embedding_size"],
            layers=tower["num_layers"],
            heads=tower["num_attention_heads"],
            mlp=tower["mlp_dim"],
            window=model["max_horizon"],
            channels=tuple(shapes[f"{stem}convs.{i}.weight"][0] for i in range(count_layers(shapes, f"{stem}convs."))),
            features=shapes[f"{stem}out.weight"][0],
            text=t5_size(shapes),
            head_width=settings["hidden_dim"],
            head_blocks=settings["num_blocks"],
            time_width=settings["time_dim"],
            steps=settings["diffusion_steps"],
        )
        sides = {name: 16 * math.isqrt(shapes[f"cameras.{name}_.places"][1]) for name in names}
        horizon = settings.get("action_horizon") or settings["pred_horizon"]
        contract = cls.contract | {
            "horizon": horizon, "prefix_limit": horizon - 1, "steps": network.steps, "history": config["window_size"],
            "context": shapes["task_places"][0], "tokenizer": "tokenizer.json",
        }  # fmt: skip
        cameras = {name: (side, side) for name, side in sides.items()}
        spec = example_spec(
            cls.name(), cameras=cameras, optional=tuple(cameras), action_space=cls.space, joints={}, **contract
        )
        data = DataSet.read(folder, config, "dataset", config.get("eval_datasets") or ())
        action = data.normalizer("action", "mean_std", spec.action_dim)
        return spec, network, identity_normalizers(spec) | {"action": action}
