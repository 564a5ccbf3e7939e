"""Writes pi0.safetensors or pi05.safetensors: weights, inputs and outputs of LeRobot's pi0 or pi0.5 at a tiny size.

Run with LeRobot 0.6.1: python make_pi.py pi0 pi0.safetensors; python make_pi.py pi05 pi05.safetensors
"""

import importlib
import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import lerobot_on_py311  # noqa: F401  (only where LeRobot runs on Python 3.11)
except ImportError:
    pass
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from safetensors.torch import save_file

SIZE, DIM, HORIZON, VOCABULARY = 28, 8, 8, 259
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 16}


def main(name: str, path: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = importlib.import_module(f"lerobot.policies.{name}.modeling_{name}")
    settings = importlib.import_module(f"lerobot.policies.{name}.configuration_{name}")
    module.get_gemma_config = lambda variant: module.GemmaConfig(
        width=32 if variant == "gemma_2b" else 16, depth=2, mlp_dim=48 if variant == "gemma_2b" else 24, num_heads=8,
        num_kv_heads=1, head_dim=8,
    )  # fmt: skip
    paligemma, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def small_paligemma(config):
        for key, value in VISION.items():
            setattr(config.vision_config, key, value)
        config.vision_config.projection_dim = config.projection_dim = config.hidden_size = 32
        config.text_config.vocab_size = VOCABULARY
        return paligemma(config=config)

    def small_expert(config):
        config.vocab_size = VOCABULARY
        return expert(config=config)

    module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM = small_paligemma, small_expert
    cameras = ("observation.images.base", "observation.images.wrist")
    features = {camera: PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)) for camera in cameras}
    config = getattr(settings, {"pi0": "PI0Config", "pi05": "PI05Config"}[name])(
        input_features={**features, "observation.state": PolicyFeature(FeatureType.STATE, (DIM,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (DIM,))},
        image_resolution=(SIZE, SIZE), chunk_size=HORIZON, n_action_steps=HORIZON, num_inference_steps=5,
        tokenizer_max_length=64, device="cpu",
    )  # fmt: skip
    policy = getattr(module, {"pi0": "PI0Policy", "pi05": "PI05Policy"}[name])(config).eval()
    core = policy.model
    # Norms and biases start as zeros, which would hide a mistake in them; the language head is tied to the embedding.
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        language = core.paligemma_with_expert.paligemma
        language.lm_head.weight.copy_(language.model.language_model.embed_tokens.weight)
    inputs = {
        "base": torch.rand(2, 3, SIZE, SIZE), "wrist": torch.rand(2, 3, SIZE, SIZE),
        "present": torch.tensor([[1, 1], [1, 0]]) > 0, "tokens": torch.randint(3, VOCABULARY, (2, 64)),
        "state": torch.randn(2, DIM), "actions": torch.randn(2, HORIZON, DIM),
        "noise": torch.randn(2, HORIZON, 32), "time": torch.tensor([0.3, 0.8]),
    }  # fmt: skip
    inputs["tokens"][0, 20:] = 0
    inputs["tokens"][1, 50:] = 0
    images = [2 * inputs[camera] - 1 for camera in ("base", "wrist")]
    seen = [images, list(inputs["present"].unbind(1)), inputs["tokens"], inputs["tokens"] != 0]
    if name == "pi0":
        seen.append(policy.prepare_state({"observation.state": inputs["state"]}))
    actions = policy.prepare_action({"action": inputs["actions"]})
    with torch.no_grad():
        losses = core.forward(*seen, actions, inputs["noise"], inputs["time"])
        sampled = core.sample_actions(*seen, noise=inputs["noise"].clone())
    outputs = {"loss": losses[:, :, :DIM].mean(), "actions": sampled}
    weights = dict(policy.state_dict())
    if name == "pi0":
        # As lerobot/pi0_base was published: without the prefix "model.", the tied embedding only as the head.
        weights = {key.removeprefix("model."): value for key, value in weights.items() if "embed_tokens" not in key}
    tensors = {f"weights/{key}": value for key, value in weights.items()}
    tensors |= {f"in/{key}": value for key, value in inputs.items()}
    tensors |= {f"out/{key}": value for key, value in outputs.items()}
    described = {
        "type": name, "chunk_size": HORIZON, "num_inference_steps": 5, "max_state_dim": 32, "max_action_dim": 32,
        "image_resolution": [SIZE, SIZE], "tokenizer_max_length": 64, "use_relative_actions": False,
        "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m",
        "input_features": {
            **{camera: {"type": "VISUAL", "shape": [3, SIZE, SIZE]} for camera in cameras},
            "observation.state": {"type": "STATE", "shape": [DIM]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [DIM]}},
        "normalization_mapping": {key: mode.value for key, mode in config.normalization_mapping.items()},
    }  # fmt: skip
    metadata = {"reference": "lerobot 0.6.1", "config": json.dumps(described)}
    save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, path, metadata)
    print(path, os.path.getsize(path), {key: value.flatten()[:3].tolist() for key, value in outputs.items()})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
