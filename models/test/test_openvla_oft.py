"""The recipe "openvla_oft" against the code that its authors published, and its checkpoints."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vla_core import se3

torch = pytest.importorskip("torch")
import vla_models  # noqa: E402
from parity.fixture import Fixture  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_openvla import CONFIG, close, write_tokenizer  # noqa: E402
from test_recipes import make_observation  # noqa: E402
from vla_models import build  # noqa: E402
from vla_models.policy import CheckpointError, InferenceRequest  # noqa: E402
from vla_models.preprocess import axis_angle, state_vector  # noqa: E402
from vla_models.published import TensorFiles, fill, translate  # noqa: E402
from vla_models.recipes.openvla_oft import OpenVlaOftConfig, OpenVlaOftPolicy  # noqa: E402
from vla_models.torch_policy import Batch, Inputs  # noqa: E402

#: Largest difference found: 3e-6.
TINY = OpenVlaOftConfig(dino=(16, 3, 2, 32), siglip=(16, 3, 2, 27), language=(32, 2, 4, 48), vocabulary=580, text=516,
                        space=35, film=True, crop=1.0)  # fmt: skip
SEVEN, EIGHT = np.linspace(-1, -0.5, 7), np.linspace(-1, 0.5, 8)
STATISTICS = {
    "libero_goal_no_noops": {
        "action": {"q01": SEVEN.tolist(), "q99": (SEVEN + 1).tolist(), "mask": [True] * 6 + [False]},
        "proprio": {"q01": EIGHT.tolist(), "q99": (EIGHT + 2).tolist()},
    }
}


@pytest.fixture(scope="module")
def fixture():
    return Fixture("openvla_oft")


@pytest.fixture(scope="module")
def network(fixture):
    spec, _ = OpenVlaOftPolicy.preset("tiny")
    network = OpenVlaOftPolicy.Network(spec, TINY).eval()
    fill(network, fixture, OpenVlaOftPolicy.published)
    return network


def inputs_of(fixture, context: int = 12) -> Inputs:
    tokens = torch.zeros(2, context, dtype=torch.long)
    tokens[:, :12] = fixture.inputs["tokens"]
    images = tuple(fixture.inputs[name] for name in ("scene", "wrist"))
    return Inputs(images, tokens, fixture.inputs["state"], torch.ones(2, 2, dtype=torch.bool))


def write(fixture, folder, statistics=STATISTICS, parts=("action_head", "proprio_projector")):
    """A folder as it is published, but with safetensors for the parts in files of their own."""
    weights = {name: value for name, value in fixture.weights.items() if not name.startswith(parts)}
    save_file(weights, folder / "model.safetensors")
    for part in parts:
        own = {f"module.{name.removeprefix(part + '.')}": value for name, value in fixture.weights.items()
               if name.startswith(part)}  # fmt: skip
        save_file(own, folder / f"{part}--50000_checkpoint.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "norm_stats": {"bridge": {}}}))
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    write_tokenizer(folder)
    return folder


def test_actions_and_loss_are_those_of_the_reference(fixture, network):
    inputs = inputs_of(fixture)
    with torch.no_grad():
        close(network(inputs), fixture.outputs["actions"], "actions")
        batch = Batch(inputs, fixture.inputs["actions"], torch.zeros(2, 8, dtype=torch.bool))
        close(network.loss(batch, torch.Generator())["loss"], fixture.outputs["loss"], "loss")


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 9))
def test_padding_changes_nothing(fixture, network, more):
    with torch.no_grad():
        found = network(inputs_of(fixture, 12 + more))
    assert (found - fixture.outputs["actions"]).abs().max() < 1e-5


def test_every_token_sees_every_other(fixture, network):
    """The stop token is the last of the sequence; the first action sees it all the same."""
    embedding = network.vlm.language.get_input_embeddings().weight
    with torch.no_grad():
        before = embedding[2].clone()
        embedding[2] += 1.0
        moved = network(inputs_of(fixture)) - fixture.outputs["actions"]
        embedding[2] = before
    assert (moved[:, 0].abs() > 1e-4).any()


def test_padded_steps_do_not_count(fixture, network):
    padded = torch.zeros(2, 8, dtype=torch.bool)
    padded[:, 3:] = True
    batch = Batch(inputs_of(fixture), fixture.inputs["actions"], padded)
    expected = (fixture.outputs["actions"] - fixture.inputs["actions"])[:, :3].abs().mean()
    with torch.no_grad():
        close(network.loss(batch, torch.Generator())["loss"], expected, "loss")


def test_a_published_folder_loads_and_gives_the_references_actions(fixture, tmp_path):
    policy = vla_models.load(write(fixture, tmp_path))
    assert policy.config == OpenVlaOftConfig(**{**TINY.__dict__, "crop": 0.9})
    assert policy.spec.horizon == 8 and policy.spec.state == "libero" and policy.spec.period == 0.05
    assert set(policy.left_out.values()) == {
        "never computed: the features are the output of the second-to-last block",
        "the head that predicts tokens is not used",
    }
    policy.network.vlm.crop = torch.nn.Identity()
    with torch.no_grad():
        close(policy.network(inputs_of(fixture)), fixture.outputs["actions"], "actions")
    out = policy.infer(make_observation(policy.spec), InferenceRequest())
    assert out.targets.shape == (9, 8) and np.isfinite(out.targets).all()
    # 1 is 5 cm or 0.5 rad to LIBERO's controller; a finger travels 4 cm.
    low, high = SEVEN[:6], SEVEN[:6] + 1
    units = np.array([0.05] * 3 + [0.5] * 3)
    np.testing.assert_allclose(policy.processor.action.denormalize(-np.ones(7))[:6], low * units)
    np.testing.assert_allclose(policy.processor.action.denormalize(np.ones(7)), [*(high * units), 1.0])
    raw = np.array([0.1, 0.2, 0.3, 3.0, 0.1, -0.1, 0.03, -0.03])
    ours = raw / np.array([1] * 6 + [0.04] * 2)
    np.testing.assert_allclose(policy.processor.state.normalize(ours), raw - EIGHT - 1, atol=1e-6)


def test_alohas_settings(fixture, tmp_path):
    """Two arms, three cameras, chunks of 25, extremes instead of quantiles."""
    numbers = np.linspace(-1, 1, 14)
    bounds = {"min": (numbers - 2).tolist(), "max": (numbers + 1).tolist()}
    width = TINY.language[0]
    weights = dict(fixture.weights)
    for name, shape in {
        "action_head.model.layer_norm1.weight": (14 * width,), "action_head.model.layer_norm1.bias": (14 * width,),
        "action_head.model.fc1.weight": (width, 14 * width), "action_head.model.fc2.weight": (14, width),
        "action_head.model.fc2.bias": (14,), "proprio_projector.fc1.weight": (width, 14),
    }.items():  # fmt: skip
        weights[name] = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    statistics = {"aloha1_fold_shorts": {"action": bounds, "proprio": bounds}}
    policy = vla_models.load(write(SimpleNamespace(weights=weights), tmp_path, statistics))
    assert list(policy.spec.cameras) == ["top", "left_wrist", "right_wrist"] and policy.spec.horizon == 25
    np.testing.assert_allclose(policy.processor.action.denormalize(np.ones(14)), numbers + 1)
    out = policy.infer(make_observation(policy.spec), InferenceRequest())
    assert out.targets.shape == (25, 14)


def test_pickled_parts_are_never_read(fixture, tmp_path):
    folder = write(fixture, tmp_path)
    (folder / "action_head--50000_checkpoint.safetensors").rename(folder / "action_head--50000_checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"action_head--50000_checkpoint.pt: a pickle.*convert it"):
        vla_models.load(folder)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("action_head", {"module.model.fc2.bias": None}, r"missing, first 'action_head.fc2.bias'"),
        ("action_head", {"module.model.fc3.bias": torch.zeros(2)}, r"unknown tensors, first .*model.fc3"),
        ("proprio_projector", {"module.fc1.weight": torch.zeros(32, 9)}, r"expected shape \(32, 8\), found \(32, 9\)"),
    ],
)  # fmt: skip
def test_a_tensor_too_few_too_many_or_of_another_shape_is_named(fixture, tmp_path, name, change, said):
    folder = write(fixture, tmp_path)
    path = folder / f"{name}--50000_checkpoint.safetensors"
    files = TensorFiles(path)
    tensors = {key: files[key].clone() for key in files.shapes} | change
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(CheckpointError, match=said):
        vla_models.load(folder)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("vision_backbone--1_checkpoint.pt", "expected the towers with FiLM in model.safetensors"),
        ("noisy_action_projector--1_checkpoint.pt", "this one is for a diffusion"),
        ("action_head--2_checkpoint.safetensors", "expected one action_head"),
    ],
)
def test_other_files_are_refused(fixture, tmp_path, file, said):
    folder = write(fixture, tmp_path)
    (folder / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=said):
        vla_models.load(folder)


def test_a_state_of_another_length_is_named(fixture, tmp_path):
    statistics = json.loads(json.dumps(STATISTICS))
    statistics["libero_goal_no_noops"]["proprio"] = {"q01": [0.0] * 7, "q99": [1.0] * 7}
    with pytest.raises(CheckpointError, match="proprio: expected 8 numbers, found 7"):
        vla_models.load(write(fixture, tmp_path, statistics))


def test_every_tensor_of_a_fine_tuned_openvla_has_its_place():
    shapes = {name: tuple(shape) for name, shape in json.loads(Fixture("openvla").metadata["full"]).items()}
    width = 4096
    shapes |= {f"proprio_projector.fc1.{name}": shape for name, shape in (("weight", (width, 8)), ("bias", (width,)))}
    shapes |= {f"proprio_projector.fc2.{n}": s for n, s in (("weight", (width, width)), ("bias", (width,)))}
    head = {"layer_norm1": (7 * width,), "fc1": (width, 7 * width), "layer_norm2": (width,), "fc2": (7, width)}
    for i in range(2):
        head |= {f"mlp_resnet_blocks.{i}.ffn.0": (width,), f"mlp_resnet_blocks.{i}.ffn.1": (width, width)}
    for name, shape in head.items():
        shapes |= {f"action_head.model.{name}.weight": shape, f"action_head.model.{name}.bias": shape[:1]}
    ours, _ = translate(shapes, OpenVlaOftPolicy.published)
    network = build("openvla_oft", "paper", device="meta").network
    state = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert state == {name: shapes[sources[0][0]] for name, sources in ours.items() if name in state}


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_axis_and_angle_are_of_the_same_rotation(quaternion):
    turn = axis_angle(np.array(quaternion))
    assert turn[0] >= 0
    np.testing.assert_allclose(se3.exp_so3(turn), se3.quat_to_matrix(np.array(quaternion)), atol=1e-7)


def test_a_gripper_that_points_down_has_a_steady_state():
    spec, _ = OpenVlaOftPolicy.preset("tiny")
    states = []
    for tilt in (-0.05, 0.05):
        angle = np.pi + tilt
        tool = np.array([0.4, 0.0, 0.2, np.sin(angle / 2), 0.01, 0.0, np.cos(angle / 2)])
        arm = make_observation(spec).state["arm"]
        states.append(state_vector(spec, {"arm": type(arm)(arm.joints, tool, 0.25)}))
    assert np.abs(states[1] - states[0]).max() < 0.11
    np.testing.assert_allclose(states[0][6:], [0.25, -0.25])
