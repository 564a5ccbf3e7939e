"""The network of the recipe "flow"."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from vla_core.actions import ActionSpace  # noqa: E402
from vla_models import build  # noqa: E402
from vla_models.normalization import Normalizer  # noqa: E402
from vla_models.policy import PolicyError, PolicySpec  # noqa: E402
from vla_models.recipes.flow import CameraTokens, FlowConfig  # noqa: E402
from vla_models.torch_policy import Batch, Inputs, velocity_of  # noqa: E402


def make_batch(policy, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spec = policy.spec
    images = tuple(torch.rand(count, 3, *size, generator=generator) for size in spec.cameras.values())
    inputs = Inputs(images, torch.randint(1, len(spec.vocabulary), (count, spec.context), generator=generator),
                    torch.randn(count, spec.state_dim, generator=generator),
                    torch.ones(count, len(images), dtype=torch.bool))  # fmt: skip
    return Batch(inputs, torch.randn(count, spec.horizon, spec.action_dim, generator=generator),
                 torch.zeros(count, spec.horizon, dtype=torch.bool))  # fmt: skip


def test_the_shipped_size_stays_below_two_million_parameters():
    space = ActionSpace(("arm",), "pose", (), "chunk", "base", "rotvec")
    spec = PolicySpec("p", "flow", {"scene": (96, 128), "wrist": (96, 128)}, ("arm",), "pose", space, 32, 0.05,
                      vocabulary=("", "red"))  # fmt: skip
    unit = {"state": Normalizer("mean_std", np.zeros(10), np.ones(10)),
            "action": Normalizer("mean_std", np.zeros(7), np.ones(7))}  # fmt: skip
    assert sum(p.numel() for p in build("flow", "paper", spec=spec, normalizers=unit).network.parameters()) < 2_000_000


def test_samples_that_share_a_context_do_not_mix(policy_of):
    policy = policy_of("flow")
    network, batch = policy.network, make_batch(policy, 2)
    with torch.no_grad():
        context = network.encode(batch.inputs)
        x, tau = torch.randn(6, 8, 7), torch.rand(6, 1)
        together = network.velocity(context, x, tau)
        for i in range(6):
            alone = network.velocity(context[i // 3 : i // 3 + 1], x[i : i + 1], tau[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_one_flow_time_for_all_actions_equals_one_for_each(policy_of):
    policy = policy_of("flow")
    batch = make_batch(policy, 1)
    with torch.no_grad():
        velocity = velocity_of(policy.network, policy.network.encode(batch.inputs))
        x = torch.randn(1, 8, 7)
        torch.testing.assert_close(velocity(x, 0.4), velocity(x, torch.full((1, 8), 0.4)), atol=1e-6, rtol=1e-5)


def test_image_instruction_and_state_each_change_the_velocity(policy_of):
    policy = policy_of("flow")
    network, a, b = policy.network, make_batch(policy, 1, 1), make_batch(policy, 1, 2)
    x, tau = torch.randn(1, 8, 7), torch.full((1, 1), 0.5)
    with torch.no_grad():
        base = network.velocity(network.encode(a.inputs), x, tau)
        for part in ("images", "tokens", "state"):
            inputs = a.inputs._replace(**{part: getattr(b.inputs, part)})
            assert (network.velocity(network.encode(inputs), x, tau) - base).abs().max() > 1e-5


def test_loss_is_a_function_of_its_generator(policy_of):
    policy = policy_of("flow")
    batch = make_batch(policy, 4)
    first, again, other = (
        policy.network.loss(batch, torch.Generator().manual_seed(seed))["loss"].item() for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("size", [(96, 128), (96, 171), (97, 130), (120, 160)])
def test_a_camera_gives_its_tokens_whatever_rounding_its_size_needs(size):
    config = FlowConfig()
    with torch.no_grad():
        tokens = CameraTokens(size, config)(torch.rand(2, 3, *size), torch.zeros(2, config.width))
    assert tokens.shape == (2, 4 + 3 * 4, config.width)


@pytest.mark.parametrize(("size", "pool"), [((96, 128), (5, 4)), ((16, 128), (3, 4)), ((96, 128), (0, 4))])
def test_pooling_that_the_grid_does_not_allow_is_named(size, pool):
    grid = (size[0] // 8, 16)
    words = f"feature grid {grid} of a camera of {size[0]} x {size[1]} pixels, found {pool}"
    with pytest.raises(PolicyError) as error:
        CameraTokens(size, FlowConfig(pool=pool))
    assert words in str(error.value)
