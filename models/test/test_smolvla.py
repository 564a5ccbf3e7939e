"""SmolVLA gives the numbers of LeRobot's, and reads its checkpoints."""

import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from parity.fixture import Fixture  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from vla_models import build, load  # noqa: E402
from vla_models.policy import CheckpointError, PolicyError, example_spec  # noqa: E402
from vla_models.preprocess import resize_image  # noqa: E402
from vla_models.published import fill, own_shapes, translate  # noqa: E402
from vla_models.recipes.smolvla import BACKBONES, SmolVlaConfig, SmolVlaNetwork, SmolVlaPolicy, sizes_of  # noqa: E402
from vla_models.sampling import sample_flow  # noqa: E402
from vla_models.torch_policy import Inputs, velocity_of  # noqa: E402

ROOT = "model.vlm_with_expert."
CAMERAS = ("a", "b")
HEADS = {"vision_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture("smolvla")


@pytest.fixture(scope="module")
def network(fixture) -> SmolVlaNetwork:
    config = SmolVlaConfig(**sizes_of(own_shapes(fixture, SmolVlaPolicy.published), **HEADS), self_every=2)
    contract = SmolVlaPolicy.contract | {"horizon": 8, "context": 12, "tokenizer": "bytes"}
    spec = example_spec("smolvla", {"arm": 7}, dict.fromkeys(CAMERAS, (32, 32)), **contract)
    network = SmolVlaNetwork(spec, config).eval()
    assert fill(network, fixture, SmolVlaPolicy.published) == {}
    return network


def inputs_of(fixture) -> Inputs:
    given = fixture.inputs
    return Inputs((given["a"], given["b"]), given["tokens"], given["state"], given["present"].bool())


def encode(network, inputs: Inputs):
    with torch.no_grad():
        return network.encode(inputs)


def test_loss_is_the_references(fixture, network):
    """One camera of the second sample is missing, the first text is padded. Found: 1e-6."""
    given = fixture.inputs
    tau = (1 - given["time"].unsqueeze(1)).expand(-1, 8)  # the reference's time runs the other way
    context, keep = encode(network, inputs_of(fixture)), ~given["padded"].bool()
    with torch.no_grad():
        loss = network.flow_loss(context, given["actions"], given["noise"], tau, keep)
    torch.testing.assert_close(loss, fixture.outputs["loss"], atol=1e-4, rtol=0)


def test_actions_are_the_references(fixture, network):
    """Ten steps from the same noise. Found: 6e-6."""
    context = encode(network, inputs_of(fixture))
    with torch.no_grad():
        actions = sample_flow(velocity_of(network, context), fixture.inputs["noise"], 10)[..., :8]
    torch.testing.assert_close(actions, fixture.outputs["actions"], atol=1e-4, rtol=0)


def test_actions_see_only_earlier_actions(fixture, network):
    context = encode(network, inputs_of(fixture))
    x = fixture.inputs["noise"]
    other = x.clone()
    other[:, 5] += 1.0
    with torch.no_grad():
        first, second = (network.velocity(context, value, torch.tensor([[0.5]])) for value in (x, other))
    torch.testing.assert_close(first[:, :5], second[:, :5])
    assert (first[:, 5:] - second[:, 5:]).abs().amax(-1).min() > 1e-6


def test_images_and_text_do_not_see_the_state(fixture, network):
    inputs = inputs_of(fixture)
    (cache, valid), (other, _) = (encode(network, i) for i in (inputs, inputs._replace(state=inputs.state + 1)))
    torch.testing.assert_close(cache[..., :-1, :], other[..., :-1, :])
    assert (cache[:, 1:, ..., -1, :] - other[:, 1:, ..., -1, :]).abs().max() > 1e-3
    assert valid.shape[1] == 2 * 4 + 12 + 1  # four tokens an image, twelve of text, one of state


def test_every_second_layer_of_the_expert_reads_the_prefix_alone(network):
    widths = [layer.key.in_features for layer in network.mixture.experts[1].layers]
    assert widths == [24, 16, 24, 16]  # the expert's own width; KV heads x head size of the VLM


def test_a_prefix_is_given_by_its_flow_time(fixture, network):
    """Times of single actions: with one and the same time they give what one time for all gives."""
    context, x = encode(network, inputs_of(fixture)), fixture.inputs["noise"]
    with torch.no_grad():
        one = network.velocity(context, x, torch.full((2, 1), 0.3))
        each = network.velocity(context, x, torch.full((2, 8), 0.3))
        known = network.velocity(context, x, torch.where(torch.arange(8) < 3, 1.0, 0.3).expand(2, -1))
    torch.testing.assert_close(one, each)
    assert (one - known)[:, 3:].abs().max() > 1e-4


def test_training_leaves_the_vlm_alone_at_paper_size():
    network = build("smolvla", "paper", device="meta").network
    assert sum(p.numel() for p in network.parameters()) == 450_046_176  # LeRobot's count
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 99_880_992
    trained = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"mixture", "state_in", "action_in", "action_out", "time_in", "time_out"}


