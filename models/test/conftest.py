"""A tiny policy of each recipe and a synthetic data set that can be learnt in seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from vla_core.actions import ActionSpace
from vla_models.episodes import Episode
from vla_models.normalization import Normalizer
from vla_models.policy import ArmState, PolicyObservation, PolicySpec

sys.path.append(str(Path(__file__).parent))  # for parity.fixture
TINY = {"flow": {"width": 32, "layers": 2, "heads": 2, "channels": (8, 16), "blocks": (0, 1), "points": 8},
        "act": {"width": 32, "heads": 2, "feedforward": 48, "encoder_layers": 1, "posterior_layers": 1,
                "channels": (8, 16), "dropout": 0.1}}  # fmt: skip
WORDS = ("", "blue", "cube", "red", "take", "the")


def make_spec(recipe: str, **changes) -> PolicySpec:
    """A pose policy ("flow") or a joint policy ("act") with images of 24 x 32 pixels and H = 8."""
    values = {
        "name": "tiny", "recipe": recipe, "cameras": {"scene": (24, 32)}, "arms": ("arm",), "horizon": 8,
        "period": 0.05, "joints": {"arm": tuple(f"j{i}" for i in range(7))}, "robot": "panda",
    }  # fmt: skip
    if recipe == "flow":
        space = ActionSpace(("arm",), "pose", (), "chunk", "base", "rotvec")
        values |= {"state": "pose", "action_space": space, "guidance": ("guided", "prefix"), "steps": 5}
        values |= {"vocabulary": WORDS, "prefix_limit": 4}
    else:
        values |= {"state": "joint", "action_space": ActionSpace(("arm",), "joint", (7,))}
    return PolicySpec(**(values | changes))


def make_policy(recipe: str, seed: int = 0, **changes):
    """A tiny policy with random weights, none of them zero."""
    torch = pytest.importorskip("torch")
    from vla_models import build

    spec = make_spec(recipe, **changes)
    torch.manual_seed(seed)
    normalizers = {
        "state": Normalizer("mean_std", np.linspace(-0.1, 0.1, spec.state_dim), np.full(spec.state_dim, 0.5)),
        "action": Normalizer("mean_std", np.linspace(-0.05, 0.05, spec.action_dim), np.full(spec.action_dim, 0.2)),
    }
    policy = build(recipe, TINY[recipe], spec=spec, normalizers=normalizers)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.05)
    return policy


def make_observation(seed: int = 0, instruction: str = "take the red cube") -> PolicyObservation:
    """A random image and a random pose within reach."""
    rng = np.random.default_rng(seed)
    quaternion = rng.normal(size=4)
    tool = np.concatenate([[0.4, 0.1, 0.3] + 0.05 * rng.normal(size=3), quaternion / np.linalg.norm(quaternion)])
    return PolicyObservation(
        images={"scene": rng.integers(0, 256, (48, 64, 3), np.uint8)},
        state={"arm": ArmState(rng.normal(0, 0.5, 7), tool, float(rng.uniform()))},
        instruction=instruction,
        time=1.0,
    )


def make_episodes(spec: PolicySpec, count: int = 6, ticks: int = 8, seed: int = 0) -> list[Episode]:
    """Scenes with a red and a blue square left and right; the named one decides where the actions go.

    The targets move in a straight line from the anchor to +-0.1 m in y, by the side of the square named.
    """
    rng = np.random.default_rng(seed)
    height, width = spec.cameras["scene"]
    episodes = []
    for index in range(count):
        red_left, take_red = index % 2 == 0, index // 2 % 2 == 0
        side = 1.0 if red_left == take_red else -1.0
        images = np.full((ticks, height, width, 3), 90, np.uint8)
        images += rng.integers(0, 20, images.shape, np.uint8)
        for colour, left in ((0, red_left), (2, not red_left)):
            column = (2 if left else width - 12) + int(rng.integers(0, 4))
            images[:, 8:14, column : column + 6] = 20
            images[:, 8:14, column : column + 6, colour] = 230
        if spec.action_space.kind == "pose":
            anchor = np.tile([0.4, 0.0, 0.3, 1.0, 0.0, 0.0, 0.0, 1.0], (ticks, 1))
            state = np.tile([0.4, 0.0, 0.3, 1.0, 0, 0, 0, -1.0, 0, 1.0], (ticks, 1))
        else:
            anchor = np.tile([0.0] * 7 + [1.0], (ticks, 1))
            state = anchor.copy()
        targets = np.repeat(anchor[:, None], spec.horizon, 1)
        targets[..., 1] += side * 0.1 * np.linspace(0, 1, spec.horizon)
        instruction = f"take the {'red' if take_red else 'blue'} cube"
        episodes.append(
            Episode(f"episode_{index}", instruction, {"scene": images}, state, anchor, targets.astype(np.float32),
                    np.full(ticks, spec.horizon), 0.1 * np.arange(ticks))
        )  # fmt: skip
    return episodes


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Networks this small gain nothing from more threads, which on a busy machine wait for each other."""
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)


@pytest.fixture
def spec_of():
    return make_spec


@pytest.fixture
def policy_of():
    return make_policy


@pytest.fixture
def observation_of():
    return make_observation


@pytest.fixture
def episodes_of():
    return make_episodes


@pytest.fixture
def tiny():
    """Recipe -> settings of a tiny network."""
    return TINY


@pytest.fixture(scope="session")
def exported_flow(tmp_path_factory):
    """(folder, exported graphs by name) of a flow policy with two cameras. The exporter is slow: once for all."""
    spec = make_spec("flow", cameras={"scene": (32, 40), "wrist": (24, 32)}, context=6)
    return _exported(tmp_path_factory.mktemp("flow"), spec, {"layers": 1, "blocks": (1, 1), "pool": (1, 2)})


@pytest.fixture(scope="session")
def exported_act(tmp_path_factory):
    """(folder, exported graphs by name) of an ACT with two arms."""
    spec = make_spec("act", arms=("left", "right"), action_space=ActionSpace(("left", "right"), "joint", (3, 3)),
                     joints={"left": ("l1", "l2", "l3"), "right": ("r1", "r2", "r3")})  # fmt: skip
    return _exported(tmp_path_factory.mktemp("act"), spec, {})


@pytest.fixture(scope="session")
def exported_diffusion(tmp_path_factory):
    """(folder, exported graphs by name) of a tiny Diffusion Policy of one level."""
    pytest.importorskip("torch")
    from vla_models import policy_class

    spec, tiny = policy_class("diffusion_policy").preset("tiny")
    changes = dataclasses.asdict(tiny) | {"channels": (16,)}
    return _exported(tmp_path_factory.mktemp("diffusion"), spec, changes)


def _exported(folder, spec, changes):
    torch = pytest.importorskip("torch")
    from vla_models import build
    from vla_models.checkpoint import Checkpoint, write_checkpoint, write_tensors
    from vla_models.export import export_checkpoint

    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    normalizers = {name: Normalizer("mean_std", rng.normal(size=dim), rng.uniform(0.5, 2, dim))
                   for name, dim in (("state", spec.state_dim), ("action", spec.action_dim))}  # fmt: skip
    config = TINY.get(spec.recipe, {}) | changes
    network = build(spec.recipe, config, spec=spec, normalizers=normalizers).network
    weights = {name: value.numpy() + rng.normal(0, 0.05, value.shape).astype(np.float32)
               for name, value in network.state_dict().items()}  # fmt: skip
    write_checkpoint(Checkpoint(spec, normalizers, config), folder)
    write_tensors(folder / "model.safetensors", weights)
    return folder, {graph.name: graph for graph in export_checkpoint(folder)}
