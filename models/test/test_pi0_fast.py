"""pi0-FAST gives the numbers of LeRobot's, reads its checkpoints, and never takes a broken answer for actions."""

import dataclasses
import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from parity.fixture import Fixture  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from vla_models import build, load  # noqa: E402
from vla_models.policy import (  # noqa: E402
    ArmState,
    CheckpointError,
    InferenceRequest,
    PolicyError,
    PolicyObservation,
    example_spec,
)
from vla_models.published import fill, translate  # noqa: E402
from vla_models.recipes.pi0_fast import Pi0FastConfig, Pi0FastNetwork, Pi0FastPolicy  # noqa: E402
from vla_models.tokenizers import FastTokenizer  # noqa: E402
from vla_models.torch_policy import Batch, Inputs  # noqa: E402
from vla_models.train import TrainConfig, train  # noqa: E402

ROOT = "model.paligemma_with_expert.paligemma."
HEAD, EMBEDDING = ROOT + "lm_head.weight", ROOT + "model.language_model.embed_tokens.weight"
HORIZON, NUMBERS, LENGTH = 4, 8, 48


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture("pi0_fast")


@pytest.fixture(scope="module")
def fast(fixture) -> FastTokenizer:
    said = json.loads(fixture.metadata["fast_processor"])
    bpe = json.loads(fixture.metadata["fast_tokenizer"])
    values = {"scale": said["scale"], "min_token": said["min_token"], "shape": None, "bpe": bpe}
    return FastTokenizer.from_dict({"format": "vla-fast/1"} | values)


@pytest.fixture(scope="module")
def network(fixture, fast) -> Pi0FastNetwork:
    config = Pi0FastConfig(
        16, 24, 2, 16, width=32, mlp=48, layers=2, heads=8, head_dim=8, vocabulary=512, fast=fast.to_dict(), skip=16,
        lead=(4, 20, 50), end=(49, 1), length=LENGTH, free=True, start_seen=True, tied=False,
    )  # fmt: skip
    cameras = dict.fromkeys("ab", (28, 28))
    contract = Pi0FastPolicy.contract | {"horizon": HORIZON, "context": 64}
    network = Pi0FastNetwork(example_spec("pi0_fast", {"arm": 7}, cameras, **contract), config).eval()
    assert fill(network, fixture, Pi0FastPolicy.published) == {}
    return network


def inputs_of(fixture) -> Inputs:
    given = fixture.inputs
    return Inputs(tuple(given["images"].unbind(1)), given["text"], given["state"], given["present"].bool())


def test_loss_is_the_references(fixture, network):
    """One camera of the second sample is missing; the answers are swapped, so that the loss is large. Found: 3e-7."""
    actions = fixture.inputs["actions"].roll(1, 0)
    batch = Batch(inputs_of(fixture), actions, torch.zeros(2, HORIZON, dtype=torch.bool))
    with torch.no_grad():
        loss = network.loss(batch, torch.Generator())["loss"]
    print(f"loss {loss:.4f}, difference {abs(loss - fixture.outputs['loss']):.1e}")
    assert loss > 0.5
    torch.testing.assert_close(loss, fixture.outputs["loss"], atol=1e-4, rtol=0)


def test_answers_are_laid_out_as_the_references(fixture, network):
    for k in range(2):
        ours = network.answer.encode(fixture.inputs["actions"][k].numpy())
        theirs = fixture.outputs["answer"][k][fixture.outputs["answer_mask"][k].bool()]
        np.testing.assert_array_equal([network.start, *ours], theirs)


def test_greedy_tokens_are_the_references(fixture, network):
    inputs = inputs_of(fixture)
    said = []
    with torch.no_grad():
        keys, valid, logits = network.encode(inputs)
        tail = network.blank(keys)
        for i in range(20):
            said.append(logits.argmax(-1))
            logits, tail = network.step(keys, valid, tail, said[-1], torch.full((2,), i))
    for ours, theirs in zip(torch.stack(said, 1), fixture.outputs["tokens"], strict=True):
        end = theirs.tolist().index(49)  # greedy decoding ends here
        assert 10 < end < 20
        torch.testing.assert_close(ours[: end + 1], theirs[: end + 1])


def test_fast_tokens_are_the_references(fixture, fast):
    lengths = fixture.outputs["fast_lengths"].tolist()
    theirs = fixture.outputs["fast"].split(lengths)
    for chunk, tokens, decoded in zip(fixture.inputs["chunks"], theirs, fixture.outputs["chunks"], strict=True):
        np.testing.assert_array_equal(fast.encode(chunk.numpy()), tokens)
        np.testing.assert_allclose(fast.decode(tokens.numpy(), (HORIZON, NUMBERS)), decoded, atol=1e-12)


