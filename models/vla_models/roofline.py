"""What one chunk of actions asks of a machine, and the least time it can take: the roofline model.

`count(policy)` runs the very network of a policy, best built on the device "meta" where it needs no memory, and gives
its stages: what is computed once for a chunk (an encoder) and what is repeated (a denoising step, a token). For each
call of a stage it counts

    flops        of matrix products, convolutions and attention (torch.utils.flop_counter; a product and a sum are two)
    weights      numbers of the parameters that are read, each once a call however often it is used; of an embedding
                 only its rows
    passed       numbers that come from another stage and go to one: images, keys and values, noisy actions
    activations  numbers that go in and out of the counted operators inside a call: what code moves that fuses all else
                 and keeps nothing between two of them in a cache

The floor of a stage is calls * max(flops / peak, bytes / bandwidth) with the bytes of weights and of what is passed:
caches of tens of megabytes hold the activations of one sample, so they are told apart and are not part of the floor.
Stages follow each other, so their floors add up (Williams et al., "Roofline", CACM 52(4), 2009). For pi0 (3 cameras, 10
steps, chunks of 50) in BF16 that is the encoder at the peak of the arithmetic, 3.8e12 flops, and ten times the expert
at the full bandwidth, 0.64 GB each: 3.86 + 1.34 = 5.2 ms on an H200.

What depends on the instruction alone is the stage "text", which is needed once an instruction: its `once` is true and
`floor` leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vla_models.denoising_policy import DenoisingPolicy, denoise_of
from vla_models.parts.key_frames import KeyFramePolicy
from vla_models.policy import PolicyError
from vla_models.recipes.rth import RthPolicy
from vla_models.token_policy import FastPolicy, TokenPolicy
from vla_models.torch_policy import FlowPolicy, Inputs, OnePassPolicy, TorchPolicy, velocity_of

#: FAST tokens of a second of two arms at 50 Hz (14 numbers), the most of the tasks in the FAST paper (arXiv
#: 2501.09747, table 1); an answer's length depends on what it says.
FAST_TOKENS = 53
#: Bytes of a number.
WIDTHS = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Gpu:
    """A graphics processor as its vendor states it. bf16, fp32: peaks without sparsity, flop/s (fp32 without tensor
    cores: TF32 is another type). bandwidth: of its memory, byte/s."""

    bf16: float
    fp32: float
    bandwidth: float


GPUS = {
    # NVIDIA H200 Tensor Core GPU, datasheet, SXM: 1979 TFLOPS BF16 with sparsity, 67 FP32, 4.8 TB/s.
    "H200": Gpu(989.5e12, 67e12, 4.8e12),
    # NVIDIA H100 Tensor Core GPU, datasheet, SXM: the same arithmetic, 3.35 TB/s.
    "H100 SXM": Gpu(989.5e12, 67e12, 3.35e12),
    # NVIDIA A100 Tensor Core GPU, datasheet, 80 GB SXM: 312 TFLOPS BF16, 19.5 FP32, 2039 GB/s.
    "A100 80GB": Gpu(312e12, 19.5e12, 2.039e12),
    # NVIDIA L40S, datasheet: 362.05 TFLOPS BF16 (733 with sparsity), 91.6 FP32, 864 GB/s.
    "L40S": Gpu(362.05e12, 91.6e12, 864e9),
    # NVIDIA Ada GPU architecture, whitepaper, table 2: 165.2 TFLOPS BF16 with FP32 sums, 82.6 FP32, 1008 GB/s.
    "RTX 4090": Gpu(165.2e12, 82.6e12, 1008e9),
    # NVIDIA Jetson AGX Orin Series, technical brief, 64 GB: GPU 170 TOPS INT8 with sparsity, hence 42.5 TFLOPS of 16
    # bits without; 5.3 FP32; 204.8 GB/s. Its two other accelerators run no transformers.
    "Jetson AGX Orin 64GB": Gpu(42.5e12, 5.3e12, 204.8e9),
    # NVIDIA Jetson Thor Series, T5000 datasheet: 2070 TFLOPS FP4 with sparsity, hence 258.8 of 16 bits without; 2560
    # CUDA cores at 1.575 GHz, 8.06 FP32; 273 GB/s.
    "Jetson AGX Thor": Gpu(258.8e12, 8.06e12, 273e9),
}


@dataclass(frozen=True)
class Work:
    """What one call of a piece of a policy asks for; see the module. weights, passed, activations: numbers."""

    flops: int = 0
    weights: int = 0
    passed: int = 0
    activations: int = 0


@dataclass(frozen=True)
class Stage:
    """A part of a chunk that is run `calls` times. once: needed once an instruction, not once a chunk."""

    name: str
    calls: int
    work: Work
    once: bool = False

    @property
    def flops(self) -> int:
        """Of all calls."""
        return self.calls * self.work.flops

    def bytes(self, dtype: str = "bf16") -> int:
        """That all calls move at least: weights, and what passes between stages."""
        return self.calls * (self.work.weights + self.work.passed) * WIDTHS[dtype]

    def activation_bytes(self, dtype: str = "bf16") -> int:
        """That pass between the operators of all calls."""
        return self.calls * self.work.activations * WIDTHS[dtype]

    def floor(self, gpu: Gpu, dtype: str = "bf16") -> float:
        """Least time of all calls, s."""
        return max(self.flops / getattr(gpu, dtype), self.bytes(dtype) / gpu.bandwidth)


def floor(stages: Sequence[Stage], gpu: Gpu, dtype: str = "bf16") -> float:
    """Least time of a chunk, s: the sum over its stages, those left out that are needed once an instruction."""
    return sum(stage.floor(gpu, dtype) for stage in stages if not stage.once)


def count(policy: TorchPolicy, fast_tokens: int = FAST_TOKENS) -> list[Stage]:
    """The stages of one chunk of a policy, batch of one, all cameras there.

    fast_tokens: FAST tokens in an answer. Episodes (LingBot-VA) are in their course: the cache is full, and a whole
    chunk of new frames and actions enters it. Raises PolicyError for a policy of an unknown kind.
    """
    with torch.no_grad():
        return [stage for stage in _stages(policy, fast_tokens) if stage.calls]


def _stages(policy: TorchPolicy, fast_tokens: int) -> Iterator[Stage]:
    network, inputs = policy.network, example_inputs(policy)
    if isinstance(policy, OnePassPolicy):
        yield from _split("network", network, lambda: network(inputs), inputs)[0]
    elif isinstance(policy, FlowPolicy | DenoisingPolicy):
        stages, context = _split("encode", network, lambda: network.encode(inputs), inputs)
        yield from stages
        shape = (1, *policy.noise_shape[1:])
        x = torch.zeros(shape, device=policy.device)
        if isinstance(policy, FlowPolicy):
            step, time = velocity_of(network, context), torch.zeros(1, 1, device=policy.device)
        else:
            step, time = denoise_of(network, context), torch.zeros(1, dtype=torch.int64, device=policy.device)
        (stage,), _ = _split("step", network, lambda: step(x, time), (context, x), policy.steps)
        yield stage
    elif isinstance(policy, TokenPolicy):
        if isinstance(policy, RthPolicy):  # words first: the same prefix with another question
            yield from _answer(network, inputs, policy.motions.answer.length, "motion: ")
        length = network.answer.length
        if isinstance(policy, FastPolicy):
            length = min(length, sum(map(len, _frame(network.answer))) + fast_tokens)
        yield from _answer(network, inputs, length)
    elif isinstance(policy, KeyFramePolicy):
        yield from _episode(policy, inputs)
    else:
        kinds = "OnePassPolicy, FlowPolicy, DenoisingPolicy, TokenPolicy or KeyFramePolicy"
        raise PolicyError(f"recipe {policy.spec.recipe!r}: expected a subclass of {kinds} to count, found none")


def _frame(answer: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Tokens of an answer around its FAST tokens; the one that ends it is the last to be predicted."""
    return answer.prefix, answer.end[:1]


