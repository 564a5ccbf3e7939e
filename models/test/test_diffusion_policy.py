"""Diffusion Policy against LeRobot's, its published checkpoints, its place in time, its masks and its graphs."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import vla_models  # noqa: E402
from parity.fixture import Fixture, drawn  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from vla_models.denoising_policy import denoising_loss  # noqa: E402
from vla_models.parts.denoisers import TransformerDenoiser  # noqa: E402
from vla_models.parts.keypoints import crop  # noqa: E402
from vla_models.parts.resnet import ResNet18  # noqa: E402
from vla_models.policy import CheckpointError, ModelInputs, PolicyError  # noqa: E402
from vla_models.published import translate  # noqa: E402
from vla_models.recipes.diffusion_policy import DiffusionPolicy  # noqa: E402
from vla_models.torch_policy import Inputs  # noqa: E402

CASES = ("diffusion_policy", "diffusion_policy_ddim")


def reference(name: str) -> Fixture:
    """LeRobot's policy with the weights that are not in its file."""
    fixture = Fixture(name)
    shapes = json.loads(fixture.metadata["drawn"])
    fixture.weights |= {key: drawn(key, tuple(shape)) for key, shape in shapes.items()}
    return fixture


@pytest.fixture(scope="module", params=CASES)
def loaded(request, tmp_path_factory):
    """(fixture, the policy that vla_models.load makes of a folder as LeRobot 0.6 writes it)."""
    fixture = reference(request.param)
    folder = fixture.write(tmp_path_factory.mktemp(request.param))
    save_file(fixture.statistics, folder / f"{fixture.metadata['statistics']}.safetensors")
    return fixture, vla_models.load(folder)


def inputs_of(fixture, policy) -> ModelInputs:
    images = tuple(value.numpy() for key, value in fixture.inputs.items() if "image" in key)
    state = policy.processor.state.normalize(fixture.inputs["observation.state"].numpy())
    tokens = np.zeros((1, policy.spec.context), np.int64)
    return ModelInputs(images, tokens, state, np.ones((1, len(images)), bool))


def test_loss_is_lerobots(loaded):
    fixture, policy = loaded
    inputs = policy.tensors(inputs_of(fixture, policy))
    actions = torch.from_numpy(policy.processor.action.normalize(fixture.inputs["action"].numpy()))
    noise, t, padded = (fixture.inputs[name] for name in ("noise", "t", "padded"))
    with torch.no_grad():
        context = policy.network.encode(inputs)
        found = denoising_loss(policy.network, context, actions, noise, t, padded)
    # Found: 2e-7.
    assert abs(found - fixture.outputs["loss"]) < 1e-5


def test_actions_are_lerobots(loaded):
    """The chunk begins at the newest observation: with LeRobot's first executed action."""
    fixture, policy = loaded
    noise = torch.cat([fixture.inputs["start"], fixture.inputs["draws"][:, 0]])[: policy.noise_shape[0]]
    assert noise.shape == policy.noise_shape and policy.spec.horizon == 15
    actions = policy.run(inputs_of(fixture, policy), noise.numpy(), None, {})
    found = policy.processor.action.denormalize(actions)[:, :8]
    # Found: 2e-6.
    np.testing.assert_allclose(found, fixture.outputs["actions"].numpy(), atol=1e-4)


def test_a_checkpoint_of_before_the_processors_is_the_same(tmp_path):
    fixture = reference("diffusion_policy")
    more = {}
    for key, value in fixture.statistics.items():
        feature, _, statistic = key.rpartition(".")
        part = "unnormalize_outputs" if feature == "action" else "normalize_inputs"
        more[f"{part}.buffer_{feature.replace('.', '_')}.{statistic}"] = value
    config = {k: v for k, v in fixture.config.items() if k not in ("resize_shape", "vision_backbone")}
    policy = vla_models.load(fixture.write(tmp_path / "old", config, **more))
    test_actions_are_lerobots((fixture, policy))
    assert set(policy.left_out) >= set(more)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("diffusion.unet.final_conv.1.bias"), r"1 tensors missing.*unet\.out\.bias"),
        (lambda weights: weights.update(spare=torch.zeros(1)), "tensor 'spare': unknown"),
        (lambda weights: weights.update({"diffusion.unet.final_conv.1.bias": torch.zeros(4)}),
         r"final_conv\.1\.bias: expected shape \(3,\), found \(4,\)"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, message):
    fixture = reference("diffusion_policy")
    change(fixture.weights)
    folder = fixture.write(tmp_path / "published")
    save_file(fixture.statistics, folder / f"{fixture.metadata['statistics']}.safetensors")
    with pytest.raises(CheckpointError, match=message):
        vla_models.load(folder)


