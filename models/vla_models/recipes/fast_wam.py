"""Recipe "fast_wam": a video model that learns to act by predicting video, and acts without predicting any (Fast-WAM).

    first frame --VAE--> video blocks ----keys, values----.--------------------------> the context of a chunk
    text, state --UMT5, linear--> (cross-attention)       v
    noisy actions ------> action blocks: attend to the first frame and to each other --> velocity
    training only:  later frames, noisy --> video blocks: attend to all frames --> velocity of the video

Wan2.2's video transformer and a narrower one for actions with the same heads share one attention (arXiv 2603.16666).
Actions see the first frame alone and never a later one, so in use nothing is imagined: the frame is encoded once, and
only the narrow stream runs in each of the 10 steps (flow times shifted by 5). The gain of learning from video stays
(paper: 97.6 on LIBERO, 93.5 without it). The state is one more token of the text; text encoder and VAE are frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vla_core.actions import ActionSpace

from vla_models.lerobot import LeRobotConfig
from vla_models.normalization import Normalizer
from vla_models.parts.places import grid, rotary
from vla_models.parts.text_encoder import UMT5_XXL, T5Size, TextEncoder
from vla_models.parts.video_dit import (
    Condition,
    FinalNorm,
    Stream,
    as_patches,
    block_rules,
    patches,
    shifted,
    training_weight,
)
from vla_models.parts.video_vae import FRAMES, PIXELS, VaeConfig, VideoEncoder
from vla_models.parts.wan import WAN_RULES, open_wan
from vla_models.policy import CheckpointError, PolicyError, PolicySpec, example_spec
from vla_models.published import Rule, TensorFiles
from vla_models.torch_policy import Batch, FlowPolicy, Inputs, Preset

PROMPT = "A video recorded from a robot's point of view executing the following instruction: {task}"
#: Of the training recordings (LIBERO), s.
PERIOD = 0.05


@dataclass(frozen=True)
class FastWamConfig:
    """Sizes of the network and settings of its loss.

    layers, heads, head_size: of both streams. video_width, video_hidden, action_width, action_hidden: of their tokens
    and of their MLPs. frames: pictures that training looks at, the first one included, evenly over the time of a chunk;
    4 n + 1 (every fourth of 33 recorded ones, in 3 latents). shift: of the flow times that training draws.
    video_weight, action_weight: of the losses. vae, text: of the frozen encoders.
    """

    layers: int = 30
    heads: int = 24
    head_size: int = 128
    video_width: int = 3072
    video_hidden: int = 14336
    action_width: int = 1024
    action_hidden: int = 4096
    frames: int = 9
    shift: float = 5.0
    video_weight: float = 1.0
    action_weight: float = 1.0
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: T5Size = UMT5_XXL


class FastWamNetwork(nn.Module):
    """The network of the recipe "fast_wam"."""

    frozen = ("vae.", "text.")

    def __init__(self, spec: PolicySpec, config: FastWamConfig):
        super().__init__()
        (height, *others), widths = zip(*spec.cameras.values(), strict=True)
        side = 2 * PIXELS
        if any(other != height for other in others) or height % side or sum(widths) % side:
            raise PolicyError(
                "cameras: expected pictures of one height which together, side by side, fill squares of "
                f"{side} pixels, found {dict(spec.cameras)}"
            )
        later = config.frames - 1
        if later % FRAMES or spec.horizon % later or spec.future not in (0, later):
            raise PolicyError(
                f"network.frames: expected {FRAMES} n + 1, where {FRAMES} n divides the horizon {spec.horizon} and is "
                f"the future {spec.future} or that is 0, found {config.frames}"
            )
        self.config = config
        self.vae, self.text = VideoEncoder(config.vae), TextEncoder(config.text, spec.padding, blank=True)
        self.state = nn.Linear(spec.state_dim, config.text.width)
        heads = {"heads": config.heads, "size": config.head_size, "text": config.text.width}
        self.video = Stream(config.layers, config.video_width, hidden=config.video_hidden, **heads)
        self.action = Stream(config.layers, config.action_width, hidden=config.action_hidden, **heads)
        self.video_time, self.action_time = Condition(config.video_width, 256), Condition(config.action_width, 256)
        self.video_in = nn.Linear(4 * config.vae.latent, config.video_width)
        self.video_norm = FinalNorm(config.video_width)
        self.video_out = nn.Linear(config.video_width, 4 * config.vae.latent)
        self.action_in = nn.Linear(spec.action_dim, config.action_width)
        self.action_out = nn.Linear(config.action_width, spec.action_dim)
        rows, columns = height // side, sum(widths) // side
        self.seen = rows * columns
        places = {
            "first": grid(1, rows, columns),
            "later": grid(later // FRAMES, rows, columns, 1),
            "action": np.arange(spec.horizon)[:, None],
        }
        for name, where in places.items():
            turn = torch.from_numpy(rotary(where, config.head_size))
            self.register_buffer(f"{name}_turn", turn, persistent=False)

    def encode(self, inputs: Inputs) -> Tensor:
        """What the actions look at in every layer, (B, layers, 2, heads, T, head_size): keys and values of the first
        frame, then those of the text for their cross-attention."""
        first = patches(self.vae(torch.cat(inputs.images, -1).unsqueeze(2)))[:, 0]
        return self.look(first, self.read(inputs))[0]

    def read(self, inputs: Inputs) -> Tensor:
        """Features (B, context + 1, text width) of the instruction, and the state as the last of them."""
        return torch.cat([self.text(inputs.tokens), self.state(inputs.state).unsqueeze(1)], 1)

    def look(self, first: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The context of `encode` and the video stream's text, from the first frame's latents (B, T, 4*latent)."""
        text = self.video.read(features)
        _, change = self.video_time(first.new_zeros(len(first), 1))
        _, seen = self.video(self.video_in(first), change, self.first_turn, text)
        return torch.cat([seen, self.action.read(features)], 4), text

    def velocity(self, context: Tensor, x: Tensor, tau: Tensor) -> Tensor:
        """Velocity (B, H, dim) of noisy actions x (B, H, dim) at flow times tau (B, 1) or (B, H)."""
        seen, text = context[..., : self.seen, :], context[..., self.seen :, :]
        _, change = self.action_time(1 - tau)
        x, _ = self.action(self.action_in(x), change, self.action_turn, text, seen)
        return -self.action_out(x)

    def video_velocity(self, context: Tensor, text: Tensor, x: Tensor, tau: Tensor) -> Tensor:
        """Velocity (B, F, T, 4*latent) of the noisy latents x of later frames at flow times tau (B, 1)."""
        embedded, change = self.video_time(1 - tau)
        seen = context[..., : self.seen, :]
        h, _ = self.video(self.video_in(x.flatten(1, 2)), change, self.later_turn, text, seen)
        return -as_patches(self.video_out(self.video_norm(h, embedded))).reshape(x.shape)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Weighted errors of the velocities of actions and, where the batch has later frames, of video."""
        count, device = len(batch.actions), batch.actions.device
        noise = torch.randn(batch.actions.shape, generator=generator).to(device)
        shares = shifted(torch.rand(2, count, 1, generator=generator), self.config.shift).to(device)
        inputs = batch.inputs
        pictures = torch.cat(inputs.images, -1).unsqueeze(2)
        later = (self.config.frames - 1) // FRAMES
        if batch.future:
            after = torch.cat(batch.future, -1).transpose(1, 2)
            latents = patches(self.vae(torch.cat([pictures, after], 2)))
            rate = batch.padded.shape[1] // (self.config.frames - 1)  # actions from one picture to the next
            missing = batch.padded[:, rate - 1 :: rate].unflatten(1, (later, FRAMES)).all(-1)
        else:  # nothing is known of them, and nothing is learnt of them
            latents = patches(self.vae(pictures)).expand(-1, 1 + later, -1, -1)
            missing = torch.ones(count, later, dtype=torch.bool, device=device)
        video_noise = torch.randn(latents[:, 1:].shape, generator=generator).to(device)
        return self.flow_loss(batch, latents, missing, noise, video_noise, 1 - shares[0], 1 - shares[1])

    def flow_loss(
        self,
        batch: Batch,
        latents: Tensor,
        missing: Tensor,
        noise: Tensor,
        video_noise: Tensor,
        tau: Tensor,
        video_tau: Tensor,
    ) -> dict[str, Tensor]:
        """`loss` for given latents (B, 1 + F, T, 4*latent), missing (B, F) bool, noise and flow times (B, 1)."""
        context, text = self.look(latents[:, 0], self.read(batch.inputs))
        error = self.velocity(context, _mix(noise, batch.actions, tau), tau) - (batch.actions - noise)
        action = _mean(error.square().mean(-1), ~batch.padded)
        after = latents[:, 1:]
        error = self.video_velocity(context, text, _mix(video_noise, after, video_tau), video_tau)
        video = _mean((error - (after - video_noise)).square().mean((2, 3)), ~missing)
        losses = {
            name: weight * (value * training_weight(1 - time[:, 0], self.config.shift)).mean()
            for name, weight, value, time in (
                ("action", self.config.action_weight, action, tau),
                ("video", self.config.video_weight, video, video_tau),
            )
        }
        return {"loss": losses["action"] + losses["video"], **losses}


def _rules() -> Iterator[Rule]:
    """From LeRobot's names of tensors to ours; blocks lie with their layer or, in older files, with their stream."""
    parts = {"norm3": "norm", r"ffn\.0": "mlp.0", r"ffn\.2": "mlp.2"}
    for theirs, ours in (("self_attn", "attention"), ("cross_attn", "cross")):
        names = {"q": "query", "k": "key", "v": "value", "o": "out", "norm_q": "query_norm", "norm_k": "key_norm"}
        parts |= {rf"{theirs}\.{name}": f"{ours}.{own}" for name, own in names.items()}
    start = r"model\.mot\.(?:layers\.(\d+)\.blocks\.(video|action)|mixtures\.(video|action)\.blocks\.(\d+))"
    yield from block_rules(start, r"\2\3.blocks.\1\4", 4, parts)
    yield Rule(rf"{start}\.modulation", r"\2\3.blocks.\1\4.modulation", change=lambda value: value[0])
    stream = r"model\.mot\.mixtures\.(video|action)\."
    yield Rule(stream + r"text_embedding\.(.+)", r"\1.text.\2")
    yield Rule(stream + r"time_embedding\.(.+)", r"\1_time.embed.\2")
    yield Rule(stream + r"time_projection\.(.+)", r"\1_time.change.\2")
    video, action = (rf"model\.mot\.mixtures\.{name}\." for name in ("video", "action"))
    yield Rule(video + r"patch_embedding\.weight", "video_in.weight", change=lambda value: value.flatten(1))
    yield Rule(video + r"patch_embedding\.bias", "video_in.bias")
    yield Rule(video + r"head\.modulation", "video_norm.modulation", change=lambda value: value[0])
    yield Rule(video + r"head\.head\.(.+)", r"video_out.\1")
    yield Rule(action + r"action_encoder\.(.+)", r"action_in.\1")
    yield Rule(action + r"head\.(.+)", r"action_out.\1")
    yield Rule(r"model\.proprio_encoder\.(.+)", r"state.\1")
    yield from WAN_RULES


