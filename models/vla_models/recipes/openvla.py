"""Recipe "openvla": actions as words of a vision-language model (OpenVLA, arXiv 2406.09246).

    [BOS][256 patches of one image][In: What action should the robot take to ...?\\nOut:][space] --Llama 2--> 7 tokens

DINOv2 and SigLIP look at the image side by side (vla_models.parts.prismatic); each number of the action is one of 256
bins, which are the last 256 tokens of the vocabulary, and the tokens come one after the other. No state, no history,
one action at a time. OpenVLA-OFT (vla_models.recipes.openvla_oft) starts from these weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from vla_core.actions import ActionSpace

from vla_models.normalization import Normalizer
from vla_models.parts.prismatic import RULES, Prismatic, PrismaticConfig, published_sizes
from vla_models.policy import CheckpointError, PolicySpec, example_spec
from vla_models.published import TensorFiles
from vla_models.token_policy import TokenNetwork, TokenPolicy
from vla_models.tokenizers import OpenVLATokenizer
from vla_models.torch_policy import Inputs, Preset

PROMPT = "In: What action should the robot take to {lower}?\nOut:"
#: Actions of the training data: steps of the gripper and its turns about fixed axes, the gripper 1 when open.
STEPS = ActionSpace(("arm",), "pose", reference="step", rotation="rpy")


@dataclass(frozen=True)
class OpenVlaConfig(PrismaticConfig):
    """Sizes of the vision-language model, and: bins of each number of an action."""

    bins: int = 256


class BinAnswer:
    """A chunk as one token a number, and then, in training, the end. shape: (H, D) of a chunk."""

    def __init__(self, tokenizer: OpenVLATokenizer, shape: Sequence[int], rows: int, stop: int):
        self.tokenizer, self.shape, self.stop = tokenizer, tuple(shape), stop
        #: Most tokens of an answer.
        self.length = self.shape[0] * self.shape[1]
        self._mask = np.zeros(rows, bool)
        self._mask[tokenizer.vocabulary - tokenizer.bins : tokenizer.vocabulary] = True

    def encode(self, chunk: np.ndarray) -> np.ndarray:
        """(H, D) -> (n + 1,) int64."""
        return np.append(self.tokenizer.encode(chunk).ravel(), self.stop)

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """(n,) or, with the end, (n + 1,) -> (H, D) float64. Raises TokenizerError for a token that is no bin."""
        return self.tokenizer.decode(np.reshape(tokens[: self.length], self.shape))

    def inside(self, tokens: Sequence[int], padded: np.ndarray) -> np.ndarray:
        """(n + 1,) bool: which tokens belong to steps that are not `padded` (H,); the end belongs to the last."""
        return ~np.append(np.repeat(padded, self.shape[1]), padded[-1])

    def allowed(self, tokens: Sequence[int]) -> np.ndarray | None:
        """(rows,) bool: what may follow `tokens`; None: the answer is complete."""
        return self._mask if len(tokens) < self.length else None


class OpenVlaNetwork(TokenNetwork):
    """The network of the recipe "openvla": what is computed behind the prompt is TokenNetwork's."""

    def __init__(self, spec: PolicySpec, config: OpenVlaConfig):
        tokenizer = OpenVLATokenizer(config.text, config.bins)
        answer = BinAnswer(tokenizer, (spec.horizon, spec.action_dim), config.vocabulary, config.stop)
        super().__init__(spec, Prismatic(spec, config), answer, config.space, bidirectional=False)

    def prefix(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """[BOS][patches][rest of the text], and which of them are there."""
        return self.vlm.sequence(inputs)


class OpenVlaPolicy(TokenPolicy):
    """The recipe "openvla" on torch."""

    Config, Network = OpenVlaConfig, OpenVlaNetwork
    #: Of openvla/openvla-7b: 7541237184, with layers that are never computed.
    parameters = 7.54e9
    contract = {
        "prompt": PROMPT, "tokenizer": "bytes", "context": 128, "temperature": 0.0, "horizon": 1, "period": 0.2,
        "lead": 1,
    }  # fmt: skip
    presets = {
        "paper": Preset(OpenVlaConfig(), {"action_space": STEPS, "state": "pose"}),
        "tiny": Preset(
            OpenVlaConfig(
                dino=(16, 3, 2, 32), siglip=(16, 3, 2, 24), language=(32, 2, 4, 48), vocabulary=580, text=516, space=35
            ),
            {"cameras": {"scene": (28, 42)}, "prompt": "{lower}", "context": 24, "action_space": STEPS,
             "state": "pose"},
        ),
    }  # fmt: skip
    normalization = {"state": "quantile", "action": "quantile"}
    training = {
        "horizon": 1, "period": 0.2, "reference": "step", "rotation": "rpy", "temperature": 0.0, "batch": 16,
        "lr": 2e-5,
    }  # fmt: skip
    published = RULES

    @classmethod
    def read_published(
        cls, folder: Path, config: Mapping[str, Any], files: TensorFiles
    ) -> tuple[PolicySpec, OpenVlaConfig, dict[str, Normalizer]]:
        """openvla/openvla-7b and what is fine-tuned from it; see `data_set` for which statistics are taken."""
        name, statistics = data_set(folder, config)
        robot = robot_of(name)
        network = OpenVlaConfig(**published_sizes(folder, config, files), bins=int(config.get("n_action_bins", 256)))
        action = normalizer(folder, name, statistics, "action", robot)
        spec = published_spec(cls.name(), folder, config, robot, len(action.offset), 1, ("scene",))
        state = Normalizer("mean_std", np.zeros(spec.state_dim), np.ones(spec.state_dim))  # not read
        return spec, network, {"state": state, "action": action}


@dataclass(frozen=True)
class Robot:
    """What a published checkpoint leaves unsaid about its robot: the published code knows it by names too.

    kind: of normalisation. period: s. rotation: dialect of relative poses. units: of a translation (m) and a rotation
    (rad) of 1. chunk: actions of OpenVLA-OFT. finger: travel of one finger (m), for states of LIBERO.
    """

    kind: str = "quantile"
    period: float = 0.2
    rotation: str = "rpy"
    units: tuple[float, float] = (1.0, 1.0)
    chunk: int = 8
    finger: float = 0.0


#: Part of a data set's name -> robot. LIBERO's actions are what robosuite's controller takes, 1 being 5 cm or 0.5 rad.
ROBOTS = {
    "libero": Robot(period=0.05, rotation="rotvec", units=(0.05, 0.5), finger=0.04),
    "aloha": Robot("min_max", 0.04, chunk=25),
    "bridge": Robot(chunk=5),
    "fractal": Robot(period=1 / 3),
}


def robot_of(name: str) -> Robot:
    """The robot of a data set."""
    return next((robot for part, robot in ROBOTS.items() if part in name), Robot())


def data_set(folder: Path, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and statistics of the data set that config.json's `unnorm_key` names, or of the only one.

    They lie in dataset_statistics.json (fine-tuned checkpoints) or in config.json's norm_stats. Raises CheckpointError.
    """
    where = folder / "dataset_statistics.json"
    try:
        known = json.loads(where.read_text()) if where.is_file() else config.get("norm_stats")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: not readable as JSON: {error}") from error
    where = where if where.is_file() else folder / "config.json"
    if not isinstance(known, Mapping) or not known:
        raise CheckpointError(f"{where}: expected statistics of a data set (norm_stats), found {known!r:.80}")
    name = config.get("unnorm_key") or (next(iter(known)) if len(known) == 1 else None)
    if name not in known:
        raise CheckpointError(
            f"{where}: expected the name of a data set, load(..., settings={{'unnorm_key': name}}), one of "
            f"{sorted(known)}, found {name!r}"
        )
    return name, known[name]


def normalizer(folder: Path, name: str, statistics: Any, part: str, robot: Robot) -> Normalizer:
    """Normaliser of "action" or "proprio"; numbers outside of the statistics' mask stay as they are."""
    names = ("q01", "q99") if robot.kind == "quantile" else ("min", "max")
    try:
        low, high = (np.asarray(statistics[part][key], float) for key in names)
        mask = np.asarray(statistics[part].get("mask", np.ones(len(low))), bool)
        offset, scale = np.where(mask, (low + high) / 2, 0.0), np.where(mask, np.maximum((high - low) / 2, 1e-8), 1.0)
        return Normalizer(robot.kind, *_units(offset, scale, part, robot))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: statistics of {name!r}: expected {part} with {names[0]}, {names[1]}, found {error!r}"
        ) from error


def _units(offset: np.ndarray, scale: np.ndarray, part: str, robot: Robot) -> tuple[np.ndarray, np.ndarray]:
    """From the data set's units to m, rad and openings."""
    units = np.ones_like(offset)
    if part == "action" and len(units) == 7:
        units[:3], units[3:6] = robot.units
    elif part == "proprio" and robot.finger:
        units[6:] = 1 / robot.finger
    return offset * units, scale * units


def published_spec(
    recipe: str, folder: Path, config: Mapping[str, Any], robot: Robot, dim: int, horizon: int,
    cameras: Sequence[str], **more: Any,
) -> PolicySpec:  # fmt: skip
    """The specification of a published checkpoint: 7 numbers an action are relative poses of one arm, 14 the absolute
    joints of ALOHA's two. Raises CheckpointError."""
    where = folder / "config.json"
    if dim not in (7, 14):
        raise CheckpointError(f"{where}: expected statistics of 7 or 14 numbers an action, found {dim}")
    if config.get("image_resize_strategy", "resize-naive") != "resize-naive":
        found = config["image_resize_strategy"]
        raise CheckpointError(f"{where}: image_resize_strategy: expected 'resize-naive', found {found!r}")
    size = config.get("image_sizes", [224, 224])[0]
    size = tuple(size) if isinstance(size, Sequence) else (size, size)
    if dim == 7:
        space = replace(STEPS, rotation=robot.rotation)
        values = {"arms": {"arm": 7}, "action_space": space, "state": "pose", "lead": 1}
    else:
        arms = {"left": 6, "right": 6}
        values = {"arms": arms, "action_space": ActionSpace(tuple(arms), "joint", tuple(arms.values()))}
    fixed = {"prompt": PROMPT, "tokenizer": "tokenizer.json", "context": 64, "temperature": 0.0,
             "padding": int(config.get("pad_token_id", 32000)), "horizon": horizon, "period": robot.period}  # fmt: skip
    return example_spec(recipe, cameras=dict.fromkeys(cameras, size), **{**fixed, **values, **more})
