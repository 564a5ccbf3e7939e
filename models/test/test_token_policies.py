"""RT-2 and RT-H: any language model of transformers behind them, answers in words, web data, corrections in words."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from vla_core.actions import ActionSpace  # noqa: E402
from vla_models import build, policy_class  # noqa: E402
from vla_models.parts.language_model import TINY_LANGUAGE, TINY_VISION, VisionLanguageModel  # noqa: E402
from vla_models.parts.motions import ACTION  # noqa: E402
from vla_models.policy import ArmState, InferenceRequest, PolicyError, PolicyObservation, example_spec  # noqa: E402
from vla_models.recipes.rt2 import integers  # noqa: E402
from vla_models.recipes.rth import RthPolicy  # noqa: E402
from vla_models.torch_policy import Batch  # noqa: E402

POSE = ActionSpace(("arm",), "pose", (), "chunk", "base", "rpy")
LANGUAGES = {
    "gemma": TINY_LANGUAGE,
    "llama": {"model_type": "llama", "vocab_size": 768, "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", "vocab_size": 768, "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma3": {"model_type": "gemma3_text", "vocab_size": 768, "hidden_size": 32, "intermediate_size": 48,
               "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}  # fmt: skip
DINO = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}


def settings(name: str, **changes) -> dict:
    return dataclasses.asdict(policy_class(name).preset("tiny")[1]) | changes


def observe(spec, seed: int = 0, instruction: str = "pick the cup") -> PolicyObservation:
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (*size, 3), np.uint8) for name, size in spec.cameras.items()}
    tool = np.array([0.4, 0.1, 0.3, 1.0, 0.0, 0.0, 0.0])
    state = {arm: ArmState(rng.normal(size=len(spec.joints[arm])), tool, 0.5) for arm in spec.arms}
    return PolicyObservation(images, state, instruction)


def batch_of(policy, count: int = 2, seed: int = 0) -> Batch:
    rows = [policy.tensors(policy.processor.inputs(observe(policy.spec, seed + k))[0]) for k in range(count)]
    images = tuple(torch.cat([row.images[i] for row in rows]) for i in range(len(rows[0].images)))
    rest = (torch.cat([getattr(row, name) for row in rows]) for name in ("tokens", "state", "present"))
    actions = 2 * torch.rand(count, policy.spec.horizon, policy.spec.action_dim) - 1
    inputs = type(rows[0])(images, *rest)
    return Batch(inputs, actions, torch.zeros(count, policy.spec.horizon, dtype=torch.bool))


@pytest.fixture(scope="module")
def rt2():
    torch.manual_seed(0)
    return build("rt2")


@pytest.fixture
def rth() -> RthPolicy:
    torch.manual_seed(0)
    return build("rth")


# ------------------------------------------------------------------------------------------------ language models


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("name", LANGUAGES)
def test_steps_give_what_one_pass_gives(name, bidirectional):
    """With any decoder: what the cache holds is what a pass over the whole answer computes; padding is not seen."""
    torch.manual_seed(0)
    vision, projector = (DINO, "mlp") if name == "llama" else (TINY_VISION, "linear")
    policy = build("rt2", settings("rt2", language=LANGUAGES[name], vision=vision, projector=projector,
                                   tied=name != "llama", bidirectional=bidirectional))  # fmt: skip
    network, batch = policy.network, batch_of(policy)
    tokens = torch.randint(3, 700, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        keys, valid, first = network.encode(batch.inputs)
        tail, found = network.blank(keys), [first]
        for i in range(5):
            logits, tail = network.step(keys, valid, tail, tokens[:, i], torch.full((2,), i))
            found.append(logits)
        start = torch.full((2, 1), policy.config.start)
        hidden, _, _ = network.hidden(batch.inputs, torch.cat([start, tokens], 1))
        whole = network.vlm.logits(hidden[:, -6:])
    assert not valid.all()  # the question is shorter than the context
    torch.testing.assert_close(torch.stack(found, 1), whole, atol=1e-4, rtol=1e-4)


def test_it_is_paligemma():
    """The same weights in transformers' own PaliGemma give the same logits. Found: 1e-7."""
    torch.manual_seed(0)
    ours = VisionLanguageModel(TINY_LANGUAGE, TINY_VISION, [(28, 28)]).eval()
    config = transformers.PaliGemmaConfig(
        vision_config=dict(TINY_VISION, image_size=28, projection_dim=32), projection_dim=32, image_token_index=700,
        text_config=dict(TINY_LANGUAGE, num_image_tokens=4, pad_token_id=0),
    )  # fmt: skip
    theirs = transformers.PaliGemmaForConditionalGeneration(config).eval()
    theirs.model.vision_tower.load_state_dict(ours.vision.state_dict())
    theirs.model.language_model.load_state_dict(ours.language.state_dict())
    theirs.model.multi_modal_projector.linear.load_state_dict(ours.projector.state_dict())
    theirs.tie_weights()
    image, text = torch.rand(1, 3, 28, 28), torch.randint(3, 600, (1, 6))
    ids = torch.cat([torch.full((1, 4), 700), text], 1)
    with torch.no_grad():
        expected = theirs(
            input_ids=ids, pixel_values=2 * image - 1, attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),
        ).logits[:, -1]  # fmt: skip
        embedded = torch.cat([ours.see(image), ours.read(text)], 1)
        places = torch.arange(10)[None]
        hidden, _ = ours(embedded, places, torch.ones(1, 10, 10, dtype=torch.bool))
        found = ours.logits(hidden[:, -1])
    print(f"largest difference {(found - expected).abs().max():.1e}")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"language": {"model_type": "nothing"}}, "network.language"),
        ({"projector": "round"}, "projector"),
        ({"bins": 300, "words": ()}, "fits|found|words|tokens"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused(wrong, message):
    if "bins" in wrong:
        wrong = wrong | {"skip": 700}
    with pytest.raises(ValueError, match=message):
        build("rt2", settings("rt2", **wrong))


def test_cameras_that_the_tower_cannot_see_are_refused():
    spec = example_spec("rt2", cameras={"scene": (28, 42)}, **policy_class("rt2").contract)
    with pytest.raises(PolicyError, match="squares of one size"):
        build("rt2", settings("rt2"), spec=spec)


# ------------------------------------------------------------------------------------------------ RT-2


def test_only_words_of_actions_are_said(rt2):
    rt2.infer(observe(rt2.spec))
    first = rt2.network.vlm.vocabulary - 1 - rt2.config.skip
    assert len(rt2.tokens) == 1 + rt2.spec.action_dim
    assert all(first - 255 <= token <= first for token in rt2.tokens)
    assert rt2.tokens[0] in (first, first - 1) and rt2.terminated == (rt2.tokens[0] == first - 1)


def test_actions_can_be_written_as_integers(rt2):
    """The words are found with the policy's own tokeniser; the answer reads as in the paper."""
    words = integers(rt2.processor.tokenizer)
    policy = build("rt2", settings("rt2", words=words))
    policy.infer(observe(policy.spec))
    numbers = policy.processor.tokenizer.decode(policy.tokens).split()
    assert len(numbers) == 1 + policy.spec.action_dim and all(0 <= int(number) <= 255 for number in numbers)
    assert numbers[0] in ("0", "1")
    policy.network.loss(batch_of(policy), torch.Generator())["loss"].backward()


def test_a_chunk_at_the_end_of_an_episode_terminates(rt2):
    policy = build("rt2", settings("rt2"), spec=dataclasses.replace(rt2.spec, horizon=2))
    batch = batch_of(policy)
    batch.padded[1, 1] = True
    tokens, counted = policy.network.answers(batch)
    assert [policy.network.answer.leading(row) for row in tokens.tolist()] == [0, 1]
    assert counted.sum(1).tolist() == [17, 9]


def test_web_data_join_the_loss(rt2):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 60, 3), np.uint8) for _ in range(2)]
    web = rt2.web_batch(images, ["what is on the table?", "how many?"], ["a red cup", "two"])
    assert web.counted.sum(1).tolist() == [10, 4] and web.inputs.images[0].shape == (2, 3, 28, 28)
    batch = batch_of(rt2)
    both = rt2.network.loss(batch, torch.Generator(), web)
    assert both["loss"].item() == pytest.approx((both["robot"] + both["web"]).item() / 2)
    # The network learns to answer, and the actions' loss is as without the web.
    assert both["robot"].item() == pytest.approx(rt2.loss(batch)["loss"].item())
    network = build("rt2").network
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(15):
        optimiser.zero_grad()
        losses = network.loss(batch, torch.Generator(), web)
        losses["loss"].backward()
        optimiser.step()
    assert losses["web"] < 0.7 * both["web"] and losses["robot"] < both["robot"]


