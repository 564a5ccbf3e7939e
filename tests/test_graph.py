"""The whole graph as real processes: the policy drives, switches, dies and comes back; the clock jumps."""

from vla_msgs.msg import SafetyStatus
from vla_msgs.srv import LoadPolicy, SwitchPolicy

RUNNING, HOLDING, STOPPING = SafetyStatus.RUNNING, SafetyStatus.HOLDING, SafetyStatus.STOPPING


def test_the_policy_moves_the_arm(graph):
    start = graph.tool()
    graph.passed(1.0)
    step = graph.tool() - start
    assert 0.01 < step[1] < 0.08 and abs(step[0]) < 0.02 and abs(step[2]) < 0.02
    assert {c.policy for c in graph.chunks} == {"left"} and not any(c.error for c in graph.chunks)
    assert {t.stage for t in graph.chunks[-1].timings} >= {"preprocess", "encode", "sample", "decode", "total"}


def test_a_second_policy_takes_over_without_a_stop(graph, policies):
    answer = graph.call(LoadPolicy, "/policy/load", LoadPolicy.Request(policy=str(policies / "right")))
    assert answer.success, answer.message
    graph.begin()  # loading may take long: come back from where the first has driven meanwhile
    assert graph.policy.loaded == ["left", "right"]
    graph.forget()
    assert graph.call(SwitchPolicy, "/policy/switch", SwitchPolicy.Request(policy="right")).success
    graph.until(lambda: any(c.policy == "right" for c in graph.chunks), "chunks of the second policy")
    graph.until(
        lambda: (
            graph.safety[-1].arms[0].velocity and graph.tool()[1] < max(graph.tool(s)[1] for s in graph.safety) - 0.01
        ),
        "the arm turns back",
    )
    assert {s.state for s in graph.safety} == {RUNNING}
    answer = graph.call(SwitchPolicy, "/policy/switch", SwitchPolicy.Request(policy="middle"))
    assert not answer.success and "'middle'" in answer.message and "['left', 'right']" in answer.message
    assert graph.call(SwitchPolicy, "/policy/switch", SwitchPolicy.Request(policy="left")).success
    graph.until(lambda: graph.policy.active == "left", "the first policy is active again")
