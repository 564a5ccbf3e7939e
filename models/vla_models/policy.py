"""What a policy is to the rest of the stack: one specification, one method, plain NumPy in and out.

Nothing here imports torch. A runtime (torch, ONNX Runtime, a user's own) only implements `Policy.run`, which maps
normalised inputs to normalised actions; preparing the inputs and decoding the outputs is done once, here, by the
very functions that also prepare the training data (`vla_models.preprocess`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from vla_core.actions import ActionSpace

#: Ways in which a policy can be made to continue the running chunk.
GUIDANCE = ("guided", "prefix")
#: How an image of another shape becomes the network's: "stretch" it, "pad" it with black above and below or beside, or
#: "pad_corner": with black above or to the left only (SmolVLA).
FITS = ("stretch", "pad", "pad_corner")
#: Images are stretched to a shape that differs by no more than this from their own: what the policy saw was like them.
ASPECT_TOLERANCE = 0.05
#: Contents of the state vector: "pose" is [position (3), 6D rotation (6), gripper] an arm, "joint" [q1..qn, gripper],
#: "libero" (as in that benchmark's data) [position (3), axis times angle (3), gripper, -gripper].
STATES = ("pose", "joint", "libero")


class PolicyError(ValueError):
    """A policy was given something it cannot work with; the message names the input, the expected and the found."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class PolicySpec:
    """The contract of a policy: what it looks at, what it says, how it may be guided.

    cameras: camera name -> (height, width) in pixels as the network wants them, in the network's order.
    arms: arm names, in the order of the state vector; equal to `action_space.arms`.
    state: "pose", "joint" or "libero" (see STATES). joints: joint names of each arm ("joint" states and actions).
    horizon: actions in a chunk, H. period: time between two actions, s; action 0 is due at the observation's time (but
    see lead).
    guidance: what `InferenceRequest.guidance` may ask for besides "".
    steps: integration steps of the sampler (1: the policy predicts in one pass).
    prefix_limit: longest prefix seen in training, steps.
    tokenizer: how text becomes tokens: "words" (of `vocabulary`), "bytes", or a tokenizer.json beside the weights, by
    its name (see vla_models.tokenizer). vocabulary: words the policy knows, index 0 is padding; empty: the instruction
    is ignored. context: most tokens of a text. padding: token after its end. prompt: what is read, with {task} for
    the instruction ({lower}: in small letters) and {state} for the normalised state in 256 bins over [-1, 1].
    lead: periods from the observation to action 0. 1 is for policies that predict one step at a time: the chunk then
    begins with what was measured. history: observations a policy looks at, `period` apart, the newest last. fit: see
    FITS. optional: cameras that a robot may lack; their images are then black, and marked as not there. shift: of the
    sampler's flow times (see vla_models.sampling.flow_times). future: pictures of each camera after the observation
    that training looks at, evenly over the time of a chunk, the last one at its end (video models).
    temperature: scale of the noise that a sampler starts from. 1: samples of what was demonstrated. 0: near the mean,
    and deterministic; more exact where there is one way to do the task, wrong where there are several.
    """

    name: str
    recipe: str
    cameras: Mapping[str, tuple[int, int]]
    arms: tuple[str, ...]
    state: str
    action_space: ActionSpace
    horizon: int
    period: float
    joints: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    guidance: tuple[str, ...] = ()
    steps: int = 1
    vocabulary: tuple[str, ...] = ()
    context: int = 16
    prefix_limit: int = 0
    robot: str = ""
    temperature: float = 1.0
    tokenizer: str = "words"
    padding: int = 0
    prompt: str = "{task}"
    history: int = 1
    fit: str = "stretch"
    optional: tuple[str, ...] = ()
    shift: float = 1.0
    future: int = 0
    lead: int = 0

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "cameras", MappingProxyType({k: (int(h), int(w)) for k, (h, w) in self.cameras.items()}))
        set_(self, "joints", MappingProxyType({k: tuple(v) for k, v in self.joints.items()}))
        for name in ("arms", "guidance", "vocabulary", "optional"):
            set_(self, name, tuple(getattr(self, name)))
        if self.state not in STATES:
            raise PolicyError(f"policy {self.name}: state must be one of {STATES}, found {self.state!r}")
        if unknown := set(self.guidance) - set(GUIDANCE):
            raise PolicyError(f"policy {self.name}: guidance must be among {GUIDANCE}, found {sorted(unknown)}")
        if tuple(self.action_space.arms) != self.arms:
            raise PolicyError(
                f"policy {self.name}: arms {self.arms} differ from its action space's {tuple(self.action_space.arms)}"
            )
        if self.horizon < 1 or not self.period > 0 or self.steps < 1 or self.history < 1:
            raise PolicyError(
                f"policy {self.name}: horizon, period, steps and history must be positive, found "
                f"{self.horizon}, {self.period}, {self.steps}, {self.history}"
            )
        if self.lead not in (0, 1):
            raise PolicyError(f"policy {self.name}: lead must be 0 or 1, found {self.lead}")
        if self.fit not in FITS:
            raise PolicyError(f"policy {self.name}: fit must be one of {FITS}, found {self.fit!r}")
        if unknown := set(self.optional) - set(self.cameras):
            raise PolicyError(f"policy {self.name}: optional: expected cameras of the policy, found {sorted(unknown)}")
        try:
            self.prompt.format(task="", lower="", state="")
        except (KeyError, IndexError, ValueError) as error:
            raise PolicyError(
                f"policy {self.name}: prompt: expected {{task}}, {{lower}} and {{state}}, found {error}"
            ) from error
        if not 0 <= self.temperature < float("inf"):
            raise PolicyError(f"policy {self.name}: temperature must be 0 or more, found {self.temperature}")

    @property
    def reads_instruction(self) -> bool:
        """Whether the instruction changes what the policy does."""
        if self.tokenizer == "words":
            return bool(self.vocabulary)
        return "{task}" in self.prompt or "{lower}" in self.prompt

    @property
    def example_instruction(self) -> str:
        """Words that the policy certainly knows, for warming up; empty when it ignores the instruction."""
        if self.tokenizer == "words":
            return " ".join(self.vocabulary[1 : 1 + min(4, self.context)])
        return "pick" if self.reads_instruction else ""

    @property
    def length(self) -> int:
        """Targets in a chunk: the actions, after the measured state where there is a lead."""
        return self.horizon + self.lead

    @property
    def state_dim(self) -> int:
        """Length of the state vector."""
        if self.state != "joint":
            return {"pose": 10, "libero": 8}[self.state] * len(self.arms)
        return sum(len(self.joints[arm]) + 1 for arm in self.arms)

    @property
    def action_dim(self) -> int:
        """Numbers in one action of the network."""
        return self.action_space.dim

    @property
    def target_dim(self) -> int:
        """Numbers in one target (vla_msgs/ActionTrajectory layout)."""
        return self.action_space.target_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives the equal specification back."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["cameras"] = {k: list(v) for k, v in self.cameras.items()}
        out["joints"] = {k: list(v) for k, v in self.joints.items()}
        out["action_space"] = self.action_space.to_dict()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PolicySpec:
        """Strict inverse of `to_dict`. Raises PolicyError for unknown or missing keys."""
        known = {f.name for f in fields(cls)}
        required = {"name", "recipe", "cameras", "arms", "state", "action_space", "horizon", "period"}
        if extra := set(values) - known:
            raise PolicyError(f"policy specification: unknown keys {sorted(extra)}")
        if missing := required - set(values):
            raise PolicyError(f"policy specification: missing keys {sorted(missing)}")
        return cls(**{**values, "action_space": ActionSpace.from_dict(values["action_space"])})


