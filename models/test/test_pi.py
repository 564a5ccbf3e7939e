"""The recipes "pi0" and "pi05": LeRobot's numbers, its checkpoints, and what is particular to them."""

import dataclasses
import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import vla_models  # noqa: E402
from parity.fixture import Fixture  # noqa: E402
from test_recipes import make_batch, make_observation  # noqa: E402
from vla_models import build, policy_class  # noqa: E402
from vla_models.parts.flow import beta_times, draw_flow, draw_prefix, masked_mean, pad_last  # noqa: E402
from vla_models.parts.mixture import block_mask  # noqa: E402
from vla_models.policy import CheckpointError, InferenceRequest, PolicyError, example_spec  # noqa: E402
from vla_models.published import fill, translate  # noqa: E402
from vla_models.sampling import sample_flow  # noqa: E402
from vla_models.tokenizers import TextAnswer, decode_answer  # noqa: E402
from vla_models.torch_policy import Batch, Inputs, velocity_of  # noqa: E402

NAMES = ("pi0", "pi05")


@pytest.fixture(scope="module", params=NAMES)
def reference(request):
    return Fixture(request.param)


def make_policy(reference):
    """Our policy at the reference's size, with its weights."""
    kind = policy_class(reference.config["type"])
    tokenizer = {"tokenizer": "bytes", "prefix_limit": 0}
    spec, network, normalizers = kind.read_published(reference.path.parent, reference.config, reference)
    policy = kind(dataclasses.replace(spec, **tokenizer), normalizers, network)
    fill(policy.network, reference, kind.published)
    return policy


def inputs_of(reference):
    values = reference.inputs
    images = (values["base"], values["wrist"])
    return Inputs(images, values["tokens"], values["state"], values["present"])


def test_loss_and_actions_are_those_of_lerobot(reference):
    policy, values = make_policy(reference), reference.inputs
    with torch.no_grad():
        context = policy.network.encode(inputs_of(reference))
        loss = policy.network.flow_loss(context, values["actions"], values["noise"], 1 - values["time"][:, None])
        actions = sample_flow(velocity_of(policy.network, context), values["noise"], policy.steps)
    differences = [(found - reference.outputs[name]).abs().max().item()
                   for name, found in (("loss", loss), ("actions", actions))]  # fmt: skip
    print(reference.config["type"], differences)
    assert max(differences) < 1e-4


