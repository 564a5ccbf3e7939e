"""Recipe "diffusion_policy": actions from a conditional diffusion (Chi et al., arXiv 2303.04137).

    2 observations: images --crop, ResNet18, keypoints--> features --.
                    state ----------------------------------------- > context --condition--> U-Net or transformer
                                                    16 noisy actions ------------------------^  denoises in 100 steps

The U-Net takes the whole context and the step's time as one vector through FiLM; the transformer attends, causally, to
the time and to one token an observation. DDPM, 100 steps of the squared cosine schedule, the noise is predicted;
states and actions are scaled to [-1, 1], where the estimate is clipped.

The network's 16 actions begin with the oldest observation, so that the one of index `history` - 1 is due at the newest
one's time: the chunk begins there, and is 15 actions long with 2 observations. The paper then executes 8 of them. In
training the actions before the chunk are its first one, held; those after it, where the U-Net needs a multiple of 4,
its last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_models.denoising_policy import DenoisingPolicy, denoising_loss, draw_noise
from vla_models.diffusion import Diffusion
from vla_models.lerobot import STATISTICS, LeRobotConfig
from vla_models.normalization import Normalizer
from vla_models.parts.denoisers import TransformerDenoiser, UnetDenoiser
from vla_models.parts.keypoints import KeypointEncoder, crop
from vla_models.policy import PolicyError, PolicySpec, example_spec
from vla_models.published import Rule, TensorFiles, require
from vla_models.torch_policy import Batch, Inputs, Preset

BACKBONES = ("unet", "transformer")
#: s between two actions of LeRobot's checkpoint for PushT; LeRobot's configurations do not state it.
PERIOD = 0.1
#: LeRobot's names of the image encoder's parts -> ours.
ENCODER = {
    r"backbone\.0": "backbone.conv1",
    r"backbone\.1": "backbone.bn1",
    **{rf"backbone\.{stage + 3}": f"backbone.layer{stage}" for stage in range(1, 5)},
    r"pool\.nets": "pool.heat",
    "out": "out",
}
#: The same of the U-Net.
UNET = {
    r"diffusion_step_encoder\.1\.(.*)": r"time.0.\1",
    r"diffusion_step_encoder\.3\.(.*)": r"time.2.\1",
    r"final_conv\.0\.block\.(.*)": r"unet.last.\1",
    r"final_conv\.1\.(.*)": r"unet.out.\1",
    r"down_modules\.(\d+)\.2\.(.*)": r"unet.shrink.\1.\2",
    r"up_modules\.(\d+)\.2\.(.*)": r"unet.grow.\1.\2",
}
for _there, _here in (
    (r"down_modules\.(\d+)\.([01])", r"down.\1.\2"),
    (r"up_modules\.(\d+)\.([01])", r"up.\1.\2"),
    (r"mid_modules\.(\d+)()", r"middle.\1"),
):
    UNET |= {
        rf"{_there}\.(conv[12])\.block\.(.*)": rf"unet.{_here}.\3.\4",
        rf"{_there}\.cond_encoder\.1\.(.*)": rf"unet.{_here}.film.\3",
        rf"{_there}\.residual_conv\.(.*)": rf"unet.{_here}.skip.\3",
    }
#: Our settings -> LeRobot's.
SETTINGS = {
    "points": "spatial_softmax_num_keypoints",
    "kernel": "kernel_size",
    "groups": "n_groups",
    "film_scale": "use_film_scale_modulation",
    "time_width": "diffusion_step_embed_dim",
    "training_steps": "num_train_timesteps",
    "schedule": "beta_schedule",
    "prediction": "prediction_type",
}
#: LeRobot's settings of which only these values are known here.
FIXED = {"vision_backbone": "resnet18", "resize_shape": None, "beta_start": 0.0001, "beta_end": 0.02}


@dataclass(frozen=True)
class DiffusionPolicyConfig:
    """Sizes of the network and settings of its diffusion.

    backbone: "unet" or "transformer". Images: image_mean, image_std: subtracted and divided by, three numbers, or three
    a camera; crop: rows and columns that are looked at (random ones in training, else the middle; empty: all);
    shared: one encoder for all cameras; resnet_width, norm: see ResNet18; points: keypoints a camera. U-Net: channels,
    kernel, groups, film_scale: see ConditionalUnet1d; time_width: features of the time. Transformer: width, layers,
    heads, dropout: see TransformerDenoiser. Diffusion: training_steps, schedule, prediction, sampler, clip: see
    Diffusion.
    """

    backbone: str = "unet"
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    crop: tuple[int, ...] = (76, 76)
    shared: bool = False
    resnet_width: int = 64
    norm: str = "group"
    points: int = 32
    channels: tuple[int, ...] = (512, 1024, 2048)
    kernel: int = 5
    groups: int = 8
    film_scale: bool = True
    time_width: int = 128
    width: int = 256
    layers: int = 8
    heads: int = 4
    dropout: float = 0.3
    training_steps: int = 100
    schedule: str = "squaredcos_cap_v2"
    prediction: str = "epsilon"
    sampler: str = "ddpm"
    clip: float = 1.0


class DiffusionPolicyNetwork(nn.Module):
    """The network of the recipe "diffusion_policy"."""

    def __init__(self, spec: PolicySpec, config: DiffusionPolicyConfig):
        super().__init__()
        if config.backbone not in BACKBONES:
            raise PolicyError(f"network.backbone: expected one of {BACKBONES}, found {config.backbone!r}")
        self.config, self.history = config, spec.history
        self.diffusion = Diffusion(
            config.training_steps, config.schedule, config.prediction, config.sampler, config.clip
        )
        self.past = spec.history - 1
        multiple = 2 ** (len(config.channels) - 1) if config.backbone == "unet" else 1
        self.length = multiple * math.ceil((self.past + spec.horizon) / multiple)
        sizes = [_cropped(name, size, config) for name, size in spec.cameras.items()]
        if config.shared and len(set(sizes)) > 1:
            raise PolicyError(f"network.shared: expected cameras of one size, found {dict(spec.cameras)}")
        self.encoders = nn.ModuleList(
            KeypointEncoder(size, config.points, config.norm, config.resnet_width)
            for size in (sizes[:1] if config.shared else sizes)
        )
        numbers = torch.tensor([config.image_mean, config.image_std]).reshape(2, -1, 3, 1, 1)
        self.register_buffer("image_numbers", numbers.expand(-1, len(sizes), -1, -1, -1).clone(), persistent=False)
        features = spec.state_dim + 2 * config.points * len(sizes)
        common = spec.action_dim, features, spec.history
        if config.backbone == "unet":
            unet = config.channels, config.kernel, config.groups, config.film_scale, config.time_width
            self.denoiser = UnetDenoiser(*common, *unet)
        else:
            transformer = config.width, config.layers, config.heads, config.dropout
            self.denoiser = TransformerDenoiser(*common, self.length, *transformer)

    def encode(self, inputs: Inputs, generator: torch.Generator | None = None) -> Tensor:
        """(B, T, features), an observation each: its state and the features of its images.

        generator: of the crops; None: the middle of each image.
        """
        count, history = len(inputs.state), self.history
        parts = [inputs.state.reshape(count, history, -1)]
        for index, image in enumerate(inputs.images):
            mean, deviation = self.image_numbers[:, index]
            pixels = (image.reshape(count * history, *image.shape[-3:]) - mean) / deviation
            encoder = self.encoders[0 if self.config.shared else index]
            parts.append(encoder(crop(pixels, self.config.crop, generator)).reshape(count, history, -1))
        return torch.cat(parts, -1)

    def denoise(self, context: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """What the diffusion's prediction is of the noisy actions x (B, L, dim) at times t (B,)."""
        return self.denoiser(context, x, t)

    def trajectory(self, actions: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:
        """The network's L actions and which of them do not count, from the chunk (B, H, dim) and (B, H)."""
        rest = self.length - self.past - actions.shape[1]
        before, after = actions[:, :1].expand(-1, self.past, -1), actions[:, -1:].expand(-1, rest, -1)
        counts = padded.new_zeros(len(padded), self.past), padded.new_ones(len(padded), rest)
        return torch.cat([before, actions, after], 1), torch.cat([counts[0], padded, counts[1]], 1)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Mean square error of the prediction at one random time a sample, over the actions that are not padded."""
        context = self.encode(batch.inputs, generator if self.training else None)
        actions, padded = self.trajectory(batch.actions, batch.padded)
        noise, t = draw_noise(self, actions, generator)
        return {"loss": denoising_loss(self, context, actions, noise, t, padded)}


class DiffusionPolicy(DenoisingPolicy):
    """The recipe "diffusion_policy" on torch."""

    Config, Network = DiffusionPolicyConfig, DiffusionPolicyNetwork
    #: LeRobot's count of the PushT policy (one camera, two numbers of state and of action).
    parameters = 262.7e6
    contract = {"steps": 100, "history": 2, "guidance": ("guided", "prefix"), "prefix_limit": 8}
    normalization = {"state": "min_max", "action": "min_max"}
    training = {
        "horizon": 15,
        "batch": 64,
        "lr": 1e-4,
        "warmup": 500,
        "decay": 1e-6,
        "average": 0.9999,
        "shift": 0,
        "jitter": 0.0,
        # Of images of 96 x 128 pixels, as training has them by default.
        "network": {"crop": (84, 112)},
    }
    _pusht = {"arms": {"arm": 1}, "cameras": {"image": (96, 96)}, "horizon": 15, "period": PERIOD}
    # Two columns of the feature map are the fewest in which a keypoint can move.
    _small = {"points": 8, "crop": (24, 34), "resnet_width": 16, "training_steps": 10}
    _quick = {"cameras": {"scene": (28, 36)}, "horizon": 7, "steps": 5, "prefix_limit": 4}
    published = (
        STATISTICS,
        Rule(r".*\.num_batches_tracked", None, "counts batches of training"),
        Rule(r".*rgb_encoder\.(?:\d+\.)?pool\.pos_grid", None, "coordinates of the feature map, computed"),
        *(
            Rule(rf"diffusion\.rgb_encoder\.{there}{public}\.(.*)", rf"encoders.{here}{own}.\{group}")
            for there, here, group in ((r"(\d+)\.", r"\1.", 2), ("", "0.", 1))
            for public, own in ENCODER.items()
        ),
        *(Rule(rf"diffusion\.unet\.{public}", f"denoiser.{own}") for public, own in UNET.items()),
    )
    presets = {
        "paper": Preset(DiffusionPolicyConfig(), _pusht),
        "transformer": Preset(DiffusionPolicyConfig(backbone="transformer"), _pusht),
        "tiny": Preset(DiffusionPolicyConfig(channels=(64, 64), kernel=3, time_width=16, **_small), _quick),
        "tiny_transformer": Preset(DiffusionPolicyConfig("transformer", width=16, layers=2, heads=2, **_small), _quick),
    }

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, DiffusionPolicyConfig, dict[str, Normalizer]]:
        """LeRobot's Diffusion Policy (lerobot/diffusion_pusht).

        PushT has no arm: its x and y, in pixels, pass for a joint and an opening; `run` gives them, while targets would
        be clipped as an opening is.
        """
        require(folder / "config.json", config, FIXED)
        robot = LeRobotConfig(folder, config, files)
        shared = not config.get("use_separate_rgb_encoder_per_camera", False)
        stem = f"diffusion.rgb_encoder.{'' if shared else '0.'}backbone.0.weight"
        network = DiffusionPolicyConfig(
            **{ours: config[theirs] for ours, theirs in SETTINGS.items()},
            crop=tuple(config["crop_shape"] or ()),
            channels=tuple(config["down_dims"]),
            sampler=config["noise_scheduler_type"].lower(),
            clip=float(config["clip_sample_range"]) if config["clip_sample"] else 0.0,
            norm="group" if config["use_group_norm"] else "frozen_batch",
            shared=shared,
            resnet_width=files.shapes[stem][0],
            **robot.image_numbers(),
        )
        history = config["n_obs_steps"]
        contract = cls.contract | {
            "history": history,
            "horizon": config["horizon"] - history + 1,
            "steps": config["num_inference_steps"] or config["num_train_timesteps"],
        }
        spec = example_spec(cls.name(), robot.arms, robot.cameras, period=PERIOD, **contract)
        return spec, network, robot.normalizers()


def _cropped(name: str, size: tuple[int, int], config: DiffusionPolicyConfig) -> tuple[int, ...]:
    if config.crop and (len(config.crop) != 2 or any(a > b for a, b in zip(config.crop, size, strict=True))):
        raise PolicyError(
            f"network.crop: expected rows and columns within camera {name!r} of {size}, found {config.crop}"
        )
    return config.crop or size
