"""Export a policy to plain ONNX: `python -m vla_models.export CHECKPOINT` writes CHECKPOINT/onnx/*.onnx.

A flow policy becomes its encoder and one integration step, which the very sampler of `vla_models.sampling`
drives:

    encoder.onnx          image_<camera>..., tokens, state, present -> context
    velocity.onnx         context, x, tau (1, 1) -> velocity
    velocity_guided.onnx  context, x, tau (1, 1), target, weights -> velocity, pull
    velocity_prefix.onnx  context, x, tau (1, H) -> velocity

and a diffusion policy, driven by that of `vla_models.diffusion` (L actions inside the network; time t of training):

    encoder.onnx          as above
    denoise.onnx          context, x (1, L, W), time (1,) int64 -> prediction
    denoise_guided.onnx   context, x, time, target, weights (L,) -> prediction, pull

A policy that writes its actions as tokens, driven by `vla_models.answering` (n tokens at most in an answer):

    encoder.onnx          as above -> keys, valid, logits (1, vocabulary) of the first token
    step.onnx             keys, valid, tail (.., n, d), token (1,), index (1,) -> logits, longer_tail

where `tail` is the cache of the answer, as long as the longest one. A flow that says a subtask first has the same two
besides, text_encoder.onnx and text_step.onnx. A policy that imagines: `vla_models.export_key_frames`.

A context of several tensors is context_0, context_1, ... `pull` is the guidance of Real-Time Chunking with the
true vector-Jacobian product, J^T [W * (Y - x1)]: the backward pass of the network is part of the graph, so that
guided sampling needs no automatic differentiation at run time. A policy that predicts in one pass becomes
policy.onnx (image_<camera>..., tokens, state -> actions).

One step instead of the whole unrolled sampler: any number of steps from one graph, a tenth of its size and of
the time to export, load or build an engine from, for 50 us a step on a CPU. All shapes are static (batch of
one), no attention mask and no cache is made inside a graph, float32 throughout.

Weights are shipped once: each initialiser is external data that points into model.safetensors (found by its
bytes; what is computed from the weights at export, and small constants, stay inline). ONNX Runtime refuses
paths with ".." there, so the location is plain "model.safetensors", and a session is told where that is:

    options.add_session_config_entry("session.model_external_initializers_file_folder_path", CHECKPOINT)

Each graph is checked against torch before it is written; one that differs too much is refused, and what an
earlier export left under its name is removed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vla_models.checkpoint import POLICY_FILE, WEIGHTS_FILE, read_checkpoint, write_atomically
from vla_models.denoising_policy import denoise_of
from vla_models.diffusion import RtcDiffusionGuidance
from vla_models.policy import PolicyError
from vla_models.runtime_onnx import (
    DRIVER_KEY,
    FINGERPRINT_KEY,
    GRAPHS_FOLDER,
    SETTINGS_KEY,
    Graph,
    ProviderOptions,
)
from vla_models.safetensors_index import TensorPlace, fingerprint, index_tensors
from vla_models.sampling import RtcGuidance
from vla_models.tokenizers import plain_answer
from vla_models.torch_policy import Inputs, TorchPolicy, load_torch, velocity_of

TOLERANCE = 1e-5
#: Initialisers below this many bytes that are no weight (shapes, scalars, axes) are folded freely.
SMALL = 4096


class ExportError(ValueError):
    """A policy that cannot be exported, or whose graph does not compute what torch computes."""


@dataclass(frozen=True)
class GraphSource:
    """One graph to be: `function` takes the tensors of `example` by name, returns one tensor an output. metadata: of
    the graph, besides the mark of the weights."""

    name: str
    function: Callable[..., tuple[Tensor, ...]]
    example: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class ExportedGraph:
    """What was written. difference: largest |ONNX - torch| relative to max(1, |torch|). size: bytes of the
    file. shared, inline: bytes of initialisers that lie in model.safetensors and in the file itself."""

    name: str
    path: Path
    difference: float
    size: int
    shared: int
    inline: int
    nodes: int


def export_checkpoint(folder: str | os.PathLike, tolerance: float = TOLERANCE,
                      report: Callable[[ExportedGraph], None] = lambda graph: None) -> list[ExportedGraph]:
    """Write the graphs of a checkpoint folder, each checked against torch on the CPU.

    Raises CheckpointError for a checkpoint that cannot be loaded, ExportError for a policy of an unknown kind
    and for a graph that differs from torch by more than `tolerance`; then no graph of that name is left.
    """
    folder = Path(folder)
    policy = load_torch(folder)
    _check_specification(folder, policy)
    places = index_tensors(folder / WEIGHTS_FILE)
    mark = fingerprint(folder / WEIGHTS_FILE)
    raw = (folder / WEIGHTS_FILE).read_bytes()
    shared = {raw[at.offset : at.offset + at.length]: (name, at) for name, at in places.items()}
    done = []
    for source in graph_sources(policy):
        path = folder / GRAPHS_FOLDER / f"{source.name}.onnx"
        data, facts = build_graph(source, shared, mark)
        difference = compare(source, data, folder)
        if not difference <= tolerance:
            path.unlink(missing_ok=True)
            raise ExportError(f"{path}: refused: differs from torch by {difference:.3g}, expected at most "
                              f"{tolerance:g}")
        write_atomically(path, data)
        done.append(ExportedGraph(source.name, path, difference, len(data), **facts))
        report(done[-1])
    return done


def _check_specification(folder: Path, policy: TorchPolicy) -> None:
    """Raise ExportError where a recipe goes by another specification than policy.json, which is all that the ONNX
    runtime knows."""
    written, used = read_checkpoint(folder).spec.to_dict(), policy.spec.to_dict()
    for name in written:
        if written[name] != used[name]:
            raise ExportError(f"{folder / POLICY_FILE}: {name}: expected {used[name]!r}, which is what recipe "
                              f"{policy.spec.recipe!r} makes of it, found {written[name]!r}")


class Head(ABC):
    """How a policy with one kind of head becomes graphs; see HEADS.

    seed: of the examples for their inputs. A subclass says which of vla_models.runtime_onnx.DRIVERS drives its graphs.
    """

    driver: ClassVar[str]

    def __init__(self, policy: TorchPolicy, seed: int = 0):
        self.policy, self.spec, self.network = policy, policy.spec, policy.network
        self.generator = torch.Generator().manual_seed(seed)

    def settings(self) -> dict[str, Any]:
        """What the driver has to know besides policy.json, plain JSON types."""
        return {}

    @abstractmethod
    def sources(self) -> list[GraphSource]:
        """The graphs, the first of them one of vla_models.runtime_onnx.FIRST."""

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def example(self) -> dict[str, Tensor]:
        """Inputs of a batch of one, by the names that they have in the graphs."""
        spec = self.spec
        time = (spec.history,) if spec.history > 1 else ()
        values = {f"image_{camera}": torch.rand(1, *time, 3, *size, generator=self.generator)
                  for camera, size in spec.cameras.items()}
        words = torch.randint(1, max(len(spec.vocabulary), 2), (1, spec.context), generator=self.generator)
        words[:, spec.context // 2 :] = spec.padding
        values["tokens"] = words if spec.reads_instruction else torch.zeros_like(words)
        values["state"] = self.normal(1, *time, spec.state_dim)
        values["present"] = torch.ones(1, len(spec.cameras), dtype=torch.bool)
        return values

    def inputs(self, values: Mapping[str, Tensor]) -> Inputs:
        """The same as a network takes them."""
        images = tuple(values[f"image_{camera}"] for camera in self.spec.cameras)
        return Inputs(images, values["tokens"], values["state"], values["present"])

    def speaking(
        self, encoder: str, encode: Callable[..., tuple[Tensor, ...]], step: str, go_on: Callable[..., tuple],
        blank: Callable[[Tensor], Tensor],
    ) -> list[GraphSource]:  # fmt: skip
        """Two graphs that write an answer. encode(inputs) -> keys, valid, logits; go_on(keys, valid, tail, token,
        index) -> logits, tail; blank(keys) -> tail: as TokenNetwork has them."""
        example = self.example()
        with torch.no_grad():
            keys, valid, _ = encode(**example)
            tail = blank(keys)
        tail = self.normal(*tail.shape)
        index = torch.tensor([tail.shape[-2] // 2])
        state = {"keys": keys, "valid": valid, "tail": tail, "token": torch.tensor([1]), "index": index}
        return [
            GraphSource(encoder, encode, example, ("keys", "valid", "logits")),
            GraphSource(step, go_on, state, ("logits", "longer_tail")),
        ]


class OnePassHead(Head):
    """policy.onnx: the whole network."""

    driver = "policy"

    def sources(self) -> list[GraphSource]:
        def whole(**values: Tensor) -> tuple[Tensor, ...]:
            return (self.network(self.inputs(values)),)

        return [GraphSource("policy", whole, self.example(), ("actions",))]


class SampledHead(Head):
    """encoder.onnx, which gives the context, and one step of the sampler that reads it; see the module."""

    def context(self, values: Mapping[str, Tensor]) -> Any:
        """What the encoder makes of the inputs: a tensor, or a tuple of them."""
        return self.network.encode(self.inputs(values))

    @abstractmethod
    def steps(self, step: dict[str, Tensor], wish: dict[str, Tensor], context: Callable[[Mapping[str, Tensor]], Any]
              ) -> list[GraphSource]:
        """The graphs of a step, from examples: step, the context and "x"; wish, target and weights of guidance.
        context: that of the network from the inputs of such a graph."""

    def sources(self) -> list[GraphSource]:
        example = self.example()
        with torch.no_grad():
            context = self.context(example)
        several = not isinstance(context, Tensor)
        names = tuple(f"context_{i}" for i in range(len(context))) if several else ("context",)

        def encode(**values: Tensor) -> tuple[Tensor, ...]:
            found = self.context(values)
            return tuple(found) if several else (found,)

        def context_in(values: Mapping[str, Tensor]) -> Any:
            return tuple(values[name] for name in names) if several else values["context"]

        chunk = (1, *self.policy.noise_shape[1:])
        step = dict(zip(names, context if several else (context,), strict=True)) | {"x": self.normal(*chunk)}
        wish = {"target": self.normal(*chunk), "weights": torch.linspace(1, 0, chunk[1])}
        return [GraphSource("encoder", encode, example, names), *self.steps(step, wish, context_in)]


class FlowHead(SampledHead):
    """velocity.onnx and, for the guidance that the specification states, velocity_guided and velocity_prefix."""

    driver = "velocity"

    def velocity(self, context: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """velocity(x, tau) of the network."""
        return velocity_of(self.network, context)

    def steps(self, step: dict[str, Tensor], wish: dict[str, Tensor], context: Callable[[Mapping[str, Tensor]], Any]
              ) -> list[GraphSource]:
        def velocity(x: Tensor, tau: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
            return (self.velocity(context(values))(x, tau),)

        def guided(x: Tensor, tau: Tensor, target: Tensor, weights: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
            return RtcGuidance(target, weights).pull(self.velocity(context(values)), x, tau)

        step["tau"] = torch.rand(1, 1, generator=self.generator)
        times = torch.where(torch.arange(self.spec.horizon) < self.spec.horizon // 3, 1.0, step["tau"])
        ways = {
            "guided": GraphSource("velocity_guided", guided, step | wish, ("velocity", "pull")),
            "prefix": GraphSource("velocity_prefix", velocity, step | {"tau": times}, ("velocity",)),
        }
        return [GraphSource("velocity", velocity, step, ("velocity",)), *(ways[way] for way in self.spec.guidance)]


class InstructedHead(FlowHead):
    """The same of an InstructedPolicy: text_encoder.onnx and text_step.onnx where it says a subtask; where it reads a
    second prompt the encoder has the input `plain`, and the context both."""

    driver = "instructed"

    def settings(self) -> dict[str, Any]:
        policy = self.policy
        answer = plain_answer(policy.talk) if policy.talk is not None else None
        return {"answer": answer, "question": policy.question, "plain_prompt": policy.plain_prompt}

    def example(self) -> dict[str, Tensor]:
        values = super().example()
        return values | ({"plain": values["tokens"].flip(1)} if self.policy.plain_prompt else {})

    def context(self, values: Mapping[str, Tensor]) -> Any:
        if not self.policy.plain_prompt:
            return super().context(values)
        return self.policy.weighed().encode(self.inputs(values), values["plain"])

    def velocity(self, context: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return velocity_of(self.policy.weighed(), context) if self.policy.plain_prompt else super().velocity(context)

    def sources(self) -> list[GraphSource]:
        talk, network = self.policy.talk, self.network
        if talk is None:
            return super().sources()

        def ask(**values: Tensor) -> tuple[Tensor, ...]:
            return network.ask(self.inputs(values))

        def blank(keys: Tensor) -> Tensor:
            return keys.new_zeros(*keys.shape[:-2], talk.length, keys.shape[-1])

        return [*super().sources(), *self.speaking("text_encoder", ask, "text_step", network.say, blank)]


class DenoisingHead(SampledHead):
    """denoise.onnx and denoise_guided.onnx."""

    driver = "denoise"

    def settings(self) -> dict[str, Any]:
        return {"past": getattr(self.network, "past", 0), "diffusion": dataclasses.asdict(self.network.diffusion)}

    def steps(self, step: dict[str, Tensor], wish: dict[str, Tensor], context: Callable[[Mapping[str, Tensor]], Any]
              ) -> list[GraphSource]:
        network, diffusion = self.network, self.network.diffusion

        # Not "t": the exporter calls its transposes so.
        def denoise(x: Tensor, time: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
            return (denoise_of(network, context(values))(x, time),)

        def pulled(x: Tensor, time: Tensor, target: Tensor, weights: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
            guidance = RtcDiffusionGuidance(target, weights)
            return guidance.pull(denoise_of(network, context(values)), diffusion, x, time)

        step["time"] = torch.randint(0, diffusion.steps, (1,), generator=self.generator)
        sources = [GraphSource("denoise", denoise, step, ("prediction",))]
        if "guided" in self.spec.guidance:
            sources.append(GraphSource("denoise_guided", pulled, step | wish, ("prediction", "pull")))
        return sources


class TokenHead(Head):
    """encoder.onnx and step.onnx of a TokenNetwork."""

    driver = "tokens"

    def settings(self) -> dict[str, Any]:
        return {"answer": plain_answer(self.network.answer)}

    def sources(self) -> list[GraphSource]:
        network = self.network

        def encode(**values: Tensor) -> tuple[Tensor, ...]:
            return network.encode(self.inputs(values))

        return self.speaking("encoder", encode, "step", network.step, network.blank)


class MotionHead(TokenHead):
    """The same graphs, asked twice: for a motion in words and for its actions."""

    driver = "motion"

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"motions": self.policy.motions.settings}


#: How policies become graphs: name of their class, or of the nearest one that it derives from -> "module:class", a
#: subclass of Head.
HEADS = {
    "OnePassPolicy": "vla_models.export:OnePassHead",
    "FlowPolicy": "vla_models.export:FlowHead",
    "InstructedPolicy": "vla_models.export:InstructedHead",
    "DenoisingPolicy": "vla_models.export:DenoisingHead",
    "TokenPolicy": "vla_models.export:TokenHead",
    "MotionPolicy": "vla_models.export:MotionHead",
    "KeyFramePolicy": "vla_models.export_key_frames:KeyFrameHead",
}


def head_class(policy: type[TorchPolicy]) -> type[Head] | None:
    """How the policies of a class become graphs; None where that is not known."""
    name = next((HEADS[base.__name__] for base in policy.__mro__ if base.__name__ in HEADS), None)
    if name is None:
        return None
    module, kind = name.split(":")
    return getattr(importlib.import_module(module), kind)


def graph_sources(policy: TorchPolicy, seed: int = 0) -> list[GraphSource]:
    """The graphs of a policy with seeded random examples for their inputs. Raises ExportError for an unknown kind."""
    kind = head_class(type(policy))
    if kind is None:
        raise ExportError(f"recipe {policy.spec.recipe!r}: no graphs are known for {type(policy).__name__}; expected "
                          f"a subclass of {', '.join(HEADS)}")
    head = kind(policy, seed)
    first, *others = head.sources()
    facts = {DRIVER_KEY: head.driver, SETTINGS_KEY: json.dumps(head.settings())}
    return [dataclasses.replace(first, metadata={**first.metadata, **facts}), *others]


def build_graph(source: GraphSource, shared: Mapping[bytes, tuple[str, TensorPlace]], mark: str
                ) -> tuple[bytes, dict[str, int]]:
    """Trace, convert, serialise one graph; initialisers whose bytes are in `shared` become external data."""
    import onnx_ir
    from onnxscript.optimizer import optimize_ir

    def is_weight(value: onnx_ir.Value | None) -> bool:
        return (value is not None and value.is_initializer() and value.const_value is not None
                and value.const_value.tobytes() in shared)

    def may_fold(node: onnx_ir.Node) -> bool | None:
        # A folded weight (transposed, say) would have to be shipped twice. Runtimes fold when they load.
        return False if any(is_weight(value) for value in node.inputs) else None

    model = _convert(source)
    optimize_ir(model, input_size_limit=SMALL, output_size_limit=SMALL, should_fold=may_fold)
    facts = {"shared": 0, "inline": 0, "nodes": len(model.graph)}
    for value in list(model.graph.initializers.values()):
        data = value.const_value.tobytes()
        if data not in shared:
            facts["inline"] += len(data)
            continue
        name, place = shared[data]
        facts["shared"] += len(data)
        if name not in model.graph.initializers:
            value.name = name
        value.const_value = onnx_ir.ExternalTensor(
            location=WEIGHTS_FILE, offset=place.offset, length=place.length, dtype=value.const_value.dtype,
            shape=value.const_value.shape, name=value.name)
    for node in model.graph:
        node.metadata_props.clear()
    model.producer_name = "vla_models"
    model.metadata_props.update({FINGERPRINT_KEY: mark, **source.metadata})
    return onnx_ir.to_proto(model).SerializeToString(), facts


def compare(source: GraphSource, data: bytes, folder: Path, trials: int = 3) -> float:
    """Largest |ONNX - torch| relative to max(1, |torch|) over some inputs; NaN if anything is not finite."""
    graph = Graph(data, folder, ProviderOptions(), threads=1)
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for trial in range(trials):
        inputs = {name: vary(value, generator) if trial else value for name, value in source.example.items()}
        with torch.no_grad():
            expected = [value.numpy() for value in source.function(**inputs)]
        found = graph({name: value.numpy() for name, value in inputs.items()})
        for a, b in zip(found, expected, strict=True):
            a, b = a.astype(np.float64), b.astype(np.float64)  # masks too
            worst = max(worst, float(np.max(np.abs(a - b)) / max(1.0, float(np.max(np.abs(b))))))
            if not np.all(np.isfinite(b)) or not np.all(np.isfinite(a)):
                return float("nan")
    return worst


def vary(value: Tensor, generator: torch.Generator) -> Tensor:
    """Other numbers of the same kind: floats shrink at random, indices change places."""
    if value.is_floating_point():
        return value * torch.rand(value.shape, generator=generator)
    if value.ndim < 2:
        return value[torch.randperm(len(value), generator=generator)]
    return value[:, torch.randperm(value.shape[1], generator=generator)]


def _convert(source: GraphSource):
    """The graph as an onnx_ir.Model, not optimised."""
    from torch._decomp import decomposition_table
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # ONNX has no backward operators: write them out in forward ones.
    backward = {op: way for op, way in decomposition_table.items() if "backward" in str(op)}
    backward[torch.ops.aten.convolution_backward.default] = _convolution_backward
    names = list(source.example)
    values = tuple(source.example.values())
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _quiet():
        traced = make_fx(lambda *inputs: source.function(**dict(zip(names, inputs, strict=True))),
                         decomposition_table=backward)(*values)
        traced.graph.eliminate_dead_code()
        traced.recompile()
        try:
            program = torch.onnx.export(traced, values, dynamo=True, verbose=False, optimize=False,
                                        input_names=names, output_names=list(source.outputs))
        except torch.onnx.errors.OnnxExporterError as error:
            cause = error.__cause__ or error
            message = str(cause).splitlines()[0]
            raise ExportError(f"{source.name}: cannot be written in ONNX: {message}") from error
    return program.model


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: list[int],
                          padding: list[int], dilation: list[int], transposed: bool, output_padding: list[int],
                          groups: int, wanted: list[bool]) -> tuple[Tensor | None, ...]:
    """The gradient of a convolution by its input (no other is needed): the convolution transposed."""
    if wanted[1] or wanted[2]:
        return NotImplemented
    rest = [0] * len(stride)
    if not transposed:
        for axis in range(len(stride)):
            kernel = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
            reached = (grad.shape[2 + axis] - 1) * stride[axis] - 2 * padding[axis] + kernel
            rest[axis] = x.shape[2 + axis] - reached
    arguments = (None, stride, padding, dilation, not transposed, rest, groups)
    return torch.ops.aten.convolution(grad, weight, *arguments), None, None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings from the exporter about libraries that are not used."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def main(argv: list[str] | None = None) -> int:
    """Export one checkpoint folder and print what was written."""
    parser = argparse.ArgumentParser(prog="vla_models.export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE,
                        help="largest difference, relative to max(1, |torch|) (default %(default)g)")
    parser.add_argument("--precision", default="", help="variants to make of the graphs: int8, fp16, bf16, by commas")
    parser.add_argument("--variant-tolerance", type=float,
                        help="largest relative error of a variant's chunks (default: vla_models.precision.TOLERANCES)")
    parser.add_argument("--data", type=Path, help="bags to measure a variant's error with; random inputs without")
    args = parser.parse_args(argv)
    print(f"{'graph':<18}{'difference':>12}{'nodes':>8}{'file KiB':>10}{'shared KiB':>12}{'inline KiB':>12}")

    def report(graph: ExportedGraph) -> None:
        print(f"{graph.name:<18}{graph.difference:>12.2e}{graph.nodes:>8}{graph.size / 1024:>10.0f}"
              f"{graph.shared / 1024:>12.0f}{graph.inline / 1024:>12.1f}", flush=True)

    try:
        export_checkpoint(args.checkpoint, args.tolerance, report)
        if args.precision:
            from vla_models.precision import make_variants

            make_variants(args.checkpoint, args.precision.split(","), args.variant_tolerance, args.data)
    except (ExportError, PolicyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
