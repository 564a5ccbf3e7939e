"""Writes fast_wam.safetensors: weights, inputs and outputs of LeRobot's Fast-WAM at a tiny size.

Run with LeRobot 0.6.1 and diffusers: python make_fast_wam.py fast_wam.safetensors
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import lerobot_on_py311  # noqa: F401  (only where LeRobot runs on Python 3.11)
except ImportError:
    pass
import lerobot.policies.fastwam.modeling_fastwam as modeling
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.fastwam.configuration_fastwam import (
    FastWAMConfig,
    default_action_dit_config,
    default_video_dit_config,
)
from lerobot.policies.fastwam.wan.adapters import WanVideoVAE38
from lerobot.policies.fastwam.wan.components import WanTextEncoder
from safetensors.torch import save_file
from wan_parts import TEXT, VOCABULARY, fill, frozen_configs, frozen_weights, make_text_encoder, make_vae

CAMERAS = ("observation.images.image", "observation.images.wrist")
COMMON = {"ffn_dim": 32, "text_dim": TEXT, "num_heads": 2, "attn_head_dim": 12, "num_layers": 2}
TOKENS = torch.tensor([[5, 6, 7, 8, 1, 0, 0, 0], [9, 10, 1, 0, 0, 0, 0, 0]])


def main(path: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vae, text = make_vae(), make_text_encoder()
    modeling.load_pretrained_wan_vae = lambda torch_dtype, device: WanVideoVAE38(torch_dtype, device, pretrained=vae)
    modeling.build_wan_tokenizer = lambda **settings: None
    config = FastWAMConfig(
        video_dit_config=default_video_dit_config(7) | COMMON | {"hidden_dim": 24},
        action_dit_config=default_action_dit_config(7) | COMMON | {"hidden_dim": 16},
        load_text_encoder=False, torch_dtype="float32", device="cpu", image_size=(32, 64), action_horizon=8,
        n_action_steps=8, num_video_frames=9, action_video_freq_ratio=2, tokenizer_max_len=TOKENS.shape[1],
        base_model_id=None,
        input_features={
            **{name: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for name in CAMERAS},
            "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
        },
    )  # fmt: skip
    policy = modeling.FastWAMPolicy(config)
    model = fill(policy).model
    object.__setattr__(model, "text_encoder", WanTextEncoder(torch.float32, "cpu", pretrained=text))
    model.tokenizer = lambda prompt, **settings: (TOKENS[prompt], (TOKENS[prompt] != 0).long())

    batch = {name: torch.rand(2, 5, 3, 32, 32) for name in CAMERAS}
    batch |= {"observation.state": torch.randn(2, 8), "action": torch.randn(2, 8, 7)}
    batch["action_is_pad"] = torch.arange(8) >= torch.tensor([[8], [5]])
    context, context_mask = model.encode_prompt([0, 1])
    sample = policy._batch_to_training_sample(batch | {"context": context, "context_mask": context_mask})
    inputs = model.build_inputs(sample)
    drawn = model._sample_training_targets(inputs)
    model._sample_training_targets = lambda inputs: drawn
    _, losses = model.training_loss(sample)

    first = {name: batch[name][:1, 0] for name in CAMERAS} | {"observation.state": batch["observation.state"][:1]}
    actions = policy.predict_action_chunk(first | {"context": context[:1], "context_mask": context_mask[:1]})
    noise = model._make_action_latents(8, config.inference_seed, "cpu")

    tensors = {f"weights/{name}": value for name, value in policy.state_dict().items()}
    tensors |= {f"weights/{name}": value for name, value in frozen_weights(vae, text).items()}
    tensors |= {f"in/{name}": value for name, value in batch.items()}
    tensors |= {
        "in/tokens": TOKENS,
        "in/noise": drawn["target_action"] + inputs["action"],
        "in/video_noise": drawn["target_video"] + inputs["input_latents"],
        "in/share": drawn["timestep_action"] / 1000,
        "in/video_share": drawn["timestep_video"] / 1000,
        "in/sample_noise": noise,
        "out/features": context,
        "out/latents": inputs["input_latents"],
        "out/video": torch.tensor(losses["loss_video"]),
        "out/action": torch.tensor(losses["loss_action"]),
        "out/actions": actions,
    }
    tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        config._save_pretrained(Path(folder))
        published = json.loads((Path(folder) / "config.json").read_text())
    settings = {"policy": published, **frozen_configs(vae, text), "vocabulary": VOCABULARY}
    save_file(tensors, path, {"reference": "lerobot 0.6.1", "config": json.dumps(settings)})
    print({name: value.shape for name, value in tensors.items() if not name.startswith("weights")}, losses)


if __name__ == "__main__":
    main(sys.argv[1])
