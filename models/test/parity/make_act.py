"""Writes act.safetensors: weights, inputs and outputs of LeRobot's ACT at a tiny size.

Run with LeRobot 0.6.1: python make_act.py act.safetensors
"""

import json
import sys

try:
    import lerobot_on_py311  # noqa: F401  (only where LeRobot runs on Python 3.11)
except ImportError:
    pass
import torch
import torchvision
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from safetensors.torch import save_file
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

CONFIG = {"chunk_size": 6, "n_action_steps": 6, "dim_model": 32, "n_heads": 4, "dim_feedforward": 48, "latent_dim": 8,
          "n_encoder_layers": 2, "n_vae_encoder_layers": 2, "n_decoder_layers": 1, "dropout": 0.0,
          "kl_weight": 10.0}  # fmt: skip
CAMERAS = {"observation.images.top": (3, 64, 96), "observation.images.wrist": (3, 64, 96)}
#: Channels of ResNet18 are divided by this, so that the file stays small.
THINNER = 16


def thin(module: nn.Module) -> None:
    """A torchvision ResNet with its channels divided by THINNER, in place; running statistics at random."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            incoming = child.in_channels if child.in_channels == 3 else child.in_channels // THINNER
            new = nn.Conv2d(incoming, child.out_channels // THINNER, child.kernel_size, child.stride, child.padding,
                            bias=False)  # fmt: skip
            setattr(module, name, new)
        elif isinstance(child, FrozenBatchNorm2d):
            new = FrozenBatchNorm2d(child.weight.numel() // THINNER)
            new.weight.uniform_(0.5, 1.5)
            new.bias.normal_(0, 0.2)
            new.running_mean.normal_(0, 0.2)
            new.running_var.uniform_(0.5, 1.5)
            setattr(module, name, new)
        elif isinstance(child, nn.Linear):
            setattr(module, name, nn.Linear(child.in_features // THINNER, 1))
        else:
            thin(child)


def main(path: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    whole = torchvision.models.resnet18

    def thin_resnet18(**settings) -> nn.Module:
        network = whole(**settings)
        thin(network)
        return network

    torchvision.models.resnet18 = thin_resnet18
    config = ACTConfig(
        input_features={
            **{name: PolicyFeature(FeatureType.VISUAL, shape) for name, shape in CAMERAS.items()},
            "observation.state": PolicyFeature(FeatureType.STATE, (14,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (14,))},
        pretrained_backbone_weights=None,
        device="cpu",
        **CONFIG,
    )
    policy = ACTPolicy(config)
    batch = {name: torch.rand(2, *shape) for name, shape in CAMERAS.items()}
    batch["observation.state"] = torch.randn(2, 14)
    inside = dict(batch)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for name in CAMERAS:
        inside[name] = (batch[name] - mean) / std
    actions = torch.randn(2, 6, 14)
    padded = torch.zeros(2, 6, dtype=torch.bool)
    padded[1, 4:] = True
    noise = torch.randn(2, CONFIG["latent_dim"])
    drawn = torch.randn_like
    torch.randn_like = lambda value: noise
    policy.train()
    loss, parts = policy.forward(inside | {"action": actions, "action_is_pad": padded})
    torch.randn_like = drawn
    out = {"loss": loss.detach(), "l1": torch.tensor(parts["l1_loss"]), "kl": torch.tensor(parts["kld_loss"]),
           "actions": policy.predict_action_chunk(inside)}  # fmt: skip
    tensors = {f"weights/{name}": value for name, value in policy.state_dict().items()}
    tensors |= {f"in/{name}": value for name, value in batch.items()}
    tensors |= {"in/action": actions, "in/action_is_pad": padded, "in/noise": noise}
    tensors |= {f"out/{name}": value for name, value in out.items()}
    features = {"input_features": {name: {"type": "VISUAL", "shape": shape} for name, shape in CAMERAS.items()},
                "output_features": {"action": {"type": "ACTION", "shape": (14,)}}}  # fmt: skip
    features["input_features"]["observation.state"] = {"type": "STATE", "shape": (14,)}
    kept = {"type": "act", **CONFIG, **features, "vision_backbone": "resnet18", "pre_norm": False, "use_vae": True,
            "feedforward_activation": "relu", "replace_final_stride_with_dilation": False,
            "normalization_mapping": {k: "MEAN_STD" for k in ("VISUAL", "STATE", "ACTION")}}  # fmt: skip
    metadata = {"reference": "lerobot 0.6.1", "config": json.dumps(kept)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)


if __name__ == "__main__":
    main(sys.argv[1])
