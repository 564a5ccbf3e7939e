"""Policies on ONNX Runtime: the graphs of `vla_models.export`, driven by the same samplers as on torch.

Nothing here imports torch: Real-Time Chunking, its vector-Jacobian product included, runs with NumPy and ONNX
Runtime.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from vla_models.checkpoint import WEIGHTS_FILE, Checkpoint, read_checkpoint
from vla_models.diffusion import Diffusion, RtcDiffusionGuidance, diffusion_guidance, sample_diffusion
from vla_models.policy import CheckpointError, ChunkPrefix, ModelInputs, Policy, PolicyError, PolicySpec
from vla_models.safetensors_index import fingerprint, index_tensors
from vla_models.sampling import Guidance, PrefixGuidance, RtcGuidance, sample_flow

GRAPHS_FOLDER = "onnx"
#: Key of a graph's metadata: SHA-256 of the weights it points into.
FINGERPRINT_KEY = "vla.weights.sha256"
#: Key of the metadata of a denoising graph: JSON of its Diffusion's fields, and `past` (see DenoisingPolicy).
DIFFUSION_KEY = "vla.diffusion"
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
#: Provider parameter -> execution provider that must be there.
PROVIDERS = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}


@dataclass(frozen=True)
class ProviderOptions:
    """Execution providers with their options, in ONNX Runtime's words, first choice first. device: where
    values that pass from graph to graph stay, "cpu" or "cuda"."""

    providers: tuple[Any, ...] = (CPU,)
    device: str = "cpu"


def choose_providers(provider: str, cache: Path | None = None) -> ProviderOptions:
    """"cpu", "cuda" or "tensorrt" as execution providers. cache: folder for TensorRT's engines.

    Arithmetic stays float32: TF32 is off under CUDA. Raises PolicyError when the provider is unknown or not
    part of the installed ONNX Runtime, naming those that are.
    """
    present = onnxruntime.get_available_providers()
    usable = [name for name, needed in PROVIDERS.items() if needed in present]
    if provider not in PROVIDERS:
        raise PolicyError(f"provider: expected one of {list(PROVIDERS)}, found {provider!r}")
    if provider not in usable:
        raise PolicyError(f"provider: {provider!r} was asked for, but the installed ONNX Runtime has no "
                          f"{PROVIDERS[provider]}; available: {usable}")
    cuda = (CUDA, {"use_tf32": "0"})
    if provider == "cpu":
        return ProviderOptions()
    if provider == "cuda":
        return ProviderOptions((cuda, CPU), "cuda")
    options = {}
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        options = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache),
                   "trt_timing_cache_enable": "1", "trt_timing_cache_path": str(cache)}
    return ProviderOptions(((TENSORRT, options), cuda, CPU), "cuda")


def engine_cache(mark: str) -> Path:
    """Folder of the TensorRT engines of one model on this GPU and ONNX Runtime.

    mark: fingerprint of the weights. Below $XDG_CACHE_HOME (~/.cache).
    """
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        lines = answer.stdout.splitlines()
        gpu = "-".join("".join(c if c.isalnum() or c == "." else " " for c in lines[0]).split())
    except (OSError, subprocess.SubprocessError, IndexError):
        gpu = "gpu"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "vla" / "tensorrt" / f"{mark[:16]}-{gpu}-ort{onnxruntime.__version__}"


def graph_names(spec: PolicySpec, kind: str) -> list[str]:
    """Names of the graphs that a policy needs.

    kind: "policy" (predicts in one pass), "velocity" (integrates a flow) or "denoise" (undoes a diffusion).
    """
    if kind == "policy":
        return ["policy"]
    optional = {"guided": [f"{kind}_guided"], "prefix": ["velocity_prefix"] if kind == "velocity" else []}
    return ["encoder", kind, *(name for way in spec.guidance for name in optional[way])]


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
    """A policy's exported graphs. See `load_onnx`."""

    def __init__(self, checkpoint: Checkpoint, graphs: Mapping[str, Graph], steps: int | None = None):
        super().__init__(checkpoint.spec, checkpoint.normalizers, checkpoint.folder)
        self.graphs = dict(graphs)
        self.steps = steps or checkpoint.spec.steps
        if "denoise" in self.graphs:
            settings = json.loads(self.graphs["denoise"].metadata[DIFFUSION_KEY])
            self.past = settings.pop("past")
            self.diffusion = Diffusion(**settings)

    @property
    def runtime(self) -> str:
        return "onnx"

    @property
    def provider(self) -> str:
        return next(iter(self.graphs.values())).provider

    @property
    def noise_shape(self) -> tuple[int, ...]:
        if "velocity" in self.graphs:
            return self.graphs["velocity"].inputs["x"]
        if "denoise" in self.graphs:
            return (1 + self.diffusion.draws(self.steps), *self.graphs["denoise"].inputs["x"][1:])
        return super().noise_shape

    def run(self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None,
            timings: dict[str, float]) -> np.ndarray:
        start = time.perf_counter()
        values = {f"image_{camera}": image
                  for camera, image in zip(self.spec.cameras, inputs.images, strict=True)}
        values |= {"tokens": inputs.tokens, "state": inputs.state, "present": inputs.present}
        if "policy" in self.graphs:
            (actions,) = self.graphs["policy"](values)
            timings["sample"] = time.perf_counter() - start
            return actions
        encoder = self.graphs["encoder"]
        context = dict(zip(encoder.outputs, encoder(values, keep=True), strict=True))
        encoded = time.perf_counter()
        sample = (self._denoised if "denoise" in self.graphs else self._integrated)(context, noise, prefix)
        timings["encode"] = encoded - start
        timings["sample"] = time.perf_counter() - encoded
        return sample

    def _integrated(self, context: Mapping[str, Any], noise: np.ndarray, prefix: ChunkPrefix | None) -> np.ndarray:
        guidance = self._guidance(context, prefix)
        return sample_flow(self._velocity(context), noise, self.steps, guidance, self.spec.shift)

    def _denoised(self, context: Mapping[str, Any], noise: np.ndarray, prefix: ChunkPrefix | None) -> np.ndarray:
        def denoise(x: np.ndarray, t: int) -> np.ndarray:
            return self.graphs["denoise"]({**context, "x": x, "time": np.array([t])})[0]

        guidance = diffusion_guidance(prefix, self.past, noise.shape[1])
        if isinstance(guidance, RtcDiffusionGuidance):
            guidance = _GraphDiffusionGuidance(self.graphs["denoise_guided"], context, guidance)
        noise = noise[:, None]
        sample = sample_diffusion(denoise, self.diffusion, noise[0], noise[1:], self.steps, guidance)
        return sample[:, self.past : self.past + self.spec.horizon]

    def warm_up(self) -> None:
        """Run each graph once on zeros: kernels, engines and memory are there for the first inference."""
        spec = self.spec
        time = (spec.history,) if spec.history > 1 else ()
        inputs = ModelInputs(tuple(np.zeros((1, *time, 3, *size), np.float32) for size in spec.cameras.values()),
                             np.zeros((1, spec.context), np.int64),
                             np.zeros((1, *time, spec.state_dim), np.float32), np.ones((1, len(spec.cameras)), bool))
        noise = np.zeros(self.noise_shape, np.float32)
        target = np.zeros((1, spec.horizon, noise.shape[-1]), np.float32)
        for mode in ("", *spec.guidance):
            prefix = ChunkPrefix(mode, target, target[0, :, 0], np.zeros(target.shape[:2], bool), 1.0)
            self.run(inputs, noise, prefix if mode else None, {})

    def _velocity(self, context: Mapping[str, Any]) -> Callable[[np.ndarray, Any], np.ndarray]:
        def velocity(x: np.ndarray, tau: Any) -> np.ndarray:
            name = "velocity_prefix" if isinstance(tau, np.ndarray) else "velocity"
            return self.graphs[name]({**context, "x": x, "tau": _times(tau)})[0]

        return velocity

    def _guidance(self, context: Mapping[str, Any], prefix: ChunkPrefix | None) -> Guidance | None:
        if prefix is None:
            return None
        if prefix.mode == "prefix":
            return PrefixGuidance(prefix.target, prefix.known)
        return _GraphGuidance(self.graphs["velocity_guided"], context, prefix)


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
              providers: Sequence[Any] | None = None) -> OnnxPolicy:
    """The policy of a checkpoint folder on ONNX Runtime, warmed up.

    provider: "cpu", "cuda" or "tensorrt". threads: in one operator, 0: all cores. steps: integration steps,
    None: the checkpoint's own. providers: execution providers in ONNX Runtime's own words, instead of
    `provider`. Raises CheckpointError when a file is missing, cut short or does not fit the others,
    PolicyError when the provider is not available.
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint.folder / WEIGHTS_FILE
    index_tensors(weights)
    mark = fingerprint(weights)
    if providers is None:
        chosen = choose_providers(provider, engine_cache(mark) if provider == "tensorrt" else None)
    else:
        chosen = ProviderOptions(tuple(providers))
    folder = checkpoint.folder / GRAPHS_FOLDER
    one_pass = not (folder / "encoder.onnx").exists() and (folder / "policy.onnx").exists()
    kind = "policy" if one_pass else "denoise" if (folder / "denoise.onnx").exists() else "velocity"
    graphs = {}
    for name in graph_names(checkpoint.spec, kind):
        file = folder / f"{name}.onnx"
        if not file.exists():
            raise CheckpointError(f"{file}: missing; make it with: python -m vla_models.export {path}")
        graphs[name] = Graph(file, checkpoint.folder, chosen, threads)
        _check(graphs[name], file, checkpoint.spec, mark)
    policy = OnnxPolicy(checkpoint, graphs, steps)
    policy.warm_up()
    return policy


def _check(graph: Graph, file: Path, spec: PolicySpec, mark: str) -> None:
    """Raise CheckpointError unless `graph` was made for `spec`, from the weights of fingerprint `mark`."""
    if graph.metadata.get(FINGERPRINT_KEY) != mark:
        raise CheckpointError(f"{file}: was exported from other weights than those in {WEIGHTS_FILE}; export "
                              f"again with: python -m vla_models.export {file.parent.parent}")
    time = (spec.history,) if spec.history > 1 else ()
    expected = {f"image_{camera}": (1, *time, 3, *size) for camera, size in spec.cameras.items()}
    expected |= {"tokens": (1, spec.context), "state": (1, *time, spec.state_dim)}
    # A denoiser's chunk may be longer than the policy's.
    longer = DIFFUSION_KEY in graph.metadata and graph.inputs["x"][1] > spec.horizon
    length = graph.inputs["x"][1] if longer else spec.horizon
    expected["weights"] = (length,)
    for name, shape in graph.inputs.items():
        if name in ("x", "target") and (shape[:2] != (1, length) or shape[2] < spec.action_dim):
            raise CheckpointError(f"{file}: input {name!r}: expected shape (1, {length}, {spec.action_dim} or "
                                  f"more), found {shape}")
        if name in expected and shape != expected[name]:
            raise CheckpointError(f"{file}: input {name!r}: expected shape {expected[name]}, found {shape}")
