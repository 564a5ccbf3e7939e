"""The recipe "fast_wam" against LeRobot 0.6.1: video latents, both losses, actions, and its published folder."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import vla_models  # noqa: E402
from parity.fixture import Fixture  # noqa: E402
from parity.wan_folder import write_folder  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from vla_models import build  # noqa: E402
from vla_models.parts.video_dit import patches, shifted, training_weight  # noqa: E402
from vla_models.policy import ArmState, CheckpointError, InferenceRequest, PolicyError, PolicyObservation  # noqa: E402
from vla_models.published import translate  # noqa: E402
from vla_models.recipes.fast_wam import FastWamPolicy  # noqa: E402
from vla_models.sampling import flow_times, sample_flow  # noqa: E402
from vla_models.torch_policy import Batch, Inputs, velocity_of  # noqa: E402

CAMERAS = ("image", "wrist")
STATISTICS = {
    "observation.state.mean": torch.linspace(-1, 1, 8), "observation.state.std": torch.linspace(0.5, 1, 8),
    "action.mean": torch.linspace(0, 0.1, 7), "action.std": torch.linspace(0.1, 0.2, 7),
}  # fmt: skip


@pytest.fixture(scope="module")
def fixture():
    return Fixture("fast_wam")


@pytest.fixture(scope="module")
def policy(fixture, tmp_path_factory):
    return vla_models.load(write_folder(fixture, tmp_path_factory.mktemp("fast_wam"), STATISTICS))


@pytest.fixture
def batch(fixture):
    video = [fixture.inputs[f"observation.images.{camera}"] for camera in CAMERAS]
    inputs = Inputs(
        tuple(frames[:, 0] for frames in video), fixture.inputs["tokens"], fixture.inputs["observation.state"],
        torch.ones(2, 2, dtype=torch.bool),
    )  # fmt: skip
    return Batch(
        inputs, fixture.inputs["action"], fixture.inputs["action_is_pad"], tuple(frames[:, 1:] for frames in video)
    )


def close(name, found, expected, tolerance=1e-4):
    print(name, float((found - expected).abs().max()))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_text_and_video_are_encoded_as_the_reference_does(fixture, policy, batch):
    """Largest differences found: features 0, latents 5e-7."""
    with torch.no_grad():
        features = policy.network.text(batch.inputs.tokens)
        video = torch.cat([torch.cat(batch.inputs.images, -1).unsqueeze(1), torch.cat(batch.future, -1)], 1)
        latents = policy.network.vae(video.transpose(1, 2))
    close("features", features, fixture.outputs["features"])
    close("latents", latents, fixture.outputs["latents"])


def test_both_losses_are_the_references(fixture, policy, batch):
    """Largest differences found: action 5e-7, video 3e-8."""
    latents = patches(fixture.outputs["latents"])
    times = (1 - fixture.inputs[name].unsqueeze(1) for name in ("share", "video_share"))
    noises = fixture.inputs["noise"], patches(fixture.inputs["video_noise"])[:, 1:]
    with torch.no_grad():
        losses = policy.network.flow_loss(batch, latents, torch.zeros(2, 1, dtype=torch.bool), *noises, *times)
    for name in ("action", "video"):
        close(name, losses[name], fixture.outputs[name])
    close("loss", losses["loss"], fixture.outputs["action"] + fixture.outputs["video"])


def test_sampled_actions_are_the_references(fixture, policy, batch):
    """Largest difference found: 3e-7, over 10 steps at shifted times."""
    inputs = Inputs(tuple(image[:1] for image in batch.inputs.images), *(value[:1] for value in batch.inputs[1:]))
    with torch.no_grad():
        context = policy.network.encode(inputs)
        actions = sample_flow(
            velocity_of(policy.network, context), fixture.inputs["sample_noise"], policy.steps, None, policy.spec.shift
        )
    assert policy.steps == 10 and policy.spec.shift == 5.0
    close("actions", actions, fixture.outputs["actions"])


def test_actions_never_see_a_later_frame(policy, batch):
    """What the actions attend to in training, with later frames, is what `encode` gives in use, without them."""
    network = policy.network
    with torch.no_grad():
        context = network.encode(batch.inputs)
        video = torch.cat([torch.cat(batch.inputs.images, -1).unsqueeze(1), torch.cat(batch.future, -1)], 1)
        latents = patches(network.vae(video.transpose(1, 2)))
        trained, _ = network.look(latents[:, 0], network.read(batch.inputs))
    torch.testing.assert_close(context, trained, atol=1e-5, rtol=1e-5)


def test_video_that_is_not_there_is_not_learnt_from(policy, batch):
    generator = torch.Generator().manual_seed(0)
    losses = policy.loss(batch._replace(future=()), generator)
    assert losses["video"] == 0 and losses["loss"] == losses["action"] > 0
    # Two pictures stand for four actions each: past the end of the episode they do not count either.
    some = policy.loss(batch._replace(padded=torch.zeros(2, 8, dtype=torch.bool)), torch.Generator().manual_seed(0))
    none = policy.loss(batch._replace(padded=torch.ones(2, 8, dtype=torch.bool)), torch.Generator().manual_seed(0))
    assert some["video"] > 0 and none["video"] == 0


def test_the_loss_draws_all_its_numbers_from_the_generator(policy, batch):
    first, again, other = (policy.loss(batch, torch.Generator().manual_seed(seed))["loss"] for seed in (1, 1, 2))
    assert first == again != other


def test_weights_of_the_loss_have_mean_one_on_shifted_times():
    shares = shifted(torch.linspace(1, 0, 1001)[:-1].double(), 5.0)
    weights = training_weight(shares, 5.0)
    assert weights.min() >= 0 and weights.mean() == pytest.approx(1, abs=1e-6)


def test_shifted_flow_times_are_wans():
    shares = 1 - np.array(flow_times(10, 5.0))
    even = np.linspace(1, 0, 11)
    np.testing.assert_allclose(shares, 5 * even / (1 + 4 * even), atol=1e-12)
    np.testing.assert_allclose(flow_times(4), [0, 0.25, 0.5, 0.75, 1], atol=1e-15)


def test_it_acts_from_its_published_folder(policy):
    assert policy.spec.action_space.kind == "pose" and policy.spec.horizon == 8
    assert set(policy.left_out.values()) == {"the autoencoder's decoder: no picture is painted in use"}
    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (48, 48, 3), np.uint8) for camera in CAMERAS}
    state = {"arm": ArmState(np.zeros(7), np.array([0.4, 0, 0.3, 1.0, 0, 0, 0]), 0.5)}
    object.__setattr__(policy.spec, "prompt", "{task}")  # the fixture's texts are short
    observation = PolicyObservation(images, state, "w5 w6 w7 w8")
    out = policy.infer(observation, InferenceRequest(seed=0))
    assert out.targets.shape == (8, 8) and np.isfinite(out.targets).all()
    assert policy.processor.tokens("w5 w6 w7 w8", np.zeros(8)).tolist() == [5, 6, 7, 8, 1, 0, 0, 0]


@pytest.mark.parametrize("place", ["model.safetensors", "vae/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_a_tensor_that_does_not_fit_is_named(fixture, tmp_path, place, fault):
    folder = write_folder(fixture, tmp_path / "policy", STATISTICS)
    tensors = load_file(folder / place)
    name = "quant_conv.weight" if "vae" in place else "model.proprio_encoder.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors["stranger"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(3)
    save_file(tensors, folder / place)
    words = {"missing": "1 tensors missing", "extra": "stranger", "misshapen": f"{name}: expected shape"}[fault]
    with pytest.raises(CheckpointError, match=words):
        vla_models.load(folder)


def test_frozen_parts_that_are_nowhere_are_named(fixture, tmp_path):
    folder = write_folder(fixture, tmp_path / "policy", STATISTICS)
    config = fixture.config["policy"] | {"text_encoder_model_id": str(tmp_path / "nowhere")}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vae").rename(folder / "moved")
    with pytest.raises(CheckpointError, match="expected the frozen vae of"):
        vla_models.load(folder)


def test_older_names_of_blocks_are_the_same_tensors(fixture):
    """mot.mixtures.video.blocks.0 became mot.layers.0.blocks.video."""
    names = [name for name in fixture.shapes if ".layers." in name]
    older = [name.replace(f"layers.{name.split('.')[3]}.blocks.video", f"mixtures.video.blocks.{name.split('.')[3]}")
             for name in names if ".blocks.video." in name]  # fmt: skip
    new = [name for name in names if ".blocks.video." in name]
    assert list(translate(older, FastWamPolicy.published)[0]) == list(translate(new, FastWamPolicy.published)[0])
    assert len(older) == len(set(older)) > 20 and not set(older) & set(new)


def test_the_rules_cover_the_full_size():
    """Every tensor of the published size has exactly one published name, made here from the tiny one's."""
    paper = set(build("fast_wam", "paper", device="meta").network.state_dict())
    tiny = Fixture("fast_wam").shapes
    names = {name.replace("layers.1.", f"layers.{n}.") for name in tiny for n in range(1, 30)}
    names |= {name.replace("block.0.", f"block.{n}.") for name in tiny for n in range(24) if "text_enc" in name}
    ours = set(translate(names, FastWamPolicy.published)[0])
    wide = {name for name in paper - ours if "vae." not in name}  # its stages have two blocks, the tiny ones one
    assert not wide and not {name for name in ours - paper if "conv_shortcut" not in name}


def test_pictures_that_do_not_fill_the_patches_are_refused():
    spec, config = FastWamPolicy.preset("tiny")
    import dataclasses

    with pytest.raises(PolicyError, match="cameras: expected pictures of one height"):
        build("fast_wam", dataclasses.asdict(config), spec=dataclasses.replace(spec, cameras={"scene": (32, 40)}))
