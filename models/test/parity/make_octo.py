"""Writes octo.safetensors: weights, inputs and outputs of the public Octo code (github.com/octo-models/octo), tiny.

    PYTHONPATH=<a checkout of octo-models/octo> python make_octo.py

Run in an environment with jax 0.4.35, flax 0.8.5, distrax 0.1.5, transformers 4.44 and einops; the project needs none.
"""

import json
from pathlib import Path
from unittest import mock

import flax
import jax
import jax.numpy as jnp
import numpy as np
import transformers

# What newer versions of jax call otherwise.
jax.tree_map = jax.tree_util.tree_map
jax.random.KeyArray = jax.Array

from octo.model.components.action_heads import DiffusionActionHead  # noqa: E402
from octo.model.components.tokenizers import ImageTokenizer, LanguageTokenizer  # noqa: E402
from octo.model.components.vit_encoders import SmallStem16  # noqa: E402
from octo.model.octo_module import OctoModule  # noqa: E402
from octo.utils.spec import ModuleSpec  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

STEM = {"features": (32, 64, 32, 32), "num_features": 16}
HEAD = {"action_horizon": 4, "action_dim": 7, "n_diffusion_samples": 1, "dropout_rate": 0.0, "time_dim": 8,
        "hidden_dim": 16, "num_blocks": 2}  # fmt: skip
TRANSFORMER = {"num_layers": 2, "mlp_dim": 32, "num_attention_heads": 2, "dropout_rate": 0.0,
               "attention_dropout_rate": 0.0, "add_position_embedding": False}  # fmt: skip
TEXT = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3}
SIZES = {"primary": 48, "wrist": 32}
BATCH, WINDOW = 2, 2
FLAT = BATCH * WINDOW * HEAD["action_horizon"] * HEAD["action_dim"]


def model_config() -> dict:
    """The "model" part of the public config.json."""
    stem = ModuleSpec.create(SmallStem16, **STEM)
    keys = {name: {"obs_stack_keys": [f"image_{name}"], "task_stack_keys": [f"image_{name}"]} for name in SIZES}
    return {
        "observation_tokenizers": {
            name: ModuleSpec.create(ImageTokenizer, encoder=stem, **keys[name]) for name in SIZES
        },
        "task_tokenizers": {
            "language": ModuleSpec.create(LanguageTokenizer, encoder="t5-base", finetune_encoder=False)
        },
        "heads": {"action": ModuleSpec.create(DiffusionActionHead, readout_key="readout_action", **HEAD)},
        "readouts": {"action": 1},
        "transformer_kwargs": TRANSFORMER,
        "token_embedding_size": 16,
        "max_horizon": 3,
        "repeat_task_tokens": True,
        "use_correct_attention": True,
    }


def given(supply):
    """Stands in for jax.random.normal: the next of `supply` where an array of its shape is drawn (flax also asks it for
    the shapes of parameters)."""
    supply = iter(supply)

    def normal(key, shape=(), dtype=jnp.float32):
        return jnp.asarray(next(supply)).reshape(shape) if np.prod(shape) == FLAT else jnp.zeros(shape, dtype)

    return normal


def main() -> None:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (BATCH, WINDOW, size, size, 3), np.uint8) for name, size in SIZES.items()}
    # The second sample stands at the start of its episode (its first frame is padding) and has no wrist camera.
    for image in images.values():
        image[1, 0] = image[1, 1]
    window = np.array([[True, True], [False, True]])
    present = np.array([[True, True], [True, False]])
    observations = {f"image_{name}": image for name, image in images.items()}
    observations["pad_mask_dict"] = {
        f"image_{name}": np.repeat(present[:, i : i + 1], WINDOW, 1) for i, name in enumerate(SIZES)
    }
    tokens = np.array([[7, 30, 21, 9, 14, 1], [11, 5, 1, 0, 0, 0]])
    tasks = {f"image_{name}": np.zeros((BATCH, size, size, 3), np.uint8) for name, size in SIZES.items()}
    tasks["language_instruction"] = {"input_ids": tokens, "attention_mask": (tokens != 0).astype(int)}
    tasks["pad_mask_dict"] = {f"image_{name}": np.zeros(BATCH, bool) for name in SIZES}
    tasks["pad_mask_dict"]["language_instruction"] = np.ones(BATCH, bool)

    actions = rng.normal(size=(BATCH, WINDOW, HEAD["action_horizon"], HEAD["action_dim"])).astype(np.float32)
    padded = np.array([[False] * 4, [False, False, True, True]])
    flat = HEAD["action_horizon"] * HEAD["action_dim"]
    noise = rng.normal(size=(BATCH, WINDOW, flat)).astype(np.float32)
    draws = rng.normal(size=(20, BATCH, WINDOW, flat)).astype(np.float32)
    time = np.array([[[3], [11]], [[0], [19]]])
    # Only the newest step of the window counts, and of it the actions inside the episode.
    wanted = np.zeros(actions.shape, bool)
    wanted[:, -1] = ~padded[:, :, None]

    with mock.patch.object(transformers.AutoConfig, "from_pretrained", lambda name: transformers.T5Config(**TEXT)):
        module = OctoModule.create(**model_config())
        params = module.init(jax.random.PRNGKey(0), observations, tasks, window, train=False)["params"]
        # Everything takes part: what starts at zero or one is moved away from it.
        params = jax.tree_util.tree_map(
            lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), flax.core.unfreeze(params)
        )
        outputs = module.apply({"params": params}, observations, tasks, window, train=False, method="octo_transformer")
        bound = module.bind({"params": params}, rngs={"dropout": jax.random.PRNGKey(0)})
        head = bound.heads["action"]
        with mock.patch.object(jax.random, "randint", lambda *a, **k: jnp.asarray(time)[None]), \
                mock.patch.object(jax.random, "normal", given([noise])):  # fmt: skip
            loss, _ = head.loss(outputs, actions, np.ones_like(window), wanted, train=False)
        with jax.disable_jit(), mock.patch.object(jax.random, "normal", given([noise, *draws])):
            sample = head.predict_action(outputs, rng=jax.random.PRNGKey(0), train=False)

    flat_params = flax.traverse_util.flatten_dict(params, sep="/")
    tensors = {f"weights/{name}": np.asarray(value) for name, value in flat_params.items()}
    for name, image in images.items():
        tensors[f"in/image_{name}"] = image
    tensors |= {"in/tokens": tokens, "in/present": present, "in/actions": actions[:, -1], "in/padded": padded}
    shape = (BATCH, HEAD["action_horizon"], HEAD["action_dim"])
    tensors |= {"in/noise": noise[:, -1].reshape(shape), "in/time": time[:, -1, 0]}
    tensors["in/draws"] = draws[:19, :, -1].reshape(19, *shape)
    tensors |= {"out/readout": outputs["readout_action"].tokens, "out/betas": head.betas}
    tensors |= {"out/loss": loss[None], "out/actions": sample}
    path = Path(__file__).with_name("octo.safetensors")
    config = {"model": model_config(), "window_size": WINDOW, "text": TEXT}
    arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    save_file(arrays, path, {"reference": "octo-models/octo 241fb35", "config": json.dumps(config)})
    for name, value in flat_params.items():
        print(name, value.shape)
    print(path, path.stat().st_size, "loss", loss, sum(v.size for v in flat_params.values()))


if __name__ == "__main__":
    main()
