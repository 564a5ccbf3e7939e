"""Bad input to the real nodes: one clear error, a smooth hold, and everything goes on when the cause is gone."""

import copy
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from diagnostic_msgs.msg import DiagnosticStatus
from graph import PATIENCE, own_domain
from vla_bringup.launch_file import LaunchError, load
from vla_core.robot import load_robot
from vla_msgs.msg import ActionChunk, SafetyStatus
from vla_msgs.srv import LoadPolicy

RUNNING, HOLDING = SafetyStatus.RUNNING, SafetyStatus.HOLDING
PREFIXES = [Path(p) for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)]
#: Checkpoints that must not drive, and what the refusal says.
UNUSABLE = {
    "other_camera": ["ContractError", "camera overhead: the policy needs it, the robot has ['scene', 'wrist']"],
    "two_arms": ["ContractError", "arms: the policy drives ['left', 'right'], the robot has ['arm']"],
    "six_joints": ["ContractError", "arm arm: the policy drives 6 joints, the robot has 7"],
    "six_measured": ["PolicyError", "policy six_measured: arm 'arm': expected 6 joints, found (7,)"],
    "cut_short": ["CheckpointError", "model.safetensors: cut short"],
}
#: One of each error; the others are refused in the same place, and by a running node in any case.
STARTED = ("other_camera", "six_measured", "cut_short")


# ------------------------------------------------------------------------------------------------ robot descriptions


def executables() -> list[Path]:
    """Every node of the workspace."""
    found = (path for prefix in PREFIXES for path in (prefix / "lib").glob("vla_*/*_node"))
    return sorted({path.name: path for path in found}.values())