def test_rules_cover_the_key_list_of_smolvla_base(fixture):
    """Its names are those of the fixture with 16 layers of text and expert, 12 of the tower."""
    names = set()
    for name in fixture.shapes:
        for pattern, count in (("text_model.layers.", 16), ("lm_expert.layers.", 16), ("encoder.layers.", 12)):
            if pattern in name:
                names |= {re.sub(rf"{re.escape(pattern)}\d+", f"{pattern}{i}", name) for i in range(count)}
                break
        else:
            names.add(name)
    ours, left = translate(names, SmolVlaPolicy.published)
    assert not left and len(names) == 500 == len(ours)
    assert set(ours) == set(build("smolvla", "paper", device="meta").network.state_dict())


def test_cameras_and_states_that_do_not_fit_are_refused():
    config = SmolVlaPolicy.presets["tiny"].network
    with pytest.raises(PolicyError, match="expected square images of one size, a multiple of 16 pixels"):
        SmolVlaNetwork(example_spec("smolvla", cameras={"scene": (32, 48)}), config)
    with pytest.raises(PolicyError, match="expected at most 16 numbers of state"):
        SmolVlaNetwork(example_spec("smolvla", {"arm": 16}, {"scene": (32, 32)}), config)


def test_images_are_padded_above_and_to_the_left():
    picture = np.full((10, 20, 3), 255, np.uint8)
    padded = resize_image(picture, (20, 20), "pad_corner")
    assert padded[:10].max() == 0 and padded[10:].min() == 255


