"""Writes openvla.safetensors: weights, inputs and outputs of OpenVLA's published code at a tiny size.

Run with a checkout of github.com/openvla/openvla, timm and transformers:
python make_openvla.py <checkout> openvla.safetensors
"""

import importlib
import json
import sys
import types

try:
    import lerobot_on_py311  # noqa: F401  (only where timm runs beside a torchvision without operators)
except ImportError:
    pass
import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

SIZE = (28, 42)
BINS, TEXT = 256, 516  # tokens of the actions end at TEXT
TOWERS = [
    {"embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0, "init_values": 1e-5, "reg_tokens": 4,
     "no_embed_class": True},
    {"embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 1.7, "class_token": False, "global_pool": "map"},
]  # fmt: skip
LANGUAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": TEXT + 64, "rms_norm_eps": 1e-6, "max_position_embeddings": 256}  # fmt: skip


class Tower(VisionTransformer):
    """timm's, giving a tuple as it did before 1.0."""

    def get_intermediate_layers(self, *arguments, **keywords):
        return tuple(super().get_intermediate_layers(*arguments, **keywords))


def reference(checkout: str) -> types.ModuleType:
    """The module of the published code that has the network, without the training code around it."""
    for name in ("prismatic", "prismatic.extern", "prismatic.models", "prismatic.training", "prismatic.vla"):
        package = types.ModuleType(name)
        package.__path__ = [f"{checkout}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    timm.__version__ = "0.9.16"
    module = importlib.import_module("prismatic.extern.hf.modeling_prismatic")
    # Written for transformers 4.40; Llama-2 ties nothing.
    module.PrismaticForConditionalGeneration.tie_weights = lambda self, **_: None
    return module


def full(module: types.ModuleType) -> dict[str, list[int]]:
    """Names and shapes of the tensors of openvla/openvla-7b."""
    config = module.OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px", llm_backbone_id="llama2-7b-pure",
        text_config={"vocab_size": 32064, "pad_token_id": 32000},
    )  # fmt: skip
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = module.OpenVLAForActionPrediction(config)
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def network(module: types.ModuleType):
    """The network at its tiny size, in evaluation."""
    towers = iter(TOWERS)
    timm.create_model = lambda *_, **__: Tower(img_size=SIZE, patch_size=14, num_classes=0, **next(towers))
    torch.manual_seed(0)
    config = module.OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px", llm_backbone_id="llama2-7b-pure", n_action_bins=BINS,
        text_config=LANGUAGE, norm_stats={},
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = module.OpenVLAForActionPrediction(config).float().eval()
    # Norms, biases and factors start as ones and zeros, which would hide a mistake in them.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pixels(image: torch.Tensor) -> torch.Tensor:
    """(B, 3, h, w) in [0, 1] -> (B, 6, h, w) as the published processor gives it, one normalisation for each tower."""
    imagenet = [torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    return torch.cat([(image - imagenet[0]) / imagenet[1], (image - 0.5) / 0.5], 1)


def main(checkout: str, path: str) -> None:
    torch.set_num_threads(1)
    module = reference(checkout)
    sizes = full(module)
    model = network(module)
    images = torch.rand(2, 3, *SIZE)
    lengths, context, space, stop = (9, 6), 12, 35, 2
    rng = np.random.default_rng(0)
    actions = torch.from_numpy(rng.uniform(-1.1, 1.1, (2, 7))).float()
    bins = np.linspace(-1, 1, BINS)
    ids = TEXT - np.digitize(np.clip(actions.numpy(), -1, 1), bins)
    tokens = torch.zeros(2, context, dtype=torch.long)
    losses, logits, chosen, decoded = [], [], [], []
    for row, length in enumerate(lengths):
        text = torch.randint(3, 259, (length,))
        text[0] = 1
        tokens[row, :length] = text
        prompt = torch.cat([text, torch.tensor([space])])
        whole = torch.cat([prompt, torch.from_numpy(ids[row]), torch.tensor([stop])])[None]
        labels = whole.clone()
        labels[:, : len(prompt)] = -100
        image = pixels(images[row : row + 1])
        with torch.no_grad():
            out = model(input_ids=whole, attention_mask=torch.ones_like(whole), pixel_values=image, labels=labels)
            losses.append(out.loss)
            logits.append(out.logits[0, -9:-1])
            so_far = prompt[None]
            for _ in range(7):  # greedy, among the tokens of actions
                out = model(input_ids=so_far, attention_mask=torch.ones_like(so_far), pixel_values=image)
                best = TEXT - BINS + out.logits[0, -1, TEXT - BINS : TEXT].argmax()
                so_far = torch.cat([so_far, best.view(1, 1)], 1)
        chosen.append(so_far[0, -7:])
        index = np.clip(model.vocab_size - so_far[0, -7:].numpy() - 1, 0, len(model.bin_centers) - 1)
        decoded.append(torch.from_numpy(model.bin_centers[index]).float())
    with torch.no_grad():
        patches = model.vision_backbone(pixels(images))
        features = model.projector(patches)
    tensors = {f"weights/{name}": value for name, value in model.state_dict().items()}
    tensors |= {"in/image": images, "in/tokens": tokens, "in/actions": actions}
    tensors |= {
        "out/patches": patches, "out/features": features, "out/loss": torch.stack(losses),
        "out/logits": torch.stack(logits), "out/chosen": torch.stack(chosen), "out/actions": torch.stack(decoded),
    }  # fmt: skip
    config = {"size": SIZE, "text": TEXT, "space": space, "stop": stop, "language": LANGUAGE}
    save_file(
        {name: value.contiguous().clone() for name, value in tensors.items()}, path,
        {"reference": "github.com/openvla/openvla c8f03f4", "config": json.dumps(config), "full": json.dumps(sizes)},
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
