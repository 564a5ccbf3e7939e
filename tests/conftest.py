"""One running graph for all system tests that leave it in order; tests that end all of it make their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Helpers of these tests are plain modules beside them.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share the running graph come last: once it runs, it takes processor time from all that follow."""
    items.sort(key=lambda item: "running_graph" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def policies(tmp_path_factory) -> Path:
    """A folder of checkpoints: left and right can drive the Panda; the others are not to be used."""
    pytest.importorskip("torch")
    from policies import cut_short, describe, write_policy
    from vla_core.actions import ActionSpace

    folder = tmp_path_factory.mktemp("policies")
    left = write_policy(folder / "left", velocity=0.03)
    describe(left)
    write_policy(folder / "right", velocity=-0.03)
    write_policy(folder / "other_camera", cameras={"overhead": (48, 64)})
    space = ActionSpace(("left", "right"), "joint", (6, 6))
    joints = {arm: tuple(f"{arm}_{k}" for k in range(6)) for arm in space.arms}
    write_policy(folder / "two_arms", arms=space.arms, action_space=space, state="joint", joints=joints)
    six = {"arm": tuple(f"joint{k}" for k in range(6))}
    write_policy(folder / "six_joints", action_space=ActionSpace(("arm",), "joint", (6,)), state="joint", joints=six)
    write_policy(folder / "six_measured", state="joint", joints=six)
    cut_short(folder / "cut_short", left)
    return folder


@pytest.fixture(scope="session")
def running_graph(policies):
    from graph import Graph

    with Graph(policies / "left.yaml") as graph:
        graph.until(lambda: graph.policy.active or graph.policy.error, "the policy node is ready")
        assert graph.policy.active == "left", graph.policy.error
        yield graph


@pytest.fixture
def graph(running_graph):
    """The running graph (graph.Graph) with the arm in motion under the policy `left`."""
    running_graph.begin()
    return running_graph
