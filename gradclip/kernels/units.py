"""Units: rows of weights, each with a norm and a coefficient of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradclip.types import Piece, Units

__all__ = ["assembled", "reduced", "rows_of", "scale_units_", "unit_norms", "unit_peaks"]


def reduced(piece: Piece) -> tuple[int, ...]:
    """The dims that lie within a unit."""
    first, last = piece.kept
    return tuple(d for d in range(piece.tensor.ndim) if not first <= d < last)


def rows_of(piece: Piece, views: int, copies: int) -> Iterator[tuple[int, Tensor]]:
    """The units of a piece as rows, some at a time.

    Args:
        piece: At least one unit.
        views: How many elements at a time where units lie one after the other in memory.
        copies: The same where they have to be copied for it.

    Yields:
        The index of the first unit, and rows of shape (units, elements of one).
    """
    inside = reduced(piece)
    outside = [d for d in range(piece.tensor.ndim) if d not in inside]
    ordered = piece.tensor.permute((*outside, *inside))
    limit = views if ordered.is_contiguous() else copies
    if not outside:
        yield piece.start, ordered.reshape(1, -1)
        return
    step = max(1, limit * ordered.shape[0] // ordered.numel())
    per = piece.count // ordered.shape[0]
    for at in range(0, ordered.shape[0], step):
        part = ordered[at : at + step]
        yield piece.start + at * per, part.reshape(part.shape[0] * per, -1)


def unit_norms(piece: Piece, norm_type: float, dtype: torch.dtype | None = None) -> Tensor:
    """The norm of each unit of a piece, of shape (units,), accumulated in a type."""
    inside = reduced(piece)
    if not inside:  # every element is a unit
        return piece.tensor.abs().to(dtype or piece.tensor.dtype).reshape(-1)
    norms = torch.linalg.vector_norm(piece.tensor, norm_type, dim=inside, dtype=dtype)
    return norms.reshape(-1)


def unit_peaks(units: Units) -> Tensor:
    """Largest |g| of each unit, float64 of shape (units,)."""
    parts = [(p.start, unit_norms(p, math.inf).double()) for p in units.pieces]
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
    own = [(coef if p.tensor.dtype == torch.float64 else single) for p in units.pieces]
    factors = [c.narrow(0, p.start, p.count) for c, p in zip(own, units.pieces, strict=True)]
    lone: list[Tensor] = []
    by: list[Tensor] = []
    for piece, factor in zip(units.pieces, factors, strict=True):
        if piece.count == 1 and piece.tensor.dtype == torch.float32:
            lone.append(piece.tensor)
            by.append(factor.squeeze(0))
            continue
        first, last = piece.kept
        shape = [n if first <= d < last else 1 for d, n in enumerate(piece.tensor.shape)]
        piece.tensor.mul_(factor.view(shape))
    if lone:
        torch._foreach_mul_(lone, by)
