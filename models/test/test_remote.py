"""A policy behind openpi's protocol: the same interface, and an error instead of waiting."""

import threading
import time

import numpy as np
import pytest
import vla_models
from vla_core.actions import ActionSpace
from vla_models import identity_normalizers
from vla_models.checkpoint import Checkpoint, write_checkpoint
from vla_models.openpi_client import pack, unpack
from vla_models.policy import ArmState, CheckpointError, PolicyError, PolicyObservation, PolicySpec

websockets = pytest.importorskip("websockets.sync.server")

SPEC = PolicySpec(
    "far", "openpi", {"scene": (24, 32)}, ("arm",), "joint", ActionSpace(("arm",), "joint", (7,)), 4, 0.05,
    joints={"arm": tuple(f"j{k}" for k in range(7))}, tokenizer="bytes", context=200,
)  # fmt: skip
OBSERVATION = PolicyObservation(
    {"scene": np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)},
    {"arm": ArmState(np.linspace(-0.5, 0.5, 7), np.array([0, 0, 0, 0, 0, 0, 1.0]), 0.25)}, "pick the red cube",
)  # fmt: skip


class Server:
    """Answers with `answer(observation)`; what it was asked is in `asked`."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []
        self.server = websockets.serve(self._serve, "127.0.0.1", 0, compression=None, max_size=None)
        self.url = f"ws://127.0.0.1:{self.server.socket.getsockname()[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _serve(self, connection):
        connection.send(pack({"name": "test"}))
        for message in connection:
            self.asked.append(unpack(message))
            answer = self.answer(self.asked[-1])
            connection.send(answer if isinstance(answer, str) else pack(answer))


@pytest.fixture
def serve():
    servers = []

    def start(answer) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()


@pytest.fixture
def policy_at(tmp_path):
    def make(url, **changes):
        config = {"url": url, "timeout": 0.5, "images": {"scene": "observation/exterior_image_1_left"}} | changes
        write_checkpoint(Checkpoint(SPEC, identity_normalizers(SPEC), config), tmp_path)
        return vla_models.load(tmp_path, runtime="onnx")

    return make


def actions(seen):
    return {"actions": np.tile(seen["observation/state"].astype(np.float64), (4, 1)), "server_timing": {"infer_ms": 3}}


def test_the_server_sees_what_the_robot_sees_and_its_actions_come_back(serve, policy_at):
    server = serve(actions)
    policy = policy_at(server.url, constants={"control_mode": "joint"})
    out = policy.infer(OBSERVATION)
    np.testing.assert_allclose(out.targets, np.tile([*np.linspace(-0.5, 0.5, 7), 0.25], (4, 1)), atol=1e-6)
    (seen,) = server.asked
    np.testing.assert_array_equal(seen["observation/exterior_image_1_left"], OBSERVATION.images["scene"])
    assert seen["prompt"] == "pick the red cube" and seen["control_mode"] == "joint"
    assert policy.metadata == {"name": "test"} and policy.runtime == "remote"


def test_an_answer_that_does_not_come_is_an_error_and_is_never_taken_for_the_next(serve, policy_at):
    first = threading.Event()

    def slow(seen):
        if not first.is_set():
            first.set()
            time.sleep(1.0)
            return {"actions": np.full((4, 8), 99.0)}
        return actions(seen)

    policy = policy_at(serve(slow).url)
    with pytest.raises(PolicyError, match="no answer within 0.5 s"):
        policy.infer(OBSERVATION)
    time.sleep(0.6)
    assert np.abs(policy.infer(OBSERVATION).targets).max() < 1.0


def test_a_server_that_went_away_and_came_back_is_found_again(serve, policy_at):
    server = serve(actions)
    policy = policy_at(server.url)
    policy.infer(OBSERVATION)
    policy._socket.socket.close()
    with pytest.raises(PolicyError, match="server ws://127.0.0.1"):
        policy.infer(OBSERVATION)
    assert policy.infer(OBSERVATION).targets.shape == (4, 8)


@pytest.mark.parametrize(
    ("answer", "message"),
    [(lambda seen: "Traceback: no such key", "says: Traceback: no such key"),
     (lambda seen: {"actions": np.zeros((3, 8))}, r"actions: expected \(4, 8\), found \(3, 8\)"),
     (lambda seen: {"action": np.zeros((4, 8))}, r"found \(0,\) \(keys: \['action'\]\)"),
     (lambda seen: {"actions": np.full((4, 8), np.nan)}, "not finite"),
     (lambda seen: [1, 2], "expected a dictionary, found list")],
)  # fmt: skip
def test_answers_that_cannot_be_used_are_refused(serve, policy_at, answer, message):
    with pytest.raises(PolicyError, match=message):
        policy_at(serve(answer).url).infer(OBSERVATION)


def test_no_server_and_wrong_settings_are_named(policy_at):
    with pytest.raises(PolicyError, match="server ws://127.0.0.1:9"):
        policy_at("ws://127.0.0.1:9").infer(OBSERVATION)
    with pytest.raises(CheckpointError, match="unknown settings.*colour"):
        policy_at("ws://127.0.0.1:9", colour=1)
    with pytest.raises(CheckpointError, match="images: expected a name for each camera"):
        policy_at("ws://127.0.0.1:9", images={})


def test_the_wire_format_is_that_of_openpi_client():
    # Written by openpi-client 0.1.2: packb({"a": np.arange(3, dtype=np.int16), "b": np.float32(0.5), "c": "d"}).
    theirs = bytes.fromhex(
        "83a16184c40b5f5f6e6461727261795f5fc3c40464617461c406000001000200c4056474797065a33c6932c40573686170659103"
        "a16283c40d5f5f6e7067656e657269635f5fc3c40464617461cb3fe0000000000000c4056474797065a33c6634a163a164"
    )
    assert pack({"a": np.arange(3, dtype=np.int16), "b": np.float32(0.5), "c": "d"}) == theirs
    np.testing.assert_array_equal(unpack(theirs)["a"], [0, 1, 2])
    with pytest.raises(PolicyError, match="object"):
        pack({"a": np.array([object()])})