# ------------------------------------------------------------------------------------------------- checkpoints


def published(fixture, folder, weights=None):
    """A folder as LeRobot saves it, with both tokenisers."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights or fixture.weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fixture.config))
    (folder / "tokenizer.json").write_text(fixture.metadata["text_tokenizer"])
    (folder / "fast").mkdir()
    (folder / "fast" / "tokenizer.json").write_text(fixture.metadata["fast_tokenizer"])
    (folder / "fast" / "processor_config.json").write_text(fixture.metadata["fast_processor"])
    numbers = {"mean": fixture.inputs["mean"], "std": fixture.inputs["std"]}
    unit = {"mean": torch.zeros(NUMBERS), "std": torch.ones(NUMBERS)}
    statistics = {f"{feature}.{name}": value for feature, values in (("observation.state", numbers), ("action", unit))
                  for name, value in values.items()}  # fmt: skip
    save_file(statistics, folder / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    return folder


def observation(fixture, index: int) -> PolicyObservation:
    images = {name: (255 * fixture.inputs["images"][index, i]).round().byte().movedim(0, -1).numpy()
              for i, name in enumerate("ab") if fixture.inputs["present"][index, i]}  # fmt: skip
    state = fixture.inputs["state"][index].double().numpy()
    tool = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    arm = {"arm": ArmState(state[:7], tool, float(state[7]))}
    return PolicyObservation(images, arm, json.loads(fixture.metadata["tasks"])[index].replace("_", " "))


def test_a_published_folder_gives_the_references_actions(fixture, tmp_path):
    """From images, state and words to joints: the whole way. The gripper is clipped to its range by the stack."""
    policy = load(published(fixture, tmp_path))
    assert policy.spec.horizon == HORIZON and policy.spec.optional == ("b",) and not policy.config.tied
    assert (policy.config.lead, policy.config.end, policy.config.start) == ((4, 20, 50), (49, 1), 2)
    for k in range(2):
        targets = policy.infer(observation(fixture, k), InferenceRequest(seed=0)).targets
        np.testing.assert_allclose(targets[:, :7], fixture.outputs["decoded"][k, :, :7], atol=1e-4)


def test_tied_weights_that_were_saved_once_are_read(fixture, tmp_path):
    weights = {name: value for name, value in fixture.weights.items() if name != EMBEDDING}
    policy = load(published(fixture, tmp_path, weights))
    assert policy.config.tied and policy.left_out == {HEAD: "the embedding again"}
    torch.testing.assert_close(policy.network.vlm.embedder.embedding.weight.detach(), fixture.weights[HEAD])


@pytest.mark.parametrize("fault, message", [("missing", "missing"), ("extra", "unknown"), ("shape", "expected shape")])
def test_tensors_that_do_not_fit_are_named(fixture, tmp_path, fault, message):
    weights, name = dict(fixture.weights), ROOT + "model.language_model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "extra":
        weights[ROOT + "model.language_model.surprise"] = torch.zeros(1)
    else:
        weights[name] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=message):
        load(published(fixture, tmp_path, weights))


def test_a_folder_without_its_tokenisers_is_refused(fixture, tmp_path):
    folder = published(fixture, tmp_path)
    (folder / "fast" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="FAST"):
        load(folder)
    (folder / "fast" / "tokenizer.json").write_text(fixture.metadata["fast_tokenizer"])
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        load(folder)


def test_the_rules_cover_the_published_size(fixture):
    """The tiny names with 18 language and 27 vision layers are exactly those of the paper's network."""
    names = set()
    for name in fixture.weights:
        layers = 27 if "vision_tower" in name else 18
        names |= {re.sub(r"layers\.\d+", f"layers.{k}", name) for k in range(layers)}
    ours, _ = translate(names, Pi0FastPolicy.published)
    paper = build("pi0_fast", dataclasses.asdict(Pi0FastConfig(tied=False)), "meta", Pi0FastPolicy.preset("paper")[0])
    assert set(ours) == set(paper.network.state_dict())


# ------------------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def tiny() -> Pi0FastPolicy:
    torch.manual_seed(0)
    return build("pi0_fast")


def noise(policy, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(policy.noise_shape).astype(np.float32)


def some_inputs(policy):
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (*size, 3), np.uint8) for name, size in policy.spec.cameras.items()}
    arm = {"arm": ArmState(rng.normal(size=7), np.array([0.0, 0, 0, 0, 0, 0, 1]), 0.5)}
    return policy.processor.inputs(PolicyObservation(images, arm, "pick"))[0]


