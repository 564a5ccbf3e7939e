"""A published folder of a policy on Wan2.2, from a fixture: weights, frozen parts, tokenizer, statistics."""

import json
from pathlib import Path

import torch
from parity.fixture import Fixture
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing


def write_folder(fixture: Fixture, folder: Path, statistics: dict[str, torch.Tensor]) -> Path:
    """model.safetensors, config.json, vae/, text_encoder/, tokenizer/ and LeRobot's statistics in `folder`.

    The tokenizer knows the words w2, w3, ... as tokens 2, 3, ... and ends a text with 1; 0 pads, 2 is also unknown.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {"": {}, "vae": {}, "text_encoder": {}}
    for name, value in fixture.weights.items():
        part, _, rest = name.partition(".")
        group = part if part in groups else ""
        groups[group][rest if group else name] = value
    for group, tensors in groups.items():
        (folder / group).mkdir(parents=True, exist_ok=True)
        name = "diffusion_pytorch_model.safetensors" if group == "vae" else "model.safetensors"
        save_file(tensors, folder / group / name)
        (folder / group / "config.json").write_text(json.dumps(fixture.config[group or "policy"]))
    words = {"<pad>": 0, "</s>": 1} | {f"w{n}": n for n in range(2, fixture.config["vocabulary"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    save_file(statistics, folder / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    return folder
