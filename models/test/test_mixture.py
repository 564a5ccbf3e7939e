"""The mixture of transformers: the same numbers as the language models it is built from, and who sees whom."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from transformers import (  # noqa: E402  # noqa: E402
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLTextConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel  # noqa: E402
from vla_models.parts.mixture import (  # noqa: E402
    ExpertConfig,
    Mixture,
    MixtureConfig,
    block_mask,
    layer_rules,
    text_mask,
)
from vla_models.published import fill  # noqa: E402

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50, "attn_implementation": "eager"}  # fmt: skip
SHARED = {"layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8}


class Files(dict):
    """Tensors in place of a file of them."""

    path = "reference"

    @property
    def shapes(self):
        return {name: tuple(value.shape) for name, value in self.items()}


def scramble(module, scale=0.2):
    """Weights none of which is 0 or 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.eval()


def from_transformers(model, mixture):
    names = {f"model.{name}": value for name, value in model.state_dict().items() if not name.startswith("embed_")}
    extra = {"post_attention_layernorm": "attention_after", "pre_feedforward_layernorm": "mlp_norm",
             "post_feedforward_layernorm": "mlp_after", "self_attn.q_norm": "query_norm",
             "self_attn.k_norm": "key_norm"}  # fmt: skip
    rules = layer_rules("model", "experts.0")
    if "model.layers.0.pre_feedforward_layernorm.weight" in names:
        from vla_models.published import Rule

        rules = [Rule(rf"model\.layers\.(\d+)\.{theirs}\.(.+)", rf"experts.0.layers.\1.{ours}.\2")
                 for theirs, ours in extra.items()] + list(rules)  # fmt: skip
    fill(mixture, Files(names), rules)
    return mixture.eval()


def causal(length):
    blocks = torch.arange(length)
    return block_mask(blocks, blocks, torch.ones(2, length, dtype=torch.bool))


@pytest.mark.parametrize("family", ["gemma", "llama", "qwen", "gemma3"])
def test_one_expert_is_the_language_model_of_transformers(family):
    torch.manual_seed(0)
    x, positions = torch.randn(2, 7, 24), torch.arange(7).expand(2, 7)
    more = {"position_ids": positions}
    if family == "gemma":
        model = GemmaModel(GemmaConfig(**SIZES))
        config = MixtureConfig((ExpertConfig(24, 40),), **SHARED)
    elif family == "llama":
        model = LlamaModel(LlamaConfig(**SIZES, rms_norm_eps=1e-5))
        config = MixtureConfig((ExpertConfig(24, 40, "llama", "silu"),), **SHARED, eps=1e-5)
    elif family == "qwen":
        positions = torch.stack([positions, positions.flip(1), 3 * positions])
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
        sizes = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"hidden_size": 32}
        x = torch.randn(2, 7, 32)
        model = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**sizes, rope_parameters=rope))
        expert = ExpertConfig(32, 40, "llama", "silu", bias=True)
        config = MixtureConfig((expert,), **SHARED, rope=((1e6, 1.0),), sections=(1, 1, 2))
        more = {"position_ids": positions}
    else:
        kinds = ["sliding_attention", "sliding_attention", "full_attention"]
        rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
        model = Gemma3TextModel(Gemma3TextConfig(**SIZES, layer_types=kinds, rope_parameters=rope,
                                                 query_pre_attn_scalar=8))  # fmt: skip
        expert = ExpertConfig(24, 40, sandwich=True)
        config = MixtureConfig((expert,), **SHARED, rope=((1e4, 1.0), (1e4, 1.0), (1e6, 8.0)), qk_norm=True)
    scramble(model)
    mixture = from_transformers(model, Mixture(config))
    with torch.no_grad():
        expected = model(inputs_embeds=x, **more).last_hidden_state
        (found,) = mixture([x], positions, causal(7))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)  # found 2e-6


def two_experts(**settings):
    torch.manual_seed(1)
    experts = (ExpertConfig(24, 40), ExpertConfig(12, 20, "adaptive", condition=6))
    return scramble(Mixture(MixtureConfig(experts, **SHARED, **settings)))