def test_what_a_network_that_learnt_nothing_says_is_still_a_chunk(tiny):
    """Only tokens with which the answer can become a chunk are taken; whole characters of any length are."""
    warm = build("pi0_fast", spec=dataclasses.replace(tiny.spec, temperature=1.0))
    chunks = [warm.run(some_inputs(warm), noise(warm, seed), None, {}) for seed in range(3)]
    assert all(np.isfinite(chunk).all() and np.ptp(chunk) > 0 for chunk in chunks)
    assert not np.allclose(chunks[0], chunks[1])


def test_an_answer_that_is_no_chunk_is_an_error_and_not_zeros(tiny):
    settings = dataclasses.asdict(dataclasses.replace(tiny.config, free=True))
    free = build("pi0_fast", settings, spec=tiny.spec)
    with pytest.raises(PolicyError, match="no chunk of actions"):
        free.run(some_inputs(free), noise(free, 0), None, {})


def test_a_tokeniser_that_does_not_fit_is_refused(tiny):
    other = dataclasses.asdict(tiny.config) | {"fast": FastTokenizer.unfitted((5, 8)).to_dict()}
    with pytest.raises(PolicyError, match=r"chunks of \(8, 8\), found \(5, 8\)"):
        build("pi0_fast", other, spec=tiny.spec)
    with pytest.raises(PolicyError, match="at most"):
        build("pi0_fast", dataclasses.asdict(tiny.config) | {"skip": 600}, spec=tiny.spec)
    with pytest.raises(PolicyError, match="FAST tokeniser"):
        build("pi0_fast", dataclasses.asdict(tiny.config) | {"fast": {"format": "vla-fast/1"}}, spec=tiny.spec)


def test_the_tokeniser_is_fitted_to_the_recorded_chunks(tiny):
    chunks = np.cumsum(np.random.default_rng(0).normal(0, 0.1, (50, 8, 8)), 1)
    settings = Pi0FastPolicy.fitted({"merges": 300}, lambda: chunks)
    fitted = FastTokenizer.from_dict(settings["fast"])
    assert 257 <= fitted.vocabulary <= 300 and fitted.shape == (8, 8)
    assert len(fitted.encode(chunks[0])) < 64
    assert Pi0FastPolicy.fitted(settings, lambda: pytest.fail("it has one already")) is settings


def test_a_training_fits_the_tokeniser_and_goes_on_with_it(tiny, spec_of, episodes_of, tmp_path):
    """It lies in policy.json beside the weights: loading and resuming find it there."""
    contract = {name: getattr(tiny.spec, name) for name in ("prompt", "tokenizer", "context", "temperature", "fit")}
    spec = spec_of("pi0_fast", cameras={"base": (28, 28)}, **contract)
    episodes = [dataclasses.replace(episode, images={"base": episode.images.pop("scene")})
                for episode in episodes_of(spec_of("act", cameras={"scene": (28, 28)}), 4, 4)]  # fmt: skip
    settings = dataclasses.asdict(tiny.config) | {"merges": 300}
    config = TrainConfig(batch=4, warmup=1, shift=0, jitter=0.0, interval=2, validation=0.0, network=settings)
    policy = train("pi0_fast", episodes, spec, config, tmp_path, steps=2, quiet=True)
    assert policy.config.fast["shape"] == [8, 8]
    after = load(tmp_path)
    assert after.config.fast == policy.config.fast
    resumed = dataclasses.replace(config, network=dataclasses.asdict(after.config))
    more = train("pi0_fast", episodes, spec, resumed, tmp_path, steps=3, resume=True, quiet=True)
    assert more.config.fast == policy.config.fast


def test_step_after_step_gives_what_one_pass_gives(tiny):
    """The cache of the answer holds what a pass over the whole of it computes."""
    tokens = torch.randint(3, 700, (1, 6), generator=torch.Generator().manual_seed(0))
    inputs = tiny.tensors(some_inputs(tiny))
    with torch.no_grad():
        keys, valid, first = tiny.network.encode(inputs)
        tail, found = tiny.network.blank(keys), [first]
        for i in range(6):
            logits, tail = tiny.network.step(keys, valid, tail, tokens[:, i], torch.tensor([i]))
            found.append(logits)
        start = torch.full((1, 1), tiny.config.start)
        hidden, _, _ = tiny.network.hidden(inputs, torch.cat([start, tokens], 1))
        whole = tiny.network.vlm.logits(hidden[:, -7:])
    torch.testing.assert_close(torch.stack(found, 1), whole, atol=1e-4, rtol=1e-4)
