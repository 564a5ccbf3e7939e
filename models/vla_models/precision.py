"""Exported graphs in fewer bits: int8, fp16 and bf16 variants, each with its measured error.

    python -m vla_models.export CHECKPOINT --precision int8,fp16,bf16

makes, from the float32 graphs in CHECKPOINT/onnx, for each precision

    CHECKPOINT/onnx/<precision>/*.onnx              graphs of the same names, inputs and outputs, float32 at the borders
    CHECKPOINT/onnx/<precision>/model.safetensors   their weights, shared by them
    CHECKPOINT/onnx/<precision>/emulated/*.onnx     fp16 and bf16 for the CPU, see below
    CHECKPOINT/onnx/<precision>/report.json         error against torch in float32, and sizes

fp16 and bf16 are strongly typed: products with matrices and convolutions take and give the small type, what only moves
numbers keeps the type it is given, and everything else (norms, softmax, activations, sums, the sampler) is float32,
with casts in between. That is the rule of torch.autocast with a float32 residual stream, and what TensorRT
obeys as it stands. The first and the last products, those next to x, time, state or actions, stay float32 as well, and
in fp16 those in which numbers come near the largest of the type.

int8 quantises the weights of products, convolutions and tables by output channel. A product of activations with a
matrix of weights quantises the activations as it runs, by tensor, and multiplies integers, the "dynamic quantisation"
of ONNX Runtime; it needs no calibration. Elsewhere the weights are turned back into float32. Weights are unsigned
around 128: signed ones overflow the 16 bit sums of processors without VNNI.

ONNX Runtime's CPU provider has no bfloat16 arithmetic, and runs fp16 graphs in float32 without the rounding in between,
so that what overflows on a GPU is finite there. For both there is therefore an emulation: the same graph in float32,
rounded to the small type wherever the variant has it. Errors are measured on it, and it is what runs on the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from safetensors.torch import save_file
from torch import Tensor

from vla_models.checkpoint import WEIGHTS_FILE, read_checkpoint, write_atomically
from vla_models.export import ExportError, GraphSource, graph_sources, vary
from vla_models.policy import ChunkPrefix, ModelInputs, Policy, PolicySpec
from vla_models.preprocess import image_tensor
from vla_models.runtime_onnx import (
    EMULATED,
    FINGERPRINT_KEY,
    GRAPHS_FOLDER,
    PRECISION_KEY,
    VARIANT_KEY,
    Graph,
    ProviderOptions,
    driver_class,
)
from vla_models.safetensors_index import TensorPlace, fingerprint, index_tensors
from vla_models.torch_policy import TorchPolicy, load_torch

#: Key of a variant's metadata: JSON of its errors.
ERROR_KEY = "vla.error"

FLOAT = onnx_ir.DataType.FLOAT
SMALL_TYPES = {"fp16": onnx_ir.DataType.FLOAT16, "bf16": onnx_ir.DataType.BFLOAT16}
PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose"}
#: Operators that move numbers about and compute nothing.
VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
MOVES = VIEWS | {"Concat", "Gather", "Slice", "Split"}
#: A product in which numbers come within this factor of the largest of fp16 stays float32.
HEADROOM = 8
LARGEST = 65504.0
#: Inputs and outputs next to which products stay float32: the sampler's, and what the robot measures and does.
BORDERS = {"x", "tau", "time", "state", "target", "weights", "velocity", "prediction", "pull", "actions"}
#: Stands for the number 0 in int8.
ZERO = 128
#: Largest relative error of a whole chunk of normalised actions.
TOLERANCES = {"int8": 0.15, "fp16": 0.02, "bf16": 0.1}
#: How the names of weights end that a variant has made.
OWN = (".int8", ".scale", ".fp16", ".bf16")


class _Editor:
    """New values and nodes in a graph."""

    def __init__(self, graph: onnx_ir.Graph):
        self.graph = graph
        self.count = 0

    def add(
        self,
        op: str,
        inputs: Iterable[onnx_ir.Value],
        dtype: onnx_ir.DataType,
        like: onnx_ir.Value | None = None,
        outputs: int = 1,
        **attributes: Any,
    ) -> onnx_ir.Value | list[onnx_ir.Value]:
        """Append a node (the graph is sorted in the end); its output, which has the shape of `like`."""
        self.count += 1
        found = onnx_ir.node(op, list(inputs), attributes, num_outputs=outputs, name=f"small_{op}_{self.count}")
        for value in found.outputs:
            value.name = f"small_{self.count}_{value.index()}"
            value.dtype = dtype
            value.shape = like.shape if like is not None else None
        self.graph.append(found)
        return found.outputs[0] if outputs == 1 else list(found.outputs)

    def constant(self, name: str, data: onnx_ir.TensorProtocol | np.ndarray) -> onnx_ir.Value:
        """An initialiser, which may be there already."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = onnx_ir.tensor(data) if isinstance(data, np.ndarray) else data
        value = onnx_ir.Value(name=name, const_value=tensor, type=onnx_ir.TensorType(tensor.dtype), shape=tensor.shape)
        self.graph.register_initializer(value)
        return value


