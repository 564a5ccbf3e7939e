"""Checkpoints: round trip, and one clear error for everything that can be wrong with one."""

import json

import numpy as np
import pytest
import vla_models
from vla_models.checkpoint import Checkpoint, read_tensors, write_checkpoint, write_tensors
from vla_models.policy import CheckpointError, InferenceRequest, PolicyError


@pytest.fixture
def saved(policy_of, tiny, tmp_path):
    policy = policy_of("flow")
    processor = policy.processor
    write_checkpoint(
        Checkpoint(policy.spec, {"state": processor.state, "action": processor.action}, tiny["flow"]), tmp_path
    )
    write_tensors(tmp_path / "model.safetensors", {k: v.numpy() for k, v in policy.network.state_dict().items()})
    return policy, tmp_path


def edit(folder, change):
    path = folder / "policy.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_loaded_policy_does_what_the_saved_one_did(saved, observation_of):
    policy, folder = saved
    request = InferenceRequest(seed=5)
    loaded = vla_models.load(folder)
    np.testing.assert_array_equal(
        loaded.infer(observation_of(), request).targets, policy.infer(observation_of(), request).targets
    )
    assert (loaded.runtime, loaded.provider, loaded.steps) == ("torch", "cpu", 5)
    assert vla_models.load(folder, steps=3).steps == 3


def test_weights_cut_short(saved):
    path = saved[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors: cut short"):
        vla_models.load(saved[1])


def test_weights_missing(saved):
    (saved[1] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors: missing"):
        vla_models.load(saved[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda t: t.pop("action_out.bias"), "1 tensors missing, first 'action_out.bias'"),
     (lambda t: t.update(foreign=np.zeros(3, np.float32)), "1 unknown tensors, first 'foreign'"),
     (lambda t: t["action_out.bias"].fill(np.nan), "action_out.bias: holds numbers that are not finite"),
     (lambda t: t.update({"action_out.bias": np.zeros(3, np.float32)}), r"expected shape \(7,\), found \(3,\)")],
)  # fmt: skip
def test_weights_that_do_not_fit(saved, change, message):
    path = saved[1] / "model.safetensors"
    tensors = {name: value.copy() for name, value in read_tensors(path).items()}
    change(tensors)
    write_tensors(path, tensors)
    with pytest.raises(CheckpointError, match=message):
        vla_models.load(saved[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not readable as JSON"), ("[1]", "expected a policy of format"), ('{"type": "act"}', "found None")],
)
def test_foreign_files(saved, text, message):
    (saved[1] / "policy.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        vla_models.load(saved[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda v: v.pop("normalizers"), "missing keys.*normalizers"),
     (lambda v: v["normalizers"].pop("state"), "missing.*state"),
     (lambda v: v["normalizers"]["state"].update(scale=[0.0]), "normaliser"),
     (lambda v: v["spec"].update(state="smell"), "state must be one of"),
     (lambda v: v["spec"].update(recipe="dance"), "expected one of.*found 'dance'"),
     (lambda v: v["spec"]["action_space"].update(kind="song"), "kind"),
     (lambda v: v["config"].update(depth=3), "unknown settings.*depth")],
)  # fmt: skip
def test_policy_files_with_something_wrong(saved, change, message):
    edit(saved[1], change)
    with pytest.raises(CheckpointError, match=message):
        vla_models.load(saved[1])


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="policy.json is missing"):
        vla_models.load(tmp_path)


def test_unknown_runtime_and_provider(saved):
    with pytest.raises(PolicyError, match="runtime: expected one of"):
        vla_models.load(saved[1], runtime="abacus")
    with pytest.raises(PolicyError, match="provider"):
        vla_models.load(saved[1], provider="tpu")


def test_recipes_are_found_and_packages_may_add_some(monkeypatch):
    from importlib.metadata import EntryPoint

    own = EntryPoint("mine", "vla_models.recipes.act:ActPolicy", vla_models.ENTRY_POINTS)
    monkeypatch.setattr(vla_models, "entry_points", lambda group: [own])
    assert set(vla_models.list_policies()) == {*vla_models.RECIPES, "mine"}
    assert vla_models.policy_class("mine").__name__ == "ActPolicy"


def test_importing_the_library_needs_no_torch():
    import subprocess
    import sys

    code = ("import sys; sys.modules['torch'] = None; import vla_models, vla_models.policy, vla_models.preprocess, "
            "vla_models.checkpoint, vla_models.sampling, vla_models.episodes, vla_models.data")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
