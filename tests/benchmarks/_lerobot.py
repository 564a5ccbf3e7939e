"""LeRobot's side of `./vla bench models`: builds a policy of the size that it is told and runs chunks when asked.

Started by models.py with an interpreter that has LeRobot 0.6.1: `python _lerobot.py FOLDER`. There lie task.json
(recipe, settings of our network and specification, number of threads, ...) and inputs.safetensors. It writes its
weights there (reference.safetensors), says "ready", and then answers each line on stdin: "run" with the wall time and
the CPU time of one chunk, s; "actions" by writing those of the last one (actions.safetensors). Only LeRobot's own code
is timed, from tensors as its processors leave them to normalised actions.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import lerobot_on_py311  # noqa: F401  (only where LeRobot runs on Python 3.11)
except ImportError:
    pass
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Task(SimpleNamespace):
    """What task.json says, with attributes: network (settings), spec, recipe, threads, device, dtype, compile; inputs:
    the tensors, moved to the device."""

    @property
    def cameras(self) -> dict[str, tuple[int, int]]:
        return self.spec["cameras"]

    @property
    def images(self) -> dict[str, Tensor]:
        """LeRobot's name -> (1, [T,] 3, h, w) in [0, 1]."""
        return {f"observation.images.{name}": self.inputs[f"image_{name}"] for name in self.cameras}

    def features(self) -> dict:
        shapes = {f"observation.images.{name}": (3, *size) for name, size in self.cameras.items()}
        inputs = {name: PolicyFeature(FeatureType.VISUAL, shape) for name, shape in shapes.items()}
        state = self.inputs["state"].shape[-1]
        return {
            "input_features": {**inputs, "observation.state": PolicyFeature(FeatureType.STATE, (state,))},
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (self.action_dim,))},
            "device": self.device,
        }


def stir(module: nn.Module, size: float = 0.02) -> nn.Module:
    """Norms and biases begin as ones and zeros, which would hide a mistake in them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def act(task: Task):
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    n, horizon = task.network, task.spec["horizon"]
    policy = ACTPolicy(
        ACTConfig(
            **task.features(), pretrained_backbone_weights=None, chunk_size=horizon, n_action_steps=horizon,
            dim_model=n["width"], n_heads=n["heads"], dim_feedforward=n["feedforward"], latent_dim=n["latent"],
            n_encoder_layers=n["encoder_layers"], n_vae_encoder_layers=n["posterior_layers"],
            n_decoder_layers=n["decoder_layers"],
        )
    ).eval()  # fmt: skip
    batch = {**normalized(task), "observation.state": task.inputs["state"]}
    return policy.state_dict(), lambda: policy.predict_action_chunk(batch)


def normalized(task: Task) -> dict[str, Tensor]:
    mean, std = (torch.tensor(task.network[f"image_{name}"]).reshape(3, 1, 1) for name in ("mean", "std"))
    return {name: (image - mean) / std for name, image in task.images.items()}


def diffusion_policy(task: Task):
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    n, history, horizon = task.network, task.spec["history"], task.spec["horizon"]
    policy = DiffusionPolicy(
        DiffusionConfig(
            **task.features(), pretrained_backbone_weights=None, use_group_norm=n["norm"] == "group",
            n_obs_steps=history, horizon=horizon + history - 1, n_action_steps=horizon, down_dims=tuple(n["channels"]),
            kernel_size=n["kernel"], n_groups=n["groups"], diffusion_step_embed_dim=n["time_width"],
            spatial_softmax_num_keypoints=n["points"], crop_shape=tuple(n["crop"]) or None, resize_shape=None,
            use_film_scale_modulation=n["film_scale"], noise_scheduler_type=n["sampler"].upper(),
            num_train_timesteps=n["training_steps"], num_inference_steps=task.spec["steps"],
            prediction_type=n["prediction"], clip_sample_range=n["clip"],
            use_separate_rgb_encoder_per_camera=not n["shared"],
        )
    ).eval()  # fmt: skip
    batch = {**normalized(task), "observation.state": task.inputs["state"]}
    noise = task.inputs["noise"]
    batch["observation.images"] = torch.stack([batch[name] for name in task.images], dim=-4)

    @torch.no_grad()
    def run() -> Tensor:
        return policy.diffusion.generate_actions(batch, noise=noise.clone())

    return policy.state_dict(), run


def sized_paligemma(module, task: Task) -> None:
    """LeRobot's classes take their sizes from names; these give those of the task."""
    n = task.network
    expert = "expert_width" in n

    def gemma(variant: str):
        language = not expert or variant == "gemma_2b"
        width, mlp = (n["width"], n["mlp"]) if language else (n["expert_width"], n["expert_mlp"])
        return module.GemmaConfig(width, n["layers"], mlp, n["heads"], n["kv_heads"], n["head_dim"])

    module.get_gemma_config = gemma
    paligemma = module.PaliGemmaForConditionalGenerationWithPiGemma

    def small(config):
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size = n["vision_width"], n["vision_mlp"]
        vision.num_hidden_layers, vision.num_attention_heads = n["vision_layers"], n["vision_heads"]
        vision.image_size = next(iter(task.cameras.values()))[0]
        vision.projection_dim = config.projection_dim = config.hidden_size = n["width"]
        config.text_config.vocab_size = n["vocabulary"]
        return paligemma(config=config)

    module.PaliGemmaForConditionalGenerationWithPiGemma = small
    if expert:
        causal = module.PiGemmaForCausalLM

        def small_expert(config):
            config.vocab_size = n["vocabulary"]
            return causal(config=config)

        module.PiGemmaForCausalLM = small_expert


