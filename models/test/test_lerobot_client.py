"""A policy behind LeRobot's policy server. What the server answers was recorded from LeRobot 0.6.1."""

import io
import pickle
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
import torch

grpc = pytest.importorskip("grpc")
import vla_models  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from vla_core.actions import ActionSpace  # noqa: E402
from vla_models import identity_normalizers  # noqa: E402
from vla_models.checkpoint import Checkpoint, write_checkpoint  # noqa: E402
from vla_models.lerobot_client import HELPERS, pieces, read_actions, read_field, write_field  # noqa: E402
from vla_models.policy import ArmState, CheckpointError, PolicyError, PolicyObservation, PolicySpec  # noqa: E402

#: GetActions of LeRobot 0.6.1's PolicyServer for observation 1: the state, rising by 0.1 in each of four actions.
RECORDED = (Path(__file__).parent / "parity" / "lerobot_actions.pickle").read_bytes()
STATE = [*np.linspace(-0.5, 0.5, 7), 0.25]
SPEC = PolicySpec(
    "far", "lerobot_server", {"scene": (24, 32)}, ("arm",), "joint", ActionSpace(("arm",), "joint", (7,)), 4, 0.05,
    joints={"arm": tuple(f"j{k}" for k in range(7))}, tokenizer="bytes", context=200,
)  # fmt: skip
OBSERVATION = PolicyObservation(
    {"scene": np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)},
    {"arm": ArmState(np.array(STATE[:7]), np.array([0, 0, 0, 0, 0, 0, 1.0]), STATE[7])}, "pick the red cube",
)  # fmt: skip


class TheirReader(pickle.Unpickler):
    """Reads what a client sends, as LeRobot would: its classes are plain ones here."""

    def find_class(self, module, name):
        if module == HELPERS:
            return type(name, (), {})
        assert module.startswith("numpy")
        return super().find_class(module, name)


class Server:
    """Speaks LeRobot's service; `answers` are what GetActions gives, in turn."""

    def __init__(self, answers):
        self.answers, self.setups, self.observations = list(answers), [], []
        self.server = grpc.server(futures.ThreadPoolExecutor(2))
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_unary_rpc_method_handler
        methods = {"Ready": unary(lambda m, _: b""), "SendPolicyInstructions": unary(self.on_setup),
                   "SendObservations": stream(self.on_observation), "GetActions": unary(self.on_actions)}  # fmt: skip
        service = grpc.method_handlers_generic_handler("transport.AsyncInference", methods)
        self.server.add_generic_rpc_handlers((service,))
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def on_setup(self, message, _):
        self.setups.append(TheirReader(io.BytesIO(read_field(message, 1))).load())
        return b""

    def on_observation(self, messages, _):
        self.observations.append(TheirReader(io.BytesIO(b"".join(read_field(m, 2) for m in messages))).load())
        return b""

    def on_actions(self, message, _):
        answer = self.answers.pop(0)
        return answer() if callable(answer) else write_field(1, answer) if answer else b""


@pytest.fixture
def serve():
    servers = []

    def start(*answers):
        servers.append(Server(answers))
        return servers[-1]

    yield start
    for server in servers:
        server.server.stop(None)


@pytest.fixture
def policy_at(tmp_path):
    def make(address, **changes):
        config = {"address": address, "images": {"scene": "top"}, "state": [f"m{k}.pos" for k in range(8)],
                  "pretrained": "/models/act", "timeout": 0.5} | changes  # fmt: skip
        write_checkpoint(Checkpoint(SPEC, identity_normalizers(SPEC), config), tmp_path)
        return vla_models.load(tmp_path)

    return make


