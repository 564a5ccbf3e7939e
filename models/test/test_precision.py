"""Variants of exported graphs in fewer bits: their error, what stays float32, what is refused; TensorRT's engines."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import vla_models
from safetensors.numpy import load_file
from vla_models import precision, runtime_onnx
from vla_models.checkpoint import write_tensors
from vla_models.export import ExportError, main
from vla_models.policy import CheckpointError, PolicyError
from vla_models.precision import make_variant, recorded_inputs
from vla_models.runtime_onnx import (
    CPU,
    CUDA,
    FINGERPRINT_KEY,
    TENSORRT,
    VARIANT_KEY,
    Graph,
    ProviderOptions,
    choose_providers,
    engine_cache,
    load_onnx,
    tensorrt_version,
)
from vla_models.safetensors_index import fingerprint, index_tensors

#: The exporter, half a minute on two idle cores, may meet a busy machine.
pytestmark = pytest.mark.timeout(900)
PRECISIONS = ["int8", "fp16", "bf16"]
#: Relative error of whole chunks, between these: numbers of 8, 11 and 8 bits leave more than the one.
BOUNDS = {"int8": (1e-3, 5e-2), "fp16": (3e-5, 3e-3), "bf16": (3e-4, 3e-2)}
on_gpu = pytest.mark.skipif(
    CUDA not in onnxruntime.get_available_providers(), reason="the installed ONNX Runtime has no CUDA provider"
)
on_tensorrt = pytest.mark.skipif(
    TENSORRT not in onnxruntime.get_available_providers(), reason="the installed ONNX Runtime has no TensorRT provider"
)


@pytest.fixture(scope="module")
def variants(exported_flow, tmp_path_factory):
    """(checkpoint folder, precision -> variant) of a flow policy."""
    folder = Path(shutil.copytree(exported_flow[0], tmp_path_factory.mktemp("variants") / "flow"))
    return folder, {name: make_variant(folder, name) for name in PRECISIONS}


@pytest.fixture
def copy(exported_act, tmp_path):
    return Path(shutil.copytree(exported_act[0], tmp_path / "act"))


@pytest.fixture
def overflowing(copy):
    """An ACT whose hidden layer has numbers beyond fp16, and which is the same function nevertheless: ReLU(s x) / s."""
    tensors = load_file(copy / "model.safetensors")
    for name, factor in (("mlp.0.weight", 1e5), ("mlp.0.bias", 1e5), ("mlp.3.weight", 1e-5)):
        tensors[f"encoder.0.{name}"] *= np.float32(factor)
    write_tensors(copy / "model.safetensors", tensors)
    graph = onnx.load(copy / "onnx" / "policy.onnx", load_external_data=False)
    onnx.helper.set_model_props(graph, {FINGERPRINT_KEY: fingerprint(copy / "model.safetensors")})
    onnx.save(graph, copy / "onnx" / "policy.onnx")
    return copy


def typed(folder, name):
    """A graph with the types of all its values, checked for each operator."""
    model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in
             [*model.graph.input, *model.graph.output, *model.graph.value_info]}  # fmt: skip
    return model, types | {value.name: value.data_type for value in model.graph.initializer}


@pytest.mark.parametrize("name", PRECISIONS)
def test_error_of_chunks_is_measured_and_small(variants, name):
    variant = variants[1][name]
    least, most = BOUNDS[name]
    assert set(variant.chunks) == {"none", "guided", "prefix"}
    assert set(variant.graphs) == {"encoder", "velocity", "velocity_guided", "velocity_prefix"}
    assert least < variant.error.relative < most
    assert variant.error.cosine > 1 - most**2


@pytest.mark.parametrize("name", PRECISIONS)
def test_variant_drives_the_policy(variants, name):
    exact, small = vla_models.load(variants[0]), vla_models.load(variants[0], runtime="onnx", precision=name)
    inputs = precision.random_inputs(exact, 2, seed=9)
    errors = precision.chunk_errors(small, exact, inputs)
    assert all(BOUNDS[name][0] / 10 < error.relative < BOUNDS[name][1] for error in errors.values())


@pytest.mark.parametrize("name", PRECISIONS)
def test_borders_are_those_of_float32(variants, name):
    for file in sorted((variants[0] / "onnx").glob("*.onnx")):
        exact, small = (onnx.load(path, load_external_data=False).graph for path in (
            file, file.parent / name / file.name))  # fmt: skip
        for ours, theirs in ((small.input, exact.input), (small.output, exact.output)):
            assert [(value.name, value.type) for value in ours] == [(value.name, value.type) for value in theirs]


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("graph", ["encoder", "velocity", "velocity_guided"])
def test_only_products_have_the_small_type(variants, name, graph):
    small = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[name]
    model, types = typed(variants[0] / "onnx" / name, graph)
    found = {node.op_type for node in model.graph.node if types[node.output[0]] == small}
    assert {"MatMul", "Gemm", "Cast"} <= found
    assert found <= precision.PRODUCTS | precision.MOVES | {"Cast"}
    assert ("Conv" in found) == (name == "fp16" and graph == "encoder")


def test_products_next_to_the_sampler_stay_float32(variants):
    model, types = typed(variants[0] / "onnx" / "bf16", "velocity")
    weights = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    exact = {weights[node.input[1]] for node in model.graph.node
             if node.op_type == "Gemm" and types[node.output[0]] == onnx.TensorProto.FLOAT}  # fmt: skip
    assert exact == {"action_in.weight", "action_out.weight", "time.0.weight"}


def test_int8_multiplies_integers(variants):
    model, _ = typed(variants[0] / "onnx" / "int8", "velocity")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulInteger") > kinds.count("Gemm") > 0
    quantised = {node.input[0] for node in model.graph.node if node.op_type == "DynamicQuantizeLinear"}
    assert not quantised & {"x", "tau"}


@pytest.mark.parametrize(("name", "share"), [("int8", 0.45), ("fp16", 0.62), ("bf16", 0.62)])
def test_weights_are_smaller_and_shipped_once(variants, name, share):
    folder, made = variants
    stored = index_tensors(folder / "onnx" / name / "model.safetensors")
    assert made[name].weights < share * made[name].float32
    kinds = {place.dtype for place in stored.values()}
    assert kinds == {"F32", {"int8": "U8", "fp16": "F16", "bf16": "BF16"}[name]}
    for file in (folder / "onnx" / name).rglob("*.onnx"):
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            assert tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.raw_data) < 4096


def test_report_stands_beside_and_in_the_graphs(variants):
    folder, made = variants[0] / "onnx" / "bf16", variants[1]["bf16"]
    report = json.loads((folder / "report.json").read_text())
    assert report["chunks"]["guided"]["relative"] == made.chunks["guided"].relative
    assert report["tolerance"] == precision.TOLERANCES["bf16"]
    graph = Graph(folder / "emulated" / "velocity.onnx", folder, ProviderOptions(), threads=1)
    assert json.loads(graph.metadata[precision.ERROR_KEY])["graph"] == report["graphs"]["velocity"]
    assert graph.metadata[VARIANT_KEY] == fingerprint(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_emulation_rounds_like_torch(variants, name):
    """One layer of the network, in torch's half precision: the same numbers to a rounding of the last bit."""
    torch = pytest.importorskip("torch")
    import onnx_ir

    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    x, weight = torch.randn(4, 16), torch.randn(16, 8)
    value = onnx_ir.Value(name="in", type=onnx_ir.TensorType(precision.FLOAT), shape=onnx_ir.Shape([4, 16]))
    matrix = onnx_ir.Value(name="w", const_value=onnx_ir.tensor(weight.numpy()), shape=onnx_ir.Shape([16, 8]),
                           type=onnx_ir.TensorType(precision.FLOAT))  # fmt: skip
    node = onnx_ir.node("MatMul", [value, matrix])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "out", precision.FLOAT, onnx_ir.Shape([4, 8])
    graph = onnx_ir.Graph([value], node.outputs, nodes=[node], initializers=[matrix], opset_imports={"": 20})
    precision.to_small_floats(graph, name, [node], emulate=True)
    graph.sort()
    session = onnxruntime.InferenceSession(
        onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10)).SerializeToString(), providers=[CPU]
    )
    (found,) = session.run(None, {"in": x.numpy()})
    expected = (x.to(kind).float() @ weight.to(kind).float()).to(kind).float().numpy()
    np.testing.assert_allclose(found, expected, rtol=torch.finfo(kind).eps)
    assert np.max(np.abs(found - (x @ weight).numpy())) > torch.finfo(kind).eps / 8


