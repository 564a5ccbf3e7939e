"""Every recipe, at its tiny size, learns 16 samples of a recorded demonstration by heart."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rclpy", reason="bags are written with ROS messages")
from vla_core.actions import ActionSpace  # noqa: E402
from vla_core.robot import load_robot  # noqa: E402
from vla_models import RECIPES, policy_class  # noqa: E402
from vla_models.data import Dataset, fit_normalizers  # noqa: E402
from vla_models.episodes import load_episodes  # noqa: E402
from vla_models.policy import ModelInputs, PolicySpec  # noqa: E402
from vla_models.train import TrainConfig, Trainer  # noqa: E402

SAMPLES = 16
#: Optimisation steps and learning rate, where a recipe wants others than most.
STEPS, RATE = 150, 6e-3
SETTINGS: dict[str, tuple[int, float]] = {
    "act": (100, 3e-3),
    "diffusion_policy": (280, 2e-3),
    "fast_wam": (150, 8e-3),
    "flow": (120, 6e-3),
    "gr2": (250, 4e-3),
    "lingbot_va": (400, 1.5e-2),
    "octo": (600, 4e-3),
    "openvla": (150, 3e-3),
    "openvla_oft": (150, 1e-2),
    "pi0_fast": (150, 1e-2),
    "rdt": (200, 4e-3),
    "rt1": (150, 6e-3),
    "rt2": (250, 6e-3),
    "rth": (250, 6e-3),
    "smolvla": (250, 8e-3),
    "wall_oss": (150, 3e-3),
    "wall_oss_fast": (250, 6e-3),
}
#: Settings of a network without which training sees other images than use does.
NETWORKS: dict[str, dict] = {"diffusion_policy": {"crop": ()}}
#: One recipe of each kind of head but diffusion, which wants more steps; all of them together are slow.
QUICK = ("act", "flow", "openvla")


def marks(name: str) -> list:
    """Of a recipe's test."""
    return [] if name in QUICK else [pytest.mark.slow]


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    """One demonstration of the scripted expert in the simulator, recorded."""
    folder = tmp_path_factory.mktemp("bags")
    command = [sys.executable, "-m", "vla_sim.demonstrate", "--robot", "panda", "--task", "pick", "--episodes", "1"]
    subprocess.run([*command, "--out", str(folder), "--workers", "1"], check=True, timeout=240)
    return folder


def panda_spec(name: str) -> PolicySpec:
    """The tiny preset's specification, for the simulated Panda: its cameras in the place of the preset's first."""
    example, _ = policy_class(name).preset("tiny")
    arm = load_robot("panda").arms[0]
    names = [*("scene", "wrist")[: len(example.cameras)], *list(example.cameras)[2:]]
    renamed = dict(zip(example.cameras, names, strict=True))
    return dataclasses.replace(
        example,
        cameras={renamed[camera]: size for camera, size in example.cameras.items()},
        optional=tuple(renamed[camera] for camera in example.optional),
        arms=("arm",),
        joints={"arm": arm.joints},
        action_space=ActionSpace(("arm",), "joint", (7,)),
        vocabulary=("", "cube") if example.vocabulary else (),
        robot="panda",
    )


def error(policy, arrays) -> float:
    """Mean square error of what the policy does in each sample until the episode ends, in normalised units.

    Actions past the end of the episode are no part of any loss, so they are none of what is learnt. A chunk may be
    shorter than the horizon, as LingBot-VA's first one is.
    """
    found = []
    for k in range(SAMPLES):
        images = tuple(np.moveaxis(arrays[f"camera/{camera}"][k : k + 1], -1, -3).astype(np.float32) / 255.0
                       for camera in policy.spec.cameras)  # fmt: skip
        inputs = ModelInputs(images, *(arrays[part][k : k + 1] for part in ("tokens", "state", "present")))
        noise = np.random.default_rng(k).standard_normal(policy.noise_shape).astype(np.float32)
        actions = policy.run(inputs, noise, None, {})[0, :, : policy.spec.action_dim]
        policy.reset()
        wanted, past = (arrays[part][k][: len(actions)] for part in ("actions", "padded"))
        found.append(np.square(actions - wanted)[~past])
    return float(np.mean(np.concatenate(found)))


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in sorted(RECIPES)])
def test_sixteen_samples_are_learnt_by_heart(name, bags):
    kind, spec = policy_class(name), panda_spec(name)
    episodes = load_episodes(bags, spec, workers=1)
    torch.manual_seed(0)
    network = dataclasses.replace(kind.preset("tiny")[1], **NETWORKS.get(name, {}))
    policy = kind(spec, fit_normalizers(episodes, spec, kind.normalization), network)
    dataset = Dataset(episodes, policy.processor)
    arrays = dataset.batch(np.linspace(0, len(dataset) - 1, SAMPLES).astype(int))
    before = error(policy, arrays)
    steps, rate = SETTINGS.get(name, (STEPS, RATE))
    config = TrainConfig(batch=SAMPLES, lr=rate, warmup=10, decay=0.0, jitter=0.0)
    trainer = Trainer(policy, dataset, None, config, seed=0)
    for step in range(steps):
        trainer.advance(arrays, step / steps)
    policy.network.eval()
    after = error(policy, arrays)
    print(f"{name}: {before:.3f} -> {after:.4f}")
    assert after < 0.1 * before