def example_spec(
    recipe: str,
    arms: Mapping[str, int] = MappingProxyType({"arm": 7}),
    cameras: Mapping[str, tuple[int, int]] = MappingProxyType({"scene": (224, 224)}),
    **fields_: Any,
) -> PolicySpec:
    """A specification for a robot that has only numbers of joints, to build a network before there is a robot.

    arms: arm -> joints. Further arguments are fields of PolicySpec; by default absolute joint targets and the joint
    state, 16 actions 0.05 s apart.
    """
    names = {arm: tuple(f"{arm}_joint{k + 1}" for k in range(count)) for arm, count in arms.items()}
    values = {
        "name": recipe, "recipe": recipe, "cameras": cameras, "arms": tuple(arms), "state": "joint",
        "action_space": ActionSpace(tuple(arms), "joint", tuple(arms.values())), "horizon": 16, "period": 0.05,
        "joints": names,
    }  # fmt: skip
    return PolicySpec(**(values | fields_))


def make_config(kind: type, values: Mapping[str, Any]) -> Any:
    """A configuration (dataclass) from plain values; lists become tuples, and mappings the configuration that is the
    field's default. Raises PolicyError for unknown keys."""
    known = {f.name: f for f in fields(kind)}
    if unknown := set(values) - set(known):
        raise PolicyError(f"{kind.__name__}: unknown settings {sorted(unknown)}; expected among {sorted(known)}")

    def made(name: str, value: Any) -> Any:
        default = known[name].default
        if default is MISSING and known[name].default_factory is not MISSING:
            default = known[name].default_factory()
        if isinstance(value, Mapping) and is_dataclass(default):
            return make_config(type(default), value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: made(name, value) for name, value in values.items()})


