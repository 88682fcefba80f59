"""Power sums at memory speed on a CPU, where reading the host is free."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, compress

import torch
from torch import Tensor

from gradclip.kernels.common import (
    FastKernel,
    assembled,
    holding,
    rows_of,
    scale_slots_,
    scale_units_,
    unit_peaks,
)
from gradclip.private import end_to_end
from gradclip.tensors import flat_chunks
from gradclip.types import Grads, Units, UnitSpan

__all__ = ["CpuKernel"]

# Temporaries of a step stay below 2 MiB whatever the size of a tensor: the sizes here see to it.

# Elements per float32 partial norm. A row adds 64 values into each of 8 lanes, which bounds its
# rounding error below 1e-6 for any values; whole tensors drift by 1e-2 at 1e8 elements.
ROW = 512
# Float32 elements read at a time: 0.4 MiB of row norms.
CHUNK_SIZE = 1 << 24
# Half precision elements converted at a time, into 1.9 MiB; smaller blocks cost dispatch.
BLOCK = 30 << 14
# Elements concatenated, or taken in float64, at a time: temporaries stay at 1 MiB.
BATCH = 1 << 17
# Tensors with fewer elements are concatenated first: their cost is dispatch, not arithmetic.
SMALL = 1 << 14
# Float32 squares lose digits below this sum and overflow above; both are then done in float64.
TRUSTED = 1e-18
# Up to here one call in float64 costs less than rows do.
WHOLE = 1 << 16
# Norms of rows held back before they are added up, which costs dispatch too.
ROWS = 1 << 12


class CpuKernel(FastKernel):
    """Float32 rows combined in float64; float64 throughout where float32 could not hold squares."""

    reads_block = False

    def peaks(self, grads: Grads | Units) -> Tensor:
        """Largest |g| per slot; see `gradclip.types.Kernel`."""
        if isinstance(grads, Units):
            return unit_peaks(grads)
        return torch.stack([_peak(slot) for slot in grads])

    def power_sums(
        self, grads: Grads | Units, norm_type: float, scale: Tensor | None = None
    ) -> Tensor:
        """Sum of |scale * g|^p per slot; see `gradclip.types.Kernel`."""
        if isinstance(grads, Units):
            return _unit_power_sums(grads, norm_type, scale)
        if scale is not None or norm_type not in (1.0, 2.0):
            factors = [1.0] * len(grads) if scale is None else scale.tolist()
            exact = [_exact(g, norm_type, f) for g, f in zip(grads, factors, strict=True)]
            return torch.tensor(exact, dtype=torch.float64, device="cpu")
        if len(grads) == 1 and sum(map(Tensor.numel, grads[0])) <= WHOLE:
            return _whole(grads[0], norm_type).reshape(1)
        sums = [0.0] * len(grads)
        flat = list(chain.from_iterable(grads))
        owners = [index for index, slot in enumerate(grads) for _ in slot]
        sizes = list(map(Tensor.numel, flat))
        if max(sizes, default=0) >= SMALL:
            small = [size < SMALL for size in sizes]
            # One for all of them: pages new to the process cost as much as a read.
            halves = [grad.numel() for grad in flat if grad.element_size() < 4]
            most = min(max(halves, default=0), BLOCK)
            buffer = torch.empty(most, dtype=torch.float32, device="cpu")
            for index, slot in enumerate(grads):
                large = [grad for grad in slot if grad.numel() >= SMALL]
                if large:
                    sums[index] += _large(large, norm_type, buffer)
            del buffer
            flat, owners = list(compress(flat, small)), list(compress(owners, small))
            sizes = list(compress(sizes, small))
        ends = list(accumulate(sizes))
        start = 0
        while start < len(flat):
            stop = bisect_right(ends, ends[start] - sizes[start] + BATCH)
            batch = slice(start, stop)
            _add_small(sums, flat[batch], owners[batch], sizes[batch], norm_type)
            start = stop
        for index, total in enumerate(sums):
            if grads[index] and not TRUSTED < total < float("inf"):
                sums[index] = _exact(grads[index], norm_type)
        return torch.tensor(sums, dtype=torch.float64, device="cpu")

    def scale_(self, grads: Grads | Units, coef: Tensor) -> None:
        """Multiply in place, leaving slots with a coefficient of 1 unread."""
        if isinstance(grads, Units):
            scale_units_(holding(grads, coef != 1.0), coef)
            return
        wanted = [c != 1.0 for c in coef.tolist()]
        if any(wanted):
            scale_slots_([slot if w else [] for slot, w in zip(grads, wanted, strict=True)], coef)


def _large(grads: Sequence[Tensor], norm_type: float, buffer: Tensor) -> float:
    """Sum of |g|^p from norms of rows, added up in float64; half precision uses the buffer."""
    double = [grad for grad in grads if grad.dtype == torch.float64]
    blocks = chain.from_iterable(
        _copies([grad], buffer) if grad.element_size() < 4 else flat_chunks(grad, CHUNK_SIZE)
        for grad in grads
        if grad.dtype != torch.float64
    )
    return _by_rows(blocks, norm_type) + (_exact(double, norm_type) if double else 0.0)


def _whole(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """Sum of |g|^p, p 1 or 2, of few elements: 0-d float64."""
    if not grads:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    wide = end_to_end(grads).double()
    return wide.dot(wide) if norm_type == 2.0 else wide.abs().sum()


def _by_rows(blocks: Iterable[Tensor], norm_type: float) -> float:
    """Sum of |g|^p over one-dimensional float32 tensors."""
    total = 0.0
    norms: list[Tensor] = []
    held = 0
    for block in blocks:
        rows, rest = divmod(block.numel(), ROW)
        if rows:
            whole = (block[: rows * ROW] if rest else block).view(rows, ROW)
            norms.append(torch.linalg.vector_norm(whole, norm_type, dim=1))
        if rest:
            tail = block[rows * ROW :].view(1, rest)
            norms.append(torch.linalg.vector_norm(tail, norm_type, dim=1))
        held += rows
        if held >= ROWS:
            total += _sum_of_powers(norms, norm_type)
            norms, held = [], 0
    return total + _sum_of_powers(norms, norm_type)


def _sum_of_powers(norms: list[Tensor], norm_type: float) -> float:
    if not norms:
        return 0.0
    whole = norms[0] if len(norms) == 1 else torch.cat(norms)
    return whole.double().pow_(norm_type).sum().item()


def _copies(grads: Sequence[Tensor], buffer: Tensor) -> Iterator[Tensor]:
    """All elements in the buffer's type, as many at a time as it holds, free to be overwritten."""
    for grad in grads:
        for chunk in flat_chunks(grad, buffer.numel()):
            yield buffer[: chunk.numel()].copy_(chunk)


