"""A small character-level GPT: four transformer blocks over a table of characters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention


class Attention(nn.Module):
    """Every position looks back at the positions before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions; (batch, length, width) in and out."""
        batch, length, width = x.shape
        parts = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention, then a small network per position, both added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) in and out."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Predicts the next character.

    Args:
        characters: How many different characters there are.
        context: The longest text it can read, in characters.
        width: Numbers per position.
        layers: Blocks.
        heads: Parts that attention is divided into.
    """

    def __init__(
        self, characters: int, context: int, *, width: int = 128, layers: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(characters, width)
        self.embed_positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        self.apply(_start)

    def forward(self, text: Tensor) -> Tensor:
        """Scores for the next character, (batch, length, characters), from (batch, length)."""
        positions = torch.arange(text.shape[1], device=text.device)
        x = self.embed_tokens(text) + self.embed_positions(positions)
        return self.head(self.norm(self.blocks(x)))


def surprise(scores: Tensor, target: Tensor) -> Tensor:
    """The loss of each sample: its mean surprise per character, in nats.

    A blind guess among a hundred characters costs 4.6.

    Args:
        scores: What `GPT` gives, (batch, length, characters).
        target: The characters that did come next, (batch, length).

    Returns:
        (batch,).
    """
    each = cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="none")
    return each.view(target.shape).mean(1)


def _start(module: nn.Module) -> None:
    """GPT-2's starting values: small and normal."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