@dataclass(frozen=True)
class ArmState:
    """What one arm measured: joints (n,) rad (m); tool pose (7,) [x y z qx qy qz qw], base frame; opening 0 to 1."""

    joints: np.ndarray
    tool: np.ndarray
    gripper: float


@dataclass(frozen=True)
class PolicyObservation:
    """Everything a policy sees at one reference time.

    images: camera -> (H, W, 3) uint8 RGB, any size. state: arm -> ArmState. time: s of the ROS clock.
    history: earlier observations, oldest first, for policies that look at more than one (PolicySpec.history); what is
    missing at the start of an episode repeats the oldest there is.
    """

    images: Mapping[str, np.ndarray]
    state: Mapping[str, ArmState]
    instruction: str = ""
    time: float = 0.0
    history: tuple[PolicyObservation, ...] = ()


@dataclass(frozen=True)
class InferenceRequest:
    """How the next chunk shall continue the running one.

    remainder: (K, target_dim) absolute targets of the running chunk on the policy's own period, the first one due
    at the new chunk's start; None: start afresh. delay: expected inference delay d, steps. execution_horizon: steps
    s executed between two inferences. guidance: "" | "guided" | "prefix". schedule: "exp" | "linear" | "ones" |
    "zeros". beta: largest guidance weight. seed: of the sampler's noise (None: fresh noise each time).
    """

    remainder: np.ndarray | None = None
    delay: int = 0
    execution_horizon: int = 0
    guidance: str = ""
    schedule: str = "exp"
    beta: float = 5.0
    seed: int | None = None


@dataclass(frozen=True)
class PolicyOutput:
    """targets (length or fewer, target_dim): absolute, base frame, vla_msgs/ActionTrajectory layout; the first is due
    at the observation's time. timings: stage -> s. prefix_steps: leading targets that repeat the request's remainder.
    """

    targets: np.ndarray
    timings: Mapping[str, float]
    prefix_steps: int = 0


@dataclass(frozen=True)
class ModelInputs:
    """Batched inputs of a network, the same arrays in every runtime.

    images: one (B, 3, h, w) float32 in [0, 1] for each camera, in the order of `PolicySpec.cameras`.
    tokens: (B, context) int64, padded with PolicySpec.padding. state: (B, state_dim) float32, normalised.
    present: (B, cameras) bool, false for a camera that is not there. With a history of T observations images are
    (B, T, 3, h, w) and state is (B, T, state_dim).
    """

    images: tuple[np.ndarray, ...]
    tokens: np.ndarray
    state: np.ndarray
    present: np.ndarray


