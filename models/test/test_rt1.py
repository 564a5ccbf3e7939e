"""The recipe "rt1" against the public code, and what is particular to it: its mask, its bins, its language."""

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from parity.fixture import Fixture  # noqa: E402
from vla_models import build  # noqa: E402
from vla_models.parts.efficientnet import BatchNorm  # noqa: E402
from vla_models.published import Rule, fill  # noqa: E402
from vla_models.recipes.rt1 import Rt1Config, Rt1Policy, hidden  # noqa: E402
from vla_models.tokenizers import BinTokenizer  # noqa: E402
from vla_models.torch_policy import Batch, Inputs  # noqa: E402

TINY = Rt1Config(32, 2, 2, 16, tokens=2, bins=64, width_scale=0.3, depth_scale=0.25, words=16, dropout=0.0)


class Reference(Fixture):
    """The public code's variables, with Keras' axes turned into torch's and its numbered layers into ours."""

    BLOCKS = ["1a", "2a", "3a", "4a", "5a", "6a", "7a"]
    BLOCK = {
        "expand_conv": "expansion.expand_conv", "expand_bn": "expansion.expand_bn",
        "dwconv": "depthwise_conv.depthwise_conv", "bn": "depthwise_conv.depthwise_norm",
        "se_reduce": "squeeze_excite.reduce", "se_expand": "squeeze_excite.expand",
        "project_conv": "projection.project_conv", "project_bn": "projection.project_bn",
    }  # fmt: skip
    KINDS = {"kernel": "weight", "depthwise_kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias",
             "moving_mean": "running_mean", "moving_variance": "running_var"}  # fmt: skip

    def __init__(self):
        super().__init__("rt1")
        self.raw = list(self.weights)
        self.weights = dict(self.named(*item) for item in self.weights.items())
        bias = self.weights.pop("places.bias")  # of a one-hot layer: the same for each place
        self.weights["places"] = self.weights.pop("places.weight").T + bias

    def named(self, name: str, value):
        *path, kind = name.split("/")
        part, layer, kind = path[0], path[-1], self.KINDS[kind]
        number = int((re.search(r"_(\d+)$", layer) or [0, 0])[1])
        if part == "encoder" and layer.startswith("dense"):
            module = f"encoder.films.{number // 2}.{'scale' if number % 2 else 'shift'}"
        elif part == "encoder" and (match := re.fullmatch(r"block(\w\w)_(\w+)", layer)):
            module = f"encoder.body.blocks.{self.BLOCKS.index(match[1])}.{self.BLOCK[match[2]]}"
        elif part == "encoder":
            module = {"stem_conv": "stem.convolution", "stem_bn": "stem.batchnorm"}.get(layer, f"body.{layer}")
            module = f"encoder.{module}"
        elif part in ("film", "conv1x1"):
            module = {"conv2d": "out", "dense_16": "film.shift", "dense_14": "film.shift"}.get(layer, "film.scale")
            module = f"encoder.{module}"
        elif part == "token_learner":
            module = {"layer_normalization": "norm", "hidden_dense": "mlp.0", "final_dense": "mlp.2"}[layer]
            module = f"token_learner.{module}"
        elif len(path) == 3:  # the last three dense layers
            last = max(self.dense_numbers)
            module = {last: "logits_out", last - 1: "places", last - 2: "token_in"}[number]
        else:
            block = int((re.search(r"layer_(\d+)$", path[2]) or [0, 0])[1])
            if layer.startswith("layer_normalization"):
                module = f"norms.{(number - 1) % 2}"
            else:
                ours = {"attention_output": "out"}.get(layer, layer)
                module = "feed.out" if layer.startswith("dense") else f"attention.{ours}"
                if ours in ("query", "key", "value"):
                    value = value.flatten(-2)
                elif ours == "out" and value.ndim == 3:
                    value = value.flatten(0, 1)
            module = f"blocks.{block}.{module}"
        if value.ndim == 4:
            value = value.permute(2, 3, 0, 1) if name.endswith("depthwise_kernel") else value.permute(3, 2, 0, 1)
        elif value.ndim == 2:
            value = value.T
        return f"{module}.{kind}", value

    @property
    def dense_numbers(self) -> list[int]:
        return [int(m[1]) for m in (re.search(r"transformer/dense_(\d+)/", name) for name in self.raw) if m]


