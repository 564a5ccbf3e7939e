"""Diffusion: noise schedules, samplers and their guidance, on torch tensors and on NumPy arrays alike.

Convention: x_t = a_t x_0 + s_t eps, a_t^2 + s_t^2 = 1, a_t^2 = alpha_bar[t], t = 0 (nearly clean) to T - 1 (noise).
Samplers: DDPM (Ho et al., arXiv 2006.11239), DDIM without noise (Song et al., arXiv 2010.02502), DPM-Solver++ of
second order, multistep (Lu et al., arXiv 2211.01095). One step of each is a linear combination of the state, the
estimated clean sample, the noise in the state, the estimate before, and fresh noise; `Diffusion.plan` gives the
factors.

Importing this module needs no torch: the same sampler drives torch networks and exported graphs. All randomness is
given from outside, so a sample is a function of its noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from vla_models.policy import ChunkPrefix
from vla_models.sampling import Array, _like

#: denoise(x, t) -> prediction, shaped as x; t is an int, or an integer array (B,).
Denoise = Callable[[Array, Any], Array]
SCHEDULES = ("linear", "squaredcos_cap_v2", "cosine")
PREDICTIONS = ("epsilon", "sample", "v")
SAMPLERS = ("ddpm", "ddim", "dpmsolver++")
VARIANCES = ("small", "large")


def betas_of(schedule: str, steps: int, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """(steps,) float64, the variance that each step adds.

    "linear": from `start` to `end`. "squaredcos_cap_v2": alpha_bar(u) = cos^2((u + 0.008)/1.008 pi/2) (Nichol and
    Dhariwal, arXiv 2102.09672), each at most 0.999. "cosine" is the same rounded to float32, as Octo's checkpoints were
    trained (arXiv 2405.12213): 1 - 0.999 then differs by 5e-5 of itself. Raises ValueError for another.
    """
    if schedule == "linear":
        return np.linspace(start, end, steps)
    if schedule not in SCHEDULES:
        raise ValueError(f"diffusion: schedule must be one of {SCHEDULES}, found {schedule!r}")
    bars = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.clip(1 - bars[1:] / bars[:-1], 0.0, 0.999)
    return betas.astype(np.float32).astype(np.float64) if schedule == "cosine" else betas


class Step(NamedTuple):
    """One step of a sampler: x <- x*state + clean*x_0 + noise*eps + before*(the x_0 before) + deviation*(fresh noise).

    t: of the state; signal, sigma: a_t and s_t.
    """

    t: int
    signal: float
    sigma: float
    state: float
    clean: float
    noise: float = 0.0
    before: float = 0.0
    deviation: float = 0.0


@dataclass(frozen=True)
class Diffusion:
    """A diffusion process and how it is undone.

    steps: T, of training. schedule, beta_start, beta_end: see `betas_of`. prediction: what the network says, "epsilon"
    (the noise), "sample" (x_0) or "v" (a eps - s x_0; Salimans and Ho, arXiv 2202.00512). sampler: one of SAMPLERS.
    clip: the estimated x_0 is kept within +-clip (0: not at all; diffusers' clip_sample). bound: the state is kept
    within +-bound after each step (0: not at all; Octo). variance: of DDPM's fresh noise, "small" (of the posterior)
    or "large" (beta; Octo). Raises ValueError for what it does not know.
    """

    steps: int = 100
    schedule: str = "squaredcos_cap_v2"
    prediction: str = "epsilon"
    sampler: str = "ddpm"
    clip: float = 1.0
    bound: float = 0.0
    variance: str = "small"
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        known = {"schedule": SCHEDULES, "prediction": PREDICTIONS, "sampler": SAMPLERS, "variance": VARIANCES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"diffusion: {name} must be one of {values}, found {getattr(self, name)!r}")
        if self.steps < 2 or self.clip < 0 or self.bound < 0:
            raise ValueError(
                f"diffusion: expected at least 2 steps, clip and bound not negative, found {self.steps}, "
                f"{self.clip}, {self.bound}"
            )

    @cached_property
    def alpha_bars(self) -> np.ndarray:
        """(T,) float64, the share of the signal's variance at each t."""
        return np.cumprod(1 - betas_of(self.schedule, self.steps, self.beta_start, self.beta_end))

    def levels(self, t: Any, x: Array) -> tuple[Any, Any]:
        """a_t and s_t: numbers for an int t; for an array (B,) arrays that broadcast against x (B, ...)."""
        if isinstance(t, int | np.integer):
            return float(np.sqrt(self.alpha_bars[t])), float(np.sqrt(1 - self.alpha_bars[t]))
        shape = (-1, *[1] * (x.ndim - 1))
        if isinstance(x, np.ndarray):
            bars = self.alpha_bars[t].reshape(shape)
            return np.sqrt(bars).astype(x.dtype), np.sqrt(1 - bars).astype(x.dtype)
        tables = np.sqrt(self.alpha_bars), np.sqrt(1 - self.alpha_bars)
        signal, sigma = (_like(table, x)[t].reshape(shape) for table in tables)
        return signal, sigma

    def noisy(self, clean: Array, noise: Array, t: Any) -> Array:
        """x_t of x_0 and eps."""
        signal, sigma = self.levels(t, clean)
        return signal * clean + sigma * noise

    def target(self, clean: Array, noise: Array, t: Any) -> Array:
        """What the network should say of `noisy(clean, noise, t)`."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        signal, sigma = self.levels(t, clean)
        return signal * noise - sigma * clean

    def clean(self, prediction: Array, x: Array, t: Any) -> Array:
        """The estimated x_0, not clipped, of what the network says of the state x."""
        if self.prediction == "sample":
            return prediction
        signal, sigma = self.levels(t, x)
        if self.prediction == "epsilon":
            return (x - sigma * prediction) / signal
        return signal * x - sigma * prediction

    def times(self, steps: int) -> np.ndarray:
        """(steps,) int64, the t that a sampler visits, falling (spaced as diffusers does by default)."""
        limit = self.steps - 1 if self.sampler == "dpmsolver++" else self.steps
        if not 1 <= steps <= limit:
            raise ValueError(f"diffusion: expected 1 to {limit} steps of {self.sampler}, found {steps}")
        if self.sampler == "dpmsolver++":
            return np.linspace(0, self.steps - 1, steps + 1).round()[:0:-1].astype(np.int64)
        return np.arange(steps)[::-1] * (self.steps // steps)

    def draws(self, steps: int) -> int:
        """How many arrays of fresh noise `sample_diffusion` takes besides the first."""
        return steps - 1 if self.sampler == "ddpm" else 0

    def plan(self, steps: int) -> list[Step]:
        """The steps of the sampler from noise to data. Raises ValueError when there are too many or none."""
        times = self.times(steps)
        bars = np.append(self.alpha_bars[times], 1.0)
        signal, sigma = np.sqrt(bars), np.sqrt(1 - bars)
        plan = []
        for k, t in enumerate(times):
            a, s, a_next, s_next = signal[k], sigma[k], signal[k + 1], sigma[k + 1]
            keep = bars[k] / bars[k + 1]
            if self.sampler == "ddpm":
                variance = (1 - keep) * ((s_next / s) ** 2 if self.variance == "small" else 1.0)
                factors = {
                    "state": math.sqrt(keep) * (s_next / s) ** 2,
                    "clean": a_next * (1 - keep) / s**2,
                    "deviation": math.sqrt(max(variance, 1e-20)) if k + 1 < steps else 0.0,
                }
            elif self.sampler == "ddim":
                factors = {"state": 0.0, "clean": a_next, "noise": s_next}
            else:
                factors = {"state": s_next / s, "clean": a_next - a * s_next / s}
                # The last step is of first order: there the half log signal-to-noise ratio grows without bound.
                if 0 < k < steps - 1:
                    last, now, then = (math.log(signal[j] / sigma[j]) for j in (k - 1, k, k + 1))
                    slope = factors["clean"] * (then - now) / (2 * (now - last))
                    factors |= {"clean": factors["clean"] + slope, "before": -slope}
            plan.append(Step(int(t), float(a), float(s), **{name: float(value) for name, value in factors.items()}))
        return plan


class DiffusionGuidance:
    """Acts on each step of the sampler; this one does nothing."""

    def clamp(self, x: Array, noise: Array, signal: float, sigma: float) -> Array:
        """Replace what is known of the state, before each step and (signal 1, sigma 0) at the end."""
        return x

    def estimate(self, denoise: Denoise, diffusion: Diffusion, x: Array, step: Step) -> tuple[Array, Array]:
        """The clean sample x_0 and the noise eps that the state x is taken to be made of.

        As in diffusers eps comes of the estimate before it is clipped.
        """
        clean = diffusion.clean(denoise(x, step.t), x, step.t)
        return limited(clean, diffusion.clip), (x - step.signal * clean) / step.sigma


class RtcDiffusionGuidance(DiffusionGuidance):
    r"""Real-Time Chunking (Black, Galliker, Levine, arXiv 2506.07339) on a diffusion's estimated clean sample.

    The state x_t = a x_0 + s eps, divided by a + s, is the state z = tau x_0 + (1 - tau) eps of a rectified flow at
    tau = a/(a + s). Its velocity is v = (x_0 - z)/(1 - tau), with the network's estimate of x_0, so the flow's end
    z + (1 - tau) v is that estimate. The paper adds to v

        min(beta, (tau^2 + (1 - tau)^2)/(tau (1 - tau))) (d x_0/d z)^T [W * (Y - x_0)].

    With d x_0/d z = (a + s) d x_0/d x_t, (1 - tau)(a + s) = s and a^2 + s^2 = 1 the end moves by

        s min(beta, 1/(a s)) (d x_0/d x_t)^T [W * (Y - x_0)],

    which without the limit beta is pseudoinverse guidance of the score (Song et al., PiGDM, ICLR 2023). The sampler
    then goes on with the moved estimate, and with the eps that belongs to it.

    The estimate is kept within the diffusion's clip (or bound) before it is compared with the target and after it
    was moved, since the estimate of an epsilon network is amplified by 1/a at the noisy end. The Jacobian is that of
    the network's own estimate, not of the clip: a gripper at its limit must feel the pull.

    target: (1, L, W). weights: (L,), W. beta: largest guidance weight.
    """

    def __init__(self, target: Any, weights: Any, beta: float = 5.0):
        self.target = target
        self.weights = weights
        self.beta = beta

    def estimate(self, denoise: Denoise, diffusion: Diffusion, x: Array, step: Step) -> tuple[Array, Array]:
        prediction, pull = self.pull(denoise, diffusion, x, step.t)
        free = diffusion.clean(prediction, x, step.t)
        limit = diffusion.clip or diffusion.bound
        clean = limited(free, limit)
        weight = step.sigma * min(self.beta, 1 / (step.signal * step.sigma))
        moved = limited(clean + weight * pull, limit)
        noise = (x - step.signal * (free + moved - clean)) / step.sigma
        return moved, noise

    def pull(self, denoise: Denoise, diffusion: Diffusion, x: Array, t: Any) -> tuple[Array, Array]:
        """The network's prediction and (d x_0/d x)^T [W * (Y - x_0)], both shaped as x. Torch tensors only."""
        import torch

        target, weights = _like(self.target, x), _like(self.weights, x)[..., None]

        def end(x: Array) -> tuple[Array, Array]:
            prediction = denoise(x, t)
            return diffusion.clean(prediction, x, t), prediction

        clean, pullback, prediction = torch.func.vjp(end, x, has_aux=True)
        error = weights * (target - limited(clean, diffusion.clip or diffusion.bound))
        return prediction, pullback(error)[0]


class PrefixDiffusionGuidance(DiffusionGuidance):
    """Inpainting: before each step the known actions are what the process would have made of them with the sampler's
    first noise, at the end they are themselves (as Diffuser, arXiv 2205.09991, conditions). Needs no training.

    prefix: (1, L, W); known: (1, L) bool.
    """

    def __init__(self, prefix: Any, known: Any):
        self.prefix = prefix
        self.known = known

    def clamp(self, x: Array, noise: Array, signal: float, sigma: float) -> Array:
        known = _like(self.known, x)[..., None]
        return known * (signal * _like(self.prefix, x) + sigma * noise) + (1 - known) * x


def diffusion_guidance(prefix: ChunkPrefix | None, past: int, length: int) -> DiffusionGuidance | None:
    """The sampler's guidance for what a request left.

    past: actions of the network's chunk before the observation's time; length: all of them. Those that the prefix says
    nothing about are not guided.
    """
    if prefix is None:
        return None
    rest = length - past - prefix.target.shape[1]
    target = np.pad(prefix.target, ((0, 0), (past, rest), (0, 0)), mode="edge")
    if prefix.mode == "prefix":
        return PrefixDiffusionGuidance(target, np.pad(prefix.known, ((0, 0), (past, rest))))
    return RtcDiffusionGuidance(target, np.pad(prefix.weights, (past, rest)), prefix.beta)


def sample_diffusion(
    denoise: Denoise,
    diffusion: Diffusion,
    noise: Array,
    draws: Array | None = None,
    steps: int | None = None,
    guidance: DiffusionGuidance | None = None,
) -> Array:
    """A sample (B, L, W) from noise (B, L, W).

    draws: (diffusion.draws(steps), B, L, W) fresh noise of a sampler that wants it. steps: of the sampler, None: as
    many as in training. Raises ValueError when there are too many steps or too few draws.
    """
    steps = steps or diffusion.steps
    guidance = guidance or DiffusionGuidance()
    wanted = diffusion.draws(steps)
    if wanted > (0 if draws is None else len(draws)):
        raise ValueError(
            f"sample_diffusion: {diffusion.sampler} in {steps} steps: expected {wanted} draws, found "
            f"{0 if draws is None else len(draws)}"
        )
    x, before = noise, noise
    for k, step in enumerate(diffusion.plan(steps)):
        x = guidance.clamp(x, noise, step.signal, step.sigma)
        clean, eps = guidance.estimate(denoise, diffusion, x, step)
        x = step.state * x + step.clean * clean
        if step.noise:
            x = x + step.noise * eps
        if step.before:
            x = x + step.before * before
        if step.deviation:
            x = x + step.deviation * draws[k]
        x, before = limited(x, diffusion.bound), clean
    return guidance.clamp(x, noise, 1.0, 0.0)


def limited(x: Array, limit: float) -> Array:
    """x within +-limit; as it is for a limit of 0."""
    return x.clip(-limit, limit) if limit else x
