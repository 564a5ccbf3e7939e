"""Diffusion: schedules and samplers against diffusers, the algebra of predictions, guidance against the flow's."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from vla_models.diffusion import (
    Diffusion,
    PrefixDiffusionGuidance,
    RtcDiffusionGuidance,
    betas_of,
    sample_diffusion,
)

FIXTURE = Path(__file__).parent / "parity" / "diffusion.safetensors"
with safe_open(FIXTURE, "np") as file:
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    CONFIG = json.loads(file.metadata()["config"])


def case(name: str):
    """The diffusion, the number of steps, and the stand-in for a network, of a case of the fixture."""
    _, sampler, prediction, schedule, training, steps = name.split("/")
    clip = 0.0 if sampler == "dpmsolver++" else CONFIG["clip"]
    return Diffusion(int(training), schedule, prediction, sampler, clip), int(steps)


@pytest.mark.parametrize("name", CONFIG["cases"])
def test_samples_are_those_of_diffusers(name):
    diffusion, steps = case(name)
    times = []

    def denoise(x, t):
        times.append(t)
        return np.tanh(x @ TENSORS["in/matrix"] + np.float32(0.01 * t))

    found = sample_diffusion(denoise, diffusion, TENSORS["in/noise"], TENSORS["in/draws"], steps)
    assert found.dtype == np.float32 and times == TENSORS[f"{name}/times"].astype(int).tolist()
    # The largest difference is 1.6e-5, relative to the largest number.
    assert np.abs(found - TENSORS[name]).max() <= 1e-4 * max(1.0, np.abs(TENSORS[name]).max())


@pytest.mark.parametrize("name", CONFIG["cases"][::4])
def test_torch_and_numpy_agree(name):
    torch = pytest.importorskip("torch")
    diffusion, steps = case(name)
    noise, draws, matrix = (TENSORS[f"in/{key}"] for key in ("noise", "draws", "matrix"))
    with_numpy = sample_diffusion(lambda x, t: np.tanh(x @ matrix), diffusion, noise, draws, steps)
    weights = torch.from_numpy(matrix)
    with_torch = sample_diffusion(
        lambda x, t: torch.tanh(x @ weights), diffusion, *map(torch.from_numpy, (noise, draws)), steps
    )
    np.testing.assert_allclose(with_torch.numpy(), with_numpy, atol=1e-5 * max(1.0, np.abs(with_numpy).max()))


@pytest.mark.parametrize("name", [name for name in TENSORS if name.startswith("out/bars")])
def test_schedules_are_those_of_diffusers(name):
    _, _, schedule, training = name.split("/")
    np.testing.assert_allclose(Diffusion(int(training), schedule).alpha_bars, TENSORS[name], rtol=2e-3, atol=1e-6)


def test_octos_schedule():
    # 20 steps, written out from cos^2 at k/20; the last one would be 1 and is capped.
    betas = betas_of("cosine", 20)
    bars = [np.cos((k / 20 + 0.008) / 1.008 * np.pi / 2) ** 2 for k in range(3)]
    # In float32, as Octo has it.
    np.testing.assert_allclose(betas[:2], [1 - bars[1] / bars[0], 1 - bars[2] / bars[1]], rtol=1e-6)
    assert betas[-1] == np.float32(0.999) and betas.shape == (20,)


def test_octos_sampler():
    """x <- clip((x - beta eps/sqrt(1 - alpha_bar))/sqrt(alpha) + sqrt(beta) z), z = 0 at the end."""
    diffusion = Diffusion(20, "cosine", clip=0.0, bound=5.0, variance="large")
    rng = np.random.default_rng(0)
    noise, draws, matrix = rng.normal(size=(1, 4, 3)), rng.normal(size=(19, 1, 4, 3)), rng.normal(size=(3, 3))
    betas, bars = betas_of("cosine", 20), diffusion.alpha_bars
    x = noise
    for k, t in enumerate(range(19, -1, -1)):
        x = (x - betas[t] / np.sqrt(1 - bars[t]) * np.tanh(x @ matrix)) / np.sqrt(1 - betas[t])
        x = np.clip(x + (np.sqrt(betas[t]) * draws[k] if t else 0), -5, 5)
    found = sample_diffusion(lambda x, t: np.tanh(x @ matrix), diffusion, noise, draws)
    np.testing.assert_allclose(found, x, atol=1e-9)


@given(
    t=st.integers(0, 99),
    prediction=st.sampled_from(["epsilon", "sample", "v"]),
    schedule=st.sampled_from(["linear", "squaredcos_cap_v2"]),
    values=st.lists(st.floats(-3, 3), min_size=2, max_size=2),
)
def test_what_the_network_should_say_gives_back_the_clean_sample(t, prediction, schedule, values):
    diffusion = Diffusion(100, schedule, prediction)
    clean, noise = (np.full((1, 2, 1), value) for value in values)
    for when in (t, np.array([t])):
        state = diffusion.noisy(clean, noise, when)
        back = diffusion.clean(diffusion.target(clean, noise, when), state, when)
        np.testing.assert_allclose(back, clean, atol=1e-8)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_samples_of_a_normal_distribution_are_normally_distributed(sampler, prediction):
    mean, deviation, count = 0.4, 0.2, 2000
    diffusion = Diffusion(1000, "squaredcos_cap_v2", prediction, sampler, clip=0.0)

    def denoise(x, t):
        a, s = diffusion.levels(t, x)
        clean = mean + a * deviation**2 / (a**2 * deviation**2 + s**2) * (x - a * mean)
        return diffusion.target(clean, (x - a * clean) / s, t)

    rng = np.random.default_rng(0)
    steps = 500 if sampler == "ddpm" else 100
    noise, draws = rng.normal(size=(count, 1, 1)), rng.normal(size=(diffusion.draws(steps), count, 1, 1))
    sample = sample_diffusion(denoise, diffusion, noise, draws, steps)
    assert sample.mean() == pytest.approx(mean, abs=0.02) and sample.std() == pytest.approx(deviation, rel=0.06)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
@pytest.mark.parametrize("t", [3, 40, 90])
def test_guidance_is_that_of_the_equivalent_flow(prediction, t):
    """One estimate, moved here and by vla_models.sampling on the flow z = x/(a + s), tau = a/(a + s)."""
    torch = pytest.importorskip("torch")
    from vla_models.sampling import RtcGuidance

    torch.manual_seed(0)
    diffusion = Diffusion(100, "linear", prediction, clip=0.0)
    matrix = torch.randn(3, 3, dtype=torch.float64)
    x, target = torch.randn(2, 1, 4, 3, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=torch.float64)

    def denoise(x, t):
        return torch.tanh(x @ matrix)

    step = next(step for step in diffusion.plan(100) if step.t == t)
    a, s = step.signal, step.sigma
    moved, noise = RtcDiffusionGuidance(target, weights).estimate(denoise, diffusion, x, step)
    tau = a / (a + s)

    def velocity(z, tau):
        state = (a + s) * z
        return (diffusion.clean(denoise(state, t), state, t) - z) / (1 - tau)

    z = x / (a + s)
    expected = z + (1 - tau) * RtcGuidance(target, weights).velocity(velocity, z, tau)
    torch.testing.assert_close(moved, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(a * moved + s * noise, x, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++"])
def test_guidance_ends_nearer_to_its_target(sampler):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    diffusion = Diffusion(100, "squaredcos_cap_v2", "epsilon", sampler)

    def denoise(x, t):  # of x_0 normal with deviation 0.5: actions of one chunk hang together
        a, s = diffusion.levels(t, x)
        covariance = 0.25 * (0.9 * torch.ones(4, 4) + 0.1 * torch.eye(4))
        clean = a * covariance @ torch.linalg.inv(a**2 * covariance + s**2 * torch.eye(4)) @ x
        return (x - a * clean) / s

    noise, draws = torch.randn(1, 4, 3), torch.randn(19, 1, 4, 3)
    target = torch.full((1, 4, 3), 0.8)
    free = sample_diffusion(denoise, diffusion, noise, draws, 20)
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0])
    guided = sample_diffusion(denoise, diffusion, noise, draws, 20, RtcDiffusionGuidance(target, weights))
    far, near = ((sample - target)[:, :2].abs().max() for sample in (free, guided))
    assert near < 0.3 * far and guided.abs().max() <= 1
    # What is not guided follows: it hangs together with what is.
    assert (guided - target)[:, 2:].abs().mean() < 0.6 * (free - target)[:, 2:].abs().mean()
    unguided = sample_diffusion(denoise, diffusion, noise, draws, 20, RtcDiffusionGuidance(target, 0 * weights))
    torch.testing.assert_close(unguided, free, atol=1e-4, rtol=1e-4)


def test_a_known_prefix_comes_back_and_the_rest_sees_it():
    diffusion = Diffusion(50, sampler="ddim")
    noise = np.random.default_rng(0).normal(size=(1, 4, 2)).astype(np.float32)
    prefix, known = np.full((1, 4, 2), 0.7, np.float32), np.array([[True, True, False, False]])
    seen = []

    def denoise(x, t):
        seen.append((t, x[0, 0, 0]))
        return np.broadcast_to(x.mean(1, keepdims=True), x.shape)

    found = sample_diffusion(denoise, diffusion, noise, None, 10, PrefixDiffusionGuidance(prefix, known))
    free = sample_diffusion(denoise, diffusion, noise, None, 10)
    np.testing.assert_allclose(found[:, :2], prefix[:, :2], atol=1e-6)
    assert np.abs(found[:, 2:] - free[:, 2:]).max() > 1e-3
    for t, value in seen[:10]:
        a, s = diffusion.levels(t, noise)
        assert value == pytest.approx(a * 0.7 + s * noise[0, 0, 0], abs=1e-5)


def test_misuse_is_told():
    noise = np.zeros((1, 2, 1), np.float32)
    with pytest.raises(ValueError, match="expected 4 draws, found 0"):
        sample_diffusion(lambda x, t: x, Diffusion(), noise, steps=5)
    with pytest.raises(ValueError, match="expected 1 to 99 steps of dpmsolver"):
        Diffusion(sampler="dpmsolver++").plan(100)
    with pytest.raises(ValueError, match="schedule must be one of"):
        Diffusion(schedule="sigmoid")
