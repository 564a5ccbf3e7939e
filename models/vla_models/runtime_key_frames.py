"""A policy that imagines, on ONNX Runtime: the graphs of `vla_models.export_key_frames`, in the loop of
`parts.key_frames`. The cache of keys and values stays on the device. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from vla_models.checkpoint import Checkpoint
from vla_models.parts.key_frames import Episode, KeyFramePolicy, KeyFrames
from vla_models.policy import CheckpointError, PolicySpec
from vla_models.runtime_onnx import Graph, OnnxPolicy


class KeyFrameOnnx(KeyFramePolicy, OnnxPolicy):
    """See the module. settings: those of KeyFrames."""

    def __init__(self, checkpoint: Checkpoint, graphs: Mapping[str, Graph], steps: int | None = None):
        super().__init__(checkpoint, graphs, steps)
        self.loop = KeyFrames(**{**self.settings, "channels": tuple(self.settings["channels"])})
        empty = np.zeros(self.graphs["write"].inputs["cache"], np.float32)
        self._empty = onnxruntime.OrtValue.ortvalue_from_numpy(empty, self.graphs["write"].device, 0)
        self.reset()

    @staticmethod
    def graph_names(spec: PolicySpec, settings: Mapping[str, Any]) -> list[str]:
        return ["encoder", "first", "next", "write", "video", "action"]

    @staticmethod
    def check(file: Path, inputs: Mapping[str, tuple[int, ...]], spec: PolicySpec) -> None:
        expected = {f"image_{camera}": size for camera, size in spec.cameras.items()} | {"tokens": (spec.context,)}
        for name in inputs.keys() & expected.keys():
            found = inputs[name][-len(expected[name]) :]
            if found != expected[name]:
                raise CheckpointError(f"{file}: input {name!r}: expected (..., {expected[name]}), found {found}")
        if "actions" in inputs:
            _, frames, each, width = inputs["actions"]
            if frames * each != spec.horizon or width < spec.action_dim:
                raise CheckpointError(
                    f"{file}: input 'actions': expected {spec.horizon} of {spec.action_dim} numbers or more, found "
                    f"{frames} x {each} of {width}"
                )

    def warm_up(self) -> None:
        super().warm_up()  # one chunk of a new episode
        loop, episode = self.loop, self.episode
        pictures = tuple(np.zeros((1, 3, loop.pictures, *size), np.float32) for size in self.spec.cameras.values())
        latents, _ = self.look(pictures, episode.memory)
        self.write(episode, latents, np.zeros((1, 1, loop.frame_actions * loop.width), np.float32))
        self.reset()

    def read(self, tokens: np.ndarray) -> Any:
        return self.encode({"tokens": tokens})["text"]

    def look(self, pictures: tuple[np.ndarray, ...], memory: Any) -> tuple[np.ndarray, Any]:
        values = {f"image_{camera}": picture for camera, picture in zip(self.spec.cameras, pictures, strict=True)}
        graph = self.graphs["first" if memory is None else "next"]
        latents, *later = graph(values | (memory or {}), keep=True)
        return latents.numpy().reshape(1, 1, -1), {f"memory_{n}": value for n, value in enumerate(later)}

    def write(self, episode: Episode, latents: np.ndarray, actions: np.ndarray) -> Any:
        loop, real = self.loop, np.arange(self.loop.frames) < latents.shape[1]
        video, action = real.repeat(loop.tokens), real.repeat(loop.frame_actions)
        own = np.concatenate([video, action])
        values = self._places(episode, video, own)
        for name, x in (("latents", latents), ("actions", actions)):
            shape = self.graphs["write"].inputs[name]
            values[name] = np.pad(x, ((0, 0), (0, loop.frames - x.shape[1]), (0, 0))).reshape(shape)
        places = np.concatenate([np.arange(episode.filled), loop.window + np.flatnonzero(own)])[-loop.window :]
        values["kept"] = np.pad(places, (0, loop.window - len(places)))
        return self.graphs["write"](values, keep=True)[0]

    def video(self, episode: Episode, x: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, Any]:
        graph = self.graphs["video"]
        values = self._chunk(episode) | {"latents": x.reshape(graph.inputs["latents"]), "share": share}
        velocity, imagined = graph(values, keep=True)
        return velocity.numpy().reshape(x.shape), imagined

    def action(self, episode: Episode, imagined: Any, x: np.ndarray, share: np.ndarray) -> np.ndarray:
        graph = self.graphs["action"]
        values = {"actions": x.reshape(graph.inputs["actions"]), "share": share, "imagined": imagined}
        return graph(self._chunk(episode) | values)[0].reshape(x.shape)

    def _chunk(self, episode: Episode) -> dict[str, Any]:
        """What the steps of a chunk see, all of whose frames are real."""
        loop = self.loop
        video = np.ones(loop.frames * loop.tokens, bool)
        return self._places(episode, video, np.ones(len(video) + loop.frames * loop.frame_actions, bool))

    def _places(self, episode: Episode, video: np.ndarray, own: np.ndarray) -> dict[str, Any]:
        """Inputs that all graphs of the transformer share. video, own (n,): which tokens of the video, and of video and
        actions together, are real."""
        loop = self.loop
        turns = loop.turns(loop.frames, episode.frames)
        values = {"text": episode.text, "cache": self._empty if episode.cache is None else episode.cache}
        for name, turn, which in zip(("video", "action"), turns, (video, own), strict=True):
            values[f"{name}_turn"] = turn
            values[f"{name}_sees"] = loop.sees(loop.window, episode.filled, which)
        return values
