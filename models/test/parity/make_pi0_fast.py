"""Writes pi0_fast.safetensors: LeRobot's pi0-FAST at a tiny size, trained on two samples so that its answers decode.

Run with LeRobot 0.6.1: python make_pi0_fast.py pi0_fast.safetensors
The FAST processor is the copy of physical-intelligence/fast that LeRobot has (policies/molmoact2).
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import lerobot_on_py311  # noqa: F401  (only where LeRobot runs on Python 3.11)
except ImportError:
    pass
import lerobot.policies.pi0_fast.modeling_pi0_fast as modeling
import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.lerobot_types import TransitionKey
from lerobot.policies.molmoact2.molmoact2_hf_model.action_tokenizer import UniversalActionProcessor
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.processor_pi0_fast import Pi0FastPrepareStateAndLanguageTokenizerProcessorStep
from lerobot.processor.tokenizer_processor import ActionTokenizerProcessorStep
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WIDTH, VOCABULARY, SKIP, SIZE, HORIZON, NUMBERS, CONTEXT, LENGTH = 32, 512, 16, 28, 4, 8, 64, 48
TASKS = ("pick the cup", "Push_it left")


def words() -> PreTrainedTokenizerFast:
    """A tokeniser with PaliGemma's special words and one token a character."""
    known = ["<pad>", "<eos>", "<bos>", "<unk>", "Action", "Task", "State"]
    known += sorted(set("▁:|;,-\n0123456789abcdefghijklmnopqrstuvwxyzP"))
    known += [f"<unused{i}>" for i in range(len(known), VOCABULARY)]
    reader = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, "<unk>"))
    reader.normalizer = normalizers.Replace(" ", "▁")
    reader.pre_tokenizer = pre_tokenizers.Split(Regex(r"Action|Task|State|[\s\S]"), "isolated")
    reader.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    reader.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=reader, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


class ActionWords:
    """The same tokeniser with the end of the text, and without its beginning (add_eos_token, not add_bos_token)."""

    def __init__(self, reader: PreTrainedTokenizerFast):
        self.reader = reader
        self.bos_token_id, self.vocab_size = 2, VOCABULARY
        self.convert_tokens_to_ids = reader.convert_tokens_to_ids
        self.convert_ids_to_tokens = reader.convert_ids_to_tokens

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.reader.encode(text, add_special_tokens=False) + [1] * add_special_tokens


def network(reader: ActionWords) -> tuple[PI0FastConfig, modeling.PI0FastPytorch]:
    modeling.get_gemma_config = lambda _: modeling.GemmaConfig(WIDTH, 2, 48, 8, 1, 8)
    original = modeling.PaliGemmaForConditionalGenerationWithPiGemma

    def small(config):
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers = 16, 24, 2
        vision.num_attention_heads, vision.projection_dim, vision.image_size = 16, WIDTH, SIZE
        config.projection_dim = config.hidden_size = WIDTH
        config.text_config.vocab_size = VOCABULARY
        return original(config=config)

    modeling.PaliGemmaForConditionalGenerationWithPiGemma = small
    config = PI0FastConfig(
        input_features={
            **{f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)) for name in "ab"},
            "observation.state": PolicyFeature(FeatureType.STATE, (NUMBERS,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (NUMBERS,))},
        device="cpu", image_resolution=(SIZE, SIZE), chunk_size=HORIZON, n_action_steps=HORIZON,
        tokenizer_max_length=CONTEXT, max_action_tokens=LENGTH, max_decoding_steps=LENGTH, fast_skip_tokens=SKIP,
        action_tokenizer_name="fast",
    )  # fmt: skip
    return config, modeling.PI0FastPytorch(config, paligemma_tokenizer=reader)


