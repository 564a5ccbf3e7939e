"""The policy library: what a chunk of each system costs at least, and how fast it is beside ONNX Runtime and LeRobot.

    ./vla bench models [systems:=pi0,act] [parts:=roofline,cpu,gpu] [gpu:=H200,RTX 4090] [dtype:=bf16] [out:=FILE]
                       [rounds:=10] [threads:=1] [clock:=wall] [lerobot:=/path/to/python]

roofline: at the published size, on the device "meta" (no memory): parameters, arithmetic and memory traffic of a chunk
and the least time that it can take on named GPUs (see vla_models.roofline).

cpu: at a size that a CPU can run in about a second and at which arithmetic, not Python, takes the time: our network in
torch, the same exported to ONNX Runtime, and LeRobot's where it has the system, with the same weights, inputs and
noise. LeRobot 0.6.1 runs in an interpreter of its own (LEROBOT_PYTHONPATH: its PYTHONPATH), which waits while another
side runs. Each round runs every side once, in an order shuffled anew, so that what else the machine does falls on all
alike. Medians and their ratios, of wall time, or with clock:=cpu of the CPU time of a side's process, which a busy
machine disturbs less; and the largest difference of the actions (of tokens: how many differ), without which a
comparison says nothing. A system of which a side cannot be run has "-" there, and the reason stands below the table.

gpu: where torch finds a CUDA device: pi0 at the published size in BF16 with random weights, 3 cameras, 10 steps and
chunks of 50: eager, as a CUDA graph, compiled and as a CUDA graph, and LeRobot's, eager and compiled.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# The names of files here would hide packages ("onnx") from others.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import numpy as np
import torch
import vla_models
from safetensors.numpy import load_file, save_file
from tqdm import tqdm
from vla_models import identity_normalizers, policy_class
from vla_models.checkpoint import Checkpoint, write_checkpoint, write_tensors
from vla_models.export import ExportError, export_checkpoint
from vla_models.parts.key_frames import KeyFramePolicy
from vla_models.policy import ArmState, InferenceRequest, ModelInputs, PolicyError, PolicyObservation, example_spec
from vla_models.published import TensorFiles, fill
from vla_models.roofline import GPUS, WIDTHS, count, example_inputs, floor
from vla_models.sampling import sample_flow
from vla_models.torch_policy import TorchPolicy, velocity_of

WORKER = Path(__file__).with_name("_lerobot.py")
#: Systems that LeRobot has too.
LEROBOT = ("act", "diffusion_policy", "fast_wam", "lingbot_va", "pi0", "pi05", "pi0_fast", "smolvla", "wall_oss")
#: Tokens of an answer that has no length of its own (FAST).
ANSWER = 48
CLOCKS = ("wall", "cpu")
#: A token that no network says, where an answer shall not end before its time.
NEVER = -5


# --------------------------------------------------------------------------------------------------------- roofline
def roofline(systems: list[str], gpus: list[str], dtype: str) -> list[dict[str, Any]]:
    """One row a system with a preset "paper"; prints the table."""
    print(f"""
