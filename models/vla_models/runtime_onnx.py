"""Policies on ONNX Runtime: the graphs of `vla_models.export`, driven by the same samplers as on torch.

Nothing here imports torch: Real-Time Chunking, its vector-Jacobian product included, runs with NumPy and ONNX
Runtime.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import hashlib
import importlib
import json
import os
import subprocess
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime

from vla_models.answering import AnsweringPolicy, Step
from vla_models.checkpoint import WEIGHTS_FILE, Checkpoint, read_checkpoint
from vla_models.diffusion import Diffusion, RtcDiffusionGuidance, diffusion_guidance, sample_diffusion
from vla_models.parts.instructed import InstructedPolicy
from vla_models.parts.motions import MotionPolicy, Motions
from vla_models.policy import CheckpointError, ChunkPrefix, ModelInputs, Policy, PolicyError, PolicySpec
from vla_models.safetensors_index import fingerprint, index_tensors
from vla_models.sampling import Guidance, PrefixGuidance, RtcGuidance, sample_flow
from vla_models.tokenizers import make_answer

GRAPHS_FOLDER = "onnx"
#: Key of a graph's metadata: SHA-256 of the weights it points into.
FINGERPRINT_KEY = "vla.weights.sha256"
#: Keys of the metadata of a policy's first graph: which of DRIVERS drives it, and JSON of what that has to know.
DRIVER_KEY, SETTINGS_KEY = "vla.driver", "vla.settings"
#: Of these graphs every policy has one.
FIRST = ("encoder", "policy")
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
#: Precision parameter -> providers that compute it. int8 quantises as it runs, which no GPU provider does. On the CPU
#: fp16 and bf16 are emulated in float32.
PRECISIONS = {"fp32": ("cpu", "cuda", "tensorrt"), "int8": ("cpu",), "fp16": ("cpu", "cuda", "tensorrt"),
              "bf16": ("cpu", "cuda", "tensorrt")}  # fmt: skip
#: Keys of the metadata of graphs of another precision than float32: which, and SHA-256 of the weights beside them.
PRECISION_KEY, VARIANT_KEY = "vla.precision", "vla.variant.sha256"
#: Folder of the graphs that emulate a precision, beside those that have it.
EMULATED = "emulated"
#: Provider parameter -> execution provider that must be there.
PROVIDERS = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}


@dataclass(frozen=True)
class ProviderOptions:
    """Execution providers with their options, in ONNX Runtime's words, first choice first. device: where
    values that pass from graph to graph stay, "cpu" or "cuda"."""

    providers: tuple[Any, ...] = (CPU,)
    device: str = "cpu"


def choose_providers(provider: str, cache: Path | None = None, precision: str = "fp32") -> ProviderOptions:
    """"cpu", "cuda" or "tensorrt" as execution providers. cache: folder for TensorRT's engines. precision: one of
    PRECISIONS.

    What a graph has in float32 is computed in float32: TF32 is off under CUDA and, unless the environment says
    otherwise, in TensorRT. TensorRT builds strongly typed networks, which ONNX Runtime does as long as none of its own
    precisions is switched on. Raises PolicyError when the provider is unknown, not part of the installed ONNX
    Runtime, naming those that are, or cannot compute the precision.
    """
    present = onnxruntime.get_available_providers()
    usable = [name for name, needed in PROVIDERS.items() if needed in present]
    if provider not in PROVIDERS:
        raise PolicyError(f"provider: expected one of {list(PROVIDERS)}, found {provider!r}")
    if precision not in PRECISIONS:
        raise PolicyError(f"precision: expected one of {list(PRECISIONS)}, found {precision!r}")
    if provider not in PRECISIONS[precision]:
        raise PolicyError(f"precision: {precision!r} runs on {list(PRECISIONS[precision])}, found provider "
                          f"{provider!r}")
    if provider not in usable:
        raise PolicyError(f"provider: {provider!r} was asked for, but the installed ONNX Runtime has no "
                          f"{PROVIDERS[provider]}; available: {usable}")
    cuda = (CUDA, {"use_tf32": "0"})
    if provider == "cpu":
        return ProviderOptions()
    if provider == "cuda":
        return ProviderOptions((cuda, CPU), "cuda")
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # the provider has no option for it
    options = {"trt_fp16_enable": "0", "trt_bf16_enable": "0", "trt_int8_enable": "0"}
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache),
                    "trt_timing_cache_enable": "1", "trt_timing_cache_path": str(cache)}
    return ProviderOptions(((TENSORRT, options), cuda, CPU), "cuda")


def engine_cache(mark: str, graphs: Iterable[Path] = (), precision: str = "fp32") -> Path:
    """Folder of the TensorRT engines of one model: below $XDG_CACHE_HOME (~/.cache), named for the weights, the graphs,
    the precision, the GPU, its driver, ONNX Runtime and TensorRT, so that no engine of another is ever taken.

    mark: fingerprint of the weights. graphs: files of the graphs.
    """
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        lines = answer.stdout.splitlines()
        gpu = "-".join("".join(c if c.isalnum() or c == "." else " " for c in lines[0]).split())
    except (OSError, subprocess.SubprocessError, IndexError):
        gpu = "gpu"
    digest = hashlib.sha256("".join(fingerprint(path) for path in sorted(graphs)).encode()).hexdigest()
    versions = f"ort{onnxruntime.__version__}-trt{tensorrt_version()}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "vla" / "tensorrt" / f"{mark[:16]}-{digest[:16]}-{precision}-{gpu}-{versions}"


def tensorrt_version() -> str:
    """Of the installed Python package; else of the system's library; "none" where there is neither."""
    for package in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"):
        with contextlib.suppress(PackageNotFoundError):
            return version(package)
    library = ctypes.util.find_library("nvinfer")
    return str(ctypes.CDLL(library).getInferLibVersion()) if library else "none"


