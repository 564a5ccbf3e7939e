"""Octo gives the numbers of its public code, sees what it may see, and reads its checkpoints."""

import copy
import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from parity.fixture import Fixture  # noqa: E402
from vla_models import build, load  # noqa: E402
from vla_models.denoising_policy import denoise_of  # noqa: E402
from vla_models.diffusion import sample_diffusion  # noqa: E402
from vla_models.parts.stem import StandardConv  # noqa: E402
from vla_models.parts.window import real_steps  # noqa: E402
from vla_models.policy import CheckpointError, PolicyError, example_spec  # noqa: E402
from vla_models.published import translate  # noqa: E402
from vla_models.recipes.octo import (  # noqa: E402
    OBSERVED,
    READOUT,
    TASK,
    OctoNetwork,
    OctoPolicy,
    attention_pattern,
)
from vla_models.torch_policy import Batch, Inputs  # noqa: E402

CAMERAS = ("primary", "wrist")


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture("octo")


@pytest.fixture(scope="module")
def policy(fixture, tmp_path_factory) -> OctoPolicy:
    return load(write_checkpoint(fixture, tmp_path_factory.mktemp("octo")))


def write_checkpoint(fixture, folder, statistics=None, **changes):
    """A folder as Octo's, with safetensors instead of orbax and with T5's tokenizer."""
    fixture.write(folder, fixture.config | {"text_processor": {}, "eval_datasets": ["bridge_dataset"]} | changes)
    numbers = {"mean": [0.5] * 7, "std": [2.0] * 7, "mask": [True] * 6 + [False]}
    other = {"mean": [0.0] * 7, "std": [1.0] * 7}
    statistics = statistics or {"bridge_dataset": {"action": numbers}, "fractal": {"action": other}}
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    from tokenizers import Tokenizer, models, pre_tokenizers

    reader = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "pick": 3}, unk_token="<unk>"))
    reader.pre_tokenizer = pre_tokenizers.Whitespace()
    reader.save(str(folder / "tokenizer.json"))
    return folder


def inputs_of(fixture) -> Inputs:
    """The second sample's first step is padding, and it has no wrist camera."""
    seen = fixture.inputs
    images = tuple(seen[f"image_{name}"].movedim(-1, 2) / 255 for name in CAMERAS)
    return Inputs(images, seen["tokens"].long(), torch.zeros(2, 2, 10), seen["present"].bool())


def test_readouts_of_the_whole_window_are_the_references(fixture, policy):
    """Found: 2e-6."""
    with torch.no_grad():
        found = policy.network.transform(inputs_of(fixture))
    torch.testing.assert_close(found, fixture.outputs["readout"][:, :, 0], atol=1e-5, rtol=0)


def test_loss_is_the_references(fixture, policy):
    """Same noise and times; the second sample's last two actions are padded. Found: 1e-6 of 10.7."""
    seen, network = fixture.inputs, policy.network
    with torch.no_grad():
        loss = network.noise_loss(
            network.encode(inputs_of(fixture)), seen["actions"], seen["noise"], seen["time"].long(),
            seen["padded"].bool(),
        )  # fmt: skip
    torch.testing.assert_close(loss, fixture.outputs["loss"][0], atol=1e-4, rtol=0)


def test_actions_are_the_references(fixture, policy):
    """20 steps with the same noise. In double precision, as these steps multiply a rounding that differs from processor
    to processor: found 1e-5 of numbers up to 5, which is the reference's own (float32: 4e-5 to 1.1e-4)."""
    seen, network, inputs = fixture.inputs, copy.deepcopy(policy.network).double(), inputs_of(fixture)
    with torch.no_grad():
        state = network.encode(inputs._replace(images=tuple(image.double() for image in inputs.images)))
        denoise = denoise_of(network, state)
        actions = sample_diffusion(denoise, network.diffusion, seen["noise"].double(), seen["draws"].double())
    torch.testing.assert_close(actions, fixture.outputs["actions"].double(), atol=1e-4, rtol=0)


