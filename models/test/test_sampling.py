"""The flow sampler and its guidance against the published vectors."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from vla_models.sampling import PrefixGuidance, RtcGuidance, guidance_weight, sample_flow  # noqa: E402

M = torch.diag(torch.full((4,), -0.5)) + torch.diag(torch.full((3,), 0.2), 1) + torch.diag(torch.full((3,), 0.1), -1)
M, B = M.double(), torch.tensor([0.3, 0.1, -0.1, 0.2]).double()
NOISE = torch.tensor([0.5, -0.5, 0.25, -0.25]).double()
TARGET, WEIGHTS = np.array([1, 0.8, 0.6, 0]), np.array([1, 0.367706, 0.076746, 0])


def linear(x, tau):
    return M @ x + B


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (None, [0.487463, -0.152088, 0.020406, 0.026845]),
        (RtcGuidance(TARGET, WEIGHTS, 5.0, "vjp"), [0.990352, 0.462929, 0.216571, 0.051417]),
        (RtcGuidance(TARGET, WEIGHTS, 5.0, "identity"), [1.001919, 0.519664, 0.174059, 0.033502]),
    ],
)
def test_sampler_gives_the_reference_vectors(guidance, expected):
    np.testing.assert_allclose(sample_flow(linear, NOISE, 5, guidance), expected, atol=1e-5)


def test_weights_and_target_act_on_the_steps_of_a_batch_of_chunks():
    noise = NOISE[None, :, None].repeat(2, 1, 3)
    got = sample_flow(lambda x, tau: torch.einsum("ij,bjd->bid", M, x) + B[:, None], noise, 5,
                      RtcGuidance(TARGET[:, None], WEIGHTS))  # fmt: skip
    alone = sample_flow(linear, NOISE, 5, RtcGuidance(TARGET, WEIGHTS))
    np.testing.assert_allclose(got, np.broadcast_to(alone[:, None], got.shape), atol=1e-12)


@pytest.mark.parametrize(
    ("n", "beta", "expected"),
    [
        (5, 5.0, [5, 4.25, 2.166667, 2.166667, 4.25]),
        (10, 10.0, [10, 9.111111, 4.25, 2.761905, 2.166667, 2, 2.166667, 2.761905, 4.25, 9.111111]),
    ],
)
def test_guidance_weight_gives_the_reference_vectors(n, beta, expected):
    np.testing.assert_allclose([guidance_weight(k / n, beta) for k in range(n)], expected, atol=1e-6)


def test_prefix_is_returned_exactly_and_its_flow_time_is_one():
    prefix = torch.randn(1, 6, 2)
    known = torch.arange(6)[None] < 3
    times = []

    def velocity(x, tau):
        times.append(tau)
        return x * 0.3 + tau.unsqueeze(-1)

    out = sample_flow(velocity, torch.randn(1, 6, 2), 4, PrefixGuidance(prefix, known))
    assert torch.equal(out[:, :3], prefix[:, :3]) and not torch.allclose(out[:, 3:], prefix[:, 3:])
    assert all((t[:, :3] == 1).all() for t in times) and [float(t[0, 5]) for t in times] == [0, 0.25, 0.5, 0.75]


def test_guided_sampler_is_traceable_with_its_vector_jacobian_product():
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 3)).requires_grad_(False)

    def sample(noise, target, weights):
        return sample_flow(lambda x, tau: network(x) * (1 + tau), noise, 3, RtcGuidance(target, weights))

    example = (torch.randn(1, 4, 3), torch.randn(1, 4, 3), torch.rand(4))
    graph = make_fx(sample)(*example)
    other = (torch.randn(1, 4, 3), torch.randn(1, 4, 3), torch.rand(4))
    torch.testing.assert_close(graph(*other), sample(*other))


def test_sampler_works_inside_no_grad():
    with torch.no_grad():
        got = sample_flow(linear, NOISE, 5, RtcGuidance(TARGET, WEIGHTS))
    np.testing.assert_allclose(got, [0.990352, 0.462929, 0.216571, 0.051417], atol=1e-5)


def test_unknown_mode_and_no_steps_are_refused():
    with pytest.raises(ValueError, match="mode"):
        RtcGuidance(TARGET, WEIGHTS, mode="jacobian")
    with pytest.raises(ValueError, match="steps"):
        sample_flow(linear, NOISE, 0)
