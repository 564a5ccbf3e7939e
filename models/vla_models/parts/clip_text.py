"""CLIP's text encoder (Radford et al., arXiv 2103.00020), from transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel


class ClipText(nn.Module):
    """Tokens (B, L) -> features (B, L, width). Causal, so what stands after a text's end changes nothing before it.

    context: most tokens. The defaults are those of ViT-B/32: 63.2 M parameters.
    """

    def __init__(self, vocabulary: int = 49408, width: int = 512, layers: int = 12, heads: int = 8, context: int = 77):
        super().__init__()
        self.model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, projection_dim=width,
                num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=context, bos_token_id=None,
                eos_token_id=None, attn_implementation="eager",
            )
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        # A finished mask: transformers would make its own, which the ONNX exporter cannot follow.
        length = tokens.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        mask = torch.where(later, -1e9, 0.0)[None, None]
        x = self.model.encoder(inputs_embeds=self.model.embeddings(tokens), attention_mask=mask).last_hidden_state
        return self.model.final_layer_norm(x)
