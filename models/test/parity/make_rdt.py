"""Writes rdt.safetensors: weights, inputs and outputs of RDT's public code (thu-ml/RoboticsDiffusionTransformer), tiny.

    PYTHONPATH=<a checkout of it>:<timm 1.0.3> python make_rdt.py

Run in an environment with torch, diffusers and transformers; the project needs no timm or diffusers. timm must be the
1.0.3 that RDT asks for: its RmsNorm is another than that of later versions.
"""

import json
from pathlib import Path
from unittest import mock

import timm
import torch
from configs.state_vec import STATE_VEC_IDX_MAPPING, STATE_VEC_LEN
from models.rdt_runner import RDTRunner
from safetensors.torch import save_file
from scripts.agilex_model import AGILEX_STATE_INDICES
from transformers import SiglipVisionConfig, SiglipVisionModel, T5Config, T5EncoderModel

COUNT, WINDOW, CAMERAS, SIDE, HORIZON = 2, 2, 3, 28, 6
CONFIG = {
    "action_dim": 128, "state_token_dim": 128, "pred_horizon": HORIZON, "lang_token_dim": 16, "img_token_dim": 16,
    "max_lang_cond_len": 9, "img_cond_len": WINDOW * CAMERAS * 4,
    "img_pos_embed_config": [["image", [WINDOW, CAMERAS, -4]]], "lang_pos_embed_config": [["lang", -9]],
    "config": {
        "lang_adaptor": "mlp2x_gelu", "img_adaptor": "mlp2x_gelu", "state_adaptor": "mlp3x_gelu",
        "rdt": {"hidden_size": 32, "depth": 3, "num_heads": 2, "cond_pos_embed_type": "multimodal"},
        "noise_scheduler": {"type": "ddpm", "num_train_timesteps": 1000, "num_inference_timesteps": 5,
                            "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "clip_sample": False},
    },
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": SIDE, "patch_size": 14}  # fmt: skip
TEXT = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
        "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}  # fmt: skip


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """With no weight left at zero or one."""
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return module.eval()


@torch.no_grad()
def main() -> None:
    assert timm.__version__ == "1.0.3", timm.__version__
    torch.manual_seed(0)
    runner = RDTRunner(**CONFIG, dtype=torch.float32)
    start = {name: runner.model.get_parameter(name).clone() for name in ("x_pos_embed", "img_cond_pos_embed")}
    moved(runner).model.final_layer.ffn_final.fc2.weight *= 10
    text = moved(T5EncoderModel(T5Config(**TEXT)))
    vision = moved(SiglipVisionModel(SiglipVisionConfig(**VISION)))

    tokens = torch.tensor([[7, 30, 21, 9, 14, 1], [11, 5, 1, 0, 0, 0]])
    images = torch.randint(0, 256, (COUNT, WINDOW, CAMERAS, 3, SIDE, SIDE)).float()
    state = torch.randn(COUNT, WINDOW, 14)
    # The second sample stands at the start of its episode, and its left wrist camera is missing: both show the grey.
    images[1, 0], state[1, 0] = images[1, 1], state[1, 1]
    shown = images.clone()
    shown[1, 0] = shown[1, 1, 2] = 127
    pixels = (shown / 255 - 0.5) / 0.5
    seen = vision(pixels.flatten(0, 2)).last_hidden_state.reshape(COUNT, -1, VISION["hidden_size"])
    mask = tokens != 0
    language = text(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    places = AGILEX_STATE_INDICES
    unified, filled = torch.zeros(COUNT, 1, 128), torch.zeros(COUNT, 1, 128)
    unified[:, 0, places], filled[..., places] = state[:, 1], 1.0
    actions, noise = torch.zeros(COUNT, HORIZON, 128), torch.randn(COUNT, HORIZON, 128)
    actions[..., places] = torch.randn(COUNT, HORIZON, 14)
    time, rates = torch.tensor([40, 700]), torch.tensor([25, 25])
    given = (language, mask, seen, unified)
    with mock.patch.object(torch, "randn", lambda *a, **k: noise):
        with mock.patch.object(torch, "randint", lambda *a, **k: time):
            loss = runner.compute_loss(*given, actions, filled, rates)
        sample = runner.predict_action(*given, filled, rates)
    tensors = {f"weights/{name}": value for name, value in runner.state_dict().items()}
    words = text.state_dict()
    del words["encoder.embed_tokens.weight"]  # the same as shared.weight
    tensors |= {f"weights/text.{name}": value for name, value in words.items()}
    tensors |= {f"weights/vision.{name}": value for name, value in vision.state_dict().items()}
    tensors |= {"in/images": images, "in/tokens": tokens, "in/state": state, "in/actions": actions[..., places]}
    tensors |= {"in/noise": noise, "in/time": time, "out/loss": loss.reshape(1), "out/actions": sample}
    tensors |= {"out/filled": filled, "out/unified": unified}
    tensors |= {f"out/{name}": value for name, value in start.items()}
    config = {"config": CONFIG, "vision": VISION, "text": TEXT, "places": places,
              "names": dict(STATE_VEC_IDX_MAPPING), "length": STATE_VEC_LEN}  # fmt: skip
    path = Path(__file__).with_name("rdt.safetensors")
    metadata = {"reference": "thu-ml/RoboticsDiffusionTransformer deb71d8, timm 1.0.3", "config": json.dumps(config)}
    save_file({name: value.float().contiguous() for name, value in tensors.items()}, path, metadata)
    print(path, path.stat().st_size, loss)


if __name__ == "__main__":
    main()
