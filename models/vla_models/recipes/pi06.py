"""Recipe "pi06": pi0.6 and, with the advantage in its prompt, pi*0.6 (arXiv 2511.14759).

The network is pi0.5's with a larger backbone, Gemma 3 4B, and an expert of 860 M parameters; what differs:

    backbone   Gemma 3: SigLIP at 448 pixels, 4 x 4 patches of 14 pixels pooled 2 x 2 to 256 tokens a camera; norms
               around attention and MLP, normalised queries and keys, five local rotary bases to a global one
    prompt     what the data was like may be said as text ("Speed: fast"), and whether the actions were better than
               what the policy did before: "Advantage: positive" or "negative", left out of 30 % of the samples
    gradients  those of the flow loss stop at the backbone (knowledge insulation, arXiv 2505.23705), which learns from
               text alone
    guidance   the velocity with the advantage may be weighed against that without (classifier-free guidance)

The advantage comes from the value network of `vla_models.parts.value`. Physical Intelligence published no weights, and
not the expert's widths: pi0.5's, at Gemma 3's depth, heads and size of a head, come to 859 M.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla_models.parts.mixture import ExpertConfig, MixtureConfig
from vla_models.policy import ChunkPrefix, ModelInputs, PolicySpec
from vla_models.preprocess import Processor
from vla_models.recipes.pi0 import CAMERAS, TINY
from vla_models.recipes.pi05 import Pi05Config, Pi05Network, Pi05Policy
from vla_models.sampling import sample_flow
from vla_models.torch_policy import Inputs, Preset, guidance_of, velocity_of

#: Rotary base and stretch of each layer of Gemma 3 4B (arXiv 2503.19786): five local ones to a global one.
GEMMA3_ROPE = (*((10_000.0, 1.0),) * 5, (1_000_000.0, 8.0))
#: Part of the samples whose prompt says nothing of the advantage.
DROPPED = 0.3


@dataclass(frozen=True)
class Pi06Config(Pi05Config):
    """Gemma 3 4B and its expert; see Pi05Config.

    insulated: the flow loss does not reach the backbone. weight: of guidance by the advantage, 1: none; the paper takes
    1.5 to 2.5.
    """

    pool: int = 2
    width: int = 2560
    mlp: int = 10240
    layers: int = 34
    kv_heads: int = 4
    vocabulary: int = 262208
    insulated: bool = True
    weight: float = 1.0

    def mixture(self, *experts: ExpertConfig) -> MixtureConfig:
        language = ExpertConfig(self.width, self.mlp, sandwich=True)
        return MixtureConfig((language, *experts), self.layers, self.heads, self.kv_heads, self.head_dim,
                             rope=GEMMA3_ROPE, qk_norm=True)  # fmt: skip


class Pi06Network(Pi05Network):
    """The network of the recipe "pi06"."""

    def __init__(self, spec: PolicySpec, config: Pi06Config):
        super().__init__(spec, config)
        if config.insulated:
            self.frozen = ("embedder.", "mixture.experts.0.")

    def flow_loss(self, context: tuple[Tensor, Tensor], actions: Tensor, noise: Tensor, tau: Tensor,
                  keep: Tensor | None = None) -> Tensor:  # fmt: skip
        if self.config.insulated:
            context = (context[0].detach(), context[1])
        return super().flow_loss(context, actions, noise, tau, keep)


class Weighed:
    """A network whose velocity with one prompt is weighed against that with another one; both are rows of a batch."""

    def __init__(self, network: Pi06Network, weight: float):
        self.network, self.weight = network, weight

    def encode(self, inputs: Inputs, plain: Tensor) -> tuple[Tensor, Tensor]:
        """The context of inputs with their own tokens, then of the same with the tokens `plain`."""
        images = tuple(torch.cat([image, image]) for image in inputs.images)
        others = (torch.cat([value, value]) for value in inputs[2:])
        return self.network.encode(Inputs(images, torch.cat([inputs.tokens, plain]), *others))

    def velocity(self, context: tuple[Tensor, Tensor], x: Tensor, tau: Tensor) -> Tensor:
        told, plain = self.network.velocity(context, torch.cat([x, x]), torch.cat([tau, tau])).chunk(2)
        return plain + self.weight * (told - plain)


class Pi06Policy(Pi05Policy):
    """The recipe "pi06" on torch. In use the prompt asks for good actions: "Advantage: positive"."""

    Config, Network = Pi06Config, Pi06Network
    parameters = 5.16e9  # Gemma 3 4B's 4.30e9 and 860e6
    published = ()
    contract = dict(Pi05Policy.contract) | {"prompt": "Task: {task}, State: {state};\nAdvantage: positive\nAction: "}
    presets = {
        "paper": Preset(
            Pi06Config(),
            {"cameras": dict.fromkeys((*CAMERAS, "other"), (448, 448)), "optional": (*CAMERAS[1:], "other"),
             "horizon": 50, "period": 0.02},
        ),
        "tiny": Preset(
            Pi06Config(**TINY | {"kv_heads": 2}, pool=2, end=2, insulated=False),
            {"cameras": dict.fromkeys(CAMERAS[:2], (56, 56)), "optional": CAMERAS[1:2], "horizon": 8, "steps": 5,
             "prefix_limit": 4, "context": 128},
        ),
    }  # fmt: skip

    @property
    def plain_prompt(self) -> str:
        return "" if self.config.weight == 1 else make_prompt(None)

    def conditioned(self, advantage: bool | None, facts: Mapping[str, str] | None = None) -> Processor:
        """Prepares training samples whose prompt states the advantage (None: nothing of it) and `facts` about them."""
        return self.reader(make_prompt(advantage, facts))

    def weighed(self) -> Weighed:
        """The network that guidance by the advantage makes of this one."""
        return Weighed(self.network, self.config.weight)

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, prefix: ChunkPrefix | None, timings: dict[str, float]
    ) -> np.ndarray:
        if self.plain is None:
            return super().run(inputs, noise, prefix, timings)
        start = time.perf_counter()
        network = self.weighed()
        with torch.no_grad():
            context = network.encode(self.tensors(inputs), self.tensors(self.plain).tokens)
            encoded = time.perf_counter()
            noisy = torch.from_numpy(noise).to(self.device)
            velocity = velocity_of(network, context)
            sample = sample_flow(velocity, noisy, self.steps, guidance_of(prefix), self.spec.shift)
        actions = sample.float().cpu().numpy()
        timings["encode"] = encoded - start
        timings["sample"] = time.perf_counter() - encoded
        return actions


def make_prompt(advantage: bool | None, facts: Mapping[str, str] | None = None) -> str:
    """A prompt as PolicySpec.prompt, with `facts` ({"Speed": "fast"}) and the advantage, None: nothing of it."""
    lines = ["Task: {task}, State: {state};", *(f"{name}: {value}" for name, value in (facts or {}).items())]
    if advantage is not None:
        lines.append(f"Advantage: {'positive' if advantage else 'negative'}")
    braced = [line.replace("{", "{{").replace("}", "}}") for line in lines[1:]]
    return "\n".join([lines[0], *braced, "Action: "])


def drop_labels(labels: Sequence[bool], generator: torch.Generator, share: float = DROPPED) -> list[bool | None]:
    """Labels of which a part `share` is left out, as the prompts of training want them."""
    drawn = torch.rand(len(labels), generator=generator).tolist()
    return [None if chance < share else bool(label) for label, chance in zip(labels, drawn, strict=True)]
