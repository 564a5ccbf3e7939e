"""A policy on a LeRobot policy server (lerobot.async_inference.policy_server, LeRobot 0.6.1), as a remote policy.

A checkpoint folder with the recipe "lerobot_server", the specification, and the settings of `LerobotConfig`. The server
works in the units of its data set (degrees, say): the normalisers of policy.json turn ours into those and back.

The protocol is gRPC with pickled Python objects inside. What is sent is written here. What is received is never
unpickled freely: `read_actions` knows the few names that a chunk consists of, and refuses any other.
"""

from __future__ import annotations

import io
import pickle
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_models.normalization import Normalizer
from vla_models.policy import ChunkPrefix, ModelInputs, PolicyError, PolicySpec
from vla_models.remote import RemotePolicy

SERVICE = "/transport.AsyncInference/"
HELPERS = "lerobot.async_inference.helpers"
#: Largest piece of an observation in one message, bytes (gRPC takes 4 MB), and the marks of its pieces.
PIECE = 2 << 20
BEGIN, MIDDLE, END = 1, 2, 3


@dataclass(frozen=True)
class LerobotConfig:
    """Where the server is, which policy it shall load, and what its data set calls things.

    address: host:port. policy: LeRobot's name of the policy's type (act, smolvla, pi0, ...). pretrained: its
    checkpoint, a folder on the server's machine or a hub name. device: of the server's machine. images: our camera ->
    name of the data set's camera (`top` for observation.images.top). state: names of the numbers in its
    observation.state, in the order of our state vector. timeout: longest time for an answer, s. load_timeout: the same
    for loading the policy.
    """

    address: str = "127.0.0.1:8080"
    policy: str = "act"
    pretrained: str = ""
    device: str = "cpu"
    images: Mapping[str, str] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    timeout: float = 1.0
    load_timeout: float = 300.0


class LerobotServerPolicy(RemotePolicy):
    """A policy that a LeRobot policy server runs."""

    Config = LerobotConfig

    def __init__(self, spec: PolicySpec, normalizers: Mapping[str, Normalizer], config: Mapping[str, Any]):
        super().__init__(spec, normalizers, config)
        if len(self.config.state) != spec.state_dim:
            raise PolicyError(f"lerobot_server: state: expected {spec.state_dim} names, found {len(self.config.state)}")
        self._channel: Any = None
        self._step = 0

    @property
    def provider(self) -> str:
        return self.config.address

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        start = time.perf_counter()
        if self._channel is None:
            self._connect()
        self._step += 1
        numbers = dict(zip(self.config.state, inputs.state[0].tolist(), strict=True))
        seen = {**numbers, **self.pictures(inputs), "task": self.instruction}
        observation = {"timestamp": time.time(), "timestep": self._step, "observation": seen, "must_go": True}
        self._call("SendObservations", pieces(write_instance("TimedObservation", observation)), self.config.timeout)
        data = read_field(self._call("GetActions", b"", self.config.timeout), 1)
        if not data:
            raise self.error("expected actions, found none: the server's log says why")
        try:
            steps, actions = read_actions(data)
        except Exception as error:  # a pickle can go wrong in every way
            raise self.error(f"actions: not readable: {error}") from error
        if steps[:1] != [self._step]:
            raise self.error(f"expected the answer to observation {self._step}, found that to {steps[:1]}")
        timings["sample"] = time.perf_counter() - start
        return self.chunk(actions)

    def close(self) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            channel.close()

    def _connect(self) -> None:
        try:
            import grpc
        except ImportError:
            raise PolicyError("lerobot_server: needs the package grpcio: pip install grpcio") from None
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(self.config.address, options)
        features: dict[str, Any] = {
            f"observation.images.{self.config.images[camera]}": {
                "dtype": "image", "shape": (*size, 3), "names": ["height", "width", "channels"],
            }
            for camera, size in self.spec.cameras.items()
        }  # fmt: skip
        names = list(self.config.state)
        features["observation.state"] = {"dtype": "float32", "shape": (len(names),), "names": names}
        setup = {
            "policy_type": self.config.policy, "pretrained_name_or_path": self.config.pretrained,
            "lerobot_features": features, "actions_per_chunk": self.spec.horizon, "device": self.config.device,
            "rename_map": {},
        }  # fmt: skip
        self._call("Ready", b"", self.config.timeout)
        instance = write_instance("RemotePolicyConfig", setup)
        self._call("SendPolicyInstructions", write_field(1, instance), self.config.load_timeout)

    def _call(self, method: str, message: Any, timeout: float) -> bytes:
        import grpc

        make = self._channel.unary_unary if isinstance(message, bytes) else self._channel.stream_unary
        try:
            return make(SERVICE + method)(message, timeout=timeout)
        except grpc.RpcError as error:
            late = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            said = f"no answer within {timeout} s" if late else error.details()
            raise self.error(f"{method}: {said}") from error


