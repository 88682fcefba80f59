"""Units: rows of weights, each with a norm and a coefficient of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradclip.types import Piece, Units

__all__ = ["assembled", "rows_of", "scale_units_", "unit_norms", "unit_peaks"]


def rows_of(tensor: Tensor, piece: Piece, views: int, copies: int) -> Iterator[tuple[int, Tensor]]:
    """The units of a tensor as rows, some at a time.

    Args:
        tensor: The elements of at least one unit.
        piece: What it holds.
        views: How many elements at a time where units lie one after the other in memory.
        copies: The same where they have to be copied for it.

    Yields:
        The index of the first unit, and rows of shape (units, elements of one).
    """
    outside, inside = _dims(tensor, piece)
    ordered = tensor.permute((*outside, *inside)) if outside and outside[0] else tensor
    limit = views if ordered.is_contiguous() else copies
    if not outside:
        yield piece.start, ordered.reshape(1, -1)
        return
    step = max(1, limit * ordered.shape[0] // ordered.numel())
    per = piece.units // ordered.shape[0]
    for at in range(0, ordered.shape[0], step):
        part = ordered.narrow(0, at, min(step, ordered.shape[0] - at))
        yield piece.start + at * per, part.reshape(part.shape[0] * per, -1)


def unit_norms(
    tensor: Tensor, piece: Piece, norm_type: float, dtype: torch.dtype | None = None
) -> Tensor:
    """The norm of each unit of a tensor, of shape (units,), accumulated in a type."""
    _, inside = _dims(tensor, piece)
    if not inside:  # every element is a unit
        return tensor.abs().to(dtype or tensor.dtype).reshape(-1)
    return torch.linalg.vector_norm(tensor, norm_type, dim=inside, dtype=dtype).reshape(-1)


def unit_peaks(units: Units) -> Tensor:
    """Largest |g| of each unit, float64 of shape (units,)."""
    parts = [(piece.start, unit_norms(x, piece, math.inf).double()) for x, piece in units]
    return assembled(parts, units)


def assembled(parts: Sequence[tuple[int, Tensor]], units: Units) -> Tensor:
    """One vector of vectors that start where they are told; 0 in the gaps between them."""
    zero = torch.zeros(1, dtype=torch.float64, device=units.device)
    filled: list[Tensor] = []
    at = 0
    for start, part in sorted(parts, key=lambda item: item[0]):
        if start > at:
            filled.append(zero.expand(start - at))
        filled.append(part)
        at = start + part.numel()
    if at < units.count:
        filled.append(zero.expand(units.count - at))
    return torch.cat(filled)


def scale_units_(units: Units, coef: Tensor) -> None:
    """Multiply units in place by their coefficients, in float32 or wider, rounding once.

    Args:
        units: Which of them to write.
        coef: Float64 of shape (all units,).
    """
    single = coef.float()
    lone: list[Tensor] = []
    factors: list[Tensor] = []
    for tensor, piece in units:
        if piece.units == 1 and tensor.dtype == torch.float32:
            lone.append(tensor)
            factors.append(single.select(0, piece.start))
            continue
        own = coef if tensor.dtype == torch.float64 else single
        first, last = piece.kept
        shape = [n if first <= d < last else 1 for d, n in enumerate(tensor.shape)]
        tensor.mul_(own.narrow(0, piece.start, piece.units).view(shape))
    if lone:
        torch._foreach_mul_(lone, factors)


def _dims(tensor: Tensor, piece: Piece) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dims that tell units apart, and those within a unit."""
    first, last = piece.kept
    return tuple(range(first, last)), (*range(first), *range(last, tensor.ndim))
