"""What checkpoints of flax have in common: names with slashes, and kernels with the inputs first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vla_models.published import Rule


def dense(theirs: str, ours: str, change: Callable[[Tensor], Tensor] = torch.t) -> tuple[Rule, Rule]:
    """Rules for kernel and bias of a layer. theirs: a pattern; change: of the kernel."""
    return (
        Rule(rf"{theirs}/kernel", f"{ours}.weight", change=change),
        Rule(rf"{theirs}/bias", f"{ours}.bias", change=torch.flatten),
    )


def conv(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """The same of a convolution, from (h, w, in, out) to (out, in, h, w)."""
    return dense(theirs, ours, lambda kernel: kernel.movedim((-1, -2), (0, 1)))


def attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The same of multi-head attention, whose kernels have the heads apart, to parts.attention.Attention."""
    return (
        *(rule for name in ("query", "key", "value")
          for rule in dense(rf"{theirs}/{name}", f"{ours}.{name}", lambda kernel: kernel.flatten(1).T)),
        *dense(rf"{theirs}/out", f"{ours}.out", lambda kernel: kernel.flatten(0, -2).T),
    )  # fmt: skip


def norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """Rules for scale and bias of a norm."""
    return Rule(f"{theirs}/scale", f"{ours}.weight"), Rule(f"{theirs}/bias", f"{ours}.bias")


def places(theirs: str, ours: str) -> Rule:
    """Rule for an embedding of places, which has a batch axis of 1."""
    return Rule(theirs, ours, change=lambda value: value.squeeze(0))


def t5(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Rules for the encoder of T5 as transformers' flax models name it, to its torch models' names."""
    layer, own = rf"{theirs}encoder/block/(\d+)/layer", rf"{ours}.block.\1.layer"
    bias = "SelfAttention.relative_attention_bias.weight"
    return (
        Rule(rf"{layer}/0/SelfAttention/([qkvo])/kernel", rf"{own}.0.SelfAttention.\2.weight", change=torch.t),
        Rule(rf"{layer}/1/DenseReluDense/(w\w+)/kernel", rf"{own}.1.DenseReluDense.\2.weight", change=torch.t),
        Rule(rf"{layer}/0/SelfAttention/relative_attention_bias/embedding", f"{own}.0.{bias}"),
        Rule(rf"{layer}/([01])/layer_norm/weight", rf"{own}.\2.layer_norm.weight"),
        Rule(f"{theirs}encoder/final_layer_norm/weight", f"{ours}.final_layer_norm.weight"),
        Rule(f"{theirs}shared/embedding", f"{ours}.embed_tokens.weight"),
    )
