"""Power sums of units at memory speed on a CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

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
    fast = scale is None and norm_type in (1.0, 2.0)
    parts: list[tuple[int, Tensor]] = []
    small: dict[tuple[int, torch.dtype], list[tuple[Tensor, Piece]]] = {}
    for tensor, piece in units:
        if scale is None and piece.units * piece.row < SMALL:
            small.setdefault((piece.row, tensor.dtype), []).append((tensor, piece))
        elif fast and tensor.dtype != torch.float64:
            views = BLOCK if tensor.element_size() < 4 else PIECE
            for start, rows in rows_of(tensor, piece, views, BLOCK):
                parts.append((start, _fast(rows.float(), norm_type)))
        else:
            for start, rows in rows_of(tensor, piece, BATCH, BATCH):
                factors = None if scale is None else scale.narrow(0, start, rows.shape[0])
                parts.append((start, _exact(rows, norm_type, factors)))
    for (row, dtype), held in small.items():
        for batch in _batches(held):
            rows = torch.cat([_flat(tensor, piece) for tensor, piece in batch]).view(-1, row)
            wide = not fast or dtype == torch.float64
            sums = _exact(rows, norm_type) if wide else _fast(rows.float(), norm_type)
            parts.extend(_runs(sums, [piece for _, piece in batch]))
    return assembled(parts, units)


def scale_clipped_(units: Units, coef: Tensor) -> None:
    """Multiply in place, leaving tensors whose coefficients are all 1 unread."""
    before = torch.cat([coef.new_zeros(1), (coef != 1.0).double().cumsum(0)])
    ends = [(piece.start, piece.start + piece.units) for piece in units.pieces]
    first, last = before[torch.tensor(ends, dtype=torch.int64).view(-1, 2)].unbind(1)
    wanted = [i for i, some in enumerate((last > first).tolist()) if some]
    if wanted:
        tensors = [units.tensors[i] for i in wanted]
        pieces = [units.pieces[i] for i in wanted]
        scale_units_(Units(tensors, pieces, units.count, units.device), coef)


def _batches(held: Sequence[tuple[Tensor, Piece]]) -> Iterator[list[tuple[Tensor, Piece]]]:
    """Small tensors with rows of one length, as many as are copied end to end at a time."""
    batch: list[tuple[Tensor, Piece]] = []
    elements = 0
    for tensor, piece in held:
        size = piece.units * piece.row
        if batch and elements + size > BATCH:
            yield batch
            batch, elements = [], 0
        batch.append((tensor, piece))
        elements += size
    yield batch


def _flat(tensor: Tensor, piece: Piece) -> Tensor:
    """All elements, unit after unit."""
    if tensor.ndim == 1:
        return tensor
    if piece.kept[0] == 0:
        return tensor.reshape(-1)
    return next(rows_of(tensor, piece, SMALL, SMALL))[1].reshape(-1)


def _runs(sums: Tensor, pieces: Sequence[Piece]) -> Iterator[tuple[int, Tensor]]:
    """Neighbours' sums in one vector each, with the index of the first unit."""
    begin = at = 0
    for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
        at += piece.units
        if after is None or piece.start + piece.units != after.start:
            yield piece.start + piece.units - (at - begin), sums[begin:at]
            begin = at


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
