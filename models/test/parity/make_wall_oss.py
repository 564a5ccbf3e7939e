"""Writes wall_oss.safetensors: weights, inputs and outputs of LeRobot's wall_x at a tiny size.

Run with LeRobot 0.6.1: python make_wall_oss.py wall_oss.safetensors
"""

import json
import os
import sys
from types import SimpleNamespace
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import lerobot_on_py311  # noqa: F401  (only where LeRobot runs on Python 3.11)
except ImportError:
    pass
import lerobot.policies.wall_x.modeling_wall_x as wall_x
import torch
from lerobot.policies.wall_x.qwen_model.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from safetensors.torch import save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

HORIZON, DIM, BATCH, CONTEXT = 8, 10, 2, 24
ACTION, PROPRI, IMAGE, VIDEO, START, END = 262, 5, 4, 263, 6, 7
SIZES = {"front": (56, 84), "wrist": (56, 56)}
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 264, "max_position_embeddings": 512, "num_experts": 2,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "experts": [{"hidden_size": 32, "intermediate_size": 48, "hidden_act": "silu"},
                {"hidden_size": 32, "intermediate_size": 24, "hidden_act": "silu"}],
    "dim_inputs": [32, 32], "mlp_moe": True, "attention_moe": False,
    "dof_config": {"arm": 9, "gripper": 1}, "agent_pos_config": {"arm": 9, "gripper": 1},
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14,
    "spatial_merge_size": 2, "fullatt_block_indexes": [1], "window_size": 56,
}  # fmt: skip
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
       "vision_end_token_id": END}  # fmt: skip


def main(path: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen2_5_VLConfig(vision_config=VISION, **TEXT, **IDS)
    config._attn_implementation = "eager"
    config.pad_token_id = 0
    ids = {"<|action|>": ACTION, "<|propri|>": PROPRI}
    tokenizer = SimpleNamespace(convert_tokens_to_ids=ids.__getitem__, pad_token_id=0)
    model = wall_x.Qwen2_5_VLMoEForAction(config, processor=SimpleNamespace(tokenizer=tokenizer))
    model = model.to(torch.float32).eval()
    # Norms and biases start as ones and zeros, which would hide a mistake in them.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    images = {name: torch.randint(0, 256, (BATCH, 3, *size), dtype=torch.uint8) for name, size in SIZES.items()}
    tokens = torch.zeros(BATCH, CONTEXT, dtype=torch.long)
    for row, length in enumerate((20, 15)):
        # Words, a picture, words, a picture, words, the state, words.
        text = torch.randint(8, 259, (length,))
        text[[2, 3, 4, 6, 7, 8, -3]] = torch.tensor([START, IMAGE, END, START, IMAGE, END, PROPRI])
        tokens[row, :length] = text
    inputs = {
        "tokens": tokens, "state": torch.randn(BATCH, 8), "actions": torch.randn(BATCH, HORIZON, 8),
        "time": torch.tensor([0.3, 0.8]),
    }  # fmt: skip

    # The published text has as many picture tokens as the picture has features.
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, do_resize=False)
    counts = [h // 28 * (w // 28) for h, w in SIZES.values()]
    rows, pixels, grids = [], [], []
    for row in range(BATCH):
        text = inputs["tokens"][row].tolist()
        for at, count in zip((7, 3), reversed(counts), strict=True):
            text[at : at + 1] = [IMAGE] * count
        for name in SIZES:
            made = processor(images[name][row].permute(1, 2, 0).numpy(), return_tensors="pt")
            pixels.append(made["pixel_values"])
            grids.append(made["image_grid_thw"])
        rows.append(torch.tensor(text + [ACTION] * HORIZON))
    input_ids = torch.stack(rows)

    def wide(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, DIM - x.shape[-1]))

    common = {
        "input_ids": input_ids, "attention_mask": (input_ids != 0).long(),
        "moe_token_types": (input_ids == ACTION).long(), "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.cat(grids), "proprioception": wide(inputs["state"])[:, None],
        "agent_pos_mask": wide(torch.ones(BATCH, 1, 8)), "dof_mask": wide(torch.ones(BATCH, HORIZON, 8)),
    }  # fmt: skip
    # What the model draws by itself is given: its time, and its noise through the seed.
    model.action_preprocessor.sample_time = lambda batch, device: inputs["time"]
    torch.manual_seed(1)
    inputs["noise"] = torch.randn(BATCH, HORIZON, DIM)
    torch.manual_seed(1)
    with torch.no_grad():
        trained = model(**common, action_chunk=wide(inputs["actions"]), mode="train", return_dict=True)
    torch.manual_seed(1)
    # It casts the embedded state to bfloat16, whatever the model's type; here all is float32.
    with patch("torch.bfloat16", torch.float32):
        sampled = model(**common, mode="predict", predict_mode="diffusion", action_dim=DIM, pred_horizon=HORIZON,
                        return_dict=True)  # fmt: skip
    # The other branch: an answer of words in place of the actions, which only the language model sees.
    inputs["start"] = torch.full((BATCH, 1), 13)
    inputs["answers"] = torch.randint(200, 260, (BATCH, 6))
    written = torch.cat([input_ids[:, :-HORIZON], inputs["start"], inputs["answers"]], 1)
    labels = torch.full_like(written, -100)
    labels[:, -6:] = inputs["answers"]
    fast = common | {"input_ids": written, "attention_mask": (written != 0).long(),
                     "moe_token_types": torch.zeros_like(written)}  # fmt: skip
    with torch.no_grad():
        answered = model(**fast, labels=labels, mode="train", return_dict=True)
    outputs = {"loss": trained.flow_loss, "actions": sampled["predict_action"],
               "text_loss": answered.cross_entropy_loss, "logits": answered.logits[:, -7:]}  # fmt: skip
    inputs |= {f"image.{name}": image.float() / 255 for name, image in images.items()}
    tensors = {f"weights/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"in/{name}": value for name, value in inputs.items()}
    tensors |= {f"out/{name}": value for name, value in outputs.items()}
    described = {**TEXT, **IDS, "vision_config": VISION, "model_type": "qwen2_5_vl"}
    metadata = {"reference": "lerobot 0.6.1", "config": json.dumps(described)}
    save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, path, metadata)
    print(path, os.path.getsize(path), {name: value.flatten()[:3].tolist() for name, value in outputs.items()})


if __name__ == "__main__":
    main(sys.argv[1])