class Graph:
    """One graph in a session.

    model: path of the .onnx file, or its bytes. weights: folder of the safetensors file it points into.
    threads: in one operator, 0: as many as the machine has cores. Raises CheckpointError when it cannot be
    loaded, PolicyError when the first provider cannot be used.
    """

    def __init__(self, model: Path | bytes, weights: Path, providers: ProviderOptions, threads: int = 0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        # Between two runs the cores belong to the control loop.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        try:
            self.session = onnxruntime.InferenceSession(
                model if isinstance(model, bytes) else str(model), options,
                providers=list(providers.providers))
        except Exception as error:  # ONNX Runtime's own exceptions share no base but Exception
            name = "graph" if isinstance(model, bytes) else model
            message = str(error).splitlines()[0]
            raise CheckpointError(f"{name}: ONNX Runtime cannot load it: {message}") from error
        first = providers.providers[0]
        wanted = first if isinstance(first, str) else first[0]
        self.provider = self.session.get_providers()[0]
        if self.provider != wanted:
            raise PolicyError(f"provider: {wanted} was asked for, but does not work on this machine; "
                              f"available: {self.session.get_providers()}")
        self.device = providers.device
        self.inputs = {value.name: tuple(value.shape) for value in self.session.get_inputs()}
        for label, shape in self.inputs.items():
            if not all(isinstance(size, int) for size in shape):  # TensorRT would build an engine for every shape
                raise CheckpointError(f"{model if isinstance(model, Path) else 'graph'}: input {label!r}: expected a "
                                      f"fixed shape, found {shape}")
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.metadata = self.session.get_modelmeta().custom_metadata_map

    def __call__(self, values: Mapping[str, Any], keep: bool = False) -> list[Any]:
        """Outputs in order. values: NumPy arrays or kept outputs; those that the graph does not take are
        ignored. keep: leave the outputs on the device, to be handed to another graph."""
        binding = self.session.io_binding()
        for name in self.inputs:
            value = values[name]
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, self.device if keep else "cpu")
        self.session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        return list(outputs) if keep else [value.numpy() for value in outputs]


