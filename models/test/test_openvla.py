"""The recipe "openvla" against the code that its authors published, and its checkpoints."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
import vla_models  # noqa: E402
from parity.fixture import Fixture  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_recipes import make_observation  # noqa: E402
from vla_models import build  # noqa: E402
from vla_models.parts.prismatic import HALF, IMAGENET, normalise, published_sizes  # noqa: E402
from vla_models.parts.vit import CentreCrop  # noqa: E402
from vla_models.policy import CheckpointError, InferenceRequest, PolicyError  # noqa: E402
from vla_models.published import fill, translate  # noqa: E402
from vla_models.recipes.openvla import BinAnswer, OpenVlaConfig, OpenVlaPolicy  # noqa: E402
from vla_models.tokenizer import TokenizerError  # noqa: E402
from vla_models.tokenizers import OpenVLATokenizer  # noqa: E402
from vla_models.torch_policy import Batch, Inputs  # noqa: E402

#: The fixture's sizes. Largest differences found: 1e-6 (logits), 0 (loss, tokens).
TINY = OpenVlaConfig(dino=(16, 3, 2, 32), siglip=(24, 3, 2, 40), language=(32, 2, 4, 48), vocabulary=580, text=516,
                     space=35)  # fmt: skip
STATISTICS = {
    "bridge_orig": {
        "action": {"q01": [-0.02] * 3 + [-0.1] * 3 + [0.0], "q99": [0.03] * 3 + [0.2] * 3 + [1.0],
                   "min": [-1.0] * 7, "max": [1.0] * 7, "mask": [True] * 6 + [False]},
    }
}  # fmt: skip
CONFIG = {
    "model_type": "openvla", "vision_backbone_id": "dinosiglip-vit-so-224px", "image_resize_strategy": "resize-naive",
    "image_sizes": [[28, 42], [28, 42]], "n_action_bins": 256, "pad_to_multiple_of": 64, "pad_token_id": 0,
    "text_config": {"model_type": "llama", "vocab_size": 580, "num_attention_heads": 4}, "vision_heads": [2, 2],
    "space_token": 35, "norm_stats": STATISTICS,
}  # fmt: skip


@pytest.fixture(scope="module")
def fixture():
    return Fixture("openvla")


@pytest.fixture(scope="module")
def policy(fixture):
    spec = OpenVlaPolicy.preset("tiny")[0]
    policy = OpenVlaPolicy(spec, vla_models.identity_normalizers(spec), TINY)
    left = fill(policy.network, fixture, OpenVlaPolicy.published)
    assert all("never computed" in why for why in left.values())
    return policy


@pytest.fixture(scope="module")
def network(policy):
    return policy.network


def inputs_of(fixture, context: int = 12) -> Inputs:
    tokens = torch.zeros(2, context, dtype=torch.long)
    tokens[:, :12] = fixture.inputs["tokens"]
    return Inputs((fixture.inputs["image"],), tokens, torch.zeros(2, 10), torch.ones(2, 1, dtype=torch.bool))


def write_tokenizer(folder) -> None:
    """A tokenizer.json that knows each letter, and puts a 1 before the text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    letters = {chr(32 + i): 3 + i for i in range(95)} | {"\n": 99, "<s>": 1, "<unk>": 0}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


def close(found, expected, name: str) -> None:
    difference = (found - expected).abs().max().item()
    print(f"{name}: largest difference {difference:.1e}")
    assert difference < 1e-4


def test_towers_and_projector_are_those_of_the_reference(fixture, network):
    image, vlm = fixture.inputs["image"], network.vlm
    with torch.no_grad():
        patches = torch.cat([vlm.dino(normalise(image, *IMAGENET)), vlm.siglip(normalise(image, *HALF))], -1)
        close(patches, fixture.outputs["patches"], "patches")
        close(vlm.see(image), fixture.outputs["features"], "features")


def test_logits_and_loss_are_those_of_the_reference(fixture, network):
    actions = fixture.inputs["actions"].unsqueeze(1)
    inputs = inputs_of(fixture)
    with torch.no_grad():
        batch = Batch(inputs, actions, torch.zeros(2, 1, dtype=torch.bool))
        answers, counted = network.answers(batch)
        assert counted.all() and answers.shape == (2, 8) and (answers[:, -1] == 2).all()
        start = torch.full((2, 1), 35)
        hidden, _, _ = network.hidden(inputs, torch.cat([start, answers[:, :-1]], 1))
        close(network.vlm.logits(hidden[:, -8:]), fixture.outputs["logits"], "logits")
        loss = network.loss(batch, torch.Generator())["loss"]
    close(loss, fixture.outputs["loss"].mean(), "loss")