def test_what_overflows_in_fp16_stays_float32(overflowing):
    variant = make_variant(overflowing, "fp16")
    assert BOUNDS["fp16"][0] < variant.error.relative < BOUNDS["fp16"][1]
    stored = index_tensors(overflowing / "onnx" / "fp16" / "model.safetensors")
    large = {"encoder.0.mlp.0.weight", "encoder.0.mlp.3.weight"}
    assert large <= {name for name, place in stored.items() if place.dtype == "F32"}
    assert stored["encoder.0.attention.out.weight.fp16"].dtype == "F16"


def test_fp16_that_overflows_is_refused(overflowing, monkeypatch):
    monkeypatch.setattr(precision, "large_products", lambda *args: set())
    with pytest.raises(ExportError, match=r"fp16: refused: policy: numbers that are not finite"):
        make_variant(overflowing, "fp16")
    assert not list((overflowing / "onnx").glob("*fp16*"))


def test_variant_beyond_the_tolerance_is_refused_and_removed(copy):
    make_variant(copy, "int8")
    with pytest.raises(ExportError, match=r"int8: refused: differs from torch by .* expected at most 1e-06"):
        make_variant(copy, "int8", tolerance=1e-6)
    assert [path.name for path in (copy / "onnx").iterdir()] == ["policy.onnx"]


