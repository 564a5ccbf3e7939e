"""Recipe "rt1": Robotics Transformer 1 (Brohan et al., arXiv 2212.06817), and RT-1-X (arXiv 2310.08864).

    T images --FiLM-EfficientNet-B3, 9x9--TokenLearner--> 8 tokens an image --.
                     ^ instruction                                             > causal transformer -> action bins
    places of the action tokens (their content is zero) ----------------------'

Everything is read off one pass: a place sees the images up to its time and no action token, so the bins of one action
do not depend on each other, and the most likely one of each is taken. A bin is int((a + 1)/2*(bins - 1)), truncated, of
an action whose extremes are at -1 and 1. As in the public code (google-research/robotics_transformer) the logits of a
token are read one place before it, and the feed-forward part is a single linear layer.

What differs. The paper's 11 tokens are 7 of the arm, 3 of the base and 1 of the mode; here the action space's own
numbers come first and the places left over stay empty (no loss). With a horizon H there are H times as many; the paper
has 1. The instruction's 512 numbers come from the Universal Sentence Encoder in the paper, which has no weights outside
TensorFlow; here a small encoder of the training set's words is learnt with the rest, so words it never saw are
dropped. The public loss is over all T steps of the window, here over those from the newest image on. Several cameras'
tokens stand side by side (the paper has one). The state is not looked at.

RT-1-X is the preset "rt1x": 15 images, all 81 tokens of each, 512 bins, heads of 256, SwiGLU feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vla_core.actions import ActionSpace

from vla_models.parts.attention import Attention
from vla_models.parts.efficientnet import FilmEfficientNet
from vla_models.parts.token_learner import TokenLearner
from vla_models.parts.vision import LanguageEncoder
from vla_models.parts.window import with_window
from vla_models.policy import PolicySpec
from vla_models.tokenizers import BinTokenizer
from vla_models.torch_policy import Batch, Inputs, OnePassPolicy, Preset


@dataclass(frozen=True)
class Rt1Config:
    """Sizes of the network.

    width: of tokens, of the feed-forward layers and of the instruction's embedding. layers, heads, head_width: of the
    transformer (the code calls the latter layer_size). swiglu: gated feed-forward layers without bias (RT-1-X) instead
    of linear ones. tokens: of one image. bins: of one number. action_tokens: places for an action's numbers, at least.
    width_scale, depth_scale: of EfficientNet. words: width of the word embeddings. dropout: of the feed-forward layers.
    """

    width: int = 512
    layers: int = 8
    heads: int = 8
    head_width: int = 128
    swiglu: bool = False
    tokens: int = 8
    bins: int = 256
    action_tokens: int = 11
    width_scale: float = 1.2
    depth_scale: float = 1.4
    words: int = 128
    dropout: float = 0.1


class FeedForward(nn.Module):
    """One linear layer, or SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, swiglu: bool):
        super().__init__()
        self.hidden = nn.Linear(width, width, bias=False) if swiglu else None
        self.gate = nn.Linear(width, width, bias=False) if swiglu else None
        self.out = nn.Linear(width, width, bias=not swiglu)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x if self.gate is None else nn.functional.silu(self.hidden(x)) * self.gate(x))


class Block(nn.Module):
    """Transformer block, pre-norm."""

    def __init__(self, config: Rt1Config):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(config.width, eps=1e-6) for _ in range(2))
        self.attention = Attention(config.width, config.heads, config.head_width)
        self.feed = FeedForward(config.width, config.swiglu)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, mask)
        return x + self.dropout(self.feed(self.norms[1](x)))