def test_the_server_is_set_up_and_its_chunk_comes_back(serve, policy_at):
    server = serve(RECORDED)
    out = policy_at(server.address).infer(OBSERVATION)
    np.testing.assert_allclose(out.targets, np.array(STATE) + 0.1 * np.arange(4)[:, None], atol=1e-6)
    (setup,), (seen,) = server.setups, server.observations
    assert (setup.policy_type, setup.pretrained_name_or_path, setup.actions_per_chunk) == ("act", "/models/act", 4)
    assert setup.lerobot_features["observation.images.top"]["shape"] == (24, 32, 3)
    assert setup.lerobot_features["observation.state"]["names"] == [f"m{k}.pos" for k in range(8)]
    assert seen.must_go and seen.timestep == 1 and seen.observation["task"] == "pick the red cube"
    np.testing.assert_array_equal(seen.observation["top"], OBSERVATION.images["scene"])
    np.testing.assert_allclose([seen.observation[f"m{k}.pos"] for k in range(8)], STATE, atol=1e-6)


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize(
    ("answer", "message"),
    [(b"", "expected actions, found none"), (pickle.dumps(Evil()), "expected actions only, found builtins.print"),
     (pickle.dumps([1]), "expected a list of actions"), (RECORDED[:-40], "not readable"), (b"junk", "not readable")],
)  # fmt: skip
def test_answers_that_cannot_be_used_are_refused(serve, policy_at, answer, message, capsys):
    with pytest.raises(PolicyError, match=message):
        policy_at(serve(answer).address).infer(OBSERVATION)
    assert "this ran" not in capsys.readouterr().out


def test_a_tensor_that_is_larger_than_its_numbers_is_refused():
    from vla_models.lerobot_client import _tensor

    storage = torch.zeros(6).storage()
    assert _tensor(storage, 1, (2, 2), (2, 1)).shape == (2, 2)
    for offset, size, stride in ((0, (7,), (1,)), (5, (2,), (1,)), (0, (2, 3), (6, 1)), (-1, (2,), (1,))):
        with pytest.raises(PolicyError, match="expected a tensor inside its 6 numbers"):
            _tensor(storage, offset, size, stride)


def test_an_answer_to_an_earlier_observation_is_refused(serve, policy_at):
    policy = policy_at(serve(RECORDED, RECORDED).address)
    policy.infer(OBSERVATION)
    with pytest.raises(PolicyError, match="expected the answer to observation 2, found that to \\[1\\]"):
        policy.infer(OBSERVATION)


def test_no_answer_is_an_error_and_not_a_wait(serve, policy_at):
    import time

    policy = policy_at(serve(lambda: time.sleep(1.5) or b"").address)
    with pytest.raises(PolicyError, match="no answer within 0.5 s"):
        policy.infer(OBSERVATION)
    with pytest.raises(PolicyError, match="server 127.0.0.1:9"):
        policy_at("127.0.0.1:9").infer(OBSERVATION)


def test_wrong_settings_are_named(policy_at):
    with pytest.raises(CheckpointError, match="state: expected 8 names, found 1"):
        policy_at("127.0.0.1:9", state=["m0"])
    with pytest.raises(CheckpointError, match="images: expected a name for each camera"):
        policy_at("127.0.0.1:9", images={})


@given(st.binary(max_size=600), st.integers(1, 3), st.integers(0, 3))
def test_fields_are_read_as_they_were_written(data, number, state):
    message = write_field(number + 3, state) + write_field(number, data)
    assert read_field(message, number) == data and read_field(message, number + 1) == b""


@pytest.mark.parametrize("size", [1, 2 << 20, (2 << 20) + 1, 5 << 20])
def test_long_observations_go_in_marked_pieces(size):
    data = np.random.default_rng(size).bytes(size)
    messages = list(pieces(data))
    assert b"".join(read_field(m, 2) for m in messages) == data and all(len(m) < 4 << 20 for m in messages)
    marks = [m[1] for m in messages]
    assert marks[-1] == 3 and marks[:-1] == [1, 2, 2, 2][: len(marks) - 1]


def test_the_recorded_chunk_is_read():
    steps, actions = read_actions(RECORDED)
    assert steps == [1, 2, 3, 4]
    np.testing.assert_allclose(actions, np.array(STATE) + 0.1 * np.arange(4)[:, None], atol=1e-6)
