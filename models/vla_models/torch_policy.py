"""What policies that run on torch share: the network, its device, how inputs become tensors, how a head is sampled.

A recipe is a subclass of the class that fits its head: `OnePassPolicy` (the network gives the actions at once) or
`FlowPolicy` (it gives a velocity that is integrated). It names its network and what is particular to the system.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vla_models import policy_class, recipe_name
from vla_models.checkpoint import WEIGHTS_FILE, read_checkpoint, read_tensors
from vla_models.normalization import Normalizer
from vla_models.policy import (
    CheckpointError,
    ChunkPrefix,
    ModelInputs,
    Policy,
    PolicyError,
    PolicySpec,
    example_spec,
    make_config,
)
from vla_models.sampling import Guidance, PrefixGuidance, RtcGuidance, sample_flow


class Inputs(NamedTuple):
    """`vla_models.policy.ModelInputs` as tensors on the network's device: what a network looks at.

    images: one (B, 3, h, w) float32 in [0, 1] a camera; tokens (B, context) int64; state (B, state_dim) float32,
    normalised; present (B, cameras) bool. With a history of T observations images and state have T after the batch.
    """

    images: tuple[Tensor, ...]
    tokens: Tensor
    state: Tensor
    present: Tensor


class Batch(NamedTuple):
    """Training samples on the network's device.

    actions (B, H, dim) float32, normalised; padded (B, H) bool, actions past the end of the episode (the last one
    held). future: what the cameras saw afterwards, one (B, F, 3, h, w) a camera, evenly over the time of the actions,
    the last one at its end; for systems that learn from video, empty where it is not at hand.
    """

    inputs: Inputs
    actions: Tensor
    padded: Tensor
    future: tuple[Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named configuration of a recipe: its network's settings, and arguments of `example_spec`."""

    network: Any
    spec: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class TorchPolicy(Policy):
    """A policy whose network is a torch module.

    A recipe names its configuration (frozen dataclass) `Config`, its module `Network(spec, config)` with
    `loss(batch, generator) -> {"loss": scalar, ...}`, the kinds of normalisation it wants, and its presets: "paper" is
    the published size, "tiny" one for a test in a second.
    """

    Config: ClassVar[type]
    Network: ClassVar[type[nn.Module]]
    presets: ClassVar[Mapping[str, Preset]] = {}
    #: Published number of parameters of the preset "paper", None where none is published.
    parameters: ClassVar[float | None] = None
    normalization: ClassVar[Mapping[str, str]] = {"state": "mean_std", "action": "mean_std"}
    #: Fields of the specification that belong to the system, whatever the robot.
    contract: ClassVar[Mapping[str, Any]] = {}
    #: From published names of tensors to those of the network; see vla_models.published.
    published: ClassVar[tuple[Any, ...]] = ()
    #: Settings of training that differ from those of vla_models.train.TrainConfig.
    training: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        spec: PolicySpec,
        normalizers: Mapping[str, Normalizer],
        config: Mapping[str, Any] | Any = None,
        device: str = "cpu",
        steps: int | None = None,
        folder: Path | None = None,
    ):
        super().__init__(spec, normalizers, folder)
        self.config = config if isinstance(config, self.Config) else make_config(self.Config, config or {})
        self.device = torch.device(device)
        self.steps = steps or spec.steps
        with self.device if self.device.type == "meta" else torch.device("cpu"):
            self.network = self.Network(spec, self.config)
        self.network = self.network.to(self.device).eval()

    @classmethod
    def preset(cls, name: str) -> tuple[PolicySpec, Any]:
        """Specification and configuration of a preset. Raises PolicyError when there is none of that name."""
        if name not in cls.presets:
            raise PolicyError(f"config: expected one of {sorted(cls.presets)} or a mapping, found {name!r}")
        preset = cls.presets[name]
        return example_spec(cls.name(), **{**cls.contract, **preset.spec}), preset.network

    @classmethod
    def fitted(cls, network: Mapping[str, Any], chunks: Callable[[], np.ndarray]) -> Mapping[str, Any]:
        """Settings of the network with those that are fitted to data before training (an action tokeniser).

        network: settings as given. chunks: gives recorded actions (N, H, action_dim), normalised.
        """
        return network

    @classmethod
    def for_cameras(cls, spec: PolicySpec) -> PolicySpec:
        """A specification whose cameras are others than before, with what its prompt says of them put right."""
        return spec

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: Any
    ) -> tuple[PolicySpec, Any, dict[str, Normalizer]]:
        """Specification, network settings and normalisers of a published checkpoint (vla_models.published).

        folder: where it lies; config: its config.json; files: its TensorFiles, for shapes and statistics that lie
        there. Raises CheckpointError.
        """
        raise CheckpointError(f"{folder}: recipe {cls.name()!r} reads no published checkpoints")

    @classmethod
    def name(cls) -> str:
        """The recipe's name: that under which it is registered."""
        return recipe_name(cls)

    @property
    def runtime(self) -> str:
        return "torch"

    @property
    def provider(self) -> str:
        return self.device.type

    def tensors(self, inputs: ModelInputs) -> Inputs:
        """Inputs on the network's device."""

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        images = tuple(tensor(image) for image in inputs.images)
        return Inputs(images, tensor(inputs.tokens), tensor(inputs.state), tensor(inputs.present))

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Losses of a batch on the network's device; "loss" is the one to minimise. generator: of noise and times."""
        return self.network.loss(batch, generator or torch.Generator().manual_seed(0))