def _answer(network: nn.Module, inputs: Inputs, length: int, title: str = "") -> Iterator[Stage]:
    """An answer of `length` tokens: the prefix gives the first one, each step one more."""
    stages, (keys, valid, _) = _split(f"{title}encode", network, lambda: network.encode(inputs), inputs)
    yield from stages
    # Half of the answer is there in the mean; the cache has room for all of it.
    tail, token = network.blank(keys), torch.zeros(1, dtype=torch.int64, device=keys.device)
    (stage,), _ = _split(
        f"{title}token", network, lambda: network.step(keys, valid, tail, token, token), (keys, tail), length - 1
    )
    yield stage


def _episode(policy: KeyFramePolicy, inputs: Inputs) -> Iterator[Stage]:
    """See KeyFramePolicy: what was seen and done enters the cache, the next video is imagined, its actions decided."""
    network, loop, spec, device = policy.network, policy.loop, policy.spec, policy.device
    tokens = inputs.tokens.expand(1 + loop.guided, -1)
    stages, text = _split("text", network, lambda: network.read(tokens), tokens, once=True)
    yield from stages
    pictures = tuple(torch.zeros(1, 3, loop.pictures, *size, device=device) for size in spec.cameras.values())
    _, memory = network.see(tuple(picture[:, :, :1] for picture in pictures))
    (stage,), (latent, _) = _split(
        "see", network, lambda: network.see(pictures, memory), (pictures, memory), loop.frames
    )
    yield stage
    latents = torch.zeros_like(latent).repeat(1, loop.frames, 1, 1)
    full = text.new_zeros(*text.shape[:4], loop.window, text.shape[5])
    turns = network.turns(loop.frames, loop.frames)
    actions = torch.zeros(1, loop.frames, loop.frame_actions, loop.width, device=device)
    (stage,), _ = _split(
        "remember", network, lambda: network.write(latents, actions, text, turns, full), (full, latents, text)
    )
    yield stage
    share = latents.new_zeros(1, loop.frames)
    # After the last step the finished video leaves its keys and values to the actions.
    (stage,), (_, imagined) = _split(
        "imagine", network, lambda: network.imagine(latents, share, text, turns[0], full), (full, latents, text),
        loop.video_steps + 1,
    )  # fmt: skip
    yield stage
    past, one = torch.cat([full[:1], imagined], 4), text[:1]
    (stage,), _ = _split(
        "decide", network, lambda: network.action(actions, share, one, turns[1], past), (past, actions, one),
        policy.steps,
    )  # fmt: skip
    yield stage


