"""The frozen parts of Wan2.2 at a tiny size, for make_fast_wam.py and make_lingbot_va.py (need diffusers)."""

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

VOCABULARY, TEXT = 40, 16


def fill(module: nn.Module) -> nn.Module:
    """Random numbers wherever a new module has none: what it computes then depends on all of it."""
    with torch.no_grad():
        for value in module.parameters():
            if not value.any() or (value == 1).all():
                value.add_(0.1 * torch.randn_like(value))
    return module.eval().requires_grad_(False)


def make_vae() -> AutoencoderKLWan:
    """Wan2.2's autoencoder; its 48 channels are its users' constant."""
    vae = AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=48, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, True, True], is_residual=True, patch_size=2, in_channels=12, out_channels=12,
        latents_mean=torch.linspace(-0.3, 0.3, 48).tolist(), latents_std=torch.linspace(0.5, 1.5, 48).tolist(),
        scale_factor_spatial=16, scale_factor_temporal=4,
    )  # fmt: skip
    return fill(vae)


def make_text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=VOCABULARY, d_model=TEXT, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return fill(UMT5EncoderModel(config))


def frozen_weights(vae: AutoencoderKLWan, text: UMT5EncoderModel) -> dict[str, Tensor]:
    """Their tensors, named by the folder in which they are published; one of the decoder's for all of them."""
    tensors = {f"vae.{name}": value for name, value in vae.state_dict().items()}
    tensors = {name: v for name, v in tensors.items() if "decoder" not in name or name == "vae.decoder.conv_in.bias"}
    words = {f"text_encoder.{name}": v for name, v in text.state_dict().items() if "embed_tokens" not in name}
    return tensors | words


def frozen_configs(vae: AutoencoderKLWan, text: UMT5EncoderModel) -> dict:
    """Their config.json, as they are published."""
    umt5 = {name: value for name, value in text.config.to_dict().items() if isinstance(value, int | str)}
    return {"vae": dict(vae.config), "text_encoder": umt5}