def is_float(value: onnx_ir.Value | None) -> bool:
    return value is not None and value.dtype == FLOAT


def products(graph: onnx_ir.Graph) -> list[onnx_ir.Node]:
    """The nodes that may compute in a small type: products of floats, without those next to the borders.

    Next to a border are those that read an input or give an output of BORDERS with no other product in between.
    """

    def reach(values: Iterable[onnx_ir.Value], forward: bool) -> set[onnx_ir.Node]:
        waiting, seen, found = [value for value in values if value.name in BORDERS], set(), set()
        while waiting:
            value = waiting.pop()
            for node in [use.node for use in value.uses()] if forward else [value.producer()]:
                if node is None or node in seen:
                    continue
                seen.add(node)
                if node.op_type in PRODUCTS:
                    found.add(node)
                else:
                    waiting += filter(is_float, node.outputs if forward else node.inputs)
        return found

    near = reach(graph.inputs, True) | reach(graph.outputs, False)
    return [node for node in graph if node.op_type in PRODUCTS and is_float(node.outputs[0]) and node not in near]


def weight_of(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """The weight (external, of two dimensions or more) that `value` is, transposed or reshaped; None if it is none."""
    while value is not None and value.producer() is not None and value.producer().op_type in VIEWS:
        value = value.producer().inputs[0]
    if value is None or not isinstance(value.const_value, onnx_ir.ExternalTensor) or not is_float(value):
        return None
    return value if len(value.shape) > 1 else None


def weights_of(graph: onnx_ir.Graph, chosen: Iterable[onnx_ir.Node]) -> list[onnx_ir.Value]:
    """The weights that the chosen products and tables (Gather) read, and that no other product reads."""
    wanted: dict[onnx_ir.Value, None] = {}
    others = set()
    chosen = set(chosen)
    for node in graph:
        for weight in filter(None, map(weight_of, node.inputs)):
            if node in chosen or node.op_type == "Gather":
                wanted[weight] = None
            elif node.op_type in PRODUCTS:
                others.add(weight)
    return [weight for weight in wanted if weight not in others]


def to_small_floats(graph: onnx_ir.Graph, precision: str, chosen: Iterable[onnx_ir.Node], emulate: bool = False) -> int:
    """Make the chosen products compute in "fp16" or "bf16"; how many do.

    Before opset 22 ONNX has no convolution in bfloat16: there only its weights are. emulate: all in float32 instead,
    rounded wherever the other has the small type.
    """
    small, edit, chosen = SMALL_TYPES[precision], _Editor(graph), set(chosen)
    held: dict[onnx_ir.Value, onnx_ir.Value] = {}  # float32 value -> the same in the small type

    def widen(value: onnx_ir.Value) -> onnx_ir.Value:
        return edit.add("Cast", [value], FLOAT, value, to=FLOAT)

    def rounded(value: onnx_ir.Value) -> onnx_ir.Value:
        if value not in held:
            cast = edit.add("Cast", [value], small, value, to=small)
            held[value] = widen(cast) if emulate else cast
        return held[value]

    def hold(node: onnx_ir.Node) -> None:
        """The outputs of a node are of the small type from now on; who wants float32 gets it from a cast."""
        for value in node.outputs:
            if not emulate:
                value.dtype = small
            wide = edit.add("Cast", [value], small if emulate else FLOAT, value, to=small if emulate else FLOAT)
            last = widen(wide) if emulate else wide
            _take_over(value, last, except_for=wide.producer())
            held[last] = last if emulate else value

    nodes = list(graph)
    weights = weights_of(graph, chosen)
    if precision == "bf16":
        chosen = {node for node in chosen if not node.op_type.startswith("Conv")}
    for weight in weights:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and the variant is refused
            data = weight.const_value.numpy().astype(small.numpy())
        stored = edit.constant(f"{weight.name}.{precision}", data)
        wide = widen(stored)
        _take_over(weight, wide)
        held[wide] = wide if emulate else stored
    for node in nodes:
        floats = [value for value in node.inputs if is_float(value)]
        if node in chosen:
            for index, value in enumerate(node.inputs):
                if is_float(value):
                    node.replace_input_with(index, rounded(value))
            hold(node)
        elif node.op_type in MOVES and floats and all(value in held for value in floats):
            for index, value in enumerate(node.inputs):
                if value in held:
                    node.replace_input_with(index, held[value])
            if emulate:
                held.update((value, value) for value in node.outputs)
            else:
                hold(node)
    return len(chosen)


def to_int8(graph: onnx_ir.Graph, chosen: Iterable[onnx_ir.Node]) -> int:
    """Quantise the weights of the chosen products and of tables, and products of activations with a matrix of them; how
    many products multiply integers."""
    edit = _Editor(graph)
    chosen = list(chosen)
    weights = weights_of(graph, chosen)
    integer = {}  # node -> (weight, whether the product reads it transposed)
    for node in chosen:
        found = _matrix_of(node)
        if found is not None and found[0] in weights:
            integer[node] = found
    stored = {}
    for weight in weights:
        axis = _channels(weight, {swapped for found, swapped in integer.values() if found is weight})
        data, scale = quantise(weight.const_value.numpy(), axis)
        name = f"{weight.name}.{axis}"
        values = [edit.constant(f"{name}.int8", data), edit.constant(f"{name}.scale", scale)]
        zero = edit.constant(f"zeros_{len(scale)}", np.full(len(scale), ZERO, np.uint8))
        stored[weight] = (*values, axis)
        _take_over(weight, edit.add("DequantizeLinear", [*values, zero], FLOAT, weight, axis=axis))
    uint8, int32 = onnx_ir.DataType.UINT8, onnx_ir.DataType.INT32
    count = 0
    quantised: dict[onnx_ir.Value, list[onnx_ir.Value]] = {}
    for node, (weight, swapped) in integer.items():
        data, scale, axis = stored[weight]
        if axis != (0 if swapped else 1):
            continue
        value, out = node.inputs[0], node.outputs[0]
        if value not in quantised:
            quantised[value] = edit.add("DynamicQuantizeLinear", [value], uint8, value, outputs=3)
            quantised[value][1].dtype, quantised[value][1].shape = FLOAT, onnx_ir.Shape([])
            quantised[value][2].shape = onnx_ir.Shape([])
        whole, step, zero = quantised[value]
        if swapped:
            data = edit.add("Transpose", [data], uint8, perm=[1, 0])
        middle = edit.constant("zero", np.array(ZERO, np.uint8))
        total = edit.add("MatMulInteger", [whole, data, zero, middle], int32, out)
        total = edit.add("Cast", [total], FLOAT, out, to=FLOAT)
        total = edit.add("Mul", [total, edit.add("Mul", [step, scale], FLOAT, scale)], FLOAT, out)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            total = edit.add("Add", [total, node.inputs[2]], FLOAT, out)
        _take_over(out, total)
        count += 1
    return count


def quantise(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned integers around ZERO and the scales (n,) along `axis`: values = (integers - ZERO) * scale."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.max(np.abs(values), axis=others, keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    integers = np.clip(np.rint(values / scale), -127, 127) + ZERO
    return integers.astype(np.uint8), scale.reshape(-1)


def _channels(weight: onnx_ir.Value, ways: set[bool]) -> int:
    """The axis of a weight's output channels. ways: whether the products with it as a matrix read it transposed, as
    those of the forward pass do; where those of the backward pass differ, it is the former's."""
    if ways:
        return 0 if True in ways else 1
    if any(use.node.op_type == "ConvTranspose" for use in weight.uses()):
        return 1
    return len(weight.shape) - 1 if len(weight.shape) == 3 else 0


def _matrix_of(node: onnx_ir.Node) -> tuple[onnx_ir.Value, bool] | None:
    """(weight, transposed) of a product of activations with a matrix of weights that integers can compute."""
    attributes = {name: value.value for name, value in node.attributes.items()}
    if node.op_type not in ("MatMul", "Gemm") or attributes.get("transA", 0) or weight_of(node.inputs[0]) is not None:
        return None
    if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        return None
    value, swapped = node.inputs[1], bool(attributes.get("transB", 0))
    while value is not None and value.producer() is not None:
        maker = value.producer()
        if maker.op_type != "Transpose" or len(value.shape) != 2:
            return None
        value, swapped = maker.inputs[0], not swapped
    return (value, swapped) if weight_of(value) is value and len(value.shape) == 2 else None


def _take_over(old: onnx_ir.Value, new: onnx_ir.Value, except_for: onnx_ir.Node | None = None) -> None:
    """Let `new` be read, and leave the graph, in place of `old`."""
    for use in list(old.uses()):
        if use.node is not except_for:
            use.node.replace_input_with(use.idx, new)
    graph = new.producer().graph
    for index, value in enumerate(graph.outputs):
        if value is old:
            old.name, new.name = f"{old.name}_small", old.name
            graph.outputs[index] = new


@dataclass(frozen=True)
class Error:
    """How far numbers are from those of torch in float32, the worst of what was tried.

    relative: |difference| / |torch|, Euclidean norms. cosine: of the angle between the two. largest: difference.
    """

    relative: float = 0.0
    cosine: float = 1.0
    largest: float = 0.0

    @classmethod
    def of(cls, found: np.ndarray, expected: np.ndarray) -> Error:
        a, b = np.ravel(found).astype(np.float64), np.ravel(expected).astype(np.float64)
        if not np.all(np.isfinite(a)):
            return cls(float("inf"), -1.0, float("inf"))
        norms = np.linalg.norm(a), np.linalg.norm(b)
        same = np.array_equal(a, b)
        relative = 0.0 if same else float(np.linalg.norm(a - b) / max(norms[1], 1e-12))
        cosine = 1.0 if same else float(a @ b / max(norms[0] * norms[1], 1e-24))
        return cls(relative, cosine, float(np.max(np.abs(a - b), initial=0.0)))

    def worse(self, other: Error) -> Error:
        relative, largest = max(self.relative, other.relative), max(self.largest, other.largest)
        return Error(relative, min(self.cosine, other.cosine), largest)


@dataclass(frozen=True)
class Variant:
    """What was written.

    graphs: name -> error on random inputs. sizes: name -> bytes of the file. chunks: guidance ("none", ...) -> error of
    whole chunks of normalised actions. weights: bytes of the variant's weights, float32: of those they were made from.
    products, small: products of all graphs, and those that compute in the small type.
    """

    precision: str
    folder: Path
    graphs: Mapping[str, Error]
    sizes: Mapping[str, int]
    chunks: Mapping[str, Error]
    weights: int
    float32: int
    products: int
    small: int
    tolerance: float

    @property
    def error(self) -> Error:
        """The worst of whole chunks."""
        worst = Error()
        for error in self.chunks.values():
            worst = worst.worse(error)
        return worst

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "folder": self.folder.name}


def make_variant(
    folder: str | os.PathLike,
    precision: str,
    tolerance: float | None = None,
    inputs: Sequence[ModelInputs] = (),
    trials: int = 3,
) -> Variant:
    """Write one variant of the float32 graphs of a checkpoint folder.

    tolerance: largest relative error of a whole chunk, by default TOLERANCES. inputs: observations to measure it with,
    as a network takes them; random ones by default, `trials` of them.
    Raises ExportError when the float32 graphs are missing or of other weights, and when the variant is not finite or
    further from torch than `tolerance`; then no file of it is left.
    """
    if precision not in TOLERANCES:
        raise ExportError(f"precision: expected one of {list(TOLERANCES)}, found {precision!r}")
    folder = Path(folder)
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    target = folder / GRAPHS_FOLDER / precision
    policy = load_torch(folder)
    sources = graph_sources(policy)
    shutil.rmtree(target, ignore_errors=True)
    draft = target.with_name(f".{precision}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        variant = _write(folder, draft, precision, policy, sources, inputs or random_inputs(policy, trials), tolerance)
        for name, error in {**variant.graphs, **variant.chunks}.items():
            if not np.isfinite(error.relative):
                raise ExportError(f"{target}: refused: {name}: numbers that are not finite; torch's are")
        if not variant.error.relative <= tolerance:
            raise ExportError(f"{target}: refused: differs from torch by {variant.error.relative:.3g} of its actions, "
                              f"expected at most {tolerance:g}")  # fmt: skip
        os.rename(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return variant


def make_variants(
    folder: str | os.PathLike, precisions: Sequence[str], tolerance: float | None = None,
    data: str | os.PathLike | None = None,
) -> list[Variant]:  # fmt: skip
    """Write several variants and print a table of them. data: bags to measure their errors with. See make_variant."""
    inputs = recorded_inputs(data, load_torch(folder)) if data else ()
    print(f"\n{'precision':<10}{'graph or chunk':<22}{'relative':>10}{'cosine':>10}{'largest':>10}{'file KiB':>10}"
          f"{'weights':>10}{'small':>10}")  # fmt: skip
    done = []
    for precision in precisions:
        done.append(variant := make_variant(folder, precision, tolerance, inputs))
        weights, small = f"{variant.weights / variant.float32:.0%}", f"{variant.small}/{variant.products}"
        rows = {name: (error, f"{variant.sizes[name] / 1024:.0f}") for name, error in variant.graphs.items()}
        rows |= {f"chunk, {guidance}": (error, "") for guidance, error in variant.chunks.items()}
        for name, (error, size) in rows.items():
            print(f"{precision:<10}{name:<22}{error.relative:>10.1e}{error.cosine:>10.6f}{error.largest:>10.1e}{size:>10}"
                  f"{weights:>10}{small:>10}", flush=True)  # fmt: skip
            weights = small = ""
    return done


def _write(
    folder: Path, draft: Path, precision: str, policy: TorchPolicy, sources: Sequence[GraphSource],
    inputs: Sequence[ModelInputs], tolerance: float,
) -> Variant:  # fmt: skip
    """Write the variant into `draft` and measure it."""
    mark = fingerprint(folder / WEIGHTS_FILE)
    files = {source.name: folder / GRAPHS_FOLDER / f"{source.name}.onnx" for source in sources}
    models, emulated, total, small = {}, {}, 0, 0
    for source in sources:
        model = _read(files[source.name], folder, mark)
        chosen = products(model.graph)
        if precision == "fp16":
            examples = [_arrays(example) for example in (source.example, *_variations(source))]
            seen = [_values(values, policy.spec) for values in inputs]
            examples += [values for values in seen if source.example.keys() <= values.keys()]
            kept = large_products(model, chosen, folder, examples)
            chosen = [node for node in chosen if node not in kept]
        total += sum(node.op_type in PRODUCTS for node in model.graph)
        if precision == "int8":
            small += to_int8(model.graph, chosen)
        else:
            emulated[source.name] = other = _read(files[source.name], folder, mark)
            twins = dict(zip(model.graph, other.graph, strict=True))
            to_small_floats(other.graph, precision, [twins[node] for node in chosen], emulate=True)
            small += to_small_floats(model.graph, precision, chosen)
        models[source.name] = model
    written = [(draft, models), (draft / EMULATED, emulated)]
    for _, group in written:
        for model in group.values():
            model.graph.sort()
            RemoveUnusedNodesPass()(model)
    save_file(_stored([*models.values(), *emulated.values()]), draft / WEIGHTS_FILE)
    shutil.copymode(folder / WEIGHTS_FILE, draft / WEIGHTS_FILE)
    places = index_tensors(draft / WEIGHTS_FILE)
    own = fingerprint(draft / WEIGHTS_FILE)
    graphs = {name: Graph(_point(model, places), draft, ProviderOptions(), threads=1)
              for name, model in (emulated or models).items()}  # fmt: skip
    errors = {source.name: _graph_error(source, graphs[source.name]) for source in sources}
    variant = driver_class(graphs[sources[0].name], folder)(read_checkpoint(folder), graphs)
    chunks = chunk_errors(variant, policy, inputs)
    sizes = {}
    for place, group in written:
        for name, model in group.items():
            facts = {"graph": asdict(errors[name]), "chunks": {way: asdict(error) for way, error in chunks.items()}}
            model.metadata_props.update({PRECISION_KEY: precision, VARIANT_KEY: own, ERROR_KEY: json.dumps(facts)})
            data = _point(model, places)
            sizes.setdefault(name, len(data))
            write_atomically(place / f"{name}.onnx", data)
    weights = [(path / WEIGHTS_FILE).stat().st_size for path in (draft, folder)]
    result = Variant(precision, folder / GRAPHS_FOLDER / precision, errors, sizes, chunks, *weights, total, small,
                     tolerance)  # fmt: skip
    write_atomically(draft / "report.json", (json.dumps(result.to_dict(), indent=1) + "\n").encode())
    return result


def large_products(
    model: onnx_ir.Model, chosen: Sequence[onnx_ir.Node], folder: Path, examples: Sequence[Mapping[str, np.ndarray]]
) -> set[onnx_ir.Node]:
    """Those of the chosen products that take or give numbers near the largest of fp16."""
    probe = onnx_ir.from_proto(onnx_ir.to_proto(model))
    edit, outputs = _Editor(probe.graph), []
    twins = dict(zip(model.graph, list(probe.graph), strict=True))
    for node in chosen:
        for value in filter(is_float, [*twins[node].inputs, *twins[node].outputs]):
            largest = edit.add("ReduceMax", [edit.add("Abs", [value], FLOAT, value)], FLOAT, keepdims=0)
            largest.shape = onnx_ir.Shape([])
            outputs.append((node, largest))
    probe.graph.outputs[:] = [largest for _, largest in outputs]
    probe.graph.sort()
    graph = Graph(onnx_ir.to_proto(probe).SerializeToString(), folder, ProviderOptions(), threads=1)
    found = set()
    for example in examples:
        values = graph(example)
        found |= {node for (node, _), value in zip(outputs, values, strict=True) if not value < LARGEST / HEADROOM}
    return found


def chunk_errors(found: Policy, expected: Policy, inputs: Sequence[ModelInputs]) -> dict[str, Error]:
    """Guidance ("none" and those that the policy takes) -> error of the normalised actions, same noise for both."""
    spec, rng = expected.spec, np.random.default_rng(0)
    errors = {}
    for values in inputs:
        chunk = None
        for mode in ("", *spec.guidance):
            noise = (spec.temperature * rng.standard_normal(found.noise_shape)).astype(np.float32)
            prefix = None
            if mode:
                weights = np.linspace(1, 0, spec.horizon, dtype=np.float32)
                known = np.arange(spec.horizon)[None] < max(1, min(spec.prefix_limit, spec.horizon // 4))
                prefix = ChunkPrefix(mode, chunk, weights, known, 5.0)
            actions = []
            for policy in (found, expected):
                policy.reset()
                actions.append(np.asarray(policy.run(values, noise, prefix, {})))
            if chunk is None:
                chunk = actions[1][:, : spec.horizon]
            error = Error.of(*(part[..., : spec.action_dim] for part in actions))
            errors[mode or "none"] = error.worse(errors.get(mode or "none", Error()))
    return errors


def recorded_inputs(data: str | os.PathLike, policy: Policy, count: int = 16) -> list[ModelInputs]:
    """Observations drawn at random from the bags below a folder, as a network takes them. Raises DataError."""
    from vla_models.data import Dataset
    from vla_models.episodes import load_episodes

    spec = policy.spec
    samples = Dataset(load_episodes(data, spec, workers=1), policy.processor)
    found = []
    for step in range(count):
        batch = samples.draw(1, 0, step)
        images = tuple(image_tensor(batch[f"camera/{camera}"]) for camera in spec.cameras)
        found.append(ModelInputs(images, batch["tokens"], batch["state"].astype(np.float32), batch["present"]))
    return found


def random_inputs(policy: Policy, count: int = 3, seed: int = 0) -> list[ModelInputs]:
    """Random observations."""
    spec, rng = policy.spec, np.random.default_rng(seed)
    time = (spec.history,) if spec.history > 1 else ()
    found = []
    for _ in range(count):
        images = tuple(rng.random((1, *time, 3, *size), np.float32) for size in spec.cameras.values())
        tokens = policy.processor.tokens(spec.example_instruction, np.zeros(spec.state_dim))
        state = rng.standard_normal((1, *time, spec.state_dim), np.float32)
        found.append(ModelInputs(images, np.asarray(tokens)[None], state, np.ones((1, len(images)), bool)))
    return found


def _variations(source: GraphSource, count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{name: vary(value, generator) for name, value in source.example.items()} for _ in range(count)]


def _values(inputs: ModelInputs, spec: PolicySpec) -> dict[str, np.ndarray]:
    """Inputs by their names in the graphs."""
    images = {f"image_{camera}": image for camera, image in zip(spec.cameras, inputs.images, strict=True)}
    return images | {"tokens": inputs.tokens, "state": inputs.state, "present": inputs.present}


def _arrays(example: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in example.items()}


def _graph_error(source: GraphSource, graph: Graph) -> Error:
    worst = Error()
    for example in [source.example, *_variations(source)]:
        with torch.no_grad():
            expected = source.function(**example)
        for a, b in zip(graph(_arrays(example)), expected, strict=True):
            worst = worst.worse(Error.of(a, b.numpy()))
    return worst


def _read(file: Path, folder: Path, mark: str) -> onnx_ir.Model:
    """A float32 graph that was exported from the weights of this fingerprint."""
    if not file.exists():
        raise ExportError(f"{file}: missing; make it with: python -m vla_models.export {folder}")
    model = onnx_ir.load(file)
    if model.metadata_props.get(FINGERPRINT_KEY) != mark:
        raise ExportError(f"{file}: was exported from other weights than those in {WEIGHTS_FILE}; export again with: "
                          f"python -m vla_models.export {folder}")  # fmt: skip
    onnx_ir.external_data.set_base_dir(model.graph, folder)
    return model


def _stored(models: Iterable[onnx_ir.Model]) -> dict[str, Tensor]:
    """Weights of all graphs by name, each once."""
    tensors = {}
    for model in models:
        for name, value in model.graph.initializers.items():
            if name in tensors or not (isinstance(value.const_value, onnx_ir.ExternalTensor) or name.endswith(OWN)):
                continue
            data = np.array(value.const_value.numpy())
            # torch knows no bfloat16 of NumPy's.
            bits = data.view(np.int16) if value.dtype == onnx_ir.DataType.BFLOAT16 else data
            tensors[name] = torch.from_numpy(bits) if bits is data else torch.from_numpy(bits).view(torch.bfloat16)
    return tensors


def _point(model: onnx_ir.Model, places: Mapping[str, TensorPlace]) -> bytes:
    """The serialised graph, with its weights where they lie in the variant's file."""
    for name, value in model.graph.initializers.items():
        if name in places:
            place = places[name]
            value.const_value = onnx_ir.ExternalTensor(
                location=WEIGHTS_FILE, offset=place.offset, length=place.length, dtype=value.const_value.dtype,
                shape=value.const_value.shape, name=name)  # fmt: skip
    return onnx_ir.to_proto(model).SerializeToString()
