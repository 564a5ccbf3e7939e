"""Recipe "rdt": RDT-1B, a diffusion transformer over one vector for all robots (arXiv 2410.07864).

    instruction --T5-XXL, frozen----------------> language tokens --.  keys, values of the odd and even blocks
    2 steps x 3 cameras --SigLIP, frozen--------> image tokens ------'          |
    [time, control frequency, state, 64 noisy actions] --28 blocks of self-attention, cross-attention, MLP--> clean ones

State and actions are unified vectors of 128 numbers with their masks (vla_models.parts.unified), not normalised.
Blocks attend to the language and to the images by turns. The network predicts the clean actions; 1000 steps of the
squared cosine schedule in training, five of DPM-Solver++ in use. Only the last line runs in each of them: keys and
values of both conditions are made once for a chunk.

Cameras that are not there, and steps before an episode's start, show the grey on which the tower was trained. Its
`RmsNorm` is that of timm 1.0.3, with which the published weights were trained: it divides by the (unbiased) standard
deviation, not by the root mean square as later versions do. In training each condition is hidden now and then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vla_core.actions import ActionSpace

from vla_models import identity_normalizers
from vla_models.denoising_policy import DenoisingPolicy, denoising_loss, draw_noise
from vla_models.diffusion import Diffusion
from vla_models.normalization import Normalizer
from vla_models.parts.attention import attend, mlp, split_heads, waves
from vla_models.parts.flow import pad_last
from vla_models.parts.siglip import siglip, siglip_sizes, square_side
from vla_models.parts.text_encoder import T5_XXL, T5Size, TextEncoder, t5_rules, t5_size
from vla_models.parts.unified import SIZE, Unified, unified_places
from vla_models.parts.window import real_steps, with_window
from vla_models.policy import PolicyError, PolicySpec, example_spec
from vla_models.published import Rule, TensorFiles, find_checkpoint, own_shapes, read_config, require
from vla_models.torch_policy import Batch, Inputs, Preset

#: What a camera shows that is not there: SigLIP's mean, as a pixel.
GREY = 127 / 255
#: The token of an empty instruction: T5's end of text.
EMPTY = 1
#: Folders of the frozen encoders beside the weights, and the owner of those names on the hub.
ENCODERS = {"text": "t5-v1_1-xxl", "vision": "siglip-so400m-patch14-384"}


@dataclass(frozen=True)
class RdtConfig:
    """Sizes of the network.

    width, layers, heads: of the transformer. frequencies: features of the time and of the control frequency. context:
    places for language tokens. text: of the frozen T5. vision_width, vision_mlp, vision_layers, vision_heads, patch:
    of the frozen SigLIP. steps: of the diffusion in training. hide: how often a training sample lacks, each for itself,
    the instruction, the state, the state's mask, the control frequency, and each picture.
    """

    width: int = 2048
    layers: int = 28
    heads: int = 32
    frequencies: int = 256
    context: int = 1024
    text: T5Size = T5_XXL
    vision_width: int = 1152
    vision_mlp: int = 4304
    vision_layers: int = 27
    vision_heads: int = 16
    patch: int = 14
    steps: int = 1000
    hide: float = 0.1


class DeviationNorm(nn.Module):
    """x / deviation(x) * weight over the last axis; the mean stays in x (timm 1.0.3's RmsNorm)."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)
        return x * torch.rsqrt(variance + self.eps) * self.weight


class NormedAttention(nn.Module):
    """Attention whose queries and keys are normalised in each head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.query_norm, self.key_norm = (DeviationNorm(width // heads) for _ in range(2))

    def memory(self, x: Tensor) -> Tensor:
        """Keys and values of tokens (B, T, width): (B, 2, heads, T, width/heads)."""
        keys, values = (split_heads(project(x), self.heads) for project in (self.key, self.value))
        return torch.stack([self.key_norm(keys), values], 1)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        queries = self.query_norm(split_heads(self.query(x), self.heads))
        return self.out(attend(queries, memory[:, 0], memory[:, 1], mask))


class RdtBlock(nn.Module):
    """Self-attention, cross-attention to one condition, MLP; pre-norm."""

    def __init__(self, config: RdtConfig):
        super().__init__()
        self.norms = nn.ModuleList(DeviationNorm(config.width) for _ in range(3))
        self.attention = NormedAttention(config.width, config.heads)
        self.cross = NormedAttention(config.width, config.heads)
        self.mlp = mlp(config.width, config.width, config.width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        h = self.norms[0](x)
        x = x + self.attention(h, self.attention.memory(h))
        x = x + self.cross(self.norms[1](x), memory, mask)
        return x + self.mlp(self.norms[2](x))


class RdtNetwork(nn.Module):
    """The network of the recipe "rdt"."""

    frozen = ("text.", "vision.")
    width = SIZE

    def __init__(self, spec: PolicySpec, config: RdtConfig):
        super().__init__()
        side, width = square_side(spec), config.width
        if spec.context > config.context:
            raise PolicyError(f"policy {spec.name}: context: expected at most {config.context}, found {spec.context}")
        self.config, self.rate = config, 1 / spec.period
        self.diffusion = Diffusion(config.steps, "squaredcos_cap_v2", "sample", "dpmsolver++", clip=0.0)
        self.state_space = Unified(unified_places(spec, "state"))
        self.action_space = Unified(unified_places(spec, "action"))
        self.text = TextEncoder(config.text, spec.padding)
        self.vision = siglip(config, side).requires_grad_(False)
        self.language_in = mlp(config.text.width, width, width)
        self.image_in = mlp(config.vision_width, width, width)
        self.state_in = mlp(2 * SIZE, width, width, width)
        self.time, self.frequency = (
            nn.Sequential(nn.Linear(config.frequencies, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(2)
        )
        patches = (side // config.patch) ** 2
        kinds = torch.cat([torch.arange(4), torch.full((spec.horizon - 1,), 3)])
        index = torch.cat([torch.zeros(3), torch.arange(spec.horizon)])
        frames = torch.cartesian_prod(torch.arange(spec.history), torch.arange(len(spec.cameras)))
        self.places = nn.Parameter(torch.cat([_sinusoids(kinds, width // 2), _sinusoids(index, width // 2)], -1))
        self.language_places = nn.Parameter(torch.zeros(config.context, width))
        self.image_places = nn.Parameter(
            torch.cat([_sinusoids(part, width // 2) for part in frames.unbind(-1)], -1).repeat_interleave(patches, 0)
        )
        self.blocks = nn.ModuleList(RdtBlock(config) for _ in range(config.layers))
        self.norm = DeviationNorm(width)
        self.out = mlp(width, width, SIZE)
        nn.init.zeros_(self.out[-1].weight)
        nn.init.zeros_(self.out[-1].bias)

    def encode(self, inputs: Inputs, hidden: Tensor | None = None) -> tuple[Tensor, ...]:
        """Keys and values of the language and of the images for their blocks, (B, 2 * blocks, heads, tokens,
        width/heads); (B, tokens), 1 for language to leave out; tokens of the control frequency and of the state,
        (B, 2, width).

        hidden: (B, 4 + T * cameras) bool, what a training sample lacks, see RdtConfig.
        """
        inputs = with_window(inputs)
        count, window = inputs.state.shape[:2]
        there = real_steps(inputs).unsqueeze(-1) & inputs.present.unsqueeze(1)
        tokens, state = inputs.tokens, self.state_space.spread(inputs.state[:, -1])
        mask, rate = self.state_space.mask.expand(count, -1), state.new_full((count,), self.rate)
        if hidden is not None:
            no_text, no_state, no_mask, no_rate = hidden[:, :4].unbind(1)
            empty = torch.where(torch.arange(tokens.shape[1], device=tokens.device) == 0, EMPTY, self.text.padding)
            tokens = torch.where(no_text.unsqueeze(1), empty, tokens)
            state, mask = state * ~no_state.unsqueeze(1), mask * ~no_mask.unsqueeze(1)
            rate, there = rate * ~no_rate, there & ~hidden[:, 4:].unflatten(1, (window, -1))
        pictures = torch.stack(inputs.images, 2)
        pictures = torch.where(there[..., None, None, None], pictures, GREY).flatten(0, 2)
        seen = self.vision(2 * pictures - 1).last_hidden_state.unflatten(0, (count, -1)).flatten(1, 2)
        images = self.image_in(seen) + self.image_places
        language = self.language_in(self.text(tokens)) + self.language_places[: tokens.shape[1]]
        memories = [torch.cat([block.cross.memory(condition) for block in self.blocks[turn::2]], 1)
                    for turn, condition in enumerate((language, images))]  # fmt: skip
        robot = [self.frequency(waves(rate, self.config.frequencies)), self.state_in(torch.cat([state, mask], -1))]
        return (*memories, (~self.text.inside(tokens)).to(state), torch.stack(robot, 1))

    def denoise(self, context: tuple[Tensor, ...], x: Tensor, t: Tensor) -> Tensor:
        """The clean actions of the noisy ones x (B, H, 128), the robot's own numbers first, at the time t (B,)."""
        *memories, unread, robot = context
        unread = unread > 0.5
        noisy = self.action_space.of_wide(x)
        actions = self.state_in(torch.cat([noisy, self.action_space.mask.expand_as(noisy)], -1))
        time = self.time(waves(t, self.config.frequencies)).unsqueeze(1)
        h = torch.cat([time, robot, actions], 1) + self.places
        for i, block in enumerate(self.blocks):
            turn, k = i % 2, i // 2
            h = block(h, memories[turn][:, 2 * k : 2 * k + 2], None if turn else unread)
        return self.action_space.to_wide(self.out(self.norm(h))[:, -x.shape[1] :])

    def clean_loss(self, context: Any, actions: Tensor, noise: Tensor, t: Tensor, padded: Tensor) -> Tensor:
        """Mean square error of the clean actions over all 128 numbers, 0 where the robot has none.

        actions (B, H, dim); noise (B, H, 128), in the order of `denoise`.
        """
        wide = pad_last(actions, SIZE) * self.action_space.to_wide(self.action_space.mask)
        return denoising_loss(self, context, wide, noise, t, padded)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """`clean_loss` at one random time a sample."""
        noise, t = draw_noise(self, pad_last(batch.actions, SIZE), generator)
        hidden = None
        if self.training:
            count, cameras = batch.inputs.present.shape
            window = batch.inputs.state.shape[1] if batch.inputs.state.ndim == 3 else 1
            drawn = torch.rand(count, 4 + window * cameras, generator=generator)
            hidden = (drawn < self.config.hide).to(noise.device)
        return {"loss": self.clean_loss(self.encode(batch.inputs, hidden), batch.actions, noise, t, batch.padded)}


#: model.* and the adaptors as published; text.* and vision.* are those of transformers, put before them by the reader.
BLOCK = r"model\.blocks\.(\d+)\."
RULES = (
    Rule(r"model\.x_pos_embed", "places", change=lambda x: x.squeeze(0)),
    Rule(r"model\.lang_cond_pos_embed", "language_places", change=lambda x: x.squeeze(0)),
    Rule(r"model\.img_cond_pos_embed", "image_places", change=lambda x: x.squeeze(0)),
    Rule(r"model\.t_embedder\.mlp\.(.+)", r"time.\1"),
    Rule(r"model\.freq_embedder\.mlp\.(.+)", r"frequency.\1"),
    *(Rule(rf"{BLOCK}norm{n + 1}\.weight", rf"blocks.\1.norms.{n}.weight") for n in range(3)),
    Rule(rf"{BLOCK}attn\.qkv\.(.+)", tuple(rf"blocks.\1.attention.{name}.\2" for name in ("query", "key", "value"))),
    Rule(rf"{BLOCK}cross_attn\.q\.(.+)", r"blocks.\1.cross.query.\2"),
    Rule(rf"{BLOCK}cross_attn\.kv\.(.+)", tuple(rf"blocks.\1.cross.{name}.\2" for name in ("key", "value"))),
    *(Rule(rf"{BLOCK}{theirs}\.{name}\.(.+)", rf"blocks.\1.{ours}.{own}.\2")
      for theirs, ours in (("attn", "attention"), ("cross_attn", "cross"))
      for name, own in (("q_norm", "query_norm"), ("k_norm", "key_norm"), ("proj", "out"))),
    *(Rule(rf"{BLOCK}ffn\.fc{n + 1}\.(.+)", rf"blocks.\1.mlp.{2 * n}.\2") for n in range(2)),
    Rule(r"model\.final_layer\.norm_final\.weight", "norm.weight"),
    *(Rule(rf"model\.final_layer\.ffn_final\.fc{n + 1}\.(.+)", rf"out.{2 * n}.\1") for n in range(2)),
    Rule(r"lang_adaptor\.(.+)", r"language_in.\1"),
    Rule(r"img_adaptor\.(.+)", r"image_in.\1"),
    Rule(r"state_adaptor\.(.+)", r"state_in.\1"),
    *t5_rules(r"text\."),
    Rule(r"vision\.vision_model\.head\..+", None, "SigLIP's patches are read, not its pooled vector"),
    Rule(r"vision\.vision_model\.embeddings\.position_ids", None, "computed"),
    Rule(r"vision\.vision_model\.(.+)", r"vision.\1"),
    Rule(r"vision\.(?:text_model\..+|logit_scale|logit_bias)", None, "SigLIP's text tower: T5 reads the instruction"),
)  # fmt: skip


#: Settings of the public code of which only these values are known here.
KNOWN = {
    "action_dim": SIZE, "state_token_dim": SIZE, "cameras": 3, "lang_adaptor": "mlp2x_gelu",
    "img_adaptor": "mlp2x_gelu", "state_adaptor": "mlp3x_gelu", "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "sample",
}  # fmt: skip


class RdtPolicy(DenoisingPolicy):
    """The recipe "rdt" on torch."""

    Config, Network = RdtConfig, RdtNetwork
    #: RDT itself (transformer, adaptors, embeddings), as the public code counts it; SigLIP-so400m's image tower without
    #: its pooling head; the encoder of T5-XXL.
    parameters = 1.228e9 + 0.413e9 + 4.762e9
    contract = {
        "steps": 5, "history": 2, "horizon": 64, "period": 0.04, "fit": "pad", "tokenizer": "bytes", "context": 64,
        "guidance": ("guided", "prefix"), "prefix_limit": 16,
    }  # fmt: skip
    training = {"state": "joint", "kind": "joint", "reference": "absolute", "horizon": 64, "period": 0.04, "lr": 1e-4,
                "warmup": 500, "decay": 1e-2, "clip": 1.0}  # fmt: skip
    published = RULES
    _cameras = dict.fromkeys(("exterior", "right_wrist", "left_wrist"), (384, 384))
    _aloha = {"arms": {"left": 6, "right": 6}, "cameras": _cameras, "optional": tuple(_cameras)}
    presets = {
        "paper": Preset(RdtConfig(), _aloha),
        "small": Preset(RdtConfig(width=1024, layers=14), _aloha),
        "tiny": Preset(
            RdtConfig(
                width=32, layers=2, heads=2, frequencies=16, context=64, text=T5Size(259, 16, 1, 2, 8, 32, "t5-v1.1"),
                vision_width=16, vision_mlp=32, vision_layers=1, vision_heads=2, patch=16, steps=100,
            ),
            {"cameras": {"scene": (32, 32), "wrist": (32, 32)}, "optional": ("wrist",), "horizon": 8, "context": 32,
             "prefix_limit": 4},
        ),
    }  # fmt: skip

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, RdtConfig, dict[str, Normalizer]]:
        """RDT-1B or RDT-170M (robotics-diffusion-transformer/rdt-1b), its weights as safetensors under their own names.

        The frozen encoders are those of google/t5-v1_1-xxl (with its tokenizer.json) and
        google/siglip-so400m-patch14-384: folders of those names beside the weights, or the hub. The robot is ALOHA's
        two arms with joint targets, 25 Hz; config.json may say other `arms` (arm -> joints), `state` ("joint" or
        "pose", for the actions too) and `ctrl_freq`.
        """
        homes = {}
        for name, public in ENCODERS.items():
            homes[name] = folder / public if (folder / public).is_dir() else find_checkpoint(f"google/{public}")
            files.join(f"{name}.", homes[name])
        image = next(sizes for kind, sizes in config["img_pos_embed_config"] if kind == "image")
        vision = read_config(homes["vision"])
        vision = vision.get("vision_config", vision)
        model, noise, side = config["config"], config["config"]["noise_scheduler"], vision["image_size"]
        found = {**config, **model, **noise, "cameras": image[1], "patches": -image[2]}
        known = KNOWN | {"patches": (side // vision["patch_size"]) ** 2}
        require(folder / "config.json", {name: found[name] for name in known}, known)
        shapes = own_shapes(files, cls.published)
        network = RdtConfig(
            width=model["rdt"]["hidden_size"], layers=model["rdt"]["depth"], heads=model["rdt"]["num_heads"],
            context=config["max_lang_cond_len"], text=t5_size(shapes), steps=noise["num_train_timesteps"],
            frequencies=shapes["time.0.weight"][1], **siglip_sizes(shapes, "vision", vision["num_attention_heads"]),
        )  # fmt: skip
        arms = dict(config.get("arms", cls._aloha["arms"]))
        cameras = dict.fromkeys(cls._cameras, (side, side))
        contract = cls.contract | {
            "horizon": config["pred_horizon"], "history": image[0], "period": 1 / config.get("ctrl_freq", 25),
            "steps": noise["num_inference_timesteps"], "context": min(128, network.context),
            "tokenizer": str((homes["text"] / "tokenizer.json").resolve()), "optional": tuple(cameras),
        }  # fmt: skip
        if config.get("state", "joint") == "pose":
            contract |= {"state": "pose", "action_space": ActionSpace(tuple(arms), "pose", rotation="rot6d")}
        spec = example_spec(cls.name(), arms, cameras, **contract)
        return spec, network, identity_normalizers(spec)


def _sinusoids(index: Tensor, features: int) -> Tensor:
    """(N,) -> (N, features): sines, then cosines, as `waves`."""
    return waves(index, features).roll(features // 2, -1)
