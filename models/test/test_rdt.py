"""RDT-1B gives the numbers of its public code, speaks its unified vector, and reads its checkpoints."""

import dataclasses
import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from parity.fixture import Fixture  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from vla_core.actions import ActionSpace  # noqa: E402
from vla_models import build, load  # noqa: E402
from vla_models.denoising_policy import denoise_of  # noqa: E402
from vla_models.diffusion import RtcDiffusionGuidance, sample_diffusion  # noqa: E402
from vla_models.parts.unified import BASE, FREE, SIZE, Unified, unified_places  # noqa: E402
from vla_models.policy import CheckpointError, PolicyError, example_spec  # noqa: E402
from vla_models.published import translate  # noqa: E402
from vla_models.recipes.rdt import ENCODERS, GREY, DeviationNorm, RdtNetwork, RdtPolicy  # noqa: E402
from vla_models.torch_policy import Inputs  # noqa: E402


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture("rdt")


@pytest.fixture(scope="module")
def policy(fixture, tmp_path_factory) -> RdtPolicy:
    return load(write_checkpoint(fixture, tmp_path_factory.mktemp("rdt")))


def write_checkpoint(fixture, folder, **changes):
    """A folder as RDT-1B's with safetensors, and beside them its two encoders as their own repositories have them."""
    folder.mkdir(exist_ok=True)
    parts = {"text.": {}, "vision.": {}, "": {}}
    for name, value in fixture.weights.items():
        prefix = next(prefix for prefix in parts if name.startswith(prefix))
        parts[prefix][name.removeprefix(prefix)] = value
    # What else those repositories hold, and RDT does not read.
    parts["text."] |= {"decoder.final_layer_norm.weight": torch.ones(16), "lm_head.weight": torch.ones(40, 16)}
    parts["vision."] |= {"logit_scale": torch.ones(1), "text_model.head.bias": torch.ones(16)}
    configs = {"text.": {"model_type": "t5"}, "vision.": {"vision_config": fixture.config["vision"]},
               "": fixture.config["config"] | changes}  # fmt: skip
    for prefix, tensors in parts.items():
        place = folder / ENCODERS[prefix[:-1]] if prefix else folder
        place.mkdir(exist_ok=True)
        save_file(tensors, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(configs[prefix]))
    from tokenizers import Tokenizer, models, pre_tokenizers

    reader = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "pick": 3}, unk_token="<unk>"))
    reader.pre_tokenizer = pre_tokenizers.Whitespace()
    reader.save(str(folder / ENCODERS["text"] / "tokenizer.json"))
    return folder


def inputs_of(fixture) -> Inputs:
    """The second sample's first step is padding, and its left wrist camera is missing."""
    seen = fixture.inputs
    present = torch.tensor([[True, True, True], [True, True, False]])
    return Inputs(tuple((seen["images"] / 255).unbind(2)), seen["tokens"].long(), seen["state"], present)


def encode(policy, inputs, hidden=None):
    with torch.no_grad():
        return policy.network.encode(inputs, hidden)


