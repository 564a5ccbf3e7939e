"""The frozen parts of Wan2.2 (arXiv 2503.20314) that its descendants carry: UMT5-XXL as text encoder, and the VAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vla_models.parts.text_encoder import t5_rules, t5_size
from vla_models.parts.video_vae import VaeConfig
from vla_models.policy import CheckpointError
from vla_models.published import Rule, TensorFiles, find_checkpoint, own_shapes, read_config, require

#: Names of the frozen parts' tensors as `open_wan` holds them -> those of the modules `vae` and `text`.
WAN_RULES = (
    Rule(r"vae\.((encoder|quant_conv)\..+)", r"vae.\1"),
    Rule(r"vae\.(decoder|post_quant_conv)\..+", None, "the autoencoder's decoder: no picture is painted in use"),
    *t5_rules(r"text_encoder\."),
)


def open_wan(folder: Path, files: TensorFiles, source: str) -> tuple[dict[str, Any], str]:
    """Let `files` also hold the frozen autoencoder and text encoder, as "vae." and "text_encoder.".

    They lie in the folders vae, text_encoder and tokenizer beside the weights, or in `source` (a local folder, or a
    name on the Hugging Face hub, of which only these are downloaded). Returns the settings `vae` and `text` of a
    network, and where the tokenizer.json is. Raises CheckpointError.
    """
    place = folder if (folder / "vae").is_dir() else find_checkpoint(source, ("vae/*", "text_encoder/*", "tokenizer/*"))
    for name in ("vae", "text_encoder"):
        if not (place / name / "config.json").is_file():
            raise CheckpointError(
                f"{place / name}: expected the frozen {name} of {source} (config.json and safetensors), found none"
            )
        files.join(f"{name}.", place / name)
    vae = read_config(place / "vae")
    require(place / "vae" / "config.json", {"is_residual": False, **vae}, {"is_residual": True, "patch_size": 2})
    frozen = {
        "vae": VaeConfig(
            vae["base_dim"], tuple(vae["dim_mult"]), vae["num_res_blocks"], vae["z_dim"], tuple(vae["latents_mean"]),
            tuple(vae["latents_std"]),
        ),
        "text": replace(t5_size(own_shapes(TensorFiles(place / "text_encoder"), t5_rules(""))), kind="umt5"),
    }  # fmt: skip
    return frozen, str((Path() if place == folder else place.resolve()) / "tokenizer" / "tokenizer.json")
