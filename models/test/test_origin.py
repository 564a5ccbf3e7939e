"""A training begins with a preset, with a published checkpoint or with one of ours; the robot and the data are new."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import vla_models  # noqa: E402
from parity.fixture import Fixture  # noqa: E402
from test_pi import tokenizer_file  # noqa: E402
from vla_core.robot import load_robot  # noqa: E402
from vla_models import RECIPES, policy_class  # noqa: E402
from vla_models.convert import main as convert  # noqa: E402
from vla_models.episodes import Episode  # noqa: E402
from vla_models.origin import find_origin, place_cameras, preset_origin  # noqa: E402
from vla_models.policy import CheckpointError, InferenceRequest, PolicyError, example_spec  # noqa: E402
from vla_models.train import main, make_spec, make_train_config, train  # noqa: E402
from vla_policy.contract import mismatches  # noqa: E402

#: A flow that published checkpoints fill, one that learns from video, one of each other kind of head.
QUICK = ("act", "fast_wam", "pi0", "rt2")
#: One step that changes nothing.
STILL = {"batch": 2, "validation": 0.0, "lr": 0.0}


def recorded(spec, count: int = 3, ticks: int = 4) -> list[Episode]:
    """Episodes of random pictures and movements for any specification; optional cameras were not recorded."""
    rng = np.random.default_rng(0)
    out = []
    for k in range(count):
        targets = rng.normal(size=(ticks, spec.horizon, spec.target_dim)).astype(np.float32)
        if spec.action_space.kind == "pose":
            targets[..., 3:7] = 1, 0, 0, 0
        images = {name: rng.integers(0, 256, (ticks, *size, 3), np.uint8)
                  for name, size in spec.cameras.items() if name not in spec.optional}  # fmt: skip
        state, words = np.tile(rng.normal(size=spec.state_dim), (ticks, 1)), ("pick the cube", "take the cube")[k % 2]
        out.append(Episode(f"episode_{k}", words, images, state, targets[:, 0].astype(float), targets,
                           np.full(ticks, spec.horizon), 0.1 * np.arange(ticks)))  # fmt: skip
    return out


def run(origin, out, **settings):
    """One training step from an origin, as the command takes it."""
    config = make_train_config(origin.recipe, STILL | {"robot": "panda"} | settings, origin)
    spec = make_spec(config, origin.recipe, out.name, origin.spec)
    return train(origin.recipe, recorded(spec), spec, config, out, 1, quiet=True, origin=origin)


@pytest.fixture
def command(monkeypatch):
    """The command, which finds recorded episodes for whatever specification it makes."""
    monkeypatch.setattr("vla_models.train.load_episodes", lambda data, spec, *_: recorded(spec))
    monkeypatch.setattr("vla_models.train.signal.signal", lambda *_: None)
    return lambda *words: main(["--data", "bags", *map(str, words)])


def published(folder):
    """LeRobot's pi0 with two cameras and 8 numbers, at the size of the parity fixture."""
    Fixture("pi0").write(folder)
    tokenizer_file(folder)
    return folder


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(RECIPES)]
)
def test_every_recipe_is_trained_from_a_preset_and_tuned_from_what_came_of_it(name, tmp_path):
    first = run(preset_origin(name, "tiny"), tmp_path / "first", **{"rotation": "rot6d"} if name == "rdt" else {})
    robot = load_robot("panda")
    assert mismatches(first.spec, robot) == [] and list(first.spec.cameras) == [c.name for c in robot.cameras]
    second = run(find_origin(tmp_path / "first"), tmp_path / "second")
    told = [dataclasses.replace(policy.spec, name="", prompt="{task}").to_dict() for policy in (first, second)]
    assert told[0] == told[1]
    weights = dict(second.network.named_parameters())  # and not the statistics of batch norms, which training counts
    for key, value in first.network.named_parameters():
        torch.testing.assert_close(weights[key], value, atol=0, rtol=0)


