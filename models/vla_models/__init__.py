"""The policy library: what a policy is, sampling, training, export and runtimes.

Importing this package, and running exported policies on ONNX Runtime, needs no torch. The recipes of this package are
listed in `RECIPES`; others are found through the entry point group `vla_models.policies` (recipe name -> subclass of
`vla_models.torch_policy.TorchPolicy`), so a package of a user's own adds one in its setup.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

ENTRY_POINTS = "vla_models.policies"
#: The recipes of this package: name -> class.
RECIPES = {
    "act": "vla_models.recipes.act:ActPolicy",
    "diffusion_policy": "vla_models.recipes.diffusion_policy:DiffusionPolicy",
    "fast_wam": "vla_models.recipes.fast_wam:FastWamPolicy",
    "flow": "vla_models.recipes.flow:SmallFlowPolicy",
    "gr2": "vla_models.recipes.gr2:Gr2Policy",
    "lingbot_va": "vla_models.recipes.lingbot_va:LingBotVaPolicy",
    "octo": "vla_models.recipes.octo:OctoPolicy",
    "openvla": "vla_models.recipes.openvla:OpenVlaPolicy",
    "openvla_oft": "vla_models.recipes.openvla_oft:OpenVlaOftPolicy",
    "pi0": "vla_models.recipes.pi0:Pi0Policy",
    "pi05": "vla_models.recipes.pi05:Pi05Policy",
    "pi06": "vla_models.recipes.pi06:Pi06Policy",
    "pi0_fast": "vla_models.recipes.pi0_fast:Pi0FastPolicy",
    "rdt": "vla_models.recipes.rdt:RdtPolicy",
    "rt1": "vla_models.recipes.rt1:Rt1Policy",
    "rt2": "vla_models.recipes.rt2:Rt2Policy",
    "rth": "vla_models.recipes.rth:RthPolicy",
    "smolvla": "vla_models.recipes.smolvla:SmolVlaPolicy",
    "wall_oss": "vla_models.recipes.wall_oss:WallOssPolicy",
    "wall_oss_fast": "vla_models.recipes.wall_oss_fast:WallOssFastPolicy",
}
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


def recipe_name(kind: type) -> str:
    """The name under which a recipe's class is registered; its module's when it is not."""
    place = f"{kind.__module__}:{kind.__qualname__}"
    return next((name for name, point in _recipes().items() if point.value == place), kind.__module__.rsplit(".")[-1])


def build(
    name: str,
    config: str | Mapping[str, Any] = "tiny",
    device: str = "cpu",
    spec: Any = None,
    normalizers: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Any:
    """A new policy with random weights (on the device "meta": without any).

    config: "tiny", "paper", or settings of the recipe's network on top of its defaults. spec: a PolicySpec; by default
    that of the preset (of "tiny" for settings), for a robot that has only numbers of joints. normalizers: {"state",
    "action"}; by default they change nothing. folder: where a tokenizer.json lies that the spec names. Raises
    PolicyError for an unknown recipe, preset or setting.
    """
    kind = policy_class(name)
    example, network = kind.preset(config) if isinstance(config, str) else (None, config)
    spec = spec or example or kind.preset("tiny")[0]
    return kind(spec, normalizers or identity_normalizers(spec), network, device, folder=folder)


def identity_normalizers(spec: Any) -> dict[str, Any]:
    """Normalisers of a specification that change nothing."""
    import numpy as np

    from vla_models.normalization import Normalizer

    dims = {"state": spec.state_dim, "action": spec.action_dim}
    return {name: Normalizer("mean_std", np.zeros(dim), np.ones(dim)) for name, dim in dims.items()}


def load(
    path: str | os.PathLike,
    runtime: str = "torch",
    provider: str = "cpu",
    threads: int = 0,
    steps: int | None = None,
    providers: Sequence[Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    precision: str = "fp32",
) -> Any:
    """The policy of a checkpoint folder, or of a published checkpoint: a folder, or its name on the Hugging Face hub.

    The file of the weights stands for its folder too: model.safetensors, or of a published checkpoint any other name.
    A checkpoint folder without weights may stand for a policy on another machine (vla_models.remote).

    runtime: "torch" or "onnx". provider: where it runs: "cpu", "cuda", and with onnx "tensorrt". threads: of one
    inference, 0: the runtime's choice. steps: integration steps, None: the checkpoint's own. providers: execution
    providers in ONNX Runtime's own words, instead of `provider`. settings: of a published checkpoint, on top of its
    config.json, such as {"unnorm_key": name} for one that knows several data sets. precision: of the arithmetic, with
    onnx "int8", "fp16" or "bf16" too, where the export made that variant (vla_models.precision).
    Raises CheckpointError (a ValueError) for a checkpoint that cannot be used.
    """
    from vla_models.policy import CheckpointError, PolicyError

    if runtime not in RUNTIMES:
        raise PolicyError(f"runtime: expected one of {RUNTIMES}, found {runtime!r}")
    if is_remote(path):
        from vla_models.remote import load_remote

        return load_remote(path)
    if runtime == "onnx":
        from vla_models.runtime_onnx import load_onnx

        if not (Path(path) / "policy.json").exists() and (Path(path) / "config.json").exists():
            raise CheckpointError(
                f"checkpoint {path}: is a published one, without graphs; make it one of ours and export that: "
                f"python -m vla_models.convert {path} FOLDER; python -m vla_models.export FOLDER"
            )
        return load_onnx(path, provider, threads, steps, providers, precision)
    if precision != "fp32":
        raise PolicyError(f"precision: torch computes in 'fp32', found {precision!r}, which goes with runtime onnx")
    from vla_models.published import find_checkpoint, load_published
    from vla_models.torch_policy import load_torch

    found = find_checkpoint(path)
    folder = found.parent if found.is_file() else found
    if (folder / "config.json").exists() and not (folder / "policy.json").exists():
        return load_published(found, provider, steps, settings=settings)
    return load_torch(folder, provider=provider, threads=threads, steps=steps)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a checkpoint folder stands for a policy on another machine (vla_models.remote): it has no weights."""
    from vla_models.checkpoint import POLICY_FILE, WEIGHTS_FILE, read_checkpoint
    from vla_models.policy import CheckpointError

    folder = Path(path)
    if not (folder / POLICY_FILE).is_file() or (folder / WEIGHTS_FILE).exists():
        return False
    from vla_models.remote import REMOTE

    try:
        return read_checkpoint(folder).spec.recipe in REMOTE
    except CheckpointError:
        return False  # who loads it says what is wrong


def _recipes() -> dict[str, EntryPoint]:
    own = {name: EntryPoint(name, value, ENTRY_POINTS) for name, value in RECIPES.items()}
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)} | own
