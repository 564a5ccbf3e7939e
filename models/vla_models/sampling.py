"""Flow sampling and its guidance (real-time chunking), on torch tensors and on NumPy arrays alike.

Convention: flow time tau = 0 is noise, tau = 1 is data, x <- x + v/n. Real-Time Chunking: Black, Galliker,
Levine, arXiv 2506.07339, eqs. 2 to 4. Prefix conditioning (training-time RTC): arXiv 2512.05964. Importing
this module needs no torch: the same sampler drives torch networks and exported graphs. Only
`RtcGuidance.pull` differentiates, so only it needs torch; `torch.fx.experimental.proxy_tensor.make_fx` traces
it, the vector-Jacobian product included, and the ONNX runtime puts the exported graph in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

#: A torch tensor or a NumPy array; results are of the kind of the sample.
Array = Any
#: velocity(x, tau) -> v, shaped as x; tau is a float, or a tensor of each action's own time (..., H).
Velocity = Callable[[Array, Any], Array]


class Guidance:
    """Acts on each step of the sampler; this one does nothing."""

    def clamp(self, x: Array) -> Array:
        """Replace what is known of the sample, before each step and at the end."""
        return x

    def velocity(self, velocity: Velocity, x: Array, tau: float) -> Array:
        """The velocity to integrate at (x, tau)."""
        return velocity(x, tau)


class RtcGuidance(Guidance):
    """Pull the sample's estimated end x1 = x + (1 - tau) v towards `target` where `weights` say so.

    target: like the sample, (..., H, D) or (H,). weights: (H,) soft mask W, or any shape that broadcasts
    against the sample. beta: largest guidance weight. mode: "vjp" multiplies the error with the true Jacobian
    d x1/d x (paper); "identity" takes the Jacobian for the identity, which needs no backward pass. Raises
    ValueError for another mode.
    """

    def __init__(self, target: Any, weights: Any, beta: float = 5.0, mode: str = "vjp"):
        if mode not in ("vjp", "identity"):
            raise ValueError(f"RtcGuidance: mode must be 'vjp' or 'identity', found {mode!r}")
        self.target = target
        self.weights = weights
        self.beta = beta
        self.mode = mode

    def velocity(self, velocity: Velocity, x: Array, tau: float) -> Array:
        v, pull = self.pull(velocity, x, tau)
        return v + guidance_weight(tau, self.beta) * pull

    def pull(self, velocity: Velocity, x: Array, tau: Any) -> tuple[Array, Array]:
        """The velocity at (x, tau) and the guidance g = J^T [W * (Y - x1)], both shaped as x.

        tau: a float or a tensor that broadcasts against x. Mode "vjp" works on torch tensors only.
        """
        target, weights = _like(self.target, x), _like(self.weights, x)
        if x.ndim > 1 and weights.ndim == 1 and weights.shape[0] == x.shape[-2]:
            weights = weights[..., None]

        def end(x: Array) -> tuple[Array, Array]:
            v = velocity(x, tau)
            return x + (1 - tau) * v, v

        if self.mode == "identity":
            x1, v = end(x)
            return v, weights * (target - x1)
        import torch

        x1, pullback, v = torch.func.vjp(end, x, has_aux=True)
        return v, pullback(weights * (target - x1))[0]


class PrefixGuidance(Guidance):
    """Clamp the first actions to a known prefix and tell the network so by their flow time (tau = 1: data).

    prefix: (..., H, D); known: (..., H) bool, true where the prefix holds. Only for networks trained with it:
    their velocity must take a tensor of each action's own flow time.
    """

    def __init__(self, prefix: Any, known: Any):
        self.prefix = prefix
        self.known = known

    def clamp(self, x: Array) -> Array:
        known = _like(self.known, x)[..., None]
        return known * _like(self.prefix, x) + (1 - known) * x

    def velocity(self, velocity: Velocity, x: Array, tau: float) -> Array:
        known = _like(self.known, x) + 0 * x[..., 0]
        return velocity(x, known + (1 - known) * tau)


def guidance_weight(tau: float, beta: float) -> float:
    """min(beta, (tau^2 + (1 - tau)^2)/(tau (1 - tau))); beta at tau = 0."""
    return min(beta, (tau**2 + (1 - tau) ** 2) / (tau * (1 - tau))) if tau > 0 else beta


def flow_times(steps: int, shift: float = 1.0) -> list[float]:
    """The steps + 1 flow times from 0 to 1 between which a sampler steps.

    shift: 1 spaces them evenly; more takes smaller steps near the noise: tau becomes tau / (tau + shift (1 - tau))
    (Esser et al., arXiv 2403.03206, section 5.3.2).
    """
    even = [step / steps for step in range(steps + 1)]
    return [tau / (tau + shift * (1 - tau)) for tau in even]


def sample_flow(
    velocity: Velocity, noise: Array, steps: int, guidance: Guidance | None = None, shift: float = 1.0
) -> Array:
    """Integrate dx/dtau = velocity(x, tau) from `noise` at tau = 0 to 1 with `steps` Euler steps.

    noise: (..., H, D), or (H,). shift: of the flow times. Returns the sample, shaped as the noise. Raises ValueError
    when steps < 1.
    """
    if steps < 1:
        raise ValueError(f"sample_flow: steps must be at least 1, found {steps}")
    guidance = guidance or Guidance()
    x = noise
    times = flow_times(steps, shift)
    for now, then in zip(times, times[1:], strict=False):
        x = guidance.clamp(x)
        x = x + guidance.velocity(velocity, x, now) * (then - now)
    return guidance.clamp(x)


def _like(value: Any, x: Array) -> Array:
    """`value` as an array of the kind, type and device of `x`."""
    if isinstance(x, np.ndarray):
        return np.asarray(value, x.dtype)
    import torch

    return torch.as_tensor(value).to(x)
