"""The recipe "lingbot_va" against LeRobot 0.6.1 over three chunks of an episode, its loop, its loss, its folder."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import vla_models  # noqa: E402
from lingbot_episode import drive  # noqa: E402
from parity.fixture import Fixture  # noqa: E402
from parity.wan_folder import write_folder  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from vla_models import build  # noqa: E402
from vla_models.checkpoint import Checkpoint, write_checkpoint, write_tensors  # noqa: E402
from vla_models.export import export_checkpoint, graph_sources  # noqa: E402
from vla_models.parts.video_dit import patches  # noqa: E402
from vla_models.policy import ArmState, CheckpointError, InferenceRequest, PolicyError, PolicyObservation  # noqa: E402
from vla_models.published import translate  # noqa: E402
from vla_models.recipes.lingbot_va import Draw, LingBotVaPolicy, training_mask  # noqa: E402
from vla_models.runtime_key_frames import KeyFrameOnnx  # noqa: E402
from vla_models.torch_policy import Batch, Inputs  # noqa: E402

CAMERAS = ("image", "wrist")
STATISTICS = {"action.q01": torch.full((7,), -1.0), "action.q99": torch.full((7,), 1.0)}
PERIOD, TASK = 0.05, "w5 w6 w7"


@pytest.fixture(scope="module")
def fixture():
    return Fixture("lingbot_va")


@pytest.fixture(scope="module")
def loaded(fixture, tmp_path_factory):
    return vla_models.load(write_folder(fixture, tmp_path_factory.mktemp("lingbot_va"), STATISTICS))


@pytest.fixture
def policy(loaded):
    loaded.reset()
    yield loaded
    loaded.reset()


def close(name, found, expected, tolerance=1e-4):
    print(name, float((found - expected).abs().max()))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def see(fixture, tick, history=(), task=TASK, offset=0.0) -> PolicyObservation:
    """The picture of a tick of the fixture's episode."""
    images = {c: fixture.inputs[f"observation.images.{c}"][tick].permute(1, 2, 0).numpy() for c in CAMERAS}
    state = {"arm": ArmState(np.zeros(7), np.array([0.4, 0, 0.3, 1.0, 0, 0, 0]), 0.5)}
    return PolicyObservation(images, state, task, 7.0 + tick * PERIOD + offset, tuple(history))


def say(policy, fixture, monkeypatch):
    """Chunks of normalised actions from the reference's noise: say(observation, number of the chunk)."""
    run = policy.run

    def chunk(observation, n):
        actions = fixture.inputs[f"action_noise{n}"][..., 0].permute(0, 2, 3, 1).flatten(1, 2)
        video = patches(fixture.inputs[f"video_noise{n}"]).flatten()
        rows = policy.noise_shape[1] - actions.shape[1]
        video = torch.nn.functional.pad(video, (0, rows * actions.shape[2] - len(video))).reshape(1, rows, -1)
        noise, said = torch.cat([actions, video], 1).numpy(), []
        monkeypatch.setattr(policy, "run", lambda i, _, p, t: said.append(run(i, noise, p, t)) or said[0])
        policy.infer(observation)
        return torch.from_numpy(said[0])

    return chunk


def expected(fixture, n):
    channels = fixture.config["policy"]["used_action_channel_ids"]
    return fixture.outputs[f"actions{n}"][0, channels, ..., 0].flatten(1).T


def test_an_episode_is_the_references(fixture, policy, monkeypatch):
    """Largest differences found: actions 2e-5, cache 3e-5 (angles of times up to 1000 are float32 in both)."""
    chunk = say(policy, fixture, monkeypatch)
    actions = [chunk(see(fixture, 0), 0)]
    for tick in range(1, 4):
        policy.observe(see(fixture, tick))
    actions.append(chunk(see(fixture, 4), 1))
    actions.append(chunk(see(fixture, 12, [see(fixture, tick) for tick in range(5, 12)]), 2))
    # Of the first chunk frame 0 is at hand: its four actions are none.
    close("chunk 0", actions[0][0], expected(fixture, 0)[4:])
    close("chunk 1", actions[1][0], expected(fixture, 1))
    close("cache", policy.episode.cache, fixture.outputs["cache"])
    close("chunk 2", actions[2][0], expected(fixture, 2))
    said = torch.cat([actions[0][0], actions[1][0], actions[2][0, :1]])
    close("said", said, fixture.outputs["said"])