class OnnxPolicy(Policy):
    """A policy's exported graphs; a subclass drives those of one kind of head (see DRIVERS). See `load_onnx`.

    settings: what the export said of the head (vla_models.export.Head.settings).
    """

    def __init__(self, checkpoint: Checkpoint, graphs: Mapping[str, Graph], steps: int | None = None):
        super().__init__(checkpoint.spec, checkpoint.normalizers, checkpoint.folder)
        self.graphs = dict(graphs)
        self.steps = steps or checkpoint.spec.steps
        self.settings = settings_of(next(graphs[name] for name in FIRST if name in graphs))

    @staticmethod
    @abstractmethod
    def graph_names(spec: PolicySpec, settings: Mapping[str, Any]) -> list[str]:
        """Names of the graphs that a policy needs, one of FIRST among them."""

    @staticmethod
    def check(file: Path, inputs: Mapping[str, tuple[int, ...]], spec: PolicySpec) -> None:
        """Raise CheckpointError unless a graph with these `inputs` was made for `spec`."""
        time = (spec.history,) if spec.history > 1 else ()
        expected = {f"image_{camera}": (1, *time, 3, *size) for camera, size in spec.cameras.items()}
        expected |= {"tokens": (1, spec.context), "state": (1, *time, spec.state_dim)}
        for name, shape in inputs.items():
            if name in expected and shape != expected[name]:
                raise CheckpointError(f"{file}: input {name!r}: expected shape {expected[name]}, found {shape}")

    @property
    def runtime(self) -> str:
        return "onnx"

    @property
    def provider(self) -> str:
        return next(iter(self.graphs.values())).provider

    def tensors(self, inputs: ModelInputs) -> dict[str, np.ndarray]:
        """Inputs by their names in the graphs."""
        images = {f"image_{camera}": image for camera, image in zip(self.spec.cameras, inputs.images, strict=True)}
        return images | {"tokens": inputs.tokens, "state": inputs.state, "present": inputs.present}

    def encode(self, values: Mapping[str, Any], graph: str = "encoder") -> dict[str, Any]:
        """Outputs of an encoder by name, left on the device: what every step of a chunk reads."""
        encoder = self.graphs[graph]
        return dict(zip(encoder.outputs, encoder(values, keep=True), strict=True))

    def opened(self, values: Mapping[str, Any], encoder: str, step: str) -> tuple[np.ndarray, Step]:
        """Logits of an answer's first token, and its steps (see AnsweringPolicy.prefill), by two graphs.

        The cache of the prefix is written once, that of the answer goes from step to step; both stay on the device.
        """
        context, graph = self.encode(values, encoder), self.graphs[step]
        logits, tail = context.pop("logits"), np.zeros(graph.inputs["tail"], np.float32)

        def go_on(token: int, index: int) -> np.ndarray:
            nonlocal tail
            number = {"token": np.array([token]), "index": np.array([index])}
            logits, tail = graph({**context, "tail": tail, **number}, keep=True)
            return logits.numpy()[0]

        return logits.numpy()[0], go_on

    def blank(self) -> ModelInputs:
        """Inputs of zeros."""
        spec = self.spec
        time = (spec.history,) if spec.history > 1 else ()
        images = tuple(np.zeros((1, *time, 3, *size), np.float32) for size in spec.cameras.values())
        state = np.zeros((1, *time, spec.state_dim), np.float32)
        return ModelInputs(images, np.zeros((1, spec.context), np.int64), state, np.ones((1, len(images)), bool))

    def warm_up(self) -> None:
        """Run each graph once on zeros: kernels, engines and memory are there for the first inference."""
        spec, inputs, noise = self.spec, self.blank(), np.zeros(self.noise_shape, np.float32)
        target = np.zeros((1, spec.horizon, noise.shape[-1]), np.float32)
        for mode in ("", *spec.guidance):
            prefix = ChunkPrefix(mode, target, target[0, :, 0], np.zeros(target.shape[:2], bool), 1.0)
            self.run(inputs, noise, prefix if mode else None, {})


class OnePassOnnx(OnnxPolicy):
    """A policy that predicts in one pass."""

    @staticmethod
    def graph_names(spec: PolicySpec, settings: Mapping[str, Any]) -> list[str]:
        return ["policy"]

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        start = time.perf_counter()
        (actions,) = self.graphs["policy"](self.tensors(inputs))
        timings["sample"] = time.perf_counter() - start
        return actions