def tokenizer_file(folder):
    """A tokenizer.json that knows some words, with PaliGemma's special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "pick", "the", "cube"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def published(reference, folder, **changes):
    """A folder as LeRobot publishes it."""
    reference.write(folder, reference.config | changes)
    tokenizer_file(folder)
    return folder


def test_a_published_folder_gives_the_references_actions(reference, tmp_path):
    from safetensors.torch import save_file

    folder, values = published(reference, tmp_path), reference.inputs
    rng = np.random.default_rng(0)
    names = ("mean", "std") if reference.config["type"] == "pi0" else ("q01", "q99")
    statistics = {}
    for feature in ("observation.state", "action"):
        low = rng.normal(size=8).astype(np.float32)
        statistics |= {f"{feature}.{names[0]}": torch.from_numpy(low),
                       f"{feature}.{names[1]}": torch.from_numpy(np.abs(low) + 0.5)}  # fmt: skip
    save_file(statistics, folder / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    policy = vla_models.load(folder)
    spec = policy.spec
    assert spec.horizon == 8 and dict(spec.cameras) == {"base": (28, 28), "wrist": (28, 28)}
    assert spec.optional == ("wrist",) and spec.fit == "pad" and spec.context == 64 and spec.state_dim == 8
    with torch.no_grad():
        context = policy.network.encode(inputs_of(reference))
        actions = sample_flow(velocity_of(policy.network, context), values["noise"], policy.steps)
    torch.testing.assert_close(actions, reference.outputs["actions"], atol=1e-4, rtol=0)
    first, second = (statistics[f"action.{name}"].double().numpy() for name in names)
    raw = policy.processor.action.denormalize(np.ones(8))
    np.testing.assert_allclose(raw, first + second if names[0] == "mean" else second, atol=1e-6)
    assert set(policy.left_out) == {name for name in reference.weights if "gemma_expert.lm_head" in name}
    targets = policy.infer(make_observation(spec), InferenceRequest(seed=0))
    assert np.isfinite(targets.targets).all()


def test_a_base_model_without_statistics_changes_no_numbers(reference, tmp_path):
    policy = vla_models.load(published(reference, tmp_path))
    np.testing.assert_array_equal(policy.processor.state.normalize(np.arange(8.0)), np.arange(8.0))


def test_actions_relative_to_the_state_are_read(reference, tmp_path):
    changes = {"use_relative_actions": True, "relative_exclude_joints": ["gripper"]}
    policy = vla_models.load(published(reference, tmp_path, **changes))
    assert policy.spec.action_space.reference == "chunk"
    changes["relative_exclude_joints"] = []
    with pytest.raises(CheckpointError, match="relative_exclude_joints"):
        vla_models.load(published(reference, tmp_path, **changes))


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "settings", "tokenizer"])
def test_a_published_folder_with_a_fault_is_refused(reference, tmp_path, fault):
    folder = published(reference, tmp_path)
    weights = dict(reference.weights)
    name = next(name for name in weights if name.endswith("action_out_proj.bias"))
    message = {"missing": "1 tensors missing, first 'action_out.bias'", "extra": "'surprise'",
               "shape": re.escape(f"{name}: expected shape (32,), found (3,)"),
               "settings": "chunk_size", "tokenizer": "tokenizer.json"}[fault]  # fmt: skip
    if fault == "missing":
        del weights[name]
    elif fault == "extra":
        weights["surprise"] = torch.zeros(1)
    elif fault == "shape":
        weights[name] = torch.zeros(3)
    elif fault == "settings":
        config = {key: value for key, value in reference.config.items() if key != "chunk_size"}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        (folder / "tokenizer.json").unlink()
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        vla_models.load(folder)
    assert fault == "tokenizer" or isinstance(error.value, CheckpointError)


def test_the_published_names_at_full_depth_are_those_of_the_paper_network(reference):
    name = reference.config["type"]
    policy = build(name, "paper", device="meta")
    config = policy.config
    deep = set()
    for published_name in reference.weights:
        depth = config.vision_layers if "vision_tower" in published_name else config.layers
        stem = re.sub(r"layers\.\d+\.", "layers.{}.", published_name)
        deep |= {stem.format(i) for i in range(depth)}
    ours, left = translate(deep, type(policy).published)
    assert set(ours) == set(policy.network.state_dict())
    assert set(left) == {key for key in deep if "gemma_expert.lm_head" in key}


def test_bfloat16_shards_are_read(reference, tmp_path):
    from safetensors.torch import save_file

    folder = published(reference, tmp_path)
    (folder / "model.safetensors").unlink()
    names = sorted(reference.weights)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, part in shards.items():
        save_file({name: reference[name].bfloat16() for name in part}, folder / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = vla_models.load(folder).network.action_in.weight
    expected = reference[next(name for name in names if name.endswith("action_in_proj.weight"))]
    torch.testing.assert_close(weights, expected.bfloat16().float())


@pytest.fixture(scope="module", params=NAMES)
def policy(request):
    torch.manual_seed(0)
    policy = build(request.param)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def velocity(policy, inputs, x, tau):
    with torch.no_grad():
        return policy.network.velocity(policy.network.encode(inputs), x, tau)


def test_each_input_changes_the_velocity(policy):
    a, b = make_batch(policy, 1, 1).inputs, make_batch(policy, 1, 2).inputs
    b = b._replace(tokens=a.tokens.roll(1, 1))
    x, tau = torch.randn(1, 8, 32), torch.full((1, 1), 0.5)
    base = velocity(policy, a, x, tau)
    state = () if policy.spec.recipe == "pi05" else ("state",)
    for part in ("images", "tokens", *state):
        assert (velocity(policy, a._replace(**{part: getattr(b, part)}), x, tau) - base).abs().max() > 1e-5
    assert (velocity(policy, a, x, tau + 0.1) - base).abs().max() > 1e-5


def test_padding_behind_the_text_is_not_read(policy):
    inputs = make_batch(policy, 1).inputs
    longer = inputs._replace(tokens=torch.nn.functional.pad(inputs.tokens, (0, 5), value=policy.spec.padding))
    x, tau = torch.randn(1, 8, 32), torch.full((1, 1), 0.5)
    torch.testing.assert_close(velocity(policy, inputs, x, tau), velocity(policy, longer, x, tau), atol=1e-5, rtol=1e-4)


def test_a_camera_missing_from_one_sample_is_masked_in_that_one(policy):
    inputs = make_batch(policy, 2).inputs
    present = torch.tensor([[True, True], [True, False]])
    other = inputs._replace(images=(inputs.images[0], 1 - inputs.images[1]), present=present)
    x, tau = torch.randn(2, 8, 32), torch.full((2, 1), 0.5)
    a, b = velocity(policy, inputs._replace(present=present), x, tau), velocity(policy, other, x, tau)
    assert (a - b)[0].abs().max() > 1e-5
    torch.testing.assert_close(a[1], b[1])


def test_one_flow_time_for_all_actions_equals_one_for_each(policy):
    inputs, x = make_batch(policy, 2).inputs, torch.randn(2, 8, 32)
    one, each = torch.full((2, 1), 0.4), torch.full((2, 8), 0.4)
    torch.testing.assert_close(velocity(policy, inputs, x, one), velocity(policy, inputs, x, each))


def test_weights_in_bfloat16_give_nearly_the_same_float32_velocity(policy):
    network = type(policy.network)(policy.spec, policy.config)
    network.load_state_dict(policy.network.state_dict())
    inputs, x, tau = make_batch(policy, 2).inputs, torch.randn(2, 8, 32), torch.full((2, 1), 0.4)
    exact = velocity(policy, inputs, x, tau)
    network.bfloat16()
    with torch.no_grad():
        rough = network.velocity(network.encode(inputs), x, tau)
    assert rough.dtype == torch.float32
    assert ((rough - exact).norm() / exact.norm()).item() < 0.1


def test_padded_actions_do_not_count(policy):
    batch = make_batch(policy, 4)
    padded = batch.padded.clone()
    padded[:, 5:] = True
    # What they are still reaches the others through attention; only their own error is left out.
    draw = draw_flow(batch._replace(padded=padded), 32, torch.Generator().manual_seed(0))
    assert (draw.keep == ~padded).all()
    x = draw.noise + draw.tau[..., None] * (pad_last(batch.actions, 32) - draw.noise)
    error = (velocity(policy, batch.inputs, x, draw.tau) + draw.noise)[..., :8] - batch.actions
    with torch.no_grad():
        loss = policy.network.flow_loss(policy.network.encode(batch.inputs), batch.actions, *draw)
    torch.testing.assert_close(loss, error[:, :5].square().mean())
    ones = torch.ones(2, 3, 4)
    assert masked_mean(ones, torch.tensor([[1, 0, 0], [0, 0, 0]]) > 0) == 1.0
    assert masked_mean(ones, torch.zeros(2, 3, dtype=torch.bool)) == 0.0


def test_flow_times_follow_the_papers_distribution():
    tau = beta_times(20_000, torch.Generator().manual_seed(0))
    t = (1 - tau - 0.001) / 0.999
    assert tau.min() >= 0 and tau.max() < 1
    assert t.mean().item() == pytest.approx(0.6, abs=0.01)  # of Beta(1.5, 1)
    for q in (0.25, 0.5, 0.75):
        assert t.quantile(q).item() == pytest.approx(q ** (1 / 1.5), abs=0.015)


def test_prefixes_are_given_clean_and_left_out_of_the_loss():
    known = draw_prefix(4000, 10, 4, 0.5, torch.Generator().manual_seed(0))
    lengths = known.sum(1)
    assert (known == (torch.arange(10) < lengths[:, None])).all()
    counts = torch.bincount(lengths, minlength=5) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]), atol=0.02, rtol=0)
    inputs = Inputs((), torch.zeros(64, 1), torch.zeros(64, 1), torch.ones(64, 1) > 0)
    batch = Batch(inputs, torch.zeros(64, 10, 3), torch.zeros(64, 10, dtype=torch.bool))
    draw = draw_flow(batch, 5, torch.Generator().manual_seed(1), prefix_limit=4, prefix_share=1.0)
    assert draw.noise.shape == (64, 10, 5) and (draw.tau[~draw.keep] == 1).all() and (draw.tau[draw.keep] < 1).all()


def test_training_lowers_the_loss(policy):
    network = type(policy.network)(policy.spec, policy.config)
    batch = make_batch(policy, 4)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    losses = []
    for step in range(40):
        loss = network.loss(batch, torch.Generator().manual_seed(step % 4))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])


def test_cameras_must_be_square_and_alike():
    spec = example_spec("pi0", cameras={"a": (28, 28), "b": (28, 42)}, tokenizer="bytes")
    with pytest.raises(PolicyError, match="expected square images of one size, a multiple of 14"):
        build("pi0", dataclasses.asdict(build("pi0").config), spec=spec)


def test_a_robot_with_more_numbers_than_the_network_is_named():
    spec = example_spec("pi0", {"arm": 40}, {"a": (28, 28)}, tokenizer="bytes")
    with pytest.raises(PolicyError, match="expected at most 32 numbers of state"):
        build("pi0", dataclasses.asdict(build("pi0").config), spec=spec)


def test_pi05_reads_the_state_in_its_prompt():
    policy = build("pi05")
    tokens = policy.processor.tokens("pick", np.array([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0, 0.5, -0.5]))
    text = policy.processor.tokenizer.decode(tokens)
    assert text == "Task: pick, State: -1 0 128 255 255 255 192 64;\nAction: "


def make_talker():
    torch.manual_seed(0)
    policy = build("pi05", dataclasses.asdict(build("pi05").config) | {"subtask": 12})
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


def test_pi05_learns_to_say_a_subtask_and_acts_on_it():
    policy = make_talker()
    observation = make_observation(policy.spec)
    tokenizer = policy.processor.tokenizer
    said = [*tokenizer.encode("lift it").tolist()[1:8], tokenizer.END, 0, 0]
    inputs = policy.tensors(policy.asker.inputs(observation)[0])
    optimizer = torch.optim.AdamW(policy.network.parameters(), 3e-3)
    for _ in range(60):
        batch = Batch(inputs, torch.zeros(1, 8, 8), torch.zeros(1, 8, dtype=torch.bool))
        loss = policy.text_loss(batch, torch.tensor([said]))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert policy.subtask(observation) == "lift it" and loss.item() < 0.5
    request = InferenceRequest(seed=1)
    acted = policy.infer(observation, request).targets
    told = build("pi05", dataclasses.asdict(policy.config) | {"subtask": 0})
    told.network.load_state_dict(policy.network.state_dict())
    plain = told.infer(dataclasses.replace(observation, instruction="lift it"), request).targets
    np.testing.assert_array_equal(acted, plain)
    assert np.abs(told.infer(observation, request).targets - plain).max() > 1e-6


def test_generated_words_are_those_of_one_pass_over_all():
    policy = make_talker()
    network = policy.network
    inputs = policy.tensors(policy.asker.inputs(make_observation(policy.spec))[0])
    with torch.no_grad():
        logits, step = policy.ask(policy.asker.inputs(make_observation(policy.spec))[0])
        said = torch.tensor([decode_answer(TextAnswer(-1, len(logits), 6), logits, step, np.zeros(6), 0.0)])
        other = said.clone()
        other[0, 5] = (other[0, 5] + 7) % 256 + 3
        assert network.text_loss(inputs, other) > network.text_loss(inputs, said)
        tokens, valid = network.embedder.prefix(inputs)
        whole = torch.cat([tokens, network.embedder.words(said[:, :-1])], 1)
        there = torch.cat([valid, torch.ones(1, 5, dtype=torch.bool)], 1)
        blocks = torch.cat([torch.zeros(tokens.shape[1]), torch.arange(1, 6)]).long()
        hidden = network.mixture([whole, None], there.long().cumsum(1) - 1, block_mask(blocks, blocks, there))[0]
        again = network.embedder.logits(hidden[:, -5:]).argmax(-1)
    torch.testing.assert_close(again, said[:, 1:])
