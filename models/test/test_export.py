"""Exported graphs: plain, static, float32 ONNX that computes what torch computes and ships the weights once."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from vla_models.export import ExportError, compare, export_checkpoint, graph_sources, main
from vla_models.policy import CheckpointError
from vla_models.runtime_onnx import Graph, ProviderOptions
from vla_models.safetensors_index import index_tensors
from vla_models.torch_policy import TorchPolicy, load_torch

#: The exporter, half a minute on two idle cores, may meet a busy machine.
pytestmark = pytest.mark.timeout(900)
GRAPHS = ["encoder", "velocity", "velocity_guided", "velocity_prefix", "policy"]


@pytest.fixture(params=GRAPHS)
def graph(request, exported_flow, exported_act):
    folder, graphs = exported_act if request.param == "policy" else exported_flow
    return folder, graphs[request.param], onnx.load(graphs[request.param].path, load_external_data=False)


def test_flow_becomes_an_encoder_and_steps(exported_flow):
    assert sorted(exported_flow[1]) == sorted(GRAPHS[:-1])


def test_act_becomes_one_graph(exported_act):
    assert list(exported_act[1]) == ["policy"]


def test_graph_agrees_with_torch(graph):
    assert graph[1].difference < 1e-5


def test_graph_is_plain_onnx_of_a_recent_opset(graph):
    assert {opset.domain for opset in graph[2].opset_import} == {""}
    assert graph[2].opset_import[0].version >= 18
    assert not graph[2].functions


def test_graph_has_static_shapes(graph):
    for value in [*graph[2].graph.input, *graph[2].graph.output]:
        assert all(dim.HasField("dim_value") and dim.dim_value > 0 for dim in value.type.tensor_type.shape.dim)


def test_graph_computes_in_float32_only(graph):
    small = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
    values = [*graph[2].graph.input, *graph[2].graph.output, *graph[2].graph.value_info]
    assert not small & {value.type.tensor_type.elem_type for value in values}
    assert not small & {tensor.data_type for tensor in graph[2].graph.initializer}


def test_graph_has_no_control_flow(graph):
    assert not {"Loop", "If", "Scan", "NonZero"} & {node.op_type for node in graph[2].graph.node}


def test_weights_point_into_the_safetensors_file(graph):
    folder, facts, model = graph
    places = index_tensors(folder / "model.safetensors")
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in outside:
        where = {entry.key: entry.value for entry in tensor.external_data}
        place = places[tensor.name]
        assert where["location"] == "model.safetensors"
        assert (int(where["offset"]), int(where["length"])) == (place.offset, place.length)
    assert sum(places[tensor.name].length for tensor in outside) == facts.shared


def test_no_weight_is_shipped_twice(graph):
    assert graph[1].inline < 4096 < graph[1].shared


def test_guided_graph_has_the_true_jacobian(exported_flow):
    folder, graphs = exported_flow
    network = load_torch(folder).network.requires_grad_(False)
    inputs = next(source for source in graph_sources(load_torch(folder)) if source.name == "velocity_guided").example
    x = inputs["x"].clone().requires_grad_()
    end = x + (1 - inputs["tau"]) * network.velocity(inputs["context"], x, inputs["tau"])
    error = inputs["weights"][:, None] * (inputs["target"] - end.detach())
    (expected,) = torch.autograd.grad(end, x, error)
    graph = Graph(graphs["velocity_guided"].path, folder, ProviderOptions(), threads=1)
    _, pull = graph({name: value.numpy() for name, value in inputs.items()})
    np.testing.assert_allclose(pull, expected.numpy(), atol=1e-5)
    assert np.max(np.abs(pull - error.numpy())) > 1e-3, "the Jacobian is not the identity"


def test_comparison_notices_a_wrong_graph(exported_flow):
    folder, graphs = exported_flow
    policy = load_torch(folder)
    with torch.no_grad():
        policy.network.action_out.bias += 1e-3
    source = next(source for source in graph_sources(policy) if source.name == "velocity")
    assert compare(source, graphs["velocity"].path.read_bytes(), folder) > 1e-4


def test_graph_above_the_tolerance_is_refused_and_removed(exported_act, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(exported_act[0], tmp_path / "copy"))
    graph = folder / "onnx" / "policy.onnx"
    built = graph.read_bytes(), {"shared": 0, "inline": 0, "nodes": 0}
    monkeypatch.setattr("vla_models.export.build_graph", lambda *args: built)
    with pytest.raises(ExportError, match="policy.onnx: refused: differs from torch by .*, expected at most 1e-12"):
        export_checkpoint(folder, tolerance=1e-12)
    assert not graph.exists()


def test_unknown_kind_of_policy_is_refused(exported_act):
    class Stranger(TorchPolicy):
        run = None

    stranger = object.__new__(Stranger)
    stranger.__dict__ = load_torch(exported_act[0]).__dict__
    with pytest.raises(ExportError, match="no graphs are known for Stranger"):
        graph_sources(stranger)


def test_command_reports_a_bad_checkpoint_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "policy.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [3, 100, -1])
def test_index_refuses_a_file_cut_short(exported_act, tmp_path, keep):
    data = (exported_act[0] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="cut short"):
        index_tensors(tmp_path / "model.safetensors")


def test_index_finds_the_tensors(exported_act):
    from safetensors.numpy import load_file

    path = exported_act[0] / "model.safetensors"
    data, tensors = path.read_bytes(), load_file(path)
    for name, place in index_tensors(path).items():
        found = np.frombuffer(data[place.offset : place.offset + place.length], np.float32).reshape(place.shape)
        np.testing.assert_array_equal(found, tensors[name])