def test_variants_of_other_weights_are_refused(copy):
    make_variant(copy, "int8")
    weights = copy / "model.safetensors"
    write_tensors(weights, {name: 2 * value for name, value in load_file(weights).items()})
    with pytest.raises(CheckpointError, match="exported from other weights.*--precision int8"):
        load_onnx(copy, precision="int8")
    with pytest.raises(ExportError, match="exported from other weights"):
        make_variant(copy, "int8")


def test_damaged_weights_of_a_variant_are_refused(copy):
    make_variant(copy, "fp16")
    weights = copy / "onnx" / "fp16" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=r"fp16/model\.safetensors: cut short"):
        load_onnx(copy, precision="fp16")
    weights.write_bytes(data[:-10] + bytes(10))
    with pytest.raises(CheckpointError, match="exported from other weights"):
        load_onnx(copy, precision="fp16")


def test_missing_variant_says_how_to_make_it(copy):
    with pytest.raises(CheckpointError, match=r"onnx/int8: missing; make it with: .*vla_models\.export .* int8"):
        vla_models.load(copy, runtime="onnx", precision="int8")


def test_missing_graphs_say_how_to_make_them(copy):
    (copy / "onnx" / "policy.onnx").unlink()
    with pytest.raises(ExportError, match=r"policy\.onnx: missing; make it with: python -m vla_models\.export"):
        make_variant(copy, "int8")


def test_precision_that_cannot_be_is_refused(copy, monkeypatch):
    with pytest.raises(PolicyError, match="precision: expected one of .*found 'fp8'"):
        load_onnx(copy, precision="fp8")
    with pytest.raises(PolicyError, match="precision: torch computes in 'fp32', found 'int8'"):
        vla_models.load(copy, runtime="torch", precision="int8")
    with pytest.raises(ExportError, match=r"precision: expected one of \['int8', 'fp16', 'bf16'\], found 'fp8'"):
        make_variant(copy, "fp8")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    with pytest.raises(PolicyError, match=r"precision: 'int8' runs on \['cpu'\], found provider 'tensorrt'"):
        choose_providers("tensorrt", None, "int8")


