"""Plain vision transformers under timm's names of tensors: DINOv2 with registers, SigLIP (arXiv 2010.11929).

Own code, because OpenVLA needs what the towers of transformers do not give: the output of the second-to-last block
without the last norm, SigLIP with the exact GELU (timm's and OpenVLA's; transformers' default is the tanh
approximation), and FiLM inside the blocks (OpenVLA-OFT+, arXiv 2502.19645, section VI-A).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla_models.parts.attention import attend, split_heads
from vla_models.policy import PolicyError


class SelfAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return self.proj(attend(q, k, v))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for each feature of a residual branch, small at first (arXiv 2103.17239)."""

    def __init__(self, width: int, start: float = 1e-5):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class VitBlock(nn.Module):
    """Pre-norm block. condition: width of a text vector that scales and shifts the features between attention and MLP
    (FiLM; 0: none)."""

    def __init__(self, width: int, heads: int, hidden: int, layer_scale: bool, condition: int = 0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, heads)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()
        self.scale = nn.Linear(condition, width) if condition else None
        self.shift = nn.Linear(condition, width) if condition else None

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        if self.scale is not None:
            x = x * (1 + self.scale(text)).unsqueeze(1) + self.shift(text).unsqueeze(1)
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Images (B, 3, h, w), normalised, to the patches (B, n, width) that leave the second-to-last of `layers` blocks.

    The last block and the norm behind it are never computed, so they are not held either. size: (h, w), multiples of
    `patch` pixels. registers: learned tokens beside the class token, none without `class_token`. The embedding of
    places belongs to the patches alone.
    """

    def __init__(
        self,
        size: tuple[int, int],
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        patch: int = 14,
        class_token: bool = False,
        registers: int = 0,
        layer_scale: bool = False,
        condition: int = 0,
    ):
        super().__init__()
        if size[0] % patch or size[1] % patch:
            raise PolicyError(f"cameras: expected multiples of {patch} pixels, found {size[0]} x {size[1]}")
        self.patches = (size[0] // patch) * (size[1] // patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.pos_embed = nn.Parameter(torch.randn(1, self.patches, width) * 0.02)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02) if class_token else None
        self.reg_token = nn.Parameter(torch.randn(1, registers, width) * 0.02) if registers else None
        self.blocks = nn.ModuleList(VitBlock(width, heads, hidden, layer_scale, condition) for _ in range(layers - 1))

    def forward(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        """text (B, condition): what FiLM makes its scales and shifts of."""
        x = self.patch_embed["proj"](image).flatten(2).transpose(1, 2) + self.pos_embed
        extra = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*extra, x], 1)
        for block in self.blocks:
            x = block(x, text)
        return x[:, -self.patches :]


class CentreCrop(nn.Module):
    """The middle of an image, blown up to the image's own size, bilinearly with the corners aligned.

    area: share of the image that stays. Networks trained on random crops see this middle in use. Written as one matrix
    for each axis, which any runtime has.
    """

    def __init__(self, size: tuple[int, int], area: float):
        super().__init__()
        for name, pixels in (("rows", size[0]), ("columns", size[1])):
            side = area**0.5
            places = (torch.linspace((1 - side) / 2, (1 + side) / 2, pixels) * (pixels - 1)).unsqueeze(1)
            weights = (1 - (places - torch.arange(pixels)).abs()).clamp(min=0)
            self.register_buffer(name, weights, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.rows.to(image) @ image @ self.columns.to(image).T
