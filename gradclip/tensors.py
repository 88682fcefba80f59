"""Single tensors: bounded chunks of any memory layout, and sparse ones refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from gradclip.errors import LayoutError

__all__ = ["aligned_chunks", "flat_chunks", "refuse_sparse"]

# Elements copied at a time where memory is not dense.
COPIED = 1 << 16


def flat_chunks(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """All elements as one-dimensional chunks of at most `limit` elements, in memory order.

    Dense layouts (transposed, channels last) are viewed; others are copied in small chunks.
    """
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        yield from (flat,) if flat.numel() <= limit else flat.split(limit)
    elif tensor.numel() <= min(limit, COPIED):
        yield tensor.reshape(-1)
    else:
        for half in tensor.chunk(2, max(range(tensor.ndim), key=tensor.size)):
            yield from flat_chunks(half, limit)


def aligned_chunks(tensors: Sequence[Tensor], limit: int) -> Iterator[Sequence[Tensor]]:
    """Chunks of tensors of one shape: views of the same elements of each, at most `limit` each."""
    first = tensors[0]
    if first.numel() <= limit:
        yield tensors
    elif all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(tensor.view(-1).split(limit) for tensor in tensors), strict=True)
    else:
        dim = max(range(first.ndim), key=first.size)
        for halves in zip(*(tensor.chunk(2, dim) for tensor in tensors), strict=True):
            yield from aligned_chunks(halves, limit)


def refuse_sparse(grads: Iterable[tuple[str, Tensor]], why: str) -> None:
    """Refuse sparse gradients.

    Args:
        grads: The names of parameters and their gradients.
        why: What can't be done with a sparse one, as the end of "is sparse, and ...".

    Raises:
        LayoutError: If one is sparse.
    """
    for name, grad in grads:
        if grad.is_sparse:
            msg = (
                f"The gradient of {name!r} is sparse, and {why}. Build the embedding with "
                "sparse=False, or leave its parameters out of what is clipped."
            )
            raise LayoutError(msg)