def test_a_temperature_draws_by_the_requests_seed(rt2):
    warm = build("rt2", settings("rt2"), spec=dataclasses.replace(rt2.spec, temperature=1.0))
    observation = observe(warm.spec)
    one, again, other = (warm.infer(observation, InferenceRequest(seed=seed)).targets for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


# ------------------------------------------------------------------------------------------------ RT-H


def pose_policy(**changes) -> RthPolicy:
    spec = dataclasses.replace(build("rth").spec, action_space=POSE, state="pose", horizon=4)
    return build("rth", settings("rth"), spec=dataclasses.replace(spec, **changes))


@pytest.mark.parametrize(
    "end, phrase",
    [
        ([0.1, 0, 0, 0, 0, 0, 0.5], "move arm forward"),
        ([-0.1, 0.08, 0, 0, 0, 0, 0.5], "move arm backward and left"),
        ([0.1, 0.01, -0.1, 0, 0, 0, 1.0], "move arm forward and down and open gripper"),
        ([0, 0, 0.02, 0, 0, -0.4, 0.1], "move arm up and turn right and close gripper"),
        ([0, 0, 0, 0.2, 0.1, 0, 0.5], "roll right"),
        ([0.001, 0, 0, 0, 0, 0.01, 0.55], "stay"),
    ],
)
def test_a_movement_is_put_in_words(end, phrase):
    """end: where the chunk ends, relative to the tool: m, rad, opening; the gripper was half open."""
    policy = pose_policy()
    actions = np.linspace(0, 1, 5)[1:, None] * np.array(end)
    actions[:, -1] = end[-1]
    state = np.array([0.4, 0.0, 0.3, 1, 0, 0, 0, 1, 0, 0.5])
    assert policy.motions.of(actions, state) == [phrase]
    assert policy.motions.read(policy.motions.spell([phrase])) == phrase


def test_joint_targets_are_put_in_words(rth):
    """Absolute targets count from where the joints are."""
    state = np.array([0.0, 0.5, 0, 0, 0, 0, 0, 0.0])
    actions = np.array([[0.0, 0.1, 0.2, 0, 0, 0, 0, 0.9]])
    assert rth.motions.of(actions, state) == ["turn joint 2 back and open gripper"]
    assert rth.motions.of(state[None], state) == ["stay"]


def test_two_arms_have_a_phrase_each():
    arms = ("left", "right")
    spec = example_spec("rth", {"left": 2, "right": 3}, {"scene": (28, 28)}, **RthPolicy.contract, horizon=1)
    policy = build("rth", settings("rth"), spec=spec)
    assert policy.spec.arms == arms
    actions, state = np.zeros((1, 7)), np.zeros(7)
    actions[0, 0], actions[0, 4] = 0.5, -0.5
    phrases = policy.motions.of(actions, state)
    assert phrases == ["turn joint 1 forward", "turn joint 2 back"]
    assert policy.motions.read(policy.motions.spell(phrases)) == "turn joint 1 forward; turn joint 2 back"
    policy.infer(observe(spec))
    assert policy.motion.count("; ") == 1


def test_the_second_question_has_task_and_motion(rth):
    first = rth.processor.tokens("pick the cup", np.zeros(8))
    second = rth.motions.question(first, "stay")
    assert rth.processor.tokenizer.decode(second) == ACTION.format(task="pick the cup", motion="stay")


def test_a_correction_takes_the_place_of_the_motion(rth):
    asked = []
    generate, ask = rth.generate, rth.motions.question
    rth.generate = lambda inputs, answer, *rest: asked.append(answer) or generate(inputs, answer, *rest)
    observation = observe(rth.spec)
    rth.infer(observation)
    predicted = rth.motion
    assert asked == [rth.motions.answer, rth.network.answer] and predicted in rth.motions.phrases[0]
    asked.clear()
    questions = []
    rth.motions.question = lambda tokens, motion: questions.append(motion) or ask(tokens, motion)
    rth.correct("  go a bit\nmore to the left ")
    rth.infer(observation)
    assert asked == [rth.network.answer] and questions == ["go a bit more to the left"] == [rth.motion]
    rth.correct("")
    rth.infer(observation)
    assert rth.motion == predicted
    rth.correct("stop")
    rth.reset()
    rth.infer(observation)
    assert rth.motion == predicted


def test_a_correction_is_heard(rth):
    """Each word of it changes what the network thinks of the first token of the actions."""
    heard, encode = [], rth.network.encode

    def listen(inputs):
        keys, valid, logits = encode(inputs)
        heard.append(logits)
        return keys, valid, logits

    rth.network.encode = listen
    for words in ("turn joint 1 forward", "turn joint 1 back", "turn joint 2 back"):
        rth.correct(words)
        rth.infer(observe(rth.spec))
    assert len(heard) == 3
    assert min((heard[i] - heard[i - 1]).abs().max() for i in range(3)) > 1e-5


def test_a_correction_that_is_too_long_is_refused(rth):
    with pytest.raises(PolicyError, match="correction: .* at most 192 tokens"):
        rth.correct("left " * 50)
    assert rth.correction == ""
    rth.correct("left " * 20)  # fits beside no task, but not beside a long one
    with pytest.raises(PolicyError, match="at most 192 tokens"):
        rth.infer(observe(rth.spec, instruction="pick the cup " * 5))


def test_policies_without_language_motion_take_no_correction(rt2):
    with pytest.raises(PolicyError, match="takes no corrections"):
        rt2.correct("left")


def test_both_answers_join_the_loss(rth):
    losses = rth.loss(batch_of(rth))
    assert losses["loss"].item() == pytest.approx((losses["motion"] + losses["action"]).item() / 2)