def test_after_two_chunks_the_cache_holds_what_was_seen_and_done_alone(fixture, policy, monkeypatch):
    """Made anew from the pictures and the executed actions, without an imagined frame, it is the same."""
    chunk = say(policy, fixture, monkeypatch)
    first = chunk(see(fixture, 0), 0)
    second = chunk(see(fixture, 4, [see(fixture, tick) for tick in range(1, 4)]), 1)
    chunk(see(fixture, 12, [see(fixture, tick) for tick in range(5, 12)]), 2)
    network, text = policy.network, policy.episode.text
    with torch.no_grad():
        pictures = [fixture.inputs[f"observation.images.{c}"].transpose(0, 1)[None] / 255 for c in CAMERAS]
        latents = patches(torch.cat([network.vae(video) for video in pictures], -1))
        done = torch.cat([torch.zeros(1, 4, 7), first, second], 1)
        actions = network.scatter(done).unflatten(1, (-1, 4))
        cache = network.write(latents[:, :2], actions[:, :2], text, network.turns(2, 0))
        later = network.write(latents[:, 2:], actions[:, 2:], text, network.turns(2, 2), cache)
        cache = torch.cat([cache, later], 4)
    assert policy.episode.frames == 4
    close("cache", policy.episode.cache, cache, 1e-5)


def test_imagining_leaves_no_trace(fixture, policy):
    policy.infer(see(fixture, 0), InferenceRequest(seed=1))
    first = policy.infer(see(fixture, 4, [see(fixture, tick) for tick in range(1, 4)]), InferenceRequest(seed=2))
    cache = policy.episode.cache.clone()
    other = policy.infer(see(fixture, 4), InferenceRequest(seed=3))
    again = policy.infer(see(fixture, 4), InferenceRequest(seed=2))
    torch.testing.assert_close(policy.episode.cache, cache, rtol=0, atol=0)
    np.testing.assert_array_equal(first.targets, again.targets)
    assert np.abs(first.targets - other.targets).max() > 1e-3


def test_what_is_observed_twice_or_between_key_frames_counts_once(fixture, policy):
    """The node's history, `observe` and pictures between two key frames all give the same episode."""
    ticks = [see(fixture, tick) for tick in range(5)]
    between = [see(fixture, tick, offset=0.2 * PERIOD) for tick in range(4)]
    policy.infer(ticks[0], InferenceRequest(seed=1))
    policy.infer(dataclasses.replace(ticks[4], history=tuple(ticks[1:4])), InferenceRequest(seed=2))
    cache = policy.episode.cache.clone()
    policy.reset()
    policy.observe(ticks[0])  # before the first chunk: not yet an episode
    policy.infer(ticks[0], InferenceRequest(seed=1))
    for tick in (between[0], ticks[1], between[1], ticks[1], ticks[2], between[2], ticks[3], between[3]):
        policy.observe(tick)
    policy.infer(dataclasses.replace(ticks[4], history=tuple(ticks[1:4])), InferenceRequest(seed=2))
    torch.testing.assert_close(policy.episode.cache, cache)


def test_a_chunk_asked_for_in_the_middle_of_a_frame_goes_on_there(fixture, policy, monkeypatch):
    chunk = say(policy, fixture, monkeypatch)
    whole = chunk(see(fixture, 0), 0)
    policy.reset()
    chunk(see(fixture, 0), 0)
    later = chunk(see(fixture, 2, [see(fixture, 1)]), 0)
    assert policy.episode.frames == 0 and len(policy.episode.waiting) == 2
    # Nothing is written yet, so the same chunk is imagined; two of its actions are past.
    torch.testing.assert_close(later[0], whole[0, 2:])
    out = policy.infer(see(fixture, 4, [see(fixture, 3)]), InferenceRequest(seed=0))
    assert policy.episode.frames == 2 and not policy.episode.waiting and np.isfinite(out.targets).all()


