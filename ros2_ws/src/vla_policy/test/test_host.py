"""What the parameters of the node ask of a checkpoint."""

import pytest
import vla_models
from vla_core.robot import load_robot
from vla_policy.description import PolicyDescription
from vla_policy.host import PolicyHost


@pytest.mark.parametrize(("runtime", "precision"), [("", "int8"), ("onnx", "int8"), ("torch", "fp32")])
def test_precision_is_that_of_policies_on_the_nodes_runtime(monkeypatch, runtime, precision):
    class EnoughError(Exception):
        pass

    def load(path, **asked):
        raise EnoughError(path, asked)

    monkeypatch.setattr(vla_models, "load", load)
    host = PolicyHost(load_robot("panda"), "onnx", "cpu", 1, "int8")
    with pytest.raises(EnoughError) as caught:
        host.load(PolicyDescription("mine", "folder"), runtime)
    assert caught.value.args == ("folder", {
        "runtime": runtime or "onnx", "provider": "cpu", "threads": 1, "precision": precision,
    })  # fmt: skip
