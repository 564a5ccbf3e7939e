"""The network of the recipe "act"."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from vla_core.actions import ActionSpace  # noqa: E402
from vla_models import build  # noqa: E402
from vla_models.normalization import Normalizer  # noqa: E402
from vla_models.policy import PolicySpec  # noqa: E402
from vla_models.torch_policy import Batch, Inputs  # noqa: E402


def make_batch(count, padded=0):
    generator = torch.Generator().manual_seed(count)
    mask = torch.zeros(count, 8, dtype=torch.bool)
    mask[:, 8 - padded :] = padded > 0
    inputs = Inputs((torch.rand(count, 3, 24, 32, generator=generator),), torch.zeros(count, 16, dtype=torch.long),
                    torch.randn(count, 8, generator=generator), torch.ones(count, 1, dtype=torch.bool))  # fmt: skip
    return Batch(inputs, torch.randn(count, 8, 8, generator=generator), mask)  # fmt: skip


def test_the_shipped_size_stays_below_four_million_parameters():
    space = ActionSpace(("left", "right"), "joint", (6, 6))
    joints = {"left": tuple("abcdef"), "right": tuple("abcdef")}
    spec = PolicySpec("p", "act", {"top": (120, 160)}, ("left", "right"), "joint", space, 100, 0.02, joints)
    unit = Normalizer("mean_std", np.zeros(14), np.ones(14))
    policy = build("act", {}, spec=spec, normalizers={"state": unit, "action": unit})
    assert sum(p.numel() for p in policy.network.parameters()) < 4_000_000


def test_padded_actions_touch_neither_loss_nor_posterior(policy_of):
    network = policy_of("act").network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = make_batch(4, padded=3)
    actions = batch.actions.clone()
    actions[:, 5:] = 100.0
    losses = [network.loss(b, torch.Generator().manual_seed(0)) for b in (batch, batch._replace(actions=actions))]
    for name in ("l1", "kl"):
        torch.testing.assert_close(losses[0][name], losses[1][name])


def test_use_takes_the_mean_of_the_prior(policy_of):
    network, batch = policy_of("act").network, make_batch(2)
    with torch.no_grad():
        zero = network(batch.inputs, torch.zeros(2, 32))
        torch.testing.assert_close(network(batch.inputs), zero)
        assert (network(batch.inputs, torch.ones(2, 32)) - zero).abs().max() > 1e-4


def test_divergence_is_zero_for_the_prior_and_weighted_in_the_loss(policy_of):
    network = policy_of("act").network.train()
    losses = network.loss(make_batch(4), torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses["loss"], losses["l1"] + 10.0 * losses["kl"])
    torch.nn.init.zeros_(network.posterior_out.weight)
    torch.nn.init.zeros_(network.posterior_out.bias)
    assert network.loss(make_batch(4), torch.Generator().manual_seed(0))["kl"].item() == pytest.approx(0, abs=1e-6)
