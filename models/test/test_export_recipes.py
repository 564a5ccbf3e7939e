"""Every recipe on ONNX Runtime gives the chunks of torch, and no kind of head walks into a known trap of exporters."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
import vla_models  # noqa: E402
from test_recipes import NAMES, make_observation  # noqa: E402
from vla_models import build, identity_normalizers, policy_class  # noqa: E402
from vla_models.__main__ import exportable  # noqa: E402
from vla_models.checkpoint import Checkpoint, write_checkpoint, write_tensors  # noqa: E402
from vla_models.export import ExportError, export_checkpoint, head_class  # noqa: E402
from vla_models.policy import CheckpointError, InferenceRequest, PolicyError  # noqa: E402
from vla_models.runtime_onnx import DRIVERS, Graph, TokenOnnx, driver_class  # noqa: E402
from vla_models.tokenizer import TokenizerError  # noqa: E402
from vla_models.tokenizers import (  # noqa: E402
    BinAnswer,
    BinTokenizer,
    FastAnswer,
    FastTokenizer,
    OpenVLATokenizer,
    OrderedFastAnswer,
    PhraseAnswer,
    TextAnswer,
    WordAnswer,
    decode_answer,
    make_answer,
    plain_answer,
)

#: The exporter, a minute on two idle cores, may meet a busy machine.
pytestmark = pytest.mark.timeout(1800)

#: What a recipe does besides that its preset leaves out, and sizes that export fast.
SETTINGS = {
    "pi05 with subtask": {"subtask": 5, "layers": 1, "vision_layers": 1},
    "pi06 with subtask and advantage": {"subtask": 4, "weight": 1.7},
}
#: One of each kind of head that test_onnx and test_denoising_policy do not export already.
QUICK = ("rth", "pi05 with subtask")
CASES = [*NAMES, *SETTINGS]
#: Inputs and outputs that a sampler integrates, or chooses by.
FLOATS = {"x", "tau", "target", "weights", "velocity", "prediction", "pull", "logits", "actions"}


def export(case: str, folder, seed: int = 0):
    """(torch policy, ONNX policy, graphs by name) of a recipe's tiny preset; none of its weights are zero."""
    name = case.split()[0]
    kind = policy_class(name)
    spec, network = kind.preset("tiny")
    config = dataclasses.asdict(network) | SETTINGS.get(case, {})
    if case in QUICK:  # guidance of flows is exported by test_export
        spec = dataclasses.replace(spec, guidance=())
    torch.manual_seed(seed)
    policy = build(name, config, spec=spec)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    weights = {name: value.numpy() for name, value in policy.network.state_dict().items()}
    write_checkpoint(Checkpoint(policy.spec, identity_normalizers(policy.spec), config), folder)
    write_tensors(folder / "model.safetensors", weights)
    graphs = {graph.name: graph for graph in export_checkpoint(folder)}
    return vla_models.load(folder), vla_models.load(folder, runtime="onnx", threads=1), graphs


def requests(spec, remainder):
    """One without guidance, one for each kind that the specification states."""
    yield InferenceRequest(seed=2)
    for guidance in spec.guidance:
        yield InferenceRequest(remainder, 2, max(spec.horizon // 2, 1), guidance, seed=2)


def agree(torch_policy, onnx_policy) -> float:
    """Largest difference of the targets, over guidance and, where one may be missing, cameras."""
    spec, worst = torch_policy.spec, 0.0
    for seed in range(2):
        observation = make_observation(spec, seed)
        images = {name: image for name, image in observation.images.items() if not seed or name not in spec.optional}
        observation = dataclasses.replace(observation, images=images)
        torch_policy.reset()
        remainder = torch_policy.infer(observation, InferenceRequest(seed=1)).targets
        for request in requests(spec, remainder):
            outputs = []
            for policy in (torch_policy, onnx_policy):
                policy.reset()
                outputs.append(policy.infer(observation, request).targets)
            worst = max(worst, float(np.abs(outputs[0] - outputs[1]).max()))
    return worst


@pytest.fixture(scope="module", params=QUICK)
def exported(request, tmp_path_factory):
    return export(request.param, tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def heads(exported, exported_flow, exported_act, exported_diffusion):
    """Graphs of each kind of head."""
    return [exported[2], exported_flow[1], exported_act[1], exported_diffusion[1]]


def test_the_exported_policy_gives_the_chunks_of_torch(exported):
    assert agree(*exported[:2]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK])
def test_every_recipe_gives_the_chunks_of_torch(case, tmp_path, record_property):
    torch_policy, onnx_policy, graphs = export(case, tmp_path)
    worst = agree(torch_policy, onnx_policy)
    record_property("difference", worst)
    print(f"{case}: actions {worst:.1e}, " + ", ".join(f"{n} {g.difference:.1e}" for n, g in graphs.items()))
    assert worst < 1e-4
    for name, model in models_of([graphs]):
        assert_static(name, model)


def test_every_recipe_has_graphs_and_who_drives_them():
    for name in NAMES:
        assert head_class(policy_class(name)).driver in DRIVERS and exportable(policy_class(name)), name


def test_shapes_are_static_and_types_are_known_all_through(heads):
    """What TensorRT needs to build an engine once and for all, strongly typed."""
    for name, model in models_of(heads):
        assert_static(name, model)


def assert_static(name, model):
    assert not {"Loop", "If", "Scan", "NonZero"} & {node.op_type for node in model.graph.node}, name
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    known = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output, *graph.value_info)}
    for value in (out for node in graph.node for out in node.output if out):
        assert value in known and known[value].elem_type, f"{name}: {value} has no type"
        assert all(dim.HasField("dim_value") for dim in known[value].shape.dim), f"{name}: {value} is not static"