def refusals(robot: Path, nodes: list[Path], **parameters: str) -> dict[str, tuple[int, str]]:
    """Start nodes with a robot description; what they end with: name -> (exit status, what they printed)."""
    words = [w for k, v in {"robot": robot, **parameters}.items() for w in ("-p", f"{k}:={v}")]
    environment = os.environ | {"ROS_DOMAIN_ID": str(own_domain())}
    running = {
        node.name: subprocess.Popen([node, "--ros-args", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                    stdin=subprocess.DEVNULL, text=True, env=environment)
        for node in nodes
    }  # fmt: skip
    try:
        return {n: (p.returncode, out) for n, p in running.items() for out in [p.communicate(timeout=PATIENCE)[0]]}
    finally:
        for process in running.values():
            process.kill()


def write_robot(folder: Path, joints: list[str]) -> Path:
    """The Panda with other joints."""
    tree = yaml.safe_load(load_robot("panda").path.read_text())
    tree["arms"]["arm"]["joints"] = joints
    path = folder / "odd.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_every_node_refuses_a_robot_with_a_missing_joint(tmp_path):
    robot = write_robot(tmp_path, list(load_robot("panda").arms[0].joints[:-1]))
    nodes = executables()
    assert len(nodes) >= 8
    for name, (status, printed) in refusals(robot, nodes).items():
        lines = printed.strip().splitlines()
        assert status not in (0, None) and len(lines) == 1, f"{name}: {status}\n{printed}"
        assert "odd.yaml" in lines[0] and "6" in lines[0] and "7" in lines[0], f"{name}: {printed}"


def test_nodes_with_a_model_refuse_a_robot_whose_model_lacks_a_joint(tmp_path):
    robot = write_robot(tmp_path, [*load_robot("panda").arms[0].joints[:-1], "panda_joint77"])
    names = ("mujoco_node", "observation_node", "chunk_executor_node", "safety_controller_node")
    for name, (status, printed) in refusals(robot, [n for n in executables() if n.name in names]).items():
        lines = printed.strip().splitlines()
        assert status not in (0, None) and len(lines) == 1, f"{name}: {status}\n{printed}"
        assert "panda_joint77" in lines[0], f"{name}: {printed}"


def test_a_launch_with_a_policy_that_is_not_there_starts_nothing():
    with pytest.raises(LaunchError, match="no parameter file .*nowhere.yaml"):
        load(Path(__file__).resolve().parents[1] / "launch" / "sim.launch.yaml", {"policy": "nowhere"})


# ----------------------------------------------------------------------------------------------------------- policies


def test_a_policy_that_cannot_be_used_is_not_loaded_and_the_first_drives_on(graph, policies):
    for name, words in UNUSABLE.items():
        answer = graph.call(LoadPolicy, "/policy/load", LoadPolicy.Request(policy=str(policies / name)))
        assert not answer.success and "\n" not in answer.message
        for word in words:
            assert word in answer.message
    assert graph.policy.active == "left" and not set(UNUSABLE) & set(graph.policy.loaded)
    graph.forget()
    graph.until(lambda: len(graph.chunks) >= 2, "chunks of the first policy")
    assert {c.policy for c in graph.chunks} == {"left"}
    graph.until(lambda: graph.state == RUNNING, "the arm moves on")


def errors(graph) -> list[str]:
    """The errors that the policy node has printed."""
    return [line for process, line in graph.lines if process == "policy_node" and "[ERROR]" in line]


@pytest.mark.parametrize(
    "names",
    [STARTED, pytest.param(tuple(n for n in UNUSABLE if n not in STARTED), marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_a_policy_that_cannot_be_used_never_drives(graph, policies, names):
    assert graph.stop("policy_node") == 0
    graph.holds()
    try:
        for name in names:
            words = UNUSABLE[name]
            graph.forget()
            graph.lines.clear()
            graph.start("policy_node", checkpoint=policies / name)
            graph.until(lambda: graph.policy.error, "the policy node says what is wrong")
            graph.until(lambda: errors(graph), "the policy node prints what is wrong")
            assert not graph.policy.active and not graph.policy.loaded
            graph.passed(1.0)
            assert not graph.chunks and {s.state for s in graph.safety} == {HOLDING}
            assert graph.stop("policy_node") == 0
            assert len(errors(graph)) == 1 and "Traceback" not in graph.output("policy_node")
            for word in words:
                assert word in graph.policy.error and word in errors(graph)[0]
    finally:
        if graph.process("policy_node").popen.poll() is None:
            graph.stop("policy_node")
    graph.start("policy_node")
    graph.until(lambda: graph.state == RUNNING, "the arm moves under the good policy")
    graph.moved()


# --------------------------------------------------------------------------------------------------- cameras, chunks


@pytest.mark.parametrize("mode, fault", [("cut", "wrist: dead"), ("frozen", "wrist: frozen")])
def test_a_camera_that_fails_is_named_and_the_arm_holds_until_it_is_back(graph, mode, fault):
    graph.wrist.mode = mode
    graph.until(
        lambda: any(node == "observation_node" and fault in text for node, text in graph.warnings),
        f"diagnostics say {fault!r}",
    )
    graph.holds()
    graph.wrist.mode = "pass"
    graph.until(lambda: graph.state == RUNNING, "the arm moves again by itself")
    graph.moved()
    graph.until(
        lambda: graph.diagnostics["observation_node"].level == DiagnosticStatus.OK, "the observation node is well"
    )


def test_a_chunk_with_nan_is_refused_and_the_good_plan_goes_on(graph):
    graph.until(lambda: graph.chunks, "a chunk")
    publisher = graph.node.create_publisher(ActionChunk, "/action_chunk", 5)
    graph.forget()

    def refused() -> bool:
        # With the newest good chunk's stamp: nothing else is wrong with it.
        if graph.chunks and graph.chunks[-1].request_id:
            bad = copy.deepcopy(graph.chunks[-1])
            bad.request_id = 0
            bad.actions.data[9] = float("nan")
            publisher.publish(bad)
        return any(node == "chunk_executor" and "finite" in text for node, text in graph.warnings)

    graph.until(refused, "the executor refuses the chunk")
    graph.node.destroy_publisher(publisher)
    graph.until(lambda: graph.state == RUNNING, "the arm moves under the policy")
    graph.moved()
    assert all(np.isfinite(s.arms[0].joints).all() for s in graph.safety)
    assert not any(s.refused > graph.safety[0].refused for s in graph.safety)