def tie(core: nn.Module) -> None:
    """As published: the language head is the embedding."""
    language = core.paligemma_with_expert.paligemma
    with torch.no_grad():
        language.lm_head.weight.copy_(language.model.language_model.embed_tokens.weight)


def pi(task: Task):
    name = task.recipe
    module = importlib.import_module(f"lerobot.policies.{name}.modeling_{name}")
    settings = importlib.import_module(f"lerobot.policies.{name}.configuration_{name}")
    sized_paligemma(module, task)
    size, horizon = next(iter(task.cameras.values())), task.spec["horizon"]
    config = getattr(settings, {"pi0": "PI0Config", "pi05": "PI05Config"}[name])(
        **task.features(), image_resolution=tuple(size), chunk_size=horizon, n_action_steps=horizon,
        num_inference_steps=task.spec["steps"], tokenizer_max_length=task.spec["context"], dtype=task.dtype,
        compile_model=bool(task.compile), **({"compile_mode": task.compile} if task.compile else {}),
    )  # fmt: skip
    policy = getattr(module, {"pi0": "PI0Policy", "pi05": "PI05Policy"}[name])(config).eval()
    core = stir(policy).model.to(task.device)
    tie(core)
    tokens, state = task.inputs["tokens"], task.inputs["state"]
    images = [2 * image - 1 for image in task.images.values()]
    there = torch.ones(1, dtype=torch.bool, device=tokens.device)
    seen = [images, [there] * len(images), tokens, tokens != 0]
    if name == "pi0":
        seen.append(policy.prepare_state({"observation.state": state}))
    noise = task.inputs["noise"]

    @torch.no_grad()
    def run() -> Tensor:
        return core.sample_actions(*seen, noise=noise.clone())

    return policy.state_dict(), run


def pi0_fast(task: Task):
    import lerobot.policies.pi0_fast.modeling_pi0_fast as module
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

    sized_paligemma(module, task)
    n = task.network
    size, horizon = next(iter(task.cameras.values())), task.spec["horizon"]
    config = PI0FastConfig(
        **task.features(), image_resolution=tuple(size), chunk_size=horizon, n_action_steps=horizon,
        tokenizer_max_length=task.spec["context"], max_action_tokens=n["length"], max_decoding_steps=n["length"],
        fast_skip_tokens=n["skip"],
    )  # fmt: skip
    words = SimpleNamespace(bos_token_id=n["start"], eos_token_id=n["end"][-1], vocab_size=n["vocabulary"],
                            convert_tokens_to_ids=lambda word: task.stop)  # fmt: skip
    core = stir(module.PI0FastPytorch(config, paligemma_tokenizer=words)).eval()
    tie(core)
    tokens = task.inputs["tokens"]
    images, there = [2 * image - 1 for image in task.images.values()], torch.ones(1, dtype=torch.bool)

    @torch.no_grad()
    def run() -> Tensor:
        return core.sample_actions_fast_kv_cache(
            images, [there] * len(images), tokens, tokens != 0, max_decoding_steps=task.answer
        )

    return {f"model.{name}": value for name, value in core.state_dict().items()}, run


