"""A window of observations: which of its steps are real, at the start of an episode too."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_models.torch_policy import Inputs


def with_window(inputs: Inputs) -> Inputs:
    """The same inputs with a time axis, of length 1 where the policy looks at one observation."""
    if inputs.state.ndim == 3:
        return inputs
    return inputs._replace(images=tuple(image[:, None] for image in inputs.images), state=inputs.state[:, None])


def real_steps(inputs: Inputs) -> Tensor:
    """(B, T) bool of inputs with a time axis: false for the steps that only fill up the window.

    What is missing before an episode's start repeats its first observation (vla_models.preprocess). So the first steps
    of a window fill it as long as each is, in all images and in the state, to the last bit the one after it: the noise
    of a camera makes no two real pictures alike.
    """
    fill = torch.zeros_like(inputs.state[:, 0, 0], dtype=torch.bool)
    real = []
    for step in range(inputs.state.shape[1] - 1):
        same = (inputs.state[:, step] == inputs.state[:, step + 1]).all(-1)
        for image in inputs.images:
            same = same & (image[:, step] == image[:, step + 1]).flatten(1).all(-1)
        fill = same & fill if step else same
        real.append(~fill)
    return torch.stack([*real, torch.ones_like(fill)], 1)