@pytest.mark.parametrize("why", ["instruction", "clock", "gap", "reset", "failure"])
def test_another_episode_begins_anew(fixture, policy, why):
    fresh = policy.infer(see(fixture, 5), InferenceRequest(seed=1)).targets
    policy.reset()
    policy.infer(see(fixture, 0), InferenceRequest(seed=1))
    policy.infer(see(fixture, 4, [see(fixture, tick) for tick in range(1, 4)]), InferenceRequest(seed=1))
    assert policy.episode.frames == 2
    observation = see(fixture, 5)
    if why == "instruction":
        observation = see(fixture, 5, task="w8")
    elif why == "clock":
        observation = see(fixture, 5, offset=-3.0)
    elif why == "gap":
        observation = see(fixture, 5, offset=3 * PERIOD)
    elif why == "reset":
        policy.reset()
    else:
        with pytest.raises(PolicyError, match="expected camera 'wrist'"):
            policy.infer(dataclasses.replace(observation, images={"image": observation.images["image"]}))
    found = policy.infer(observation, InferenceRequest(seed=1)).targets
    assert policy.episode.frames == 0 and policy.episode.cache is None
    if why != "instruction":
        np.testing.assert_allclose(found, fresh, atol=1e-6)


def test_the_window_forgets_the_oldest(policy):
    loop = dataclasses.replace(policy.loop, window=10)
    own = np.array([True, True, True, True, False])
    assert loop.sees(6, 6, own)[0].tolist() == [True] * 6 + own.tolist()
    assert loop.sees(8, 7, own)[0].tolist() == [False] + [True] * 6 + [False] + own.tolist()
    assert loop.sees(8, 0, own)[0].tolist() == [False] * 8 + own.tolist()


#: When chunks are asked for, in ticks: of a chunk's 12 actions all are executed, or fewer.
ASKED = ((0, 8, 20, 32, 44), (0, 3, 7, 9, 16, 28, 33))
WITHOUT_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Blocker())
sys.path.append(sys.argv[1])
import numpy as np
import vla_models
from lingbot_episode import drive