def write_checkpoint(fixture, folder, statistics: bool = True, **changes):
    """A folder as LeRobot writes it."""
    visual = {f"observation.images.{name}": {"type": "VISUAL", "shape": [3, 48, 64]} for name in CAMERAS}
    config = {
        "type": "smolvla", "input_features": {"observation.state": {"type": "STATE", "shape": [8]}, **visual},
        "output_features": {"action": {"type": "ACTION", "shape": [8]}}, "vlm_model_name": "tiny",
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        "attention_mode": "cross_attn", "num_steps": 10, "self_attn_every_n_layers": 2,
        **fixture.config["policy"], **changes,
    }  # fmt: skip
    fixture.write(folder, config)
    from tokenizers import Tokenizer, models, pre_tokenizers

    reader = Tokenizer(models.WordLevel({"[UNK]": 3, "pick": 4, "it": 5}, unk_token="[UNK]"))
    reader.pre_tokenizer = pre_tokenizers.Whitespace()
    reader.save(str(folder / "tokenizer.json"))
    if statistics:
        numbers = {"mean": 0.5, "std": 2.0}
        keys = [(key, name) for key in ("observation.state", "action") for name in numbers]
        values = {f"{key}.{name}": torch.full((8,), numbers[name]) for key, name in keys}
        save_file(values, folder / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    return folder


@pytest.fixture
def known_vlm(monkeypatch):
    monkeypatch.setitem(BACKBONES, "tiny", HEADS)


def test_a_published_checkpoint_gives_the_references_actions(fixture, tmp_path, known_vlm):
    policy = load(write_checkpoint(fixture, tmp_path))
    assert policy.left_out == {} and isinstance(policy, SmolVlaPolicy)
    assert policy.spec.guidance == ("guided",) and policy.spec.optional == ("b",) and policy.steps == 10
    np.testing.assert_allclose(policy.processor.action.denormalize(np.ones(8)), 2.5, atol=1e-6)
    assert policy.processor.tokens("pick it", np.zeros(8)).tolist() == [4, 5] + [2] * 10
    policy.network.padding = 0  # the fixture's
    context = encode(policy.network, inputs_of(fixture))
    with torch.no_grad():
        actions = sample_flow(velocity_of(policy.network, context), fixture.inputs["noise"], 10)[..., :8]
    torch.testing.assert_close(actions, fixture.outputs["actions"], atol=1e-4, rtol=0)


def test_a_base_model_without_statistics_changes_no_numbers(fixture, tmp_path, known_vlm):
    policy = load(write_checkpoint(fixture, tmp_path, statistics=False))
    np.testing.assert_array_equal(policy.processor.state.normalize(np.arange(8.0)), np.arange(8.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.action_out_proj.bias"), "1 tensors missing, first 'action_out.bias'"),
        (lambda w: w.pop("model.state_proj.weight"), "found no 'state_in.weight'"),
        (lambda w: w.update({"model.extra.weight": torch.zeros(1)}), "'model.extra.weight': unknown"),
        (lambda w: w.update({"model.state_proj.bias": torch.zeros(5)}), "expected shape .32,., found .5,."),
        (lambda w: w["model.state_proj.bias"].fill_(torch.nan), "not finite"),
    ],
)
def test_a_checkpoint_that_differs_is_refused(tmp_path, known_vlm, change, message):
    fixture = Fixture("smolvla")
    change(fixture.weights)
    with pytest.raises(CheckpointError, match=message):
        load(write_checkpoint(fixture, tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mode": "self_attn"}, "attention_mode: expected 'cross_attn', found 'self_attn'"),
        ({"vlm_model_name": "other/vlm"}, "vlm_model_name: expected one of .*, found 'other/vlm'"),
        ({"output_features": {"action": {"shape": [7]}}}, r"as many numbers in observation.state as in action \(7\)"),
    ],
)
def test_settings_that_are_not_supported_are_named(fixture, tmp_path, known_vlm, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load(write_checkpoint(fixture, tmp_path, **changes))


def test_what_is_looked_at_is_images_and_one_state(fixture, tmp_path, known_vlm):
    """Cameras that a policy was only filled up with are left out; any other feature would be missed."""
    folder = write_checkpoint(fixture, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["input_features"]["observation.images.empty_camera_0"] = {"type": "VISUAL", "shape": [3, 480, 640]}
    (folder / "config.json").write_text(json.dumps(config))
    assert tuple(load(folder).spec.cameras) == tuple(CAMERAS)
    config["input_features"]["observation.environment_state"] = {"type": "ENV", "shape": [4]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected images and .*observation.environment_state"):
        load(folder)


def test_sharded_half_precision_files_load(fixture, tmp_path, known_vlm):
    folder = write_checkpoint(fixture, tmp_path)
    names = sorted(fixture.weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: fixture.weights[name].bfloat16().contiguous() for name in part}, folder / shard)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    bias = load(folder).network.state_in.bias
    torch.testing.assert_close(bias, fixture.weights["model.state_proj.bias"].bfloat16().float(), atol=0, rtol=0)


def test_prefixes_leave_the_loss(fixture, network):
    """A step that is not kept does not count, whatever its action."""
    given, keep = fixture.inputs, torch.arange(8).expand(2, -1) >= 3
    context, tau = encode(network, inputs_of(fixture)), torch.full((2, 8), 0.5)
    free = torch.where(keep, tau, 1.0)
    with torch.no_grad():
        whole, part = (network.flow_loss(context, given["actions"], given["noise"], free, k) for k in (None, keep))
    assert abs(whole - part) > 1e-3
    assert SmolVlaConfig().freeze
