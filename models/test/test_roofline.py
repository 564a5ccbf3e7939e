"""What a chunk asks of a machine: counted by hand, against a real run, and as time on a GPU."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from vla_models import build  # noqa: E402
from vla_models.policy import ModelInputs  # noqa: E402
from vla_models.roofline import GPUS, Gpu, Stage, Work, count, counting, example_inputs, floor  # noqa: E402


def work_of(network, function, given=()):
    with torch.no_grad(), counting(network, given) as meter:
        result = function()
    meter.passed(result)
    return meter.works()[""]


def test_a_linear_layer_is_counted_by_hand():
    with torch.device("meta"):
        layer, x = nn.Linear(30, 20), torch.zeros(7, 30)
    work = work_of(layer, lambda: layer(x), x)
    assert work == Work(flops=2 * 7 * 30 * 20, weights=30 * 20 + 20, passed=7 * 30 + 7 * 20, activations=7 * 20)


def test_weights_are_read_once_however_often_they_are_used_and_an_embedding_by_rows():
    with torch.device("meta"):
        network = nn.ModuleDict({"words": nn.Embedding(1000, 16), "twice": nn.Linear(16, 16, bias=False)})
        tokens = torch.zeros(1, 5, dtype=torch.int64)
    read = work_of(network, lambda: network["twice"](network["twice"](network["words"](tokens))))
    assert read.weights == 5 * 16 + 16 * 16 and read.flops == 2 * (2 * 5 * 16 * 16)
    # The head of a language model that is tied to its embedding reads all of it.
    tied = work_of(network, lambda: network["words"](tokens) @ network["words"].weight.T)
    assert tied.weights == 1000 * 16


def test_attention_is_counted_on_the_meta_device():
    q, k, v = (torch.zeros(1, 4, tokens, 8, device="meta") for tokens in (6, 10, 10))
    work = work_of(nn.Module(), lambda: nn.functional.scaled_dot_product_attention(q, k, v), (q, k, v))
    assert work.flops == 2 * (2 * 4 * 6 * 10 * 8)


@pytest.mark.parametrize("name", ["act", "diffusion_policy", "octo", "pi05", "rt2", "smolvla"])
def test_the_stages_add_up_to_what_a_chunk_really_runs(name):
    policy = build(name)
    inputs = ModelInputs(*(tuple(i.numpy() for i in v) if isinstance(v, tuple) else v.numpy()
                           for v in example_inputs(policy)))  # fmt: skip
    noise = np.zeros(policy.noise_shape, np.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy.run(inputs, noise, None, {})
    stages = count(build(name, device="meta"))
    assert sum(stage.flops for stage in stages) == counter.get_total_flops() > 0
    assert [stage.name for stage in stages if stage.once] == (["text"] if name == "octo" else [])


def test_pi0_at_paper_size_has_the_known_floor():
    policy = build("pi0", "paper", device="meta")
    encode, step = count(policy)
    expert = policy.network.mixture.experts[1]
    weights = sum(p.numel() for p in expert.layers.parameters()) + sum(p.numel() for p in expert.norm.parameters())
    assert step.calls == 10 and 0 <= step.work.weights - weights < 5e6  # and the projections of actions and time
    # The state's token is in the context: 50 go through the expert and attend to all.
    tokens, seen = 50, 3 * 256 + 48 + 1 + 50
    attention = 18 * 2 * 2 * 8 * tokens * seen * 256
    assert step.work.flops == pytest.approx(2 * weights * tokens + attention, rel=0.02)
    cache = 18 * 2 * 256 * (seen - 50)
    assert step.work.passed == pytest.approx(cache, rel=0.01)
    h200 = GPUS["H200"]
    assert encode.floor(h200) == encode.flops / 989.5e12  # arithmetic
    assert step.floor(h200) == step.bytes() / 4.8e12  # memory
    assert floor([encode, step], h200) == pytest.approx(5.2e-3, rel=0.01)


def test_the_video_of_lingbot_va_is_imagined_in_steps_and_the_cache_is_read_in_each():
    policy = build("lingbot_va", device="meta")
    stages = {stage.name: stage for stage in count(policy)}
    config, loop = policy.config, policy.loop
    assert {name: s.calls for name, s in stages.items()} == {
        "text": 1, "see": loop.frames, "remember": 1, "imagine": loop.video_steps + 1, "decide": policy.steps,
    }  # fmt: skip
    cache = config.layers * 2 * config.heads * config.head_size * loop.window
    assert stages["imagine"].work.passed > 2 * cache  # with and without the instruction
    assert cache < stages["decide"].work.passed < 2 * cache


def test_the_slower_of_arithmetic_and_memory_decides_in_each_stage():
    gpu = Gpu(bf16=1000.0, fp32=100.0, bandwidth=50.0)
    heavy, wide = (
        Stage("encode", 1, Work(flops=5000, weights=10)),
        Stage("step", 4, Work(flops=10, weights=40, passed=10)),
    )
    once = Stage("text", 1, Work(flops=10**9), once=True)
    assert heavy.floor(gpu) == 5.0 and wide.floor(gpu) == 4 * 100 / 50
    assert floor([once, heavy, wide], gpu) == 13.0
    assert floor([heavy, wide], gpu, "fp32") == 50.0 + 4 * 200 / 50