def test_a_published_checkpoint_is_tuned_to_another_robot(command, tmp_path):
    folder, out = published(tmp_path / "pi0_base"), tmp_path / "panda_pi0"
    command("--init", folder, "--out", out, "--steps", 1, "batch=2", "lr=0", "validation=0")
    before, after = vla_models.load(folder), vla_models.load(out)
    for key, value in before.network.state_dict().items():
        torch.testing.assert_close(after.network.state_dict()[key], value, atol=0, rtol=0)
    spec = after.spec
    assert dict(spec.cameras) == {"scene": (28, 28), "wrist": (28, 28)} and spec.optional == ()
    assert (spec.robot, spec.joints["arm"]) == ("panda", load_robot("panda").arms[0].joints)
    for name in ("prompt", "context", "horizon", "period", "steps", "fit", "state"):
        assert getattr(spec, name) == getattr(before.spec, name), name
    assert spec.guidance == ("guided", "prefix")  # what the training added
    data = recorded(spec)
    np.testing.assert_allclose(after.processor.state.offset, np.mean([e.state[0] for e in data], 0), atol=1e-6)
    tokens = [policy.processor.tokens("pick the cube", np.zeros(spec.state_dim)) for policy in (before, after)]
    np.testing.assert_array_equal(*tokens)
    assert spec.tokenizer == "tokenizer.json" and (out / "tokenizer.json").is_file()
    facts = json.loads((out / "policy.json").read_text())["facts"]
    assert facts["init"] == str(folder)
    # It goes on without the checkpoint that it began with.
    (folder / "model.safetensors").unlink()
    command("--resume", "--out", out, "--steps", 2, "lr=1e-3")
    facts = json.loads((out / "policy.json").read_text())["facts"]
    assert (facts["steps"], facts["init"]) == (2, str(folder))


def test_the_file_of_the_weights_stands_for_its_folder(tmp_path):
    folder = published(tmp_path / "pi0")
    (folder / "model.safetensors").rename(folder / "best.safetensors")
    request = InferenceRequest(seed=0)
    with pytest.raises(CheckpointError, match="expected model.safetensors"):
        vla_models.load(folder)
    from test_recipes import make_observation

    policy = vla_models.load(folder / "best.safetensors")
    assert np.isfinite(policy.infer(make_observation(policy.spec), request).targets).all()
    assert find_origin(folder / "best.safetensors").spec == policy.spec
    ours = run(preset_origin("flow", "tiny"), tmp_path / "ours")
    loaded = vla_models.load(tmp_path / "ours" / "model.safetensors")
    assert loaded.spec == ours.spec == find_origin(tmp_path / "ours" / "model.safetensors").spec


def test_a_published_checkpoint_becomes_one_of_ours(tmp_path, capsys):
    from test_recipes import make_observation

    folder, out = published(tmp_path / "pi0"), tmp_path / "ours"
    with pytest.raises(
        CheckpointError, match=f"is a published one, without graphs; .* vla_models.convert {folder} FOLD"
    ):
        vla_models.load(folder, runtime="onnx")
    before = vla_models.load(folder)
    convert([str(folder), str(out)])
    assert "left out: " in capsys.readouterr().out
    (folder / "tokenizer.json").unlink()
    after = vla_models.load(out)
    observation, request = make_observation(before.spec), InferenceRequest(seed=1)
    observation = dataclasses.replace(observation, instruction="pick the cube")
    np.testing.assert_array_equal(*(p.infer(observation, request).targets for p in (before, after)))
    with pytest.raises(SystemExit, match="^convert: .*tokenizer.json"):
        convert([str(folder), str(tmp_path / "again")])


def test_settings_are_those_of_the_origin_unless_they_are_given(tmp_path):
    origin = find_origin(published(tmp_path))
    config = make_train_config("pi0", {"kind": "pose", "network": {"prefix_share": 0.2}}, origin)
    assert (config.kind, config.state, config.horizon) == ("pose", "joint", origin.spec.horizon)
    assert config.network == {**origin.network, "prefix_share": 0.2}
    with pytest.raises(PolicyError, match="setting network: expected key: value, found 'tiny'"):
        make_train_config("pi0", {"network": "tiny"}, origin)