@dataclass(frozen=True)
class ChunkPrefix:
    """What is left of the running chunk, in the network's own terms.

    target (1, H, dim) float32: normalised actions relative to the new anchor, right-padded by holding the last one.
    weights (H,) float32: soft mask W of "guided". known (1, H) bool: steps that "prefix" clamps. beta: largest
    guidance weight. mode: "guided" or "prefix".
    """

    mode: str
    target: np.ndarray
    weights: np.ndarray
    known: np.ndarray
    beta: float


class Policy(ABC):
    """A policy on some runtime. Not thread-safe: one inference at a time."""

    def __init__(self, spec: PolicySpec, normalizers: Mapping[str, Any], folder: Path | None = None):
        """folder: of the checkpoint, where a tokenizer.json lies."""
        from vla_models.preprocess import Processor

        self.spec = spec
        self.processor = Processor(spec, normalizers, folder)

    @property
    def runtime(self) -> str:
        """Name of the runtime: torch, onnx."""
        return ""

    @property
    def provider(self) -> str:
        """Where it runs: cpu, cuda, CPUExecutionProvider, ..."""
        return ""

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that `run` takes: (1, H, W), W numbers an action inside the network (>= action_dim).

        A sampler that adds noise on its way takes that too, along the first axis; a network may make more than H.
        """
        return (1, self.spec.horizon, self.spec.action_dim)

    @abstractmethod
    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        """Normalised actions (1, H, W) float32 from one batch of one; numbers beyond action_dim are dropped.

        noise: `noise_shape` float32, normal with deviation `PolicySpec.temperature` (ignored by policies that predict
        in one pass). prefix: its target is as wide as the network's actions, filled up with zeros. Writes
        the wall time of its own stages ("encode", "sample") into `timings`, s.
        """

    def reset(self) -> None:  # noqa: B027 - most policies have nothing to forget
        """Forget what was seen: a new episode begins. Policies that remember nothing between chunks do nothing."""

    def correct(self, words: str) -> None:
        """A person's correction in words, in force until the next ("" takes it back). Raises PolicyError where a
        policy takes none."""
        raise PolicyError(f"policy {self.spec.name}: takes no corrections in words")

    def infer(self, observation: PolicyObservation, request: InferenceRequest | None = None) -> PolicyOutput:
        """The next chunk of absolute targets.

        Raises PolicyError when the observation lacks a camera or an arm, the instruction cannot be read, the request
        asks for guidance the policy does not support, or the network's output is not finite.
        """
        request = request or InferenceRequest()
        start = time.perf_counter()
        inputs, anchor = self.processor.inputs(observation)
        prefix = self.processor.prefix(request, anchor, self.noise_shape[-1])
        normal = np.random.default_rng(request.seed).standard_normal(self.noise_shape)
        noise = (self.spec.temperature * normal).astype(np.float32)
        timings = {"preprocess": time.perf_counter() - start}
        actions = self.run(inputs, noise, prefix, timings)[..., : self.spec.action_dim]
        decode = time.perf_counter()
        if not np.all(np.isfinite(actions)):
            raise PolicyError(f"policy {self.spec.name}: the network's output is not finite")
        targets = self.processor.targets(actions[0], anchor)
        targets = np.concatenate([np.repeat(anchor[None], self.spec.lead, 0), targets])
        steps = 0
        if prefix is not None and prefix.mode == "prefix":
            steps = int(prefix.known.sum()) + self.spec.lead
            targets[:steps] = request.remainder[:steps]
        timings["decode"] = time.perf_counter() - decode
        timings["total"] = time.perf_counter() - start
        return PolicyOutput(targets, timings, steps)