class FastWamPolicy(FlowPolicy):
    """The recipe "fast_wam" on torch."""

    Config, Network = FastWamConfig, FastWamNetwork
    #: Measured from LeRobot's modules: video 4.9998e9 and action 1.0209e9, and what is frozen: UMT5-XXL's encoder
    #: 5.6809e9 and the VAE's encoder 0.1496e9.
    parameters = 5.0e9 + 1.02e9 + 5.68e9 + 0.15e9
    published = tuple(_rules())
    training = {"lr": 1e-4, "decay": 1e-2}
    contract = {
        "steps": 10, "shift": 5.0, "horizon": 32, "future": 8, "period": PERIOD, "guidance": ("guided",),
        "prompt": PROMPT, "tokenizer": "tokenizer/tokenizer.json", "context": 128,
    }  # fmt: skip
    presets = {
        "paper": Preset(
            FastWamConfig(), {"cameras": {"scene": (224, 224), "wrist": (224, 224)}, "tokenizer": "bytes"}
        ),
        "tiny": Preset(
            FastWamConfig(
                layers=2, heads=2, head_size=12, video_width=24, video_hidden=32, action_width=48, action_hidden=96,
                frames=5, vae=VaeConfig(channels=4, growth=(1, 2, 2, 2), blocks=1),
                text=T5Size(259, 16, 1, 2, 8, 16, "umt5"),
            ),
            {"cameras": {"scene": (32, 32)}, "horizon": 8, "future": 4, "tokenizer": "bytes", "prompt": "{task}",
             "context": 32},
        ),
    }  # fmt: skip

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, FastWamConfig, dict[str, Normalizer]]:
        """LeRobot's Fast-WAM, with the frozen parts of Wan2.2 beside it or from the hub.

        As many actions as numbers of state are joint targets; 7 actions and 8 numbers of state are LIBERO's steps of a
        tool pose. Raises CheckpointError.
        """
        source = config.get("text_encoder_model_id", "Wan-AI/Wan2.2-TI2V-5B-Diffusers")
        frozen, tokenizer = open_wan(folder, files, source)
        robot = LeRobotConfig(folder, config, files, alike=False)
        if robot.state != robot.action and (robot.state, robot.action) != (8, 7):
            raise CheckpointError(
                f"{robot.where}: expected as many numbers of state as of action, or 8 and 7, found {robot.state}, "
                f"{robot.action}"
            )
        video, action, times = config["video_dit_config"], config["action_dit_config"], config["action_scheduler"]
        network = FastWamConfig(
            layers=video["num_layers"], heads=video["num_heads"], head_size=video["attn_head_dim"],
            video_width=video["hidden_dim"], video_hidden=video["ffn_dim"],
            action_width=action["hidden_dim"], action_hidden=action["ffn_dim"],
            frames=(config["num_video_frames"] - 1) // config["action_video_freq_ratio"] + 1,
            shift=times["train_shift"], video_weight=config["loss"]["lambda_video"],
            action_weight=config["loss"]["lambda_action"], **frozen,
        )  # fmt: skip
        contract = cls.contract | {
            "steps": config["num_inference_steps"], "context": config["tokenizer_max_len"], "tokenizer": tokenizer,
            "shift": config.get("sigma_shift") or times["infer_shift"], "prompt": config["prompt_template"],
            "horizon": config["action_horizon"], "future": network.frames - 1,
        }  # fmt: skip
        if robot.state != robot.action:
            contract["action_space"] = ActionSpace(("arm",), "pose", (), "step", rotation="rotvec")
        cameras = dict(sorted(robot.cameras.items()))
        spec = example_spec(cls.name(), {"arm": robot.state - 1}, cameras, **contract)
        return spec, network, robot.normalizers()


def _mix(noise: Tensor, data: Tensor, tau: Tensor) -> Tensor:
    """Between noise (tau = 0) and data (tau = 1); tau (B, 1)."""
    tau = tau.reshape(-1, *[1] * (data.ndim - 1))
    return noise + tau * (data - noise)


def _mean(values: Tensor, keep: Tensor) -> Tensor:
    """Means (B,) of the values (B, n) that count; 0 where none does."""
    keep = keep.to(values)
    return (values * keep).sum(1) / keep.sum(1).clamp(min=1)
