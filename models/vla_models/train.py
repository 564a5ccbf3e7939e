"""Train a policy from recorded bags.

    python -m vla_models.train --recipe flow --data bags/pick --out models/checkpoints/panda_pick --minutes 50
    python -m vla_models.train --recipe act --data bags/transfer --out checkpoints/aloha robot=aloha batch=16
    python -m vla_models.train --recipe pi0 --network tiny --data bags/pick --out models/checkpoints/small
    python -m vla_models.train --init lerobot/pi0_base --data bags/pick --out models/checkpoints/pi0_pick
    python -m vla_models.train --resume --data bags/pick --out models/checkpoints/panda_pick --minutes 80

A training begins with random weights, of the sizes of a preset with --network, or with the weights of a checkpoint
with --init: a folder, or a name on the Hugging Face hub (see vla_models.origin). Settings are given as key=value
(values in YAML; nested ones as network.samples=4) or in a file by --config, on top of the recipe's own defaults and
those of where it begins; see TrainConfig. Writes into --out: policy.json and model.safetensors (moving average of the
weights: what is used), train_state.safetensors (to resume), training.jsonl (one line an interval) and training.png.
Ctrl-C saves and ends. --resume goes on from there: recipe, settings, network, seed and length of the training are the
checkpoint's; the length may be given anew, and the settings in RESUMABLE.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

# Threads that wait must not spin: a training often shares its cores. Read when torch loads its OpenMP runtime.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import yaml
from torch import Tensor
from vla_core.actions import ActionSpace
from vla_core.robot import load_robot

from vla_models import build, policy_class
from vla_models.checkpoint import (
    WEIGHTS_FILE,
    Checkpoint,
    read_checkpoint,
    read_tensors,
    write_atomically,
    write_checkpoint,
    write_tensors,
)
from vla_models.data import Dataset, WebData, action_chunks, fit_normalizers, split, vocabulary
from vla_models.episodes import Episode, load_episodes
from vla_models.origin import KEPT, Origin, find_origin, place_cameras, preset_origin
from vla_models.policy import ASPECT_TOLERANCE, CheckpointError, PolicyError, PolicySpec
from vla_models.preprocess import Processor
from vla_models.torch_policy import Batch, Inputs, TorchPolicy

STATE_FILE = "train_state.safetensors"
LOG_FILE = "training.jsonl"
PLOT_FILE = "training.png"
#: Settings that may change when a training is resumed: they decide how it goes on. All others decide what the policy
#: is, or which episodes are held out, and stay.
RESUMABLE = ("batch", "lr", "warmup", "decay", "clip", "average", "shift", "jitter", "interval", "web")
#: Optimisation steps of a training that is told no length.
STEPS = 20_000


@dataclass(frozen=True)
class TrainConfig:
    """What to train and how. Recipes state their own defaults (`TorchPolicy.training`).

    name: of the policy; empty: the folder's. robot: its description. cameras: camera -> [height, width] in pixels;
    empty: all of the robot's, 96 high. fit: how images of another shape come to that size (see PolicySpec); empty:
    stretched where they have nearly that shape, otherwise padded. state, kind, reference, frame, rotation, gripper,
    horizon, period, steps, guidance, prefix_limit, temperature: see PolicySpec and ActionSpace. batch: samples a
    step. lr: peak of the cosine schedule; warmup: its first steps, rising from 0. decay: weight decay. clip:
    largest gradient norm. average: decay of the moving average of the weights. shift: random shift of images,
    pixels. jitter: random change of brightness, contrast and colour, as a part of 1. validation: part of the
    episodes held out. interval: steps between two log lines with validation. web: pictures with questions and
    answers to train on beside the robot's data (see vla_models.data.WebData), for recipes that take them. network:
    the recipe's configuration.
    """

    name: str = ""
    robot: str = "panda"
    cameras: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    state: str = "pose"
    kind: str = "pose"
    reference: str = "chunk"
    frame: str = "base"
    rotation: str = "rotvec"
    gripper: tuple[float, float] = (0.0, 1.0)
    horizon: int = 32
    period: float = 0.05
    steps: int = 1
    fit: str = ""
    guidance: Sequence[str] = ()
    prefix_limit: int = 0
    temperature: float = 1.0
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 300
    decay: float = 1e-3
    clip: float = 1.0
    average: float = 0.999
    shift: int = 2
    jitter: float = 0.2
    validation: float = 0.05
    interval: int = 250
    web: str = ""
    network: Mapping[str, Any] = field(default_factory=dict)


#: Settings that are fields of a specification too. (A shift there is one of flow times, here of pixels.)
SPECIFIED = {f.name for f in dataclasses.fields(TrainConfig)} - {"shift"}


def make_spec(config: TrainConfig, recipe: str, name: str, base: PolicySpec | None = None) -> PolicySpec:
    """The policy's specification (still without a vocabulary) for the robot that `config` names.

    base: that of the policy or preset from which the training goes on; what is no setting is taken from there.
    """
    robot, kind = load_robot(config.robot), policy_class(recipe)
    contract = kind.contract if base is None else {field: getattr(base, field) for field in KEPT}
    kept = {k: v for k, v in contract.items() if k not in SPECIFIED}
    arms = tuple(arm.name for arm in robot.arms)
    cameras = config.cameras
    if not cameras:
        sizes = {c.name: (96, round(96 * c.width / c.height)) for c in robot.cameras}
        cameras = place_cameras(base, robot) if base else sizes
    absent = [] if base is None else [c for c in base.optional if c not in {camera.name for camera in robot.cameras}]
    for camera in cameras:
        if camera not in absent:
            robot.camera(camera)
    shapes = {c.name: c.width / c.height for c in robot.cameras}
    stretched = all(abs(shapes[c] * h / w - 1) <= ASPECT_TOLERANCE for c, (h, w) in cameras.items() if c in shapes)
    if config.kind == "pose":
        space = ActionSpace(arms, "pose", (), config.reference, config.frame, config.rotation, tuple(config.gripper))
    else:
        counts = tuple(len(arm.joints) for arm in robot.arms)
        space = ActionSpace(arms, "joint", counts, config.reference, gripper=tuple(config.gripper))
    spec = PolicySpec(
        name=config.name or name,
        recipe=recipe,
        cameras=cameras,
        arms=arms,
        state=config.state,
        action_space=space,
        horizon=config.horizon,
        period=config.period,
        joints={arm.name: arm.joints for arm in robot.arms},
        guidance=tuple(config.guidance),
        steps=config.steps,
        fit=config.fit or ("stretch" if stretched else "pad"),
        prefix_limit=min(config.prefix_limit, config.horizon - 1),
        temperature=config.temperature,
        robot=config.robot,
        optional=tuple(camera for camera in cameras if camera in absent),
        **kept,
    )
    return spec if base is None or tuple(base.cameras) == tuple(cameras) else kind.for_cameras(spec)


class Trainer:
    """Optimises one policy: AdamW, cosine schedule, moving average of the weights, resumable."""

    def __init__(self, policy: TorchPolicy, train: Dataset, validation: Dataset | None, config: TrainConfig, seed: int):
        self.policy, self.train, self.validation = policy, train, validation
        self.config, self.seed = config, seed
        self.network, self.device = policy.network, policy.device
        self.web = WebData(Path(config.web)) if config.web else None
        if self.web and not hasattr(policy, "web_batch"):
            raise PolicyError(f"web: the recipe {policy.spec.recipe!r} takes no pictures with questions and answers")
        self.average = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        plain = [p for p in self.network.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.decay}, {"params": plain, "weight_decay": 0.0}], lr=config.lr
        )
        self.step = 0
        self.elapsed = 0.0

    def learning_rate(self, progress: float) -> float:
        """Cosine from config.lr to 1 % of it over the training, after a linear warm-up."""
        warm = min(1.0, (self.step + 1) / max(self.config.warmup, 1))
        return self.config.lr * warm * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * min(progress, 1.0))))

    def advance(self, arrays: Mapping[str, np.ndarray], progress: float) -> dict[str, float]:
        """One optimisation step on a batch of `Dataset.draw`; returns its losses. Raises PolicyError (not finite)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        torch.manual_seed(self.seed * 1_000_003 + self.step)  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(progress)
        self.network.train()
        web = (self.policy.web_batch(*self.web.draw(self.config.batch, self.seed, self.step)),) if self.web else ()
        losses = self.network.loss(self.to_batch(arrays, generator), generator, *web)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        if not torch.isfinite(norm):
            raise PolicyError(f"training: step {self.step}: the gradient is not finite; lower lr ({self.config.lr})")
        self.optimizer.step()
        self.step += 1
        decay = min(self.config.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            own = [v for v in self.network.state_dict().values() if v.is_floating_point()]
            mean = [v for v in self.average.values() if v.is_floating_point()]
            torch._foreach_lerp_(mean, own, 1 - decay)
        return {name: value.item() for name, value in losses.items()}

    def validate(self, batches: int = 8) -> dict[str, float]:
        """Mean losses of the averaged weights on batches of the validation episodes, always the same ones."""
        if self.validation is None:
            return {}
        raw = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        self.network.eval()
        sums: dict[str, float] = {}
        with torch.no_grad():
            for i in range(batches):
                chosen = np.random.default_rng([11, i]).integers(len(self.validation), size=self.config.batch)
                generator = torch.Generator().manual_seed(i)
                batch = self.to_batch(self.validation.batch(chosen), None)
                for name, value in self.network.loss(batch, generator).items():
                    sums[name] = sums.get(name, 0.0) + value.item() / batches
        self.network.load_state_dict(raw)
        return sums

    def to_batch(self, arrays: Mapping[str, np.ndarray], generator: torch.Generator | None) -> Batch:
        """Arrays of `Dataset.batch` as tensors on the device; colours are changed when `generator` is given."""
        spec, images, future = self.policy.spec, [], []
        for name in spec.cameras:
            image = arrays[f"camera/{name}"]
            if spec.future:  # changed like what is seen now
                now = image if spec.history > 1 else image[:, None]
                image = np.concatenate([now, arrays[f"future/{name}"]], 1)
            image = torch.from_numpy(np.ascontiguousarray(image)).to(self.device)
            image = image.movedim(-1, -3).float() / 255.0
            image = image if generator is None else jitter(image, self.config.jitter, generator)
            if spec.future:
                future.append(image[:, -spec.future :])
                image = image[:, : -spec.future] if spec.history > 1 else image[:, 0]
            images.append(image)
        names = ("tokens", "state", "present", "actions", "padded")
        tokens, state, present, actions, padded = (torch.from_numpy(arrays[name]).to(self.device) for name in names)
        return Batch(Inputs(tuple(images), tokens, state, present), actions, padded, tuple(future))

    def save(self, folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write the checkpoint and the training's state, each file atomically."""
        write_tensors(folder / WEIGHTS_FILE, _arrays(self.average))
        states = self.optimizer.state_dict()["state"]
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= {f"optimizer.{i}.{key}": value for i, state in states.items() for key, value in state.items()}
        tensors["step"], tensors["elapsed"] = torch.tensor(self.step), torch.tensor(self.elapsed, dtype=torch.float64)
        write_tensors(folder / STATE_FILE, _arrays(tensors))
        write_checkpoint(Checkpoint(self.policy.spec, self._normalizers(), config, facts), folder)

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises CheckpointError."""
        path = folder / STATE_FILE
        tensors = {name: torch.from_numpy(value) for name, value in read_tensors(path, finite=False).items()}
        state = self.optimizer.state_dict()
        state["state"] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, key = rest.partition(".")
                state["state"].setdefault(int(index), {})[key] = value
        try:
            self.network.load_state_dict({n[8:]: v for n, v in tensors.items() if n.startswith("network.")})
            for name, value in self.average.items():
                value.copy_(tensors[f"average.{name}"])
            self.optimizer.load_state_dict(state)
            self.step, self.elapsed = int(tensors["step"]), float(tensors["elapsed"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: not the state of this training: {error}") from error

    def _normalizers(self) -> dict[str, Any]:
        return {"state": self.policy.processor.state, "action": self.policy.processor.action}


def jitter(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """(B, [T,] 3, h, w) in [0, 1]: brightness, contrast, balance of the colours changed, another way each sample."""
    if amount <= 0:
        return image
    draw = (2 * torch.rand(len(image), 5, 1, 1, generator=generator) - 1).to(image.device) * amount
    mean = image.flatten(1).mean(1).reshape(-1, *[1] * (image.ndim - 1))
    if image.ndim == 5:  # all observations of a sample alike
        draw = draw.unsqueeze(1)
    brightness, colours, contrast = draw.split([1, 3, 1], -3)
    gain = (1 + brightness) * (1 + 0.3 * colours)
    return torch.clamp(image * gain + contrast * (image.new_tensor(0.5) - mean), 0.0, 1.0)


def train(
    recipe: str,
    episodes: Sequence[Episode],
    spec: PolicySpec,
    config: TrainConfig,
    out: Path,
    steps: int,
    seed: int = 0,
    minutes: float | None = None,
    resume: bool = False,
    device: str = "cpu",
    stop: Any = lambda: False,
    quiet: bool = False,
    origin: Origin | None = None,
) -> TorchPolicy:
    """Train on `episodes` and write the checkpoint into `out`; returns the policy with the averaged weights.

    steps: optimisation steps. minutes: end after so much time in all (and not by steps), with the schedule fitted to
    it. stop: asked before each step; true saves and ends. origin: what the training begins from.
    """
    from tqdm import tqdm

    training, held = split(episodes, config.validation, seed)
    kinds = policy_class(recipe).normalization
    begun = origin is not None and origin.folder is not None
    if resume:
        saved = read_checkpoint(out)
        _check_resumed(saved, spec, recipe)
        spec, normalizers = saved.spec, saved.normalizers
    else:
        if begun:
            spec = origin.bring_text(spec, out)
        elif spec.tokenizer == "words":
            spec = dataclasses.replace(spec, vocabulary=vocabulary(episodes))
        normalizers = fit_normalizers(training, spec, kinds)
    torch.manual_seed(seed)
    network = config.network
    if not resume:
        network = policy_class(recipe).fitted(network, lambda: action_chunks(training, Processor(spec, normalizers)))
    policy = build(recipe, network, device, spec, normalizers, out)
    if begun:
        origin.fill(policy.network)
    train_set = Dataset(training, policy.processor, config.shift)
    trainer = Trainer(policy, train_set, Dataset(held, policy.processor) if held else None, config, seed)
    if resume:
        trainer.restore(out)
    out.mkdir(parents=True, exist_ok=True)
    log = _open_log(out / LOG_FILE, trainer.step)
    network = dataclasses.asdict(policy.config)
    facts = {
        "episodes": len(training),
        "validation_episodes": len(held),
        "samples": len(train_set),
        "seed": seed,
        "budget": {"steps": steps, "minutes": minutes},
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in policy.network.parameters()),
        "init": saved.facts.get("init", "") if resume else origin.name if begun else "",
        "train": _plain(dataclasses.asdict(config)),
    }
    begin, before = time.monotonic(), trainer.elapsed
    sums: dict[str, float] = {}
    count = 0
    entry: dict[str, float] = {}

    def progress() -> float:
        return trainer.step / steps if minutes is None else trainer.elapsed / (60.0 * minutes)

    def write(final: bool = False) -> None:
        nonlocal sums, count, entry
        if count:
            entry = {
                "step": trainer.step,
                "elapsed": round(trainer.elapsed, 2),
                "lr": trainer.learning_rate(progress()),
            }
            entry |= {f"train_{name}": value / count for name, value in sums.items()}
            entry |= {f"validation_{name}": value for name, value in trainer.validate().items()}
            log.write(json.dumps(entry) + "\n")
            log.flush()
            sums, count = {}, 0
        trainer.save(out, network, facts | {"steps": trainer.step, "minutes": trainer.elapsed / 60, "last": entry})
        if final:
            plot(out)

    pool = ThreadPoolExecutor(1)
    bar = tqdm(
        total=steps if minutes is None else round(60 * minutes),
        initial=0,
        disable=quiet,
        mininterval=2.0,
        unit="step" if minutes is None else "s",
        desc=f"train {spec.name}",
    )
    try:
        ahead = pool.submit(train_set.draw, config.batch, seed, trainer.step)
        while progress() < 1.0 and not stop():
            arrays = ahead.result()
            ahead = pool.submit(train_set.draw, config.batch, seed, trainer.step + 1)
            losses = trainer.advance(arrays, progress())
            trainer.elapsed = before + time.monotonic() - begin
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
            bar.n = trainer.step if minutes is None else min(round(trainer.elapsed), bar.total)
            bar.set_postfix(
                step=trainer.step,
                loss=f"{sums['loss'] / count:.4f}",
                validation=f"{entry.get('validation_loss', float('nan')):.4f}",
                refresh=False,
            )
            bar.update(0)
            if trainer.step % config.interval == 0:
                write()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
    write(final=True)
    log.close()
    policy.network.load_state_dict(trainer.average)
    policy.network.eval()
    return policy


def plot(folder: Path) -> None:
    """Draw training.png from training.jsonl: losses over steps."""
    import io

    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    if not lines:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key in lines[-1]:
        if key.startswith(("train_", "validation_")):
            kind, _, name = key.partition("_")
            axes.plot(
                [line["step"] for line in lines],
                [line.get(key, np.nan) for line in lines],
                "-" if kind == "validation" else "--",
                label=f"{name}, {kind}",
                linewidth=1.2,
            )
    axes.set_yscale("log")
    axes.set_xlabel("optimisation step")
    axes.set_ylabel("loss")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    write_atomically(folder / PLOT_FILE, picture.getvalue())


def make_train_config(recipe: str, values: Mapping[str, Any], origin: Origin | None = None) -> TrainConfig:
    """The recipe's defaults, the origin's settings and `values`, each on top of what is before it.

    Raises PolicyError for unknown settings and for wrong types.
    """
    kind = policy_class(recipe)
    contract = {k: v for k, v in kind.contract.items() if k in SPECIFIED}
    given = {**contract, **kind.training}
    if origin is not None:
        given |= origin.settings
        typed("setting network", values.get("network", {}), Mapping)
        values = {**values, "network": _merged(given["network"], values.get("network", {}))}
    settings = _typed_fields(TrainConfig, given | values)
    network = _typed_fields(kind.Config, settings.get("network", {}), "network.")
    return TrainConfig(**(settings | {"network": network}))


def resumed_config(saved: Checkpoint, values: Mapping[str, Any]) -> TrainConfig:
    """The settings that `saved` was trained with; of `values` those in RESUMABLE may differ.

    Raises CheckpointError for another one that differs, and for a checkpoint that does not say how it was trained.
    """
    recipe = saved.spec.recipe
    if not saved.facts.get("train"):
        raise CheckpointError(f"checkpoint {saved.folder}: expected the settings of its training, found none")
    kept = {**saved.facts["train"], "cameras": saved.spec.cameras, "network": saved.config}
    before, given = make_train_config(recipe, kept), make_train_config(recipe, values)
    changes = {name: getattr(given, name) for name in values}
    if "network" in changes:
        changes["network"] = {**before.network, **changes["network"]}
    after = dataclasses.replace(before, **changes)
    was, now = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(after))
    for name in sorted(was.keys() | now.keys()):
        if name not in RESUMABLE and was.get(name) != now.get(name):
            raise _differs(saved, name, was.get(name), now.get(name))
    return after


def parse_settings(pairs: Sequence[str], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """key=value words, nested by dots, values in YAML, on top of `base`. Raises PolicyError."""
    tree = dict(typed("settings", base or {}, Mapping))
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise PolicyError(f"setting: expected key=value, found {pair!r}")
        *path, last = key.split(".")
        node = tree
        for name in path:
            node[name] = dict(typed(f"setting {name}", node.get(name) or {}, Mapping))
            node = node[name]
        node[last] = _yaml(f"setting {key}", value)
    return tree


def typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as the type hint `kind` wants it, lists as tuples.

    Where a number is wanted, a whole number does, and text that reads as one: YAML 1.1 takes 5e-4 for text. Kinds
    other than bool, int, float, str, sequences and mappings are not looked at. Raises PolicyError, which calls the
    value `name`.
    """
    outer, parts = get_origin(kind) or kind, get_args(kind)
    found = type(value)
    if outer is float and found in (int, float, str):
        try:
            return float(value)
        except ValueError:
            pass
    elif outer in (bool, int, float, str):
        if found is outer:
            return value
    elif outer is Mapping:
        if isinstance(value, Mapping):
            return {k: typed(f"{name}.{k}", v, parts[1]) for k, v in value.items()} if parts else value
    elif outer in (tuple, Sequence) and parts:
        count = None if outer is Sequence or ... in parts else len(parts)
        if isinstance(value, (list, tuple)) and count in (None, len(value)):
            kinds = parts if count else parts[:1] * len(value)
            return tuple(typed(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(value, kinds, strict=True)))
    else:
        return value
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Mapping: "key: value"}
    wanted = expected.get(outer) or (f"a list of {count}" if count else "a list")
    raise PolicyError(f"{name}: expected {wanted}, found {value!r}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vla_models.train", description="Train a policy from bags.")
    parser.add_argument("--recipe", help="a system of ./vla models; needed unless --init or --resume")
    parser.add_argument("--network", metavar="PRESET", help="begin with the sizes of a preset: tiny, paper, ...")
    parser.add_argument(
        "--init",
        metavar="CHECKPOINT",
        help="begin with the weights of a checkpoint: a folder, or a name on the Hugging Face hub",
    )
    parser.add_argument("--data", required=True, type=Path, help="folder of rosbag2 folders, one an episode")
    parser.add_argument("--out", required=True, type=Path, help="checkpoint folder")
    parser.add_argument("--config", type=Path, help="settings, YAML or JSON")
    parser.add_argument("--steps", type=int, help=f"optimisation steps in all, default {STEPS}")
    parser.add_argument("--minutes", type=float, help="train for so long in all instead of --steps")
    parser.add_argument("--seed", type=int, help="of weights, batches, noise and held-out episodes, default 0")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the state in --out, with its recipe, settings, network, seed, and steps or minutes; "
        f"--steps, --minutes and these settings may be given anew: {', '.join(RESUMABLE)}",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch, 0: its own choice")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode bags")
    parser.add_argument("--cache", type=Path, help="folder of decoded bags; default DATA/.decoded")
    parser.add_argument("--episodes", type=int, help="use the first so many bags only")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, see TrainConfig")
    given = parser.parse_intermixed_args(arguments)
    if not (given.recipe or given.resume or given.init):
        parser.error("--recipe is needed unless --init or --resume")
    if (given.init is not None) + (given.network is not None) + given.resume > 1:
        parser.error("of --init, --network and --resume only one can be given")
    stopped = False

    def interrupt(*_: Any) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    try:
        base = _yaml(str(given.config), given.config.read_text()) if given.config else {}
        values = parse_settings(given.settings, base)
        recipe, seed, budget, origin, base = given.recipe, given.seed or 0, {}, None, None
        if given.resume:
            saved = read_checkpoint(given.out)
            base = saved.spec
            recipe, seed, budget = saved.spec.recipe, saved.facts.get("seed", 0), saved.facts.get("budget", {})
            for name, was in (("recipe", recipe), ("seed", seed)):
                if getattr(given, name) not in (None, was):
                    raise _differs(saved, name, was, getattr(given, name))
            config = resumed_config(saved, values)
        else:
            if given.init:
                origin = find_origin(given.init)
                if recipe not in (None, origin.recipe):
                    raise PolicyError(f"init {given.init}: expected recipe {recipe!r}, found {origin.recipe!r}")
                recipe = origin.recipe
            elif given.network:
                origin = preset_origin(recipe, given.network)
            base = origin.spec if origin else None
            config = make_train_config(recipe, values, origin)
        if given.steps or given.minutes:
            budget = {"steps": given.steps, "minutes": given.minutes}
        spec = make_spec(config, recipe, given.out.resolve().name, base)
        if given.threads:
            torch.set_num_threads(given.threads)
        episodes = load_episodes(given.data, spec, given.cache, given.workers, given.episodes)
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, interrupt)
        train(
            recipe,
            episodes,
            spec,
            config,
            given.out,
            budget.get("steps") or STEPS,
            seed,
            budget.get("minutes"),
            given.resume,
            given.device,
            stop=lambda: stopped,
            origin=origin,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"train: {error}")
    except KeyboardInterrupt:
        sys.exit("train: interrupted")
    print(f"{given.out}: saved{' (interrupted)' if stopped else ''}")


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` on top of `base`, nested ones too; an empty mapping takes the place of what was there."""
    out = dict(base)
    for name, value in changes.items():
        nested = isinstance(value, Mapping) and value and isinstance(out.get(name), Mapping)
        out[name] = _merged(out[name], value) if nested else value
    return out


def _typed_fields(kind: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`values` as the dataclass `kind` declares them."""
    hints = get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    if unknown := set(values) - names:
        found = sorted(f"{prefix}{name}" for name in unknown)
        raise PolicyError(f"training: unknown settings {found}; expected among {sorted(names)}")
    return {name: typed(f"setting {prefix}{name}", value, hints[name]) for name, value in values.items()}


def _yaml(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PolicyError(f"{name}: expected YAML, found {' '.join(str(error).split())}") from error


def _check_resumed(saved: Checkpoint, spec: PolicySpec, recipe: str) -> None:
    if saved.spec.recipe != recipe:
        raise CheckpointError(f"checkpoint {saved.folder}: expected recipe {recipe!r}, found {saved.spec.recipe!r}")
    mine = dataclasses.replace(spec, name=saved.spec.name, vocabulary=saved.spec.vocabulary)
    if mine.to_dict() != saved.spec.to_dict():
        differing = sorted(k for k, v in mine.to_dict().items() if saved.spec.to_dict()[k] != v)
        raise CheckpointError(f"checkpoint {saved.folder}: was trained with other settings: {differing}")


def _differs(saved: Checkpoint, name: str, was: Any, found: Any) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {saved.folder}: was trained with other settings: {name}: expected {was!r}, found {found!r}"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their names with dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _open_log(path: Path, step: int) -> Any:
    """The log for appending; lines at or after `step` (of an interrupted or older training) are dropped."""
    kept = []
    for line in path.read_text().splitlines() if path.is_file() and step else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # a line that a crash cut short
    write_atomically(path, "".join(line + "\n" for line in kept).encode())
    return open(path, "a")


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


if __name__ == "__main__":
    main()