def _add_small(
    sums: list[float], grads: list[Tensor], owners: list[int], sizes: list[int], norm_type: float
) -> None:
    """Concatenate small gradients and add the power sum of each to its slot."""
    if owners[0] == owners[-1] and sum(sizes) <= WHOLE:
        sums[owners[0]] += _whole(grads, norm_type).item()
        return
    buffer = end_to_end(grads)  # two tensors or more from here on, so a copy
    if owners[0] == owners[-1]:
        double = buffer.dtype == torch.float64
        whole = _exact([buffer], norm_type) if double else _by_rows([buffer.float()], norm_type)
        sums[owners[0]] += whole
        return
    powers = buffer.double().abs_().pow_(norm_type)
    lengths = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    totals = torch.segment_reduce(powers, "sum", lengths=lengths, unsafe=True)
    for owner, total in zip(owners, totals.tolist(), strict=True):
        sums[owner] += total


def _exact(slot: Sequence[Tensor], norm_type: float, factor: float = 1.0) -> float:
    """Sum of |factor * g|^p in float64, a chunk at a time."""
    total = 0.0
    most = min(max(map(Tensor.numel, slot), default=0), BATCH)
    buffer = torch.empty(most, dtype=torch.float64, device="cpu")
    for wide in _copies(slot, buffer):
        total += wide.mul_(factor).abs_().pow_(norm_type).sum().item()
    return total


def _peak(slot: Sequence[Tensor]) -> Tensor:
    chunks = (chunk for grad in slot for chunk in flat_chunks(grad, CHUNK_SIZE))
    ends = list(chain.from_iterable(map(torch.aminmax, chunks)))
    if not ends:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack(ends).abs_().amax().double()