class SampledOnnx(OnnxPolicy):
    """A policy that encodes once and takes many steps from noise; `sample` takes them."""

    #: Whether the network may make more actions than the policy's.
    longer: ClassVar[bool] = False

    @classmethod
    def check(cls, file: Path, inputs: Mapping[str, tuple[int, ...]], spec: PolicySpec) -> None:
        OnnxPolicy.check(file, inputs, spec)
        if "x" not in inputs:
            return
        length = max(inputs["x"][1], spec.horizon) if cls.longer else spec.horizon
        for name in inputs.keys() & {"x", "target"}:
            shape = inputs[name]
            if shape[:2] != (1, length) or shape[2] < spec.action_dim:
                raise CheckpointError(f"{file}: input {name!r}: expected shape (1, {length}, {spec.action_dim} or "
                                      f"more), found {shape}")

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        start = time.perf_counter()
        context = self.encode(self.tensors(inputs))
        encoded = time.perf_counter()
        sample = self.sample(context, noise, prefix)
        timings["encode"] = encoded - start
        timings["sample"] = time.perf_counter() - encoded
        return sample

    @abstractmethod
    def sample(self, context: Mapping[str, Any], noise: np.ndarray, prefix: ChunkPrefix | None) -> np.ndarray:
        """Normalised actions (1, H, W). context: of `encode`."""


class FlowOnnx(SampledOnnx):
    """A policy that integrates a flow."""

    @staticmethod
    def graph_names(spec: PolicySpec, settings: Mapping[str, Any]) -> list[str]:
        return ["encoder", "velocity", *(f"velocity_{way}" for way in spec.guidance)]

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self.graphs["velocity"].inputs["x"]

    def sample(self, context: Mapping[str, Any], noise: np.ndarray, prefix: ChunkPrefix | None) -> np.ndarray:
        def velocity(x: np.ndarray, tau: Any) -> np.ndarray:
            name = "velocity_prefix" if isinstance(tau, np.ndarray) else "velocity"
            return self.graphs[name]({**context, "x": x, "tau": _times(tau)})[0]

        guidance: Guidance | None = None
        if prefix is not None and prefix.mode == "prefix":
            guidance = PrefixGuidance(prefix.target, prefix.known)
        elif prefix is not None:
            guidance = _GraphGuidance(self.graphs["velocity_guided"], context, prefix)
        return sample_flow(velocity, noise, self.steps, guidance, self.spec.shift)


class InstructedOnnx(InstructedPolicy, FlowOnnx):
    """A flow whose network may say a subtask, and may read a second prompt. settings: `answer` (None: it says
    nothing), `question` and `plain_prompt`, see InstructedPolicy."""

    def __init__(self, checkpoint: Checkpoint, graphs: Mapping[str, Graph], steps: int | None = None):
        super().__init__(checkpoint, graphs, steps)
        settings = self.settings
        self.question, self.plain_prompt = settings["question"], settings["plain_prompt"]
        self.talk = make_answer(settings["answer"]) if settings["answer"] else None

    @staticmethod
    def graph_names(spec: PolicySpec, settings: Mapping[str, Any]) -> list[str]:
        return [*FlowOnnx.graph_names(spec, settings), *(["text_encoder", "text_step"] if settings["answer"] else [])]

    def tensors(self, inputs: ModelInputs) -> dict[str, np.ndarray]:
        return super().tensors(inputs) | {"plain": (self.plain or inputs).tokens}

    def ask(self, inputs: ModelInputs) -> tuple[np.ndarray, Step]:
        return self.opened(self.tensors(inputs), "text_encoder", "text_step")

    def warm_up(self) -> None:
        super().warm_up()
        if self.talk is not None:
            self.ask(self.blank())[1](0, 0)


