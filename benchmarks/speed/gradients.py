"""Gradients to clip: sets of tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

Shape = tuple[int, ...]


class Gradients(NamedTuple):
    """A set of tensors.

    Attributes:
        shapes: One a tensor.
        dtype: Of all.
    """

    shapes: Sequence[Shape]
    dtype: torch.dtype = torch.float32

    @property
    def bytes(self) -> int:
        """Of all together."""
        return sum(torch.Size(shape).numel() for shape in self.shapes) * self.dtype.itemsize

    def parameters(self, device: str = "cpu", seed: int = 0) -> nn.ParameterList:
        """Small weights, each with a normally distributed gradient; on other devices, fake ones."""
        generator = torch.Generator().manual_seed(seed)
        made = nn.ParameterList()
        for shape in self.shapes:
            parameter = nn.Parameter(torch.empty(shape, dtype=self.dtype, device=device))
            parameter.grad = torch.empty_like(parameter)
            if device == "cpu":
                with torch.no_grad():
                    parameter.normal_(std=0.02, generator=generator)
                    parameter.grad.normal_(generator=generator)
            made.append(parameter)
        return made

    def of_one_value(self) -> Gradients:
        """As many tensors, of one value each: what is left is the host's work."""
        return self._replace(shapes=[(1,)] * len(self.shapes))


def gpt2_small(layers: int = 12) -> list[Shape]:
    """148 tensors, 124 M values."""
    width, shapes = 768, list[Shape]([(50257, 768), (1024, 768)])
    for _ in range(layers):
        shapes += [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width)]
        shapes += [(width,)]
    return [*shapes, (width,), (width,)]


def lora() -> list[Shape]:
    """400 matrices of rank 8, in pairs, for layers of width 4096: 13 M values."""
    return [shape for _ in range(200) for shape in ((8, 4096), (4096, 8))]


GPT2, GPT2_BF16 = "GPT-2 small, float32", "GPT-2 small, bfloat16"
SMALL, LORA, MANY, TWENTY = "2000 x 64", "LoRA, 400 of rank 8", "10 000 x 64", "20 x 64"
SETS: Mapping[str, Gradients] = {
    GPT2: Gradients(gpt2_small()),
    GPT2_BF16: Gradients(gpt2_small(), torch.bfloat16),
    SMALL: Gradients([(64,)] * 2000),
    LORA: Gradients(lora()),
    MANY: Gradients([(64,)] * 10_000),
    TWENTY: Gradients([(64,)] * 20),
}
"""By the name that tables show; float32 where the name doesn't say."""
SMALLER = {
    GPT2: Gradients(gpt2_small(1)[1:]),
    GPT2_BF16: Gradients(gpt2_small(1)[1:], torch.bfloat16),
    LORA: Gradients(lora()[:20]),
    MANY: Gradients([(64,)] * 1000),
}
"""What stands for some of them in a quick run."""


def gradients(name: str, quick: bool) -> Gradients:
    """A set by its name."""
    return SMALLER.get(name, SETS[name]) if quick else SETS[name]


def restoring(model: nn.Module) -> Callable[[], None]:
    """A call that gives gradients the values they have now."""
    held = [p.grad for p in model.parameters() if p.grad is not None]
    saved = [grad.clone() for grad in held]
    return lambda: torch._foreach_copy_(held, saved)