def smolvla(task: Task):
    import lerobot.policies.smolvla.smolvlm_with_expert as backbone
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
    from transformers import SmolVLMConfig

    n, size = task.network, next(iter(task.cameras.values()))
    vlm = {
        "text_config": {
            "model_type": "llama", "hidden_size": n["width"], "intermediate_size": n["mlp"],
            "num_hidden_layers": n["layers"], "num_attention_heads": n["heads"], "num_key_value_heads": n["kv_heads"],
            "head_dim": n["head_dim"], "vocab_size": n["vocabulary"], "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False, "pad_token_id": 0,
        },
        "vision_config": {
            "hidden_size": n["vision_width"], "intermediate_size": n["vision_mlp"],
            "num_hidden_layers": n["vision_layers"], "num_attention_heads": n["vision_heads"],
            "patch_size": n["patch"], "image_size": size[0],
        },
        "scale_factor": n["shuffle"],
        "pad_token_id": 0,
    }  # fmt: skip
    backbone.AutoConfig = SimpleNamespace(from_pretrained=lambda *a, **k: SmolVLMConfig(**vlm))
    tokenizer = SimpleNamespace(fake_image_token_id=1, global_image_token_id=2)
    backbone.AutoProcessor = SimpleNamespace(from_pretrained=lambda *a, **k: SimpleNamespace(tokenizer=tokenizer))
    horizon = task.spec["horizon"]
    config = SmolVLAConfig(
        **task.features(), chunk_size=horizon, n_action_steps=horizon, num_vlm_layers=n["layers"],
        resize_imgs_with_padding=tuple(size), tokenizer_max_length=task.spec["context"],
        max_state_dim=n["state_width"], max_action_dim=n["action_width"], num_steps=task.spec["steps"],
        self_attn_every_n_layers=n["self_every"], expert_width_multiplier=n["expert_width"] / n["width"],
        freeze_vision_encoder=False, train_expert_only=False,
    )  # fmt: skip
    policy = stir(SmolVLAPolicy(config)).eval()
    tokens = task.inputs["tokens"]
    batch = {**task.images, "observation.state": task.inputs["state"], OBS_LANGUAGE_TOKENS: tokens,
             OBS_LANGUAGE_ATTENTION_MASK: tokens != 0}  # fmt: skip
    noise = task.inputs["noise"]
    return policy.state_dict(), lambda: policy.predict_action_chunk(dict(batch), noise.clone())


def wall_oss(task: Task):
    from unittest.mock import patch

    import lerobot.policies.wall_x.modeling_wall_x as wall_x
    from lerobot.policies.wall_x.qwen_model.configuration_qwen2_5_vl import Qwen2_5_VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    n, horizon, image, action = task.network, task.spec["horizon"], task.network["image_token"], 262
    v, dim = n["vision"], n["numbers"]
    parts = {"arm": dim - 1, "gripper": 1}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": v["layers"], "hidden_size": v["width"], "intermediate_size": v["mlp"], "num_heads": v["heads"],
            "out_hidden_size": n["width"], "patch_size": v["patch"], "spatial_merge_size": v["merge"],
            "fullatt_block_indexes": list(v["full"]), "window_size": v["window"],
        },
        hidden_size=n["width"], intermediate_size=n["mlp"], num_hidden_layers=n["layers"],
        num_attention_heads=n["heads"], num_key_value_heads=n["kv_heads"], vocab_size=n["vocabulary"],
        max_position_embeddings=1024, num_experts=2, rms_norm_eps=1e-6, tie_word_embeddings=False,
        experts=[{"hidden_size": n["width"], "intermediate_size": n[mlp], "hidden_act": "silu"}
                 for mlp in ("mlp", "action_mlp")],
        dim_inputs=[n["width"]] * 2, mlp_moe=True, attention_moe=False, dof_config=parts, agent_pos_config=parts,
        rope_scaling={"type": "mrope", "mrope_section": list(n["sections"]), "rope_type": "default"},
        image_token_id=image, video_token_id=263, vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    config._attn_implementation = "eager"
    config.pad_token_id = 0
    ids = {"<|action|>": action, "<|propri|>": n["state_token"]}
    tokenizer = SimpleNamespace(convert_tokens_to_ids=ids.__getitem__, pad_token_id=0)
    model = wall_x.Qwen2_5_VLMoEForAction(config, processor=SimpleNamespace(tokenizer=tokenizer))
    model = stir(model.to(torch.float32)).eval()
    processor = Qwen2VLImageProcessorPil(
        patch_size=v["patch"], merge_size=v["merge"], temporal_patch_size=2, do_resize=False
    )
    made = [
        processor((picture[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy(), return_tensors="pt")
        for picture in task.images.values()
    ]
    cell = v["patch"] * v["merge"]
    counts = [h // cell * (w // cell) for h, w in task.cameras.values()]
    text, left = [], iter(counts)
    for token in task.inputs["tokens"][0].tolist():
        text += [image] * next(left) if token == image else [token]
    input_ids = torch.tensor([text + [action] * horizon])

    def wide(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, dim - x.shape[-1]))

    state = task.inputs["state"]
    common = {
        "input_ids": input_ids, "attention_mask": (input_ids != 0).long(),
        "moe_token_types": (input_ids == action).long(),
        "pixel_values": torch.cat([part["pixel_values"] for part in made]),
        "image_grid_thw": torch.cat([part["image_grid_thw"] for part in made]),
        "proprioception": wide(state)[:, None], "agent_pos_mask": wide(torch.ones_like(state))[:, None],
        "dof_mask": wide(torch.ones(1, horizon, task.action_dim)),
    }  # fmt: skip
    noise, draw = task.inputs["noise"], torch.randn

    @torch.no_grad()
    def run() -> Tensor:
        given = [noise.clone()]  # the one thing that it draws
        torch.randn = lambda *size, **k: given.pop() if given else draw(*size, **k)
        try:
            # It casts the embedded state to bfloat16, whatever the model's type; here all is float32.
            with patch("torch.bfloat16", torch.float32):
                out = model(**common, mode="predict", predict_mode="diffusion", action_dim=dim, pred_horizon=horizon,
                            return_dict=True)  # fmt: skip
        finally:
            torch.randn = draw
        return out["predict_action"]

    return model.state_dict(), run


def wan_parts(task: Task) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Wan2.2's autoencoder and text encoder, and their tensors under the names of their folders."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    v, t = task.network["vae"], task.network["text"]
    vae = AutoencoderKLWan(
        base_dim=v["channels"], decoder_base_dim=4, z_dim=v["latent"], dim_mult=list(v["growth"]),
        num_res_blocks=v["blocks"], temperal_downsample=[False, True, True], is_residual=True, patch_size=2,
        in_channels=12, out_channels=12, latents_mean=list(v["mean"]), latents_std=list(v["deviation"]),
        scale_factor_spatial=16, scale_factor_temporal=4,
    )  # fmt: skip
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=t["vocabulary"], d_model=t["width"], d_kv=t["head"], d_ff=t["hidden"],
                   num_layers=t["layers"], num_heads=t["heads"], feed_forward_proj="gated-gelu")
    )  # fmt: skip
    vae, text = (stir(part, 0.01).eval().requires_grad_(False) for part in (vae, text))
    tensors = {f"vae.{name}": value for name, value in vae.state_dict().items() if "decoder" not in name}
    words = {f"text_encoder.{name}": v for name, v in text.state_dict().items() if "embed_tokens" not in name}
    return vae, text, tensors | words