class DenoisingOnnx(SampledOnnx):
    """A policy that undoes a diffusion. settings: `diffusion`, the fields of its Diffusion; and past, see
    DenoisingPolicy."""

    longer = True

    def __init__(self, checkpoint: Checkpoint, graphs: Mapping[str, Graph], steps: int | None = None):
        super().__init__(checkpoint, graphs, steps)
        self.past, self.diffusion = self.settings["past"], Diffusion(**self.settings["diffusion"])

    @staticmethod
    def graph_names(spec: PolicySpec, settings: Mapping[str, Any]) -> list[str]:
        # Inpainting ("prefix") needs no graph of its own.
        return ["encoder", "denoise", *(["denoise_guided"] if "guided" in spec.guidance else [])]

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (1 + self.diffusion.draws(self.steps), *self.graphs["denoise"].inputs["x"][1:])

    def sample(self, context: Mapping[str, Any], noise: np.ndarray, prefix: ChunkPrefix | None) -> np.ndarray:
        def denoise(x: np.ndarray, t: int) -> np.ndarray:
            return self.graphs["denoise"]({**context, "x": x, "time": np.array([t])})[0]

        guidance = diffusion_guidance(prefix, self.past, noise.shape[1])
        if isinstance(guidance, RtcDiffusionGuidance):
            guidance = _GraphDiffusionGuidance(self.graphs["denoise_guided"], context, guidance)
        noise = noise[:, None]
        sample = sample_diffusion(denoise, self.diffusion, noise[0], noise[1:], self.steps, guidance)
        return sample[:, self.past : self.past + self.spec.horizon]


class TokenOnnx(AnsweringPolicy, OnnxPolicy):
    """A policy that writes its actions token by token. settings: `answer`, see vla_models.tokenizers.make_answer."""

    def __init__(self, checkpoint: Checkpoint, graphs: Mapping[str, Graph], steps: int | None = None):
        super().__init__(checkpoint, graphs, steps)
        self.answer = make_answer(self.settings["answer"])

    @staticmethod
    def graph_names(spec: PolicySpec, settings: Mapping[str, Any]) -> list[str]:
        return ["encoder", "step"]

    def prefill(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Step]:
        return self.opened(inputs, "encoder", "step")

    def warm_up(self) -> None:
        _, step = self.prefill(self.tensors(self.blank()))
        step(0, 0)


class MotionOnnx(MotionPolicy, TokenOnnx):
    """The same of two answers, a motion in words and its actions. settings, besides: `motions`, see Motions."""

    def __init__(self, checkpoint: Checkpoint, graphs: Mapping[str, Graph], steps: int | None = None):
        super().__init__(checkpoint, graphs, steps)
        self.motions = Motions(self.processor, **self.settings["motions"])


#: How graphs are driven: what the export calls it -> "module:class", a subclass of OnnxPolicy.
DRIVERS = {
    "policy": "vla_models.runtime_onnx:OnePassOnnx",
    "velocity": "vla_models.runtime_onnx:FlowOnnx",
    "instructed": "vla_models.runtime_onnx:InstructedOnnx",
    "denoise": "vla_models.runtime_onnx:DenoisingOnnx",
    "tokens": "vla_models.runtime_onnx:TokenOnnx",
    "motion": "vla_models.runtime_onnx:MotionOnnx",
    "key_frames": "vla_models.runtime_key_frames:KeyFrameOnnx",
}


class _GraphGuidance(RtcGuidance):
    """RTC guidance whose velocity and vector-Jacobian product come from one graph."""

    def __init__(self, graph: Graph, context: Mapping[str, Any], prefix: ChunkPrefix):
        super().__init__(prefix.target, prefix.weights, prefix.beta)
        self.graph = graph
        self.constant = {**context, "target": prefix.target, "weights": prefix.weights}

    def pull(self, velocity: Any, x: np.ndarray, tau: Any) -> tuple[np.ndarray, np.ndarray]:
        v, pull = self.graph({**self.constant, "x": x, "tau": _times(tau)})
        return v, pull