class Rt1Network(nn.Module):
    """The network of the recipe "rt1"."""

    def __init__(self, spec: PolicySpec, config: Rt1Config):
        super().__init__()
        width = config.width
        self.shape = (spec.horizon, spec.action_dim)
        self.history = spec.history
        self.words = LanguageEncoder(len(spec.vocabulary), spec.context, config.words)
        self.instruction = nn.Linear(config.words, width)
        self.encoder = FilmEfficientNet(width, width, config.width_scale, config.depth_scale)
        self.token_learner = TokenLearner(width, config.tokens)
        self.seen = config.tokens * len(spec.cameras)
        self.said = max(config.action_tokens, spec.horizon * spec.action_dim)
        self.token_in = nn.Linear(width, width)
        self.places = nn.Parameter(torch.randn(spec.history * (self.seen + self.said), width) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.logits_out = nn.Linear(width, config.bins)
        self.register_buffer("mask", hidden(spec.history, self.seen, self.said), persistent=False)
        self.tokenizer = BinTokenizer(-1.0, 1.0, config.bins, "truncate")
        values = torch.tensor(self.tokenizer.decode(range(config.bins)), dtype=torch.float32)
        self.register_buffer("values", values, persistent=False)

    def image_tokens(self, image: Tensor, instruction: Tensor) -> Tensor:
        """(B, T, 3, h, w) and (B, width) -> (B, T, tokens, width). Each image for itself."""
        count, times = image.shape[:2]
        condition = instruction[:, None].expand(-1, times, -1).flatten(0, 1)
        features = self.encoder(image.flatten(0, 1), condition)
        return self.token_learner(features.flatten(2).transpose(1, 2)).unflatten(0, (count, times))

    def logits(self, inputs: Inputs) -> Tensor:
        """(B, H, dim, bins)."""
        return self.logits_of(with_window(inputs).images, self.instruction(self.words(inputs.tokens)))

    def logits_of(self, images: tuple[Tensor, ...], instruction: Tensor) -> Tensor:
        """(B, H, dim, bins) of images (B, T, 3, h, w) and an embedded instruction (B, width)."""
        seen = torch.cat([self.image_tokens(image, instruction) for image in images], 2)
        said = seen.new_zeros(*seen.shape[:2], self.said, seen.shape[-1])
        x = self.token_in(torch.cat([seen, said], 2).flatten(1, 2)) + self.places
        for block in self.blocks:
            x = block(x, self.mask)
        horizon, dim = self.shape
        first = (self.history - 1) * (self.seen + self.said) + self.seen - 1
        return self.logits_out(x[:, first : first + horizon * dim]).unflatten(1, self.shape)

    def forward(self, inputs: Inputs) -> Tensor:
        """Normalised actions (B, H, dim): the values of the most likely bins."""
        return self.values[self.logits(inputs).argmax(-1)]

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy of the bins, the mean over the numbers of the actions inside the episode."""
        bins = torch.from_numpy(self.tokenizer.encode(batch.actions.cpu().numpy())).to(batch.actions.device)
        error = nn.functional.cross_entropy(self.logits(batch.inputs).movedim(-1, 1), bins, reduction="none")
        inside = (~batch.padded).to(error).unsqueeze(-1)
        return {"loss": (error * inside).sum() / (inside.sum() * error.shape[-1])}


def hidden(times: int, seen: int, said: int) -> Tensor:
    """(1, N, N) bool, what a place (row) does not see: what comes later, and any action token from an action token.

    N places: for each time `seen` of images and `said` of actions.
    """
    action = (torch.arange(seen + said) >= seen).repeat(times)
    later = torch.ones(len(action), len(action), dtype=torch.bool).triu(1)
    return (later | (action[:, None] & action)).unsqueeze(0)


class Rt1Policy(OnePassPolicy):
    """The recipe "rt1" on torch. One pass, the most likely bins: deterministic."""

    Config, Network = Rt1Config, Rt1Network
    _arm = {
        "cameras": {"scene": (300, 300)},
        "horizon": 1,
        "period": 1 / 3,
        "action_space": ActionSpace(("arm",), "pose", (), "chunk", "base", "rpy"),
        "vocabulary": ("", "apple", "move", "near", "pick"),
    }
    contract = {"history": 6, "lead": 1}
    presets = {
        "paper": Preset(Rt1Config(), _arm),
        "rt1x": Preset(Rt1Config(head_width=256, swiglu=True, tokens=81, bins=512), {**_arm, "history": 15}),
        "tiny": Preset(
            Rt1Config(32, 2, 2, 16, tokens=2, width_scale=0.3, depth_scale=0.25, words=16, dropout=0.0),
            {"cameras": {"scene": (48, 64)}, "horizon": 8, "history": 2, "vocabulary": ("", "apple", "pick")},
        ),
    }
    parameters = 35e6
    normalization = {"state": "min_max", "action": "min_max"}
    training = {"horizon": 1, "period": 1 / 3, "rotation": "rpy", "lr": 1e-4}
