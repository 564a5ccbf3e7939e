"""What is particular to the recipe "gr2": codes of images, who sees whom, video prediction, the conditional VAE."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from vla_models import build  # noqa: E402
from vla_models.parts.vq import VqAutoencoder  # noqa: E402
from vla_models.policy import PolicyError  # noqa: E402
from vla_models.torch_policy import Batch, Inputs  # noqa: E402

SIZE = 6 * 8 + 4 * 4  # codes of one observation's two cameras


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build("gr2").network


def make_batch(padded: int = 0, wrist: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = tuple(torch.rand(2, 2, 3, *size, generator=generator) for size in ((24, 32), (16, 16)))
    tokens = torch.zeros(2, 24, dtype=torch.long)
    tokens[:, :3] = torch.tensor([1, 50, 60])
    tokens[1, 3] = 70
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 8 - padded :] = padded > 0
    present = torch.tensor([[True, wrist]] * 2)
    inputs = Inputs(images, tokens, torch.randn(2, 2, 8, generator=generator), present)
    return Batch(inputs, torch.randn(2, 8, 8, generator=generator), mask)


@torch.no_grad()
def test_no_output_depends_on_what_comes_after_it(network):
    inputs = make_batch().inputs
    codes = network.codes(inputs.images)
    assert codes.shape == (2, 2, SIZE) and codes.max() < 32
    before, hidden = network.gpt(inputs.tokens, codes, inputs.present, inputs.state)
    assert before.shape[1] == 24 + 2 * (SIZE + 1) + 1
    assert hidden[0, :24].sum() == 21 and hidden[1, :24].sum() == 20 and not hidden[:, 24:].any()
    changed = codes.clone()
    place = 5  # of the second image
    changed[:, 1, place] = (changed[:, 1, place] + 1) % 32
    after, _ = network.gpt(inputs.tokens, changed, inputs.present, inputs.state)
    at = 24 + SIZE + 1 + place
    torch.testing.assert_close(after[:, :at], before[:, :at])
    assert (after[:, at] - before[:, at]).abs().max() > 1e-4 and (after[:, -1] - before[:, -1]).abs().max() > 1e-6


@torch.no_grad()
def test_a_camera_that_is_missing_and_padding_are_not_looked_at(network):
    inputs = make_batch(wrist=False).inputs
    other = (inputs.images[0], torch.rand(2, 2, 3, 16, 16))
    first = network(inputs)
    torch.testing.assert_close(network(inputs._replace(images=other)), first)
    text = inputs.tokens.clone()
    text[:, 10:] = 0  # padding already
    torch.testing.assert_close(network(inputs._replace(tokens=text)), first)
    text[:, 1] = 99
    assert (network(inputs._replace(tokens=text)) - first).abs().max() > 1e-6


@torch.no_grad()
def test_the_video_loss_is_that_of_the_codes_after_the_first_image(network):
    batch = make_batch()
    inputs = batch.inputs
    codes = network.codes(inputs.images)
    x, _ = network.gpt(inputs.tokens, codes, inputs.present)  # as in pre-training: no states, no [ACT]
    assert x.shape[1] == 24 + 2 * SIZE
    logits = torch.log_softmax(network.code_out(x[:, 24 + SIZE - 1 : -1]), -1)
    expected = -logits.gather(-1, codes[:, 1, :, None]).mean()
    torch.testing.assert_close(network.video_loss(inputs.tokens, inputs.images, inputs.present), expected)
    lone = torch.tensor([[True, False]] * 2)
    x, _ = network.gpt(inputs.tokens, codes, lone)
    logits = torch.log_softmax(network.code_out(x[:, 24 + SIZE - 1 : -1]), -1)[:, : 6 * 8]
    alone = -logits.gather(-1, codes[:, 1, : 6 * 8, None]).mean()
    for wrist in (inputs.images[1], torch.rand(2, 2, 3, 16, 16)):  # what stands in for a camera does not count
        found = network.video_loss(inputs.tokens, (inputs.images[0], wrist), lone)
        torch.testing.assert_close(found, alone)


def test_pre_training_needs_no_robot_and_robot_training_does_both():
    torch.manual_seed(0)
    network, batch = build("gr2").network.train(), make_batch()
    inputs = batch.inputs
    network.video_loss(inputs.tokens, inputs.images, inputs.present).backward()
    reached = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert reached == {"text_in", "code_in", "text_places", "code_places", "times", "blocks", "norm", "code_out"}
    losses = network.loss(batch, torch.Generator().manual_seed(0))
    total = losses["l1"] + 10.0 * losses["kl"] + losses["video"] + losses["vq"]
    torch.testing.assert_close(losses["loss"], total)
    assert all(p.grad is None and not p.requires_grad for p in network.text.parameters())


def test_padded_actions_touch_neither_loss_nor_posterior(network):
    batch = make_batch(padded=3)
    wild = batch.actions.clone()
    wild[:, 5:] = 100.0
    network.train()
    losses = [network.loss(b, torch.Generator().manual_seed(0)) for b in (batch, batch._replace(actions=wild))]
    network.eval()
    for name in ("l1", "kl"):
        torch.testing.assert_close(losses[0][name], losses[1][name])


@torch.no_grad()
def test_use_takes_the_mean_of_the_prior(network):
    inputs = make_batch().inputs
    zero = network(inputs, torch.zeros(2, 8))
    torch.testing.assert_close(network(inputs), zero)
    assert (network(inputs, torch.ones(2, 8)) - zero).abs().max() > 1e-4


def test_a_learnt_video_is_imagined():
    """One film whose second image differs from the first: after training, the imagined image is that one's codes."""
    torch.manual_seed(0)
    network, inputs = build("gr2").network, make_batch().inputs
    dark = tuple(torch.cat([image[:, :1], 0 * image[:, 1:]], 1) for image in inputs.images)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = network.video_loss(inputs.tokens, dark, inputs.present)
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    network.history = 1
    first = Inputs(tuple(image[:, 0] for image in dark), inputs.tokens, 0 * inputs.state[:, 0], inputs.present)
    with torch.no_grad():
        network.state_in.weight.zero_()
        network.state_in.bias.zero_()
        imagined = network.imagine(first)
        expected = [network.vq.decode(network.vq.encode(image[:, 1]), grid)
                    for image, grid in zip(dark, network.grids, strict=True)]  # fmt: skip
    for a, b in zip(imagined, expected, strict=True):
        assert a.shape == b.shape and (a - b).abs().mean() < 0.05


def test_the_auto_encoder_learns_a_picture():
    torch.manual_seed(0)
    vq = VqAutoencoder(8, (1, 2), 1, 16, 8)
    image = torch.zeros(1, 3, 16, 16)
    image[:, 0, :, 8:] = 1.0
    optimizer = torch.optim.Adam(vq.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        vq.loss(image).backward()
        optimizer.step()
    codes = vq.encode(image)
    assert codes.shape == (1, 64) and codes.unique().numel() >= 2
    assert (vq.decode(codes, vq.grid(16, 16)) - image).abs().mean() < 0.1


def test_published_sizes():
    network = build("gr2", "paper", device="meta").network
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert trained == pytest.approx(95e6, rel=0.01)
    assert [*network.grids] == [(16, 16), (16, 16)]


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(PolicyError, match="frozen: expected parts"):
        build("gr2", {"frozen": ("images",)}, device="meta")
    with pytest.raises(PolicyError, match="sizes in steps of 16"):
        build("gr2", {}, device="meta")  # the tiny preset's cameras, the published VQ-GAN