A chunk at the published size, {dtype}, batch of one: arithmetic, traffic (weights and what passes between stages;
activations inside them apart), and the least time in ms. Text, which is read once an instruction: apart, {gpus[0]}.
""")
    print(f"{'system':<18}{'parameters':>11}{'TFLOP':>9}{'GB':>9}{'act. GB':>9}" + "".join(
        f"{name:>{_wide(name)}}" for name in gpus) + f"{'text':>8}  stages")  # fmt: skip
    rows = []
    for name in systems:
        if "paper" not in policy_class(name).presets:
            continue
        policy = vla_models.build(name, "paper", device="meta")
        stages = count(policy)
        chunk = [stage for stage in stages if not stage.once]
        row = {
            "system": name,
            "parameters": sum(parameter.numel() for parameter in policy.network.parameters()),
            "flops": sum(stage.flops for stage in chunk),
            "bytes": sum(stage.bytes(dtype) for stage in chunk),
            "activation_bytes": sum(stage.activation_bytes(dtype) for stage in chunk),
            "floor_ms": {gpu: 1e3 * floor(stages, GPUS[gpu], dtype) for gpu in gpus},
            "text_ms": {gpu: 1e3 * sum(s.floor(GPUS[gpu], dtype) for s in stages if s.once) for gpu in gpus},
            "stages": [dataclasses.asdict(stage) for stage in stages],
        }
        rows.append(row)
        print(f"{name:<18}{row['parameters'] / 1e6:>9,.1f} M{row['flops'] / 1e12:>9.3f}{row['bytes'] / 1e9:>9.3f}"
              f"{row['activation_bytes'] / 1e9:>9.2f}"
              + "".join(f"{row['floor_ms'][gpu]:>{_wide(gpu)}.2f}" for gpu in gpus)
              + f"{row['text_ms'][gpus[0]]:>8.2f}  "
              + ", ".join(f"{stage.calls} {stage.name}" for stage in chunk), flush=True)  # fmt: skip
    return rows


def _wide(name: str) -> int:
    return max(8, len(name)) + 2


# -------------------------------------------------------------------------------------------------------------- cpu
PALIGEMMA = {
    "vision_width": 256, "vision_mlp": 768, "vision_layers": 4, "vision_heads": 8, "width": 512, "mlp": 2048,
    "layers": 4, "heads": 8, "head_dim": 64, "vocabulary": 1024,
}  # fmt: skip
EXPERT = {"expert_width": 256, "expert_mlp": 1024}
TWO = {"cameras": dict.fromkeys(("base", "wrist"), (112, 112)), "horizon": 50}
WAN = {
    "layers": 4, "heads": 4, "head_size": 96,
    "vae": {"channels": 32, "growth": (1, 2, 2, 2), "blocks": 1},
    "text": {"vocabulary": 259, "width": 256, "layers": 2, "heads": 4, "head": 64, "hidden": 512, "kind": "umt5"},
}  # fmt: skip
QWEN = {
    "vision": {"width": 256, "mlp": 768, "layers": 4, "heads": 4, "patch": 14, "window": 112, "full": (3,)},
    "width": 512, "mlp": 1408, "action_mlp": 512, "layers": 4, "heads": 8, "kv_heads": 2, "head_dim": 64,
    "sections": (8, 12, 12), "vocabulary": 1024, "numbers": 20, "state_numbers": 20, "image_token": 4,
    "state_token": 5, "tied": False,
}  # fmt: skip
QWEN_CAMERAS = {"cameras": {"face_view": (196, 252), "wrist_view": (196, 196)}, "horizon": 32, "context": 96}
GEMMA = {
    "language": {"model_type": "gemma", "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 2048,
                 "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64},
    "vision": {"model_type": "siglip_vision_model", "hidden_size": 256, "intermediate_size": 768,
               "num_hidden_layers": 4, "num_attention_heads": 8, "patch_size": 14, "vision_use_head": False},
    "start": 2, "end": 2,
}  # fmt: skip
PRISMATIC = {"dino": (256, 4, 4, 768), "siglip": (256, 4, 4, 768), "language": (512, 4, 8, 1408), "vocabulary": 580,
             "text": 516, "space": 35, "stop": 2}  # fmt: skip
T5 = {"vocabulary": 259, "width": 256, "layers": 2, "heads": 4, "head": 64, "hidden": 512}
#: System -> settings of the network, and fields of the specification, on top of the recipe's contract.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "act": (
        {"width": 256, "heads": 8, "feedforward": 1024, "encoder_layers": 4, "posterior_layers": 2,
         "backbone": "resnet18", "dropout": 0.0},
        {"cameras": {"top": (240, 320)}, "horizon": 100, "arms": {"left": 6, "right": 6}},
    ),
    "diffusion_policy": (
        {"channels": (128, 256, 512), "crop": (84, 84), "shared": True, "sampler": "ddim"},
        {"cameras": {"scene": (96, 96)}, "horizon": 15, "steps": 10},
    ),
    "fast_wam": (
        {**WAN, "video_width": 384, "video_hidden": 1024, "action_width": 256, "action_hidden": 1024},
        {"cameras": dict.fromkeys(("scene", "wrist"), (96, 96)), "context": 64, "prompt": "{task}"},
    ),
    "flow": ({}, {"cameras": dict.fromkeys(("scene", "wrist"), (96, 128)), "horizon": 32}),
    "gr2": (
        {"width": 256, "layers": 4, "heads": 4, "text_width": 256, "text_layers": 2, "text_heads": 4,
         "vocabulary": 259, "vq_channels": 32, "vq_blocks": 1, "head_width": 256, "head_layers": 2, "head_heads": 4,
         "feedforward": 512, "dropout": 0.0},
        {"cameras": {"scene": (64, 64), "wrist": (64, 64)}, "horizon": 10, "history": 4, "context": 32},
    ),
    "lingbot_va": (
        {**WAN, "hidden": 1024, "action_width": 10, "channels": (0, 2, 3, 4, 5, 6, 8), "frames": 2, "video_steps": 5},
        {"cameras": dict.fromkeys(("scene", "wrist"), (64, 64)), "horizon": 8, "history": 8, "future": 8, "steps": 10,
         "context": 32, "arms": {"arm": 6}},
    ),
    "octo": (
        {"width": 384, "layers": 6, "heads": 6, "mlp": 1024, "window": 2, "text": {**T5, "kind": "t5"}},
        {"cameras": {"primary": (128, 128), "wrist": (64, 64)}, "horizon": 4, "history": 2},
    ),
    "openvla": (PRISMATIC, {"cameras": {"scene": (112, 112)}, "horizon": 1, "context": 80}),
    "openvla_oft": (PRISMATIC, {"cameras": {"scene": (112, 112)}, "horizon": 8, "context": 80}),
    "pi0": ({**PALIGEMMA, **EXPERT}, TWO),
    "pi05": ({**PALIGEMMA, **EXPERT}, TWO | {"context": 96}),
    "pi06": (
        {**PALIGEMMA, **EXPERT, "kv_heads": 4, "pool": 2},
        TWO | {"context": 128, "cameras": dict.fromkeys(("base", "wrist"), (224, 224))},
    ),
    "pi0_fast": (
        {**PALIGEMMA, "skip": 16, "lead": (68, 61), "end": (127, 2), "length": ANSWER, "free": True,
         "start_seen": True, "tied": False},
        TWO | {"context": 96},
    ),
    "rdt": (
        {"width": 384, "layers": 8, "heads": 6, "context": 64, "text": {**T5, "kind": "t5-v1.1"}, "vision_width": 256,
         "vision_mlp": 768, "vision_layers": 4, "vision_heads": 4},
        {"cameras": dict.fromkeys(("scene", "wrist"), (112, 112)), "horizon": 64, "context": 32},
    ),
    "rt1": ({}, {"cameras": {"scene": (160, 160)}, "horizon": 1}),
    "rt2": (GEMMA, {"cameras": {"scene": (112, 112)}, "horizon": 1}),
    "rth": (GEMMA, {"cameras": {"scene": (112, 112)}, "horizon": 1, "context": 128}),
    "smolvla": (
        {"width": 384, "mlp": 1024, "heads": 6, "kv_heads": 2, "layers": 4, "vocabulary": 1024, "expert_width": 288,
         "expert_mlp": 768, "vision_width": 256, "vision_mlp": 768, "vision_layers": 4, "vision_heads": 4,
         "freeze": False},
        {"cameras": dict.fromkeys(("scene", "wrist"), (256, 256))},
    ),
    "wall_oss": (QWEN, QWEN_CAMERAS),
    "wall_oss_fast": (
        {**QWEN, "first": 259, "start": 13, "end": (2, 13), "length": 160}, QWEN_CAMERAS | {"horizon": 8},
    ),
}  # fmt: skip


class FixedAnswer:
    """In place of an answer whose length depends on what a network with random weights says: ANSWER tokens, any."""

    length = ANSWER

    def __init__(self, vocabulary: int):
        self._any = np.ones(vocabulary, bool)

    def allowed(self, tokens: list[int]) -> np.ndarray | None:
        return self._any if len(tokens) < ANSWER else None

    def decode(self, tokens: list[int]) -> np.ndarray:
        return np.array(tokens, np.float64)


def small_policy(name: str, seed: int = 0) -> TorchPolicy:
    """A policy of the size of SIZES with random weights, none of them zero."""
    kind = policy_class(name)
    settings, fields = SIZES[name]
    tiny, _ = kind.preset("tiny")
    common = {"arms": {arm: len(tiny.joints[arm]) for arm in tiny.arms}} if all(tiny.joints.values()) else {}
    contract = dict(kind.contract) | {"action_space": tiny.action_space} if tiny.action_space.kind == "pose" else {
        **kind.contract}  # fmt: skip
    tokenizer = {} if tiny.tokenizer == "words" else {"tokenizer": "bytes", "padding": tiny.padding}
    spec = example_spec(name, **{**contract, **common, **tokenizer, **fields, "guidance": (), "prefix_limit": 0})
    torch.manual_seed(seed)
    policy = kind(spec, identity_normalizers(spec), settings)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.02)
    return policy


def make_inputs(policy: TorchPolicy, seed: int = 0) -> tuple[ModelInputs, np.ndarray]:
    """Random images, text, state and noise."""
    spec, rng = policy.spec, np.random.default_rng(seed)
    blank = example_inputs(policy)
    # Whole levels, as cameras give them.
    images = tuple((rng.integers(0, 256, image.shape) / 255).astype(np.float32) for image in blank.images)
    if spec.reads_instruction and "wall_oss" in spec.recipe:  # marks of images and state stand inside the text
        words = [8, *(token for _ in images for token in (6, 4, 7)), *rng.integers(8, 259, 40), 5, 9]
        tokens = np.array([words + [spec.padding] * (spec.context - len(words))])
    elif spec.tokenizer == "words":
        tokens = np.zeros((1, spec.context), np.int64)
    else:
        tokens = policy.processor.tokens("pick up the red cube", np.zeros(spec.state_dim))[None]
    state = rng.uniform(-1, 1, blank.state.shape).astype(np.float32)
    noise = rng.standard_normal(policy.noise_shape).astype(np.float32)
    return ModelInputs(images, tokens.astype(np.int64), state, blank.present.numpy()), noise


class Side:
    """One way to run a chunk: `run` gives the actions. times: s, wall and CPU time of each round."""

    def __init__(self, run: Callable[[], np.ndarray]):
        self._run = run
        self.times: list[tuple[float, float]] = []
        self.actions: np.ndarray | None = None

    def run(self) -> None:
        start, busy = time.perf_counter(), time.process_time()
        self.actions = self._run()
        self.times.append((time.perf_counter() - start, time.process_time() - busy))

    def median(self, clock: str) -> float:
        """Of all rounds, s. clock: one of CLOCKS."""
        return float(np.median([times[CLOCKS.index(clock)] for times in self.times]))


class LeRobotSide(Side):
    """LeRobot's policy in its own process, which tells how long a chunk took."""

    def __init__(self, python: str, folder: Path):
        super().__init__(lambda: np.empty(0))
        self.folder, self.log = folder, (folder / "lerobot.log").open("w+")
        environment = {**os.environ, "PYTHONPATH": os.environ.get("LEROBOT_PYTHONPATH", "")}
        self.process = subprocess.Popen(
            [python, str(WORKER), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True, env=environment,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> str:
        line = self.process.stdout.readline().strip()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(
                f"LeRobot's side failed: {(self.log.read().strip().splitlines() or ['it said nothing'])[-1]}"
            )
        return line

    def _ask(self, what: str) -> str:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def run(self) -> None:
        wall, busy = map(float, self._ask("run").split())
        self.times.append((wall, busy))

    def fetch(self) -> None:
        """The actions of the last chunk."""
        self._ask("actions")
        self.actions = load_file(self.folder / "actions.safetensors")["actions"]

    def close(self) -> None:
        self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.process.kill()
        self.log.close()


@contextmanager
def lerobot_side(python: str, folder: Path, task: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
                 ) -> Iterator[LeRobotSide]:  # fmt: skip
    """LeRobot's policy for a task (see _lerobot.py), ready to run."""
    (folder / "task.json").write_text(json.dumps(task))
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "inputs.safetensors")
    side = LeRobotSide(python, folder)
    try:
        yield side
    finally:
        side.close()


def task_of(policy: TorchPolicy, threads: int, **more: Any) -> dict[str, Any]:
    """What _lerobot.py has to know."""
    network = dataclasses.asdict(policy.config)
    if hasattr(policy.network, "channels") and "channels" in network:
        network["channels"] = list(network["channels"] or policy.network.channels)
    return {"recipe": policy.spec.recipe, "network": network, "spec": policy.spec.to_dict(), "threads": threads,
            "action_dim": policy.spec.action_dim, "device": "cpu", "dtype": "float32", "compile": "", "weights": True,
            "answer": ANSWER, "stop": NEVER} | more  # fmt: skip


def named(policy: TorchPolicy, inputs: ModelInputs, noise: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs by the names that _lerobot.py knows."""
    images = {f"image_{name}": image for name, image in zip(policy.spec.cameras, inputs.images, strict=True)}
    first = noise[:1] if noise.ndim == 3 and policy.spec.recipe == "diffusion_policy" else noise
    return images | {"tokens": inputs.tokens, "state": inputs.state, "noise": first}


class Episode:
    """Two chunks of an episode of a policy that remembers, with pictures in between; the second one's actions."""

    def __init__(self, policy: TorchPolicy, seed: int = 0):
        spec, loop, rng = policy.spec, policy.loop, np.random.default_rng(seed)
        self.loop, self.spec = loop, spec
        first = (loop.frames - 1) * loop.frame_actions
        self.pictures = {name: rng.integers(0, 256, (first + 1, *size, 3), np.uint8)
                         for name, size in spec.cameras.items()}  # fmt: skip
        arms = {arm: ArmState(np.zeros(len(spec.joints[arm])), np.array([0.4, 0, 0.3, 1, 0, 0, 0]), 0.5)
                for arm in spec.arms}  # fmt: skip
        self.ticks = [
            PolicyObservation(
                {name: frames[n] for name, frames in self.pictures.items()}, arms, "pick", n * spec.period
            )
            for n in range(first + 1)
        ]

    def run_of(self, policy: Any) -> Callable[[], np.ndarray]:
        """The episode, on one runtime."""
        said: list[np.ndarray] = []
        run = policy.run
        policy.run = lambda *arguments: said.append(run(*arguments)) or said[-1]

        def episode() -> np.ndarray:
            said.clear()
            policy.reset()
            policy.infer(self.ticks[0], InferenceRequest(seed=0))
            for tick in self.ticks[1:-1]:
                policy.observe(tick)
            policy.infer(self.ticks[-1], InferenceRequest(seed=1))
            return said[-1]

        return episode

    def tensors(self, policy: TorchPolicy) -> dict[str, np.ndarray]:
        """Pictures, texts and noise as _lerobot.py wants them."""
        loop, state = self.loop, np.zeros(self.spec.state_dim)
        values = {f"pictures_{name}": frames.transpose(0, 3, 1, 2).astype(np.float32) / 255
                  for name, frames in self.pictures.items()}  # fmt: skip
        texts = [policy.processor.tokens(text, state) for text in ("pick", "")]
        values |= {"tokens": np.stack(texts), "state": state[None].astype(np.float32)}
        for chunk in range(2):
            noise = np.random.default_rng(chunk).standard_normal(policy.noise_shape).astype(np.float32)
            horizon, count = self.spec.horizon, loop.frames * loop.tokens * loop.numbers
            actions = noise[0, :horizon].reshape(1, loop.frames, loop.frame_actions, -1)
            values[f"action_noise{chunk}"] = actions.transpose(0, 3, 1, 2)[..., None]
            video = noise[0, horizon:].ravel()[:count]
            # Tokens of 2 x 2 latents each, back to the picture.
            video = video.reshape(1, loop.frames, loop.rows, loop.columns, -1, 2, 2).transpose(0, 4, 1, 2, 5, 3, 6)
            values[f"video_noise{chunk}"] = video.reshape(1, -1, loop.frames, 2 * loop.rows, 2 * loop.columns)
        return values


def compare(name: str, python: str, rounds: int, threads: int, clock: str, folder: Path) -> dict[str, Any]:
    """One row of the table of CPU-sized policies."""
    folder.mkdir()
    policy, notes = small_policy(name), []
    row: dict[str, Any] = {"system": name, "parameters": sum(p.numel() for p in policy.network.parameters())}
    if isinstance(policy, KeyFramePolicy):
        episode = Episode(policy)
        tensors, run_of = episode.tensors(policy), episode.run_of
    else:
        inputs, noise = make_inputs(policy)
        tensors = named(policy, inputs, noise)

        def run_of(policy: Any) -> Callable[[], np.ndarray]:
            fixed_length(policy)
            return lambda: policy.run(inputs, noise, None, {})

    with _lerobot_if_there(name, python, folder, task_of(policy, threads), tensors, notes) as theirs:
        if theirs is not None:
            fill(policy.network, TensorFiles(folder / "reference.safetensors"), type(policy).published)
        exported = export(policy, threads, folder, notes)
        sides = {"torch": Side(run_of(policy))}
        if exported is not None:
            sides["onnx"] = Side(run_of(exported))
        if theirs is not None:
            sides["lerobot"] = theirs
        order, names = random.Random(0), list(sides)
        for round_ in tqdm(range(-2, rounds), desc=name, leave=False, disable=not sys.stderr.isatty()):
            for side in order.sample(names, len(names)):
                sides[side].run()
                if round_ < 0:
                    sides[side].times.clear()
        if theirs is not None:
            theirs.fetch()
    own = sides["torch"].actions
    for side, value in sides.items():
        row[f"{side}_ms"] = 1e3 * value.median(clock)
        row[f"{side}_times_ms"] = [[round(1e3 * seconds, 3) for seconds in times] for times in value.times]
        if side != "torch":
            row[f"{side}_difference"] = difference(own, value.actions, name)
    return row | {"notes": notes}


@contextmanager
def _lerobot_if_there(name: str, python: str, folder: Path, task: Mapping[str, Any],
                      tensors: Mapping[str, np.ndarray], notes: list[str]) -> Iterator[LeRobotSide | None]:  # fmt: skip
    if not python or name not in LEROBOT:
        yield None
        return
    try:
        with lerobot_side(python, folder, task, tensors) as side:
            yield side
    except RuntimeError as error:
        notes.append(str(error))
        raise


def fixed_length(policy: Any) -> None:
    """Let a policy that answers in FAST tokens say ANSWER of them."""
    holder = getattr(policy, "network", policy)
    if policy.spec.recipe.endswith("_fast"):
        holder.answer = FixedAnswer(holder.answer.vocabulary)


def export(policy: TorchPolicy, threads: int, folder: Path, notes: list[str]) -> Any:
    """The same policy on ONNX Runtime; None where it cannot be exported."""
    checkpoint = folder / "checkpoint"
    values = identity_normalizers(policy.spec)
    write_checkpoint(Checkpoint(policy.spec, values, dataclasses.asdict(policy.config)), checkpoint)
    write_tensors(checkpoint / "model.safetensors", {k: v.numpy() for k, v in policy.network.state_dict().items()})
    try:
        export_checkpoint(checkpoint, tolerance=1e-4)
        return vla_models.load(checkpoint, runtime="onnx", threads=threads)
    except (ExportError, PolicyError) as error:
        notes.append(f"ONNX: {error}")
        return None


def difference(ours: np.ndarray, theirs: np.ndarray, name: str) -> float:
    """Largest difference of actions, or how many tokens differ. One side may have filled up the actions with zeros."""
    if name.endswith("_fast"):
        return float((ours.ravel() != theirs.ravel()[: ours.size]).sum())
    width = min(ours.shape[-1], theirs.shape[-1])
    return float(np.max(np.abs(ours[..., :width] - theirs[..., :width])))


def cpu(systems: list[str], python: str, rounds: int, threads: int, clock: str) -> list[dict[str, Any]]:
    """All rows; prints the table."""
    torch.set_num_threads(threads)
    print(f"""
A chunk at a size for a CPU, float32, threads: {threads}, medians of {rounds} rounds in ms of {clock} time.
LeRobot: {python or "not given (lerobot:=PYTHON), skipped"}
""")
    print(f"{'system':<18}{'parameters':>11}{'torch':>10}{'ONNX':>10}{'LeRobot':>10}{'LeRobot/torch':>15}"
          f"{'LeRobot/ONNX':>14}{'torch/ONNX':>12}{'ONNX differs':>14}{'LeRobot differs':>17}")  # fmt: skip
    rows, notes = [], []
    for name in systems:
        if name not in SIZES:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            try:
                row = compare(name, python, rounds, threads, clock, Path(scratch) / name)
            except Exception as error:  # one system's fault leaves the others their rows
                notes.append(f"{name}: {type(error).__name__}: {error}")
                continue
        rows.append(row)
        notes += [f"{name}: {note}" for note in row["notes"]]
        torch_ms, onnx_ms, theirs = (row.get(f"{side}_ms") for side in ("torch", "onnx", "lerobot"))
        cells = [_number(torch_ms, 10, 1), _number(onnx_ms, 10, 1), _number(theirs, 10, 1),
                 _ratio(theirs, torch_ms, 15), _ratio(theirs, onnx_ms, 14), _ratio(torch_ms, onnx_ms, 12),
                 _small(row.get("onnx_difference"), 14), _small(row.get("lerobot_difference"), 17)]  # fmt: skip
        print(f"{name:<18}{row['parameters'] / 1e6:>9.1f} M{''.join(cells)}", flush=True)
    for note in notes:
        print(f"  {note}")
    return rows


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def _ratio(a: float | None, b: float | None, width: int) -> str:
    return _number(None if a is None or b is None else a / b, width, 2)


def _small(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.1e}"


# -------------------------------------------------------------------------------------------------------------- gpu
def gpu(python: str, rounds: int, mode: str) -> list[dict[str, Any]]:
    """pi0 at the published size in BF16 on a CUDA device; prints the table."""
    if not torch.cuda.is_available():
        print("\nGPU: skipped: torch finds no CUDA device")
        return []
    print(f"""
pi0 at the published size on {torch.cuda.get_device_name()}: BF16, random weights, 3 cameras, 10 steps, chunks of 50, ms
""")
    rows: list[dict[str, Any]] = []

    def measure(way: str, times: Callable[[], list[float]]) -> None:
        try:
            row = {"times_ms": times()[3:]}
            row["median_ms"] = float(np.median(row["times_ms"]))
            print(f"{way:<28}{row['median_ms']:>9.2f}", flush=True)
        except Exception as error:  # whatever a compiler, a capture or the other side cannot do
            row = {"error": f"{type(error).__name__}: {error}"[:300]}
            print(f"{way:<28}{'-':>9}  {row['error'].splitlines()[0]}", flush=True)
        rows.append({"way": way, **row})

    task, tensors = _gpu_ours(rounds + 3, mode, measure)
    torch.cuda.empty_cache()

    def theirs(compile_mode: str) -> list[float]:
        with tempfile.TemporaryDirectory() as scratch:
            with lerobot_side(python, Path(scratch), {**task, "compile": compile_mode}, tensors) as side:
                for _ in range(rounds + 3):
                    side.run()
                return [1e3 * wall for wall, _ in side.times]

    if not python:
        print("LeRobot: not given (lerobot:=PYTHON), skipped")
        return rows
    measure("LeRobot, eager", lambda: theirs(""))
    measure("LeRobot, compiled", lambda: theirs("max-autotune"))
    return rows


@torch.no_grad()
def _gpu_ours(
    rounds: int, mode: str, measure: Callable[[str, Callable[[], list[float]]], None]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Our ways to run pi0, and what LeRobot's side has to know."""
    policy = vla_models.build("pi0", "paper", device="cuda")
    network = policy.network.to(torch.bfloat16)
    inputs, noise = make_inputs(policy)
    given, start = policy.tensors(inputs), torch.from_numpy(noise).cuda()

    def chunk(encode: Callable, velocity: Callable) -> Callable[[], torch.Tensor]:
        network_of = SimpleNamespace(velocity=velocity)
        return lambda: sample_flow(velocity_of(network_of, encode(given)), start, policy.steps)

    def timed(make: Callable[[], Callable[[], Any]]) -> list[float]:
        run, times = make(), []
        for _ in range(rounds):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        return times

    def graph(run: Callable[[], torch.Tensor]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=stream):
            run()
        return captured.replay

    def compiled() -> Callable[[], torch.Tensor]:
        options = {"mode": mode, "dynamic": False}
        return chunk(torch.compile(network.encode, **options), torch.compile(network.velocity, **options))

    eager = chunk(network.encode, network.velocity)
    measure("eager", lambda: timed(lambda: eager))
    measure("CUDA graph", lambda: timed(lambda: graph(eager)))
    measure("compiled, CUDA graph", lambda: timed(lambda: graph(compiled())))
    return task_of(policy, 1, device="cuda", dtype="bfloat16", weights=False), named(policy, inputs, noise)


# ------------------------------------------------------------------------------------------------------------- main
def chosen(given: str, known: list[str], what: str) -> list[str]:
    """Names by commas, of those that are known (in small letters too); empty: all of them."""
    if not given:
        return known
    names = {name.lower(): name for name in known}
    picked = [part.strip().lower() for part in given.split(",")]
    if unknown := [part for part in picked if part not in names]:
        raise SystemExit(f"{what}: expected among {known}, found {unknown}")
    return [names[part] for part in picked]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default="", help="recipes by commas (default all)")
    parser.add_argument("--parts", default="", help="of roofline, cpu, gpu (default all)")
    parser.add_argument("--gpu", default="", help="names for the roofline, by commas (default all known)")
    parser.add_argument("--dtype", default="bf16", choices=sorted(WIDTHS), help="for the roofline")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of each side on the CPU")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="what the medians on the CPU are of")
    parser.add_argument("--lerobot", default="", help="Python of an environment with LeRobot 0.6.1")
    parser.add_argument("--compile", default="max-autotune-no-cudagraphs", help="mode of torch.compile on the GPU")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args(argv)
    systems = chosen(given.systems, [n for n in vla_models.list_policies() if n in vla_models.RECIPES], "systems")
    parts = chosen(given.parts, ["roofline", "cpu", "gpu"], "parts")
    gpus = chosen(given.gpu, list(GPUS), "gpu")
    facts: dict[str, Any] = {
        "benchmark": "models", "machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
        "rounds": given.rounds, "threads": given.threads, "clock": given.clock, "dtype": given.dtype,
    }  # fmt: skip
    if "roofline" in parts:
        facts["roofline"] = roofline(systems, gpus, given.dtype)
    if "cpu" in parts:
        facts["cpu"] = cpu(systems, given.lerobot, given.rounds, given.threads, given.clock)
        facts["load"] = os.getloadavg()[0]
        print(f"{os.cpu_count()} cores, load {facts['load']:.1f} at the end")
    if "gpu" in parts:
        facts["gpu"] = gpu(given.lerobot, given.rounds, given.compile)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
