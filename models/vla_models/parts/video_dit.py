"""The video diffusion transformer of Wan2.2 (arXiv 2503.20314), as a stream of blocks with a cache of keys and values.

    tokens of video or actions --blocks: attention to them and to the cache, cross-attention to the text, MLP--> out
                                         ^ shift, scale, gate from the flow time

Fast-WAM runs one stream of such blocks for video and a narrower one for actions that looks into its cache; LingBot-VA
runs video and actions through the same blocks in turns. Latents are handled as tokens, 2 x 2 of them in one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_models.parts.attention import mlp, split_heads, waves
from vla_models.published import Rule


class HeadNorm(nn.Module):
    """RMSNorm over all heads at once."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Projections(nn.Module):
    """Queries, keys, values and output of an attention whose heads together may be wider than its tokens."""

    def __init__(self, width: int, heads: int, size: int, eps: float):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, width)
        self.query_norm, self.key_norm = HeadNorm(heads * size, eps), HeadNorm(heads * size, eps)

    def queries(self, x: Tensor) -> Tensor:
        """(B, heads, T, d)."""
        return split_heads(self.query_norm(self.query(x)), self.heads)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, heads, T, d) each."""
        return split_heads(self.key_norm(self.key(x)), self.heads), split_heads(self.value(x), self.heads)


class VideoBlock(nn.Module):
    """A block of the transformer. width: of its tokens; heads of `size` numbers; hidden: width of its MLP."""

    def __init__(self, width: int, heads: int, size: int, hidden: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.attention = Projections(width, heads, size, eps)
        self.norm = nn.LayerNorm(width, eps)
        self.cross = Projections(width, heads, size, eps)
        self.mlp = mlp(width, hidden, width)
        self.modulation = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self, x: Tensor, change: Tensor, turn: Tensor, text: Tensor, past: Tensor | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, width) and their keys and values (B, 2, heads, T, d); see `Stream`."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.modulation + change).unbind(-2)
        h = functional.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift
        query = rotate(self.attention.queries(h), turn)
        key, value = self.attention.keys_values(h)
        own = torch.stack([rotate(key, turn), value], 1)
        seen = own if past is None else torch.cat([past, own], 3)
        x = x + gate * self.attention.out(attend(query, seen[:, 0], seen[:, 1], allowed))
        query = self.cross.queries(self.norm(x))
        x = x + self.cross.out(attend(query, text[:, 0], text[:, 1]))
        h = functional.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + mlp_scale) + mlp_shift
        return x + mlp_gate * self.mlp(h), own


class Stream(nn.Module):
    """A stack of blocks, with the projection of the text that they read. text: width of its features."""

    def __init__(self, layers: int, width: int, heads: int, size: int, hidden: int, text: int):
        super().__init__()
        self.text = mlp(text, width, width)
        self.blocks = nn.ModuleList(VideoBlock(width, heads, size, hidden) for _ in range(layers))

    def read(self, features: Tensor) -> Tensor:
        """Keys and values (B, layers, 2, heads, L, d) of features (B, L, text) for every block's cross-attention."""
        text = self.text(features)
        return torch.stack([torch.stack(block.cross.keys_values(text), 1) for block in self.blocks], 1)

    def forward(
        self,
        x: Tensor,
        change: Tensor,
        turn: Tensor,
        text: Tensor,
        past: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens x (B, T, width) through the blocks, and their keys and values (B, layers, 2, heads, T, d).

        change (B, T or 1, 6, width): modulation by the flow time. turn (2, T, d/2): of `parts.places.rotary`. text: of
        `read`. past: keys and values that came before, as returned here for other tokens (of a stream with the same
        heads). allowed (T, T) bool: which token sees which; None: each sees all, and all of the past.
        """
        left = []
        for n, block in enumerate(self.blocks):
            x, own = block(x, change, turn, text[:, n], None if past is None else past[:, n], allowed)
            left.append(own)
        return x, torch.stack(left, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over (B, heads, T, d); heads joined again. allowed (T, T) bool, or all."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -1e9)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


class Condition(nn.Module):
    """Flow times as modulation. frequencies: numbers in the sinusoidal embedding of a time."""

    def __init__(self, width: int, frequencies: int):
        super().__init__()
        self.frequencies = frequencies
        self.embed = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.change = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """(..., width) for the head and (..., 6, width) for the blocks. share (...): of noise, 1 - tau."""
        embedded = self.embed(waves(1000.0 * share, self.frequencies))
        return embedded, self.change(embedded).unflatten(-1, (6, -1))


class FinalNorm(nn.Module):
    """LayerNorm with shift and scale from the flow time, before a linear head."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """x (B, T, width); embedded (B, T or 1, width), of `Condition`."""
        shift, scale = (self.modulation + embedded.unsqueeze(-2)).unbind(-2)
        return functional.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift


def patches(latents: Tensor) -> Tensor:
    """Latents (B, C, F, h, w) as tokens (B, F, h/2 * w/2, 4*C)."""
    x = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)


def as_patches(values: Tensor) -> Tensor:
    """What Wan's head says of tokens (..., 4*C), in the order of `patches`: it reads a patch channel by channel, and
    writes it place by place."""
    return values.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Neighbouring numbers of x (B, heads, T, d), as pairs, turned by the angles of their token."""
    cos, sin = turn.unbind(0)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def training_weight(share: Tensor, shift: float, steps: int = 1000) -> Tensor:
    """Wan's weight of a sample's loss: a bell over the noise share, 0 at its lower end, of mean 1 on shifted times."""

    def bell(t: Tensor) -> Tensor:
        return torch.exp(-2 * (t - 0.5).square())

    even = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    known = bell(shifted(even, shift))
    low, mean = known.min(), (known - known.min()).mean()
    return (bell(share) - low.to(share)) / mean.to(share)


def shifted(share: Tensor, shift: float) -> Tensor:
    """Shares of noise moved towards 1 (shift > 1) or 0 (shift < 1)."""
    return shift * share / (1 + (shift - 1) * share)


def block_rules(published: str, ours: str, group: int, names: Mapping[str, str]) -> Iterator[Rule]:
    r"""Rules for the blocks of a stream. published: pattern of a block's prefix, with `group` groups; ours: its
    translation, of the stream's prefix (\1 for groups). names: published names of a block's parts -> ours."""
    for theirs, own in names.items():
        yield Rule(rf"{published}\.{theirs}(\.weight|\.bias|)", rf"{ours}.{own}\{group + 1}")
