"""Recipe "lingbot_va": a world model that imagines the next video, then reads the actions off it (LingBot-VA).

    really seen frames, executed actions --> cache of keys and values
    noise --blocks, 20 steps, text guidance 5--> video of the next chunk ----.
    noise --the same blocks, 50 steps, see cache and that video--> its actions

One transformer, Wan2.2's, runs video and actions in turns; what tells them apart are embeddings, heads and places: a
frame's actions lie between it and the next. The loop is the system (github.com/Robbyant/lingbot-va): nothing imagined
stays. While a chunk is executed the frames that are really seen are collected; before the next one they and the
executed actions are encoded and enter the cache, the imagined ones never do (`parts.key_frames`). Of the first chunk
frame 0 is the picture at hand. Training: video and actions at once with block-causal masks, every frame with a flow
time of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from vla_core.actions import ActionSpace

from vla_models.lerobot import Statistics
from vla_models.normalization import Normalizer
from vla_models.parts.key_frames import KeyFramePolicy
from vla_models.parts.video_dit import (
    TEXT_RULES,
    Condition,
    FinalNorm,
    Stream,
    TextConfig,
    TextEncoder,
    block_rules,
    grid,
    patches,
    shifted,
    text_config,
    training_weight,
    turns,
)
from vla_models.parts.video_vae import FRAMES, PIXELS, VAE_RULES, VaeConfig, VideoEncoder, open_wan, vae_config
from vla_models.policy import CheckpointError, PolicyError, PolicySpec, example_spec, make_config
from vla_models.published import Rule, TensorFiles
from vla_models.sampling import sample_flow
from vla_models.torch_policy import Batch, Preset

#: How the cameras' latents are put together: beside each other; or the second and third, of half the size, beside each
#: other above the first.
LAYOUTS = ("row", "above")


@dataclass(frozen=True)
class LingBotVaConfig:
    """Sizes of the network, of a chunk, and settings of its sampler and its loss.

    layers, heads, head_size, hidden: of the transformer (hidden: of its MLPs). action_width: channels of an action;
    channels: which of them the robot's actions are, in its order; empty: the first. frames, frame_actions: latent
    frames in a chunk and actions in each (a multiple of 4; their product is the horizon). window: chunks that the cache
    holds, those of video and those of actions counted. video_steps, video_shift: of the video's sampler; guidance: of
    the text on the video (1: none). layout: see LAYOUTS. blur: part of the training samples whose seen frames are
    noisy too. vae, text: of the frozen encoders.
    """

    layers: int = 30
    heads: int = 24
    head_size: int = 128
    hidden: int = 14336
    action_width: int = 30
    channels: tuple[int, ...] = ()
    frames: int = 4
    frame_actions: int = 4
    window: int = 30
    video_steps: int = 20
    video_shift: float = 5.0
    guidance: float = 5.0
    layout: str = "row"
    blur: float = 0.5
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        for name, kind in (("vae", VaeConfig), ("text", TextConfig)):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, make_config(kind, value))
        if self.layout not in LAYOUTS:
            raise PolicyError(f"network.layout: expected one of {LAYOUTS}, found {self.layout!r}")
        if self.frame_actions % FRAMES:
            raise PolicyError(f"network.frame_actions: expected a multiple of {FRAMES}, found {self.frame_actions}")


class Draw(NamedTuple):
    """What training draws: noise of video (B, F, N, 4*latent) and actions (B, F, A, W) and their shares (B, F) of it;
    noise and shares of the seen frames; frames in a chunk, and how many parts back are seen (see `training_mask`)."""

    video: Tensor
    action: Tensor
    video_share: Tensor
    action_share: Tensor
    seen: Tensor
    seen_share: Tensor
    chunk: int
    window: int


class LingBotVaNetwork(nn.Module):
    """The network of the recipe "lingbot_va". Latents are tokens (B, F, N, 4*latent), actions (B, F, A, W)."""

    frozen = ("vae.", "text.")

    def __init__(self, spec: PolicySpec, config: LingBotVaConfig):
        super().__init__()
        self.config, self.padding, self.shift = config, spec.padding, spec.shift
        horizon, later = config.frames * config.frame_actions, config.frames * FRAMES
        if spec.horizon != horizon or spec.history < horizon or spec.future not in (0, later):
            raise PolicyError(
                f"policy {spec.name}: expected a horizon of frames * frame_actions = {horizon}, a history of no less, "
                f"and a future of {later} or 0, found {spec.horizon}, {spec.history} and {spec.future}"
            )
        self.channels = config.channels or tuple(range(spec.action_dim))
        if len(self.channels) != spec.action_dim or max(self.channels) >= config.action_width:
            raise PolicyError(
                f"network.channels: expected {spec.action_dim} below {config.action_width}, found {self.channels}"
            )
        self.rows, self.columns = _latent_grid(spec, config.layout)
        width = config.heads * config.head_size
        self.vae, self.text = VideoEncoder(config.vae), TextEncoder(config.text)
        self.stream = Stream(config.layers, width, config.heads, config.head_size, config.hidden, config.text.width)
        self.video_time, self.action_time = Condition(width, 256), Condition(width, 256)
        self.video_in = nn.Linear(4 * config.vae.latent, width)
        self.action_in = nn.Linear(config.action_width, width)
        self.norm = FinalNorm(width)
        self.video_out = nn.Linear(width, 4 * config.vae.latent)
        self.action_out = nn.Linear(width, config.action_width)
        used = torch.zeros(config.action_width)
        used[list(self.channels)] = 1
        self.register_buffer("used", used, persistent=False)

    def read(self, tokens: Tensor) -> Tensor:
        """Keys and values of texts (B, L) for every block."""
        return self.stream.read(self.text(tokens, self.padding))

    def see(self, images: tuple[Tensor, ...], past: tuple = ()) -> tuple[Tensor, tuple]:
        """Latents (B, F, N, 4*latent) of frames (B, 3, T, h, w), one a camera, that follow those of `past`."""
        memories = past or ((),) * len(images)
        latents, memories = zip(
            *(self.vae.piece(image, memory) for image, memory in zip(images, memories, strict=True)), strict=True
        )
        if self.config.layout == "above":
            return patches(torch.cat([torch.cat(latents[1:], -1), latents[0]], -2)), memories
        return patches(torch.cat(latents, -1)), memories

    def scatter(self, actions: Tensor) -> Tensor:
        """A robot's actions (..., dim) in the channels of the network, (..., action_width)."""
        out = actions.new_zeros(*actions.shape[:-1], self.config.action_width)
        return out.index_copy(-1, torch.tensor(self.channels, device=out.device), actions)

    def video(self, x: Tensor, share: Tensor, text: Tensor, first: int, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Velocity of noisy latents x (B, F, N, 4*latent) with shares (B, F) of noise, and their keys and values.

        first: number of their first frame in the episode. past: keys and values that they see.
        """
        embedded, change = self.video_time(share.repeat_interleave(x.shape[2], 1))
        turn = turns(self._video_places(x.shape[1], first), self.config.head_size, x.device)
        h, own = self.stream(self.video_in(x.flatten(1, 2)), change, turn, text, self._room(past, _tokens(x)))
        return self._video_velocity(h, embedded).reshape(x.shape), own

    def action(self, x: Tensor, share: Tensor, text: Tensor, first: int, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same of noisy actions x (B, F, A, W)."""
        embedded, change = self.action_time(share.repeat_interleave(x.shape[2], 1))
        turn = turns(self._action_places(x.shape[1], first), self.config.head_size, x.device)
        x = x * self.used
        h, own = self.stream(self.action_in(x.flatten(1, 2)), change, turn, text, self._room(past, _tokens(x)))
        return -self.action_out(self.norm(h, embedded)).reshape(x.shape), own

    def write(self, past: Tensor | None, latents: Tensor, actions: Tensor, text: Tensor, first: int) -> Tensor:
        """The cache with what was really seen and done: latents and actions of frames `first`, first + 1, ..."""
        still = latents.new_zeros(len(text), latents.shape[1])
        for stream, x in ((self.video, latents), (self.action, actions)):
            _, own = stream(x.expand(len(text), -1, -1, -1), still, text, first, past)
            past = _join(self._room(past, own.shape[4]), own)
        return past

    def imagine(self, noise: Tensor, text: Tensor, past: Tensor | None, first: int, given: Tensor | None) -> tuple:
        """Latents of the next chunk and their keys and values. given (B, 1, N, 4*latent): the first frame, if known.

        text, past: of the instruction and, with guidance, of no instruction in a second row.
        """

        def velocity(x: Tensor, tau: float) -> Tensor:
            x, share = _given(x, 1 - tau, given)
            rows = len(text)
            v, _ = self.video(x.expand(rows, -1, -1, -1), share.expand(rows, -1), text, first, past)
            return v if rows == 1 else v[1:] + self.config.guidance * (v[:1] - v[1:])

        latents = sample_flow(velocity, noise, self.config.video_steps, None, self.config.video_shift)
        latents, share = _given(latents, 0.0, given)
        seen = latents.expand(len(text), -1, -1, -1)
        return latents, self.video(seen, share.expand(len(text), -1), text, first, past)[1]

    def decide(self, noise: Tensor, text: Tensor, past: Tensor, first: int, steps: int) -> Tensor:
        """Actions (1, F, A, W) of the next chunk, past: cache and imagined video. Those of frame 0 are zeros."""
        given = torch.zeros_like(noise[:, :1]) if first == 0 else None

        def velocity(x: Tensor, tau: float) -> Tensor:
            x, share = _given(x, 1 - tau, given)
            return self.action(x, share, text, first, past)[0]

        actions = sample_flow(velocity, noise, steps, None, self.shift)
        return _given(actions, 0.0, given)[0] * self.used

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Weighted errors of the velocities of video and actions, over one frame before a chunk and those of the chunk.

        Without later frames (Batch.future) the picture stands still and nothing is learnt of the video.
        """
        config, count, device = self.config, len(batch.actions), batch.actions.device
        text = self.read(batch.inputs.tokens)
        now = tuple(image[:, -1:].transpose(1, 2) if image.ndim == 5 else image.unsqueeze(2)
                    for image in batch.inputs.images)  # fmt: skip
        latents, memory = self.see(now)
        if batch.future:
            latents = torch.cat([latents, self.see(tuple(f.transpose(1, 2) for f in batch.future), memory)[0]], 1)
        else:
            latents = latents.expand(-1, 1 + config.frames, -1, -1)
        # No actions lead to frame 0.
        actions = nn.functional.pad(self.scatter(batch.actions), (0, 0, config.frame_actions, 0))
        inside = nn.functional.pad((~batch.padded).to(actions), (config.frame_actions, 0))
        actions, inside = (value.unflatten(1, (-1, config.frame_actions)) for value in (actions, inside))

        def shares(low: float, shift: float) -> Tensor:
            u = low + (1 - low) * torch.rand(count, 1 + config.frames, generator=generator)
            return shifted(1 - (1000 * u).floor() / 1000, shift).to(device)

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator).to(device)

        blurred = float(torch.rand((), generator=generator) < config.blur)
        draw = Draw(
            noise(latents), noise(actions), shares(0.0, config.video_shift), shares(0.0, self.shift), noise(latents),
            blurred * shares(0.5, config.video_shift), int(torch.randint(1, 5, (), generator=generator)),
            int(torch.randint(4, 65, (), generator=generator)),
        )  # fmt: skip
        known = latents.new_full((count, 1 + config.frames), float(bool(batch.future)))
        return self.flow_loss(text, latents, actions, inside.unsqueeze(-1) * self.used, known, draw)

    def flow_loss(
        self, text: Tensor, latents: Tensor, actions: Tensor, counts: Tensor, known: Tensor, draw: Draw
    ) -> dict[str, Tensor]:
        """`loss` for what was drawn. counts (B, F, A, W) and known (B, F): which numbers of actions, frames count."""
        frames, (tokens, each) = latents.shape[1], (latents.shape[2], actions.shape[2])
        actions = actions * counts
        noisy = (
            _mix(latents, draw.video, draw.video_share),
            _mix(latents, draw.seen, draw.seen_share),
            _mix(actions, draw.action * counts, draw.action_share),
            actions,
        )
        shares = (draw.video_share, draw.seen_share, draw.action_share, torch.zeros_like(draw.action_share))
        kinds = ((self.video_in, self.video_time), (self.action_in, self.action_time))
        x, embedded, change = [], [], []
        for n, (part, share) in enumerate(zip(noisy, shares, strict=True)):
            into, time = kinds[n // 2]
            x.append(into(part.flatten(1, 2)))
            e, c = time(share.repeat_interleave(part.shape[2], 1))
            embedded.append(e)
            change.append(c)
        places = [self._video_places(frames, 0)] * 2 + [self._action_places(frames, 0)] * 2
        turn = turns(torch.cat(places), self.config.head_size, latents.device)
        allowed = training_mask(frames, tokens, each, draw.chunk, draw.window).to(latents.device)
        h, _ = self.stream(torch.cat(x, 1), torch.cat(change, 1), turn, text, allowed=allowed)
        parts = h.split([frames * tokens] * 2 + [frames * each] * 2, 1)
        v = self._video_velocity(parts[0], embedded[0]).reshape(latents.shape)
        error = (v - (latents - draw.video)).square().mean((2, 3)) * known
        video = (error * training_weight(draw.video_share, self.config.video_shift)).mean()
        v = -self.action_out(self.norm(parts[2], embedded[2])).reshape(actions.shape)
        error = ((v - (actions - draw.action)).square() * counts).sum((2, 3)) / (counts.sum((2, 3)) + 1e-6)
        action = (error * training_weight(draw.action_share, self.shift)).mean()
        return {"loss": video + action, "video": video, "action": action}

    def _video_velocity(self, h: Tensor, embedded: Tensor) -> Tensor:
        out = self.video_out(self.norm(h, embedded))
        # Wan writes a patch place by place, and reads it channel by channel.
        return -out.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)

    def _video_places(self, frames: int, first: int) -> Tensor:
        return grid(frames, self.rows, self.columns, first)

    def _action_places(self, frames: int, first: int) -> Tensor:
        """Evenly between a frame and the next; off the picture."""
        each = self.config.frame_actions
        steps = torch.arange(1, each + 1).double() / (each + 1)
        frame = (torch.arange(first, first + frames).double()[:, None] + steps).flatten()
        return torch.stack([frame, torch.full_like(frame, -1), torch.full_like(frame, -1)], 1)

    def _room(self, past: Tensor | None, more: int) -> Tensor | None:
        """The newest of the past that fits into the window with `more` tokens."""
        if past is None:
            return None
        config = self.config
        chunk = config.frames * (self.rows * self.columns + config.frame_actions)
        return past[..., max(0, past.shape[4] - max(0, config.window // 2 * chunk - more)) :, :]


def _rules() -> Iterator[Rule]:
    """From LeRobot's names of tensors to ours."""
    parts = {"norm2": "norm", r"ffn\.net\.0\.proj": "mlp.0", r"ffn\.net\.2": "mlp.2"}
    for theirs, ours in (("attn1", "attention"), ("attn2", "cross")):
        names = {"to_q": "query", "to_k": "key", "to_v": "value", r"to_out\.0": "out"}
        names |= {"norm_q": "query_norm", "norm_k": "key_norm"}
        parts |= {rf"{theirs}\.{name}": f"{ours}.{own}" for name, own in names.items()}
    yield from block_rules(r"transformer\.blocks\.(\d+)", r"stream.blocks.\1", 1, parts)
    yield Rule(
        r"transformer\.blocks\.(\d+)\.scale_shift_table",
        r"stream.blocks.\1.modulation",
        change=lambda value: value[0],
    )
    for theirs, ours in (("condition_embedder", "video_time"), ("condition_embedder_action", "action_time")):
        for n, place in ((1, 0), (2, 2)):
            yield Rule(rf"transformer\.{theirs}\.time_embedder\.linear_{n}\.(.+)", rf"{ours}.embed.{place}.\1")
        yield Rule(rf"transformer\.{theirs}\.time_proj\.(.+)", rf"{ours}.change.1.\1")
    for n, place in ((1, 0), (2, 2)):
        yield Rule(rf"transformer\.condition_embedder\.text_embedder\.linear_{n}\.(.+)", rf"stream.text.{place}.\1")
    why = "a copy that nothing reads: both streams read the video's projection of the text"
    yield Rule(r"transformer\.condition_embedder_action\.text_embedder\..+", None, why)
    names = {"patch_embedding_mlp": "video_in", "action_embedder": "action_in", "proj_out": "video_out",
             "action_proj_out": "action_out"}  # fmt: skip
    for theirs, ours in names.items():
        yield Rule(rf"transformer\.{theirs}\.(.+)", rf"{ours}.\1")
    yield Rule(r"transformer\.scale_shift_table", "norm.modulation", change=lambda value: value[0])
    yield from (*VAE_RULES, *TEXT_RULES)


class LingBotVaPolicy(KeyFramePolicy):
    """The recipe "lingbot_va" on torch; see KeyFramePolicy for what it keeps between two chunks."""

    Config, Network = LingBotVaConfig, LingBotVaNetwork
    #: Measured from LeRobot's modules: transformer 5.0887e9 less a copy of the text projection that nothing reads
    #: (2.2e7), and what is frozen: UMT5-XXL's encoder 5.6809e9 and the VAE's encoder 0.1496e9.
    parameters = 5.067e9 + 5.681e9 + 0.150e9
    normalization = {"state": "quantile", "action": "quantile"}
    published = tuple(_rules())
    training = {"lr": 1e-5, "decay": 1e-4, "clip": 1.0}
    contract = {
        "steps": 50, "shift": 0.05, "horizon": 16, "history": 16, "future": 16, "period": 0.05, "prompt": "{task}",
        "tokenizer": "tokenizer/tokenizer.json", "context": 512,
    }  # fmt: skip
    presets = {
        "paper": Preset(
            LingBotVaConfig(), {"cameras": {"scene": (128, 128), "wrist": (128, 128)}, "tokenizer": "bytes"}
        ),
        "tiny": Preset(
            LingBotVaConfig(
                layers=2, heads=2, head_size=24, hidden=96, action_width=10, frames=3, video_steps=2,
                vae=VaeConfig(channels=4, growth=(1, 2, 2, 2), blocks=1),
                text=TextConfig(vocabulary=259, width=16, layers=1, heads=2, size=8, hidden=16),
            ),
            {"cameras": {"scene": (32, 32)}, "horizon": 12, "history": 12, "future": 12, "steps": 3,
             "tokenizer": "bytes", "context": 32},
        ),
    }  # fmt: skip

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, LingBotVaConfig, dict[str, Normalizer]]:
        """LeRobot's LingBot-VA, with the frozen parts of Wan2.2 beside it or from the hub.

        7 actions are LIBERO's steps of a tool pose, 16 RoboTwin's two absolute tool poses with grippers, other numbers
        joints. Raises CheckpointError.
        """
        where = folder / "config.json"
        parts, tokenizer = open_wan(folder, files, config.get("wan_pretrained_path", "robbyant/lingbot-va-base"))
        try:
            above = config["camera_layout"] == "robotwin_tshape"
            network = LingBotVaConfig(
                layers=config["num_layers"], heads=config["num_attention_heads"],
                head_size=config["attention_head_dim"], hidden=config["ffn_dim"], action_width=config["action_dim"],
                channels=tuple(config["used_action_channel_ids"]), frames=config["frame_chunk_size"],
                frame_actions=config["action_per_frame"], window=config["attn_window"],
                video_steps=config["num_inference_steps"], video_shift=config["snr_shift"],
                guidance=config["guidance_scale"], layout="above" if above else "row",
                vae=VaeConfig(**vae_config(parts["vae"])), text=TextConfig(**text_config(parts["text_encoder"])),
            )  # fmt: skip
            size, names = (config["height"], config["width"]), config["obs_cam_keys"]
            horizon = network.frames * network.frame_actions
            sampler = {
                "steps": config["action_num_inference_steps"], "shift": config["action_snr_shift"],
                "horizon": horizon, "history": horizon, "future": network.frames * FRAMES,
                "context": config["max_sequence_length"],
            }  # fmt: skip
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{where}: expected the settings of LeRobot's LingBot-VA, found {error!r}") from error
        if config.get("action_guidance_scale", 1) != 1 or config.get("video_exec_step", -1) != -1:
            raise CheckpointError(f"{where}: expected no guidance of actions and all video steps, found others")
        dim = len(network.channels)
        arms, space = {"arm": dim - 1}, {}
        if dim == 7:
            arms, space = {"arm": 7}, {"action_space": ActionSpace(("arm",), "pose", (), "step", rotation="rotvec")}
        elif dim == 16:
            arms, space = {"left": 7, "right": 7}, {"action_space": ActionSpace(("left", "right"), "pose")}
        half = (size[0] // 2, size[1] // 2) if above else size
        cameras = {name.removeprefix("observation.images."): size if n == 0 else half for n, name in enumerate(names)}
        spec = example_spec(cls.name(), arms, cameras, **{**cls.contract, **sampler, "tokenizer": tokenizer}, **space)
        action = Statistics(folder, files).normalizer("action", "QUANTILES", dim)
        state = Normalizer("quantile", np.zeros(spec.state_dim), np.ones(spec.state_dim))
        return spec, network, {"state": state, "action": action}


def training_mask(frames: int, tokens: int, each: int, chunk: int, window: int) -> Tensor:
    """Which token sees which in training, (T, T) bool; tokens: noisy video, seen video, noisy actions, done actions.

    Chunks of `chunk` frames are video, then actions, in turn. What was seen and done sees all until itself; what is
    noisy sees its own part, and what was seen and done before it; no more than `window` parts back.
    """
    part = torch.arange(frames) // chunk * 2
    parts = torch.cat([*[part.repeat_interleave(tokens)] * 2, *[(part + 1).repeat_interleave(each)] * 2])
    clean = torch.tensor([False, True, False, True]).repeat_interleave(
        torch.tensor([frames * tokens] * 2 + [frames * each] * 2)
    )
    query, key = parts[:, None], parts[None]
    seen = clean[None] & torch.where(clean[:, None], key <= query, key < query)
    own = ~clean[:, None] & ~clean[None] & (key == query)
    return (seen | own) & ((query - key).abs() <= window)


def _tokens(x: Tensor) -> int:
    """Tokens of x (B, F, N, ...)."""
    return x.shape[1] * x.shape[2]


def _latent_grid(spec: PolicySpec, layout: str) -> tuple[int, int]:
    """Rows and columns of tokens in a frame. Raises PolicyError when the cameras do not fit together."""
    sizes, side = list(spec.cameras.values()), 2 * PIXELS
    height, width = sizes[0]
    if layout == "above":
        good = len(sizes) == 3 and all(2 * h == height and 2 * w == width for h, w in sizes[1:])
        rows, columns = height + height // 2, width
    else:
        good = all(h == height for h, _ in sizes)
        rows, columns = height, sum(w for _, w in sizes)
    if not good or rows % side or columns % side or any(pixels % PIXELS for size in sizes for pixels in size):
        raise PolicyError(
            f"cameras: expected pictures that fit together ({layout}) and fill squares of {side} pixels, "
            f"found {dict(spec.cameras)}"
        )
    return rows // side, columns // side


def _given(x: Tensor, share: float, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (B, F, ...) with its first frame replaced by what is given, and the share (B, F) of noise of each frame."""
    shares = x.new_full(x.shape[:2], share)
    if given is None:
        return x, shares
    return torch.cat([given, x[:, 1:]], 1), torch.cat([torch.zeros_like(shares[:, :1]), shares[:, 1:]], 1)


def _join(past: Tensor | None, own: Tensor) -> Tensor:
    return own if past is None else torch.cat([past, own], 4)


def _mix(data: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """Data with each frame's share (B, F) of noise."""
    share = share[:, :, None, None]
    return (1 - share) * data + share * noise
