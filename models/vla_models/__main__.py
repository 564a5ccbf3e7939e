"""`python -m vla_models` (or `./vla models`): the systems of the library and what each supports, as a table."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from typing import Any

from vla_models import RECIPES, list_policies, policy_class
from vla_models.export import head_class
from vla_models.published import FORMATS, SIGNS, VARIANTS
from vla_models.remote import REMOTE


def facts(name: str) -> dict[str, Any]:
    """What a recipe supports, in plain types.

    title: first sentence of its module. head: how actions come about. parameters: of the preset "paper", 0 without
    one. guidance: kinds of real-time chunking. history: observations it looks at. text: how it reads. runtimes.
    published: kinds of foreign checkpoints that `vla_models.load` reads.
    """
    kind = policy_class(name)
    spec, _ = kind.preset("tiny")
    size = 0
    if "paper" in kind.presets:
        from vla_models import build

        size = sum(parameter.numel() for parameter in build(name, "paper", device="meta").network.parameters())
    return {
        "recipe": name,
        "title": (inspect.getmodule(kind).__doc__ or "").strip().split("\n")[0].rstrip("."),
        "head": head(kind),
        "parameters": size,
        "guidance": list(spec.guidance),
        "history": spec.history,
        "text": "" if not spec.reads_instruction and spec.tokenizer == "words" else spec.prompt,
        "runtimes": ["torch", "onnx"] if exportable(kind) else ["torch"],
        "published": formats(name),
    }


def formats(name: str) -> list[str]:
    """The kinds of published checkpoints that a recipe reads: the type that config.json says, or the system's name."""
    said = {said for said, recipe in FORMATS.items() if recipe == name}
    said |= {said for said, others in VARIANTS.items() if name in dict(others).values()}
    return sorted(said | ({name} & SIGNS.keys()))


def head(kind: type) -> str:
    """How actions come about: the name of the base class that samples them."""
    bases = (base.__name__ for base in kind.__mro__ if base.__name__.endswith("Policy"))
    names = {"OnePassPolicy": "one pass", "FlowPolicy": "flow", "DenoisingPolicy": "diffusion", "TokenPolicy": "tokens",
             "KeyFramePolicy": "two flows"}  # fmt: skip
    return next((names[base] for base in bases if base in names), "own")


def exportable(kind: type) -> bool:
    """Whether `vla_models.export` knows the graphs of a recipe."""
    return head_class(kind) is not None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(arguments)
    if given.json:
        print(json.dumps([facts(name) for name in list_policies()], indent=1))
        return 0
    print(f"{'recipe':18}{'head':10}{'parameters':>11}  {'guidance':15}{'runtimes':13}{'reads published':24}")
    for name in list_policies():
        f = facts(name)
        size = f"{f['parameters'] / 1e6:,.1f} M" if f["parameters"] else "-"
        columns = (", ".join(f[key]) or "-" for key in ("guidance", "runtimes", "published"))
        guidance, runtimes, published = columns
        print(f"{name:18}{f['head']:10}{size:>11}  {guidance:15}{runtimes:13}{published:24}", flush=True)
    for name in REMOTE:
        print(f"{name:18}{'remote':10}{'-':>11}  {'-':15}{'remote':13}{'a policy server':24}")
    own = len(RECIPES)
    print(f"{own} recipes of this package; {len(list_policies()) - own} of others")
    return 0


if __name__ == "__main__":
    sys.exit(main())
