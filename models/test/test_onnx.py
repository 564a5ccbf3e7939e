"""The ONNX runtime: the same chunks as torch, no torch, clear errors."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import vla_models
from vla_models.checkpoint import write_tensors
from vla_models.policy import ArmState, CheckpointError, InferenceRequest, PolicyError, PolicyObservation
from vla_models.runtime_onnx import CPU, CUDA, TENSORRT, choose_providers, load_onnx

#: The exporter, half a minute on two idle cores, may meet a busy machine.
pytestmark = pytest.mark.timeout(900)
WITHOUT_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Blocker())
import numpy as np
import vla_models
from vla_models.policy import ArmState, InferenceRequest, PolicyObservation

data = np.load(sys.argv[2])
policy = vla_models.load(sys.argv[1], runtime="onnx")
observation = PolicyObservation({name: data[name] for name in ("scene", "wrist")},
                                {"arm": ArmState(data["joints"], data["tool"], 0.4)}, "take the red")
for mode in ("", "guided", "prefix"):
    request = InferenceRequest(data["remainder"], delay=2, execution_horizon=3, guidance=mode, seed=5)
    np.testing.assert_allclose(policy.infer(observation, request).targets, data["targets_" + mode], atol=1e-5)
assert "torch" not in sys.modules
print("agrees")
"""


def observe(spec, instruction="take the red", seed=0):
    """Images that need resizing, and a state."""
    rng = np.random.default_rng(seed)
    joints = {arm: rng.normal(size=len(spec.joints.get(arm, range(7)))) for arm in spec.arms}
    tool = np.array([0.4, 0.1, 0.3, 0.0, 0.6, 0.0, 0.8])
    return PolicyObservation({camera: rng.integers(0, 256, (48, 64, 3), np.uint8) for camera in spec.cameras},
                             {arm: ArmState(joints[arm], tool, 0.4) for arm in spec.arms}, instruction)


@pytest.fixture(scope="module")
def pair(exported_flow):
    """The flow policy on torch and on ONNX Runtime."""
    return vla_models.load(exported_flow[0]), vla_models.load(exported_flow[0], runtime="onnx", threads=1)


@pytest.fixture
def copy(exported_flow, tmp_path):
    return Path(shutil.copytree(exported_flow[0], tmp_path / "copy"))


@pytest.mark.parametrize("mode", ["", "guided", "prefix"])
@pytest.mark.parametrize("seed", [0, 1])
def test_flow_gives_the_chunk_of_torch(pair, mode, seed):
    observation = observe(pair[0].spec, seed=seed)
    remainder = pair[0].infer(observation, InferenceRequest(seed=7)).targets[3:]
    request = InferenceRequest(remainder, delay=2, execution_horizon=3, guidance=mode, seed=seed)
    expected, found = (policy.infer(observation, request) for policy in pair)
    np.testing.assert_allclose(found.targets, expected.targets, atol=1e-5)
    assert found.prefix_steps == expected.prefix_steps


@pytest.mark.parametrize("schedule", ["exp", "linear", "ones", "zeros"])
def test_guidance_parameters_reach_the_graph(pair, schedule):
    observation = observe(pair[0].spec)
    remainder = pair[0].infer(observation, InferenceRequest(seed=7)).targets
    requests = [InferenceRequest(remainder, 2, 3, "guided", schedule, beta, seed=1) for beta in (0.5, 5.0)]
    for request in requests:
        expected, found = (policy.infer(observation, request).targets for policy in pair)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    one, other = (pair[1].infer(observation, request).targets for request in requests)
    assert np.max(np.abs(one - other)) > 1e-3