def example_inputs(policy: TorchPolicy) -> Inputs:
    """Black images, a text as long as the context and a state of zeros, on the policy's device."""
    spec, device = policy.spec, policy.device
    time = (spec.history,) if spec.history > 1 else ()
    images = tuple(torch.zeros(1, *time, 3, *size, device=device) for size in spec.cameras.values())
    tokens = torch.ones(1, spec.context, dtype=torch.int64, device=device)
    state = torch.zeros(1, *time, spec.state_dim, device=device)
    return Inputs(images, tokens, state, torch.ones(1, len(spec.cameras), dtype=torch.bool, device=device))


def _split(
    name: str, network: nn.Module, function: Callable[[], Any], given: Any, calls: int = 1, once: bool = False
) -> tuple[list[Stage], Any]:
    """A stage, before it that of the frozen text encoder where one is run inside it, and what `function` returns."""
    text = getattr(network, "text", None)
    apart = {} if once or not isinstance(text, nn.Module) else {"text": text}
    with counting(network, given, apart) as meter:
        result = function()
    meter.passed(result)
    works = meter.works()
    stages = [Stage("text", 1, works["text"], once=True)] if works.get("text", Work()).flops else []
    return [*stages, Stage(name, calls, works[""], once)], result


@contextmanager
def counting(network: nn.Module, given: Any = (), apart: Mapping[str, nn.Module] | None = None) -> Iterator[Meter]:
    """Count what is run inside. given: (nested) tensors that come from elsewhere. apart: modules that are counted by
    themselves, under their name."""
    meter = Meter(network, given)
    handles = []
    for name, module in (apart or {}).items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: meter.begin(name)))
        handles.append(module.register_forward_hook(lambda *_: meter.begin("")))
    try:
        with meter.flops, meter:
            yield meter
        meter.begin("")
    finally:
        for handle in handles:
            handle.remove()


class Meter(TorchDispatchMode):
    """Counts the work of what runs under it, apart for each of the names given to `begin` ("" at first)."""

    def __init__(self, network: nn.Module, given: Any = ()):
        super().__init__()
        self.flops = FlopCounterMode(display=False)
        self._sizes = {_storage(p): p.numel() for p in (*network.parameters(), *network.buffers())}
        self._given = {_storage(t): t.numel() for t in _numbers(given)}
        self._name, self._begun, self._works = "", 0, {"": _Tally()}

    def begin(self, name: str) -> None:
        """What follows is counted under `name`."""
        total = self.flops.get_total_flops()
        self._works[self._name].flops += total - self._begun
        self._name, self._begun = name, total
        self._works.setdefault(name, _Tally())

    def passed(self, result: Any) -> None:
        """What goes on to another stage."""
        self._works[""].passed += sum(
            t.numel() for t in _numbers(result) if _storage(t) not in self._given.keys() | self._sizes.keys()
        )

    def works(self) -> dict[str, Work]:
        """Name -> what was counted."""
        return {
            name: Work(tally.flops, sum(tally.weights.values()), sum(tally.given.values()) + tally.passed, tally.moved)
            for name, tally in self._works.items()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        tally = self._works[self._name]
        for tensor in _numbers((args, kwargs)):
            place = _storage(tensor)
            if place in self._sizes:
                rows = func.overloadpacket in (torch.ops.aten.embedding, torch.ops.aten.index_select)
                read = result.numel() if rows else self._sizes[place]
                tally.weights[place] = max(tally.weights.get(place, 0), min(read, self._sizes[place]))
            elif place in self._given:
                tally.given[place] = self._given[place]
            elif func.overloadpacket in flop_registry:
                tally.moved += tensor.numel()
        if func.overloadpacket in flop_registry:
            tally.moved += sum(t.numel() for t in _numbers(result))
        return result


class _Tally:
    """Numbers of weights and of what was given, by storage; what was passed on; what moved between operators."""

    def __init__(self) -> None:
        self.flops = self.passed = self.moved = 0
        self.weights: dict[int, int] = {}
        self.given: dict[int, int] = {}


def _storage(tensor: Tensor) -> int:
    """The same for all views of a tensor, on the device "meta" too."""
    return tensor.untyped_storage()._cdata


def _numbers(values: Any) -> list[Tensor]:
    """The tensors of floating-point numbers in nested values; whole numbers and masks are small."""
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]