def test_the_decoded_actions_are_those_of_the_reference(fixture, policy):
    inputs = inputs_of(fixture)
    for row in range(2):
        one = Inputs((inputs.images[0][row : row + 1],), *(part[row : row + 1] for part in inputs[1:]))
        tokens = policy.generate(one, policy.network.answer, np.zeros(7), {})
        assert tokens == fixture.outputs["chosen"][row].tolist()
        np.testing.assert_allclose(
            policy.network.answer.decode(tokens)[0], fixture.outputs["actions"][row].numpy(), atol=1e-6
        )


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 9))
def test_padding_changes_nothing(fixture, network, more):
    with torch.no_grad():
        _, _, exact = network.encode(inputs_of(fixture))
        _, _, padded = network.encode(inputs_of(fixture, 12 + more))
    assert (exact - padded).abs().max() < 1e-5


def test_padded_steps_do_not_count(fixture, network):
    padded = torch.tensor([[False], [True]])
    batch = Batch(inputs_of(fixture), fixture.inputs["actions"].unsqueeze(1), padded)
    with torch.no_grad():
        close(network.loss(batch, torch.Generator())["loss"], fixture.outputs["loss"][0], "loss of the first")


def test_a_published_folder_loads_and_gives_the_references_actions(fixture, tmp_path):
    folder = fixture.write(tmp_path, CONFIG)
    write_tokenizer(folder)
    policy = vla_models.load(folder)
    assert policy.config == TINY
    assert (
        policy.spec.horizon == policy.spec.lead == 1
        and policy.spec.action_space.rotation == "rpy"
        and policy.spec.state == "pose"
    )
    inputs = inputs_of(fixture)
    one = Inputs((inputs.images[0][:1],), *(part[:1] for part in inputs[1:]))
    tokens = policy.generate(one, policy.network.answer, np.zeros(7), {})
    found = policy.processor.action.denormalize(policy.network.answer.decode(tokens))[0]
    x = fixture.outputs["actions"][0].numpy().astype(float)
    stats = STATISTICS["bridge_orig"]["action"]
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    np.testing.assert_allclose(found, np.where(stats["mask"], 0.5 * (x + 1) * (high - low) + low, x), atol=1e-7)
    observation = make_observation(policy.spec)
    out = policy.infer(observation, InferenceRequest(seed=0))
    assert out.targets.shape == (2, 8) and np.isfinite(out.targets).all()
    # The instruction is read in small letters.
    assert np.array_equal(policy.processor.tokens("Pick", None), policy.processor.tokens("pick", None))
    with pytest.raises(ValueError, match="expected at most 64 tokens"):
        policy.processor.tokens("pick " * 20, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm_stats": STATISTICS | {"fractal": {}}}, r"unnorm_key.*\['bridge_orig', 'fractal'\], found None"),
        ({"unnorm_key": "kuka"}, r"\['bridge_orig'\], found 'kuka'"),
        ({"norm_stats": None}, "expected statistics"),
        ({"norm_stats": {"bridge_orig": {"action": {"q01": [0.0] * 7}}}}, "q01, q99, found KeyError"),
        ({"norm_stats": {"d": {"action": {"q01": [0.0] * 5, "q99": [1.0] * 5}}}}, "7 or 14 numbers an action, found 5"),
        ({"image_resize_strategy": "letterbox"}, "image_resize_strategy: expected 'resize-naive', found 'letterbox'"),
        ({"model_type": "prismatic"}, "expected a type among"),
    ],
)
def test_settings_that_cannot_be_used_are_named(fixture, tmp_path, change, said):
    folder = fixture.write(tmp_path, CONFIG | change)
    write_tokenizer(folder)
    with pytest.raises(CheckpointError, match=said):
        vla_models.load(folder)


