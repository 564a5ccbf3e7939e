"""WALL-OSS gives the numbers of LeRobot's wall_x, and reads its checkpoints and the makers'."""

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
from vla_models import build, load  # noqa: E402
from vla_models.parts.qwen_vision import QwenVisionConfig  # noqa: E402
from vla_models.policy import CheckpointError, PolicyError, example_spec  # noqa: E402
from vla_models.published import fill, translate  # noqa: E402
from vla_models.recipes.wall_oss import (  # noqa: E402
    WallOssConfig,
    WallOssNetwork,
    WallOssPolicy,
    byte_prompt,
    image_size,
    prompt_of,
)
from vla_models.recipes.wall_oss_fast import WallOssFastConfig, WallOssFastNetwork, WallOssFastPolicy  # noqa: E402
from vla_models.sampling import sample_flow  # noqa: E402
from vla_models.tokenizers import FastTokenizer  # noqa: E402
from vla_models.torch_policy import Inputs, velocity_of  # noqa: E402

CONFIG = WallOssConfig(
    vision=QwenVisionConfig(32, 40, 2, 2, 14, 2, 56, (1,)), width=32, mlp=48, action_mlp=24, layers=2, heads=4,
    kv_heads=2, head_dim=8, sections=(1, 1, 2), vocabulary=264, numbers=10, state_numbers=10, image_token=4,
    state_token=5, tied=False,
)  # fmt: skip
CAMERAS = {"front": (56, 84), "wrist": (56, 56)}


FAST = WallOssFastConfig(
    **{field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG) if field.name != "prefix_share"},
    first=8, start=13, end=(2, 13), length=140,
)  # fmt: skip


def make_spec(**fields):
    return example_spec("wall_oss", {"arm": 7}, CAMERAS, horizon=8, context=24, tokenizer="bytes", **fields)


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture("wall_oss")


@pytest.fixture(scope="module")
def network(fixture) -> WallOssNetwork:
    network = WallOssNetwork(make_spec(), CONFIG).eval()
    assert fill(network, fixture, WallOssPolicy.published) == {}
    return network


def inputs_of(fixture, present=((1, 1), (1, 1))) -> Inputs:
    found = fixture.inputs
    images = (found["image.front"], found["image.wrist"])
    return Inputs(images, found["tokens"], found["state"], torch.tensor(present) > 0)


def encode(network, inputs: Inputs):
    with torch.no_grad():
        return network.encode(inputs)


def test_loss_is_the_references(fixture, network):
    """Two cameras of different sizes, texts of different lengths, 8 of 10 numbers. Found: 2e-7."""
    found = fixture.inputs
    with torch.no_grad():
        tau = found["time"].unsqueeze(1).expand(-1, 8)
        loss = network.flow_loss(encode(network, inputs_of(fixture)), found["actions"], found["noise"], tau)
    torch.testing.assert_close(loss, fixture.outputs["loss"], atol=1e-4, rtol=0)


def test_actions_are_the_references(fixture, network):
    """Ten steps from the same noise. Found: 2e-7."""
    context = encode(network, inputs_of(fixture))
    with torch.no_grad():
        actions = sample_flow(velocity_of(network, context), fixture.inputs["noise"], 10)
    torch.testing.assert_close(actions, fixture.outputs["actions"], atol=1e-4, rtol=0)


def test_the_prefix_is_causal_and_actions_see_each_other(fixture, network):
    inputs = inputs_of(fixture)
    last = inputs.tokens.clone()
    last[0, 19] += 1  # the last token of the first text
    (cache, valid, _), (other, _, _) = (encode(network, i) for i in (inputs, inputs._replace(tokens=last)))
    differs = (cache - other).abs().amax((1, 2, 3, 5))[0] > 1e-6
    # Two marks become six and four tokens, so token 19 is the 28th.
    assert valid[0].sum() == 28 and differs[:28].nonzero().flatten().tolist() == [27]
    x = fixture.inputs["noise"]
    moved = x.clone()
    moved[:, 7] += 1
    context = encode(network, inputs)
    with torch.no_grad():
        first, second = (network.velocity(context, value, torch.tensor([[0.5]])) for value in (x, moved))
    assert (first - second)[:, 0].abs().max() > 1e-6


def test_a_missing_camera_is_not_seen(fixture, network):
    inputs = inputs_of(fixture, ((1, 0), (1, 1)))
    black = inputs._replace(images=(inputs.images[0], torch.zeros_like(inputs.images[1])))
    x = fixture.inputs["noise"]
    with torch.no_grad():
        first, second = (network.velocity(network.encode(i), x, torch.tensor([[0.5]])) for i in (inputs, black))
    torch.testing.assert_close(first[0], second[0])
    assert (first[1] - second[1]).abs().max() > 1e-5


