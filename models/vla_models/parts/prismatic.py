"""The vision-language model of OpenVLA: two towers side by side, a projector, Llama 2 (Prismatic, arXiv 2402.07865).

    image --DINOv2----.
          --SigLIP----+-- features side by side --projector--> patches -.
    text: BOS -----------------------------------------------------------+-- [BOS][patches][more][rest of the text]

OpenVLA and OpenVLA-OFT share it, and its names in published files (`RULES`, `published_sizes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_models.parts.language_model import VisionLanguageModel
from vla_models.parts.mixture import text_mask
from vla_models.parts.vit import CentreCrop, VisionTransformer
from vla_models.policy import PolicyError, PolicySpec
from vla_models.published import Rule, TensorFiles, count_layers
from vla_models.torch_policy import Inputs

#: Means and deviations of the images that the towers were trained on.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class PrismaticConfig:
    """Sizes of the vision-language model.

    dino, siglip, language: width, layers, heads and hidden width of the MLP. vocabulary: rows of the embedding. text:
    tokens of the tokeniser; the last ones of them stand for actions. space: the token that stands between the prompt
    and the answer; stop: the one that ends an answer. crop: share of an image that is looked at, its middle (networks
    fine-tuned with random crops: 0.9). eps: of the norms.
    """

    dino: tuple[int, int, int, int] = (1024, 24, 16, 4096)
    siglip: tuple[int, int, int, int] = (1152, 27, 16, 4304)
    language: tuple[int, int, int, int] = (4096, 32, 32, 11008)
    vocabulary: int = 32064
    text: int = 32000
    space: int = 29871
    stop: int = 2
    crop: float = 1.0
    eps: float = 1e-6


class Projector(nn.Module):
    """Features of both towers to the width of the language model."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.fc1(x))
        return self.fc3(nn.functional.gelu(self.fc2(x)))