def test_settings_that_are_not_known_are_named(tmp_path):
    fixture = reference("diffusion_policy")
    for change, message in (({"vision_backbone": "resnet34"}, "resnet34"), ({"down_dims": None}, "expected settings")):
        folder = fixture.write(tmp_path / message, fixture.config | change)
        with pytest.raises(CheckpointError, match=message):
            vla_models.load(folder)


def test_the_rules_know_every_name_of_lerobot_diffusion_pusht():
    """Its 262,709,026 parameters, by the names that LeRobot gives them."""
    network = vla_models.build("diffusion_policy", "paper", device="meta").network
    blocks = [f"{part}.{index}.{block}" for part, count in (("down_modules", 3), ("up_modules", 2))
              for index in range(count) for block in range(2)]  # fmt: skip
    blocks += ["mid_modules.0", "mid_modules.1"]
    kept = [f"{block}.residual_conv" for block in blocks if block.endswith(".0") and "mid" not in block]
    layers = [
        f"{block}.{name}"
        for block in blocks
        for name in ("conv1.block.0", "conv1.block.1", "conv2.block.0", "conv2.block.1", "cond_encoder.1")
    ]
    layers += [*kept, "diffusion_step_encoder.1", "diffusion_step_encoder.3", "final_conv.0.block.0",
               "final_conv.0.block.1", "final_conv.1", "down_modules.0.2", "down_modules.1.2", "up_modules.0.2",
               "up_modules.1.2"]  # fmt: skip
    names = {f"diffusion.unet.{layer}.{end}" for layer in layers for end in ("weight", "bias")}
    stem = "diffusion.rgb_encoder"
    names |= {f"{stem}.{layer}.{end}" for layer in ("pool.nets", "out", "backbone.1") for end in ("weight", "bias")}
    names |= {f"{stem}.pool.pos_grid", f"{stem}.backbone.0.weight", "normalize_inputs.buffer_action.min"}
    for stage in range(4, 8):
        for block in range(2):
            at = f"{stem}.backbone.{stage}.{block}"
            names |= {f"{at}.conv{i}.weight" for i in (1, 2)}
            names |= {f"{at}.bn{i}.{end}" for i in (1, 2) for end in ("weight", "bias")}
            if stage > 4 and block == 0:
                names |= {f"{at}.downsample.{end}" for end in ("0.weight", "1.weight", "1.bias")}
    ours, left = translate(names, DiffusionPolicy.published)
    assert set(ours) == set(network.state_dict()) and len(left) == 2
    assert sum(parameter.numel() for parameter in network.parameters()) == 262_709_026


def test_transformer_is_torchs_decoder():
    """Chi et al. build on torch.nn.TransformerDecoder, pre-norm, with these masks."""
    torch.manual_seed(0)
    ours = TransformerDenoiser(3, 5, 2, length=6, width=16, layers=2, heads=2, dropout=0.0).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer = torch.nn.TransformerDecoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = torch.nn.TransformerDecoder(layer, 2).eval()
    with torch.no_grad():
        for own, other in zip(ours.blocks, theirs.layers, strict=True):
            for mine, its in ((own.self_attention, other.self_attn), (own.cross_attention, other.multihead_attn)):
                parts = mine.query, mine.key, mine.value
                its.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
                its.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
                its.out_proj.load_state_dict(mine.out.state_dict())
            for mine, its in ((own.mlp[0], other.linear1), (own.mlp[3], other.linear2),
                              *zip(own.norms, (other.norm1, other.norm2, other.norm3), strict=True)):  # fmt: skip
                its.load_state_dict(mine.state_dict())
        context, x, t = torch.randn(2, 2, 5), torch.randn(2, 6, 3), torch.tensor([3, 70])
        frequencies = torch.exp(-torch.arange(8) * np.log(10_000) / 7)
        angles = t[:, None] * frequencies
        time = torch.cat([angles.sin(), angles.cos()], -1)[:, None]
        memory = ours.context_mlp(torch.cat([time, ours.context_in(context)], 1) + ours.context_places)
        causal = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
        seen = torch.tensor([[True, True, False]] + [[True] * 3] * 5)
        h = theirs(ours.action_in(x) + ours.places, memory, tgt_mask=causal, memory_mask=~seen)
        expected = ours.action_out(ours.norm(h))
        torch.testing.assert_close(ours(context, x, t), expected, atol=1e-5, rtol=1e-5)


