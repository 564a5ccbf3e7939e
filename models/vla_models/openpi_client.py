"""A policy that openpi serves (`scripts/serve_policy.py`), or whatever speaks its protocol, as a remote policy.

Protocol of openpi-client 0.1.2: a web socket; the server speaks first (its metadata); then each observation, a
dictionary of arrays and strings in msgpack, is answered by a dictionary with the actions (H, dim); text instead of
bytes is an error. That package itself is not used: it waits for ever, and wants NumPy 1.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_models.normalization import Normalizer
from vla_models.policy import ChunkPrefix, ModelInputs, PolicyError, PolicySpec
from vla_models.remote import RemotePolicy


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


class OpenpiPolicy(RemotePolicy):
    """A policy behind openpi's protocol. metadata: what the server said of itself."""

    Config = OpenpiConfig

    def __init__(self, spec: PolicySpec, normalizers: Mapping[str, Normalizer], config: Mapping[str, Any]):
        super().__init__(spec, normalizers, config)
        self.metadata: dict[str, Any] = {}
        self._socket: Any = None
        self._connection = ExitStack()

    @property
    def provider(self) -> str:
        return self.config.url

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        start = time.perf_counter()
        seen = {**self.config.constants, **self.pictures(inputs), self.config.prompt: self.instruction}
        answer = self._ask({**seen, self.config.state: inputs.state[0]})
        actions = np.asarray(answer.get(self.config.actions, ()), np.float32)
        timings["sample"] = time.perf_counter() - start
        return self.chunk(actions, f" (keys: {sorted(map(str, answer))})")

    def close(self) -> None:
        self._socket = None
        self._connection.close()

    def _ask(self, seen: Mapping[str, Any]) -> Mapping[Any, Any]:
        try:
            if self._socket is None:
                self._connect()
            self._socket.send(pack(seen))
            answer = self._socket.recv(timeout=self.config.timeout)
        except PolicyError:
            raise
        except Exception as error:  # of sockets, of the protocol, of time: all mean that there is no answer
            late = isinstance(error, TimeoutError)
            raise self.error(f"no answer within {self.config.timeout} s" if late else str(error)) from error
        if isinstance(answer, str):
            raise self.error(f"says: {answer.strip()[-500:]}")
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
            raise self.error(f"not readable: {error}") from error
        if not isinstance(values, Mapping):
            raise self.error(f"expected a dictionary, found {type(values).__name__}")
        return values


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
