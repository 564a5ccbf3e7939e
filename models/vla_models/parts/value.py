"""The value network of pi*0.6 (arXiv 2511.14759): how long a task still takes, and what that says of an action.

A small vision-language model (SigLIP and Gemma 3 270M) gives the distribution of the normalised return over 201 bins
from -1 to 0. A step costs 1 until the task is done; a failed episode costs much more at its end. Returns are divided by
the longest episode of the task, so -1 is "as long as it may take, or it fails" and 0 "done".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vla_models.parts.mixture import ExpertConfig, Mixture, MixtureConfig, block_mask
from vla_models.parts.paligemma import Embedder, PaliGemmaConfig
from vla_models.policy import PolicySpec
from vla_models.torch_policy import Inputs

#: Steps ahead over which rewards are summed before the value network takes over.
LOOKAHEAD = 50


@dataclass(frozen=True)
class ValueConfig(PaliGemmaConfig):
    """SigLIP-so400m and Gemma 3 270M; see PaliGemmaConfig. bins: of the return, from -1 to 0."""

    pool: int = 2
    width: int = 640
    mlp: int = 2048
    layers: int = 18
    heads: int = 4
    kv_heads: int = 1
    vocabulary: int = 262144
    bins: int = 201

    def mixture(self, *experts: ExpertConfig) -> MixtureConfig:
        rope = (*((10_000.0, 1.0),) * 5, (1_000_000.0, 1.0))
        language = ExpertConfig(self.width, self.mlp, sandwich=True)
        return MixtureConfig((language, *experts), self.layers, self.heads, self.kv_heads, self.head_dim, rope=rope,
                             qk_norm=True)  # fmt: skip


class ValueNetwork(nn.Module):
    """Images and instruction -> distribution of the return."""

    def __init__(self, spec: PolicySpec, config: ValueConfig):
        super().__init__()
        self.embedder = Embedder(spec, config)
        self.mixture = Mixture(config.mixture())
        self.head = nn.Linear(config.width, config.bins)
        self.register_buffer("centres", torch.linspace(-1, 0, config.bins), persistent=False)

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits (B, bins)."""
        tokens, valid = self.embedder.prefix(inputs)
        blocks = torch.zeros(tokens.shape[1], dtype=torch.long, device=tokens.device)
        hidden = self.mixture([tokens], valid.long().cumsum(1) - 1, block_mask(blocks, blocks, valid))[0]
        weights = valid.to(hidden).unsqueeze(-1)
        return self.head((hidden * weights).sum(1) / weights.sum(1))

    def value(self, inputs: Inputs) -> Tensor:
        """(B,): the mean of the distribution, from -1 to 0."""
        return torch.softmax(self(inputs), -1) @ self.centres

    def loss(self, inputs: Inputs, returns: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the bin of each normalised return (B,)."""
        return {"loss": nn.functional.cross_entropy(self(inputs), discretise(returns, len(self.centres)))}


def discretise(returns: Tensor, bins: int = 201) -> Tensor:
    """The nearest of `bins` values from -1 to 0; what lies outside counts as the end."""
    return ((returns.clamp(-1, 0) + 1) * (bins - 1)).round().long()


def normalised_rewards(steps: int, success: bool, longest: int, penalty: float | None = None) -> np.ndarray:
    """(steps,) rewards of one episode: -1 a step, at the last one 0 or, on failure, -penalty; all over `longest`.

    longest: steps of the longest episode of the task. penalty: None: `longest`, so that failures end up at -1.
    """
    rewards = np.full(steps, -1.0)
    rewards[-1] = 0.0 if success else -(longest if penalty is None else penalty)
    return rewards / longest


def returns_of(rewards: np.ndarray) -> np.ndarray:
    """(steps,) sums of the rewards from each step on, at least -1."""
    return np.maximum(np.cumsum(rewards[::-1])[::-1], -1.0)


def advantages(rewards: np.ndarray, values: np.ndarray, lookahead: int = LOOKAHEAD) -> np.ndarray:
    """(steps,): rewards of the next `lookahead` steps + V(then) - V(now); behind the end there is nothing to win."""
    steps = len(rewards)
    total = np.concatenate([[0.0], np.cumsum(rewards)])
    then = np.minimum(np.arange(steps) + lookahead, steps)
    return total[then] - total[:-1] + np.append(values, 0.0)[then] - values


def label_advantages(advantage: np.ndarray, corrected: np.ndarray, share: float = 0.3) -> np.ndarray:
    """(N,) bool over all steps of a task: the best `share` of the advantages, and every human correction."""
    return (advantage > np.quantile(advantage, 1 - share)) | corrected
