"""Recipe "lingbot_va": a world model that imagines the next video, then reads the actions off it (LingBot-VA).

    really seen frames, executed actions --> cache of keys and values
    noise --blocks, 20 steps, text guidance 5--> video of the next chunk ----.
    noise --the same blocks, 50 steps, see cache and that video--> its actions

One transformer, Wan2.2's, runs video and actions in turns; what tells them apart are embeddings, heads and places: a
frame's actions lie between it and the next. The loop is the system (github.com/Robbyant/lingbot-va): nothing imagined
stays. While a chunk is executed the frames that are really seen are collected; before the next one they and the
executed actions are encoded and enter the cache, the imagined ones never do (`parts.key_frames`).

Actions of a frame are those that lead to it. To frame 0, the picture at the beginning, none do, so that the first chunk
says a frame's actions fewer than the later ones: (frames - 1) * frame_actions, then frames * frame_actions. As in the
authors' loop the next chunk is asked for when they are executed; asked for earlier, it begins in the middle of a frame
and ends where the imagined video does.

Training: video and actions at once with block-causal masks, every frame with a flow time of its own; a tenth of the
samples without their instruction.
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
from vla_models.parts.key_frames import Episode, KeyFramePolicy, KeyFrames
from vla_models.parts.text_encoder import UMT5_XXL, T5Size, TextEncoder
from vla_models.parts.video_dit import (
    Condition,
    FinalNorm,
    Stream,
    as_patches,
    block_rules,
    patches,
    shifted,
    training_weight,
)
from vla_models.parts.video_vae import FRAMES, PIXELS, VaeConfig, VideoEncoder
from vla_models.parts.wan import WAN_RULES, open_wan
from vla_models.policy import PolicyError, PolicySpec, example_spec
from vla_models.published import Rule, TensorFiles, require
from vla_models.torch_policy import Batch, Preset, TorchPolicy

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
    the text on the video (1: none). layout: see LAYOUTS. blur: part of the training batches whose seen frames are
    noisy too; text_dropout: part of the training samples without their instruction, for the guidance. vae, text: of the
    frozen encoders.
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
    text_dropout: float = 0.1
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: T5Size = UMT5_XXL

    def __post_init__(self) -> None:
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
        self.config, self.shift = config, spec.shift
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
        chunk = config.frames * (self.rows * self.columns + config.frame_actions)
        self.loop = KeyFrames(
            frames=config.frames, frame_actions=config.frame_actions, pictures=FRAMES, rows=self.rows,
            columns=self.columns, numbers=4 * config.vae.latent, width=config.action_width, channels=self.channels,
            window=config.window // 2 * chunk, head_size=config.head_size, video_steps=config.video_steps,
            video_shift=config.video_shift, guided=config.guidance > 1,
        )  # fmt: skip
        width = config.heads * config.head_size
        self.vae, self.text = VideoEncoder(config.vae), TextEncoder(config.text, spec.padding, blank=True)
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
        #: Tokens of no instruction; a policy that has a tokeniser puts its own here.
        self.register_buffer("nothing", torch.full((spec.context,), spec.padding), persistent=False)

    def read(self, tokens: Tensor) -> Tensor:
        """Keys and values of texts (B, L) for every block."""
        return self.stream.read(self.text(tokens))

    def see(self, images: tuple[Tensor, ...], past: tuple = ()) -> tuple[Tensor, tuple]:
        """Latents (B, F, N, 4*latent) of frames (B, 3, T, h, w), one a camera, that follow those of `past`."""
        memories = past or ((),) * len(images)
        latents, memories = zip(
            *(self.vae.piece(image, memory) for image, memory in zip(images, memories, strict=True)), strict=True
        )
        if self.config.layout == "above":
            return patches(torch.cat([torch.cat(latents[1:], -1), latents[0]], -2)), memories
        return patches(torch.cat(latents, -1)), memories

    def turns(self, frames: int, first: int) -> tuple[Tensor, Tensor]:
        """See KeyFrames.turns."""
        video, action = (torch.from_numpy(turn).to(self.used.device) for turn in self.loop.turns(frames, first))
        return video, action

    def scatter(self, actions: Tensor) -> Tensor:
        """A robot's actions (..., dim) in the channels of the network, (..., action_width)."""
        out = actions.new_zeros(*actions.shape[:-1], self.config.action_width)
        return out.index_copy(-1, torch.tensor(self.channels, device=out.device), actions)

    def video(
        self,
        x: Tensor,
        share: Tensor,
        text: Tensor,
        turn: Tensor,
        past: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Velocity of noisy latents x (B, F, N, 4*latent) with shares (B, F) of noise, and their keys and values.

        turn (2, F*N, head_size/2): rotary embedding of their places. past: keys and values that they see; allowed
        (1, T): which of those and of their own.
        """
        embedded, change = self.video_time(share.repeat_interleave(x.shape[2], 1))
        h, own = self.stream(self.video_in(x.flatten(1, 2)), change, turn, text, past, allowed)
        return self._video_velocity(h, embedded).reshape(x.shape), own

    def action(
        self,
        x: Tensor,
        share: Tensor,
        text: Tensor,
        turn: Tensor,
        past: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same of noisy actions x (B, F, A, W)."""
        embedded, change = self.action_time(share.repeat_interleave(x.shape[2], 1))
        x = x * self.used
        h, own = self.stream(self.action_in(x.flatten(1, 2)), change, turn, text, past, allowed)
        return -self.action_out(self.norm(h, embedded)).reshape(x.shape), own

    def imagine(
        self,
        x: Tensor,
        share: Tensor,
        text: Tensor,
        turn: Tensor,
        past: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`video` for one x (1, F, N, 4*latent), guided by the text.

        text, past: of the instruction and, with guidance, of no instruction in a second row. The keys and values are
        those of the instruction alone.
        """
        rows = len(text)
        v, own = self.video(x.expand(rows, -1, -1, -1), share.expand(rows, -1), text, turn, past, allowed)
        return v if rows == 1 else v[1:] + self.config.guidance * (v[:1] - v[1:]), own[:1]

    def write(
        self,
        latents: Tensor,
        actions: Tensor,
        text: Tensor,
        turns: tuple[Tensor, Tensor],
        past: Tensor | None = None,
        allowed: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Tensor:
        """Keys and values of what was really seen and done: latents (1, F, N, 4*latent), actions (1, F, A, W).

        turns, allowed: of the video and of the actions, which see it.
        """
        still = latents.new_zeros(len(text), latents.shape[1])
        for stream, x, turn, sees in zip((self.video, self.action), (latents, actions), turns, allowed, strict=True):
            _, own = stream(x.expand(len(text), -1, -1, -1), still, text, turn, past, sees)
            past = own if past is None else torch.cat([past, own], 4)
        return past[..., -(latents.shape[2] + actions.shape[2]) * latents.shape[1] :, :]

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Weighted errors of the velocities of video and actions, over one frame before a chunk and those of the chunk.

        Without later frames (Batch.future) the picture stands still and nothing is learnt of the video.
        """
        config, count, device = self.config, len(batch.actions), batch.actions.device
        without = (torch.rand(count, 1, generator=generator) < config.text_dropout).to(device)
        text = self.read(torch.where(without, self.nothing, batch.inputs.tokens))
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
        turn = torch.cat([turn for turn in self.turns(frames, 0) for _ in range(2)], 1)
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
        return -as_patches(self.video_out(self.norm(h, embedded)))


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
    yield from WAN_RULES


class LingBotVaPolicy(KeyFramePolicy, TorchPolicy):
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
        # An autoencoder of random weights varies less than the published one and about another mean, and what varies is
        # all that tells two pictures apart. Actions begin at full noise, which a shift above 1 makes training see more.
        "tiny": Preset(
            LingBotVaConfig(
                layers=2, heads=2, head_size=24, hidden=96, action_width=10, frames=3, video_steps=2, blur=0.0,
                vae=VaeConfig(channels=4, growth=(1, 2, 2, 2), blocks=1, mean=(0.0,) * 48, deviation=(0.1,) * 48),
                text=T5Size(259, 16, 1, 2, 8, 16, "umt5"),
            ),
            {"cameras": {"scene": (32, 32)}, "horizon": 12, "history": 12, "future": 12, "steps": 3, "shift": 10.0,
             "tokenizer": "bytes", "context": 32},
        ),
    }  # fmt: skip

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.loop = self.network.loop
        self.network.nothing.copy_(torch.from_numpy(self.processor.tokenizer.encode("")))
        self.reset()

    @torch.no_grad()
    def read(self, tokens: np.ndarray) -> Tensor:
        return self.network.read(self._tensor(tokens))

    @torch.no_grad()
    def look(self, pictures: tuple[np.ndarray, ...], memory: Any) -> tuple[np.ndarray, Any]:
        latents, memory = self.network.see(tuple(map(self._tensor, pictures)), memory or ())
        return latents.flatten(2).float().cpu().numpy(), memory

    @torch.no_grad()
    def write(self, episode: Episode, latents: np.ndarray, actions: np.ndarray) -> Tensor:
        frames, loop, past = latents.shape[1], self.loop, episode.cache
        video = frames * loop.tokens
        own = self.network.write(
            self._latents(latents), self._actions(actions), episode.text, self.network.turns(frames, episode.frames),
            past, (self._sees(episode, video), self._sees(episode, video + frames * loop.frame_actions)),
        )  # fmt: skip
        return (own if past is None else torch.cat([past, own], 4))[..., -loop.window :, :]

    @torch.no_grad()
    def video(self, episode: Episode, x: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, Any]:
        loop = self.loop
        turn, sees = self.network.turns(loop.frames, episode.frames)[0], self._sees(episode, loop.frames * loop.tokens)
        v, own = self.network.imagine(self._latents(x), self._tensor(share), episode.text, turn, episode.cache, sees)
        return v.flatten(2).float().cpu().numpy(), own

    @torch.no_grad()
    def action(self, episode: Episode, imagined: Any, x: np.ndarray, share: np.ndarray) -> np.ndarray:
        loop = self.loop
        turn = self.network.turns(loop.frames, episode.frames)[1]
        past = imagined if episode.cache is None else torch.cat([episode.cache[:1], imagined], 4)
        sees = self._sees(episode, loop.frames * (loop.tokens + loop.frame_actions))
        v, _ = self.network.action(self._actions(x), self._tensor(share), episode.text[:1], turn, past, sees)
        return v.flatten(2).float().cpu().numpy()

    def _sees(self, episode: Episode, count: int) -> Tensor | None:
        """See KeyFrames.sees; None: everything."""
        sees = self.loop.sees(episode.filled, episode.filled, np.ones(count, bool))
        return None if sees.all() else self._tensor(sees)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _latents(self, x: np.ndarray) -> Tensor:
        """(1, F, n) as tokens (1, F, N, 4*latent)."""
        return self._tensor(x).unflatten(2, (self.loop.tokens, -1))

    def _actions(self, x: np.ndarray) -> Tensor:
        """(1, F, m) as actions (1, F, A, W)."""
        return self._tensor(x).unflatten(2, (self.loop.frame_actions, -1))

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, LingBotVaConfig, dict[str, Normalizer]]:
        """LeRobot's LingBot-VA, with the frozen parts of Wan2.2 beside it or from the hub.

        7 actions are LIBERO's steps of a tool pose, 16 RoboTwin's two absolute tool poses with grippers, other numbers
        joints. Raises CheckpointError.
        """
        require(folder / "config.json", config, {"action_guidance_scale": 1, "video_exec_step": -1})
        frozen, tokenizer = open_wan(folder, files, config.get("wan_pretrained_path", "robbyant/lingbot-va-base"))
        above = config["camera_layout"] == "robotwin_tshape"
        network = LingBotVaConfig(
            layers=config["num_layers"], heads=config["num_attention_heads"],
            head_size=config["attention_head_dim"], hidden=config["ffn_dim"], action_width=config["action_dim"],
            channels=tuple(config["used_action_channel_ids"]), frames=config["frame_chunk_size"],
            frame_actions=config["action_per_frame"], window=config["attn_window"],
            video_steps=config["num_inference_steps"], video_shift=config["snr_shift"],
            guidance=config["guidance_scale"], layout="above" if above else "row", **frozen,
        )  # fmt: skip
        size, names = (config["height"], config["width"]), config["obs_cam_keys"]
        horizon = network.frames * network.frame_actions
        sampler = {
            "steps": config["action_num_inference_steps"], "shift": config["action_snr_shift"],
            "horizon": horizon, "history": horizon, "future": network.frames * FRAMES,
            "context": config["max_sequence_length"],
        }  # fmt: skip
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


def _mix(data: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """Data with each frame's share (B, F) of noise."""
    share = share[:, :, None, None]
    return (1 - share) * data + share * noise
