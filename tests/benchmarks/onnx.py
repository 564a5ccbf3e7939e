"""ONNX Runtime against torch eager, the shipped policies, same inputs, same run: time of one chunk.

    ./vla bench onnx [checkpoints:=panda_pick,aloha_transfer,aloha_act] [rounds:=20] [threads:=1,2] [out:=FILE]
                     [precisions:=fp32,int8,fp16,bf16] [provider:=cpu]

Every round runs every combination of policy, guidance, runtime and thread count once, in an order shuffled anew, so
that what else the machine does falls on all alike. Times are wall time of `Policy.run` (encoder and sampler) and its
stages, medians over the rounds; the ratio is torch's median by ONNX Runtime's at the same thread count. Largest
difference of the normalised actions of both runtimes in the last column but one, relative error in the last.

precisions: fp32 (the default) and variants of vla_models.precision, which are made where they are missing, in a copy,
and whose sizes and errors as measured by the export come in a table of their own. On the CPU fp16 and bf16 are
emulated: their times say nothing of a GPU.

A shipped checkpoint is a folder of models/checkpoints/ (or a path). One that is not there is replaced by random
weights of the default size, and the table says so.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

# The name of this file would hide the package "onnx" from the exporter.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import numpy as np
import onnxruntime
import torch
import vla_models
from tqdm import tqdm
from vla_models.checkpoint import Checkpoint, read_checkpoint, write_checkpoint, write_tensors
from vla_models.export import export_checkpoint
from vla_models.normalization import Normalizer
from vla_models.policy import ChunkPrefix, ModelInputs, Policy, PolicySpec
from vla_models.precision import Error, make_variant
from vla_models.train import make_spec, make_train_config

ROOT = Path(__file__).resolve().parents[2]
#: Shipped checkpoint -> recipe and robot, for the stand-in.
STAND_INS = {"panda_pick": ("flow", "panda"), "aloha_transfer": ("flow", "aloha"), "aloha_act": ("act", "aloha")}


def find_checkpoint(name: str, scratch: Path) -> tuple[Path, bool]:
    """The folder of a checkpoint with its graphs, and whether it is a stand-in with random weights."""
    folder = Path(name) if Path(name).is_dir() else ROOT / "models" / "checkpoints" / name
    if (folder / "onnx").is_dir():
        return folder, False
    stand_in = not folder.is_dir()
    if stand_in:
        if name not in STAND_INS:
            raise SystemExit(f"checkpoint: expected a folder or one of {list(STAND_INS)}, found {name!r}")
        folder = scratch / name
        recipe, robot = STAND_INS[name]
        write_stand_in(make_spec(make_train_config(recipe, {"robot": robot}), recipe, name), folder)
    else:
        folder = copy_weights(folder, scratch / folder.name)
    print(f"exporting {name} ...", file=sys.stderr)
    export_checkpoint(folder)
    return folder, stand_in


def add_variants(folder: Path, precisions: list[str], scratch: Path) -> Path:
    """The checkpoint, or where a variant is missing a copy of it, with all variants."""
    missing = [name for name in precisions if not (folder / "onnx" / name / "report.json").exists()]
    if missing and scratch not in folder.parents:
        folder = Path(shutil.copytree(folder, scratch / folder.name))
    for name in missing:
        print(f"making {folder.name} in {name} ...", file=sys.stderr)
        make_variant(folder, name, tolerance=float("inf"))
    return folder


def write_stand_in(spec: PolicySpec, folder: Path) -> None:
    """A checkpoint of the default size with random weights."""
    torch.manual_seed(0)
    normalizers = {name: Normalizer("mean_std", np.zeros(dim), np.ones(dim))
                   for name, dim in (("state", spec.state_dim), ("action", spec.action_dim))}  # fmt: skip
    policy = vla_models.build(spec.recipe, {}, spec=spec, normalizers=normalizers)
    generator = np.random.default_rng(0)
    weights = {name: value.numpy() if value.any() else generator.normal(0, 0.05, value.shape).astype(np.float32)
               for name, value in policy.network.state_dict().items()}  # fmt: skip
    write_checkpoint(Checkpoint(spec, normalizers, dataclasses.asdict(policy.config)), folder)
    write_tensors(folder / "model.safetensors", weights)


def copy_weights(source: Path, target: Path) -> Path:
    """Copy a checkpoint that was never exported, so that the export leaves it as it is."""
    target.mkdir()
    for name in ("policy.json", "model.safetensors"):
        (target / name).write_bytes((source / name).read_bytes())
    return target


def make_inputs(spec: PolicySpec, seed: int = 0) -> tuple[ModelInputs, np.ndarray, dict[str, ChunkPrefix | None]]:
    """Random inputs, noise, and what is left of a chunk for each guidance the policy supports."""
    rng = np.random.default_rng(seed)
    images = tuple(rng.random((1, 3, *size), np.float32) for size in spec.cameras.values())
    tokens = rng.integers(1, max(len(spec.vocabulary), 2), (1, spec.context))
    state = rng.normal(size=(1, spec.state_dim)).astype(np.float32)
    noise, target = rng.normal(size=(2, 1, spec.horizon, spec.action_dim)).astype(np.float32)
    weights = np.linspace(1, 0, spec.horizon, dtype=np.float32)
    known = np.arange(spec.horizon)[None] < min(4, spec.prefix_limit)
    ways = {mode: ChunkPrefix(mode, target, weights, known, 5.0) for mode in spec.guidance}
    present = np.ones((1, len(images)), bool)
    return ModelInputs(images, tokens if spec.vocabulary else 0 * tokens, state, present), noise, {"none": None} | ways


@dataclasses.dataclass
class Case:
    """One row: a policy on one runtime under one guidance."""

    policy: Policy
    runtime: str
    threads: int
    guidance: str
    arguments: tuple
    times: list[dict[str, float]] = dataclasses.field(default_factory=list)
    actions: np.ndarray | None = None

    def run(self) -> None:
        """One inference, timed."""
        if self.runtime == "torch":
            torch.set_num_threads(self.threads)
        timings: dict[str, float] = {}
        start = time.perf_counter()
        self.actions = self.policy.run(*self.arguments, timings)
        self.times.append(timings | {"total": time.perf_counter() - start})

    def median_ms(self, stage: str) -> float:
        """Median of one stage, ms; 0 when the policy has no such stage."""
        return 1e3 * float(np.median([times.get(stage, 0.0) for times in self.times]))


def cases_of(folder: Path, threads: list[int], precisions: list[str], provider: str) -> list[Case]:
    """Every combination for one checkpoint."""
    inputs, noise, ways = make_inputs(read_checkpoint(folder).spec)
    network = vla_models.load(folder)
    cases = []
    for count in threads:
        policies = {"torch": network}
        for precision in precisions:
            name = "onnx" if precision == "fp32" else f"onnx {precision}"
            policies[name] = vla_models.load(folder, "onnx", provider, count, precision=precision)
        for guidance, prefix in ways.items():
            for runtime, policy in policies.items():
                cases.append(Case(policy, runtime, count, guidance, (inputs, noise, prefix)))
    return cases


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", default=",".join(STAND_INS), help="names or folders, by commas")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", default="1,2", help="thread counts, by commas")
    parser.add_argument("--precisions", default="fp32", help="fp32, int8, fp16, bf16, by commas")
    parser.add_argument("--provider", default="cpu", help="of ONNX Runtime: cpu, cuda or tensorrt")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    threads = [int(count) for count in args.threads.split(",")]
    precisions = args.precisions.split(",")
    variants = [name for name in precisions if name != "fp32"]
    rows, reports = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: find_checkpoint(name, Path(scratch)) for name in args.checkpoints.split(",")}
        found = {name: (add_variants(folder, variants, Path(scratch)), fake) for name, (folder, fake) in found.items()}
        cases = {name: cases_of(folder, threads, precisions, args.provider) for name, (folder, _) in found.items()}
        flat = [case for group in cases.values() for case in group]
        order = random.Random(0)
        for round_ in tqdm(range(-2, args.rounds), disable=not sys.stderr.isatty()):
            for case in order.sample(flat, len(flat)):
                case.run()
                if round_ < 0:
                    case.times.clear()
        for name, group in cases.items():
            folder, stand_in = found[name]
            rows += [row_of(name, stand_in, case, group) for case in group]
            size = sum(file.stat().st_size for file in (folder / "onnx").glob("*.onnx"))
            for variant in variants:
                reports[name, variant] = json.loads((folder / "onnx" / variant / "report.json").read_text())
            weights = (folder / "model.safetensors").stat().st_size
            print(f"{name}{' (random weights)' if stand_in else ''}: weights {weights / 2**20:.1f} MiB, graphs "
                  f"{size / 2**20:.2f} MiB, horizon {group[0].policy.spec.horizon}, "
                  f"{group[0].policy.spec.steps} integration steps")  # fmt: skip
    print_table(rows)
    print_reports(reports)
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f} at the end")
    facts = {"machine": platform.machine(), "cores": os.cpu_count(), "load": load, "torch": torch.__version__,
             "onnxruntime": onnxruntime.__version__, "rounds": args.rounds, "rows": rows,
             "variants": [{"policy": name, **report} for (name, _), report in reports.items()]}  # fmt: skip
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


def row_of(name: str, stand_in: bool, case: Case, group: list[Case]) -> dict:
    """One row of the table."""
    eager = next(other for other in group if other.runtime == "torch"
                 and (other.threads, other.guidance) == (case.threads, case.guidance))  # fmt: skip
    total = [1e3 * times["total"] for times in case.times]
    return {
        "policy": name, "random_weights": stand_in, "recipe": case.policy.spec.recipe, "guidance": case.guidance,
        "runtime": case.runtime, "threads": case.threads, "encode_ms": case.median_ms("encode"),
        "sample_ms": case.median_ms("sample"), "total_ms": case.median_ms("total"),
        "p90_ms": float(np.percentile(total, 90)), "min_ms": min(total),
        "speedup": eager.median_ms("total") / case.median_ms("total"),
        "difference": float(np.max(np.abs(case.actions - eager.actions))),
        "relative": Error.of(case.actions, eager.actions).relative,
    }  # fmt: skip


def print_table(rows: list[dict]) -> None:
    """Medians in ms."""
    print(f"{'policy':<16}{'guidance':<10}{'threads':>8}{'runtime':>11}{'encode':>9}{'sample':>9}{'total':>9}"
          f"{'p90':>9}{'min':>9}{'speedup':>9}{'difference':>12}{'relative':>10}")  # fmt: skip
    for row in rows:
        print(f"{row['policy']:<16}{row['guidance']:<10}{row['threads']:>8}{row['runtime']:>11}"
              f"{row['encode_ms']:>9.2f}{row['sample_ms']:>9.2f}{row['total_ms']:>9.2f}{row['p90_ms']:>9.2f}"
              f"{row['min_ms']:>9.2f}{row['speedup']:>9.2f}{row['difference']:>12.1e}"
              f"{row['relative']:>10.1e}")  # fmt: skip


def print_reports(reports: dict[tuple[str, str], dict]) -> None:
    """What the export measured of each variant."""
    if reports:
        print(f"{'policy':<16}{'precision':<11}{'weights':>8}{'graphs KiB':>12}{'small products':>16}"
              f"{'worst relative':>16}{'worst cosine':>14}")  # fmt: skip
    for (name, precision), report in reports.items():
        chunks = report["chunks"].values()
        print(f"{name:<16}{precision:<11}{report['weights'] / report['float32']:>8.0%}"
              f"{sum(report['sizes'].values()) / 1024:>12.0f}{report['small']:>10}/{report['products']:<5}"
              f"{max(error['relative'] for error in chunks):>16.1e}"
              f"{min(error['cosine'] for error in chunks):>14.6f}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