def test_numbers_that_the_robot_lacks_are_masked(fixture):
    narrow = WallOssNetwork(make_spec(), CONFIG)
    wide = WallOssNetwork(example_spec("wall_oss", {"arm": 9}, CAMERAS, horizon=8, context=24), CONFIG)
    wide.load_state_dict(narrow.state_dict())
    inputs, x = inputs_of(fixture), fixture.inputs["noise"]
    context = encode(narrow, inputs)
    with torch.no_grad():
        first, second = (n.velocity(context, x, torch.tensor([[0.5]])) for n in (narrow, wide))
    assert (first - second).abs().max() > 1e-6  # the mask beside the actions says so


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["word", "image", "state"]), min_size=1, max_size=16), st.integers(0, 4))
def test_places_of_tokens_are_those_of_a_plain_loop(kinds, padding):
    """Against the definition: an image takes its grid, what follows begins behind the longer of its sides."""
    torch.manual_seed(0)
    images, kept = 0, []
    for kind in kinds:
        images += kind == "image"
        kept.append("word" if kind == "image" and images > 2 else kind)
    kept += ["image"] * (2 - kept.count("image"))
    ids = {"word": 9, "image": 4, "state": 5}
    tokens = torch.tensor([[ids[kind] for kind in kept] + [0] * padding])
    network = WallOssNetwork(example_spec("wall_oss", {"arm": 7}, CAMERAS, context=tokens.shape[1]), CONFIG)
    images = tuple(torch.rand(1, 3, *size) for size in CAMERAS.values())
    inputs = Inputs(images, tokens, torch.zeros(1, 8), torch.ones(1, 2) > 0)
    expected, at, grids = [], 0, [(2, 3), (2, 2)]
    for kind in kept:
        rows, columns = grids.pop(0) if kind == "image" else (1, 1)
        expected += [(at, at + r, at + c) for r in range(rows) for c in range(columns)]
        at += max(rows, columns)
    with torch.no_grad():
        prefix = network.prefix(inputs)
    assert prefix.positions[:, 0, : len(expected)].T.tolist() == [list(p) for p in expected]
    assert prefix.following.item() == at
    assert prefix.valid[0].tolist() == [True] * len(expected) + [False] * padding


def test_windows_and_their_edges(network):
    """A picture of 4 x 6 patches in windows of 4 x 4: the last two columns are a window of their own."""
    near = network.vision.near_56x84[0].reshape(4, 6, 4, 6)
    assert near[0, 0, :, :4].all() and not near[0, 0, :, 4:].any()
    assert near[3, 5, :, 4:].all() and not near[3, 5, :, :4].any()