def test_command_makes_variants_and_prints_their_errors(copy, capsys, monkeypatch):
    monkeypatch.setattr("vla_models.export.export_checkpoint", lambda *args: [])  # the float32 graphs are there
    assert main([str(copy), "--precision", "int8,bf16"]) == 0
    rows = {tuple(line.split()[:2]): line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    for name in ("int8", "bf16"):
        assert BOUNDS[name][0] < float(rows[name, "policy"][2]) < BOUNDS[name][1]
        assert (copy / "onnx" / name / "policy.onnx").exists()
    assert main([str(copy), "--precision", "int8", "--variant-tolerance", "1e-9"]) == 1
    assert "refused: differs from torch" in capsys.readouterr().err


def test_error_can_be_measured_on_recorded_observations(policy_of, episodes_of, monkeypatch):
    policy = policy_of("flow")
    monkeypatch.setattr("vla_models.episodes.load_episodes", lambda data, spec, **_: episodes_of(spec))
    found = recorded_inputs("bags", policy, 4)
    assert len(found) == 4
    noise = np.zeros(policy.noise_shape, np.float32)
    for inputs in found:
        assert 0 <= inputs.images[0].min() < inputs.images[0].max() <= 1
        assert np.isfinite(policy.run(inputs, noise, None, {})).all()
    assert len({inputs.tokens.tobytes() for inputs in found}) > 1


def test_engines_are_kept_apart_by_all_that_they_depend_on(monkeypatch, tmp_path):
    one, other = tmp_path / "one.onnx", tmp_path / "other.onnx"
    one.write_bytes(b"one")
    other.write_bytes(b"other")
    base = {"mark": "a" * 64, "graphs": (one,), "precision": "fp32", "gpu": "NVIDIA H200", "driver": "570.1",
            "onnxruntime": "1.31", "tensorrt": "10.9"}  # fmt: skip

    def folder(**changes):
        case = base | changes
        answer = subprocess.CompletedProcess([], 0, stdout=f"{case['gpu']}, {case['driver']}\n")
        monkeypatch.setattr(runtime_onnx.subprocess, "run", lambda *args, **kwargs: answer)
        monkeypatch.setattr(onnxruntime, "__version__", case["onnxruntime"])
        monkeypatch.setattr(runtime_onnx, "tensorrt_version", lambda: case["tensorrt"])
        return engine_cache(case["mark"], case["graphs"], case["precision"])

    changes = [{"mark": "b" * 64}, {"graphs": (other,)}, {"graphs": (one, other)}, {"precision": "bf16"},
               {"gpu": "NVIDIA L4"}, {"driver": "580.2"}, {"onnxruntime": "1.32"}, {"tensorrt": "10.10"}]  # fmt: skip
    assert len({folder(), *(folder(**change) for change in changes)}) == 1 + len(changes)
    assert folder() == folder()
    name = folder().name
    assert name.startswith("a" * 16) and name.endswith("-fp32-NVIDIA-H200-570.1-ort1.31-trt10.9")


def test_engines_without_a_gpu_or_tensorrt_have_a_folder_too(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(runtime_onnx.subprocess, "run", missing)
    monkeypatch.setattr(runtime_onnx, "version", lambda name: (_ for _ in ()).throw(
        runtime_onnx.PackageNotFoundError(name)))  # fmt: skip
    monkeypatch.setattr(runtime_onnx.ctypes.util, "find_library", lambda name: None)
    assert tensorrt_version() == "none"
    assert engine_cache("a" * 64).name.endswith("-gpu-ort" + onnxruntime.__version__ + "-trtnone")


def test_tensorrt_builds_strongly_typed_networks_and_keeps_engines(monkeypatch, tmp_path):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "unset")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    cache = tmp_path / "engines"
    chosen = choose_providers("tensorrt", cache, "bf16")
    assert chosen.providers == (
        (TENSORRT, {
            "trt_fp16_enable": "0", "trt_bf16_enable": "0", "trt_int8_enable": "0",
            "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "1", "trt_timing_cache_path": str(cache),
        }),
        (CUDA, {"use_tf32": "0"}),
        CPU,
    )  # fmt: skip
    assert cache.is_dir()
    assert runtime_onnx.os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


def test_tensorrt_gets_the_graphs_own_cache(variants, monkeypatch):
    """What `load_onnx` hands to ONNX Runtime: the typed graphs, not the emulation, and a folder for just them."""
    asked = []

    def stop(model, weights, providers, threads):
        asked.append((model, weights, providers.providers[0][1]["trt_engine_cache_path"]))
        raise CheckpointError("enough")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(variants[0] / "cache"))
    monkeypatch.setattr(runtime_onnx, "Graph", stop)
    for name in ("fp32", "bf16", "fp16"):
        with pytest.raises(CheckpointError, match="enough"):
            load_onnx(variants[0], provider="tensorrt", precision=name)
    homes = [variants[0] / "onnx" / name for name in ("", "bf16", "fp16")]
    assert [model.parent for model, _, _ in asked] == homes
    assert [weights for _, weights, _ in asked] == [variants[0], *homes[1:]]
    assert len({cache for _, _, cache in asked}) == 3


def test_input_of_no_fixed_shape_is_refused(tmp_path):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [out]), ir_version=10,
                                   opset_imports=[onnx.helper.make_opsetid("", 20)])  # fmt: skip
    with pytest.raises(CheckpointError, match=r"input 'x': expected a fixed shape, found \('n', 3\)"):
        Graph(model.SerializeToString(), tmp_path, ProviderOptions())


@on_gpu
@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_cuda_gives_the_chunks_of_torch(variants, name):
    policy = load_onnx(variants[0], provider="cuda", precision=name)
    exact = vla_models.load(variants[0])
    errors = precision.chunk_errors(policy, exact, precision.random_inputs(exact))
    limit = 1e-4 if name == "fp32" else BOUNDS[name][1]
    assert all(error.relative < limit for error in errors.values())


@on_tensorrt
@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_tensorrt_gives_the_chunks_of_torch_and_builds_once(variants, name, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    policy = load_onnx(variants[0], provider="tensorrt", precision=name)
    exact = vla_models.load(variants[0])
    errors = precision.chunk_errors(policy, exact, precision.random_inputs(exact))
    assert all(error.relative < (1e-3 if name == "fp32" else BOUNDS[name][1]) for error in errors.values())
    engines = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.engine")}
    assert engines
    load_onnx(variants[0], provider="tensorrt", precision=name)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.engine")} == engines
