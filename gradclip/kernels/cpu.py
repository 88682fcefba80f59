"""Power sums at memory speed on a CPU, where reading the host is free."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, compress

import torch
from torch import Tensor

from gradclip.kernels.bounds import BATCH, BLOCK, PIECE, ROW, SMALL, TRUSTED
from gradclip.kernels.cpu_units import scale_clipped_, unit_power_sums
from gradclip.kernels.pieces import flat_pieces
from gradclip.kernels.scaling import scale_slots_
from gradclip.kernels.units import unit_peaks
from gradclip.types import Grads, Units

__all__ = ["CpuKernel"]

# Norms of rows held back before they are added up, which costs dispatch too.
ROWS = 1 << 12


class CpuKernel:
    """Float32 rows combined in float64; float64 throughout where float32 could not hold squares."""

    waits = False

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
            return unit_power_sums(grads, norm_type, scale)
        if scale is not None or norm_type not in (1.0, 2.0):
            factors = [1.0] * len(grads) if scale is None else scale.tolist()
            exact = [_exact(g, norm_type, f) for g, f in zip(grads, factors, strict=True)]
            return torch.tensor(exact, dtype=torch.float64)
        sums = [0.0] * len(grads)
        flat = list(chain.from_iterable(grads))
        owners = [index for index, slot in enumerate(grads) for _ in slot]
        sizes = list(map(Tensor.numel, flat))
        if max(sizes, default=0) >= SMALL:
            small = [size < SMALL for size in sizes]
            # One for all of them: pages new to the process cost as much as a read.
            halves = [grad.numel() for grad in flat if grad.element_size() < 4]
            buffer = torch.empty(min(max(halves, default=0), BLOCK))
            for index, grad, is_small in zip(owners, flat, small, strict=True):
                if not is_small:
                    sums[index] += _large(grad, norm_type, buffer)
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
        return torch.tensor(sums, dtype=torch.float64)

    def scale_(self, grads: Grads | Units, coef: Tensor) -> None:
        """Multiply in place, leaving slots with a coefficient of 1 unread."""
        if isinstance(grads, Units):
            scale_clipped_(grads, coef)
            return
        wanted = [c != 1.0 for c in coef.tolist()]
        if any(wanted):
            scale_slots_([slot if w else [] for slot, w in zip(grads, wanted, strict=True)], coef)

    def clamp_(self, grads: list[Tensor], limit: float | Tensor) -> None:
        """Clamp in place; see `gradclip.types.Kernel`."""
        for grad in grads:
            grad.clamp_(-limit, limit)  # type: ignore[arg-type]  # either kind


def _large(grad: Tensor, norm_type: float, buffer: Tensor) -> float:
    """Sum of |g|^p from norms of rows, added up in float64; half precision uses the buffer."""
    if grad.dtype == torch.float64:
        return _exact([grad], norm_type)
    total = 0.0
    norms: list[Tensor] = []
    held = 0
    half = grad.element_size() < 4
    for block in _copies([grad], buffer) if half else flat_pieces(grad, PIECE):
        rows, rest = divmod(block.numel(), ROW)
        if rows:
            part = block[: rows * ROW].view(rows, ROW)
            norms.append(torch.linalg.vector_norm(part, norm_type, dim=1))
        if rest:
            part = block[rows * ROW :].view(1, rest)
            norms.append(torch.linalg.vector_norm(part, norm_type, dim=1))
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
        for piece in flat_pieces(grad, buffer.numel()):
            yield buffer[: piece.numel()].copy_(piece)


def _add_small(
    sums: list[float], grads: list[Tensor], owners: list[int], sizes: list[int], norm_type: float
) -> None:
    """Concatenate small gradients and add the power sum of each to its slot."""
    buffer = torch.cat([grad if grad.ndim == 1 else grad.reshape(-1) for grad in grads])
    if owners[0] == owners[-1]:
        single = buffer.float() if buffer.element_size() < 4 else buffer
        sums[owners[0]] += _large(single, norm_type, single)
        return
    powers = buffer.double().abs_().pow_(norm_type)
    parts = torch.segment_reduce(powers, "sum", lengths=torch.tensor(sizes), unsafe=True)
    for owner, part in zip(owners, parts.tolist(), strict=True):
        sums[owner] += part


def _exact(slot: Sequence[Tensor], norm_type: float, factor: float = 1.0) -> float:
    """Sum of |factor * g|^p in float64, a piece at a time."""
    total = 0.0
    most = max(map(Tensor.numel, slot), default=0)
    for wide in _copies(slot, torch.empty(min(most, BATCH), dtype=torch.float64)):
        total += wide.mul_(factor).abs_().pow_(norm_type).sum().item()
    return total


def _peak(slot: Sequence[Tensor]) -> Tensor:
    pieces = (piece for grad in slot for piece in flat_pieces(grad, PIECE))
    ends = list(chain.from_iterable(map(torch.aminmax, pieces)))
    return torch.stack(ends).abs_().amax().double() if ends else torch.zeros(()).double()
