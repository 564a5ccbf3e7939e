"""Recipe "gr2": a generative video-language-action model (GR-2: Cheang et al., arXiv 2410.06158).

    instruction --CLIP's text encoder--> L tokens --------------------------.
    image of each camera --VQ-GAN--> codes -- of each of T observations ----- > GPT -> the next image's codes
    state ----------------------------------'                               |       -> [ACT] ---.
    [ACT], after all of them -----------------------------------------------'                    |
    z (0 in use; in training from a posterior that sees the actions) ----------> decoder -> H actions

Published: a GPT-style transformer over text tokens of a frozen text encoder, codes of a frozen VQ-GAN and linearly
embedded robot states; pre-training that predicts the images that follow, on 38 million clips with texts; then training
on robot data for images and actions together; a conditional VAE that gives a trajectory of actions and not one; four
sizes, of which the one in use has 230 M parameters, 95 M of them trained. Weights, code, and the sizes of the parts
are not published.

This library's choices: the text encoder is CLIP's ViT-B/32 (63 M) and the VQ-GAN the one with 16-fold reduction and
1024 codes (72 M), which together are the 135 M that are not trained; 12 layers of width 768; codes are predicted one
after the other, row by row, camera by camera, in the order [images, state] of each observation, so a state never helps
to predict the image beside it; [ACT] carries the newest state too; the VAE's decoder starts from the output at [ACT]
and z, and looks at the newest observation's outputs, with ACT's blocks (arXiv 2304.13705); L1 error and ACT's weight of
the divergence. Images are those of the observation window (PolicySpec.history), `PolicySpec.period` apart.

`Gr2Network.video_loss` is the loss of pre-training, on texts and videos alone; `imagine` continues the window by one
image of each camera. With "vq" left out of `Gr2Config.frozen` the VQ-GAN is trained along, for lack of a trained one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_models.parts.attention import TransformerBlock
from vla_models.parts.clip_text import ClipText
from vla_models.parts.cvae import divergence, draw_latent, mean_l1, read_latent
from vla_models.parts.detr import DecoderBlock, EncoderBlock
from vla_models.parts.mixture import text_mask
from vla_models.parts.vq import VqAutoencoder
from vla_models.parts.window import with_window
from vla_models.policy import PolicyError, PolicySpec
from vla_models.torch_policy import Batch, Inputs, OnePassPolicy, Preset


@dataclass(frozen=True)
class Gr2Config:
    """Sizes of the network and weights of its losses.

    width, layers, heads: of the GPT. vocabulary, text_width, text_layers, text_heads: of the text encoder. vq_channels,
    vq_multipliers, vq_blocks, codes, code_width: of the VQ-GAN. head_width, head_layers, head_heads, feedforward: of
    the trajectory's decoder and posterior. latent: length of z. video_weight, kl_weight: in the loss, of the images'
    cross-entropy and of the divergence. frozen: parts that are not trained, of "text" and "vq". dropout: of the GPT and
    of the trajectory's blocks.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    vocabulary: int = 49408
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    vq_channels: int = 128
    vq_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    vq_blocks: int = 2
    codes: int = 1024
    code_width: int = 256
    head_width: int = 256
    head_layers: int = 4
    head_heads: int = 8
    feedforward: int = 1024
    latent: int = 32
    video_weight: float = 1.0
    kl_weight: float = 10.0
    frozen: tuple[str, ...] = ("text", "vq")
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if unknown := set(self.frozen) - {"text", "vq"}:
            raise PolicyError(f"network.frozen: expected parts among 'text' and 'vq', found {sorted(unknown)}")


