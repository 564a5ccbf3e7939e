"""Qwen2.5-VL's image tower for pictures of known sizes (arXiv 2502.13923, section 2.1.1).

The modules are those of transformers. Its own forward pass splits windows by numbers that it reads from tensors, which
neither the meta device nor an exported graph can do; here sizes are known, so windows are constant masks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from vla_models.parts.attention import split_heads
from vla_models.parts.mixture import attend_groups, rotate
from vla_models.policy import PolicyError

#: CLIP's mean and deviation of the colours.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class QwenVisionConfig:
    """Sizes of the tower; the defaults are those of Qwen2.5-VL-3B.

    width, mlp, layers, heads: of its blocks. patch: side of a patch, pixels. merge: side of the square of patches that
    becomes one token. window: side of the squares inside which most layers attend, pixels. full: layers that attend to
    the whole picture.
    """

    width: int = 1280
    mlp: int = 3420
    layers: int = 32
    heads: int = 16
    patch: int = 14
    merge: int = 2
    window: int = 112
    full: tuple[int, ...] = (7, 15, 23, 31)


class QwenVision(nn.Module):
    """Images (B, 3, h, w) in [0, 1] -> tokens (B, n, out). sizes: every (h, w) that comes, multiples of patch * merge.

    Raises PolicyError for another size.
    """

    def __init__(self, sizes: Iterable[tuple[int, int]], config: QwenVisionConfig, out: int):
        super().__init__()
        self.config = config
        self.tower = Qwen2_5_VisionTransformerPretrainedModel(
            Qwen2_5_VLVisionConfig(
                hidden_size=config.width,
                intermediate_size=config.mlp,
                depth=config.layers,
                num_heads=config.heads,
                patch_size=config.patch,
                spatial_merge_size=config.merge,
                window_size=config.window,
                fullatt_block_indexes=list(config.full),
                out_hidden_size=out,
            )
        )
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        step = config.patch * config.merge
        for height, width in set(sizes):
            if height % step or width % step:
                raise PolicyError(f"cameras: expected multiples of {step} pixels, found {height} x {width}")
            for name, value in zip(("cos", "sin", "near"), self._layout(height, width), strict=True):
                self.register_buffer(f"{name}_{height}x{width}", value, persistent=False)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the tokens of an image of `size`."""
        step = self.config.patch * self.config.merge
        return size[0] // step, size[1] // step

    def forward(self, image: Tensor) -> Tensor:
        config, tower = self.config, self.tower
        height, width = image.shape[-2:]
        turn = tuple(getattr(self, f"{name}_{height}x{width}") for name in ("cos", "sin"))
        near = getattr(self, f"near_{height}x{width}")
        # The tower is made for video: a picture is two frames alike, so the two halves of the kernel add up.
        x = nn.functional.conv2d(
            (image - self.mean) / self.std, tower.patch_embed.proj.weight.sum(2), stride=config.patch
        )
        x = x.flatten(2).transpose(1, 2)
        for i, block in enumerate(tower.blocks):
            q, k, v = (split_heads(part, config.heads) for part in block.attn.qkv(block.norm1(x)).chunk(3, -1))
            mask = torch.ones_like(near) if i in config.full else near
            attended = attend_groups(rotate(q, turn), rotate(k, turn), v, mask.expand(len(x), -1, -1))
            x = x + block.attn.proj(attended)
            x = x + block.mlp(block.norm2(x))
        x = tower.merger.ln_q(x)
        rows, columns = self.grid((height, width))
        x = x.reshape(len(x), rows, config.merge, columns, -1).transpose(2, 3)
        return tower.merger.mlp(x.reshape(len(x), rows * columns, -1))

    def _layout(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of N patches: cosines and sines (1, 1, N, head) of rows and columns; who shares a window, (1, N, N)."""
        config = self.config
        row, column = torch.meshgrid(
            torch.arange(height // config.patch), torch.arange(width // config.patch), indexing="ij"
        )
        row, column = row.flatten(), column.flatten()
        half = config.width // config.heads // 2
        steps = 1e4 ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)
        angles = torch.cat([row[:, None] * steps, column[:, None] * steps] * 2, -1)[None, None]
        side = config.window // config.patch
        window = (row // side) * (width + 1) + column // side
        return angles.cos(), angles.sin(), (window[:, None] == window)[None]