def test_what_is_integrated_is_float32_at_the_borders(heads):
    seen = set()
    for name, model in models_of(heads):
        for value in (*model.graph.input, *model.graph.output):
            if value.name in FLOATS:
                seen.add(value.name)
                assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT, f"{name}: {value.name}"
    assert seen == FLOATS


def models_of(heads):
    for graphs in heads:
        for graph in graphs.values():
            yield f"{graph.path.parent.parent.name}/{graph.name}", onnx.load(graph.path, load_external_data=False)


class Runs:
    """Runs of the graphs of a policy, in order: (graph, values given, outputs)."""

    def __init__(self, monkeypatch, policy):
        self.runs, call = [], Graph.__call__
        names = {id(graph): name for name, graph in policy.graphs.items()}

        def spy(graph, values, keep=False):
            outputs = call(graph, values, keep)
            if id(graph) in names:
                self.runs.append((names[id(graph)], {name: values[name] for name in graph.inputs}, outputs))
            return outputs

        monkeypatch.setattr(Graph, "__call__", spy)

    def of(self, graph):
        return [run for run in self.runs if run[0] == graph]

    def count(self):
        return Counter(name for name, *_ in self.runs)


@pytest.fixture
def policies(exported, exported_flow, exported_diffusion):
    return [
        exported[1],
        *(vla_models.load(folder, runtime="onnx") for folder, _ in (exported_flow, exported_diffusion)),
    ]


def test_the_prefix_is_encoded_once_a_chunk_and_read_by_every_step(policies, monkeypatch):
    for policy in policies:
        runs = Runs(monkeypatch, policy)
        policy.infer(make_observation(policy.spec), InferenceRequest(seed=0))
        count = runs.count()
        steps = next(name for name in ("velocity", "denoise", "step") if name in policy.graphs)
        if policy.spec.recipe == "rth":  # two questions
            assert count["encoder"] == 2 and count["step"] >= len(policy.tokens) - 1
        else:
            assert count["encoder"] == 1 and count[steps] == policy.steps
        encoded = runs.of("encoder")[-1][2]
        for _, values, _ in runs.of(steps)[-3:]:
            kept = [value for value in values.values() if any(value is output for output in encoded)]
            assert kept and not any(isinstance(value, np.ndarray) for value in kept), "the context left the device"


def test_the_cache_of_an_answer_goes_from_step_to_step(exported, monkeypatch):
    _, policy, _ = exported
    runs = Runs(monkeypatch, policy)
    policy.infer(make_observation(policy.spec), InferenceRequest(seed=0))
    graph = "step" if "step" in policy.graphs else "text_step"
    steps = [run for run in runs.of(graph) if run[1]["index"][0]]
    before = {id(outputs[1]): values["index"][0] for _, values, outputs in runs.of(graph)}
    assert len(steps) > 2 and all(values["token"].shape == (1,) for _, values, _ in steps)
    for _, values, _ in steps:
        assert before[id(values["tail"])] == values["index"][0] - 1