@pytest.fixture(scope="module")
def policy():
    """Tiny, with statistics of its batch norms that keep what differs between images."""
    torch.manual_seed(0)
    policy = build("rt1")
    norms = [module for module in policy.network.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        policy.network.train().logits(make_batch(policy).inputs)
    policy.network.eval()
    return policy


def make_batch(policy, padded: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(2, policy.spec.context, dtype=torch.long)
    tokens[:, 0], tokens[1, 1] = 1, 2
    inputs = Inputs((torch.rand(2, 2, 3, 48, 64, generator=generator),), tokens, torch.randn(2, 2, 8),
                    torch.ones(2, 1, dtype=torch.bool))  # fmt: skip
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 8 - padded :] = padded > 0
    return Batch(inputs, 2 * torch.rand(2, 8, 8, generator=generator) - 1, mask)


def test_features_tokens_and_logits_are_the_references():
    """Against google-research/robotics_transformer 4569641 on TensorFlow. Largest difference found: 6e-7."""
    reference = Reference()
    spec, _ = Rt1Policy.preset("paper")
    spec = type(spec).from_dict({**spec.to_dict(), "cameras": {"scene": [48, 64]}, "history": 2})
    network = build("rt1", TINY, spec=spec).network
    own = {k: v for k, v in network.state_dict().items() if k.startswith(("words", "instruction"))}
    reference.weights |= own  # what the public code does not have
    fill(network, reference, [Rule("(.*)", r"\1")])
    image, context = reference.inputs["image"], reference.inputs["context"]
    with torch.no_grad():
        found = {
            "features": network.encoder(image.flatten(0, 1), context.repeat_interleave(2, 0)),
            "tokens": network.image_tokens(image, context),
            "logits": network.logits_of((image,), context),
        }
    expected = reference.outputs
    expected["logits"] = expected["logits"][:, :7].unsqueeze(1)
    for name, value in found.items():
        print(name, (value - expected[name]).abs().max().item())
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4)


def test_a_place_sees_images_up_to_its_time_and_no_action_token():
    mask = hidden(2, 2, 3)[0]
    assert mask.shape == (10, 10)
    sees = [set(torch.nonzero(~row).flatten().tolist()) for row in mask]
    assert sees[1] == {0, 1}  # the last image token of the first time: the first logits are read here
    assert sees[2] == sees[4] == {0, 1}  # action tokens: images, not each other, not themselves
    assert sees[5] == {0, 1, 2, 3, 4, 5}  # the next image sees the (empty) action tokens before it
    assert sees[9] == {0, 1, 5, 6}


def test_the_past_and_the_instruction_matter(policy):
    batch = make_batch(policy)
    images, tokens = batch.inputs.images, batch.inputs.tokens
    past = images[0].clone()
    past[:, 0] = 0.0
    with torch.no_grad():
        for film in policy.network.encoder.films:
            film.scale.weight.normal_(0, 0.1)
        before = policy.network.logits(batch.inputs)
        changes = batch.inputs._replace(images=(past,)), batch.inputs._replace(tokens=tokens.flip(0))
        for inputs in changes:
            assert (policy.network.logits(inputs) - before).abs().max() > 1e-5


def test_actions_are_values_of_bins_and_the_loss_is_their_cross_entropy(policy):
    batch, network = make_batch(policy, padded=3), policy.network
    bins = BinTokenizer(-1.0, 1.0, 256, "truncate")
    with torch.no_grad():
        logits, actions = network.logits(batch.inputs), network(batch.inputs)
        loss = network.loss(batch, torch.Generator())["loss"]
    np.testing.assert_allclose(actions, bins.decode(logits.argmax(-1).numpy()), atol=1e-6)
    chosen = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(bins.encode(batch.actions))[..., None])
    torch.testing.assert_close(loss, -chosen[:, :5].mean())
    wild = batch.actions.clone()
    wild[:, 5:] = 7.0
    with torch.no_grad():
        torch.testing.assert_close(network.loss(batch._replace(actions=wild), torch.Generator())["loss"], loss)


def test_published_shapes():
    paper, larger = (build("rt1", name, device="meta").network for name in ("paper", "rt1x"))
    image, condition = torch.empty(1, 3, 300, 300, device="meta"), torch.empty(1, 512, device="meta")
    assert paper.encoder(image, condition).shape == (1, 512, 9, 9)
    assert sum(p.numel() for p in paper.encoder.parameters()) == pytest.approx(16e6, rel=0.02)
    assert sum(p.numel() for p in paper.blocks.parameters()) == pytest.approx(19e6, rel=0.01)
    assert sum(p.numel() for p in paper.token_learner.parameters()) == pytest.approx(34e3, rel=0.02)
    assert paper.places.shape == (6 * (8 + 11), 512) and paper.logits_out.out_features == 256
    assert larger.places.shape == (15 * (81 + 11), 512) and larger.logits_out.out_features == 512
    assert larger.blocks[0].attention.query.out_features == 8 * 256 and larger.blocks[0].feed.gate is not None
