"""Writes smolvla.safetensors: weights, inputs and outputs of LeRobot's SmolVLA at a tiny size.

Run with LeRobot 0.6.1: python make_smolvla.py smolvla.safetensors
"""

import json
import os
import sys
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import lerobot_on_py311  # noqa: F401  (only where LeRobot runs on Python 3.11)
except ImportError:
    pass
import lerobot.policies.smolvla.smolvlm_with_expert as backbone
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from safetensors.torch import save_file
from transformers import SmolVLMConfig

VLM = {
    "text_config": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": 8, "image_size": 32,
    },
    "scale_factor": 2,
    "pad_token_id": 0,
}  # fmt: skip
CONFIG = {"chunk_size": 8, "n_action_steps": 8, "num_vlm_layers": 4, "resize_imgs_with_padding": (32, 32),
          "tokenizer_max_length": 12, "max_state_dim": 16, "max_action_dim": 12}  # fmt: skip


def main(path: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    backbone.AutoConfig = SimpleNamespace(from_pretrained=lambda *a, **k: SmolVLMConfig(**VLM))
    tokenizer = SimpleNamespace(fake_image_token_id=290, global_image_token_id=291)
    backbone.AutoProcessor = SimpleNamespace(from_pretrained=lambda *a, **k: SimpleNamespace(tokenizer=tokenizer))
    cameras = ("observation.images.a", "observation.images.b")
    config = SmolVLAConfig(
        input_features={
            **{name: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for name in cameras},
            "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (8,))},
        device="cpu",
        freeze_vision_encoder=False,
        train_expert_only=False,
        **CONFIG,
    )
    policy = SmolVLAPolicy(config).eval()
    # Norms and biases start as ones and zeros, which would hide a mistake in them.
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    inputs = {
        "a": torch.rand(2, 3, 32, 32), "b": torch.rand(2, 3, 32, 32), "present": torch.tensor([[1, 1], [1, 0]]) > 0,
        "tokens": torch.randint(3, 259, (2, 12)), "state": torch.randn(2, 8), "actions": torch.randn(2, 8, 8),
        "noise": torch.randn(2, 8, 12), "time": torch.tensor([0.3, 0.8]), "padded": torch.zeros(2, 8, dtype=torch.bool),
    }  # fmt: skip
    inputs["tokens"][0, 7:] = 0
    inputs["padded"][1, 6:] = True
    batch = {
        cameras[0]: inputs["a"], cameras[1]: inputs["b"],
        **{f"{name}_padding_mask": inputs["present"][:, i] for i, name in enumerate(cameras)},
        "observation.state": inputs["state"], OBS_LANGUAGE_TOKENS: inputs["tokens"],
        OBS_LANGUAGE_ATTENTION_MASK: inputs["tokens"] != 0,
    }  # fmt: skip
    training = {**batch, "action": inputs["actions"], "action_is_pad": inputs["padded"]}
    outputs = {
        "loss": policy.forward(dict(training), inputs["noise"], inputs["time"])[0].detach(),
        "actions": policy.predict_action_chunk(dict(batch), inputs["noise"].clone()),
    }
    tensors = {f"weights/{name}": value for name, value in policy.state_dict().items()}
    tensors |= {f"in/{name}": value for name, value in inputs.items()}
    tensors |= {f"out/{name}": value for name, value in outputs.items()}
    described = {"vlm": VLM, "policy": CONFIG}
    metadata = {"reference": "lerobot 0.6.1", "config": json.dumps(described)}
    save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, path, metadata)
    print(path, os.path.getsize(path), {name: value.flatten()[:3].tolist() for name, value in outputs.items()})


if __name__ == "__main__":
    main(sys.argv[1])
