"""The policy interface: specification, inference, guidance, refusals."""

import dataclasses
import json

import numpy as np
import pytest
from vla_core.actions import ActionSpace
from vla_models.policy import InferenceRequest, PolicyError, PolicyObservation, PolicySpec
from vla_models.tokenizer import TokenizerError


@pytest.mark.parametrize("recipe", ["flow", "act"])
def test_specification_survives_json(spec_of, recipe):
    spec = spec_of(recipe)
    assert PolicySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [({"state": "images"}, "state"), ({"guidance": ("magic",)}, "guidance"), ({"period": 0.0}, "positive"),
     ({"temperature": -1.0}, "temperature"),
     ({"action_space": ActionSpace(("left",), "pose")}, "arms")],
)  # fmt: skip
def test_bad_specifications_are_refused(spec_of, change, message):
    with pytest.raises(PolicyError, match=message):
        spec_of("flow", **change)


def test_unknown_and_missing_keys_are_refused(spec_of):
    values = spec_of("flow").to_dict()
    with pytest.raises(PolicyError, match="unknown keys.*colour"):
        PolicySpec.from_dict(values | {"colour": 1})
    del values["horizon"]
    with pytest.raises(PolicyError, match="missing keys.*horizon"):
        PolicySpec.from_dict(values)


@pytest.mark.parametrize("recipe", ["flow", "act"])
def test_inference_gives_metric_targets_and_timings(policy_of, observation_of, recipe):
    policy = policy_of(recipe)
    out = policy.infer(observation_of(), InferenceRequest(seed=3))
    assert out.targets.shape == (8, 8) and np.isfinite(out.targets).all() and out.prefix_steps == 0
    assert {"preprocess", "sample", "decode", "total"} <= set(out.timings)
    if recipe == "flow":
        np.testing.assert_allclose(np.linalg.norm(out.targets[:, 3:7], axis=1), 1, atol=1e-9)
    np.testing.assert_array_equal(policy.infer(observation_of(), InferenceRequest(seed=3)).targets, out.targets)


def test_without_temperature_the_seed_says_nothing(policy_of, observation_of):
    def targets(policy, seed):
        return policy.infer(observation_of(), InferenceRequest(seed=seed)).targets

    warm, cold = policy_of("flow"), policy_of("flow", temperature=0.0)
    assert np.abs(targets(warm, 3) - targets(warm, 4)).max() > 1e-3
    np.testing.assert_array_equal(targets(cold, 3), targets(cold, 4))


def test_prefix_repeats_the_remainder_exactly(policy_of, observation_of):
    policy = policy_of("flow")
    remainder = policy.infer(observation_of(1), InferenceRequest(seed=1)).targets[2:]
    request = InferenceRequest(remainder, delay=3, execution_horizon=2, guidance="prefix", seed=2)
    out = policy.infer(observation_of(2), request)
    assert out.prefix_steps == 3 and np.array_equal(out.targets[:3], remainder[:3])


def test_prefix_is_no_longer_than_remainder_or_training(policy_of, observation_of):
    policy = policy_of("flow")
    remainder = policy.infer(observation_of(), InferenceRequest(seed=1)).targets
    for length, delay, steps in ((2, 3, 2), (8, 7, 4), (8, 0, 0)):
        request = InferenceRequest(remainder[:length], delay, 4, "prefix", seed=1)
        assert policy.infer(observation_of(), request).prefix_steps == steps


def test_guidance_pulls_towards_the_running_chunk(policy_of, observation_of):
    policy = policy_of("flow")
    remainder = policy.infer(observation_of(5), InferenceRequest(seed=9)).targets
    free = policy.infer(observation_of(6), InferenceRequest(seed=4)).targets
    guided = policy.infer(observation_of(6), InferenceRequest(remainder, 3, 3, "guided", seed=4)).targets
    assert np.linalg.norm((guided - remainder)[:3, :3]) < 0.6 * np.linalg.norm((free - remainder)[:3, :3])


def test_guidance_target_is_anchored_anew_and_padded_with_its_last_action(policy_of, observation_of):
    processor = policy_of("flow").processor
    _, anchor = processor.inputs(observation_of(3))
    remainder = np.repeat(anchor[None], 3, 0) + [[0, 0, 0.01 * k, 0, 0, 0, 0, 0] for k in range(3)]
    prefix = processor.prefix(InferenceRequest(remainder, 1, 2, "guided"), anchor)
    decoded = processor.targets(prefix.target[0], anchor)
    np.testing.assert_allclose(decoded[:3], remainder, atol=1e-6)
    np.testing.assert_allclose(decoded[3:], np.repeat(remainder[-1:], 5, 0), atol=1e-6)
    assert prefix.weights[0] == 1 and (prefix.weights[3:] == 0).all()


def test_prefix_weights_reach_no_further_than_the_remainder(policy_of, observation_of):
    processor = policy_of("flow").processor
    _, anchor = processor.inputs(observation_of())
    prefix = processor.prefix(InferenceRequest(anchor[None].repeat(2, 0), 1, 1, "guided", "ones"), anchor)
    assert prefix.weights.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"images": {}}, "camera 'scene'"), ({"state": {}}, "arm 'arm'"),
     ({"images": {"scene": np.zeros((4, 4), np.uint8)}}, r"image: expected \(H, W, 3\) uint8, found \(4, 4\)"),
     ({"images": {"scene": np.zeros((4, 4, 3))}}, r"image: expected .* uint8, found \(4, 4, 3\) float64")],
)  # fmt: skip
def test_observations_that_lack_something_are_refused(policy_of, observation_of, change, message):
    observation: PolicyObservation = dataclasses.replace(observation_of(), **change)
    with pytest.raises(PolicyError, match=message):
        policy_of("flow").infer(observation)


def test_wrong_instruction_guidance_and_remainder_are_refused(policy_of, observation_of):
    flow, act = policy_of("flow"), policy_of("act")
    with pytest.raises(TokenizerError, match="no word"):
        flow.infer(observation_of(instruction="dance"))
    with pytest.raises(PolicyError, match="guidance 'guided' is not supported"):
        act.infer(observation_of(), InferenceRequest(np.zeros((3, 8)), guidance="guided"))
    with pytest.raises(PolicyError, match=r"remainder: expected \(K, 8\)"):
        flow.infer(observation_of(), InferenceRequest(np.zeros((3, 7)), guidance="guided"))


def test_output_that_is_not_finite_is_refused(policy_of, observation_of):
    policy = policy_of("act")
    policy.network.action_out.bias.data.fill_(float("nan"))
    with pytest.raises(PolicyError, match="not finite"):
        policy.infer(observation_of())


def test_a_policy_with_a_lead_begins_with_what_was_measured(policy_of, observation_of):
    policy, plain = policy_of("flow", lead=1), policy_of("flow")
    out, without = (p.infer(observation_of(), InferenceRequest(seed=1)).targets for p in (policy, plain))
    _, anchor = policy.processor.inputs(observation_of())
    np.testing.assert_array_equal(out[0], anchor)
    np.testing.assert_array_equal(out[1:], without)


def test_with_a_lead_the_remainder_counts_from_the_observation_all_the_same(policy_of, observation_of):
    policy = policy_of("flow", lead=1)
    remainder = policy.infer(observation_of(1), InferenceRequest(seed=1)).targets[2:]
    request = InferenceRequest(remainder, delay=3, execution_horizon=2, guidance="prefix", seed=2)
    out = policy.infer(observation_of(2), request)
    assert out.prefix_steps == 3 and np.array_equal(out.targets[:3], remainder[:3])