class Prismatic(VisionLanguageModel):
    """Images and text to a sequence, and the language model over it. film: the text modulates the towers (OFT+).
    head: it predicts tokens."""

    def __init__(self, spec: PolicySpec, config: PrismaticConfig, film: bool = False, head: bool = True):
        sizes = set(spec.cameras.values())
        if len(sizes) != 1:
            raise PolicyError(f"cameras: expected one size for all, found {dict(spec.cameras)}")
        size = sizes.pop()
        width, layers, heads, hidden = config.language
        llama = {
            "model_type": "llama", "vocab_size": config.vocabulary, "hidden_size": width, "num_hidden_layers": layers,
            "num_attention_heads": heads, "intermediate_size": hidden, "rms_norm_eps": config.eps,
        }  # fmt: skip
        super().__init__(llama, {}, (), tied=not head)
        self.padding = spec.padding
        self.crop = CentreCrop(size, config.crop) if config.crop < 1 else nn.Identity()
        condition = width if film else 0
        self.dino = VisionTransformer(
            size, *config.dino, class_token=True, registers=4, layer_scale=True, condition=condition
        )
        self.siglip = VisionTransformer(size, *config.siglip, condition=condition)
        self.patches = self.dino.patches
        self.projector = Projector(config.dino[0] + config.siglip[0], width)

    def see(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        """(B, 3, h, w) in [0, 1] -> (B, patches, width). text (B, width): what FiLM listens to."""
        image = self.crop(image)
        towers = ((self.dino, IMAGENET), (self.siglip, HALF))
        return self.projector(torch.cat([tower(normalise(image, *how), text) for tower, how in towers], -1))

    def sequence(self, inputs: Inputs, more: Sequence[Tensor] = (), text: Tensor | None = None
                 ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """[BOS][patches of all cameras][more][rest of the text] (B, T, width), and (B, T) bool, false for padding.

        more: (B, n, width) each. text: see `see`.
        """
        words, there = self.read(inputs.tokens), text_mask(inputs.tokens, self.padding)
        cameras = len(inputs.images)
        patches = self.see(torch.cat(inputs.images), None if text is None else text.repeat(cameras, 1))
        patches = torch.cat(patches.chunk(cameras), 1)
        seen = inputs.present.unsqueeze(-1).expand(-1, -1, self.patches).flatten(1)
        also = [part.new_ones(part.shape[:2], dtype=torch.bool) for part in more]
        x = torch.cat([words[:, :1], patches, *more, words[:, 1:]], 1)
        return x, torch.cat([there[:, :1], seen, *also, there[:, 1:]], 1)


def normalise(image: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """(B, 3, h, w) with the mean and deviation of each colour."""
    mean, deviation = (image.new_tensor(values).view(3, 1, 1) for values in (mean, deviation))
    return (image - mean) / deviation


UNUSED = "never computed: the features are the output of the second-to-last block"
TOWERS = {r"vision_backbone\.featurizer": "vlm.dino", r"vision_backbone\.fused_featurizer": "vlm.siglip"}
#: From the names of transformers' and timm's modules in published files to those of `Prismatic` as `vlm`.
RULES = (
    Rule(r"vision_backbone\.(?:fused_)?featurizer\.(?:norm|attn_pool)\..+", None, UNUSED),
    *(
        rule
        for theirs, ours in TOWERS.items()
        for rule in (
            Rule(rf"{theirs}\.blocks\.(\d+)\.(?:block\.)?(ls.)\.scale_factor", rf"{ours}.blocks.\1.\2.gamma", UNUSED),
            Rule(rf"{theirs}\.blocks\.(\d+)\.(?:block\.)?(.+)", rf"{ours}.blocks.\1.\2", UNUSED),
            Rule(rf"{theirs}\.(.+)", rf"{ours}.\1"),
        )
    ),
    Rule(r"projector\.(.+)", r"vlm.projector.\1"),
    Rule(r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None, "follows from the sizes"),
    Rule(r"language_model\.model\.(.+)", r"vlm.language.\1"),
    Rule(r"language_model\.lm_head\.weight", "vlm.head.weight", "the head that predicts tokens is not used"),
)


def published_sizes(folder: Path, config: Mapping[str, Any], files: TensorFiles) -> dict[str, Any]:
    """The fields of PrismaticConfig that a published checkpoint tells.

    Fine-tuned checkpoints, those with a dataset_statistics.json, were trained on random crops of 0.9 of the image and
    look at its middle (the published scripts' default), unless config.json says `center_crop` false. Nothing tells the
    numbers of heads and the token of the space: they are those of DINOv2-L, SigLIP-so400m and Llama 2, or config.json's
    `vision_heads` and `space_token`.
    """
    shapes = files.shapes

    def tower(name: str, heads: int) -> tuple[int, int, int, int]:
        prefix = next(key for key in shapes if key.endswith(f"{name}.pos_embed"))[: -len("pos_embed")]
        first = f"{prefix}blocks.0." + ("block." if f"{prefix}blocks.0.block.norm1.weight" in shapes else "")
        layers = count_layers(shapes, f"{prefix}blocks.")
        return shapes[f"{prefix}pos_embed"][-1], layers, heads, shapes[f"{first}mlp.fc1.weight"][0]

    text = dict(config.get("text_config") or {})
    llama, layer = "language_model.model", "language_model.model.layers.0"
    rows, width = shapes[f"{llama}.embed_tokens.weight"]
    layers, heads = count_layers(shapes, f"{llama}.layers."), text.get("num_attention_heads", 32)
    dino, siglip = config.get("vision_heads", (16, 16))
    return {
        "dino": tower(".featurizer", dino),
        "siglip": tower(".fused_featurizer", siglip),
        "language": (width, layers, heads, shapes[f"{layer}.mlp.up_proj.weight"][0]),
        "vocabulary": rows,
        "space": int(config.get("space_token", 29871)),
        "text": rows - config.get("pad_to_multiple_of", 64),
        "crop": 0.9 if config.get("center_crop", (Path(folder) / "dataset_statistics.json").is_file()) else 1.0,
        "eps": text.get("rms_norm_eps", 1e-6),
    }