policy = vla_models.load(sys.argv[2], runtime="onnx", threads=1)
np.savez(sys.argv[3], *(said for asked in eval(sys.argv[4]) for said in drive(policy, asked)))
assert "torch" not in sys.modules
"""


class Eager:
    """A graph of the export as torch computes it: what is not static in it, or not there, fails."""

    device = "cpu"

    def __init__(self, source):
        self.source, self.outputs, self.metadata = source, list(source.outputs), source.metadata
        self.inputs = {name: tuple(value.shape) for name, value in source.example.items()}

    def __call__(self, values, keep=False):
        given = {name: values[name] for name in self.inputs}
        given = {name: value if isinstance(value, np.ndarray) else value.numpy() for name, value in given.items()}
        for name, value in self.source.example.items():
            assert given[name].shape == value.shape and given[name].dtype == value.numpy().dtype, name
        with torch.no_grad():
            found = self.source.function(**{name: torch.from_numpy(value.copy()) for name, value in given.items()})
        return list(found) if keep else [value.numpy() for value in found]


def tiny(window=4):
    """A tiny policy whose cache soon overflows."""
    torch.manual_seed(0)
    _, config = LingBotVaPolicy.preset("tiny")
    return build("lingbot_va", dataclasses.asdict(config) | {"window": window})


def test_graphs_of_fixed_size_drive_the_same_episode():
    """The driver of ONNX Runtime, with torch for the graphs: padded frames and cache change nothing."""
    policy = tiny()
    checkpoint = Checkpoint(policy.spec, vla_models.identity_normalizers(policy.spec), {})
    driven = KeyFrameOnnx(checkpoint, {source.name: Eager(source) for source in graph_sources(policy)})
    driven.warm_up()
    assert driven.noise_shape == policy.noise_shape and driven.episode is None
    for asked in ASKED:
        policy.reset()
        driven.reset()
        for mine, theirs in zip(drive(policy, asked), drive(driven, asked), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
        assert policy.episode.frames == driven.episode.frames > 2 * policy.loop.frames
        assert policy.episode.filled == driven.episode.filled == policy.loop.window == driven.episode.cache.shape[4]
        close("cache", driven.episode.cache, policy.episode.cache, 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_onnx_runtime_drives_the_same_episode_without_torch(tmp_path):
    policy = tiny()
    normalizers = vla_models.identity_normalizers(policy.spec)
    folder, found = tmp_path / "policy", tmp_path / "found.npz"
    write_checkpoint(Checkpoint(policy.spec, normalizers, dataclasses.asdict(policy.config)), folder)
    write_tensors(folder / "model.safetensors", {k: v.numpy() for k, v in policy.network.state_dict().items()})
    graphs = export_checkpoint(folder)
    assert [graph.name for graph in graphs] == ["encoder", "first", "next", "write", "video", "action"]
    command = [sys.executable, "-c", WITHOUT_TORCH, str(Path(__file__).parent), str(folder), str(found), repr(ASKED)]
    subprocess.run(command, check=True, timeout=600)
    said = []
    for asked in ASKED:
        policy.reset()
        said += drive(policy, asked)
    for mine, theirs in zip(said, np.load(found).values(), strict=True):
        print(float(np.abs(mine - theirs).max()))
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_both_losses_are_the_references(fixture, loaded):
    """Largest differences found: video 5e-7, action 4e-6 (the reference's attention computed in float32)."""
    inputs, network = fixture.inputs, loaded.network

    def frames(name):
        return inputs[name][..., 0].permute(0, 2, 3, 1)

    chunk, window = inputs["chunk"].tolist()
    draw = Draw(
        patches(inputs["loss_video"]), frames("loss_action"), inputs["video_share"], inputs["action_share"],
        patches(inputs["seen"]), inputs["seen_share"], chunk, window,
    )  # fmt: skip
    features = torch.nn.functional.pad(inputs["features"], (0, 0, 0, 507))
    with torch.no_grad():
        losses = network.flow_loss(
            network.stream.read(features), patches(inputs["loss_latents"]), frames("loss_actions"),
            frames("loss_mask"), torch.ones(2, 3), draw,
        )  # fmt: skip
    close("video", losses["video"], fixture.outputs["video"])
    close("action", losses["action"], fixture.outputs["action"])


def test_in_training_nothing_sees_what_it_cannot_know_in_use():
    frames, tokens, each, chunk = 4, 2, 3, 2
    mask = training_mask(frames, tokens, each, chunk, 64)
    video, action = frames * tokens, frames * each
    noisy, seen = slice(0, video), slice(video, 2 * video)
    acting, done = slice(2 * video, 2 * video + action), slice(2 * video + action, None)
    assert mask[noisy, noisy][:4, :4].all() and not mask[noisy, noisy][:4, 4:].any()
    assert not mask[noisy, seen][:4].any()  # the first chunk of video is imagined from nothing
    assert mask[noisy, seen][4:, :4].all() and not mask[noisy, seen][4:, 4:].any()
    assert mask[acting, seen][:6, :4].all() and not mask[acting, seen][:6, 4:].any()  # actions are read off the video
    assert not mask[:, noisy][seen].any() and not mask[:, noisy][acting].any() and not mask[:, acting][done].any()
    assert not mask[acting, done][:6].any() and mask[acting, done][6:, :6].all()
    near = training_mask(frames, tokens, each, chunk, 1)
    assert not near[noisy, seen][4:, :4].any() and near[acting, seen][6:, 4:].all()


def test_the_loss_draws_all_its_numbers_from_the_generator():
    torch.manual_seed(0)
    policy = build("lingbot_va")
    inputs = Inputs((torch.rand(2, 12, 3, 32, 32),), torch.ones(2, 32, dtype=torch.long), torch.zeros(2, 12, 8),
                    torch.ones(2, 1, dtype=torch.bool))  # fmt: skip
    batch = Batch(inputs, torch.randn(2, 12, 8), torch.zeros(2, 12, dtype=torch.bool))
    future = (torch.rand(2, 12, 3, 32, 32),)
    with torch.no_grad():
        losses = [policy.loss(batch._replace(future=future), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        still = policy.loss(batch, torch.Generator().manual_seed(1))
    assert losses[0]["loss"] == losses[1]["loss"] != losses[2]["loss"]
    assert losses[0]["video"] > 0 and still["video"] == 0 and still["action"] > 0


def test_training_leaves_instructions_out_for_the_guidance():
    said = {}
    for dropout in (0.0, 1.0):
        torch.manual_seed(0)
        policy = build("lingbot_va", dataclasses.asdict(LingBotVaPolicy.preset("tiny")[1]) | {"text_dropout": dropout})
        for words in ("", "pick", "place"):
            tokens = torch.from_numpy(policy.processor.tokenizer.encode(words))[None]
            inputs = Inputs((torch.rand(1, 12, 3, 32, 32, generator=torch.Generator().manual_seed(0)),), tokens,
                            torch.zeros(1, 12, 8), torch.ones(1, 1, dtype=torch.bool))  # fmt: skip
            batch = Batch(inputs, torch.ones(1, 12, 8), torch.zeros(1, 12, dtype=torch.bool))
            with torch.no_grad():
                said[dropout, words] = float(policy.loss(batch, torch.Generator().manual_seed(1))["loss"])
    assert len({said[0.0, words] for words in ("", "pick", "place")}) == 3
    assert {said[1.0, words] for words in ("", "pick", "place")} == {said[0.0, ""]}


def test_three_cameras_are_put_together_as_robotwin_does():
    spec, config = LingBotVaPolicy.preset("tiny")
    cameras = {"head": (64, 64), "left": (32, 32), "right": (32, 32)}
    settings = dataclasses.asdict(config) | {"layout": "above"}
    policy = build("lingbot_va", settings, spec=dataclasses.replace(spec, cameras=cameras))
    assert (policy.network.rows, policy.network.columns) == (3, 2)
    images = tuple(torch.rand(1, 3, 1, *size) for size in cameras.values())
    with torch.no_grad():
        latents, _ = policy.network.see(images)
        below, left = policy.network.vae.piece(images[0])[0], policy.network.vae.piece(images[1])[0]
    torch.testing.assert_close(latents[:, :, 2:], patches(below))
    torch.testing.assert_close(latents[:, :, :1], patches(left))
    with pytest.raises(PolicyError, match="fit together"):
        build("lingbot_va", settings, spec=dataclasses.replace(spec, cameras=cameras | {"left": (64, 64)}))


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_a_tensor_that_does_not_fit_is_named(fixture, tmp_path, fault):
    folder = write_folder(fixture, tmp_path / "policy", STATISTICS)
    tensors, name = load_file(folder / "model.safetensors"), "transformer.action_embedder.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors["stranger"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    words = {"missing": "1 tensors missing", "extra": "stranger", "misshapen": f"{name}: expected shape"}[fault]
    with pytest.raises(CheckpointError, match=words):
        vla_models.load(folder)


def test_the_rules_cover_the_full_size(fixture):
    paper = set(build("lingbot_va", "paper", device="meta").network.state_dict())
    tiny = fixture.shapes
    names = {name.replace("transformer.blocks.1.", f"transformer.blocks.{n}.") for name in tiny for n in range(1, 30)}
    names |= {name.replace("block.0.", f"block.{n}.") for name in tiny for n in range(24) if "text_enc" in name}
    ours = set(translate(names, LingBotVaPolicy.published)[0])
    assert not {name for name in paper - ours if "vae." not in name}  # the VAE has two blocks a stage, the tiny one
    assert not {name for name in ours - paper if "conv_shortcut" not in name}
