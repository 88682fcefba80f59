"""Low-rank adapters on a tiny Llama with random weights: no weights are read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RANK, ALPHA = 8, 16.0


class Adapter(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices, which starts at 0."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(RANK, frozen.in_features) * frozen.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(frozen.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """What the frozen layer gives, adapted."""
        return self.frozen(x) + ALPHA / RANK * (x @ self.a.T @ self.b.T)


class AdaptedLlama(nn.Module):
    """A Llama whose linear layers have adapters, and whose head is trained whole."""

    def __init__(self, characters: int, context: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel  # slow to import: only for this task

        config = LlamaConfig(
            vocab_size=characters,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=context,
            initializer_range=0.1,
            use_cache=False,
        )
        self.base = LlamaModel(config).requires_grad_(False)
        for module in list(self.base.layers.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) and not isinstance(module, Adapter):
                    setattr(module, name, Adapter(child))
        self.head = nn.Linear(48, characters, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Scores for the next character, (batch, length, characters)."""
        return self.head(self.base(text).last_hidden_state)
