"""What policies that run on torch share: the network, its device, how inputs become tensors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vla_models import policy_class
from vla_models.checkpoint import WEIGHTS_FILE, read_checkpoint, read_tensors
from vla_models.normalization import Normalizer
from vla_models.policy import CheckpointError, ModelInputs, Policy, PolicyError, PolicySpec


class Batch(NamedTuple):
    """Training samples on the network's device.

    images: one (B, 3, h, w) float32 in [0, 1] a camera; tokens (B, context) int64; state (B, state_dim) and actions
    (B, H, dim) float32, normalised; padded (B, H) bool, actions past the end of the episode (the last one held).
    """

    images: tuple[Tensor, ...]
    tokens: Tensor
    state: Tensor
    actions: Tensor
    padded: Tensor


class TorchPolicy(Policy):
    """A policy whose network is a torch module.

    A recipe subclasses it, names its configuration (frozen dataclass) `Config`, its module `Network(spec, config)`
    with `loss(batch, generator) -> {"loss": scalar, ...}`, the kinds of normalisation it wants, and writes `run`.
    """

    Config: ClassVar[type]
    Network: ClassVar[type[nn.Module]]
    normalization: ClassVar[Mapping[str, str]] = {"state": "mean_std", "action": "mean_std"}
    #: Settings of training that differ from those of vla_models.train.TrainConfig.
    training: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        spec: PolicySpec,
        normalizers: Mapping[str, Normalizer],
        config: Mapping[str, Any] | None = None,
        device: str = "cpu",
        steps: int | None = None,
    ):
        super().__init__(spec, normalizers)
        self.config = make_config(self.Config, config or {})
        self.device = torch.device(device)
        self.steps = steps or spec.steps
        self.network = self.Network(spec, self.config).to(self.device).eval()

    @property
    def runtime(self) -> str:
        return "torch"

    @property
    def provider(self) -> str:
        return self.device.type

    def tensors(self, inputs: ModelInputs) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Images, tokens and state on the network's device."""
        images = tuple(torch.from_numpy(image).to(self.device) for image in inputs.images)
        return images, torch.from_numpy(inputs.tokens).to(self.device), torch.from_numpy(inputs.state).to(self.device)


def make_config(kind: type, values: Mapping[str, Any]) -> Any:
    """A recipe's configuration from plain values; lists become tuples. Raises PolicyError for unknown keys."""
    names = {f.name for f in dataclasses.fields(kind)}
    if unknown := set(values) - names:
        raise PolicyError(f"{kind.__name__}: unknown settings {sorted(unknown)}; expected among {sorted(names)}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


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
            checkpoint.spec, checkpoint.normalizers, checkpoint.config, provider, steps
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