class _GraphDiffusionGuidance(RtcDiffusionGuidance):
    """The same for a diffusion."""

    def __init__(self, graph: Graph, context: Mapping[str, Any], guidance: RtcDiffusionGuidance):
        super().__init__(guidance.target, guidance.weights, guidance.beta)
        self.graph = graph
        self.constant = {**context, "target": guidance.target, "weights": guidance.weights}

    def pull(self, denoise: Any, diffusion: Diffusion, x: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
        prediction, pull = self.graph({**self.constant, "x": x, "time": np.array([t])})
        return prediction, pull


def _times(tau: Any) -> np.ndarray:
    """(1, 1) for a number, arrays as they are; float32."""
    return np.asarray(tau, np.float32) if isinstance(tau, np.ndarray) else np.full((1, 1), tau, np.float32)


def load_onnx(path: str | os.PathLike, provider: str = "cpu", threads: int = 0, steps: int | None = None,
              providers: Sequence[Any] | None = None, precision: str = "fp32") -> OnnxPolicy:
    """The policy of a checkpoint folder on ONNX Runtime, warmed up.

    provider: "cpu", "cuda" or "tensorrt". threads: in one operator, 0: all cores. steps: integration steps,
    None: the checkpoint's own. providers: execution providers in ONNX Runtime's own words, instead of
    `provider`. precision: one of PRECISIONS; all but fp32 are variants of vla_models.precision. Raises
    CheckpointError when a file is missing, cut short or does not fit the others, PolicyError when the provider is
    not available or cannot compute the precision.
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint.folder / WEIGHTS_FILE
    index_tensors(weights)
    mark = fingerprint(weights)
    marks = {FINGERPRINT_KEY: mark}
    command = f"python -m vla_models.export {path}"
    home, folder = checkpoint.folder, checkpoint.folder / GRAPHS_FOLDER
    if precision != "fp32":
        command += f" --precision {precision}"
        home = folder = folder / precision
        if precision in ("fp16", "bf16") and (providers or [provider])[0] in ("cpu", CPU):
            folder /= EMULATED
    cache = engine_cache(mark, folder.glob("*.onnx"), precision) if provider == "tensorrt" else None
    chosen = choose_providers(provider, cache, precision) if providers is None else ProviderOptions(tuple(providers))
    if precision != "fp32":
        if not (home / WEIGHTS_FILE).exists():
            raise CheckpointError(f"{home}: missing; make it with: {command}")
        index_tensors(home / WEIGHTS_FILE)
        marks[VARIANT_KEY] = fingerprint(home / WEIGHTS_FILE)
    graphs: dict[str, Graph] = {}

    def add(name: str) -> Graph:
        file = folder / f"{name}.onnx"
        if not file.exists():
            raise CheckpointError(f"{file}: missing; make it with: {command}")
        graphs[name] = Graph(file, home, chosen, threads)
        if any(graphs[name].metadata.get(key) != value for key, value in marks.items()):
            raise CheckpointError(f"{file}: was exported from other weights than those in {WEIGHTS_FILE}; export "
                                  f"again with: {command}")
        return graphs[name]

    first = add(next((name for name in FIRST if (folder / f"{name}.onnx").exists()), FIRST[0]))
    driver = driver_class(first, folder)
    for name in driver.graph_names(checkpoint.spec, settings_of(first)):
        if name not in graphs:
            add(name)
    for name, graph in graphs.items():
        driver.check(folder / f"{name}.onnx", graph.inputs, checkpoint.spec)
    policy = driver(checkpoint, graphs, steps)
    policy.warm_up()
    return policy


def driver_class(first: Graph, folder: Path) -> type[OnnxPolicy]:
    """The class that drives the graphs of `folder`, by what the first of them says. Raises CheckpointError."""
    # Graphs that say nothing are of a policy in one pass or of a flow.
    name = first.metadata.get(DRIVER_KEY) or ("velocity" if "context" in first.outputs[0] else "policy")
    if name not in DRIVERS:
        raise CheckpointError(f"{folder}: expected graphs of one of {list(DRIVERS)}, found {name!r}")
    module, kind = DRIVERS[name].split(":")
    return getattr(importlib.import_module(module), kind)


def settings_of(first: Graph) -> dict[str, Any]:
    """What the export said of the head, in the first graph."""
    return json.loads(first.metadata.get(SETTINGS_KEY, "{}"))
