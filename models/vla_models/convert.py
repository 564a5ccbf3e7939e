"""A published checkpoint, or one of ours, as a checkpoint folder of ours: what can be exported and named in a policy.

    python -m vla_models.convert lerobot/act_aloha_sim_transfer_cube_human models/checkpoints/aloha_published
    python -m vla_models.convert openvla/openvla-7b models/checkpoints/openvla unnorm_key=bridge_orig

Weights become float32. The folder needs nothing of the published one any more.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_models import load
from vla_models.checkpoint import WEIGHTS_FILE, Checkpoint, write_checkpoint, write_tensors
from vla_models.origin import copy_tokenizer
from vla_models.published import find_checkpoint
from vla_models.torch_policy import TorchPolicy


def convert(path: str | Path, out: Path, settings: Mapping[str, Any] | None = None) -> TorchPolicy:
    """Write the checkpoint `path` (as `vla_models.load` takes it) into the folder `out`; returns its policy.

    settings: of a published one, on top of its config.json. Raises CheckpointError.
    """
    found = find_checkpoint(path)
    policy = load(found, settings=settings)
    spec = copy_tokenizer(policy.spec, found.parent if found.is_file() else found, out)
    normalizers = {"state": policy.processor.state, "action": policy.processor.action}
    facts = {"converted": str(path), "left_out": len(getattr(policy, "left_out", {}))}
    weights = {name: value.float().numpy() if value.is_floating_point() else value.numpy()
               for name, value in policy.network.state_dict().items()}  # fmt: skip
    write_tensors(out / WEIGHTS_FILE, weights)
    write_checkpoint(Checkpoint(spec, normalizers, dataclasses.asdict(policy.config), facts), out)
    return policy


def main(arguments: Sequence[str] | None = None) -> None:
    from vla_models.train import parse_settings

    parser = argparse.ArgumentParser(prog="python -m vla_models.convert", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a folder, the file of its weights, or a name on the Hugging Face hub")
    parser.add_argument("out", type=Path, help="checkpoint folder to write")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="on top of the published config.json")
    given = parser.parse_args(arguments)
    try:
        policy = convert(given.checkpoint, given.out, parse_settings(given.settings))
    except (ValueError, OSError) as error:
        sys.exit(f"convert: {error}")
    for name, why in sorted(getattr(policy, "left_out", {}).items()):
        print(f"left out: {name}: {why}")
    spec = policy.spec
    print(f"{given.out}: recipe {spec.recipe}, arms {list(spec.arms)}, cameras {list(spec.cameras)}")


if __name__ == "__main__":
    main()
