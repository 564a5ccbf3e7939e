"""The recipe "act" against LeRobot 0.6.1: losses, actions, and the checkpoints that it publishes."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import vla_models  # noqa: E402
from parity.fixture import Fixture  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from vla_models import build  # noqa: E402
from vla_models.parts.cvae import divergence, mean_l1  # noqa: E402
from vla_models.policy import ArmState, CheckpointError, PolicyObservation  # noqa: E402
from vla_models.published import translate  # noqa: E402
from vla_models.recipes.act import ActPolicy  # noqa: E402
from vla_models.torch_policy import Batch, Inputs  # noqa: E402

CAMERAS = ("top", "wrist")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def fixture():
    return Fixture("act")


def buffers(dim: int = 14) -> dict:
    """Statistics as older checkpoints have them, inside model.safetensors."""
    state, action = torch.linspace(-1, 1, dim), torch.linspace(0, 0.5, dim)
    images = {f"normalize_inputs.buffer_observation_images_{c}": (MEAN, STD) for c in CAMERAS}
    vectors = {"normalize_inputs.buffer_observation_state": (state, state.abs() + 0.5)}
    vectors |= {
        f"{part}.buffer_action": (action, action + 0.1) for part in ("normalize_targets", "unnormalize_outputs")
    }
    out = {f"{k}.{n}": v.reshape(3, 1, 1).clone() for k, pair in images.items() for n, v in zip(("mean", "std"), pair)}
    return out | {f"{k}.{n}": v.clone() for k, pair in vectors.items() for n, v in zip(("mean", "std"), pair)}


@pytest.fixture(scope="module")
def loaded(fixture, tmp_path_factory):
    return vla_models.load(fixture.write(tmp_path_factory.mktemp("act"), **buffers()))


def make_batch(fixture) -> Batch:
    images = tuple(fixture.inputs[f"observation.images.{camera}"] for camera in CAMERAS)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    inputs = Inputs(images, tokens, fixture.inputs["observation.state"], torch.ones(2, 2, dtype=torch.bool))
    return Batch(inputs, fixture.inputs["action"], fixture.inputs["action_is_pad"])


def test_loss_and_actions_are_the_references(fixture, loaded):
    """Largest differences found: loss 1e-6, actions 4e-7."""
    batch, network = make_batch(fixture), loaded.network
    with torch.no_grad():
        actions = network(batch.inputs)
        mean, log_variance = network.posterior_of(batch.inputs.state, batch.actions, batch.padded)
        latent = mean + torch.exp(log_variance / 2) * fixture.inputs["noise"]
        l1 = mean_l1(network(batch.inputs, latent), batch)
        kl = divergence(mean, log_variance)
    found = {"actions": actions, "l1": l1, "kl": kl, "loss": l1 + 10.0 * kl}
    for name, value in found.items():
        print(name, (value - fixture.outputs[name]).abs().max().item())
        torch.testing.assert_close(value, fixture.outputs[name], atol=1e-4, rtol=1e-5)


def test_the_training_loss_is_that_of_the_parts(fixture, loaded, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *shape, **kw: fixture.inputs["noise"])
    loss = loaded.network.train().loss(make_batch(fixture), torch.Generator())
    loaded.network.eval()
    for name in ("loss", "l1", "kl"):
        torch.testing.assert_close(loss[name], fixture.outputs[name], atol=1e-4, rtol=1e-5)


def test_a_checkpoint_brings_its_robot_and_statistics(fixture, loaded):
    spec = loaded.spec
    assert (spec.arms, spec.horizon, spec.state_dim, spec.action_dim) == (("left", "right"), 6, 14, 14)
    assert dict(spec.cameras) == {camera: (64, 96) for camera in CAMERAS} and spec.action_space.reference == "absolute"
    picture = np.full((64, 96, 3), 90, np.uint8)
    state = {arm: ArmState(np.full(6, 0.1), np.array([0, 0, 0, 0, 0, 0, 1.0]), 0.5) for arm in spec.arms}
    output = loaded.infer(PolicyObservation(dict.fromkeys(CAMERAS, picture), state))
    image = torch.full((1, 3, 64, 96), 90 / 255)
    raw = torch.tensor([[*[0.1] * 6, 0.5] * 2])
    given = buffers()
    mean, std = (given[f"normalize_inputs.buffer_observation_state.{name}"] for name in ("mean", "std"))
    inputs = Inputs((image, image), torch.zeros(1, 16, dtype=torch.long), (raw - mean) / std, torch.ones(1, 2) > 0)
    with torch.no_grad():
        actions = loaded.network(inputs)[0]
    mean, std = (given[f"unnormalize_outputs.buffer_action.{name}"] for name in ("mean", "std"))
    expected = (actions * std + mean).numpy()
    expected[:, [6, 13]] = expected[:, [6, 13]].clip(0, 1)  # openings
    np.testing.assert_allclose(output.targets, expected, atol=1e-5)


def test_statistics_beside_the_weights_say_the_same(fixture, loaded, tmp_path):
    folder = fixture.write(tmp_path)
    with pytest.raises(CheckpointError, match="expected observation.images.top.mean"):
        vla_models.load(folder)
    given = buffers()
    names = {
        "observation.state": "normalize_inputs.buffer_observation_state",
        "action": "normalize_targets.buffer_action",
    }
    names |= {f"observation.images.{c}": f"normalize_inputs.buffer_observation_images_{c}" for c in CAMERAS}
    stats = {f"{ours}.{n}": given[f"{theirs}.{n}"] for ours, theirs in names.items() for n in ("mean", "std")}
    save_file(stats, folder / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    policy = vla_models.load(folder)
    assert policy.processor.state.to_dict() == loaded.processor.state.to_dict()
    assert policy.processor.action.to_dict() == loaded.processor.action.to_dict()
    assert policy.config == loaded.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.action_head.bias"), "1 tensors missing.*action_out.bias"),
        (lambda w: w.update({"model.extra.weight": torch.ones(1)}), "model.extra.weight.*no rule"),
        (lambda w: w.update({"model.action_head.bias": torch.ones(3)}), r"action_head.bias: expected shape \(14,\)"),
        (lambda w: w.update({"model.encoder.layers.0.self_attn.in_proj_bias": torch.ones(95)}), "expected shape"),
        (lambda w: w.update({"unnormalize_outputs.buffer_action.std": torch.full((14,), torch.inf)}), "finite"),
        (lambda w: w.update({"unnormalize_outputs.buffer_action.std": torch.ones(7)}), "expected 14 numbers"),
    ],
)
def test_tensors_that_do_not_fit_are_named(fixture, tmp_path, change, message):
    folder = fixture.write(tmp_path)
    weights = {**fixture.weights, **buffers()}
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        vla_models.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_norm": True}, "pre_norm: expected False"),
        ({"chunk_size": None}, "expected settings and tensors of the recipe .act., found TypeError"),
        ({"output_features": {"action": {"shape": [13]}}}, "as many numbers"),
        ({"normalization_mapping": {"STATE": "LOG"}}, "normalisation: expected"),
    ],
)
def test_settings_that_do_not_fit_are_named(fixture, tmp_path, change, message):
    folder = fixture.write(tmp_path, {**fixture.config, **change}, **buffers())
    with pytest.raises(CheckpointError, match=message):
        vla_models.load(folder)


def test_the_rules_cover_the_published_size():
    network = build("act", "paper", device="meta").network
    names = []  # of lerobot/act_aloha_sim_transfer_cube_human
    for part, layers, attentions, norms in (
        ("vae_encoder", 4, ("self_attn",), 2),
        ("encoder", 4, ("self_attn",), 2),
        ("decoder", 1, ("self_attn", "multihead_attn"), 3),
    ):
        for layer in range(layers):
            own = [f"{a}.{n}" for a in attentions for n in ("in_proj_weight", "in_proj_bias")]
            both = [f"{a}.out_proj" for a in attentions] + ["linear1", "linear2"]
            both += [f"norm{i + 1}" for i in range(norms)]
            own += [f"{name}.{kind}" for name in both for kind in ("weight", "bias")]
            names += [f"model.{part}.layers.{layer}.{name}" for name in own]
    both = ["decoder.norm", "action_head", "encoder_img_feat_input_proj", "encoder_latent_input_proj",
            "encoder_robot_state_input_proj", "vae_encoder_action_input_proj", "vae_encoder_latent_output_proj",
            "vae_encoder_robot_state_input_proj"]  # fmt: skip
    names += [f"model.{name}.{kind}" for name in both for kind in ("weight", "bias")]
    names += ["model.vae_encoder_cls_embed.weight", "model.vae_encoder_pos_enc", "model.decoder_pos_embed.weight",
              "model.encoder_1d_feature_pos_embed.weight"]  # fmt: skip
    norm = ("weight", "bias", "running_mean", "running_var")
    names += ["model.backbone.conv1.weight", *(f"model.backbone.bn1.{n}" for n in norm)]
    for stage in range(1, 5):
        for block in range(2):
            start = f"model.backbone.layer{stage}.{block}"
            for i in (1, 2):
                names += [f"{start}.conv{i}.weight", *(f"{start}.bn{i}.{n}" for n in norm)]
        if stage > 1:
            start = f"model.backbone.layer{stage}.0.downsample"
            names += [f"{start}.0.weight", *(f"{start}.1.{n}" for n in norm)]
    ours, left = translate([*names, *buffers()], ActPolicy.published)
    assert set(ours) == set(network.state_dict())
    assert set(left) == {"model.vae_encoder_pos_enc", *buffers()}