class OnePassPolicy(TorchPolicy):
    """A policy whose network is a function of its inputs: `Network(inputs) -> (B, H, W)` normalised actions."""

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        start = time.perf_counter()
        with torch.no_grad():
            actions = self.network(self.tensors(inputs)).float().cpu().numpy()
        timings["sample"] = time.perf_counter() - start
        return actions


class FlowPolicy(TorchPolicy):
    """A policy that integrates a velocity from noise (tau = 0) to actions (tau = 1).

    Its network has `encode(inputs) -> context`, run once for a chunk (a tensor, or a tuple of tensors), and
    `velocity(context, x, tau) -> (B, H, W)`, x (B, H, W), tau (B, 1) or (B, H); and `width`, that W, where it is not
    the action space's.
    """

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (1, self.spec.horizon, getattr(self.network, "width", self.spec.action_dim))

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        start = time.perf_counter()
        with torch.no_grad():
            context = self.network.encode(self.tensors(inputs))
            encoded = time.perf_counter()
            sample = sample_flow(
                velocity_of(self.network, context),
                torch.from_numpy(noise).to(self.device),
                self.steps,
                guidance_of(prefix),
                self.spec.shift,
            )
        actions = sample.float().cpu().numpy()
        timings["encode"] = encoded - start
        timings["sample"] = time.perf_counter() - encoded
        return actions


def velocity_of(network: Any, context: Any):
    """The network of a FlowPolicy as the sampler wants it: velocity(x, tau), tau a float or a tensor (B, H)."""

    def velocity(x: Tensor, tau) -> Tensor:
        if not isinstance(tau, Tensor):
            tau = torch.full((x.shape[0], 1), float(tau), dtype=x.dtype, device=x.device)
        return network.velocity(context, x, tau)

    return velocity


def guidance_of(prefix: ChunkPrefix | None) -> Guidance | None:
    """The sampler's guidance for what a request left."""
    if prefix is None:
        return None
    if prefix.mode == "prefix":
        return PrefixGuidance(prefix.target, prefix.known)
    return RtcGuidance(prefix.target, prefix.weights, prefix.beta)


def load_torch(
    path: str | os.PathLike, provider: str = "cpu", threads: int = 0, steps: int | None = None
) -> TorchPolicy:
    """The policy of a checkpoint folder on torch. Raises CheckpointError."""
    checkpoint = read_checkpoint(path)
    if provider not in ("cpu", "cuda"):
        raise PolicyError(f"provider: torch runs on 'cpu' or 'cuda', found {provider!r}")
    if provider == "cuda" and not torch.cuda.is_available():
        raise PolicyError("provider: 'cuda' was asked for, but torch finds no CUDA device")
    if threads:
        torch.set_num_threads(threads)
    try:
        policy = policy_class(checkpoint.spec.recipe)(
            checkpoint.spec, checkpoint.normalizers, checkpoint.config, provider, steps, checkpoint.folder
        )
    except (PolicyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    load_weights(policy.network, checkpoint.folder / WEIGHTS_FILE)
    return policy


def load_weights(network: nn.Module, path: str | os.PathLike, finite: bool = True) -> None:
    """Fill `network` from a safetensors file that must hold exactly its tensors. Raises CheckpointError."""
    state = network.state_dict()
    tensors = read_tensors(path, {name: tuple(value.shape) for name, value in state.items()}, finite)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