def test_the_published_text():
    text = prompt_of(("face_view", "left_wrist_view", "scene"))
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nObservation:")
    assert " front view: <|vision_start|><|image_pad|><|vision_end|> left wrist view: <|vision_start|>" in text
    assert " scene view: " in text
    assert text.format(task="pick").endswith(
        "\nInstruction: pick.\nPredict the next action in robot action.\nProprioception: <|propri|>\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert byte_prompt(("a", "b")).count("\x01") == 2


def test_a_policy_without_a_text_gets_that_of_its_cameras():
    policy = build("wall_oss")
    assert policy.spec.prompt == byte_prompt(policy.spec.cameras)
    assert (policy.processor.tokens("pick", np.zeros(8)) == policy.config.image_token).sum() == 2


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(PolicyError, match="expected multiples of 28 pixels, found 30 x 56"):
        WallOssNetwork(example_spec("wall_oss", cameras={"scene": (30, 56)}), CONFIG)
    assert image_size(480, 640) == (196, 252) and image_size(256, 256) == (252, 252)


def test_rules_cover_the_key_list_of_wall_oss_flow(fixture):
    """Its names are those of the fixture with 36 layers and 32 of the tower; the head is the embedding."""
    names = set()
    for name in fixture.shapes:
        if name == "lm_head.weight":
            continue
        for pattern, count in (("model.layers.", 36), ("visual.blocks.", 32)):
            if name.startswith(pattern):
                names |= {re.sub(rf"{re.escape(pattern)}\d+", f"{pattern}{i}", name) for i in range(count)}
                break
        else:
            names.add(name)
    network = build("wall_oss", "paper", device="meta").network
    for prefix in ("", "model."):
        ours, left = translate((prefix + name for name in names), WallOssPolicy.published)
        assert not left and set(ours) == set(network.state_dict())
    _, left = translate(["action_preprocessor.normalizer_action.min.arm"], WallOssPolicy.published)
    assert left


@pytest.fixture(scope="module")
def fast(fixture) -> WallOssFastNetwork:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vla_models.recipes.wall_oss_fast.OrderedFastAnswer", lambda *args: type("", (), {"length": 6}))
        network = WallOssFastNetwork(make_spec(), FAST).eval()
    left = fill(network, fixture, WallOssFastPolicy.published)
    assert set(left.values()) == {"the other branch's"} and all("experts.1" in n or "action_pre" in n for n in left)
    return network


def test_the_fast_branch_gives_the_references_loss(fixture, fast):
    """Teacher-forced: the prefix and the answer at once."""
    answers = fixture.inputs["answers"]
    with torch.no_grad():
        loss = fast.text_loss(inputs_of(fixture), answers, torch.ones_like(answers) > 0)
    torch.testing.assert_close(loss, fixture.outputs["text_loss"], atol=1e-4, rtol=0)


def test_the_fast_branch_writes_step_by_step_what_it_reads_at_once(fixture, fast):
    """With the cache, token by token, and at once in the reference."""
    answers, expected = fixture.inputs["answers"], fixture.outputs["logits"]
    with torch.no_grad():
        keys, valid, logits = fast.encode(inputs_of(fixture))
        tail, found = fast.blank(keys), [logits]
        for i in range(6):
            logits, tail = fast.step(keys, valid, tail, answers[:, i], torch.full((2,), i))
            found.append(logits)
    torch.testing.assert_close(torch.stack(found, 1), expected, atol=1e-4, rtol=0)


def test_words_have_the_order_of_fast_tokens():
    policy = build("wall_oss_fast")
    answer, spec = policy.network.answer, policy.spec
    chunk = np.random.default_rng(0).uniform(-1, 1, (spec.horizon, spec.action_dim))
    tokens, codes = answer.encode(chunk), answer.tokenizer.encode(chunk)
    np.testing.assert_array_equal(tokens[:-2], 259 + codes)
    assert tokens[-2:].tolist() == [2, 13]
    np.testing.assert_allclose(answer.decode(tokens), chunk, atol=0.2)
    for i, token in enumerate(tokens[:-1]):
        assert answer.allowed(tokens[:i])[token]
    assert answer.allowed(tokens[:-1]) is None


def write_tokenizer(folder) -> None:
    from tokenizers import Regex, Tokenizer, models
    from tokenizers.pre_tokenizers import Sequence, Split

    special = {"<|endoftext|>": 0, "<|im_end|>": 2, "<|image_pad|>": 4, "<|propri|>": 5, "<|action_token_0|>": 7}
    reader = Tokenizer(models.WordLevel({"[UNK]": 8, "pick": 9, "\n": 13, **special}, unk_token="[UNK]"))
    reader.pre_tokenizer = Sequence([Split("\n", "isolated"), Split(Regex("[ .]"), "removed")])
    reader.add_special_tokens(list(special))
    reader.save(str(folder / "tokenizer.json"))


def write_makers(fixture, folder, **changes):
    """A folder as the makers publish it."""
    fixture.write(folder, {**fixture.config, **changes})
    write_tokenizer(folder)
    return folder


FEATURES = {
    "input_features": {"observation.state": {"shape": [8]}, "observation.images.front_view": {"shape": [3, 480, 640]},
                       "observation.images.wrist": {"shape": [3, 256, 256]}},
    "output_features": {"action": {"shape": [8]}},
}  # fmt: skip


def write_lerobot(fixture, folder):
    """A folder as LeRobot writes it, which names the makers' folder."""
    makers = write_makers(fixture, folder / "makers")
    config = {
        "type": "wall_x", "pretrained_name_or_path": str(makers), "chunk_size": 8, **FEATURES,
        "normalization_mapping": {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    }  # fmt: skip
    mine = Fixture("wall_oss")
    mine.weights = {f"model.{name}": value for name, value in mine.weights.items()}
    mine.write(folder / "trained", config)
    values = {f"{key}.{name}": torch.full((8,), value)
              for key in ("observation.state", "action") for name, value in (("mean", 0.5), ("std", 2.0))}  # fmt: skip
    save_file(values, folder / "trained" / "policy_preprocessor_step_4_normalizer_processor.safetensors")
    return folder / "trained"


def actions_with_weights_of(fixture, policy):
    """Of the fixture's inputs, whose images are smaller than those of a published policy."""
    network = WallOssNetwork(make_spec(), policy.config).eval()
    network.load_state_dict(policy.network.state_dict())
    context = encode(network, inputs_of(fixture))
    with torch.no_grad():
        return sample_flow(velocity_of(network, context), fixture.inputs["noise"], 10)


def test_lerobots_checkpoint_gives_the_references_actions(fixture, tmp_path):
    policy = load(write_lerobot(fixture, tmp_path))
    spec = policy.spec
    assert dict(spec.cameras) == {"front_view": (196, 252), "wrist": (252, 252)} and spec.horizon == 8
    assert spec.guidance == ("guided",) and spec.optional == ("wrist",) and policy.left_out == {}
    np.testing.assert_allclose(policy.processor.action.denormalize(np.ones(8)), 2.5, atol=1e-6)
    tokens = policy.processor.tokens("pick", np.zeros(8))
    assert (tokens == 4).sum() == 2 and (tokens == 5).sum() == 1 and (tokens == 9).sum() == 1
    torch.testing.assert_close(actions_with_weights_of(fixture, policy), fixture.outputs["actions"], atol=1e-4, rtol=0)


def test_the_makers_checkpoint_gives_the_references_actions(fixture, tmp_path):
    fixture_ = Fixture("wall_oss")
    fixture_.weights["action_preprocessor.normalizer_action.min.arm"] = torch.zeros(7)
    policy = load(write_makers(fixture_, tmp_path, **FEATURES))
    assert list(policy.left_out) == ["action_preprocessor.normalizer_action.min.arm"]
    np.testing.assert_array_equal(policy.processor.state.normalize(np.arange(8.0)), np.arange(8.0))
    torch.testing.assert_close(actions_with_weights_of(fixture, policy), fixture.outputs["actions"], atol=1e-4, rtol=0)


def test_a_head_that_is_the_embedding_is_kept_once(tmp_path):
    fixture = Fixture("wall_oss")
    fixture.weights["lm_head.weight"] = fixture.weights["model.embed_tokens.weight"].clone()
    policy = load(write_makers(fixture, tmp_path, **FEATURES))
    assert policy.config.tied and policy.left_out == {"lm_head.weight": "the embedding again"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "1 tensors missing, first 'mixture.experts.0.norm.weight'"),
        (lambda w: w.pop("model.embed_tokens.weight"), "found no 'model.embed_tokens.weight'"),
        (lambda w: w.update({"visual_extra.weight": torch.zeros(1)}), "'visual_extra.weight': unknown"),
        (lambda w: w.update({"model.layers.0.moe.experts.2.up_proj.weight": torch.zeros(1)}), "experts.2.* unknown"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(5)}), "expected shape .32,., found .5,."),
    ],
)
def test_a_checkpoint_that_differs_is_refused(tmp_path, change, message):
    fixture = Fixture("wall_oss")
    change(fixture.weights)
    with pytest.raises(CheckpointError, match=message):
        load(write_makers(fixture, tmp_path, **FEATURES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_moe": False}, "mlp_moe: expected True, found False"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps: expected 1e-06, found 1e-05"),
        ({"input_features": {"observation.state": {"shape": [8]}}}, "expected images and as many numbers"),
    ],
)
def test_settings_that_are_not_supported_are_named(fixture, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load(write_makers(fixture, tmp_path, **{**FEATURES, **changes}))


def test_a_plain_qwen_is_not_taken_for_wall_oss(fixture, tmp_path):
    write_makers(fixture, tmp_path)
    plain = {name: value for name, value in fixture.config.items() if name != "experts"}
    with pytest.raises(CheckpointError, match="recipe 'wall_oss', found no 'experts'"):
        load(fixture.write(tmp_path, plain))


def test_a_fast_tokeniser_beside_the_weights_makes_it_the_fast_branch(fixture, tmp_path):
    chunks = np.random.default_rng(0).uniform(-0.1, 0.1, (8, 32, 8))
    (tmp_path / "fast").mkdir()
    fast = FastTokenizer.fit(chunks, vocabulary=257).to_dict()
    (tmp_path / "fast" / "tokenizer.json").write_text(json.dumps(fast["bpe"]))
    (tmp_path / "fast" / "processor_config.json").write_text(json.dumps({"min_token": fast["min_token"]}))
    policy = load(write_makers(fixture, tmp_path, **FEATURES))
    assert isinstance(policy, WallOssFastPolicy)
    config = policy.config
    assert (config.first, config.start, config.end) == (7, 13, (2, 13)) and policy.spec.prompt.endswith("assistant")
