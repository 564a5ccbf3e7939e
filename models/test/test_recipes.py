"""What every recipe of the library owes its user, asked of each of them at its tiny size."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import vla_models  # noqa: E402
from vla_models import RECIPES, build, policy_class  # noqa: E402
from vla_models.checkpoint import Checkpoint, write_checkpoint, write_tensors  # noqa: E402
from vla_models.normalization import Normalizer  # noqa: E402
from vla_models.policy import ArmState, InferenceRequest, PolicyError, PolicyObservation  # noqa: E402
from vla_models.torch_policy import Batch, Inputs, TorchPolicy  # noqa: E402

NAMES = [name for name in sorted(RECIPES) if issubclass(policy_class(name), TorchPolicy)]
PAPER = [name for name in NAMES if policy_class(name).parameters]


@pytest.fixture(scope="module", params=NAMES)
def policy(request):
    """The tiny policy of a recipe; nothing in it is zero, so that what it computes depends on all of it."""
    torch.manual_seed(0)
    policy = build(request.param)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.02)
    return policy


def make_batch(policy, count: int, seed: int = 0) -> Batch:
    """Random samples."""
    spec, generator = policy.spec, torch.Generator().manual_seed(seed)
    time = (spec.history,) if spec.history > 1 else ()

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    tokens = np.stack([policy.processor.tokens(spec.example_instruction, np.zeros(spec.state_dim))] * count)
    inputs = Inputs(
        tuple(rand(count, *time, 3, *size) for size in spec.cameras.values()),
        torch.from_numpy(tokens),
        2 * rand(count, *time, spec.state_dim) - 1,
        torch.ones(count, len(spec.cameras), dtype=torch.bool),
    )
    actions = 2 * rand(count, spec.horizon, spec.action_dim) - 1
    return Batch(inputs, actions, torch.zeros(count, spec.horizon, dtype=torch.bool))


def make_observation(spec, seed: int = 0) -> PolicyObservation:
    rng = np.random.default_rng(seed)
    tool = np.array([0.4, 0.1, 0.3, 1.0, 0.0, 0.0, 0.0])
    state = {arm: ArmState(rng.normal(0, 0.3, len(spec.joints[arm])), tool, 0.5) for arm in spec.arms}
    images = {camera: rng.integers(0, 256, (*size, 3), np.uint8) for camera, size in spec.cameras.items()}
    return PolicyObservation(images, state, spec.example_instruction, 1.0)


def test_a_chunk_is_finite_and_a_function_of_the_seed(policy):
    observation = make_observation(policy.spec)
    first, again = (policy.infer(observation, InferenceRequest(seed=3)).targets for _ in range(2))
    # No actions lead to the first frame of LingBot-VA's first chunk.
    length = policy.spec.length - (policy.loop.frame_actions if policy.spec.recipe == "lingbot_va" else 0)
    assert first.shape == (length, policy.spec.target_dim) and np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)


def test_the_loss_reaches_every_parameter(policy):
    policy.network.train()
    loss = policy.loss(make_batch(policy, 2), torch.Generator().manual_seed(0))["loss"]
    assert loss.ndim == 0 and torch.isfinite(loss)
    policy.network.zero_grad()
    loss.backward()
    policy.network.eval()
    frozen = getattr(policy.network, "frozen", ())
    silent = [name for name, parameter in policy.network.named_parameters()
              if parameter.requires_grad and parameter.grad is None and not name.startswith(tuple(frozen))]  # fmt: skip
    assert not silent


def test_samples_of_a_batch_do_not_mix(policy):
    if not hasattr(policy.network, "encode"):
        pytest.skip("has no encoding of its own")
    inputs = make_batch(policy, 2).inputs

    def encoded(rows: slice) -> tuple:
        part = Inputs(tuple(image[rows] for image in inputs.images), *(value[rows] for value in inputs[1:]))
        with torch.no_grad():
            context = policy.network.encode(part)
        return context if isinstance(context, tuple) else (context,)

    for both, alone in zip(encoded(slice(0, 2)), encoded(slice(1, 2)), strict=True):
        torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-3)


def test_weights_and_settings_survive_a_checkpoint(policy, tmp_path):
    spec = policy.spec
    rng = np.random.default_rng(0)
    normalizers = {name: Normalizer("mean_std", 0.1 * rng.normal(size=dim), rng.uniform(0.5, 1, dim))
                   for name, dim in (("state", spec.state_dim), ("action", spec.action_dim))}  # fmt: skip
    before = type(policy)(spec, normalizers, policy.config)
    before.network.load_state_dict(policy.network.state_dict())
    write_checkpoint(Checkpoint(spec, normalizers, dataclasses.asdict(policy.config)), tmp_path)
    weights = {name: value.numpy() for name, value in policy.network.state_dict().items()}
    write_tensors(tmp_path / "model.safetensors", weights)
    after = vla_models.load(tmp_path)
    request = InferenceRequest(seed=1)
    observation = make_observation(spec)
    np.testing.assert_array_equal(before.infer(observation, request).targets, after.infer(observation, request).targets)


def test_a_camera_that_may_be_missing_is_not_looked_at(policy):
    optional = next(iter(policy.spec.optional), None)
    if optional is None:
        pytest.skip("needs all its cameras")
    observation = make_observation(policy.spec)
    without = dataclasses.replace(observation, images={k: v for k, v in observation.images.items() if k != optional})
    inputs, _ = policy.processor.inputs(without)
    index = list(policy.spec.cameras).index(optional)
    assert not inputs.present[0, index] and inputs.present.sum() == len(policy.spec.cameras) - 1
    targets = policy.infer(without, InferenceRequest(seed=1)).targets
    assert np.isfinite(targets).all()
    # What stands in for the picture does not matter: it is masked.
    inputs.images[index][:] = 0.7
    other, _ = policy.processor.inputs(without)
    noise = np.random.default_rng(1).standard_normal(policy.noise_shape).astype(np.float32)
    np.testing.assert_allclose(policy.run(inputs, noise, None, {}), policy.run(other, noise, None, {}), atol=1e-5)


def test_a_camera_that_must_be_there_is_named(policy):
    needed = next((name for name in policy.spec.cameras if name not in policy.spec.optional), None)
    if needed is None:
        pytest.skip("needs no camera")
    observation = make_observation(policy.spec)
    with pytest.raises(PolicyError, match=f"expected camera {needed!r}"):
        policy.infer(dataclasses.replace(observation, images={}))


def test_guidance_that_is_stated_works(policy):
    spec, observation = policy.spec, make_observation(policy.spec)
    remainder = policy.infer(observation, InferenceRequest(seed=1)).targets
    for guidance in spec.guidance:
        request = InferenceRequest(remainder, 2, spec.horizon // 2, guidance, seed=2)
        out = policy.infer(observation, request)
        free = policy.infer(observation, InferenceRequest(seed=2))
        ends = (np.abs(out.targets[0] - remainder[0]).sum(), np.abs(free.targets[0] - remainder[0]).sum())
        assert np.isfinite(out.targets).all()
        if guidance == "guided" and getattr(getattr(policy.network, "diffusion", None), "prediction", "") == "sample":
            continue  # the Jacobian of what an untrained one says is clean points nowhere; see its own test
        assert ends[0] <= ends[1] + 1e-9


@pytest.mark.parametrize("name", PAPER)
def test_the_published_size_is_met_within_one_percent(name):
    kind = policy_class(name)
    network = build(name, "paper", device="meta").network
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == pytest.approx(kind.parameters, rel=0.01)