class Trajectory(nn.Module):
    """The conditional VAE: (outputs of the newest observation, z) -> H actions, and actions -> posterior of z.

    seen: outputs of an observation, [ACT] the last.
    """

    def __init__(self, spec: PolicySpec, config: Gr2Config, seen: int):
        super().__init__()
        width = config.head_width
        block = (width, config.head_heads, config.feedforward, config.dropout)
        self.condition = nn.Linear(config.width, width)
        self.latent_in = nn.Linear(config.latent, width)
        self.memory_places = nn.Parameter(torch.randn(seen, width) * 0.02)
        self.queries = nn.Parameter(torch.randn(spec.horizon, width))
        self.decoder = nn.ModuleList(DecoderBlock(*block) for _ in range(config.head_layers))
        self.action_out = nn.Linear(width, spec.action_dim)
        self.posterior_places = nn.Parameter(torch.randn(spec.horizon + 1, width) * 0.02)
        self.action_in = nn.Linear(spec.action_dim, width)
        self.posterior = nn.ModuleList(EncoderBlock(*block) for _ in range(config.head_layers))
        self.posterior_out = nn.Linear(width, 2 * config.latent)

    def forward(self, seen: Tensor, absent: Tensor, latent: Tensor) -> Tensor:
        """seen (B, S, width) of the GPT; absent (B, S) bool, what is not to be looked at; latent (B, latent)."""
        memory = self.condition(seen)
        placed = memory + self.memory_places
        x = (memory[:, -1] + self.latent_in(latent)).unsqueeze(1) + self.queries
        for block in self.decoder:
            x = block(x, self.queries, memory, placed, absent)
        return self.action_out(x)

    def posterior_of(self, act: Tensor, actions: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of z, (B, latent) each. act (B, width): output at [ACT]; actions (B, H, dim)."""
        seen, done = self.condition(act).unsqueeze(1), self.action_in(actions)
        return read_latent(self.posterior, self.posterior_out, seen, done, padded, self.posterior_places)


class Gr2Network(nn.Module):
    """The network of the recipe "gr2"."""

    def __init__(self, spec: PolicySpec, config: Gr2Config):
        super().__init__()
        width = config.width
        self.config, self.frozen = config, config.frozen
        self.history, self.padding = spec.history, spec.padding
        self.text = ClipText(
            config.vocabulary, config.text_width, config.text_layers, config.text_heads, max(spec.context, 1)
        )
        self.vq = VqAutoencoder(
            config.vq_channels, config.vq_multipliers, config.vq_blocks, config.codes, config.code_width
        )
        for name in self.frozen:
            getattr(self, name).requires_grad_(False)
        self.grids = [self.vq.grid(*size) for size in spec.cameras.values()]
        self.sizes = [rows * columns for rows, columns in self.grids]
        if 0 in self.sizes or any(n % self.vq.factor for size in spec.cameras.values() for n in size):
            raise PolicyError(
                f"cameras: expected sizes in steps of {self.vq.factor} pixels, found {dict(spec.cameras)}"
            )
        self.text_in = nn.Linear(config.text_width, width)
        self.code_in = nn.Embedding(config.codes, width)
        nn.init.normal_(self.code_in.weight, std=0.02)
        self.state_in = nn.Linear(spec.state_dim, width)
        self.act = nn.Parameter(torch.randn(1, width) * 0.02)
        self.text_places = nn.Parameter(torch.randn(spec.context, width) * 0.02)
        self.code_places = nn.Parameter(torch.randn(sum(self.sizes), width) * 0.02)
        self.times = nn.Parameter(torch.randn(spec.history + 1, width) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.heads, 4 * width, dropout=config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.code_out = nn.Linear(width, config.codes, bias=False)
        self.trajectory = Trajectory(spec, config, sum(self.sizes) + 2)

    def codes(self, images: tuple[Tensor, ...]) -> Tensor:
        """(B, T, N) int64 of images (B, T, 3, h, w): all cameras' codes, one camera after the other."""
        with torch.no_grad():
            found = [self.vq.encode(image.flatten(0, 1)).unflatten(0, image.shape[:2]) for image in images]
        return torch.cat(found, 2)

    def gpt(self, tokens: Tensor, codes: Tensor, present: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs (B, L + T * S (+ 1), width) of [text, T times [N codes, state], [ACT]], and (B, same) bool: hidden.

        Without states (B, T, dim), as on videos, neither these nor [ACT] are there: S is N and not N + 1.
        """
        count, steps = codes.shape[:2]
        ended = ~text_mask(tokens, self.padding)
        absent = torch.cat([~present[:, i : i + 1].expand(-1, size) for i, size in enumerate(self.sizes)], 1)
        there = (~absent).to(self.act).unsqueeze(1).unsqueeze(-1)
        x = self.code_in(codes) * there + self.code_places  # a stand-in for a camera is not even read by its own place
        if state is not None:
            x = torch.cat([x, self.state_in(state).unsqueeze(2)], 2)
            absent = torch.cat([absent, absent.new_zeros(count, 1)], 1)
        x = (x + self.times[:steps, None]).flatten(1, 2)
        parts = [self.text_in(self.text(tokens)) + self.text_places, x]
        hidden = [ended, absent.repeat(1, steps)]
        if state is not None:
            parts.append((self.act + self.state_in(state[:, -1])).unsqueeze(1))
            hidden.append(absent.new_zeros(count, 1))
        x, unseen = torch.cat(parts, 1), torch.cat(hidden, 1)
        places = torch.arange(x.shape[1], device=x.device)
        # Each place sees itself, so that none is left with nothing to see.
        mask = (places > places[:, None]) | (unseen.unsqueeze(1) & (places != places[:, None]))
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x), unseen

    def forward(self, inputs: Inputs, latent: Tensor | None = None) -> Tensor:
        """Normalised actions (B, H, dim). latent (B, latent): z; None: 0, the prior's mean, as in use."""
        inputs = with_window(inputs)
        x, hidden = self.gpt(inputs.tokens, self.codes(inputs.images), inputs.present, inputs.state)
        if latent is None:
            latent = x.new_zeros(len(x), self.config.latent)
        newest = sum(self.sizes) + 2
        return self.trajectory(x[:, -newest:], hidden[:, -newest:], latent)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """L1 of the actions inside the episode + kl_weight * divergence + video_weight * the images' cross-entropy.

        In evaluation mode z is 0 as in use, and the loss is the L1 part alone. With a trained VQ-GAN, its own loss too.
        """
        if not self.training:
            l1 = mean_l1(self(batch.inputs), batch)
            return {"loss": l1, "l1": l1}
        inputs = with_window(batch.inputs)
        codes = self.codes(inputs.images)
        x, hidden = self.gpt(inputs.tokens, codes, inputs.present, inputs.state)
        mean, log_variance = self.trajectory.posterior_of(x[:, -1], batch.actions, batch.padded)
        newest = sum(self.sizes) + 2
        latent = draw_latent(mean, log_variance, generator)
        l1 = mean_l1(self.trajectory(x[:, -newest:], hidden[:, -newest:], latent), batch)
        kl, video = divergence(mean, log_variance), self._next_images(x, codes, inputs.present, newest - 1)
        losses = {"l1": l1, "kl": kl, "video": video}
        total = l1 + self.config.kl_weight * kl + self.config.video_weight * video
        if "vq" not in self.frozen:
            losses["vq"] = sum(self.vq.loss(image.flatten(0, 1)) for image in inputs.images)
            total = total + losses["vq"]
        return {"loss": total, **losses}

    def video_loss(self, tokens: Tensor, images: tuple[Tensor, ...], present: Tensor) -> Tensor:
        """Cross-entropy of the codes of all images but the first, as in pre-training. images (B, T, 3, h, w) each."""
        codes = self.codes(images)
        x, _ = self.gpt(tokens, codes, present)
        return self._next_images(x, codes, present, sum(self.sizes))

    def imagine(self, inputs: Inputs) -> list[Tensor]:
        """The most likely next image of each camera, (B, 3, h, w), one code after the other."""
        inputs = with_window(inputs)
        codes, state, size = self.codes(inputs.images), inputs.state, sum(self.sizes)
        codes = torch.cat([codes, torch.zeros_like(codes[:, :1])], 1)
        state = torch.cat([state, torch.zeros_like(state[:, :1])], 1)
        first = inputs.tokens.shape[1] + self.history * (size + 1)
        for i in range(size):
            x, _ = self.gpt(inputs.tokens, codes, inputs.present, state)
            code = self.code_out(x[:, first + i - 1]).argmax(-1)
            place = torch.arange(size, device=code.device) == i
            newest = torch.where(place, code[:, None], codes[:, -1])
            codes = torch.cat([codes[:, :-1], newest.unsqueeze(1)], 1)
        parts = codes[:, -1].split(self.sizes, 1)
        return [self.vq.decode(part, grid) for part, grid in zip(parts, self.grids, strict=True)]

    def _next_images(self, x: Tensor, codes: Tensor, present: Tensor, step: int) -> Tensor:
        """Mean cross-entropy of codes (B, T, N) from the second image on, each from the output one place before it.

        step: places of one observation. Cameras that are not there do not count.
        """
        size = codes.shape[2]
        first = self.text_places.shape[0]
        errors = []
        for t in range(1, codes.shape[1]):
            start = first + t * step - 1
            logits = self.code_out(x[:, start : start + size])
            errors.append(nn.functional.cross_entropy(logits.transpose(1, 2), codes[:, t], reduction="none"))
        if not errors:
            return x.new_zeros(())
        there = torch.cat([present[:, i : i + 1].expand(-1, n) for i, n in enumerate(self.sizes)], 1).to(x)
        return (torch.stack(errors, 1).mean(1) * there).sum() / there.sum().clamp_min(1)


class Gr2Policy(OnePassPolicy):
    """The recipe "gr2" on torch. One pass, z = 0: deterministic, and with no guidance."""

    Config, Network = Gr2Config, Gr2Network
    contract = {"tokenizer": "bytes", "context": 77, "history": 4}
    presets = {
        "paper": Preset(
            Gr2Config(), {"cameras": {"scene": (256, 256), "wrist": (256, 256)}, "optional": ("wrist",), "period": 0.1}
        ),
        "tiny": Preset(
            Gr2Config(
                width=32, layers=2, heads=2, vocabulary=259, text_width=16, text_layers=1, text_heads=2, vq_channels=8,
                vq_multipliers=(1, 1, 2), vq_blocks=1, codes=32, code_width=8, head_width=32, head_layers=1,
                head_heads=2, feedforward=48, latent=8, frozen=("text",), dropout=0.0,
            ),
            {"cameras": {"scene": (24, 32), "wrist": (16, 16)}, "optional": ("wrist",), "horizon": 8, "context": 24,
             "history": 2},
        ),
    }  # fmt: skip
    parameters = 230e6
    training = {"horizon": 16, "period": 0.1, "lr": 3e-4}