def fast_wam(task: Task):
    import lerobot.policies.fastwam.modeling_fastwam as modeling
    from lerobot.policies.fastwam import configuration_fastwam as settings
    from lerobot.policies.fastwam.wan.adapters import WanVideoVAE38
    from lerobot.policies.fastwam.wan.components import WanTextEncoder

    n, horizon, dim = task.network, task.spec["horizon"], task.action_dim
    vae, text, frozen = wan_parts(task)
    modeling.load_pretrained_wan_vae = lambda torch_dtype, device: WanVideoVAE38(torch_dtype, device, pretrained=vae)
    modeling.build_wan_tokenizer = lambda **k: None
    common = {"text_dim": n["text"]["width"], "num_heads": n["heads"], "attn_head_dim": n["head_size"],
              "num_layers": n["layers"]}  # fmt: skip
    height, width = next(iter(task.cameras.values()))
    config = settings.FastWAMConfig(
        video_dit_config=settings.default_video_dit_config(dim)
        | common
        | {"hidden_dim": n["video_width"], "ffn_dim": n["video_hidden"]},
        action_dit_config=settings.default_action_dit_config(dim)
        | common
        | {"hidden_dim": n["action_width"], "ffn_dim": n["action_hidden"]},
        load_text_encoder=False, torch_dtype="float32", image_size=(height, width * len(task.cameras)),
        action_horizon=horizon, n_action_steps=horizon, num_video_frames=horizon + 1,
        action_video_freq_ratio=horizon // (n["frames"] - 1), num_inference_steps=task.spec["steps"],
        tokenizer_max_len=task.spec["context"], base_model_id=None, action_dim=dim,
        proprio_dim=task.inputs["state"].shape[-1], **task.features(),
    )  # fmt: skip
    policy = modeling.FastWAMPolicy(config)
    model = stir(policy, 0.01).eval().requires_grad_(False).model
    object.__setattr__(model, "text_encoder", WanTextEncoder(torch.float32, "cpu", pretrained=text))
    tokens, noise = task.inputs["tokens"], task.inputs["noise"]
    model.tokenizer = lambda prompt, **k: (tokens, (tokens != 0).long())
    model._make_action_latents = lambda *a, **k: noise.clone()
    batch = {**task.images, "observation.state": task.inputs["state"]}

    def run() -> Tensor:
        context, mask = model.encode_prompt([0])
        return policy.predict_action_chunk(batch | {"context": context, "context_mask": mask})

    return policy.state_dict() | frozen, run


