"""Writes rt1.safetensors: weights, inputs and outputs of RT-1's public code at a tiny size.

Run with google-research/robotics_transformer (4569641) on the path, tensorflow 2.x and tf_keras:
    TF_USE_LEGACY_KERAS=1 python make_rt1.py rt1.safetensors
Its tf_agents and tensor2robot only give base classes and specifications to what is called here, so they are left out.
"""

import json
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import tensorflow as tf
from safetensors.numpy import save_file

for name in ("gin", "tensor2robot", "tensor2robot.utils", "tf_agents", "tf_agents.networks", "tf_agents.specs",
             "tf_agents.utils", "robotics_transformer.film_efficientnet.preprocessors",
             "robotics_transformer.tokenizers.action_tokenizer", "robotics_transformer.tokenizers.image_tokenizer",
             ):  # fmt: skip
    sys.modules[name] = MagicMock()
sys.modules["tf_agents.networks"].network.Network = object
from robotics_transformer import transformer_network  # noqa: E402
from robotics_transformer.film_efficientnet import film_conditioning_layer, film_efficientnet_encoder  # noqa: E402
from robotics_transformer.tokenizers import token_learner  # noqa: E402
from robotics_transformer.transformer import Transformer  # noqa: E402

WIDTH, HISTORY, TOKENS, SAID, BINS, HEADS, HEAD = 32, 2, 2, 11, 64, 2, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Layers:
    """Keras' layers, with a condition of WIDTH numbers where the code has 512."""

    def __getattr__(self, name):
        if name != "Input":
            return getattr(tf.keras.layers, name)
        return lambda shape: tf.keras.layers.Input(shape=WIDTH if shape == 512 else shape)


def randomise(variables, rng) -> None:
    """Nothing zero, so that every weight counts."""
    for value in variables:
        if "variance" in value.name:
            value.assign(rng.uniform(0.5, 1.5, value.shape))
        elif value.shape.rank == 1:
            value.assign(rng.normal(1.0 if "gamma" in value.name else 0.0, 0.2, value.shape))
        elif "film" in value.name or "dense" in value.name:
            value.assign(rng.normal(0, 0.3 / np.sqrt(value.shape[0]), value.shape))


def main(path: str) -> None:
    rng = np.random.default_rng(0)
    tf.keras.utils.set_random_seed(0)
    film_efficientnet_encoder.layers = Layers()
    encoder = film_efficientnet_encoder.EfficientNet(0.3, 0.25, 300, include_top=False, weights=None, include_film=True)
    conv = tf.keras.layers.Conv2D(WIDTH, 1, use_bias=False)
    film = film_conditioning_layer.FilmConditioning(WIDTH)
    learner = token_learner.TokenLearnerModule(TOKENS)
    transformer = Transformer(2, HEAD, HEADS, WIDTH, 0.1, BINS)

    image = rng.uniform(0, 1, (1, HISTORY, 48, 64, 3)).astype(np.float32)
    context = rng.normal(size=(1, WIDTH)).astype(np.float32)

    def run():
        pixels = tf.reshape(image, (-1, 48, 64, 3)) * 255
        condition = tf.repeat(context, HISTORY, 0)
        features = film(conv(encoder((pixels, condition), training=False)), condition)
        tokens = tf.reshape(learner(features), (1, HISTORY, TOKENS, 1, WIDTH))
        network = SimpleNamespace(_tokens_per_action=SAID, _tokens_per_context_image=TOKENS, _vocab_size=BINS,
                                  _time_sequence_length=HISTORY, _token_embedding_size=WIDTH,
                                  _action_token_emb=tf.keras.layers.Dense(WIDTH))  # fmt: skip
        kind = transformer_network.TransformerNetwork
        network._get_action_index_for_token = lambda k: kind._get_action_index_for_token(network, k)
        kind._generate_masks(network)
        actions = tf.zeros((1, HISTORY, SAID), tf.int32)
        sequence = kind._assemble_input_token_sequence(network, tokens, actions, 1)
        logits, _ = transformer(sequence, False, network._default_attention_mask)
        logits = tf.reshape(tf.gather(logits, network._action_tokens_mask - 1, axis=1), (1, HISTORY, SAID, BINS))
        return features, tf.reshape(tokens, (1, HISTORY, TOKENS, WIDTH)), logits[:, -1]

    run()
    parts = {"encoder": encoder, "conv1x1": conv, "film": film, "token_learner": learner, "transformer": transformer}
    for part in parts.values():
        randomise(part.weights, rng)
    normalization = next(layer for layer in encoder.layers if "normalization" in layer.name.split("_")[0])
    normalization.mean, normalization.variance = tf.constant(MEAN), tf.constant(STD)  # as in the ImageNet weights
    features, tokens, logits = run()
    tensors = {}
    for part, module in parts.items():
        for value in module.weights:
            if not value.name.startswith("normalization"):
                tensors[f"weights/{part}/{value.name.removesuffix(':0')}"] = value.numpy()
    tensors |= {"in/image": np.moveaxis(image, -1, 2), "in/context": context, "out/tokens": tokens.numpy()}
    tensors |= {"out/features": np.moveaxis(features.numpy(), -1, 1), "out/logits": logits.numpy()}
    metadata = {
        "reference": "google-research/robotics_transformer 4569641",
        "config": json.dumps(
            {"width": WIDTH, "history": HISTORY, "tokens": TOKENS, "bins": BINS, "heads": HEADS, "head_width": HEAD}
        ),
    }
    save_file(
        {k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items() if v.dtype != np.int64}, path, metadata
    )


if __name__ == "__main__":
    main(sys.argv[1])
