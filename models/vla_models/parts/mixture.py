"""A mixture of transformers: experts of different width that share one attention in each layer.

    tokens of expert 0 --norm, q k v--.                        .--out, MLP of expert 0-->
    tokens of expert 1 --norm, q k v---> one attention over all --out, MLP of expert 1-->
    keys, values of the prefix (cache)'

An expert is a stack of decoder layers (Gemma's, Llama's, Qwen's) with weights of its own; what experts have in common
are heads, KV heads and the size of a head (pi0, arXiv 2410.24164, section IV; Mixture-of-Transformers, arXiv
2411.04996). A mask says which token sees which, so a prefix that sees none of what follows is computed once
(`prefill`), and its keys and values, stacked into one tensor, serve every later step. With one expert this is a plain
language model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_models.published import Rule, count_layers

#: Cosine and sine of a rotary embedding, (B, 1, T, head_dim) each.
Turn = tuple[Tensor, Tensor]
ACTIVATIONS = {"gelu": lambda x: nn.functional.gelu(x, approximate="tanh"), "silu": nn.functional.silu}


@dataclass(frozen=True)
class ExpertConfig:
    """What is an expert's own.

    width: of its tokens. mlp: hidden width of its gated MLP. norm: RMSNorm that multiplies by its weight ("llama",
    also Qwen's), by 1 + weight ("gemma"), or by what a condition says ("adaptive": scale, shift and the gate of the
    residual from a vector of `condition` numbers; pi0.5). activation: "gelu" (tanh form) or "silu". bias: of queries,
    keys and values. sandwich: norms after attention and MLP too (Gemma 3; not with "adaptive"). shared: takes
    attention and norms of expert 0 and has only an MLP of its own, chosen by the kind of token (WALL-OSS).
    """

    width: int
    mlp: int
    norm: str = "gemma"
    activation: str = "gelu"
    bias: bool = False
    sandwich: bool = False
    condition: int = 0
    shared: bool = False


@dataclass(frozen=True)
class MixtureConfig:
    """What all experts have in common.

    heads, kv_heads: of queries, and of keys and values (a divisor). head_dim: numbers in a head. rope: base and
    stretch of positions of the rotary embedding, one pair a layer, repeated (Gemma 3: five local layers, one global).
    sections: frequencies that turn with each of several positions (M-RoPE of Qwen2.5-VL); empty: there is one
    position. qk_norm: RMSNorm of queries and keys (Gemma 3), as the experts' own norms. cross: layers in which the
    experts after the first attend to the cached keys and values of the prefix alone, through projections of their own,
    and not to each other (SmolVLA). eps: of the norms.
    """

    experts: tuple[ExpertConfig, ...]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: tuple[tuple[float, float], ...] = ((10_000.0, 1.0),)
    sections: tuple[int, ...] = ()
    qk_norm: bool = False
    cross: tuple[int, ...] = ()
    eps: float = 1e-6


class RmsNorm(nn.Module):
    """RMSNorm; see ExpertConfig.norm. Computes in float32."""

    def __init__(self, width: int, kind: str, condition: int = 0, eps: float = 1e-6):
        super().__init__()
        self.kind, self.eps = kind, eps
        if kind == "adaptive":
            self.dense = nn.Linear(condition, 3 * width)
            nn.init.zeros_(self.dense.weight)
            nn.init.zeros_(self.dense.bias)
        else:
            self.weight = nn.Parameter(torch.zeros(width) if kind == "gemma" else torch.ones(width))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (B, T, width) -> the same, normalised, and the gate of the residual (None: 1).

        condition: (B, condition) or, for each token its own, (B, T, condition).
        """
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        if self.kind != "adaptive":
            return (h * (self.weight.float() + (self.kind == "gemma"))).to(x), None
        if condition.ndim == 2:
            condition = condition.unsqueeze(1)
        scale, shift, gate = self.dense(condition).chunk(3, -1)
        return (h * (1 + scale.float()) + shift.float()).to(x), gate.to(x)


class GatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """One decoder layer of one expert. cross: its keys and values come from those of the prefix."""

    def __init__(self, config: MixtureConfig, expert: ExpertConfig, cross: bool = False):
        super().__init__()
        self.mlp = GatedMlp(expert.width, expert.mlp, expert.activation)
        self.head_dim = config.head_dim
        if expert.shared:
            return

        def norm(width: int = expert.width) -> RmsNorm:
            return RmsNorm(width, expert.norm, expert.condition, config.eps)

        def norm_of_head() -> RmsNorm | None:
            kind = "llama" if expert.norm == "llama" else "gemma"
            return RmsNorm(config.head_dim, kind, eps=config.eps) if config.qk_norm else None

        inner, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        source = kv if cross else expert.width
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention_after = norm() if expert.sandwich else None
        self.mlp_after = norm() if expert.sandwich else None
        self.query = nn.Linear(expert.width, inner, bias=expert.bias)
        self.key = nn.Linear(source, kv, bias=expert.bias)
        self.value = nn.Linear(source, kv, bias=expert.bias)
        self.out = nn.Linear(inner, expert.width, bias=False)
        self.query_norm, self.key_norm = norm_of_head(), norm_of_head()

    def queries(self, x: Tensor, turn: Turn) -> Tensor:
        return rotate(self._heads(self.query(x), self.query_norm), turn)

    def keys(self, x: Tensor, turn: Turn | None = None) -> Tensor:
        heads = self._heads(self.key(x), self.key_norm)
        return heads if turn is None else rotate(heads, turn)

    def values(self, x: Tensor) -> Tensor:
        return self._heads(self.value(x), None)

    def finish(self, x: Tensor, attended: Tensor, gate: Tensor | None, mlp: GatedMlp, condition: Tensor | None
               ) -> Tensor:  # fmt: skip
        """The rest of the layer. attended: (B, T, heads * head_dim)."""
        h = self.out(attended)
        x = _residual(x, h if self.attention_after is None else self.attention_after(h)[0], gate)
        h, gate = self.mlp_norm(x, condition)
        h = mlp(h)
        return _residual(x, h if self.mlp_after is None else self.mlp_after(h)[0], gate)

    def _heads(self, x: Tensor, norm: RmsNorm | None) -> Tensor:
        x = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return x if norm is None else norm(x)[0]


class Expert(nn.Module):
    """The layers of one expert, and the norm behind them (that of expert 0 where it shares)."""

    def __init__(self, config: MixtureConfig, index: int):
        super().__init__()
        expert = config.experts[index]
        self.layers = nn.ModuleList(
            Layer(config, expert, index > 0 and i in config.cross) for i in range(config.layers)
        )
        self.norm = None if expert.shared else RmsNorm(expert.width, expert.norm, expert.condition, config.eps)


class Mixture(nn.Module):
    """The experts. Tokens of a call are in the order of their experts: those of expert 0, of expert 1, ...

    streams: one (B, T_e, width_e) for each expert, or None for one that takes no part. positions: (B, T) of all tokens,
    T their number, or (sections, B, T). mask: (B, T, S + T) bool, true where a token (row) sees another; the S tokens
    of the cache come first. conditions: one for each expert with an adaptive norm, see RmsNorm.
    """

    def __init__(self, config: MixtureConfig):
        super().__init__()
        self.config = config
        self.experts = nn.ModuleList(Expert(config, index) for index in range(len(config.experts)))

    def forward(self, streams: Sequence[Tensor | None], positions: Tensor, mask: Tensor, cache: Tensor | None = None,
                conditions: Sequence[Tensor | None] = ()) -> list[Tensor | None]:  # fmt: skip
        """Tokens behind the last norm, as `streams`."""
        return self._run(streams, positions, mask, cache, conditions)[0]

    def prefill(self, streams: Sequence[Tensor | None], positions: Tensor, mask: Tensor, cache: Tensor | None = None,
                conditions: Sequence[Tensor | None] = (), hidden: bool = True
                ) -> tuple[list[Tensor | None], Tensor]:  # fmt: skip
        """Tokens behind the last norm, and the cache: keys and values (B, layers, 2, kv_heads, T, head_dim).

        hidden: false leaves out what only the tokens themselves need of the last layer, and gives no tokens.
        """
        keep: list[Tensor] = []
        outputs, _ = self._run(streams, positions, mask, cache, conditions, keep, hidden)
        return outputs, torch.stack(keep, 1)

    def _run(self, streams, positions, mask, cache, conditions, keep=None, hidden=True):
        config = self.config
        xs = dict((e, x) for e, x in enumerate(streams) if x is not None)
        conditions = [*conditions, *[None] * (len(streams) - len(conditions))]
        lengths = [x.shape[1] for x in xs.values()]
        turns = {pair: rotation(positions, config.head_dim, *pair, config.sections) for pair in set(config.rope)}
        start = positions[..., :1]
        fresh = {pair: rotation(positions - start, config.head_dim, *pair, config.sections)
                 for pair in set(config.rope)} if config.cross else {}  # fmt: skip
        for i in range(config.layers):
            rope = config.rope[i % len(config.rope)]
            layers = {e: self.experts[0 if config.experts[e].shared else e].layers[i] for e in xs}
            normed = {e: layers[e].attention_norm(x, conditions[e]) for e, x in xs.items()}
            if i in config.cross and 0 not in xs:
                (e,) = xs
                past = [part.transpose(1, 2).flatten(2) for part in cache[:, i].unbind(1)]
                k, v = layers[e].keys(past[0]), layers[e].values(past[1])
                attended = attend_groups(layers[e].queries(normed[e][0], fresh[rope]), k, v, mask[..., : k.shape[2]])
            else:
                parts = _split(turns[rope], lengths)
                q = _join([layers[e].queries(normed[e][0], t) for e, t in zip(xs, parts, strict=True)])
                k = _join([layers[e].keys(normed[e][0], t) for e, t in zip(xs, parts, strict=True)])
                v = _join([layers[e].values(normed[e][0]) for e in xs])
                if keep is not None:
                    keep.append(torch.stack([k, v], 1))
                if not hidden and i == config.layers - 1:
                    return [None] * len(streams), keep
                if cache is not None:
                    k, v = torch.cat([cache[:, i, 0], k], 2), torch.cat([cache[:, i, 1], v], 2)
                attended = attend_groups(q, k, v, mask)
            for e, part in zip(xs, attended.split(lengths, 1), strict=True):
                xs[e] = layers[e].finish(xs[e], part, normed[e][1], self.experts[e].layers[i].mlp, conditions[e])
        norms = {e: self.experts[0 if config.experts[e].shared else e].norm for e in xs}
        return [norms[e](xs[e], conditions[e])[0] if e in xs else None for e in range(len(streams))], keep


