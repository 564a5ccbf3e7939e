"""The encoder of Wan2.2's causal video autoencoder: observed frames to latents, whole or as they come.

Wan-AI/Wan2.2-TI2V-5B (arXiv 2503.20314) with diffusers' names of tensors (AutoencoderKLWan, `is_residual`); the decoder
is not here, for no policy needs to paint what it predicts. 16 times smaller in height and width, 48 channels; the first
frame gives one latent, each four frames after it another one. No latent sees a later frame, so that a video may be
encoded in pieces: `Memory` holds what the causal convolutions saw last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Frames that one latent after the first stands for; pixels in a row or column that one latent stands for.
FRAMES, PIXELS = 4, 16
#: Mean and deviation of the published autoencoder's latents (its config.json).
MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
    -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
    0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520,
    0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
DEVIATION = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
    0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
    0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
    0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of the encoder; the defaults are Wan2.2's.

    channels: of the first convolution; each stage has that times its `growth`. blocks: residual blocks a stage.
    latent: channels of a latent. mean, deviation: of the latents, one number a channel; latents come out normalised.
    """

    channels: int = 160
    growth: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    latent: int = 48
    mean: tuple[float, ...] = MEAN
    deviation: tuple[float, ...] = DEVIATION


#: Which of the stages halve the time.
TIME = (False, True, True)


class Memory:
    """What every causal convolution saw last, in the order in which they run; empty before the first frame.

    An encoding reads it from the start and leaves it renewed: `next` is the memory for the frames that follow.
    """

    def __init__(self, past: Sequence[Tensor] = ()):
        self.past = tuple(past)
        self.next: list[Tensor] = []

    @property
    def first(self) -> bool:
        """Whether nothing was seen yet."""
        return not self.past

    def before(self, x: Tensor, frames: int) -> Tensor:
        """x (B, C, T, h, w) after the `frames` that were seen before it; black ones before the beginning."""
        past = x.new_zeros(*x.shape[:2], frames, *x.shape[3:]) if self.first else self.past[len(self.next)]
        x = torch.cat([past, x], 2)
        self.next.append(x[:, :, -frames:])
        return x


class CausalConv(nn.Conv3d):
    """A convolution that sees no later frame; 3 x 3 x 3 or 1 x 1 x 1."""

    def __init__(self, inputs: int, outputs: int, size: int):
        super().__init__(inputs, outputs, size, padding=(0, size // 2, size // 2))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return super().forward(memory.before(x, 2) if self.kernel_size[0] == 3 else x)


class Norm(nn.Module):
    """Each pixel's channels to length sqrt(channels), times a weight."""

    def __init__(self, channels: int, axes: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=1) * (x.shape[1] ** 0.5 * self.gamma)


class Residual(nn.Module):
    """Norm, SiLU, causal convolution, twice; with a shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(inputs, 3), CausalConv(inputs, outputs, 3)
        self.norm2, self.conv2 = Norm(outputs, 3), CausalConv(outputs, outputs, 3)
        self.conv_shortcut = CausalConv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        short = x if self.conv_shortcut is None else self.conv_shortcut(x, memory)
        x = self.conv1(functional.silu(self.norm1(x)), memory)
        return short + self.conv2(functional.silu(self.norm2(x)), memory)


class FrameAttention(nn.Module):
    """Self-attention with one head over the pixels of each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = _frames(x)
        q, k, v = self.to_qkv(self.norm(flat)).flatten(2).chunk(3, 1)
        weights = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, -1)
        out = self.proj((v @ weights.transpose(1, 2)).unflatten(2, flat.shape[-2:]))
        return x + _video(out, len(x))


class Downsample(nn.Module):
    """Half the height and width, and half the frames after the first when `time`."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        first = memory.first
        x = _video(self.resample(_frames(x)), len(x))
        if self.time_conv is None:
            return x
        seen = memory.before(x, 1)
        return x if first else self.time_conv(seen)


class Stage(nn.Module):
    """Residual blocks and, but for the last stage, a downsampling; with the mean of what is reduced as shortcut."""

    def __init__(self, inputs: int, outputs: int, blocks: int, space: bool, time: bool):
        super().__init__()
        self.resnets = nn.ModuleList(Residual(inputs if n == 0 else outputs, outputs) for n in range(blocks))
        self.downsampler = Downsample(outputs, time) if space else None
        self.outputs, self.space, self.time = outputs, 2 if space else 1, 2 if time else 1

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        short = self._mean(x)
        for block in self.resnets:
            x = block(x, memory)
        if self.downsampler is not None:
            x = self.downsampler(x, memory)
        return x + short

    def _mean(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (0, 0, 0, 0, x.shape[2] % self.time, 0))
        x = x.unflatten(4, (-1, self.space)).unflatten(3, (-1, self.space)).unflatten(2, (-1, self.time))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        return x.unflatten(1, (self.outputs, -1)).mean(2)


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int):
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(channels)])
        self.resnets = nn.ModuleList(Residual(channels, channels) for _ in range(2))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, memory)), memory)


class Encoder(nn.Module):
    """Patches of 2 x 2 pixels (B, 12, T, h/2, w/2) -> (B, 2*latent, T', h/16, w/16)."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        widths = [config.channels, *(config.channels * factor for factor in config.growth)]
        last = len(config.growth) - 1
        self.conv_in = CausalConv(12, widths[0], 3)
        self.down_blocks = nn.ModuleList(
            Stage(widths[n], widths[n + 1], config.blocks, n < last, n < last and TIME[n]) for n in range(last + 1)
        )
        self.mid_block = Middle(widths[-1])
        self.norm_out = Norm(widths[-1], 3)
        self.conv_out = CausalConv(widths[-1], 2 * config.latent, 3)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        x = self.conv_in(x, memory)
        for block in self.down_blocks:
            x = block(x, memory)
        return self.conv_out(functional.silu(self.norm_out(self.mid_block(x, memory))), memory)


class VideoEncoder(nn.Module):
    """Frames to normalised latents. Frozen: it comes with its weights and is not trained."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv(2 * config.latent, 2 * config.latent, 1)
        self.register_buffer("mean", torch.tensor(config.mean).view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(config.deviation).view(-1, 1, 1, 1), persistent=False)
        self.requires_grad_(False)

    def piece(self, frames: Tensor, past: Sequence[Tensor] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Latents (B, latent, T', h/16, w/16) of frames (B, 3, T, h, w) in [0, 1] that follow those of `past`.

        T = 1 at the beginning (past empty), a multiple of 4 later. Also returns what to give as `past` next.
        """
        x = (2 * frames - 1).unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
        x = x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)
        memory = Memory(past)
        mean = self.quant_conv(self.encoder(x, memory), memory).chunk(2, 1)[0]
        return (mean - self.mean) / self.deviation, tuple(memory.next)

    def forward(self, frames: Tensor) -> Tensor:
        """Latents (B, latent, 1 + T/4, h/16, w/16) of a whole video (B, 3, 1 + T, h, w) in [0, 1]."""
        first, past = self.piece(frames[:, :, :1])
        return first if frames.shape[2] == 1 else torch.cat([first, self.piece(frames[:, :, 1:], past)[0]], 2)


def _frames(x: Tensor) -> Tensor:
    """(B, C, T, h, w) -> (B*T, C, h, w)."""
    return x.transpose(1, 2).flatten(0, 1)


def _video(x: Tensor, count: int) -> Tensor:
    """(B*T, C, h, w) -> (B, C, T, h, w)."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)
