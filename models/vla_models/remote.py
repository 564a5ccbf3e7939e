"""Policies that live on another machine, behind the same interface, contract check and safety as any other.

A remote policy is a checkpoint folder without weights: policy.json with a recipe of `REMOTE`, the specification of what
the server's policy sees and says, and the settings of its client. The server normalises by itself, so the normalisers
change nothing, or units only. See docs/models.md for an example.

Nothing waits for ever: an answer that does not come in time is an error, the executor holds, and the next request
connects anew.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from vla_models.checkpoint import read_checkpoint
from vla_models.normalization import Normalizer
from vla_models.policy import (
    CheckpointError,
    InferenceRequest,
    ModelInputs,
    Policy,
    PolicyError,
    PolicyObservation,
    PolicyOutput,
    PolicySpec,
    make_config,
)

#: Remote recipes: name in policy.json -> class.
REMOTE = {
    "lerobot_server": "vla_models.lerobot_client:LerobotServerPolicy",
    "openpi": "vla_models.openpi_client:OpenpiPolicy",
}


class RemotePolicy(Policy):
    """A policy that a server runs.

    A client names its settings `Config` (with `images`: our camera -> the server's name) and writes `run`, `provider`
    (the server's address) and `close`.
    """

    Config: ClassVar[type]

    def __init__(self, spec: PolicySpec, normalizers: Mapping[str, Normalizer], config: Mapping[str, Any]):
        super().__init__(spec, normalizers)
        self.config = make_config(self.Config, config)
        if missing := sorted(set(spec.cameras) - set(self.config.images)):
            raise PolicyError(f"{spec.recipe}: images: expected a name for each camera, found none for {missing}")
        #: Of the observation that is being answered.
        self.instruction = ""

    @property
    def runtime(self) -> str:
        return "remote"

    @abstractmethod
    def close(self) -> None:
        """End the connection; the next inference makes a new one."""

    def infer(self, observation: PolicyObservation, request: InferenceRequest | None = None) -> PolicyOutput:
        self.instruction = observation.instruction
        return super().infer(observation, request)

    def pictures(self, inputs: ModelInputs) -> dict[str, np.ndarray]:
        """The server's name of each camera -> (h, w, 3) uint8."""
        return {
            self.config.images[camera]: np.rint(np.moveaxis(image[0], -3, -1) * 255.0).astype(np.uint8)
            for camera, image in zip(self.spec.cameras, inputs.images, strict=True)
        }

    def chunk(self, actions: np.ndarray, hint: str = "") -> np.ndarray:
        """The server's actions as a batch of one. Raises PolicyError when they are not (horizon, action_dim)."""
        expected = (self.spec.horizon, self.spec.action_dim)
        if actions.shape != expected:
            raise self.error(f"actions: expected {expected}, found {actions.shape}{hint}")
        return actions[None].astype(np.float32)

    def error(self, what: str) -> PolicyError:
        """Something is wrong with the server: what it still says would be taken for the answer to the next question, so
        the connection ends."""
        self.close()
        return PolicyError(f"policy {self.spec.name}: server {self.provider}: {what}")


def load_remote(path: str | os.PathLike) -> Policy:
    """The remote policy of a checkpoint folder. Raises CheckpointError for settings that cannot be used."""
    checkpoint = read_checkpoint(path)
    module, name = REMOTE[checkpoint.spec.recipe].split(":")
    try:
        return getattr(import_module(module), name)(checkpoint.spec, checkpoint.normalizers, checkpoint.config)
    except (PolicyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