def attend_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention with fewer heads of keys than of queries: q (B, heads, T, d), k, v (B, kv, S, d) -> (B, T, heads * d).

    mask: (B, T, S) bool. Queries of a group are laid end to end, so that keys and values are not copied; softmax in
    float32.
    """
    count, heads, length, size = q.shape
    kv = k.shape[1]
    # The queries are scaled, not the scores, of which there are more.
    scores = (q.reshape(count, kv, -1, size) / math.sqrt(size) @ k.transpose(-1, -2)).float()
    scores = scores.unflatten(2, (heads // kv, length)).masked_fill(~mask[:, None, None], -1e9)
    weights = torch.softmax(scores, -1).to(v).flatten(2, 3)
    return (weights @ v).reshape(count, heads, length, size).transpose(1, 2).flatten(2)


def rotation(positions: Tensor, size: int, base: float, stretch: float = 1.0, sections: Sequence[int] = ()) -> Turn:
    """Rotary embedding (RoPE, arXiv 2104.09864) of positions (B, T), or (n, B, T) with n sections of frequencies."""
    steps = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    angles = (positions.float() / stretch).unsqueeze(-1) * base**-steps
    if sections:
        angles = torch.cat([part[n] for n, part in enumerate(angles.split(list(sections), -1))], -1)
    angles = torch.cat([angles, angles], -1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Turn queries or keys (B, heads, T, d): number i with number i + d/2."""
    a, b = x.chunk(2, -1)
    return x * turn[0].to(x) + torch.cat([-b, a], -1) * turn[1].to(x)


def block_mask(queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """(B, T, S) bool: a token sees those of its own block and of earlier ones that are no padding.

    queries (T,), keys (S,): blocks, ascending integers. valid (B, S): false for padding.
    """
    return (keys <= queries.unsqueeze(-1)) & valid.unsqueeze(1)


def text_mask(tokens: Tensor, padding: int) -> Tensor:
    """(B, T) bool of tokens (B, T): true up to the last one that is no padding."""
    return (tokens != padding).long().flip(1).cumsum(1).flip(1) > 0


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Along the tokens; one expert's alone are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 2)


def _residual(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    return x + h if gate is None else x + h * gate


def _split(turn: Turn, lengths: Sequence[int]) -> list[Turn]:
    return list(zip(turn[0].split(lengths, 2), turn[1].split(lengths, 2), strict=True))


def layer_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Rules for a stack of decoder layers as transformers names them; `theirs` is a regular expression."""
    names = {
        "self_attn.q_proj": "query", "self_attn.k_proj": "key", "self_attn.v_proj": "value", "self_attn.o_proj": "out",
        "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm",
    }  # fmt: skip
    layers = (Rule(rf"{theirs}\.layers\.(\d+)\.{published.replace('.', '[.]')}\.(.+)", rf"{ours}.layers.\1.{name}.\2")
              for published, name in names.items())  # fmt: skip
    return (*layers, Rule(rf"{theirs}\.norm\.(.+)", rf"{ours}.norm.\1"))


def layer_sizes(shapes: Mapping[str, tuple[int, ...]], ours: str, heads: int) -> dict[str, int]:
    """What the shapes under our names behind `ours` tell of a stack of decoder layers with so many heads: its width,
    mlp, layers, heads, kv_heads and head_dim."""
    layer = f"{ours}.layers.0"
    inner, width = shapes[f"{layer}.query.weight"]
    return {
        "width": width,
        "mlp": shapes[f"{layer}.mlp.gate.weight"][0],
        "layers": count_layers(shapes, f"{ours}.layers."),
        "heads": heads,
        "kv_heads": shapes[f"{layer}.key.weight"][0] * heads // inner,
        "head_dim": inner // heads,
    }