def test_the_schedule_is_the_references(fixture, policy):
    found = 1 - policy.network.diffusion.alpha_bars[0]
    assert found == pytest.approx(fixture.outputs["betas"][0].item(), rel=1e-4)
    bars = np.cumprod(1 - fixture.outputs["betas"].double().numpy())
    np.testing.assert_allclose(policy.network.diffusion.alpha_bars, bars, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(task=st.integers(1, 4), patches=st.lists(st.integers(1, 3), min_size=1, max_size=3), window=st.integers(1, 4))
def test_a_token_sees_what_it_may(task, patches, window):
    pattern = attention_pattern(task, patches, window)
    tokens = [(TASK, -1)] * task
    for step in range(window):
        tokens += [(OBSERVED, step)] * (sum(patches) + task) + [(READOUT, step)]
    assert pattern.shape == (len(tokens),) * 2
    for row, (kind, time) in enumerate(tokens):
        for column, (other, then) in enumerate(tokens):
            expected = {
                TASK: other == TASK,
                OBSERVED: other == TASK or (other == OBSERVED and then <= time),
                READOUT: other == TASK or then <= time,
            }[kind]
            assert pattern[row, column] == expected


def test_an_earlier_step_does_not_see_a_later_one(fixture, policy):
    inputs = inputs_of(fixture)
    later = tuple(torch.cat([image[:, :1], 1 - image[:, 1:]], 1) for image in inputs.images)
    real = torch.ones(2, 2, dtype=torch.bool)
    with torch.no_grad():
        first, second = (policy.network.transform(i, real) for i in (inputs, inputs._replace(images=later)))
    torch.testing.assert_close(first[:, 0], second[:, 0])
    assert (first[:, 1] - second[:, 1]).abs().max() > 1e-3


def test_padded_steps_and_missing_cameras_are_not_looked_at(fixture, policy):
    inputs = inputs_of(fixture)
    real = torch.tensor([[True, True], [False, True]])
    images = [image.clone() for image in inputs.images]
    images[0][1, 0] = 0.3  # the padded step
    images[1][1] = 0.7  # the missing camera
    with torch.no_grad():
        first, second = (policy.network.transform(i, real) for i in (inputs, inputs._replace(images=tuple(images))))
        seen = policy.network.transform(inputs._replace(images=tuple(images)), torch.ones_like(real))
    torch.testing.assert_close(first, second)
    assert (first[1] - seen[1]).abs().max() > 1e-3


def test_the_padding_of_a_text_is_hidden_from_its_own_words(policy):
    text = policy.network.text
    short, long = torch.tensor([[7, 9, 1, 0, 0, 0]]), torch.tensor([[7, 9, 1, 5, 5, 5]])
    with torch.no_grad():
        found, other, alone = text(short), text(long), text(short[:, :3])
    torch.testing.assert_close(found[:, :3], alone)
    assert (found - other).abs().max() > 1e-3


def test_steps_before_an_episodes_start_are_known_by_their_repetition():
    def window(*frames):
        values = torch.tensor(frames, dtype=torch.float32)[None]
        images = values[..., None, None, None].expand(1, -1, 3, 4, 4)
        return Inputs(
            (images,), torch.zeros(1, 4, dtype=torch.long), values[..., None], torch.ones(1, 1, dtype=torch.bool)
        )

    for frames, expected in (((1, 1, 1), (False, False, True)), ((1, 1, 2), (False, True, True)),
                             ((1, 2, 2), (True, True, True)), ((1, 2, 3), (True, True, True))):  # fmt: skip
        assert tuple(real_steps(window(*frames))[0].tolist()) == expected
    moved = window(1, 1)._replace(state=torch.tensor([[[0.0], [0.1]]]))
    assert real_steps(moved).all()


def test_kernels_are_standardised():
    conv = StandardConv(6, 4, 3)
    x = torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        before = conv(x)
        conv.weight.copy_(3 * conv.weight + torch.randn(4, 1, 1, 1))
    torch.testing.assert_close(conv(x), before, atol=1e-3, rtol=1e-3)


def test_the_loss_is_summed_over_the_numbers_of_an_action_and_skips_padding():
    policy = build("octo")
    spec, network = policy.spec, policy.network
    images = tuple(torch.rand(2, 2, 3, *size) for size in spec.cameras.values())
    tokens, present = torch.ones(2, spec.context, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool)
    inputs = Inputs(images, tokens, torch.rand(2, 2, spec.state_dim), present)
    actions = torch.randn(2, spec.horizon, spec.action_dim)
    padded = torch.zeros(2, spec.horizon, dtype=torch.bool)
    padded[:, 5:] = True
    other = actions.clone()
    other[:, 5:] = 100.0
    context, noise, t = network.encode(inputs), torch.randn(actions.shape), torch.tensor([0, 0])
    with torch.no_grad():
        network.head.output[1].weight.zero_()
        network.head.output[1].bias.zero_()
        loss = network.noise_loss(context, actions, noise, t, padded)
    assert loss == pytest.approx(noise[:, :5].square().sum(-1).mean().item(), rel=1e-5)
    losses = [policy.loss(Batch(inputs, a, padded), torch.Generator().manual_seed(0))["loss"] for a in (actions, other)]
    assert losses[0].item() == pytest.approx(losses[1].item())


def test_published_sizes():
    """27 and 93 million parameters besides T5; only they learn. The numbers are those that the public code makes."""
    for name, count in (("small", 27_042_060), ("paper", 92_830_092)):
        network = build("octo", name, device="meta").network
        assert sum(p.numel() for p in network.parameters() if p.requires_grad) == count
        assert sum(p.numel() for p in network.parameters()) == count + 109_628_544  # T5-base
        assert not any(p.requires_grad for p in network.text.parameters())


def test_rules_cover_the_key_list_of_octo_base(fixture):
    """Its names are those of the fixture with 12 layers of the transformer and of T5, and 3 blocks of the head."""
    names = set()
    for name in fixture.shapes:
        for pattern, count in (("encoderblock_", 12), ("encoder/block/", 12), ("MLPResNetBlock_", 3)):
            if pattern in name and "relative_attention_bias" not in name:
                names |= {re.sub(rf"{pattern}\d+", f"{pattern}{i}", name) for i in range(count)}
                break
        else:
            names.add(name)
    ours, left = translate(names, OctoPolicy.published)
    assert not left
    assert set(ours) == set(build("octo", "paper", device="meta").network.state_dict())


def test_a_published_checkpoint_is_described(policy):
    spec = policy.spec
    assert policy.left_out == {} and dict(spec.cameras) == {"primary": (48, 48), "wrist": (32, 32)}
    assert (spec.horizon, spec.history, spec.steps, spec.context) == (4, 2, 20, 6)
    space = spec.action_space
    assert (space.kind, space.reference, space.rotation, space.dim) == ("pose", "step", "rpy", 7)
    # The gripper's numbers are not normalised.
    np.testing.assert_allclose(policy.processor.action.denormalize(np.ones(7)), [2.5] * 6 + [1.0])
    assert policy.processor.tokens("pick it", np.zeros(10)).tolist() == [3, 2, 0, 0, 0, 0]


def test_statistics_of_the_data_set_that_is_named(fixture, tmp_path):
    policy = load(write_checkpoint(fixture, tmp_path / "a", dataset="fractal"))
    np.testing.assert_allclose(policy.processor.action.denormalize(np.ones(7)), 1.0)
    alone = {"action": {"mean": [1.0] * 7, "std": [1.0] * 7}}
    policy = load(write_checkpoint(fixture, tmp_path / "b", statistics=alone))
    np.testing.assert_allclose(policy.processor.action.denormalize(np.ones(7)), 2.0)
    with pytest.raises(CheckpointError, match=r"expected one of \['bridge_dataset', 'fractal'\], found 'kitchen'"):
        load(write_checkpoint(fixture, tmp_path / "c", dataset="kitchen"))


TIME, TEXT = "heads_action/diffusion_model/cond_encoder/Dense_1/bias", "octo_transformer/task_language_projection/bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(TIME), "1 tensors missing, first 'head.time.2.bias'"),
        (lambda w: w.update({"octo_transformer/extra": torch.zeros(1)}), "'octo_transformer/extra': unknown"),
        (lambda w: w.update({TEXT: torch.zeros(5)}), "expected shape .16,., found .5,."),
        (lambda w: w.update({TEXT.replace("bias", "kernel"): torch.zeros(5)}), "expected shape .16, 16., found .5,."),
        (lambda w: w[TEXT].fill_(torch.nan), "not finite"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(fixture, tmp_path, change, message):
    other = Fixture("octo")
    change(other.weights)
    with pytest.raises(CheckpointError, match=message):
        load(write_checkpoint(other, tmp_path))


def test_settings_that_are_not_known_are_refused(fixture, tmp_path):
    model = fixture.config["model"] | {"repeat_task_tokens": False}
    with pytest.raises(CheckpointError, match="repeat_task_tokens: expected True, found False"):
        load(write_checkpoint(fixture, tmp_path / "a", model=model))
    with pytest.raises(CheckpointError, match="found no 'heads'"):
        load(write_checkpoint(fixture, tmp_path / "b", model={}))


def test_images_and_histories_that_do_not_fit_are_refused():
    config = OctoPolicy.presets["tiny"].network
    with pytest.raises(PolicyError, match="expected multiples of 16 pixels, found {'scene': .40, 32.}"):
        OctoNetwork(example_spec("octo", cameras={"scene": (40, 32)}), config)
    with pytest.raises(PolicyError, match="history: expected at most 3, found 4"):
        OctoNetwork(example_spec("octo", cameras={"scene": (32, 32)}, history=4), config)
