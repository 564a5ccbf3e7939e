"""Flow sampling and its guidance (real-time chunking), on torch tensors.

Convention: flow time tau = 0 is noise, tau = 1 is data, x <- x + v/n. Real-Time Chunking: Black, Galliker, Levine,
arXiv 2506.07339, eqs. 2 to 4. Prefix conditioning (training-time RTC): arXiv 2512.05964. Everything is free of
data-dependent control flow, so that `torch.fx.experimental.proxy_tensor.make_fx` traces whole samplers, the
vector-Jacobian product included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: velocity(x, tau) -> v, shaped as x; tau is a float, or a tensor of each action's own time (..., H).
Velocity = Callable[[Tensor, Any], Tensor]


class Guidance:
    """Acts on each step of the sampler; this one does nothing."""

    def clamp(self, x: Tensor) -> Tensor:
        """Replace what is known of the sample, before each step and at the end."""
        return x

    def velocity(self, velocity: Velocity, x: Tensor, tau: float) -> Tensor:
        """The velocity to integrate at (x, tau)."""
        return velocity(x, tau)


class RtcGuidance(Guidance):
    """Pull the sample's estimated end x1 = x + (1 - tau) v towards `target` where `weights` say so.

    target: like the sample, (..., H, D) or (H,). weights: (H,) soft mask W, or any shape that broadcasts against the
    sample. beta: largest guidance weight. mode: "vjp" multiplies the error with the true Jacobian d x1/d x (paper);
    "identity" takes the Jacobian for the identity, which needs no backward pass.
    Raises ValueError for another mode.
    """

    def __init__(self, target: Any, weights: Any, beta: float = 5.0, mode: str = "vjp"):
        if mode not in ("vjp", "identity"):
            raise ValueError(f"RtcGuidance: mode must be 'vjp' or 'identity', found {mode!r}")
        self.target = torch.as_tensor(target)
        self.weights = torch.as_tensor(weights)
        self.beta = beta
        self.mode = mode

    def velocity(self, velocity: Velocity, x: Tensor, tau: float) -> Tensor:
        target = self.target.to(x)
        weights = self.weights.to(x)
        if x.dim() > 1 and weights.dim() == 1 and weights.shape[0] == x.shape[-2]:
            weights = weights.unsqueeze(-1)

        def end(x: Tensor) -> tuple[Tensor, Tensor]:
            v = velocity(x, tau)
            return x + (1 - tau) * v, v

        if self.mode == "identity":
            x1, v = end(x)
            pull = weights * (target - x1)
        else:
            x1, pullback, v = torch.func.vjp(end, x, has_aux=True)
            (pull,) = pullback(weights * (target - x1))
        return v + guidance_weight(tau, self.beta) * pull


class PrefixGuidance(Guidance):
    """Clamp the first actions to a known prefix and tell the network so by their flow time (tau = 1: data).

    prefix: (..., H, D); known: (..., H) bool, true where the prefix holds. Only for networks trained with it: their
    velocity must take a tensor of each action's own flow time.
    """

    def __init__(self, prefix: Any, known: Any):
        self.prefix = torch.as_tensor(prefix)
        self.known = torch.as_tensor(known)

    def clamp(self, x: Tensor) -> Tensor:
        return torch.where(self.known.unsqueeze(-1), self.prefix.to(x), x)

    def velocity(self, velocity: Velocity, x: Tensor, tau: float) -> Tensor:
        times = torch.where(self.known, 1.0, tau).to(x)
        return velocity(x, times.expand(x.shape[:-1]))


def guidance_weight(tau: float, beta: Any) -> Any:
    """min(beta, (tau^2 + (1 - tau)^2)/(tau (1 - tau))); beta at tau = 0. `beta` may be a float or a 0-d tensor."""
    if tau <= 0:
        return beta
    weight = (tau**2 + (1 - tau) ** 2) / (tau * (1 - tau))
    return torch.clamp(beta, max=weight) if isinstance(beta, Tensor) else min(beta, weight)


def sample_flow(velocity: Velocity, noise: Tensor, steps: int, guidance: Guidance | None = None) -> Tensor:
    """Integrate dx/dtau = velocity(x, tau) from `noise` at tau = 0 to 1 with `steps` Euler steps.

    noise: (..., H, D), or (H,). Returns the sample, shaped as the noise. Raises ValueError when steps < 1.
    """
    if steps < 1:
        raise ValueError(f"sample_flow: steps must be at least 1, found {steps}")
    guidance = guidance or Guidance()
    x = noise
    for step in range(steps):
        x = guidance.clamp(x)
        x = x + guidance.velocity(velocity, x, step / steps) / steps
    return guidance.clamp(x)