@pytest.mark.parametrize("instruction", ["red", "take the blue", "the the the the the the"])
def test_padding_of_the_instruction_is_masked_alike(pair, instruction):
    observation = observe(pair[0].spec, instruction)
    expected, found = (policy.infer(observation, InferenceRequest(seed=2)).targets for policy in pair)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_steps_can_be_chosen_when_loading(exported_flow):
    policies = [vla_models.load(exported_flow[0], runtime=runtime, steps=7) for runtime in ("torch", "onnx")]
    observation = observe(policies[0].spec)
    remainder = policies[0].infer(observation, InferenceRequest(seed=7)).targets
    request = InferenceRequest(remainder, 2, 3, "guided", seed=1)
    expected, found = (policy.infer(observation, request).targets for policy in policies)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_act_gives_the_chunk_of_torch(exported_act):
    policies = [vla_models.load(exported_act[0], runtime=runtime) for runtime in ("torch", "onnx")]
    for seed in range(2):
        observation = observe(policies[0].spec, "", seed)
        expected, found = (policy.infer(observation).targets for policy in policies)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_runs_with_no_torch_installed(pair, exported_flow, tmp_path):
    observation = observe(pair[0].spec)
    remainder = pair[0].infer(observation, InferenceRequest(seed=7)).targets[2:]
    targets = {f"targets_{mode}": pair[0].infer(observation, InferenceRequest(
        remainder, delay=2, execution_horizon=3, guidance=mode, seed=5)).targets for mode in ("", "guided", "prefix")}
    np.savez(tmp_path / "data.npz", remainder=remainder, joints=observation.state["arm"].joints,
             tool=observation.state["arm"].tool, **observation.images, **targets)
    command = [sys.executable, "-c", WITHOUT_TORCH, str(exported_flow[0]), str(tmp_path / "data.npz")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.stdout == "agrees\n", result.stderr


def test_timings_name_the_stages(pair):
    timings = pair[1].infer(observe(pair[1].spec)).timings
    assert set(timings) == {"preprocess", "encode", "sample", "decode", "total"}
    assert all(value >= 0 for value in timings.values())


def test_states_its_runtime_and_provider(pair):
    assert (pair[1].runtime, pair[1].provider) == ("onnx", CPU)


def test_weights_cut_short_give_one_clear_error(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut short"):
        load_onnx(copy)


def test_graph_cut_short_gives_one_clear_error(copy):
    graph = copy / "onnx" / "velocity.onnx"
    graph.write_bytes(graph.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"velocity\.onnx: ONNX Runtime cannot load it"):
        load_onnx(copy)


def test_missing_graph_says_how_to_make_it(copy):
    (copy / "onnx" / "velocity_guided.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"velocity_guided\.onnx: missing; .*vla_models\.export"):
        load_onnx(copy)


def test_graphs_of_other_weights_are_refused(copy):
    from safetensors.numpy import load_file

    tensors = load_file(copy / "model.safetensors")
    write_tensors(copy / "model.safetensors", {name: 2 * value for name, value in tensors.items()})
    with pytest.raises(CheckpointError, match="exported from other weights"):
        load_onnx(copy)


def test_graphs_of_another_specification_are_refused(copy):
    text = (copy / "policy.json").read_text()
    (copy / "policy.json").write_text(text.replace('"horizon": 8', '"horizon": 9'))
    with pytest.raises(CheckpointError, match=r"input 'x': expected shape \(1, 9, 7 or more\), found \(1, 8, 7\)"):
        load_onnx(copy)


def test_unknown_provider_is_refused():
    with pytest.raises(PolicyError, match="provider: expected one of .*found 'gpu'"):
        choose_providers("gpu")


def test_absent_provider_names_those_that_are_there(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(PolicyError, match=r"'tensorrt' was asked for.*available: \['cpu'\]"):
        choose_providers("tensorrt")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_provider_that_does_not_start_is_refused(exported_act, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(PolicyError, match=f"{CUDA} was asked for, but does not work on this machine"):
        load_onnx(exported_act[0], provider="cuda")


def test_cuda_computes_in_float32(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    chosen = choose_providers("cuda")
    assert chosen.providers == ((CUDA, {"use_tf32": "0"}), CPU)
    assert chosen.device == "cuda"