def main(path: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, HORIZON)[:, None]
    chunks = rng.normal(0, 0.5, (60, 1, NUMBERS)) + ramp * rng.normal(0, 0.5, (60, 1, NUMBERS))
    fast = UniversalActionProcessor.fit(list(chunks), vocab_size=400)
    reader = words()
    action_words = ActionWords(reader)
    config, core = network(action_words)

    mean, std = torch.linspace(-0.2, 0.3, NUMBERS), torch.linspace(0.5, 1.5, NUMBERS)
    images = torch.from_numpy(rng.integers(0, 256, (2, 2, 3, SIZE, SIZE))).float() / 255
    state = torch.from_numpy(rng.normal(0, 0.5, (2, NUMBERS))).float()
    actions = torch.from_numpy(chunks[:2].astype(np.float32))
    present = torch.tensor([[True, True], [True, False]])
    prompt = Pi0FastPrepareStateAndLanguageTokenizerProcessorStep()(
        {TransitionKey.OBSERVATION: {"observation.state": (state - mean) / (std + 1e-8)},
         TransitionKey.COMPLEMENTARY_DATA: {"task": list(TASKS)}}
    )[TransitionKey.COMPLEMENTARY_DATA]["task"]  # fmt: skip
    text = reader(prompt, max_length=CONTEXT, padding="max_length", padding_side="right", return_tensors="pt")
    assert 3 not in text["input_ids"], prompt
    step = ActionTokenizerProcessorStep.__new__(ActionTokenizerProcessorStep)
    step.action_tokenizer, step._paligemma_tokenizer = fast, action_words
    step.fast_skip_tokens, step.max_action_tokens = SKIP, LENGTH
    answer, answer_mask = step._tokenize_action(actions)
    given = ([2 * images[:, i] - 1 for i in range(2)], [present[:, i] for i in range(2)], text["input_ids"],
             text["attention_mask"].bool())  # fmt: skip

    optimiser = torch.optim.Adam(core.parameters(), 1e-2)
    for _ in range(120):
        loss = core(*given, answer, answer_mask)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    core.eval()
    with torch.no_grad():
        # What was learnt by heart is very sure of itself; noise brings the loss back to where a difference shows.
        loss = core(*given, answer.roll(1, 0), answer_mask.roll(1, 0))["loss"]
        tokens = core.sample_actions_fast_kv_cache(*given, max_decoding_steps=LENGTH)
    policy = modeling.PI0FastPolicy.__new__(modeling.PI0FastPolicy)
    torch.nn.Module.__init__(policy)
    policy.config, policy.action_tokenizer, policy._paligemma_tokenizer = config, fast, action_words
    decoded = policy.detokenize_actions(tokens, HORIZON, NUMBERS)
    print("loss", loss.item(), "of its own", core(*given, answer, answer_mask)["loss"].item())
    print(answer[:, :30], tokens[:, :30], (decoded - actions).abs().max(), sep="\n")

    encoded = [fast(chunk)[0] for chunk in chunks[:16]]
    flat = torch.tensor([token for row in encoded for token in row])
    tensors = {f"weights/model.{name}": value for name, value in core.state_dict().items()}
    tensors |= {
        "in/images": images, "in/present": present, "in/state": state, "in/text": text["input_ids"],
        "in/actions": actions, "in/chunks": torch.from_numpy(chunks[:16]), "in/mean": mean, "in/std": std,
        "out/answer": answer, "out/answer_mask": answer_mask, "out/loss": loss, "out/tokens": tokens,
        "out/decoded": decoded, "out/fast": flat, "out/fast_lengths": torch.tensor([len(row) for row in encoded]),
        "out/chunks": torch.from_numpy(fast.decode(encoded)),
    }  # fmt: skip
    said = {
        "type": "pi0_fast", "chunk_size": HORIZON, "image_resolution": [SIZE, SIZE], "tokenizer_max_length": CONTEXT,
        "max_decoding_steps": LENGTH, "fast_skip_tokens": SKIP, "action_tokenizer_name": "lerobot/none",
        "temperature": config.temperature, "use_relative_actions": False,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        "input_features": {
            **{f"observation.images.{name}": {"type": "VISUAL", "shape": [3, SIZE, SIZE]} for name in "ab"},
            "observation.state": {"type": "STATE", "shape": [NUMBERS]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [NUMBERS]}},
    }  # fmt: skip
    metadata = {
        "reference": "lerobot 0.6.1", "config": json.dumps(said), "tasks": json.dumps(TASKS),
        "text_tokenizer": reader.backend_tokenizer.to_str(),
        "fast_tokenizer": fast.bpe_tokenizer.backend_tokenizer.to_str(),
        "fast_processor": json.dumps({"scale": fast.scale, "min_token": fast.min_token, "vocab_size": fast.vocab_size}),
    }  # fmt: skip
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path, metadata)


if __name__ == "__main__":
    main(*sys.argv[1:])
