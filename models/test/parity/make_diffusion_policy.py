"""Writes diffusion_policy.safetensors and diffusion_policy_ddim.safetensors: LeRobot's Diffusion Policy, tiny.

Run with LeRobot 0.6.1. The first has one camera, group norm (its ResNet is `fixture.drawn`), DDPM and the noise as
prediction, as lerobot/diffusion_pusht; the second two cameras with an encoder each, batch norm, DDIM, the sample as
prediction, no FiLM scale, and a loss that leaves padded actions out.
"""

import json
import tempfile
from pathlib import Path

try:
    import lerobot_on_py311  # noqa: F401  (only where LeRobot runs on Python 3.11)
except ImportError:
    pass
import torch
import torchvision
from diffusers.schedulers import scheduling_ddpm
from fixture import drawn
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors
from safetensors.torch import load_file, save_file
from torch import nn

COMMON = {"n_obs_steps": 2, "horizon": 16, "n_action_steps": 8, "vision_backbone": "resnet18", "kernel_size": 3,
          "n_groups": 4, "diffusion_step_embed_dim": 16, "spatial_softmax_num_keypoints": 4,
          "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02, "clip_sample": True,
          "resize_shape": None,
          "normalization_mapping": {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"}}  # fmt: skip
CASES = {
    "diffusion_policy": {
        "down_dims": (16, 32), "crop_shape": (32, 40), "use_group_norm": True, "noise_scheduler_type": "DDPM",
        "num_train_timesteps": 20, "num_inference_steps": None, "prediction_type": "epsilon",
        "use_film_scale_modulation": True, "use_separate_rgb_encoder_per_camera": False, "clip_sample_range": 1.0,
        "do_mask_loss_for_padding": False,
    },
    "diffusion_policy_ddim": {
        "down_dims": (16, 16, 32), "crop_shape": None, "use_group_norm": False, "noise_scheduler_type": "DDIM",
        "num_train_timesteps": 100, "num_inference_steps": 10, "prediction_type": "sample",
        "use_film_scale_modulation": False, "use_separate_rgb_encoder_per_camera": True, "clip_sample_range": 1.5,
        "do_mask_loss_for_padding": True,
    },
}  # fmt: skip
CAMERAS = {"diffusion_policy": ("observation.image",),
           "diffusion_policy_ddim": ("observation.images.top", "observation.images.wrist")}  # fmt: skip
SIZE, DIM = (37, 46), 3


def thin(module: nn.Module, thinner: int) -> None:
    """A torchvision ResNet with its channels divided by `thinner`, in place; running statistics at random."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            incoming = child.in_channels if child.in_channels == 3 else child.in_channels // thinner
            new = nn.Conv2d(incoming, child.out_channels // thinner, child.kernel_size, child.stride, child.padding,
                            bias=False)  # fmt: skip
            setattr(module, name, new)
        elif isinstance(child, nn.BatchNorm2d):
            new = nn.BatchNorm2d(child.num_features // thinner)
            nn.init.uniform_(new.weight, 0.5, 1.5)
            new.running_mean.normal_(0, 0.2)
            new.running_var.uniform_(0.5, 1.5)
            setattr(module, name, new)
        else:
            thin(child, thinner)


def main(name: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings, cameras = CASES[name], CAMERAS[name]
    whole = torchvision.models.resnet.resnet18

    def thin_resnet18(**kwargs) -> nn.Module:
        network = whole(**kwargs)
        thin(network, 4 if settings["use_group_norm"] else 16)
        return network

    torchvision.models.resnet18 = thin_resnet18
    shapes = {camera: (3, *SIZE) for camera in cameras} | {"observation.state": (DIM,)}
    kinds = {camera: FeatureType.VISUAL for camera in cameras} | {"observation.state": FeatureType.STATE}
    config = DiffusionConfig(
        input_features={key: PolicyFeature(kinds[key], shape) for key, shape in shapes.items()},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (DIM,))},
        pretrained_backbone_weights=None,
        device="cpu",
        **{key: value for key, value in (COMMON | settings).items() if key != "normalization_mapping"},
    )
    policy = DiffusionPolicy(config).eval()
    large = [key for key in policy.state_dict() if ".backbone." in key and settings["use_group_norm"]]
    policy.load_state_dict(
        policy.state_dict() | {key: drawn(key, tuple(policy.state_dict()[key].shape)) for key in large}
    )

    statistics = {camera: {"mean": torch.rand(3, 1, 1), "std": 0.2 + torch.rand(3, 1, 1)} for camera in cameras}
    for key in ("observation.state", "action"):
        low = torch.randn(DIM)
        statistics[key] = {"min": low, "max": low + 0.5 + torch.rand(DIM)}
    before, after = make_diffusion_pre_post_processors(config, statistics)
    with tempfile.TemporaryDirectory() as folder:
        before.save_pretrained(folder)
        (file,) = Path(folder).glob("*normalizer_processor.safetensors")
        tensors = {f"statistics/{key}": value for key, value in load_file(file).items()}
        stem = file.stem

    images = {camera: torch.rand(1, 2, 3, *SIZE) for camera in cameras}
    state = statistics["observation.state"]
    state = state["min"] + torch.rand(1, 2, DIM) * (state["max"] - state["min"])
    low, high = statistics["action"].values()
    actions = low + torch.rand(1, 16, DIM) * (high - low)
    padded = torch.arange(16)[None] >= (12 if settings["do_mask_loss_for_padding"] else 16)
    batch = before({**images, "observation.state": state, "action": actions, "action_is_pad": padded})

    torch.manual_seed(5)
    noise, t = torch.randn(1, 16, DIM), torch.randint(0, settings["num_train_timesteps"], (1,)).long()
    torch.manual_seed(5)
    out = {"loss": policy.forward(dict(batch))[0].detach()}
    start = torch.randn(1, 16, DIM)
    draws = torch.randn(settings["num_train_timesteps"] - 1, 1, 16, DIM)
    queue = iter(draws)
    scheduling_ddpm.randn_tensor = lambda *args, **kwargs: next(queue)
    policy.reset()
    inputs = {key: batch[key] for key in (*cameras, "observation.state")}
    out["actions"] = after(policy.predict_action_chunk(inputs, noise=start)).detach()

    tensors |= {f"weights/{key}": value for key, value in policy.state_dict().items() if key not in large}
    tensors |= {f"in/{key}": value for key, value in images.items()}
    tensors |= {"in/observation.state": state, "in/action": actions, "in/padded": padded, "in/noise": noise, "in/t": t,
                "in/start": start, "in/draws": draws}  # fmt: skip
    tensors |= {f"out/{key}": value for key, value in out.items()}
    features = {key: {"type": kinds[key].value, "shape": shape} for key, shape in shapes.items()}
    kept = {"type": "diffusion", **COMMON, **settings, "input_features": features,
            "output_features": {"action": {"type": "ACTION", "shape": (DIM,)}}}  # fmt: skip
    metadata = {
        "reference": "lerobot 0.6.1",
        "config": json.dumps(kept),
        "statistics": stem,
        "drawn": json.dumps({key: tuple(policy.state_dict()[key].shape) for key in large}),
    }
    path = Path(__file__).with_name(f"{name}.safetensors")
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    print(path, path.stat().st_size, out["loss"], out["actions"].shape)


if __name__ == "__main__":
    for case in CASES:
        main(case)
