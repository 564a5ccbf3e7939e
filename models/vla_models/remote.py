"""Policies that live on another machine, behind the same interface, contract check and safety as any other.

A remote policy is a checkpoint folder without weights: policy.json with the recipe "openpi" or "lerobot_server"
(vla_models.lerobot_client), the specification of what the server's policy sees and says, and the settings of
`OpenpiConfig` or `LerobotConfig`. The server normalises by itself, so the normalisers change nothing, or units only.
See docs/howto.md for an example.

Nothing waits for ever: an answer that does not come in time is an error, the executor holds, and the next request
connects anew.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_models.checkpoint import read_checkpoint
from vla_models.lerobot_client import LerobotServerPolicy
from vla_models.normalization import Normalizer
from vla_models.policy import (
    CheckpointError,
    ChunkPrefix,
    InferenceRequest,
    ModelInputs,
    Policy,
    PolicyError,
    PolicyObservation,
    PolicyOutput,
    PolicySpec,
)


@dataclass(frozen=True)
class OpenpiConfig:
    """Where the server is and what it calls things.

    url: ws:// or wss:// address. timeout: longest time for connecting and for an answer, s. images: our camera -> key
    of the server's observation. state, prompt, actions: its other keys. constants: further entries of each
    observation. api_key: name of the environment variable with the server's key; empty: none is sent.
    """

    url: str = "ws://127.0.0.1:8000"
    timeout: float = 1.0
    images: Mapping[str, str] = field(default_factory=dict)
    state: str = "observation/state"
    prompt: str = "prompt"
    actions: str = "actions"
    constants: Mapping[str, Any] = field(default_factory=dict)
    api_key: str = ""


class OpenpiPolicy(Policy):
    """A policy served by openpi (`scripts/serve_policy.py`) or by whatever speaks its protocol.

    Protocol of openpi-client 0.1.2: a web socket; the server speaks first (its metadata); then each observation, a
    dictionary of arrays and strings in msgpack, is answered by a dictionary with the actions (H, dim); text instead of
    bytes is an error. That package itself is not used: it waits for ever, and wants NumPy 1.
    """

    def __init__(self, spec: PolicySpec, normalizers: Mapping[str, Normalizer], config: Mapping[str, Any]):
        super().__init__(spec, normalizers)
        names = {f.name for f in dataclasses.fields(OpenpiConfig)}
        if unknown := set(config) - names:
            raise PolicyError(f"openpi: unknown settings {sorted(unknown)}; expected among {sorted(names)}")
        self.config = OpenpiConfig(**config)
        if missing := sorted(set(spec.cameras) - set(self.config.images)):
            raise PolicyError(f"openpi: images: expected a key for each camera, found none for {missing}")
        self.metadata: dict[str, Any] = {}
        self._socket: Any = None
        self._connection = ExitStack()
        self._instruction = ""

    @property
    def runtime(self) -> str:
        return "remote"

    @property
    def provider(self) -> str:
        return self.config.url

    def infer(self, observation: PolicyObservation, request: InferenceRequest | None = None) -> PolicyOutput:
        self._instruction = observation.instruction
        return super().infer(observation, request)

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        start = time.perf_counter()
        said: dict[str, Any] = dict(self.config.constants)
        for camera, image in zip(self.spec.cameras, inputs.images, strict=True):
            said[self.config.images[camera]] = np.rint(np.moveaxis(image[0], -3, -1) * 255.0).astype(np.uint8)
        said[self.config.state] = inputs.state[0]
        said[self.config.prompt] = self._instruction
        answer = self._ask(said)
        actions = np.asarray(answer.get(self.config.actions, ()), np.float32)
        expected = (self.spec.horizon, self.spec.action_dim)
        if actions.shape != expected:
            raise PolicyError(
                f"policy {self.spec.name}: server {self.config.url}: {self.config.actions}: expected {expected}, found "
                f"{actions.shape} (keys: {sorted(map(str, answer))})"
            )
        timings["sample"] = time.perf_counter() - start
        return actions[None]

    def close(self) -> None:
        """End the connection; the next inference makes a new one."""
        self._socket = None
        self._connection.close()

    def _ask(self, said: Mapping[str, Any]) -> Mapping[Any, Any]:
        try:
            if self._socket is None:
                self._connect()
            self._socket.send(pack(said))
            answer = self._socket.recv(timeout=self.config.timeout)
        except PolicyError:
            raise
        except Exception as error:  # of sockets, of the protocol, of time: all mean that there is no answer
            # Whatever still comes over this connection would be taken for the answer to the next question.
            self.close()
            what = f"no answer within {self.config.timeout} s" if isinstance(error, TimeoutError) else f"{error}"
            raise PolicyError(f"policy {self.spec.name}: server {self.config.url}: {what}") from error
        if isinstance(answer, str):
            self.close()
            raise PolicyError(f"policy {self.spec.name}: server {self.config.url} says: {answer.strip()[-500:]}")
        return self._unpacked(answer)

    def _connect(self) -> None:
        from websockets.sync.client import connect

        key = os.environ.get(self.config.api_key, "") if self.config.api_key else ""
        self._socket = self._connection.enter_context(
            connect(
                self.config.url,
                open_timeout=self.config.timeout,
                close_timeout=self.config.timeout,
                compression=None,
                max_size=None,
                additional_headers={"Authorization": f"Api-Key {key}"} if key else None,
            )
        )
        self.metadata = dict(self._unpacked(self._socket.recv(timeout=self.config.timeout)))

    def _unpacked(self, data: bytes) -> Mapping[Any, Any]:
        try:
            values = unpack(data)
        except Exception as error:  # msgpack has several kinds
            self.close()
            raise PolicyError(f"policy {self.spec.name}: server {self.config.url}: not readable: {error}") from error
        if not isinstance(values, Mapping):
            raise PolicyError(
                f"policy {self.spec.name}: server {self.config.url}: expected a dictionary, found "
                f"{type(values).__name__}"
            )
        return values


#: Remote recipes: name in policy.json -> class.
REMOTE = {"lerobot_server": LerobotServerPolicy, "openpi": OpenpiPolicy}


def load_remote(path: str | os.PathLike) -> Policy:
    """The remote policy of a checkpoint folder. Raises CheckpointError for settings that cannot be used."""
    checkpoint = read_checkpoint(path)
    try:
        return REMOTE[checkpoint.spec.recipe](checkpoint.spec, checkpoint.normalizers, checkpoint.config)
    except (PolicyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error


def pack(value: Any) -> bytes:
    """msgpack with NumPy arrays as openpi-client writes them: dtype, shape and bytes, never pickled objects."""
    import msgpack

    def plain(value: Any) -> Any:
        if not isinstance(value, (np.ndarray, np.generic)):
            return value
        if value.dtype.kind in "VOc":
            raise PolicyError(f"openpi: expected numbers or text, found an array of {value.dtype}")
        if isinstance(value, np.ndarray):
            raw = np.ascontiguousarray(value).tobytes()
            return {b"__ndarray__": True, b"data": raw, b"dtype": value.dtype.str, b"shape": value.shape}
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}

    return msgpack.packb(value, default=plain)


def unpack(data: bytes) -> Any:
    """The inverse of `pack`."""
    import msgpack

    def array(value: Mapping[Any, Any]) -> Any:
        if b"__ndarray__" in value:
            kind = np.dtype(value[b"dtype"])
            if kind.kind in "VOc":
                raise PolicyError(f"openpi: expected numbers or text, found an array of {kind}")
            return np.frombuffer(value[b"data"], kind).reshape(value[b"shape"])
        if b"__npgeneric__" in value:
            return np.dtype(value[b"dtype"]).type(value[b"data"])
        return value

    return msgpack.unpackb(data, object_hook=array, strict_map_key=False)