def test_loss_is_the_references(fixture, policy):
    """Same noise and times, over all 128 numbers. Found: 1e-7 of 1.8."""
    seen, network = fixture.inputs, policy.network
    wide = network.action_space.to_wide(seen["noise"])
    padded = torch.zeros(2, 6, dtype=torch.bool)
    with torch.no_grad():
        context = encode(policy, inputs_of(fixture))
        loss = network.clean_loss(context, seen["actions"], wide, seen["time"].long(), padded)
        padded[:, 4:] = True
        other = seen["actions"].clone()
        other[:, 4:] = 100.0
        same = [
            network.clean_loss(context, a, wide, torch.tensor([999, 999]), padded) for a in (seen["actions"], other)
        ]
    torch.testing.assert_close(loss, fixture.outputs["loss"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(*same, atol=1e-4, rtol=0)  # at t = 999 nothing of the actions is left in the noise


def test_actions_are_the_references(fixture, policy):
    """Five steps of DPM-Solver++ from the same noise. Found: 2e-6, of numbers up to 3."""
    network = policy.network
    with torch.no_grad():
        sample = sample_diffusion(
            denoise_of(network, encode(policy, inputs_of(fixture))), network.diffusion,
            network.action_space.to_wide(fixture.inputs["noise"]), steps=policy.steps,
        )  # fmt: skip
    expected = fixture.outputs["actions"][..., fixture.config["places"]]
    torch.testing.assert_close(sample[..., :14], expected, atol=1e-4, rtol=0)


def test_embeddings_of_places_start_as_the_references(fixture):
    fresh = build("rdt", dataclasses.asdict(network_config(fixture)), spec=fixture_spec()).network
    torch.testing.assert_close(fresh.places, fixture.outputs["x_pos_embed"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(fresh.image_places, fixture.outputs["img_cond_pos_embed"][0], atol=1e-5, rtol=0)
    assert not fresh.language_places.any() and not fresh.out[-1].weight.any()


def network_config(fixture):
    config = RdtPolicy.presets["tiny"].network
    return dataclasses.replace(config, layers=3, frequencies=256, context=9, patch=14)


def fixture_spec(**changes):
    cameras = dict.fromkeys(("exterior", "right_wrist", "left_wrist"), (28, 28))
    values = {"history": 2, "horizon": 6, "tokenizer": "bytes", "context": 9} | changes
    return example_spec("rdt", {"left": 6, "right": 6}, cameras, **values)


def test_the_norm_divides_by_the_deviation():
    """timm 1.0.3's: unbiased, around the mean, which stays."""
    norm, x = DeviationNorm(5), torch.randn(3, 5) + 2.0
    with torch.no_grad():
        norm.weight.copy_(torch.arange(5.0))
        expected = x / (x.var(-1, keepdim=True) + 1e-6).sqrt() * torch.arange(5.0)
        torch.testing.assert_close(norm(x), expected)


def test_missing_cameras_and_padded_steps_show_grey(fixture, policy):
    inputs = inputs_of(fixture)
    grey = [image.clone() for image in inputs.images]
    for image in grey:
        image[1, 0] = GREY
    grey[2][1, 1] = GREY
    moved = inputs.state.clone()
    moved[1, 0] += 1.0  # so that its first step is not taken for padding
    everything = inputs._replace(images=tuple(grey), state=moved, present=torch.ones_like(inputs.present))
    for found, expected in zip(encode(policy, inputs), encode(policy, everything), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_training_hides_is_not_seen(fixture, policy):
    inputs = inputs_of(fixture)
    other = inputs._replace(tokens=torch.full_like(inputs.tokens, 3), state=inputs.state + 1.0)
    context = encode(policy, inputs)
    hidden = torch.zeros(2, 4 + 6, dtype=torch.bool)
    for found, expected in zip(encode(policy, inputs, hidden), context, strict=True):
        torch.testing.assert_close(found, expected)
    hidden[:, :2] = True
    for found, expected in zip(encode(policy, inputs, hidden), encode(policy, other, hidden), strict=True):
        torch.testing.assert_close(found, expected)
    hidden[:] = True
    pictures = inputs._replace(images=tuple(1 - image for image in inputs.images))
    for found, expected in zip(encode(policy, inputs, hidden), encode(policy, pictures, hidden), strict=True):
        torch.testing.assert_close(found, expected)


def test_blocks_read_language_and_images_by_turns(fixture, policy):
    language, images, unread, robot = encode(policy, inputs_of(fixture))
    assert language.shape == (2, 2 * 2, 2, 6, 16) and images.shape == (2, 2 * 1, 2, 6 * 4, 16)
    assert unread.sum(1).tolist() == [0, 3] and robot.shape == (2, 2, 32)
    changed = encode(policy, inputs_of(fixture)._replace(images=tuple(1 - i for i in inputs_of(fixture).images)))
    torch.testing.assert_close(language, changed[0])
    assert (images - changed[1]).abs().max() > 1e-3


def test_guidance_moves_a_network_that_is_sure_of_itself():
    """With clean actions that follow the noisy ones, as a trained network's do, the pull is towards the target."""
    network = build("rdt").network
    noise = torch.randn(1, 8, SIZE)
    target, weights = torch.full((1, 8, SIZE), 0.5), torch.tensor([1.0] * 4 + [0.0] * 4)

    def denoise(x, t):
        return 0.8 * x

    with torch.no_grad():
        free = sample_diffusion(denoise, network.diffusion, noise, steps=5)
        led = sample_diffusion(
            denoise, network.diffusion, noise, steps=5, guidance=RtcDiffusionGuidance(target, weights)
        )
    assert (led - target)[:, :4].abs().mean() < 0.5 * (free - target)[:, :4].abs().mean()


# ------------------------------------------------------------------------------------------------ the unified vector


def test_places_are_those_of_the_references_names(fixture):
    """Two arms of six joints, as ALOHA; one arm of seven; poses; a base."""
    names = fixture.config["names"]
    assert list(unified_places(fixture_spec(), "state")) == fixture.config["places"]
    assert list(unified_places(fixture_spec(), "action")) == fixture.config["places"]
    one = [names[f"arm_joint_{i}_pos"] for i in range(7)] + [names["gripper_open"]]
    assert list(unified_places(example_spec("rdt"), "state")) == one
    arms = ("the_left", "the_right")
    space = ActionSpace(arms, "pose", rotation="rot6d")
    pose = example_spec("rdt", dict.fromkeys(arms, 7), state="pose", action_space=space)
    expected = []
    for side in ("left", "right"):
        expected += [names[f"{side}_eef_pos_{axis}"] for axis in "xyz"]
        expected += [names[f"{side}_eef_angle_{i}"] for i in range(6)] + [names[f"{side}_gripper_open"]]
    assert list(unified_places(pose, "state")) == list(unified_places(pose, "action")) == expected
    base = example_spec("rdt", {"arm": 6, "base": 3})
    assert unified_places(base, "action")[-4:] == (*BASE, FREE)
    assert list(BASE) == [names[name] for name in ("base_vel_x", "base_vel_y", "base_angular_vel")]
    assert FREE not in names.values() and fixture.config["length"] == SIZE


def test_a_robots_numbers_fill_their_places(fixture, policy):
    network = policy.network
    found = network.state_space.spread(fixture.inputs["state"][:, -1])
    torch.testing.assert_close(found, fixture.outputs["unified"][:, 0])
    torch.testing.assert_close(network.state_space.mask, fixture.outputs["filled"][0, 0])


@settings(max_examples=50, deadline=None)
@given(joints=st.lists(st.integers(1, 10), min_size=1, max_size=2), base=st.booleans(), swap=st.booleans())
def test_there_and_back(joints, base, swap):
    names = ["left", "right"][:: -1 if swap else 1][: len(joints)]
    spec = example_spec("rdt", dict(zip(names, joints, strict=True)) | ({"base": 3} if base else {}))
    places = unified_places(spec, "state")
    assert len(set(places)) == len(places) == spec.state_dim
    space, values = Unified(places), torch.randn(2, spec.state_dim)
    unified = space.spread(values)
    back = space.to_wide(unified)
    real = torch.tensor([place != FREE for place in places])
    torch.testing.assert_close(back[:, : spec.state_dim], values * real)
    assert not back[:, spec.state_dim :].any() and space.mask.sum() == real.sum()
    assert unified[:, FREE].eq(0).all()
    wide = torch.randn(2, 3, SIZE)
    torch.testing.assert_close(space.to_wide(space.of_wide(wide)), wide)


RPY = ActionSpace(("arm",), "pose", rotation="rpy")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"arms": {"one": 6, "two": 6}}, "expected one, or a left and a right one by their names"),
        ({"arms": {"left": 6, "right": 6, "third": 6}}, "expected one, or a left and a right one"),
        ({"arms": {"arm": 11}}, "expected at most 10 joints, found 11"),
        ({"arms": {"arm": 6, "base": 2}}, "expected 3 joints .velocities in x, y and yaw., found 2"),
        ({"state": "pose", "action_space": RPY}, "expected 'rot6d', found 'rpy'"),
    ],
)  # fmt: skip
def test_robots_without_a_place_are_refused(spec, message):
    with pytest.raises(PolicyError, match=message):
        unified_places(example_spec("rdt", **spec), "action")


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_published_sizes():
    """1.2 billion and 170 million learn: transformer, embeddings and adaptors, as the public code counts them."""
    for name, count in (("paper", 1_228_319_872), ("small", 166_229_888)):
        network = build("rdt", name, device="meta").network
        assert sum(p.numel() for p in network.parameters() if p.requires_grad) == count
        assert sum(p.numel() for p in network.text.parameters()) == 4_762_310_656
        assert sum(p.numel() for p in network.vision.parameters()) == 412_987_248


def test_rules_cover_the_key_list_of_rdt_1b(fixture):
    """Its names are those of the fixture with 28 blocks, 24 of T5 and 27 of SigLIP."""
    names = set()
    for name in fixture.shapes:
        for pattern, count in (("model.blocks.", 28), ("encoder.block.", 24), ("encoder.layers.", 27)):
            if pattern in name and "relative_attention_bias" not in name:
                names |= {re.sub(rf"{re.escape(pattern)}\d+", f"{pattern}{i}", name) for i in range(count)}
                break
        else:
            names.add(name)
    ours, left = translate(names, RdtPolicy.published)
    assert set(ours) == set(build("rdt", "paper", device="meta").network.state_dict())
    assert all(name.startswith("vision.vision_model.head.") for name in left)


def test_a_published_checkpoint_is_described(policy):
    spec = policy.spec
    assert {name.split(".")[1] for name in policy.left_out} == {
        "vision_model",
        "text_model",
        "logit_scale",
        "decoder",
        "lm_head",
    }
    assert spec.arms == ("left", "right") and spec.state_dim == spec.action_dim == 14 and spec.period == 0.04
    assert (spec.horizon, spec.history, spec.steps, spec.context) == (6, 2, 5, 9)
    assert list(spec.cameras) == ["exterior", "right_wrist", "left_wrist"] == list(spec.optional)
    assert policy.processor.tokens("pick it", np.zeros(14)).tolist() == [3, 2] + [0] * 7
    np.testing.assert_array_equal(policy.processor.action.denormalize(np.ones(14)), np.ones(14))
    assert policy.noise_shape == (1, 6, 128)


def test_a_checkpoint_serves_another_robot(fixture, tmp_path):
    folder = write_checkpoint(fixture, tmp_path, arms={"arm": 7}, state="pose", ctrl_freq=10)
    spec = load(folder).spec
    assert (spec.arms, spec.state, spec.action_space.rotation, spec.action_dim) == (("arm",), "pose", "rot6d", 10)
    assert spec.period == pytest.approx(0.1)


PLACE, BLOCK = "model.x_pos_embed", "model.blocks.1.attn.qkv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(BLOCK), "3 tensors missing, first 'blocks.1.attention.key.weight'"),
        (lambda w: w.update({"model.extra.weight": torch.zeros(1)}), "'model.extra.weight': unknown"),
        (lambda w: w.update({PLACE: torch.zeros(1, 9, 5)}), "expected shape .9, 32., found .9, 5."),
        (lambda w: w.update({BLOCK: torch.zeros(48, 32)}), "expected shape .32, 32., found .16, 32."),
        (lambda w: w[PLACE].fill_(torch.nan), "not finite"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change, message):
    other = Fixture("rdt")
    change(other.weights)
    with pytest.raises(CheckpointError, match=message):
        load(write_checkpoint(other, tmp_path))


def test_settings_and_files_that_are_not_known_are_refused(fixture, tmp_path):
    with pytest.raises(CheckpointError, match="action_dim: expected 128, found 64"):
        load(write_checkpoint(fixture, tmp_path / "a", action_dim=64))
    with pytest.raises(CheckpointError, match="found no 'rdt'"):
        config = {k: v for k, v in fixture.config["config"]["config"].items() if k != "rdt"}
        load(write_checkpoint(fixture, tmp_path / "b", config=config))
    folder = write_checkpoint(fixture, tmp_path / "c")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle, which is never read"):
        load(folder)


def test_cameras_and_contexts_that_do_not_fit_are_refused():
    config = RdtPolicy.presets["tiny"].network
    with pytest.raises(PolicyError, match="expected square images of one size"):
        RdtNetwork(example_spec("rdt", cameras={"scene": (32, 48)}), config)
    with pytest.raises(PolicyError, match="context: expected at most 64, found 65"):
        RdtNetwork(example_spec("rdt", cameras={"scene": (32, 32)}, context=65), config)
