"""Every recipe of the library drives the simulated robot through the real policy node, on torch and exported."""

import numpy as np
import pytest
from graph import Graph
from std_msgs.msg import String
from vla_models import RECIPES
from vla_msgs.msg import SafetyStatus
from vla_msgs.srv import LoadPolicy, SwitchPolicy

#: One recipe of each kind of head; all of them together are slow. Exporting takes longer: one, with a single graph.
QUICK, EXPORTED = ("act", "diffusion_policy", "pi0", "rt2"), ("act",)


def recipes(quick: tuple[str, ...]) -> list:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in sorted(RECIPES)]


@pytest.fixture(scope="module")
def graph(policies):
    with Graph(policies / "left.yaml", strategy="naive") as graph:
        graph.until(lambda: graph.policy.active or graph.policy.error, "the policy node is ready")
        assert graph.policy.active == "left", graph.policy.error
        yield graph


def take_over(graph, folder, runtime="") -> None:
    """Load a checkpoint beside the policy that drives, and begin an episode under it."""
    answer = graph.call(LoadPolicy, "/policy/load", LoadPolicy.Request(policy=str(folder), runtime=runtime))
    assert answer.success, answer.message
    assert graph.call(SwitchPolicy, "/policy/switch", SwitchPolicy.Request(policy=folder.name)).success
    graph.begin()
    # A slow policy may still have been at its last chunk.
    graph.until(lambda: graph.chunks and graph.chunks[-1].policy == folder.name, f"a chunk of {folder.name}")
    graph.chunks.clear()


def drives(graph, name: str, runtime: str) -> None:
    """Wait until the arm drifts under policy `name`, and check that nothing else happened."""
    start = graph.tool()
    graph.until(lambda: graph.chunks and graph.tool()[1] - start[1] > 0.02, "the arm drifts along y")
    assert {c.policy for c in graph.chunks} == {name} and not any(c.error for c in graph.chunks)
    assert (graph.policy.active, graph.policy.runtime) == (name, runtime)
    # A chunk that comes late brakes the arm and lets it hold; a fault or a stop would stay.
    graph.until(lambda: graph.state in (SafetyStatus.RUNNING, SafetyStatus.HOLDING), "the arm is driven or held")
    assert abs(graph.tool()[2] - start[2]) < 0.05 and np.isfinite(graph.tool()).all()


# Before the others: no graph runs yet, which would take the processors from the export.
@pytest.mark.parametrize("recipe", recipes(EXPORTED))
def test_the_exported_recipe_drives_the_arm(request, recipe, tmp_path):
    from policies import write_recipe
    from vla_models.export import export_checkpoint

    folder = write_recipe(tmp_path / f"{recipe}_onnx", recipe)
    export_checkpoint(folder)
    graph = request.getfixturevalue("graph")
    take_over(graph, folder, "onnx")
    drives(graph, folder.name, "onnx")


@pytest.mark.parametrize("recipe", recipes(QUICK))
def test_the_recipe_drives_the_arm(graph, recipe, tmp_path):
    from policies import write_recipe

    take_over(graph, write_recipe(tmp_path / recipe, recipe))
    drives(graph, recipe, "torch")


@pytest.mark.slow
def test_a_correction_in_words_turns_the_arm(graph, tmp_path):
    """RT-H goes where a person says on /correction."""
    from policies import write_obedient

    graph.begin()  # for its instruction
    take_over(graph, write_obedient(tmp_path / "obedient", graph.policy.instruction))
    publisher = graph.node.create_publisher(String, "/correction", 5)
    graph.until(publisher.get_subscription_count, "the policy node listens")
    for words, side in (("move arm left", 1), ("move arm right", -1), ("move arm left", 1)):
        publisher.publish(String(data=words))
        graph.passed(2.0)  # what was planned before is over
        start = graph.tool()
        graph.until(lambda at=start, to=side: to * (graph.tool()[1] - at[1]) > 0.02, f"the arm follows {words!r}")
    graph.node.destroy_publisher(publisher)
    assert {c.policy for c in graph.chunks} == {"obedient"} and not any(c.error for c in graph.chunks)
