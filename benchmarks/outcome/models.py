"""The small networks that the tasks train. Parameters named embed or head are no hidden layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

from benchmarks.outcome.data import IMAGE_SIDE, KINDS, SIGNAL_LENGTH


class Attention(nn.Module):
    """Every position looks back; queries and keys aren't normalised, so logits may grow."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) in and out."""
        batch, length, width = x.shape
        parts = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Experts(nn.Module):
    """A mixture of experts: each position goes through the two that its router likes best."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.rise = nn.Parameter(torch.randn(experts, width, width) * width**-0.5)
        self.fall = nn.Parameter(torch.randn(experts, width, width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) in and out; all experts compute, two count."""
        shares, chosen = self.router(x).softmax(-1).topk(2)
        gates = torch.zeros_like(self.router(x)).scatter(-1, chosen, shares)
        hidden = torch.einsum("blw,ewh->eblh", x, self.rise).relu()
        return torch.einsum("eblh,ehw,ble->blw", hidden, self.fall, gates)


class Block(nn.Module):
    """Attention, then a small network, both added; LayerNorm before each or after each."""

    def __init__(self, width: int, *, post_norm: bool, experts: int) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads=4)
        self.mlp = (
            Experts(width, experts)
            if experts
            else nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) in and out."""
        if self.post_norm:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Predicts the next character.

    Args:
        characters: How many different characters there are.
        context: The longest text it can read.
        post_norm: LayerNorm after each addition, as in the first transformer, not before.
        experts: How many experts stand in place of each small network; 0 for none.
    """

    def __init__(
        self, characters: int, context: int, *, post_norm: bool = False, experts: int = 0
    ) -> None:
        super().__init__()
        width, layers = 48, 3
        self.embed_tokens = nn.Embedding(characters, width)
        self.embed_positions = nn.Embedding(context, width)
        blocks = [Block(width, post_norm=post_norm, experts=experts) for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if post_norm else nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Scores for the next character, (batch, length, characters)."""
        positions = torch.arange(text.shape[1])
        x = self.embed_tokens(text) + self.embed_positions(positions)
        return self.head(self.norm(self.blocks(x)))


class Recurrent(nn.Module):
    """An LSTM over characters; nothing is normalised, so gradients may explode through time."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, 24)
        self.lstm = nn.LSTM(24, 48, batch_first=True)
        self.head = nn.Linear(48, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Scores for the next character, (batch, length, characters)."""
        return self.head(self.lstm(self.embed(text))[0])


class SignalNet(nn.Module):
    """Three convolutions over a signal, with GroupNorm: the weights before it have no scale."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for channels in (1, 24, 24):
            self.layers += nn.Sequential(
                nn.Conv1d(channels, 24, 5, stride=2, padding=2), nn.GroupNorm(4, 24), nn.ReLU()
            )
        self.head = nn.Linear(24 * SIGNAL_LENGTH // 8, KINDS)

    def forward(self, x: Tensor) -> Tensor:
        """Scores, (batch, kinds), from (batch, 1, length)."""
        return self.head(self.layers(x).flatten(1))


class FreeResNet(nn.Module):
    """A residual network on images without any normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        pairs = [
            nn.Sequential(
                _he(nn.Conv2d(16, 16, 3, padding=1)),
                nn.ReLU(),
                _he(nn.Conv2d(16, 16, 3, padding=1)),
            )
            for _ in range(4)
        ]
        self.blocks = nn.ModuleList(pairs)
        self.head = nn.Linear(16 * (IMAGE_SIDE // 4) ** 2, KINDS)

    def forward(self, x: Tensor) -> Tensor:
        """Scores, (batch, kinds), from (batch, 1, side, side)."""
        x = nn.functional.avg_pool2d(self.stem(x), 2)
        for block in self.blocks:
            x = x + block(relu(x))
        return self.head(nn.functional.avg_pool2d(relu(x), 2).flatten(1))


def _he(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


def student() -> nn.Module:
    """Three linear layers for the noisy function."""
    return nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )


def pilot() -> nn.Module:
    """Scores for pushing the cart left or right."""
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