# ---------------------------------------------------------------------------------------------------------- messages


def write_field(number: int, value: bytes | int) -> bytes:
    """One field of a protobuf message: bytes, or a small number."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def read_field(message: bytes, number: int) -> bytes:
    """The bytes field `number` of a protobuf message; empty when it is not there. Raises PolicyError."""
    at, found = 0, b""
    try:
        while at < len(message):
            tag, at = _read_varint(message, at)
            if tag & 7 == 0:
                _, at = _read_varint(message, at)
            elif tag & 7 == 2:
                length, at = _read_varint(message, at)
                if tag >> 3 == number:
                    found = message[at : at + length]
                at += length
            else:
                raise PolicyError(f"protobuf: unexpected wire type {tag & 7}")
    except IndexError:
        raise PolicyError("protobuf: message cut short") from None
    return found


def pieces(data: bytes) -> Iterator[bytes]:
    """`data` as messages of a stream, in the order and with the marks that LeRobot's receiver wants."""
    for start in range(0, len(data), PIECE):
        last = start + PIECE >= len(data)
        yield write_field(1, END if last else BEGIN if start == 0 else MIDDLE) + write_field(
            2, data[start : start + PIECE]
        )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


# ----------------------------------------------------------------------------------------------------------- objects


def write_instance(name: str, state: Mapping[str, Any]) -> bytes:
    """A pickle of an instance of LeRobot's class `name` with the attributes `state`, without LeRobot at hand."""
    attributes = pickle.dumps(dict(state), protocol=3)[2:-1]  # without its header and its stop
    return b"\x80\x03c" + f"{HELPERS}\n{name}\n".encode() + b")\x81" + attributes + b"b."


def read_actions(data: bytes) -> tuple[list[int], np.ndarray]:
    """(timesteps, actions (H, dim) float64) of a pickled list of TimedAction.

    Raises PolicyError for anything in it that is not part of such a list.
    """
    values = _Reader(io.BytesIO(data)).load()
    if not isinstance(values, list) or not all(isinstance(v, _TimedAction) for v in values):
        raise PolicyError(f"expected a list of actions, found {type(values).__name__}")
    rows = [np.asarray(v.action, np.float64).reshape(-1) for v in values]
    return [int(v.timestep) for v in values], np.stack(rows) if rows else np.zeros((0, 0))


class _TimedAction:
    timestep = 0
    action: Any = ()


def _storage(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), weights_only=True)


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    import torch

    # Beyond its storage torch would make room, and give what happens to lie there.
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    there = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    if min(offset, *size, *stride) < 0 or (0 not in size and last >= there):
        found = f"size {size}, stride {stride} at {offset}"
        raise PolicyError(f"expected a tensor inside its {there} numbers, found {found}")
    flat = torch.tensor([], dtype=storage.dtype).set_(storage._untyped_storage, offset, size, stride)
    return flat.double().numpy()


class _Reader(pickle.Unpickler):
    """Knows the names that a list of TimedAction consists of, each with a harmless stand-in; refuses all others."""

    _KNOWN = {
        (HELPERS, "TimedAction"): _TimedAction,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch.storage", "_load_from_bytes"): _storage,
        ("collections", "OrderedDict"): OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise PolicyError(f"expected actions only, found {module}.{name}")
        return self._KNOWN[module, name]
