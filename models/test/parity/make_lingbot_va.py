"""Writes lingbot_va.safetensors: weights, three chunks of an episode and a loss of LeRobot's LingBot-VA, tiny.

Run with LeRobot 0.6.1 and diffusers: python make_lingbot_va.py lingbot_va.safetensors
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import lerobot_on_py311  # noqa: F401  (only where LeRobot runs on Python 3.11)
except ImportError:
    pass
import lerobot.policies.lingbot_va.utils as utils
import torch
import torch._inductor.config
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.lingbot_va.configuration_lingbot_va import LingBotVAConfig
from lerobot.policies.lingbot_va.modeling_lingbot_va import LingBotVAPolicy
from safetensors.torch import save_file
from torch import Tensor
from wan_parts import TEXT, VOCABULARY, fill, frozen_configs, frozen_weights, make_text_encoder, make_vae

CAMERAS = ("observation.images.image", "observation.images.wrist")
TOKENS = {"task": torch.tensor([[5, 6, 7, 1, 0, 0, 0, 0]]), "": torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0]])}
FRAMES, ACTIONS, WIDTH = 2, 4, 10


def make_policy(**settings) -> LingBotVAPolicy:
    config = LingBotVAConfig(
        num_attention_heads=2, attention_head_dim=12, action_dim=WIDTH, text_dim=TEXT, ffn_dim=32, num_layers=2,
        obs_cam_keys=list(CAMERAS), height=32, width=32, action_per_frame=ACTIONS, frame_chunk_size=FRAMES,
        num_inference_steps=3, action_num_inference_steps=4, max_sequence_length=8, dtype="float32", device="cpu",
        used_action_channel_ids=[0, 2, 3, 4, 5, 6, 8],
        input_features={name: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for name in CAMERAS},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))}, **settings,
    )  # fmt: skip
    return LingBotVAPolicy(config)


def run_episode(policy: LingBotVAPolicy) -> dict[str, Tensor]:
    """Three chunks as they are executed one action at a time, with a picture after each."""
    out: dict[str, Tensor] = {}
    infer = policy._infer

    def seeded(first_latent: Tensor | None, frame_st_id: int) -> tuple[Tensor, Tensor]:
        n = sum(name.startswith("out/actions") for name in out)
        torch.manual_seed(10 + n)
        video = torch.randn(1, 48, FRAMES, *policy._latent_hw)
        out.update({f"in/video_noise{n}": video, f"in/action_noise{n}": torch.randn(1, WIDTH, FRAMES, ACTIONS, 1)})
        if n == 2:  # what is in the cache before the last chunk: after two that were executed
            caches = [block.attn1.attn_caches["pos"] for block in policy.transformer.blocks]
            places = torch.argsort(caches[0]["id"].where(caches[0]["mask"], 10**6), stable=True)
            places = places[: int(caches[0]["mask"].sum())]
            out["out/cache"] = torch.stack(
                [torch.stack([cache[kind][:, places] for kind in "kv"], 1) for cache in caches], 1
            ).transpose(3, 4)
        torch.manual_seed(10 + n)
        actions, latents = infer(first_latent, frame_st_id)
        out.update({f"out/actions{n}": actions, f"out/latents{n}": latents})
        return actions, latents

    policy._infer = seeded
    torch.manual_seed(1)
    pictures = {name: torch.randint(0, 256, (13, 3, 32, 32), dtype=torch.uint8) for name in CAMERAS}
    said = []
    for n in range(13):
        picture = {name: value[n : n + 1] / 255 for name, value in pictures.items()}
        said.append(policy.select_action(picture | {"task": ["task"]}))
    return out | {f"in/{name}": value for name, value in pictures.items()} | {"out/said": torch.cat(said)}


def run_loss(policy: LingBotVAPolicy) -> dict[str, Tensor]:
    """The training loss in float32 on a CPU: its attention, which is bfloat16 on a GPU, is computed densely."""
    attention = utils.FlexAttnFunc

    def dense_mask(rule, batch, heads, queries, keys, **settings) -> Tensor:
        zero = torch.tensor(0)
        return rule(zero, zero, torch.arange(queries)[:, None], torch.arange(keys)[None])

    def dense(query, key, value, block_mask, **settings) -> Tensor:
        # Padding sees nothing.
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, block_mask).nan_to_num()

    attention._ensure_compiled = classmethod(lambda cls: None)
    attention.compiled_create_block_mask = staticmethod(dense_mask)
    attention.flex_attn = staticmethod(dense)
    attention.forward.__defaults__ = (torch.float32,)

    class Float32:
        bfloat16 = torch.float32

        def __getattr__(self, name: str):
            return getattr(torch, name)

    utils.torch = Float32()
    noised, whole = [], {}
    add, train = policy._add_noise_stream, policy.transformer.forward_train
    policy._add_noise_stream = lambda *a, **k: noised.append(add(*a, **k)) or noised[-1]
    policy.transformer.forward_train = lambda values: whole.update(values) or train(values)
    torch.manual_seed(2)
    latents, actions = torch.randn(2, 48, 3, 2, 4), torch.randn(2, WIDTH, 3, ACTIONS, 1)
    mask = torch.zeros(2, WIDTH, 3, ACTIONS, 1)
    mask[:, policy.config.used_action_channel_ids] = 1
    mask[1, :, 2, 2:] = 0
    features = torch.zeros(2, 512, TEXT)
    features[:, :5] = torch.randn(2, 5, TEXT)
    for seed in range(100):  # one with noisy seen frames and more than one chunk
        torch.manual_seed(seed)
        noised.clear()
        _, losses = policy.training_loss_from_streams(latents, actions, mask, features)
        if noised[0]["cond_timesteps"].any() and whole["chunk_size"] == 2:
            break
    video, action = noised
    share = video["cond_timesteps"][:, None, :, None, None] / 1000
    return {
        "in/loss_latents": latents, "in/loss_actions": actions, "in/loss_mask": mask, "in/features": features[:, :5],
        "in/loss_video": video["targets"] + latents, "in/loss_action": action["targets"] + actions * mask,
        "in/video_share": video["timesteps"] / 1000, "in/action_share": action["timesteps"] / 1000,
        "in/seen": (video["latent"] - (1 - share) * latents) / share, "in/seen_share": video["cond_timesteps"] / 1000,
        "in/chunk": torch.tensor([whole["chunk_size"], whole["window_size"]]),
        "out/video": torch.tensor(losses["latent_loss"]), "out/action": torch.tensor(losses["action_loss"]),
    }  # fmt: skip


def main(path: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vae, text = make_vae(), make_text_encoder()
    policy = fill(make_policy())

    def tokenizer(prompts: list[str], **settings) -> SimpleNamespace:
        ids = torch.cat([TOKENS[prompt] for prompt in prompts])
        return SimpleNamespace(input_ids=ids, attention_mask=(ids != 0).long())

    policy._frozen = {"vae": vae, "streaming_vae": utils.WanVAEStreamingWrapper(vae), "text_encoder": text,
                      "tokenizer": tokenizer}  # fmt: skip
    tensors = run_episode(policy)
    trained = make_policy(attn_mode="flex")
    trained.load_state_dict(policy.state_dict())
    tensors |= run_loss(trained.eval().requires_grad_(False))
    tensors |= {f"weights/{name}": value for name, value in policy.state_dict().items()}
    tensors |= {f"weights/{name}": value for name, value in frozen_weights(vae, text).items()}
    tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        policy.config._save_pretrained(Path(folder))
        published = json.loads((Path(folder) / "config.json").read_text())
    settings = {"policy": published, **frozen_configs(vae, text), "vocabulary": VOCABULARY}
    save_file(tensors, path, {"reference": "lerobot 0.6.1", "config": json.dumps(settings)})
    for name, value in tensors.items():
        if not name.startswith("weights"):
            print(name, tuple(value.shape), float(value.float().abs().max()))


if __name__ == "__main__":
    main(sys.argv[1])
