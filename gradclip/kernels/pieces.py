"""Tensors of any size and layout, a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

__all__ = ["aligned_pieces", "flat_pieces"]

# Elements copied at a time where memory is not dense.
COPIED = 1 << 16


def flat_pieces(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """All elements as one-dimensional pieces of at most `limit` elements, in memory order.

    Dense layouts (transposed, channels last) are viewed; others are copied in small pieces.
    """
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(limit)
    elif tensor.numel() <= min(limit, COPIED):
        yield tensor.reshape(-1)
    else:
        for part in tensor.chunk(2, max(range(tensor.ndim), key=tensor.size)):
            yield from flat_pieces(part, limit)


def aligned_pieces(tensors: Sequence[Tensor], limit: int) -> Iterator[Sequence[Tensor]]:
    """The same elements of tensors of one shape, as views of at most `limit` elements each."""
    first = tensors[0]
    if first.numel() <= limit:
        yield tensors
    elif all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(tensor.view(-1).split(limit) for tensor in tensors), strict=True)
    else:
        dim = max(range(first.ndim), key=first.size)
        for parts in zip(*(tensor.chunk(2, dim) for tensor in tensors), strict=True):
            yield from aligned_pieces(parts, limit)
