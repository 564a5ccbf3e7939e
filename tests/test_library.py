"""Every recipe of the library drives the simulated robot through the real policy node."""

import numpy as np
import pytest
from graph import Graph
from vla_models import RECIPES
from vla_msgs.msg import SafetyStatus
from vla_msgs.srv import LoadPolicy, SwitchPolicy

#: One recipe of each kind of head; all of them together are slow.
QUICK = ("act", "diffusion_policy", "pi0", "rt2")


@pytest.fixture(scope="module")
def graph(policies):
    with Graph(policies / "left.yaml", strategy="naive") as graph:
        graph.until(lambda: graph.policy.active or graph.policy.error, "the policy node is ready")
        assert graph.policy.active == "left", graph.policy.error
        yield graph


@pytest.mark.parametrize(
    "recipe", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(RECIPES)]
)
def test_the_recipe_drives_the_arm(graph, recipe, tmp_path):
    from policies import write_recipe

    folder = write_recipe(tmp_path / recipe, recipe)
    answer = graph.call(LoadPolicy, "/policy/load", LoadPolicy.Request(policy=str(folder)))
    assert answer.success, answer.message
    assert graph.call(SwitchPolicy, "/policy/switch", SwitchPolicy.Request(policy=recipe)).success
    graph.begin()
    start = graph.tool()
    graph.until(lambda: graph.tool()[1] - start[1] > 0.02, "the arm drifts along y")
    assert {c.policy for c in graph.chunks} == {recipe} and not any(c.error for c in graph.chunks)
    assert graph.state in (SafetyStatus.RUNNING, SafetyStatus.HOLDING)
    assert abs(graph.tool()[2] - start[2]) < 0.05 and np.isfinite(graph.tool()).all()
