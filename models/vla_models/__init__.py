"""The policy library: what a policy is, sampling, training, export and runtimes.

Importing this package, and running exported policies on ONNX Runtime, needs no torch. Policies are found through the
entry point group `vla_models.policies`: recipe name -> subclass of `vla_models.torch_policy.TorchPolicy`, so a package
of a user's own adds one in its setup.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

ENTRY_POINTS = "vla_models.policies"
#: The recipes of this package, known even where its metadata is not installed.
RECIPES = {"flow": "vla_models.flow_policy:FlowPolicy", "act": "vla_models.act_policy:ActPolicy"}
RUNTIMES = ("torch", "onnx")


def list_policies() -> list[str]:
    """Names of the recipes that can be built, in alphabetical order."""
    return sorted(_recipes())


def policy_class(recipe: str) -> type:
    """The class of a recipe. Imports torch. Raises PolicyError for an unknown one."""
    from vla_models.policy import PolicyError

    found = _recipes()
    if recipe not in found:
        raise PolicyError(f"recipe: expected one of {sorted(found)}, found {recipe!r}")
    return found[recipe].load()


def build(
    recipe: str, spec: Any, normalizers: Mapping[str, Any], config: Mapping[str, Any] | None = None, device: str = "cpu"
) -> Any:
    """A new policy with random weights. See `vla_models.torch_policy.TorchPolicy`."""
    return policy_class(recipe)(spec, normalizers, config, device)


def load(
    path: str | os.PathLike,
    runtime: str = "torch",
    provider: str = "cpu",
    threads: int = 0,
    steps: int | None = None,
    providers: Sequence[Any] | None = None,
) -> Any:
    """The policy of a checkpoint folder.

    runtime: "torch" or "onnx". provider: where it runs: "cpu", "cuda", and with onnx "tensorrt". threads: of one
    inference, 0: the runtime's choice. steps: integration steps, None: the checkpoint's own. providers: execution
    providers in ONNX Runtime's own words, instead of `provider`.
    Raises CheckpointError (a ValueError) for a checkpoint that cannot be used.
    """
    from vla_models.policy import PolicyError

    if runtime not in RUNTIMES:
        raise PolicyError(f"runtime: expected one of {RUNTIMES}, found {runtime!r}")
    if runtime == "onnx":
        from vla_models.runtime_onnx import load_onnx

        return load_onnx(path, provider=provider, threads=threads, steps=steps, providers=providers)
    from vla_models.torch_policy import load_torch

    return load_torch(path, provider=provider, threads=threads, steps=steps)


def _recipes() -> dict[str, EntryPoint]:
    own = {name: EntryPoint(name, value, ENTRY_POINTS) for name, value in RECIPES.items()}
    return own | {point.name: point for point in entry_points(group=ENTRY_POINTS)}
