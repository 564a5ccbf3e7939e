"""Training: it learns, resumes exactly, stops when told, refuses what does not fit."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import vla_models  # noqa: E402
from test_origin import recorded  # noqa: E402
from vla_models.data import Dataset, WebData, fit_normalizers, split, vocabulary  # noqa: E402
from vla_models.episodes import DataError  # noqa: E402
from vla_models.origin import preset_origin  # noqa: E402
from vla_models.policy import (  # noqa: E402
    ArmState,
    CheckpointError,
    InferenceRequest,
    PolicyError,
    PolicyObservation,
)
from vla_models.preprocess import Processor  # noqa: E402
from vla_models.train import TrainConfig, main, make_spec, make_train_config, parse_settings, train  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(tiny, recipe, **changes):
    return TrainConfig(**({"batch": 16, "lr": 3e-3, "warmup": 5, "shift": 0, "jitter": 0.0, "interval": 20,
                           "average": 0.9, "validation": 0.2, "network": tiny[recipe]} | changes))  # fmt: skip


def observation(episode, tick=0):
    state = {"arm": ArmState(episode.anchor[tick][:7], episode.anchor[tick][:7], episode.anchor[tick][7])}
    return PolicyObservation({"scene": episode.images["scene"][tick]}, state, episode.instruction)


def test_flow_learns_to_go_to_the_square_that_the_instruction_names(spec_of, episodes_of, tiny, tmp_path):
    spec = spec_of("flow", vocabulary=())
    network = tiny["flow"] | {"channels": (16, 24), "blocks": (1, 1)}
    config = config_of(tiny, "flow", batch=24, interval=400, lr=4e-3, network=network)
    policy = train("flow", episodes_of(spec, 40, 4), spec, config, tmp_path, steps=220, quiet=True)
    unseen = episodes_of(spec, 8, seed=99)
    moves = [policy.infer(observation(e), InferenceRequest(seed=1)).targets[-1, 1] - e.anchor[0, 1] for e in unseen]
    wanted = [e.targets[0, -1, 1] - e.anchor[0, 1] for e in unseen]
    np.testing.assert_allclose(moves, wanted, atol=0.05)


def test_act_overfits_a_few_samples(spec_of, episodes_of, tiny, tmp_path):
    spec = spec_of("act", vocabulary=())
    episodes = [e for e in episodes_of(spec, 8) if e.instruction.startswith("take the red")]
    network = tiny["act"] | {"dropout": 0.0}
    config = config_of(tiny, "act", interval=400, validation=0.0, network=network)
    policy = train("act", episodes, spec, config, tmp_path, steps=200, quiet=True)
    for episode in episodes:
        got = policy.infer(observation(episode)).targets
        np.testing.assert_allclose(got[:, 1], episode.targets[0][:, 1], atol=0.03)


@pytest.mark.parametrize("recipe", ["flow", "act"])
def test_resumed_training_equals_an_uninterrupted_one(spec_of, episodes_of, tiny, tmp_path, recipe):
    spec = spec_of(recipe, vocabulary=())
    episodes, config = episodes_of(spec, 5, 4), config_of(tiny, recipe, batch=4, shift=2, jitter=0.2)
    whole = train(recipe, episodes, spec, config, tmp_path / "whole", 10, quiet=True)
    asked = []
    train(recipe, episodes, spec, config, tmp_path / "parts", 10, quiet=True,
          stop=lambda: asked.append(1) or len(asked) > 4)  # fmt: skip
    assert json.loads((tmp_path / "parts/policy.json").read_text())["facts"]["steps"] == 4
    parts = train(recipe, episodes, spec, config, tmp_path / "parts", 10, resume=True, quiet=True)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, parts.network.state_dict()[name]), name


def test_training_writes_a_loadable_checkpoint_a_log_and_a_plot(spec_of, episodes_of, tiny, tmp_path):
    spec = spec_of("flow", vocabulary=())
    episodes = episodes_of(spec, 5, 4)
    policy = train("flow", episodes, spec, config_of(tiny, "flow", interval=2), tmp_path, steps=4, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert {"lr", "elapsed", "train_loss", "validation_loss"} <= set(lines[0])
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*tmp"))
    request = InferenceRequest(seed=1)
    loaded = vla_models.load(tmp_path)
    np.testing.assert_array_equal(loaded.infer(observation(episodes[0]), request).targets,
                                  policy.infer(observation(episodes[0]), request).targets)  # fmt: skip
    facts = json.loads((tmp_path / "policy.json").read_text())["facts"]
    assert (facts["episodes"], facts["validation_episodes"]) == (4, 1)


def test_training_by_time_ends_in_time_with_the_schedule_at_its_end(spec_of, episodes_of, tiny, tmp_path, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr("vla_models.train.time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    spec, config = spec_of("flow", vocabulary=()), config_of(tiny, "flow", batch=2)
    train("flow", episodes_of(spec, 4, 4), spec, config, tmp_path, steps=1, minutes=6 / 60, quiet=True)
    last = json.loads((tmp_path / "policy.json").read_text())["facts"]["last"]
    assert (last["step"], last["elapsed"]) == (6, 6.0)
    assert last["lr"] == pytest.approx(0.01 * config.lr)


def test_resuming_with_other_settings_or_a_broken_state_is_refused(spec_of, episodes_of, tiny, tmp_path):
    spec = spec_of("flow", vocabulary=())
    episodes, config = episodes_of(spec, 4, 4), config_of(tiny, "flow", batch=2)
    train("flow", episodes, spec, config, tmp_path, 1, quiet=True)
    with pytest.raises(CheckpointError, match=r"other settings: \['period'\]"):
        train(
            "flow", episodes, spec_of("flow", vocabulary=(), period=0.1), config, tmp_path, 2, resume=True, quiet=True
        )
    state = tmp_path / "train_state.safetensors"
    state.write_bytes(state.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="train_state.safetensors: cut short"):
        train("flow", episodes, spec, config, tmp_path, 2, resume=True, quiet=True)


@pytest.fixture
def interrupted(spec_of, episodes_of, tiny, tmp_path, monkeypatch):
    """A training of 10 steps, ended after 4, with the spec that the command makes of its settings; and its settings."""
    monkeypatch.setattr("vla_models.train.load_episodes", lambda data, spec, *_: episodes_of(spec, 5, 4))
    monkeypatch.setattr("vla_models.train.signal.signal", lambda *_: None)
    values = {"cameras": {"scene": [24, 32]}, "horizon": 8, "batch": 4, "warmup": 3, "network": tiny["flow"]}
    config = make_train_config("flow", values)
    spec, asked = make_spec(config, "flow", "parts"), []
    train("flow", episodes_of(spec, 5, 4), spec, config, tmp_path / "parts", 10, seed=3, quiet=True,
          stop=lambda: asked.append(1) or len(asked) > 4)  # fmt: skip
    return tmp_path / "parts", spec, config


def test_resuming_needs_nothing_said_again(interrupted, episodes_of, tmp_path):
    folder, spec, config = interrupted
    train("flow", episodes_of(spec, 5, 4), spec, config, tmp_path / "whole", 10, seed=3, quiet=True)
    main(["--resume", "--data", "bags", "--out", str(folder), "network.layers=2", "horizon=8"])
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    facts = json.loads((folder / "policy.json").read_text())["facts"]
    assert (facts["steps"], facts["seed"], facts["budget"]) == (10, 3, {"steps": 10, "minutes": None})


def test_length_and_course_of_a_training_may_change_when_it_is_resumed(interrupted):
    folder, *_ = interrupted
    main(["--resume", "--data", "bags", "--out", str(folder), "--steps", "6", "lr=5e-4", "batch=2", "jitter=0.1"])
    facts = json.loads((folder / "policy.json").read_text())["facts"]
    assert (facts["steps"], facts["budget"]["steps"]) == (6, 6)
    assert [facts["train"][name] for name in ("lr", "batch", "jitter", "warmup")] == [5e-4, 2, 0.1, 3]
    assert facts["last"]["lr"] == pytest.approx(0.01 * 5e-4)


@pytest.mark.parametrize(("words", "message"), [
    (["horizon=16"], "horizon: expected 8, found 16"),
    (["validation=0.5"], "validation: expected 0.05, found 0.5"),
    (["network.width=64"], "network.width: expected 32, found 64"),
    (["cameras.wrist=[24, 32]"], "cameras.scene: expected (24, 32), found None"),
    (["--recipe", "act"], "recipe: expected 'flow', found 'act'"),
    (["--seed", "4"], "seed: expected 3, found 4"),
])  # fmt: skip
def test_what_the_policy_is_may_not_change_when_it_is_resumed(interrupted, words, message):
    folder, *_ = interrupted
    before = (folder / "policy.json").read_bytes()
    with pytest.raises(SystemExit) as end:
        main(["--resume", "--data", "bags", "--out", str(folder), *words])
    assert str(end.value) == f"train: checkpoint {folder}: was trained with other settings: {message}"
    assert (folder / "policy.json").read_bytes() == before


def test_resuming_without_a_training_is_refused(interrupted, tmp_path, capsys):
    folder, *_ = interrupted
    with pytest.raises(SystemExit, match="policy.json is missing"):
        main(["--resume", "--data", "bags", "--out", str(tmp_path / "none")])
    values = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps(values | {"facts": {}}))
    with pytest.raises(SystemExit, match="expected the settings of its training, found none"):
        main(["--resume", "--data", "bags", "--out", str(folder)])
    with pytest.raises(SystemExit):
        main(["--data", "bags", "--out", str(folder)])
    assert "--recipe is needed unless --init or --resume" in capsys.readouterr().err


def web_file(folder):
    """Three pictures of one colour each, with a question and an answer."""
    lines = []
    for name, colour in (("red", (200, 0, 0)), ("green", (0, 200, 0)), ("blue", (0, 0, 200))):
        cv2.imwrite(str(folder / f"{name}.png"), np.full((30, 40, 3), colour[::-1], np.uint8))
        lines.append(json.dumps({"image": f"{name}.png", "question": "which colour?", "answer": name}))
    (folder / "web.jsonl").write_text("\n".join(lines))
    return folder / "web.jsonl"


def test_pictures_with_text_are_trained_on_beside_the_robots_data(tmp_path):
    """Co-fine-tuning (RT-2): each step has as many samples of either; it goes on exactly after an interruption."""
    origin = preset_origin("rt2", "tiny")
    values = {"robot": "panda", "batch": 3, "lr": 1e-2, "warmup": 1, "validation": 0.0, "interval": 5}
    config = make_train_config("rt2", values | {"web": str(web_file(tmp_path))}, origin)
    spec = make_spec(config, "rt2", "x", origin.spec)
    whole = train("rt2", recorded(spec), spec, config, tmp_path / "whole", 30, quiet=True, origin=origin)
    lines = [json.loads(line) for line in (tmp_path / "whole/training.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["train_loss"] == pytest.approx((line["train_robot"] + line["train_web"]) / 2, rel=1e-5)
    assert lines[-1]["train_web"] < 0.6 * lines[0]["train_web"]
    asked = []
    train("rt2", recorded(spec), spec, config, tmp_path / "parts", 30, quiet=True, origin=origin,
          stop=lambda: asked.append(1) or len(asked) > 20)  # fmt: skip
    parts = train("rt2", recorded(spec), spec, config, tmp_path / "parts", 30, resume=True, quiet=True)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, parts.network.state_dict()[name]), name


def test_pictures_of_a_data_set_of_the_web(tmp_path):
    path = web_file(tmp_path)
    images, questions, answers = WebData(path).draw(16, 0, 3)
    assert set(questions) == {"which colour?"} and len(images) == 16
    for image, answer in zip(images, answers, strict=True):
        assert image.shape == (30, 40, 3) and ("red", "green", "blue")[int(image[0, 0].argmax())] == answer
    assert WebData(path).draw(16, 0, 3)[2] == answers != WebData(path).draw(16, 0, 4)[2]
    (tmp_path / "red.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="red.png: expected a picture"):
        WebData(path).draw(16, 0, 3)
    (tmp_path / "red.png").unlink()
    with pytest.raises(DataError, match=r"web.jsonl: 1 pictures are missing, first .*red.png"):
        WebData(path)
    for text in ("", "{", '{"image": "green.png"}', "[1]"):
        path.write_text(text)
        with pytest.raises(DataError, match="web.jsonl: expected lines of JSON with image, question and answer, found"):
            WebData(path)


def test_a_recipe_without_text_takes_no_pictures_of_the_web(spec_of, episodes_of, tiny, tmp_path):
    spec, config = spec_of("flow", vocabulary=()), config_of(tiny, "flow", web=str(web_file(tmp_path)))
    with pytest.raises(PolicyError, match="web: the recipe 'flow' takes no pictures with questions and answers"):
        train("flow", episodes_of(spec, 3, 4), spec, config, tmp_path / "out", 1, quiet=True)


def test_batches_come_through_the_preprocessing_of_use(spec_of, episodes_of, tiny):
    spec = spec_of("flow")
    episodes = episodes_of(spec, 4)
    processor = Processor(spec, fit_normalizers(episodes, spec, {"state": "mean_std", "action": "min_max"}))
    batch = Dataset(episodes, processor).batch([3])
    inputs, anchor = processor.inputs(observation(episodes[0], 3))
    image = np.moveaxis(batch["camera/scene"], -1, 1).astype(np.float32) / np.float32(255.0)
    np.testing.assert_array_equal(image, inputs.images[0])
    np.testing.assert_array_equal(batch["tokens"], inputs.tokens)
    np.testing.assert_allclose(batch["state"], inputs.state, atol=1e-6)
    np.testing.assert_allclose(processor.targets(batch["actions"][0], anchor), episodes[0].targets[3], atol=1e-6)


def test_draws_depend_on_seed_and_step_only(spec_of, episodes_of):
    spec = spec_of("flow")
    episodes = episodes_of(spec, 4)
    processor = Processor(spec, fit_normalizers(episodes, spec, {"state": "mean_std", "action": "mean_std"}))
    dataset = Dataset(episodes, processor, shift=3)
    first, again, other = dataset.draw(6, 1, 5), dataset.draw(6, 1, 5), dataset.draw(6, 1, 6)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["camera/scene"], other["camera/scene"])


def test_split_is_by_episode_and_keeps_all(spec_of, episodes_of):
    episodes = episodes_of(spec_of("flow"), 10, 2)
    training, held = split(episodes, 0.2, seed=1)
    assert (len(training), len(held)) == (8, 2)
    assert {e.name for e in training} | {e.name for e in held} == {e.name for e in episodes}


def test_one_instruction_for_all_needs_no_vocabulary(spec_of, episodes_of):
    episodes = episodes_of(spec_of("flow"), 4)
    assert vocabulary(episodes[:1]) == () and vocabulary(episodes) == ("", "blue", "cube", "red", "take", "the")


def test_settings_nest_by_dots_and_unknown_ones_are_refused():
    config = make_train_config("flow", parse_settings(["batch=8", "network.samples=4", "cameras.scene=[48, 64]"]))
    assert (config.batch, config.network, config.steps) == (8, {"samples": 4}, 5)
    assert make_spec(config, "flow", "x").cameras == {"scene": (48, 64)}
    with pytest.raises(PolicyError, match="unknown settings.*bach"):
        make_train_config("flow", {"bach": 1})
    with pytest.raises(PolicyError, match="unknown settings.*network.wide"):
        make_train_config("flow", parse_settings(["network.wide=3"]))


def test_numbers_are_read_as_people_write_them():
    settings = parse_settings(["lr=5e-4", "clip=10", "decay=1E-4", "network.prefix_share=1e-1", "gripper=[0, 4e-2]"])
    config = make_train_config("flow", settings)
    assert (config.lr, config.clip, config.decay, config.gripper) == (5e-4, 10.0, 1e-4, (0.0, 0.04))
    assert config.network == {"prefix_share": 0.1}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(TrainConfig)])
def test_every_setting_of_the_wrong_type_is_named_in_one_line(field):
    with pytest.raises(PolicyError, match=rf"^setting {field}: expected [^\n]+, found True$"):
        make_train_config("flow", parse_settings([f"{field}=true"]))


@pytest.mark.parametrize(("setting", "message"), [
    ("lr=fast", "setting lr: expected a number, found 'fast'"),
    ("batch=2.5", "setting batch: expected a whole number, found 2.5"),
    ("name=5", "setting name: expected text, found 5"),
    ("guidance=guided", "setting guidance: expected a list, found 'guided'"),
    ("guidance=[1]", "setting guidance[0]: expected text, found 1"),
    ("gripper=[0, 1, 2]", "setting gripper: expected a list of 2, found [0, 1, 2]"),
    ("cameras.scene=96", "setting cameras.scene: expected a list of 2, found 96"),
    ("cameras.scene=[96, wide]", "setting cameras.scene[1]: expected a whole number, found 'wide'"),
    ("network.blocks=[1]", "setting network.blocks: expected a list of 2, found [1]"),
    ("cameras=[1", "setting cameras: expected YAML, found"),
    ("lr", "setting: expected key=value, found 'lr'"),
])  # fmt: skip
def test_wrong_settings_say_what_was_expected_and_found(setting, message):
    with pytest.raises(PolicyError) as error:
        make_train_config("flow", parse_settings([setting]))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_settings_file_that_is_no_mapping_ends_the_command_with_one_line(tmp_path):
    (tmp_path / "settings.yaml").write_text("- lr\n")
    arguments = ["--recipe", "flow", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"^train: settings: expected key: value, found \['lr'\]$"):
        main([*arguments, "--config", str(tmp_path / "settings.yaml")])
    with pytest.raises(PolicyError, match="setting lr: expected key: value, found 1"):
        parse_settings(["lr=1", "lr.x=2"])


@pytest.mark.parametrize(("recipe", "robot"), [("flow", "panda"), ("act", "aloha")])
def test_recipes_state_defaults_that_fit_a_shipped_robot(recipe, robot):
    spec = make_spec(make_train_config(recipe, {}), recipe, "x")
    assert spec.robot == robot and spec.horizon * spec.period >= 1.6


def test_a_folder_without_bags_ends_the_command_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match="expected finished bags"):
        main(["--recipe", "flow", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert issubclass(DataError, ValueError)