def test_no_input_ever_has_another_shape_or_type(policies, monkeypatch):
    """A different instruction, a missing camera, any guidance: no engine is built anew."""
    for policy in policies:
        spec, runs = policy.spec, Runs(monkeypatch, policy)
        observation = make_observation(spec)
        remainder = policy.infer(observation, InferenceRequest(seed=0)).targets
        words = observation.instruction.split()
        for changes in (
            {"instruction": " ".join(words[:1])},
            {"instruction": " ".join(words + words[:1])},
            {"images": {name: image for name, image in observation.images.items() if name not in spec.optional}},
        ):
            for request in requests(spec, remainder[1:]):
                policy.infer(dataclasses.replace(observation, **changes), request)
        found = defaultdict(set)
        for name, values, _ in runs.runs:
            for key, value in values.items():
                array = isinstance(value, np.ndarray)
                found[name, key].add((tuple(value.shape if array else value.shape()),
                                      str(value.dtype) if array else value.data_type()))  # fmt: skip
        for (name, key), kinds in found.items():
            shapes = {shape for shape, _ in kinds}
            assert shapes == {policy.graphs[name].inputs[key]}, f"{name}: {key}"
            if key in FLOATS:
                assert {kind for _, kind in kinds} <= {"float32", "tensor(float)"}, f"{name}: {key}"


def test_drawn_tokens_are_those_of_torch(exported, monkeypatch):
    pair = exported[:2]
    if pair[0].spec.recipe != "rth":
        pytest.skip("draws no tokens")
    observation, said = make_observation(pair[0].spec), []
    for policy in pair:
        monkeypatch.setattr(policy, "spec", dataclasses.replace(policy.spec, temperature=1.0))
    for seed in range(3):
        ours, theirs = (policy.infer(observation, InferenceRequest(seed=seed)) and policy.tokens for policy in pair)
        assert ours == theirs and pair[0].motion == pair[1].motion
        said.append(tuple(ours))
    assert len(set(said)) == 3


def test_a_correction_in_words_takes_effect(exported):
    torch_policy, policy, _ = exported
    if policy.spec.recipe != "rth":
        with pytest.raises(PolicyError, match="takes no corrections"):
            policy.correct("left")
        return
    observation = make_observation(policy.spec)
    free = policy.infer(observation, InferenceRequest(seed=0)).targets
    predicted = policy.motion
    for one in exported[:2]:
        one.correct("go a bit more to the left")
    told, ours = (one.infer(observation, InferenceRequest(seed=0)).targets for one in (policy, torch_policy))
    assert policy.motion == "go a bit more to the left" != predicted
    np.testing.assert_allclose(told, ours, atol=1e-4)
    with pytest.raises(PolicyError, match="correction: .* at most 192 tokens"):
        policy.correct("left " * 50)
    for one in exported[:2]:
        one.reset()
    np.testing.assert_array_equal(policy.infer(observation, InferenceRequest(seed=0)).targets, free)


def test_the_subtask_is_said_and_acted_upon(exported):
    torch_policy, policy, _ = exported
    if policy.spec.recipe != "pi05":
        pytest.skip("says no subtask")
    observation = make_observation(policy.spec)
    said = policy.subtask(observation)
    assert said == torch_policy.subtask(observation)
    inputs = policy.asker.inputs(observation)[0]
    tokens = [decode_answer(one.talk, *one.ask(inputs), np.zeros(5), 0.0) for one in (policy, torch_policy)]
    assert tokens[0] == tokens[1] and len(tokens[0]) > 1
    out = policy.infer(observation, InferenceRequest(seed=0))
    assert out.timings["subtask"] < out.timings["total"]
    policy.talk, talk = None, policy.talk
    heard = policy.infer(dataclasses.replace(observation, instruction=said), InferenceRequest(seed=0)).targets
    deaf = policy.infer(observation, InferenceRequest(seed=0)).targets
    policy.talk = talk
    np.testing.assert_array_equal(out.targets, heard)
    assert np.abs(heard - deaf).max() > 1e-6


def test_a_prompt_that_only_torch_would_put_right_is_refused(tmp_path):
    policy = build("wall_oss")
    spec = dataclasses.replace(policy.spec, prompt="{task}")
    write_checkpoint(Checkpoint(spec, identity_normalizers(spec), dataclasses.asdict(policy.config)), tmp_path)
    weights = {name: value.numpy() for name, value in policy.network.state_dict().items()}
    write_tensors(tmp_path / "model.safetensors", weights)
    with pytest.raises(ExportError, match="policy.json: prompt: expected .*, found '{task}'"):
        export_checkpoint(tmp_path)


class Saying:
    """A graph that answers with the same token again and again."""

    inputs, outputs, provider = {"tail": (1, 1)}, ["keys", "valid", "logits"], "none"

    def __init__(self, answer, token: float):
        self.metadata = {"vla.settings": json.dumps({"answer": plain_answer(answer)})}
        self.logits = np.full((1, answer.vocabulary), 0.0, np.float32)
        self.logits[0, 7] = token

    def __call__(self, values, keep=False):
        value = type("Kept", (), {"numpy": lambda _: self.logits})()
        return [None, None, value] if "index" not in values else [value, None]