def test_one_of_several_data_sets_is_chosen(fixture, tmp_path):
    other = json.loads(json.dumps(STATISTICS["bridge_orig"]))
    other["action"]["q99"] = [0.5] * 7
    folder = fixture.write(tmp_path, CONFIG | {"norm_stats": STATISTICS | {"libero_10": other}})
    write_tokenizer(folder)
    policy = vla_models.load(folder, settings={"unnorm_key": "libero_10"})
    assert policy.spec.action_space.rotation == "rotvec" and policy.spec.period == 0.05
    # LIBERO's actions are commands to its controller: 1 is 5 cm, or half a rad.
    found = policy.processor.action.denormalize(np.ones(7))
    np.testing.assert_allclose(found, [0.5 * 0.05] * 3 + [0.5 * 0.5] * 3 + [1.0])
    # Statistics in a file of their own go first (fine-tuned checkpoints).
    (folder / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    policy = vla_models.load(folder)
    assert policy.spec.period == 0.2
    # Such networks were trained on random crops, and look at the middle of an image.
    assert policy.config.crop == 0.9
    assert vla_models.load(folder, settings={"center_crop": False}).config.crop == 1.0


def test_a_tensor_too_few_too_many_or_of_another_shape_is_named(fixture, tmp_path):
    key = "vision_backbone.fused_featurizer.blocks.1.attn.qkv.bias"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(tmp_path)
    for weights, said in (
        ({name: value for name, value in fixture.weights.items() if name != key}, "vlm.siglip.blocks.1.attn.qkv.bias"),
        ({**fixture.weights, "depth_head.weight": torch.zeros(2)}, "depth_head.weight"),
        ({**fixture.weights, key: torch.zeros(5)}, rf"{key}: expected shape \(72,\), found \(5,\)"),
        ({"projector.fc1.weight": torch.zeros(2)}, "expected settings and tensors of the recipe 'openvla'"),
    ):
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=said):
            vla_models.load(tmp_path)


def test_every_tensor_of_openvla_7b_has_its_place(fixture):
    shapes = {name: tuple(shape) for name, shape in json.loads(fixture.metadata["full"]).items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == 7541237184  # model.safetensors.index.json, over 2
    config = published_sizes("x", {"pad_to_multiple_of": 64}, SimpleNamespace(shapes=shapes))
    assert OpenVlaConfig(**config) == OpenVlaConfig()
    ours, _ = translate(shapes, OpenVlaPolicy.published)
    network = build("openvla", "paper", device="meta").network
    state = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert state == {name: shapes[sources[0][0]] for name, sources in ours.items() if name in state}
    spare = [name for name in ours if name not in state]
    assert len(spare) == 14 + 12 and all(".blocks.23." in name or ".blocks.26." in name for name in spare)


@given(st.floats(-2, 2))
def test_an_action_is_its_bin_and_back(number):
    answer = BinAnswer(OpenVLATokenizer(), (1, 1), 32064, 2)
    token, end = answer.encode(np.array([[number]]))
    assert 31744 <= token <= 31999 and end == 2 and answer.allowed([])[token]
    assert abs(answer.decode([token]).item() - np.clip(number, -1, 1)) <= 1 / 255 + 1e-12


def test_the_ends_and_the_middle_are_the_published_tokens():
    answer = BinAnswer(OpenVLATokenizer(), (1, 4), 32064, 2)
    tokens = answer.encode(np.array([[-1.0, 0.0, 1.0, 5.0]]))
    assert tokens.tolist() == [31999, 31872, 31744, 31744, 2]  # 32000 - 1, - 128, - 256
    np.testing.assert_allclose(answer.decode(tokens), [[-254 / 255, 0.0, 254 / 255, 254 / 255]], atol=1e-12)
    assert answer.allowed([]).sum() == 256 and answer.allowed(tokens[:4]) is None
    for wrong in (31743, 32000):
        with pytest.raises(TokenizerError, match=f"found .{wrong}"):
            answer.decode([wrong, *tokens[1:]])
    padded = BinAnswer(OpenVLATokenizer(), (2, 2), 32064, 2).inside(range(5), np.array([False, True]))
    assert padded.tolist() == [True, True, False, False, False]


def test_the_centre_of_an_image_is_cut_out():
    crop = CentreCrop((5, 9), 0.25)  # half of each side
    ramp = torch.arange(9.0).expand(1, 3, 5, 9)
    found = crop(ramp)
    torch.testing.assert_close(found[0, 0, 0], torch.linspace(2, 6, 9))
    whole = CentreCrop((5, 9), 1.0)(ramp)
    torch.testing.assert_close(whole, ramp)


def test_cameras_of_a_wrong_size_are_named():
    spec = OpenVlaPolicy.preset("tiny")[0]
    for cameras, said in (({"scene": (30, 42)}, "multiples of 14"), ({"a": (28, 28), "b": (28, 42)}, "one size")):
        values = {**spec.to_dict(), "cameras": cameras}
        with pytest.raises(PolicyError, match=said):
            build("openvla", "tiny", spec=type(spec).from_dict(values))