def _unit_power_sums(units: Units, norm_type: float, scale: Tensor | None = None) -> Tensor:
    """Sum of |scale * g|^p of each unit, float64 of shape (units,).

    In float32, `ROW` elements of a unit at a time, and their sums added up in float64; in float64
    throughout where float32 wouldn't do: the same rules as for slots of whole tensors.
    """
    fast = scale is None and norm_type in (1.0, 2.0)
    runs: list[tuple[int, Tensor]] = []
    small: dict[tuple[int, torch.dtype], list[tuple[Tensor, UnitSpan]]] = {}
    for tensor, span in units:
        if scale is None and span.units * span.row < SMALL:
            small.setdefault((span.row, tensor.dtype), []).append((tensor, span))
        elif fast and tensor.dtype != torch.float64:
            views = BLOCK if tensor.element_size() < 4 else CHUNK_SIZE
            for start, rows in rows_of(tensor, span, views, BLOCK):
                runs.append((start, _fast_rows(rows.float(), norm_type)))
        else:
            for start, rows in rows_of(tensor, span, BATCH, BATCH):
                factors = None if scale is None else scale.narrow(0, start, rows.shape[0])
                runs.append((start, _exact_rows(rows, norm_type, factors)))
    for (row, dtype), held in small.items():
        for batch in _batches(held):
            rows = torch.cat([_flat(tensor, span) for tensor, span in batch]).view(-1, row)
            wide = not fast or dtype == torch.float64
            sums = _exact_rows(rows, norm_type) if wide else _fast_rows(rows.float(), norm_type)
            runs.extend(_runs(sums, [span for _, span in batch]))
    return assembled(runs, units)


def _batches(held: Sequence[tuple[Tensor, UnitSpan]]) -> Iterator[list[tuple[Tensor, UnitSpan]]]:
    """Small tensors with rows of one length, as many as are copied end to end at a time."""
    batch: list[tuple[Tensor, UnitSpan]] = []
    elements = 0
    for tensor, span in held:
        size = span.units * span.row
        if batch and elements + size > BATCH:
            yield batch
            batch, elements = [], 0
        batch.append((tensor, span))
        elements += size
    yield batch


def _flat(tensor: Tensor, span: UnitSpan) -> Tensor:
    """All elements, unit after unit."""
    if tensor.ndim == 1:
        return tensor
    if span.unit_dims[0] == 0:
        return tensor.reshape(-1)
    return next(rows_of(tensor, span, SMALL, SMALL))[1].reshape(-1)


def _runs(sums: Tensor, spans: Sequence[UnitSpan]) -> Iterator[tuple[int, Tensor]]:
    """Neighbours' sums in one vector each, with the index of the first unit."""
    begin = at = 0
    for span, after in zip(spans, [*spans[1:], None], strict=True):
        at += span.units
        if after is None or span.start + span.units != after.start:
            yield span.start + span.units - (at - begin), sums[begin:at]
            begin = at


def _fast_rows(rows: Tensor, norm_type: float) -> Tensor:
    """Sums of |g|^p of float32 rows; those that float32 squares can't hold in float64."""
    whole = rows.shape[1] // ROW * ROW
    sums = rows.new_zeros(rows.shape[0], dtype=torch.float64)
    if whole:
        norms = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, ROW)), norm_type, dim=2)
        sums += norms.double().pow_(norm_type).sum(1)
    if whole < rows.shape[1]:
        sums += torch.linalg.vector_norm(rows[:, whole:], norm_type, dim=1).double().pow_(norm_type)
    doubted = ~((sums > TRUSTED) & (sums < math.inf))
    if bool(doubted.any()):
        doubted &= torch.linalg.vector_norm(rows, math.inf, dim=1) > 0
        indices = doubted.nonzero().squeeze(1)
        for few in indices.split(max(1, BATCH // rows.shape[1])):
            sums[few] = _exact_rows(rows[few], norm_type)
    return sums


def _exact_rows(rows: Tensor, norm_type: float, factors: Tensor | None = None) -> Tensor:
    wide = rows.to(torch.float64, copy=True)
    if factors is not None:
        wide.mul_(factors.unsqueeze(1))
    return wide.abs_().pow_(norm_type).sum(1)
