"""The recipe "pi06" and its value network: Gemma 3's tokens, prompts with the advantage, guidance, returns."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from test_recipes import make_batch, make_observation  # noqa: E402
from transformers import Gemma3Config  # noqa: E402
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector  # noqa: E402
from vla_models import build  # noqa: E402
from vla_models.parts.value import (  # noqa: E402
    ValueConfig,
    ValueNetwork,
    advantages,
    discretise,
    label_advantages,
    normalised_rewards,
    returns_of,
)
from vla_models.policy import InferenceRequest  # noqa: E402
from vla_models.recipes.pi0 import TINY  # noqa: E402
from vla_models.recipes.pi06 import drop_labels, make_prompt  # noqa: E402


def make_policy(**settings):
    torch.manual_seed(0)
    policy = build("pi06", dataclasses.asdict(build("pi06").config) | settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def test_images_become_tokens_as_in_gemma3(policy):
    embedder, image = policy.network.embedder, torch.rand(2, 3, 56, 56)
    config = Gemma3Config(text_config={"hidden_size": 32}, vision_config={"hidden_size": 32, "image_size": 56,
                          "patch_size": 14}, mm_tokens_per_image=4)  # fmt: skip
    projector = Gemma3MultiModalProjector(config)
    with torch.no_grad():
        projector.mm_input_projection_weight.copy_(embedder.projector.weight.T)
        projector.mm_soft_emb_norm.weight.copy_(embedder.projector_norm.weight)
        expected = projector(embedder.vision(2 * image - 1).last_hidden_state)
        found = embedder.images(image)
    assert found.shape == (2, 4, 32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_paper_sees_256_tokens_a_camera_and_has_an_expert_of_860_million_parameters():
    policy = build("pi06", "paper", device="meta")
    images = torch.zeros(1, 3, 448, 448, device="meta")
    assert policy.network.embedder.images(images).shape == (1, 256, 2560)
    expert = sum(parameter.numel() for parameter in policy.network.mixture.experts[1].parameters())
    assert expert == pytest.approx(860e6, rel=0.005)


def test_prompts_state_facts_and_the_advantage():
    assert make_prompt(True) == "Task: {task}, State: {state};\nAdvantage: positive\nAction: "
    assert make_prompt(None) == "Task: {task}, State: {state};\nAction: "
    with_facts = make_prompt(False, {"Speed": "slow", "Note": "{odd}"})
    lines = with_facts.format(task="fold", state="1 2").split("\n")
    assert lines == ["Task: fold, State: 1 2;", "Speed: slow", "Note: {odd}", "Advantage: negative", "Action: "]


def test_training_samples_carry_their_label_and_use_asks_for_good_actions(policy):
    observation = make_observation(policy.spec)
    decode = policy.processor.tokenizer.decode

    def text(processor):
        return decode(processor.inputs(observation)[0].tokens[0])

    assert "Advantage: positive\n" in text(policy.processor)
    assert text(policy.processor) == text(policy.conditioned(True))
    assert "Advantage: negative\n" in text(policy.conditioned(False))
    assert "Advantage" not in text(policy.conditioned(None)) and "Speed: fast\n" in text(
        policy.conditioned(None, {"Speed": "fast"})
    )


def test_a_share_of_the_labels_is_left_out():
    labels = [True] * 6000 + [False] * 4000
    dropped = drop_labels(labels, torch.Generator().manual_seed(0))
    assert dropped.count(None) / 10_000 == pytest.approx(0.3, abs=0.02)
    assert all(kept in (None, label) for kept, label in zip(dropped, labels, strict=True))


def test_guidance_weighs_the_velocity_with_the_advantage_against_that_without(policy):
    observation, request = make_observation(policy.spec), InferenceRequest(seed=1)
    weights = policy.network.state_dict()

    def act(weight, prompt=None):
        other = make_policy(weight=weight)
        other.network.load_state_dict(weights)
        other.steps = 1
        if prompt is not None:
            other.spec = other.processor.spec = dataclasses.replace(other.spec, prompt=prompt)
        return other.infer(observation, request).targets

    told, plain = act(1.0), act(1.0, make_prompt(None))
    assert np.abs(told - plain)[:, :7].max() > 1e-5
    expected = plain + 2.0 * (told - plain)
    np.testing.assert_allclose(act(2.0)[:, :7], expected[:, :7], atol=1e-5)  # the gripper is clipped


def test_guidance_by_the_advantage_goes_with_real_time_chunking():
    policy = make_policy(weight=1.5)
    observation = make_observation(policy.spec)
    remainder = policy.infer(observation, InferenceRequest(seed=1)).targets
    for guidance in ("guided", "prefix"):
        out = policy.infer(observation, InferenceRequest(remainder, 2, 4, guidance, seed=2)).targets
        free = policy.infer(observation, InferenceRequest(seed=2)).targets
        assert np.abs(out[0] - remainder[0]).sum() <= np.abs(free[0] - remainder[0]).sum() + 1e-9


def test_the_flow_loss_of_an_insulated_backbone_stops_at_it():
    policy = make_policy(insulated=True)
    network, batch = policy.network, make_batch(policy, 2)
    network.loss(batch, torch.Generator().manual_seed(0))["loss"].backward()
    moved = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert "action_in.weight" in moved and not any(name.startswith(network.frozen) for name in moved)
    network.text_loss(batch.inputs, torch.full((2, 3), 65)).backward()
    assert network.embedder.embedding.weight.grad.abs().max() > 0


# The value network.


def make_value(policy):
    torch.manual_seed(0)
    config = ValueConfig(
        **{key: value for key, value in TINY.items() if not key.startswith("expert")} | {"kv_heads": 1}
    )
    return ValueNetwork(policy.spec, config)


def test_the_value_network_learns_the_returns_of_what_it_sees(policy):
    network, inputs = make_value(policy), make_batch(policy, 4).inputs
    returns = torch.tensor([-0.9, -0.5, -0.25, 0.0])
    assert network(inputs).shape == (4, 201)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(50):
        loss = network.loss(inputs, returns)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(network.value(inputs).detach(), returns, atol=0.15, rtol=0)


def test_the_value_network_does_not_look_at_a_camera_that_is_not_there(policy):
    network, inputs = make_value(policy), make_batch(policy, 2).inputs
    present = torch.tensor([[True, False], [True, True]])
    other = inputs._replace(images=(inputs.images[0], 1 - inputs.images[1]), present=present)
    with torch.no_grad():
        a, b = network(inputs._replace(present=present)), network(other)
    torch.testing.assert_close(a[0], b[0])
    assert (a - b)[1].abs().max() > 1e-6


def test_the_paper_value_network_has_about_670_million_parameters():
    spec = build("pi06", "paper", device="meta").spec
    with torch.device("meta"):
        network = ValueNetwork(spec, ValueConfig())
    # 412 M of SigLIP and 268 M of Gemma 3 270M with its embedding; the paper rounds to 670 M.
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(670e6, rel=0.02)


def test_returns_fall_into_201_bins():
    returns = torch.tensor([-2.0, -1.0, -0.9975, -0.5, -0.0024, 0.0, 0.3])
    assert discretise(returns).tolist() in ([0, 0, 0, 100, 200, 200, 200], [0, 0, 1, 100, 200, 200, 200])


@given(steps=st.integers(1, 60), success=st.booleans(), longer=st.integers(0, 50), lookahead=st.integers(1, 70),
       seed=st.integers(0, 9))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_returns_and_advantages_are_their_sums(steps, success, longer, lookahead, seed):
    longest = steps + longer
    rewards = normalised_rewards(steps, success, longest)
    returns = returns_of(rewards)
    values = np.random.default_rng(seed).uniform(-1, 0, steps)
    found = advantages(rewards, values, lookahead)
    for t in range(steps):
        expected = sum(rewards[t : t + lookahead]) + (values[t + lookahead] if t + lookahead < steps else 0) - values[t]
        assert found[t] == pytest.approx(expected, abs=1e-9)
    if success:
        np.testing.assert_allclose(returns, -np.arange(steps)[::-1] / longest, atol=1e-9)
    else:
        np.testing.assert_array_equal(returns, -1.0)
    # With the true values of a success nothing is better or worse than expected.
    if success:
        np.testing.assert_allclose(advantages(rewards, returns, lookahead), 0.0, atol=1e-9)


def test_the_best_third_and_every_correction_are_labelled_positive():
    advantage = np.random.default_rng(0).normal(size=1000)
    corrected = np.zeros(1000, bool)
    labels = label_advantages(advantage, corrected)
    assert labels.sum() == 300 and advantage[labels].min() > advantage[~labels].max()
    corrected[np.argmin(advantage)] = True
    assert label_advantages(advantage, corrected).sum() == 301
