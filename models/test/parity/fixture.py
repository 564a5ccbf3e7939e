"""A fixture of a reference's weights, inputs and outputs (written by the make_*.py beside it)."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Fixture:
    """One <name>.safetensors: tensors weights/<public name>, in/<name>, out/<name>, statistics/<name> (where the
    reference keeps those apart), and the reference's settings.

    It stands in for a TensorFiles of its weights: `path`, `shapes` and [public name].
    """

    def __init__(self, name: str):
        self.path = Path(__file__).parent / f"{name}.safetensors"
        with safe_open(self.path, "pt") as file:
            self.metadata: dict[str, str] = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        self.config: dict[str, Any] = json.loads(self.metadata["config"])
        self.weights, self.inputs, self.outputs, self.statistics = (
            {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{kind}/")}
            for kind in ("weights", "in", "out", "statistics")
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.weights.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def write(self, folder: Path, config: dict[str, Any] | None = None, **more: Tensor) -> Path:
        """A folder as it is published: model.safetensors with the weights and `more`, and config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({**self.weights, **more}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config or self.config))
        return folder


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights of a large part of a reference, which are not in its file: random numbers of the tensor's name."""
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) < 2:
        return torch.from_numpy(name.endswith("weight") + np.float32(0.1) * normal)
    return torch.from_numpy(normal * np.float32(np.sqrt(2 / np.prod(shape[1:]))))