def test_a_cached_prefix_gives_what_one_pass_over_all_gives():
    mixture = two_experts()
    prefix, suffix, condition = torch.randn(2, 5, 24), torch.randn(2, 4, 12), torch.randn(2, 4, 6)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 3:5] = False
    blocks = torch.tensor([0] * 5 + [1] + [2] * 3)
    positions = valid.long().cumsum(1) - 1
    mask = block_mask(blocks, blocks, valid)
    with torch.no_grad():
        whole = mixture([prefix, suffix], positions, mask, conditions=(None, condition))
        _, cache = mixture.prefill([prefix, None], positions[:, :5], mask[:, :5, :5], hidden=False)
        assert cache.shape == (2, 3, 2, 2, 5, 8)
        later = mixture([None, suffix], positions[:, 5:], mask[:, 5:], cache, (None, condition))
        alone = mixture([prefix, None], positions[:, :5], mask[:, :5, :5])
    torch.testing.assert_close(later[1], whole[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone[0][0], whole[0][0], atol=1e-5, rtol=1e-4)


def test_a_token_depends_on_its_own_and_earlier_blocks_only():
    mixture = two_experts()
    prefix, suffix, condition = torch.randn(1, 4, 24), torch.randn(1, 4, 12), torch.randn(1, 6)
    blocks = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2])
    valid = torch.tensor([[True, True, True, False, True, True, True, True]])
    mask = block_mask(blocks, blocks, valid)

    def run(prefix, suffix):
        with torch.no_grad():
            return mixture([prefix, suffix], torch.arange(8)[None], mask, conditions=(None, condition))

    def moved(before, after):
        changed = [(a - b).abs().amax(-1)[0] > 1e-6 for a, b in zip(before, after, strict=True)]
        return torch.cat(changed).tolist()

    base = run(prefix, suffix)
    for index, touched in ((0, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [3]), (4, [4, 5, 6, 7]), (6, [5, 6, 7])):
        changed = (prefix.clone(), suffix.clone())
        changed[index // 4][0, index % 4] += 1.0
        assert [i for i, yes in enumerate(moved(base, run(*changed))) if yes] == touched


def test_a_condition_of_each_token_equals_one_for_all():
    mixture = two_experts()
    suffix, condition = torch.randn(2, 4, 12), torch.randn(2, 6)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    positions = torch.arange(4).expand(2, 4)
    with torch.no_grad():
        one = mixture([None, suffix], positions, mask, conditions=(None, condition))[1]
        each = mixture([None, suffix], positions, mask, conditions=(None, condition[:, None].expand(-1, 4, -1)))[1]
    torch.testing.assert_close(one, each)


def test_cross_attention_layers_look_at_the_prefix_alone():
    torch.manual_seed(2)
    experts = (ExpertConfig(24, 40, "llama", "silu"), ExpertConfig(12, 20, "llama", "silu"))
    mixture = scramble(Mixture(MixtureConfig(experts, **SHARED, cross=(0, 1, 2))))
    prefix, suffix = torch.randn(1, 5, 24), torch.randn(1, 3, 12)
    with torch.no_grad():
        _, cache = mixture.prefill([prefix, None], torch.arange(5)[None], causal(5)[:1], hidden=False)
        mask = torch.ones(1, 3, 8, dtype=torch.bool)
        base = mixture([None, suffix], torch.arange(5, 8)[None], mask, cache)[1]
        other = mixture([None, suffix + torch.tensor([[[1.0], [0], [0]]])], torch.arange(5, 8)[None], mask, cache)[1]
        assert mixture.experts[1].layers[0].key.weight.shape == (16, 16)
    assert (base - other)[0, 1:].abs().max() == 0 and (base - other)[0, 0].abs().max() > 1e-3


def test_a_shared_expert_has_only_an_mlp_of_its_own():
    torch.manual_seed(3)
    experts = (ExpertConfig(24, 40, "llama", "silu", bias=True), ExpertConfig(24, 20, activation="silu", shared=True))
    mixture = scramble(Mixture(MixtureConfig(experts, **SHARED)))
    names = {name for name, _ in mixture.experts[1].named_parameters()}
    assert names == {f"layers.{i}.mlp.{part}.weight" for i in range(3) for part in ("gate", "up", "down")}
    x, positions, mask = torch.randn(2, 6, 24), torch.arange(6).expand(2, 6), torch.ones(2, 6, 6, dtype=torch.bool)
    twin = ExpertConfig(24, 40, "llama", "silu", bias=True)
    one = scramble(Mixture(MixtureConfig((twin,), **SHARED)))
    one.experts[0].load_state_dict(mixture.experts[0].state_dict())
    with torch.no_grad():
        apart = mixture([x[:, :4], x[:, 4:]], positions, mask)
        assert (torch.cat(apart, 1) - one([x], positions, mask)[0]).abs().max() > 1e-3
        for layer, other in zip(mixture.experts[1].layers, mixture.experts[0].layers, strict=True):
            layer.mlp = other.mlp
        torch.testing.assert_close(torch.cat(mixture([x[:, :4], x[:, 4:]], positions, mask), 1),
                                   one([x], positions, mask)[0], atol=1e-5, rtol=1e-4)  # fmt: skip


def test_padding_is_what_follows_the_text():
    tokens = torch.tensor([[0, 5, 0, 7, 0, 0], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0]])
    assert text_mask(tokens, 0).sum(1).tolist() == [4, 6, 0]