def test_group_norm_resnet_is_a_resnet_of_sixteen_channels_a_group():
    network = ResNet18()
    norms = [module for module in network.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert len(norms) == 20 and all(norm.num_channels == 16 * norm.num_groups for norm in norms)
    assert network(torch.zeros(1, 3, 70, 33)).shape == (1, 512, 3, 2)
    # torchvision's resnet18 has 11,689,512 parameters, 513,000 of them in the classifier.
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_689_512 - 513_000


@pytest.mark.parametrize("preset", ["tiny", "tiny_transformer"])
def test_padded_actions_and_what_surrounds_the_chunk(preset):
    """Actions past the episode's end do not count; what the network adds before and after the chunk is held."""
    torch.manual_seed(0)
    policy = vla_models.build("diffusion_policy", preset)
    spec, network = policy.spec, policy.network
    images = (torch.rand(2, 2, 3, 28, 36),)
    inputs = Inputs(images, torch.zeros(2, spec.context, dtype=torch.int64), torch.rand(2, 2, 8), torch.ones(2, 1) > 0)
    actions, padded = torch.rand(2, 7, 8), torch.zeros(2, 7, dtype=torch.bool)
    padded[:, 4:] = True
    whole, counts = network.trajectory(actions, padded)
    assert torch.equal(whole[:, 0], actions[:, 0]) and torch.equal(whole[:, network.past : 8], actions)
    assert torch.equal(counts[:, 1:8], padded) and not counts[:, 0].any()

    context = network.encode(inputs)
    noise, t = torch.randn(whole.shape), torch.tensor([2, 7])
    with torch.no_grad():
        before = denoising_loss(network, context, whole, noise, t, counts)
        error = network.denoise(context, network.diffusion.noisy(whole, noise, t), t) - noise
    torch.testing.assert_close(before, error[:, :5].square().mean())


def test_horizons_that_the_unet_cannot_halve_are_filled_up():
    for horizon, length in ((7, 8), (8, 10), (9, 10)):
        spec = vla_models.build("diffusion_policy").spec.to_dict() | {"horizon": horizon}
        spec = type(vla_models.build("diffusion_policy").spec).from_dict(spec)
        policy = DiffusionPolicy(spec, vla_models.identity_normalizers(spec), DiffusionPolicy.preset("tiny")[1])
        assert policy.noise_shape == (5, length, 8)
        inputs = ModelInputs((np.zeros((1, 2, 3, 28, 36), np.float32),), np.zeros((1, 16), np.int64),
                             np.zeros((1, 2, 8), np.float32), np.ones((1, 1), bool))  # fmt: skip
        assert policy.run(inputs, np.zeros(policy.noise_shape, np.float32), None, {}).shape == (1, horizon, 8)


def test_crops_are_random_places_in_training_and_the_middle_in_use():
    images = torch.arange(2 * 3 * 9 * 11, dtype=torch.float32).reshape(2, 3, 9, 11)
    torch.testing.assert_close(crop(images, (4, 6), None), images[..., 2:6, 2:8])
    generator = torch.Generator().manual_seed(0)
    places = set()
    for _ in range(200):
        cut = crop(images, (4, 6), generator)
        for image, whole in zip(cut, images, strict=True):
            top, left = divmod(int(image[0, 0, 0] - whole[0, 0, 0]), 11)
            torch.testing.assert_close(image, whole[:, top : top + 4, left : left + 6])
            places.add((top, left))
    assert len(places) == 36


def test_a_crop_larger_than_a_camera_is_told():
    with pytest.raises(PolicyError, match=r"crop: expected rows and columns within camera 'scene' of \(28, 36\)"):
        vla_models.build("diffusion_policy", {"crop": (30, 30)})
