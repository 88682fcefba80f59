"""Power sums of units at memory speed on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gradclip.kernels.bounds import BATCH, BLOCK, PIECE, ROW, SMALL, TRUSTED
from gradclip.kernels.units import assembled, rows_of, scale_units_
from gradclip.types import Piece, Units

__all__ = ["scale_clipped_", "unit_power_sums"]


def unit_power_sums(units: Units, norm_type: float, scale: Tensor | None = None) -> Tensor:
    """Sum of |scale * g|^p of each unit, float64 of shape (units,).

    Float32 rows are measured in parts of `ROW` elements that are added up in float64, everything
    else in float64 throughout, as gradients that aren't cut into units are.
    """
    exact = scale is not None or norm_type not in (1.0, 2.0)
    parts: list[tuple[int, Tensor]] = []
    small: list[Piece] = []
    for piece in units.pieces:
        wide = exact or piece.tensor.dtype == torch.float64
        if piece.tensor.numel() < SMALL and scale is None:
            small.append(piece)
        elif wide:
            for start, rows in rows_of(piece, BATCH, BATCH):
                factors = None if scale is None else scale.narrow(0, start, rows.shape[0])
                parts.append((start, _exact(rows, norm_type, factors)))
        else:
            half = piece.tensor.element_size() < 4
            for start, rows in rows_of(piece, BLOCK if half else PIECE, BLOCK):
                parts.append((start, _fast(rows.float(), norm_type)))
    parts.extend(_batched(small, norm_type))
    return assembled(parts, units)


def scale_clipped_(units: Units, coef: Tensor) -> None:
    """Multiply in place, leaving pieces whose coefficients are all 1 unread."""
    before = torch.cat([coef.new_zeros(1), (coef != 1.0).double().cumsum(0)])
    ends = torch.tensor([(p.start, p.start + p.count) for p in units.pieces], dtype=torch.int64)
    ends = ends.view(-1, 2)
    some = (before[ends[:, 1]] > before[ends[:, 0]]).tolist()
    wanted = [piece for piece, wants in zip(units.pieces, some, strict=True) if wants]
    if wanted:
        scale_units_(Units(wanted, units.count, units.device), coef)


def _batched(pieces: Sequence[Piece], norm_type: float) -> list[tuple[int, Tensor]]:
    """Small pieces end to end, so that all of them cost one call."""
    parts: list[tuple[int, Tensor]] = []
    batch: list[Piece] = []
    held = 0
    for piece in [*pieces, None]:
        if batch and (piece is None or held + piece.tensor.numel() > BATCH):
            parts.extend(_together(batch, norm_type))
            batch, held = [], 0
        if piece is not None:
            batch.append(piece)
            held += piece.tensor.numel()
    return parts


def _together(pieces: Sequence[Piece], norm_type: float) -> list[tuple[int, Tensor]]:
    flat = torch.cat([next(rows_of(p, BATCH, BATCH))[1].reshape(-1) for p in pieces])
    counts = [piece.count for piece in pieces]
    lengths = torch.tensor([p.tensor.numel() // p.count for p in pieces])
    if max(counts) > 1:
        lengths = torch.repeat_interleave(lengths, torch.tensor(counts))
    powers = flat.double().abs_().pow_(norm_type)
    sums = torch.segment_reduce(powers, "sum", lengths=lengths, unsafe=True)
    if all(a.start + a.count == b.start for a, b in pairwise(pieces)):
        return [(pieces[0].start, sums)]
    return [(p.start, part) for p, part in zip(pieces, sums.split(counts), strict=True)]


def _fast(rows: Tensor, norm_type: float) -> Tensor:
    """Sums of |g|^p of float32 rows; those that float32 squares can't hold in float64."""
    whole = rows.shape[1] // ROW * ROW
    sums = rows.new_zeros(rows.shape[0], dtype=torch.float64)
    if whole:
        parts = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, ROW)), norm_type, dim=2)
        sums += parts.double().pow_(norm_type).sum(1)
    if whole < rows.shape[1]:
        sums += torch.linalg.vector_norm(rows[:, whole:], norm_type, dim=1).double().pow_(norm_type)
    doubted = ~((sums > TRUSTED) & (sums < math.inf))
    if bool(doubted.any()):
        doubted &= torch.linalg.vector_norm(rows, math.inf, dim=1) > 0
        places = doubted.nonzero().squeeze(1)
        for some in places.split(max(1, BATCH // rows.shape[1])):
            sums[some] = _exact(rows[some], norm_type)
    return sums


def _exact(rows: Tensor, norm_type: float, factors: Tensor | None = None) -> Tensor:
    wide = rows.to(torch.float64, copy=True)
    if factors is not None:
        wide.mul_(factors.unsqueeze(1))
    return wide.abs_().pow_(norm_type).sum(1)
