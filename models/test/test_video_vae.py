"""Wan2.2's video encoder: causal, and the same in pieces as whole."""

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from vla_models.parts.video_vae import VaeConfig, VideoEncoder  # noqa: E402


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return VideoEncoder(VaeConfig(channels=4, growth=(1, 2, 2, 2), blocks=1)).eval()


@settings(max_examples=5, deadline=None)
@given(groups=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_a_video_in_pieces_gives_the_latents_of_the_whole(encoder, groups):
    """Largest difference found: 2e-6."""
    video = torch.rand(2, 3, 1 + 4 * sum(groups), 32, 32)
    with torch.no_grad():
        whole = encoder(video)
        latents, past = encoder.piece(video[:, :, :1])
        pieces, start = [latents], 1
        for count in groups:
            latents, past = encoder.piece(video[:, :, start : start + 4 * count], past)
            pieces.append(latents)
            start += 4 * count
    assert whole.shape == (2, 48, 1 + sum(groups), 2, 2)
    torch.testing.assert_close(torch.cat(pieces, 2), whole, atol=1e-5, rtol=1e-5)


def test_no_latent_sees_a_later_frame(encoder):
    video = torch.rand(1, 3, 9, 32, 32)
    other = video.clone()
    other[:, :, 5:] = 0
    with torch.no_grad():
        first, second = encoder(video), encoder(other)
    torch.testing.assert_close(first[:, :, :2], second[:, :, :2], rtol=0, atol=0)
    assert (first[:, :, 2] - second[:, :, 2]).abs().max() > 1e-3


def test_it_is_frozen(encoder):
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
