"""The loss of flow matching as pi0 and its relatives take it: noise, flow times, clean prefixes, masked means.

Flow time tau runs from 0 (noise) to 1 (data), x = noise + tau (data - noise), and the velocity to learn is data - noise
(Lipman et al., arXiv 2210.02747). pi0 writes t = 1 - tau. All random numbers come from a generator of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vla_models.parts.attention import sinusoids
from vla_models.policy import PolicyError, PolicySpec
from vla_models.torch_policy import Batch


class FlowMatching:
    """How a network of a FlowPolicy (see there for `encode` and `velocity`) learns.

    The network has `config.prefix_share`, `prefix_limit`, and `width`, the numbers that an action has inside it.
    """

    def flow_loss(
        self, context: Any, actions: Tensor, noise: Tensor, tau: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Flow-matching loss for given noise and flow times; see `matching_loss`."""
        return matching_loss(self.velocity, context, actions, noise, tau, keep)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Flow-matching loss over the actions inside the episode that are not given as a prefix."""
        draw = draw_flow(batch, self.width, generator, self.prefix_limit, self.config.prefix_share)
        return {"loss": self.flow_loss(self.encode(batch.inputs), batch.actions, *draw)}

    def timed(self, actions: Tensor, time: Tensor) -> Tensor:
        """MLP([action, time]): tokens (B, H, n) of projected actions (B, H, n) and features of their flow times
        (B, H or 1, n), with the linear layers `time_in` and `time_out`."""
        both = torch.cat([actions, time.expand_as(actions)], -1)
        return self.time_out(nn.functional.silu(self.time_in(both)))


def time_features(tau: Tensor, width: int) -> Tensor:
    """Flow times (...) -> (..., width): sines and cosines with periods of 4 ms to 4 s, as if pi0's 1 - tau were s."""
    return sinusoids((1 - tau) / 4e-3, width, 1e3)


def check_numbers(spec: PolicySpec, state: int, action: int) -> None:
    """Raises PolicyError for a robot with more numbers of state or of action than the network has."""
    if spec.state_dim > state or spec.action_dim > action:
        raise PolicyError(
            f"policy {spec.name}: expected at most {state} numbers of state and {action} of action, found "
            f"{spec.state_dim} and {spec.action_dim}"
        )


class FlowDraw(NamedTuple):
    """What is drawn for a batch.

    noise (B, H, W); tau (B, H), each action's own flow time; keep (B, H) bool, the actions that count in the loss:
    inside the episode, and not given as a prefix.
    """

    noise: Tensor
    tau: Tensor
    keep: Tensor


def draw_flow(
    batch: Batch,
    width: int,
    generator: torch.Generator,
    prefix_limit: int = 0,
    prefix_share: float = 0.5,
    times: Callable[[int, torch.Generator], Tensor] | None = None,
) -> FlowDraw:
    """Noise, flow times and prefixes for a batch whose actions are padded to `width` numbers.

    prefix_limit, prefix_share: see `draw_prefix`; 0: none. times: from a count and a generator to (B, 1) flow times;
    None: `beta_times`.
    """
    count, horizon = batch.padded.shape
    noise = torch.randn(count, horizon, width, generator=generator).to(batch.actions)
    tau = (times or beta_times)(count, generator).expand(count, horizon)
    known = torch.zeros(count, horizon, dtype=torch.bool)
    if prefix_limit:
        known = draw_prefix(count, horizon, prefix_limit, prefix_share, generator)
    tau = torch.where(known, 1.0, tau).to(batch.actions)
    return FlowDraw(noise, tau, ~known.to(batch.padded.device) & ~batch.padded)


def beta_times(
    count: int, generator: torch.Generator, alpha: float = 1.5, scale: float = 0.999, offset: float = 0.001
) -> Tensor:
    """(count, 1) flow times with more weight on the noisy end: 1 - tau = Beta(alpha, 1) * scale + offset.

    Appendix B of pi0 (arXiv 2410.24164), alpha 1.5; by the inverse of the distribution, u^(1/alpha).
    """
    return 1 - (torch.rand(count, 1, generator=generator) ** (1 / alpha) * scale + offset)


def draw_prefix(count: int, horizon: int, limit: int, share: float, generator: torch.Generator) -> Tensor:
    """(count, horizon) bool: actions given clean, with flow time 1 (training-time RTC, arXiv 2512.05964).

    A part `share` of the samples gets a prefix of 0 to `limit` actions, all lengths alike.
    """
    length = torch.randint(0, limit + 1, (count, 1), generator=generator)
    length = length * (torch.rand(count, 1, generator=generator) < share)
    return torch.arange(horizon) < length


def matching_loss(
    velocity: Callable[[Any, Tensor, Tensor], Tensor],
    context: Any,
    actions: Tensor,
    noise: Tensor,
    tau: Tensor,
    keep: Tensor | None = None,
) -> Tensor:
    """Mean square of velocity - (actions - noise), over actions that count and numbers of the action space.

    velocity, context: of a network (see torch_policy.FlowPolicy). actions (B, H, dim): filled up with zeros to the
    width of `noise` (B, H, W); numbers beyond dim are integrated but do not count. tau: (B, 1) or (B, H). keep: (B, H).
    """
    wide = pad_last(actions, noise.shape[-1])
    x = noise + tau.unsqueeze(-1) * (wide - noise)
    error = (velocity(context, x, tau) - (wide - noise))[..., : actions.shape[-1]].float().square()
    return masked_mean(error, torch.ones_like(error[..., 0], dtype=torch.bool) if keep is None else keep)


def masked_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean of values (B, H, D) over the steps in `keep` (B, H); 0 when there is none."""
    weights = keep.to(values).unsqueeze(-1)
    return (values * weights).sum() / (weights.sum() * values.shape[-1]).clamp(min=1)


def pad_last(values: Tensor, width: int) -> Tensor:
    """(..., D) -> (..., width), filled up with zeros."""
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]))
