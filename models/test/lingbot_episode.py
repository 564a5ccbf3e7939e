"""An episode of a tiny LingBot-VA; needs no torch."""

import numpy as np
from vla_models.policy import ArmState, InferenceRequest, PolicyObservation


def drive(policy, asked):
    """The targets of chunks asked for at the given ticks of an episode of random pictures."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (asked[-1] + 1, 32, 32, 3), np.uint8)
    state = {"arm": ArmState(np.zeros(7), np.array([0.4, 0, 0.3, 1.0, 0, 0, 0]), 0.5)}
    said, last = [], 0
    for tick in asked:
        seen = [
            PolicyObservation({"scene": pictures[k]}, state, "pick", 5.0 + k * policy.spec.period)
            for k in range(last, tick + 1)
        ]
        for observation in seen[:-1]:
            policy.observe(observation)
        said.append(policy.infer(seen[-1], InferenceRequest(seed=tick)).targets)
        last = tick
    return said
