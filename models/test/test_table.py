"""`./vla models`: the table of what each system supports."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from vla_models import RECIPES, __main__, policy_class  # noqa: E402
from vla_models.__main__ import formats, head, main  # noqa: E402

#: How actions come about; "own" would be a kind that the table has no word for.
HEADS = {"one pass", "flow", "two flows", "diffusion", "tokens"}


def test_every_recipe_has_a_kind_of_head():
    assert {head(policy_class(name)) for name in RECIPES} == HEADS


def test_every_recipe_with_rules_for_published_checkpoints_says_which():
    for name in RECIPES:
        assert bool(formats(name)) == bool(policy_class(name).published), name


def test_the_table_says_what_a_recipe_supports(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "list_policies", lambda: ["act", "smolvla"])
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("smolvla"))
    for word in ("flow", "450.0 M", "guided, prefix", "torch, onnx"):
        assert word in line
    assert any(line.startswith("openpi ") and "a policy server" in line for line in lines)
    assert main(["--json"]) == 0
    act, smolvla = json.loads(capsys.readouterr().out)
    assert (act["recipe"], act["head"], act["history"]) == ("act", "one pass", 1)
    assert smolvla["published"] == ["smolvla"] and smolvla["title"].startswith('Recipe "smolvla"')
