"""The execution loop of a policy that imagines: what it keeps between two chunks is what was really seen and done.

frames seen since the last chunk --VAE, blocks--> cache   (four of them are one latent frame)
actions executed meanwhile -----------------'       |
                                                    v
                     imagined video of the next chunk --> its actions   (nothing imagined enters the cache)
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_models.parts.video_vae import FRAMES
from vla_models.policy import (
    ChunkPrefix,
    InferenceRequest,
    ModelInputs,
    PolicyError,
    PolicyObservation,
    PolicyOutput,
)
from vla_models.torch_policy import TorchPolicy

#: Two key frames further apart than so many times their distance: the recording has a gap.
GAP = 2.5


@dataclasses.dataclass
class Episode:
    """What a KeyFramePolicy knows of the running episode.

    instruction, and text: its keys and values. memory: of the autoencoder. first: latents of the first picture. cache:
    keys and values of the latent frames 0 to `frames` - 1 and of the actions that led to them. anchor: time of the
    last picture in the cache, s. waiting, times: pictures seen since (one tensor a camera) and when. plan
    (1, n, W): actions said for the frames `frames`, `frames` + 1, ...; start: index of the one that is due now.
    """

    instruction: str
    text: Tensor
    memory: tuple
    first: Tensor
    anchor: float
    cache: Tensor | None = None
    frames: int = 0
    waiting: list[tuple[Tensor, ...]] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    plan: Tensor | None = None
    start: int = 0

    @property
    def time(self) -> float:
        """When the newest picture was taken, s."""
        return self.times[-1] if self.times else self.anchor


class KeyFramePolicy(TorchPolicy):
    """A policy with a memory of the episode, which `infer` continues.

    Key frames are `stride` periods apart, FRAMES of them for each latent frame. They come from the observation, from
    its history, and from `observe`, whichever a caller uses; pictures between them are ignored. Action 0 of a chunk is
    due at the observation, and past its end a chunk repeats its last target: the first chunk has a latent frame less
    than the others, and one that is asked for in the middle of a frame lacks what of it is executed. That what was said
    was executed is taken for granted. The same observation again, before another was seen, gives the same chunk again.

    An episode begins with the first observation, and anew after `reset`, with another instruction, when the clock goes
    back, and where key frames are missing. An inference that fails forgets the episode.
    """

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        config = self.network.config
        self.stride = config.frame_actions // FRAMES
        self._latents = (1, config.frames, self.network.rows * self.network.columns, 4 * config.vae.latent)
        self.reset()

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
        if observation.time - newest >= (self.stride - 0.5) * self.spec.period:
            self._seen.append(observation)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """(1, H + n, W): after the actions' noise n rows that together hold the video's."""
        width = self.network.config.action_width
        return (1, self.spec.horizon + -(-int(np.prod(self._latents)) // width), width)

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
        said = self.spec.horizon - self.episode.start
        out.targets[said:] = out.targets[said - 1]
        return out

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        start = time.perf_counter()
        with torch.no_grad():
            pictures = tuple(image.transpose(1, 2) for image in self.tensors(inputs).images)
            if self._now is None or self.episode is None:  # without `infer` there are no times: each call begins anew
                self.episode = self._begin(inputs, tuple(image[:, :, -1:] for image in pictures))
            else:
                self._take(pictures)
            write_back(self.network, self.episode)
            encoded = time.perf_counter()
            actions = self._predict(torch.from_numpy(noise).to(self.device))
        actions = actions[..., list(self.network.channels)].float().cpu().numpy()
        timings["encode"] = encoded - start
        timings["sample"] = time.perf_counter() - encoded
        return actions

    def _broken(self, observation: PolicyObservation) -> bool:
        """Whether the observation does not belong to the running episode, or too much is missing between them."""
        episode = self.episode
        if episode is None:
            return True
        times = [episode.time, *(frame.time for frame in self._seen)]
        return (
            observation.instruction != episode.instruction
            or observation.time < times[-1]
            or max(np.diff([*times, observation.time])) > GAP * self.stride * self.spec.period
            or len(self._seen) + (not self._seen or self._seen[-1] is not observation) > self.spec.history
        )

    def _begin(self, inputs: ModelInputs, pictures: tuple[Tensor, ...]) -> Episode:
        tokens = [inputs.tokens[0]]
        if self.network.config.guidance > 1:
            tokens.append(self.processor.tokenizer.encode(""))
        text = self.network.read(torch.from_numpy(np.stack(tokens)).to(self.device))
        first, memory = self.network.see(pictures)
        now = self._now or PolicyObservation({}, {})
        return Episode(now.instruction, text, memory, first, now.time)

    def _take(self, pictures: tuple[Tensor, ...]) -> None:
        """Put aside the new key frames, which are the last of the pictures, but for one that is none of them."""
        count = len(self._seen)
        end = pictures[0].shape[2] - (0 if self._seen and self._seen[-1] is self._now else 1)
        for n, frame in enumerate(self._seen):
            at = end - count + n
            self.episode.waiting.append(tuple(image[:, :, at : at + 1] for image in pictures))
            self.episode.times.append(frame.time)
        self._seen = []

    def _predict(self, noise: Tensor) -> Tensor:
        """Actions (1, H, W), the first one due now."""
        network, episode, horizon = self.network, self.episode, self.spec.horizon
        config, count = network.config, int(np.prod(self._latents))
        given = episode.first if episode.frames == 0 else None
        video = noise[:, horizon:].flatten()[:count].reshape(self._latents)
        _, imagined = network.imagine(video, episode.text, episode.cache, episode.frames, given)
        past = imagined if episode.cache is None else torch.cat([episode.cache, imagined], 4)
        actions = noise[:, :horizon].unflatten(1, (config.frames, config.frame_actions))
        actions = network.decide(actions, episode.text[:1], past[:1], episode.frames, self.steps).flatten(1, 2)
        done = round((self._now.time - episode.anchor) / self.spec.period) if self._now else 0
        if episode.frames == 0:
            done += config.frame_actions
        episode.start = min(done, horizon - 1)
        before = actions if episode.plan is None else episode.plan
        episode.plan = torch.cat([before[:, : episode.start], actions[:, episode.start :]], 1)
        return torch.cat([actions[:, episode.start :], actions[:, -1:].expand(-1, episode.start, -1)], 1)


def write_back(network: Any, episode: Episode) -> None:
    """Encode the pictures that wait, as far as they are whole latent frames, and write them, with the actions that led
    to them, into the cache."""
    groups = len(episode.waiting) // FRAMES
    if groups == 0:
        return
    now, later = episode.waiting[: groups * FRAMES], episode.waiting[groups * FRAMES :]
    pictures = tuple(torch.cat(images, 2) for images in zip(*now, strict=True))
    latents, episode.memory = network.see(pictures, episode.memory)
    if episode.frames == 0:
        latents = torch.cat([episode.first, latents], 1)
    frames, each = latents.shape[1], network.config.frame_actions
    plan = episode.plan
    if plan.shape[1] < frames * each:
        plan = torch.cat([plan, plan[:, -1:].expand(-1, frames * each - plan.shape[1], -1)], 1)
    actions = plan[:, : frames * each].unflatten(1, (frames, each))
    episode.cache = network.write(episode.cache, latents, actions, episode.text, episode.frames)
    episode.frames += frames
    episode.plan = plan[:, frames * each :]
    episode.anchor = episode.times[groups * FRAMES - 1]
    episode.waiting, episode.times = later, episode.times[groups * FRAMES :]
