"""Writes openvla_oft.safetensors: weights, inputs and outputs of OpenVLA-OFT's published code at a tiny size.

Two cameras, proprioception, FiLM (OFT+), the L1 head. Run with a checkout of github.com/moojink/openvla-oft, timm,
diffusers and transformers: python make_openvla_oft.py <checkout> openvla_oft.safetensors
"""

import importlib
import json
import sys

import make_openvla as tiny
import torch
from safetensors.torch import save_file
from torch import Tensor


def attend_both_ways(language) -> None:
    """What the authors' transformers fork does: every token sees every token that is not padding."""
    forward = language.forward

    def full(attention_mask: Tensor, inputs_embeds: Tensor, **keywords):
        size = inputs_embeds.shape[1]
        mask = (1 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        keywords = {name: value for name, value in keywords.items() if name != "labels"}
        return forward(attention_mask=mask.expand(-1, 1, size, -1), inputs_embeds=inputs_embeds, **keywords)

    language.forward = full


def perturb(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def main(checkout: str, path: str) -> None:
    torch.set_num_threads(1)
    tiny.TOWERS[1]["embed_dim"] = 16  # FiLM makes the blocks larger
    model = tiny.network(tiny.reference(checkout))
    constants = importlib.import_module("prismatic.vla.constants")
    heads = importlib.import_module("prismatic.models.action_heads")
    projectors = importlib.import_module("prismatic.models.projectors")
    film = importlib.import_module("prismatic.models.film_vit_wrapper")
    width, chunk, dim = tiny.LANGUAGE["hidden_size"], constants.NUM_ACTIONS_CHUNK, constants.ACTION_DIM
    head = perturb(heads.L1RegressionActionHead(width, width, dim))
    proprio = perturb(projectors.ProprioProjector(width, constants.PROPRIO_DIM))
    model.vision_backbone = film.FiLMedPrismaticVisionBackbone(model.vision_backbone, width).eval()
    model.vision_backbone.set_num_images_in_input(2)
    with torch.no_grad():
        for name, parameter in model.vision_backbone.named_parameters():
            if "scale." in name or "shift." in name:
                parameter.normal_(0.0, 0.1)
    attend_both_ways(model.language_model)

    images = {name: torch.rand(2, 3, *tiny.SIZE) for name in ("scene", "wrist")}
    pixels = torch.cat([tiny.pixels(image) for image in images.values()], 1)
    state, actions = torch.rand(2, 8) * 2 - 1, torch.rand(2, chunk, dim) * 2 - 1
    lengths, context, space, stop = (9, 6), 12, 35, 2
    tokens = torch.zeros(2, context, dtype=torch.long)
    predicted = []
    for row, length in enumerate(lengths):
        text = torch.randint(3, 259, (length,))
        text[0] = 1
        tokens[row, :length] = text
        whole = torch.cat([text, torch.tensor([space]), torch.ones(chunk * dim).long(), torch.tensor([stop])])[None]
        labels = torch.full_like(whole, -100)
        labels[0, -chunk * dim - 1 : -1] = constants.ACTION_TOKEN_BEGIN_IDX + 1
        labels[0, -1] = stop
        with torch.no_grad():
            out = model(
                input_ids=whole, attention_mask=torch.ones_like(whole), pixel_values=pixels[row : row + 1],
                labels=labels, output_hidden_states=True, proprio=state[row : row + 1], proprio_projector=proprio,
                use_film=True,
            )  # fmt: skip
            hidden = out.hidden_states[-1][:, -chunk * dim - 2 : -2]  # each action is read off the token before it
            predicted.append(head.predict_action(hidden)[0])
    predicted = torch.stack(predicted)
    tensors = {f"weights/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"weights/action_head.{name}": value for name, value in head.state_dict().items()}
    tensors |= {f"weights/proprio_projector.{name}": value for name, value in proprio.state_dict().items()}
    tensors |= {f"in/{name}": image for name, image in images.items()}
    tensors |= {"in/tokens": tokens, "in/state": state, "in/actions": actions}
    tensors |= {"out/actions": predicted, "out/loss": torch.nn.functional.l1_loss(predicted, actions)}
    config = {"size": tiny.SIZE, "text": tiny.TEXT, "space": space, "stop": stop, "language": tiny.LANGUAGE}
    save_file(
        {name: value.contiguous().clone() for name, value in tensors.items()}, path,
        {"reference": "github.com/moojink/openvla-oft 213c5ff", "config": json.dumps(config)},
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