@pytest.mark.parametrize("token, message", [(1.0, "expected its end within 12 tokens"), (np.nan, "is not finite")])
def test_an_answer_that_is_no_chunk_is_an_error(token, message):
    spec, _ = policy_class("pi0_fast").preset("tiny")
    shape = (spec.horizon, spec.action_dim)
    answer = FastAnswer(FastTokenizer.unfitted(shape), shape, 768, 16, (68, 61), (127, 2), 12, free=True)
    graphs = dict.fromkeys(("encoder", "step"), Saying(answer, token))
    policy = TokenOnnx(Checkpoint(spec, identity_normalizers(spec)), graphs)
    with pytest.raises(PolicyError, match=f"answer is no chunk of actions: .*{message}"):
        policy.infer(make_observation(spec), InferenceRequest(seed=0))


@pytest.mark.parametrize(
    "answer",
    [
        WordAnswer(BinTokenizer([-1, -2], [1, 3], 4, "truncate"), [(1, 2), (3,), (4,), (5,)], (2, 2), 9, lead=(0, 1)),
        BinAnswer(OpenVLATokenizer(40, 8), (2, 2), 64, 2),
        FastAnswer(FastTokenizer.unfitted((2, 2)), (2, 2), 300, 16, (3, 4), (5, 2), 20),
        OrderedFastAnswer(FastTokenizer.unfitted((2, 2)), (2, 2), 300, 30, (5, 2), 20, False),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_an_answer_survives_as_plain_values(answer):
    again = make_answer(json.loads(json.dumps(plain_answer(answer))))
    chunk = np.array([[0.5, -0.5], [0.9, 0.1]])
    tokens = answer.encode(chunk)
    np.testing.assert_array_equal(again.encode(chunk), tokens)
    np.testing.assert_array_equal(again.decode(tokens), answer.decode(tokens))
    assert again.length == answer.length
    for count in range(3):
        np.testing.assert_array_equal(again.allowed(list(tokens[:count])), answer.allowed(list(tokens[:count])))


def test_a_text_ends_at_its_end_or_at_its_length():
    answer = make_answer(plain_answer(TextAnswer(2, 9, 3)))
    assert answer.allowed([4, 5]).all() and answer.allowed([4, 2]) is None and answer.allowed([4, 5, 6]) is None
    assert answer.decode([4, 2]) == [4] and answer.decode([4, 5, 6]) == [4, 5, 6]


def test_graphs_of_an_unknown_kind_are_refused(tmp_path):
    graph = type("", (), {"metadata": {"vla.driver": "runes"}, "outputs": ["context"]})
    with pytest.raises(CheckpointError, match="expected graphs of one of .*'tokens'.*, found 'runes'"):
        driver_class(graph, tmp_path)


def test_an_unknown_answer_is_refused():
    with pytest.raises(TokenizerError, match="answer: expected one of .*found PhraseAnswer"):
        plain_answer(PhraseAnswer([[(1,)]], 4))
    with pytest.raises(TokenizerError, match="answer: expected one of .*found 'runes'"):
        make_answer({"kind": "runes"})


WITHOUT_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript", "transformers"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Blocker())
import numpy as np
import vla_models
from vla_models.policy import ArmState, InferenceRequest, PolicyObservation

data = np.load(sys.argv[2])
policy = vla_models.load(sys.argv[1], runtime="onnx", threads=1)
images = {name: data["image_" + name] for name in policy.spec.cameras}
state = {"arm": ArmState(data["joints"], data["tool"], 0.5)}
observation = PolicyObservation(images, state, policy.spec.example_instruction, 1.0)
np.testing.assert_allclose(policy.infer(observation, InferenceRequest(seed=5)).targets, data["targets"], atol=1e-4)
assert "torch" not in sys.modules
print("agrees")
"""


def test_text_and_tokens_need_no_torch(exported, tmp_path):
    torch_policy, policy, graphs = exported
    folder = next(iter(graphs.values())).path.parent.parent
    observation = make_observation(policy.spec)
    targets = torch_policy.infer(observation, InferenceRequest(seed=5)).targets
    images = {f"image_{name}": image for name, image in observation.images.items()}
    arm = observation.state["arm"]
    np.savez(tmp_path / "data.npz", targets=targets, joints=arm.joints, tool=arm.tool, **images)
    command = [sys.executable, "-c", WITHOUT_TORCH, str(folder), str(tmp_path / "data.npz")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.stdout == "agrees\n", result.stderr
