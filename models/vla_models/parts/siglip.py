"""SigLIP's image tower (arXiv 2303.15343), from transformers, and how a policy's cameras pass through a tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from vla_models.policy import PolicyError, PolicySpec
from vla_models.published import count_layers
from vla_models.torch_policy import Inputs


def siglip(config: Any, side: int) -> SiglipVisionModel:
    """The tower without its pooling head, for square images.

    config: has vision_width, vision_mlp, vision_layers, vision_heads, and patch, the side of a patch in pixels. side:
    of the images, pixels; a position is learned for each of their patches.
    """
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.vision_width,
            intermediate_size=config.vision_mlp,
            num_hidden_layers=config.vision_layers,
            num_attention_heads=config.vision_heads,
            patch_size=config.patch,
            image_size=side,
            vision_use_head=False,
            attn_implementation="eager",
        )
    )


def square_side(spec: PolicySpec, step: int = 1) -> int:
    """Side of the cameras' images, pixels. Raises PolicyError unless all are squares of one size, steps of `step`."""
    sizes = set(spec.cameras.values())
    if len(sizes) != 1 or any(h != w or h % step for h, w in sizes):
        raise PolicyError(
            f"policy {spec.name}: cameras: expected square images of one size, a multiple of {step} pixels, found "
            f"{dict(spec.cameras)}"
        )
    return sizes.pop()[0]


def see(tower: Callable[[Tensor], Tensor], inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Tokens (B, cameras * n, width), one camera after the other, and (B, same) bool, false for a missing camera.

    tower: from images (N, 3, h, w) in [0, 1] to tokens (N, n, width); all cameras pass through it at once.
    """
    count, cameras = inputs.present.shape
    tokens = tower(torch.cat(inputs.images)).unflatten(0, (cameras, count)).transpose(0, 1)
    present = inputs.present.unsqueeze(-1).expand(-1, -1, tokens.shape[2])
    return tokens.flatten(1, 2), present.flatten(1)


def siglip_sizes(shapes: Mapping[str, tuple[int, ...]], ours: str, heads: int) -> dict[str, int]:
    """The settings of `siglip` that the shapes behind the name `ours` tell; its heads they do not."""
    return {
        "vision_width": shapes[f"{ours}.post_layernorm.weight"][0],
        "vision_mlp": shapes[f"{ours}.encoder.layers.0.mlp.fc1.weight"][0],
        "vision_layers": count_layers(shapes, f"{ours}.encoder.layers."),
        "vision_heads": heads,
        "patch": shapes[f"{ours}.embeddings.patch_embedding.weight"][-1],
    }