def test_cameras_come_in_the_places_of_those_before():
    cameras = {"base": (224, 224), "wrist": (196, 252), "third": (112, 112)}
    base = example_spec("pi0", cameras=cameras, optional=("wrist", "third"))
    panda = load_robot("panda")  # scene, wrist
    assert place_cameras(base, panda) == {"scene": (224, 224), "wrist": (196, 252), "third": (112, 112)}
    needed = dataclasses.replace(base, optional=())
    assert place_cameras(needed, panda) == {"scene": (224, 224), "wrist": (196, 252)}
    one = example_spec("pi0", cameras={"base": (224, 224)})
    assert place_cameras(one, panda) == {"scene": (224, 224), "wrist": (224, 224)}
    config = make_train_config("pi0", {}, preset_origin("pi0", "paper"))
    spec = make_spec(config, "pi0", "x", preset_origin("pi0", "paper").spec)
    assert list(spec.cameras) == ["scene", "wrist", "right_wrist"] and spec.optional == ("right_wrist",)
    assert spec.fit == "pad"  # as the preset has it
    chosen = make_train_config("pi0", {"cameras": {"scene": [224, 224]}}, preset_origin("pi0", "paper"))
    assert list(make_spec(chosen, "pi0", "x", preset_origin("pi0", "paper").spec).cameras) == ["scene"]


def test_images_of_another_shape_are_padded_unless_it_is_said_otherwise():
    origin = preset_origin("octo", "tiny")  # its cameras: (32, 48) and a square
    square, wide = {"scene": [32, 32]}, {"scene": [30, 40]}
    for cameras, given, fit in ((square, "", "pad"), (wide, "", "stretch"), (square, "stretch", "stretch")):
        config = make_train_config("octo", {"robot": "panda", "cameras": cameras, "fit": given}, origin)
        assert make_spec(config, "octo", "x", origin.spec).fit == fit
    with pytest.raises(PolicyError, match="fit must be one of"):
        make_spec(dataclasses.replace(config, fit="round"), "octo", "x", origin.spec)


@pytest.mark.parametrize("name", ["wall_oss", "wall_oss_fast"])
def test_a_prompt_that_names_cameras_names_the_new_ones(name):
    origin = preset_origin(name, "tiny")
    cameras = {"cameras": {"scene": [28, 42]}}
    spec = make_spec(make_train_config(name, cameras, origin), name, "x", origin.spec)
    prompt = policy_class(name)(spec, vla_models.identity_normalizers(spec), origin.network).spec.prompt
    assert "scene" in prompt and "face" not in prompt and "wrist" not in prompt


def test_weights_that_do_not_fit_end_the_command_with_one_line(command, tmp_path):
    run(preset_origin("act", "tiny"), tmp_path / "act")
    with pytest.raises(SystemExit) as end:
        command("--init", tmp_path / "act", "--out", tmp_path / "out", "horizon=5")
    assert str(end.value).startswith(f"train: init {tmp_path / 'act'}: its weights do not fit the robot and settings: ")
    assert "expected shape (5, 32), found (8, 32)" in str(end.value) and "\n" not in str(end.value)
    assert not (tmp_path / "out" / "policy.json").exists()
    with pytest.raises(SystemExit, match=r"^train: init .*act: expected recipe 'flow', found 'act'$"):
        command("--init", tmp_path / "act", "--recipe", "flow", "--out", tmp_path / "out")


def test_an_origin_that_is_none_ends_the_command_with_one_line(command, tmp_path, capsys):
    with pytest.raises(SystemExit, match="train: config: expected one of .*'paper', 'tiny'.* found 'huge'"):
        command("--recipe", "pi0", "--network", "huge", "--out", tmp_path / "out")
    with pytest.raises(SystemExit, match="train: .*config.json: not readable as JSON"):
        command("--init", tmp_path, "--out", tmp_path / "out")
    for words in (["--init", "x", "--network", "tiny"], ["--resume", "--init", "x"]):
        with pytest.raises(SystemExit):
            command("--recipe", "pi0", *words, "--out", tmp_path / "out")
        assert "of --init, --network and --resume only one can be given" in capsys.readouterr().err
