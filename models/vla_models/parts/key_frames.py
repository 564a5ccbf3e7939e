"""The execution loop of a policy that imagines: what it keeps between two chunks is what was really seen and done.

frames seen since the last chunk --VAE, blocks--> cache   (four of them are one latent frame)
actions executed meanwhile -----------------'       |
                                                    v
                     imagined video of the next chunk --> its actions   (nothing imagined enters the cache)

NumPy only: networks on torch and graphs on ONNX Runtime (`vla_models.runtime_key_frames`) are driven by the same loop.
"""

from __future__ import annotations

import dataclasses
import time
from abc import abstractmethod
from typing import Any

import numpy as np

from vla_models.parts.places import between, grid, rotary
from vla_models.policy import (
    ChunkPrefix,
    InferenceRequest,
    ModelInputs,
    Policy,
    PolicyError,
    PolicyObservation,
    PolicyOutput,
)
from vla_models.sampling import PrefixGuidance, sample_flow

#: Two key frames further apart than so many times their distance: the recording has a gap.
GAP = 2.5


@dataclasses.dataclass(frozen=True)
class KeyFrames:
    """What the loop knows of the network.

    frames, frame_actions: latent frames in a chunk and actions in each; pictures: that one latent frame after the first
    stands for; rows, columns: tokens in a latent frame; numbers: in a token; width: numbers in an action, of which
    `channels` are the robot's. window: most tokens that are looked at, those being worked on included. head_size: for
    the rotary embedding. video_steps, video_shift: of the video's sampler. guided: whether the video is guided by the
    difference to no instruction.
    """

    frames: int
    frame_actions: int
    pictures: int
    rows: int
    columns: int
    numbers: int
    width: int
    channels: tuple[int, ...]
    window: int
    head_size: int
    video_steps: int
    video_shift: float
    guided: bool

    @property
    def tokens(self) -> int:
        """Tokens in a latent frame."""
        return self.rows * self.columns

    @property
    def stride(self) -> int:
        """Periods from one key frame to the next."""
        return self.frame_actions // self.pictures

    def turns(self, frames: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Rotary embeddings (2, T, head_size/2) of the video and of the actions of frames `first`, first + 1, ..."""
        places = grid(frames, self.rows, self.columns, first), between(frames, self.frame_actions, first)
        video, action = (rotary(value, self.head_size) for value in places)
        return video, action

    def sees(self, slots: int, filled: int, own: np.ndarray) -> np.ndarray:
        """Which tokens are seen, (1, slots + n) bool: of a cache's `slots`, of which the first `filled` hold something,
        oldest first, the newest for which `window` has room; and those of own (n,) that are real."""
        place = np.arange(slots)
        past = (place < filled) & (place >= filled + own.sum() - self.window)
        return np.concatenate([past, own])[None]


@dataclasses.dataclass
class Episode:
    """What a KeyFramePolicy knows of the running episode.

    instruction, and text: what the network made of it. memory: of the autoencoder. first (1, 1, n): latents of the
    first picture. cache: keys and values of the latent frames 0 to `frames` - 1 and of the actions that led to them,
    `filled` tokens. anchor: time of the last picture in the cache, s. waiting, times: pictures seen since (one
    (1, 3, 1, h, w) a camera) and when. plan (1, n, W): actions said for the frames `frames`, `frames` + 1, ...; start:
    index of the one that is due now.
    """

    instruction: str
    text: Any
    memory: Any
    first: np.ndarray
    anchor: float
    cache: Any = None
    filled: int = 0
    frames: int = 0
    waiting: list[tuple[np.ndarray, ...]] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    plan: np.ndarray | None = None
    start: int = 0

    @property
    def time(self) -> float:
        """When the newest picture was taken, s."""
        return self.times[-1] if self.times else self.anchor


class KeyFramePolicy(Policy):
    """A policy with a memory of the episode, which `infer` continues. What runs the network fills in five methods.

    Key frames are `stride` periods apart, and some of them make a latent frame. They come from the observation, from
    its history, and from `observe`, whichever a caller uses; pictures between them are ignored. Action 0 of a chunk is
    due at the observation, and a chunk ends with the imagined frames, so that not all have the same length: the first
    has a latent frame less than the others, and one that is asked for in the middle of a frame lacks what of it is
    executed. That what was said was executed is taken for granted. The same observation again, before another was seen,
    gives the same chunk again.

    An episode begins with the first observation, and anew after `reset`, with another instruction, when the clock goes
    back, and where key frames are missing. An inference that fails forgets the episode.
    """

    loop: KeyFrames
    steps: int

    @abstractmethod
    def read(self, tokens: np.ndarray) -> Any:
        """What the network makes of texts (n, context): of the instruction and, if guided, of none in a second row."""

    @abstractmethod
    def look(self, pictures: tuple[np.ndarray, ...], memory: Any) -> tuple[np.ndarray, Any]:
        """Latents (1, 1, n) and the new memory of pictures (1, 3, T, h, w), one tensor a camera: T = 1 when
        `memory` is None, KeyFrames.pictures later."""

    @abstractmethod
    def write(self, episode: Episode, latents: np.ndarray, actions: np.ndarray) -> Any:
        """The cache of the episode with latents (1, F, n) and actions (1, F, m) of its next F frames."""

    @abstractmethod
    def video(self, episode: Episode, x: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, Any]:
        """Velocity of noisy latents x (1, F, n) of the next F frames with shares (1, F) of noise, and what
        `action` shall know of them."""

    @abstractmethod
    def action(self, episode: Episode, imagined: Any, x: np.ndarray, share: np.ndarray) -> np.ndarray:
        """Velocity of noisy actions x (1, F, m) of the next F frames. imagined: of `video`."""

    def reset(self) -> None:
        """Forget the episode."""
        self.episode: Episode | None = None
        self._seen: list[PolicyObservation] = []
        self._now: PolicyObservation | None = None

    def observe(self, observation: PolicyObservation) -> None:
        """A picture taken while a chunk is executed. Kept if it is a key frame; before the first chunk none is."""
        if self.episode is None:
            return
        newest = self._seen[-1].time if self._seen else self.episode.time
        if observation.time - newest >= (self.loop.stride - 0.5) * self.spec.period:
            self._seen.append(observation)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """(1, H + n, W): after the actions' noise n rows that together hold the video's."""
        loop = self.loop
        return (1, self.spec.horizon + -(-loop.frames * loop.tokens * loop.numbers // loop.width), loop.width)

    def infer(self, observation: PolicyObservation, request: InferenceRequest | None = None) -> PolicyOutput:
        """See Policy.infer. `observation.history` holds, or `observe` was given, what was seen since the last chunk."""
        for frame in (*observation.history, observation):
            self.observe(frame)
        if self._broken(observation):
            self.reset()
        seen = self._seen[:-1] if self._seen and self._seen[-1] is observation else self._seen
        self._now = observation
        try:
            out = super().infer(dataclasses.replace(observation, history=tuple(seen)), request)
        except PolicyError:
            self.reset()
            raise
        self._now = None
        return out

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        """See Policy.run; (1, n, W), n from 1 to H."""
        start = time.perf_counter()
        pictures = tuple(image.swapaxes(1, 2) for image in inputs.images)
        if self._now is None or self.episode is None:  # without `infer` there are no times: each call begins anew
            self.episode = self._begin(inputs, tuple(image[:, :, -1:] for image in pictures))
        else:
            self._take(pictures)
        self._write_back(self.episode)
        encoded = time.perf_counter()
        actions = self._predict(self.episode, noise)
        timings["encode"] = encoded - start
        timings["sample"] = time.perf_counter() - encoded
        return actions[..., list(self.loop.channels)]

    def _broken(self, observation: PolicyObservation) -> bool:
        """Whether the observation does not belong to the running episode, or too much is missing between them."""
        episode = self.episode
        if episode is None:
            return True
        times = [episode.time, *(frame.time for frame in self._seen)]
        return (
            observation.instruction != episode.instruction
            or observation.time < times[-1]
            or max(np.diff([*times, observation.time])) > GAP * self.loop.stride * self.spec.period
            or len(self._seen) + (not self._seen or self._seen[-1] is not observation) > self.spec.history
        )

    def _begin(self, inputs: ModelInputs, pictures: tuple[np.ndarray, ...]) -> Episode:
        tokens = [inputs.tokens[0]]
        if self.loop.guided:
            tokens.append(self.processor.tokenizer.encode(""))
        first, memory = self.look(pictures, None)
        now = self._now or PolicyObservation({}, {})
        return Episode(now.instruction, self.read(np.stack(tokens)), memory, first, now.time)

    def _take(self, pictures: tuple[np.ndarray, ...]) -> None:
        """Put aside the new key frames, which are the last of the pictures, but for one that is none of them."""
        count = len(self._seen)
        end = pictures[0].shape[2] - (0 if self._seen and self._seen[-1] is self._now else 1)
        for n, frame in enumerate(self._seen):
            at = end - count + n
            self.episode.waiting.append(tuple(image[:, :, at : at + 1] for image in pictures))
            self.episode.times.append(frame.time)
        self._seen = []

    def _write_back(self, episode: Episode) -> None:
        """Encode the pictures that wait, as far as they are whole latent frames, and write them, with the actions that
        led to them, into the cache; a chunk's frames see each other."""
        loop, count = self.loop, self.loop.pictures
        while len(episode.waiting) >= count:
            latents = [] if episode.frames else [episode.first]
            while len(episode.waiting) >= count and len(latents) < loop.frames:
                now, episode.waiting = episode.waiting[:count], episode.waiting[count:]
                pictures = tuple(np.concatenate(images, 2) for images in zip(*now, strict=True))
                latent, episode.memory = self.look(pictures, episode.memory)
                latents.append(latent)
                episode.anchor, episode.times = episode.times[count - 1], episode.times[count:]
            frames = len(latents)
            end = frames * loop.frame_actions
            said = _held(episode.plan, end + 1)
            actions = said[:, :end].reshape(1, frames, -1)
            episode.cache = self.write(episode, np.concatenate(latents, 1), actions)
            episode.filled = min(episode.filled + frames * (loop.tokens + loop.frame_actions), loop.window)
            episode.frames += frames
            episode.plan = said[:, end:]

    def _predict(self, episode: Episode, noise: np.ndarray) -> np.ndarray:
        """Actions (1, n, W) from the one that is due now to the last that is imagined."""
        loop, horizon, period = self.loop, self.spec.horizon, self.spec.period
        latents = loop.frames * loop.tokens * loop.numbers
        video = noise[:, horizon:].reshape(1, -1)[:, :latents].reshape(1, loop.frames, -1)
        latents = sample_flow(
            lambda x, tau: self.video(episode, x, _shares(x, tau))[0],
            video, loop.video_steps, _known(episode, video, episode.first), loop.video_shift,
        )  # fmt: skip
        imagined = self.video(episode, latents, _shares(latents, 1.0))[1]
        actions = noise[:, :horizon].reshape(1, loop.frames, -1)
        actions = sample_flow(
            lambda x, tau: self.action(episode, imagined, x, _shares(x, tau)),
            actions, self.steps, _known(episode, actions, np.zeros_like(actions[:, :1])), self.spec.shift,
        ).reshape(1, horizon, -1)  # fmt: skip
        done = round((self._now.time - episode.anchor) / period) if self._now else 0
        if episode.frames == 0:  # the picture at hand is frame 0: no actions led to it
            done += loop.frame_actions
        episode.start = min(done, horizon - 1)
        before = actions if episode.plan is None else _held(episode.plan, episode.start)
        episode.plan = np.concatenate([before[:, : episode.start], actions[:, episode.start :]], 1)
        return actions[:, episode.start :]


def _held(plan: np.ndarray, count: int) -> np.ndarray:
    """A plan (1, n, W) of at least `count` actions, the last one held."""
    return np.pad(plan, ((0, 0), (0, max(0, count - plan.shape[1])), (0, 0)), "edge")


def _known(episode: Episode, x: np.ndarray, first: np.ndarray) -> PrefixGuidance | None:
    """Of the episode's first frame everything is known, and no noise is on it."""
    if episode.frames:
        return None
    known = (np.arange(x.shape[1]) == 0)[None]
    return PrefixGuidance(np.pad(first, ((0, 0), (0, x.shape[1] - 1), (0, 0))), known)


def _shares(x: np.ndarray, tau: Any) -> np.ndarray:
    """Shares (1, F) of noise at flow times tau, a number or (1, F)."""
    return (np.zeros(x.shape[:2]) + (1 - tau)).astype(np.float32)