def lingbot_va(task: Task):
    """Two chunks of an episode, executed one action at a time, with a picture after each; the last one's actions."""
    import lerobot.policies.lingbot_va.utils as utils
    from lerobot.policies.lingbot_va.configuration_lingbot_va import LingBotVAConfig
    from lerobot.policies.lingbot_va.modeling_lingbot_va import LingBotVAPolicy

    n, (height, width) = task.network, next(iter(task.cameras.values()))
    vae, text, frozen = wan_parts(task)
    features = task.features()
    features["input_features"].pop("observation.state")
    config = LingBotVAConfig(
        **features, num_attention_heads=n["heads"], attention_head_dim=n["head_size"], action_dim=n["action_width"],
        text_dim=n["text"]["width"], ffn_dim=n["hidden"], num_layers=n["layers"],
        obs_cam_keys=[f"observation.images.{name}" for name in task.cameras],
        height=height, width=width, action_per_frame=n["frame_actions"], frame_chunk_size=n["frames"],
        num_inference_steps=n["video_steps"], action_num_inference_steps=task.spec["steps"],
        max_sequence_length=task.spec["context"], dtype="float32", used_action_channel_ids=list(n["channels"]),
        attn_window=n["window"], snr_shift=n["video_shift"], guidance_scale=n["guidance"],
        action_snr_shift=task.spec["shift"],
    )  # fmt: skip
    policy = stir(LingBotVAPolicy(config), 0.01).eval().requires_grad_(False)
    rows = task.inputs["tokens"]

    def tokenizer(prompts: list[str], **k) -> SimpleNamespace:
        ids = torch.cat([rows[:1] if prompt else rows[1:] for prompt in prompts])
        return SimpleNamespace(input_ids=ids, attention_mask=(ids != 0).long())

    policy._frozen = {"vae": vae, "streaming_vae": utils.WanVAEStreamingWrapper(vae), "text_encoder": text,
                      "tokenizer": tokenizer}  # fmt: skip
    infer, draw, given = policy._infer, torch.randn, []
    last: list[Tensor] = []

    def seeded(*args, **settings):
        torch.randn = lambda *size, **k: given.pop(0).clone()
        try:
            last[:] = infer(*args, **settings)
        finally:
            torch.randn = draw
        return tuple(last)

    policy._infer = seeded
    first = (n["frames"] - 1) * n["frame_actions"]
    pictures = {f"observation.images.{name}": task.inputs[f"pictures_{name}"] for name in task.cameras}

    def run() -> Tensor:
        policy.reset()
        given[:] = [task.inputs[f"{kind}_noise{chunk}"] for chunk in range(2) for kind in ("video", "action")]
        for tick in range(first + 1):
            policy.select_action({name: frames[tick : tick + 1] for name, frames in pictures.items()} | {"task": ["t"]})
        return last[0][:, n["channels"], ..., 0].flatten(2).transpose(1, 2)

    return policy.state_dict() | frozen, run


BUILDERS = {
    "act": act, "diffusion_policy": diffusion_policy, "fast_wam": fast_wam, "lingbot_va": lingbot_va, "pi0": pi,
    "pi05": pi, "pi0_fast": pi0_fast, "smolvla": smolvla, "wall_oss": wall_oss,
}  # fmt: skip


def main(folder: Path) -> None:
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task = Task(**json.loads((folder / "task.json").read_text()))
    task.inputs = {name: value.to(task.device) for name, value in load_file(folder / "inputs.safetensors").items()}
    torch.manual_seed(0)
    torch.set_num_threads(task.threads)
    weights, run = BUILDERS[task.recipe](task)
    if task.weights:
        save_file({name: value.detach().contiguous().clone() for name, value in weights.items()},
                  folder / "reference.safetensors")  # fmt: skip
    print("ready", file=answers, flush=True)
    actions = None
    for line in sys.stdin:
        if line.strip() == "run":
            if task.device == "cuda":
                torch.cuda.synchronize()
            start, busy = time.perf_counter(), time.process_time()
            actions = run()
            if task.device == "cuda":
                torch.cuda.synchronize()
            print(time.perf_counter() - start, time.process_time() - busy, file=answers, flush=True)
        else:
            save_file({"actions": actions.detach().cpu().contiguous()}, folder / "actions.safetensors")
            print("written", file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
