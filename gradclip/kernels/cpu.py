"""Power sums at memory speed on a CPU, where reading the host is free."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain, compress

import torch
from torch import Tensor

from gradclip.kernels.scaling import scale_slots_
from gradclip.types import Grads

__all__ = ["CpuKernel"]

# Elements per float32 partial norm. A row adds 64 values into each of 8 lanes, which bounds its
# rounding error below 1e-6 for any values; whole tensors drift by 1e-2 at 1e8 elements.
ROW = 512
# Half precision elements converted at a time: 2 MiB of float32; smaller blocks cost dispatch.
BLOCK = 1 << 19
# Elements concatenated, or taken in float64, at a time: temporaries stay at 1 MiB.
BATCH = 1 << 17
# Tensors with fewer elements are concatenated first: their cost is dispatch, not arithmetic.
SMALL = 1 << 12
# Float32 squares lose digits below this sum and overflow above; both are then done in float64.
TRUSTED = 1e-18


class CpuKernel:
    """Float32 rows combined in float64; float64 throughout where float32 could not hold squares."""

    def peaks(self, grads: Grads) -> Tensor:
        """Largest |g| per slot; see `gradclip.types.Kernel`."""
        return torch.stack([_peak(slot) for slot in grads])

    def power_sums(self, grads: Grads, norm_type: float, scale: Tensor | None = None) -> Tensor:
        """Sum of |scale * g|^p per slot; see `gradclip.types.Kernel`."""
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
            for index, grad, is_small in zip(owners, flat, small, strict=True):
                if not is_small:
                    sums[index] += _large(grad, norm_type)
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

    def scale_(self, grads: Grads, coef: Tensor) -> None:
        """Multiply in place, leaving slots with a coefficient of 1 unread."""
        wanted = (factor != 1.0 for factor in coef.tolist())
        slots = zip(grads, coef.unbind(), wanted, strict=True)
        scale_slots_((slot, factor) for slot, factor, needed in slots if slot and needed)

    def clamp_(self, grads: list[Tensor], limit: float | Tensor) -> None:
        """Clamp in place; see `gradclip.types.Kernel`."""
        for grad in grads:
            grad.clamp_(-limit, limit)  # type: ignore[arg-type]  # either kind


def _flat(grad: Tensor) -> Tensor:
    """All elements as one dimension, in memory order, so that dense layouts need no copy."""
    if not grad.is_contiguous():
        grad = grad.permute(sorted(range(grad.ndim), key=grad.stride, reverse=True))
    return grad.reshape(-1)


def _large(grad: Tensor, norm_type: float) -> float:
    flat = _flat(grad)
    if flat.dtype == torch.float64:
        return _exact([flat], norm_type)
    whole = flat.numel() - flat.numel() % ROW
    norms = []
    if whole:
        # Half precision is converted a block at a time, float32 needs no copy.
        blocks = flat[:whole].split(whole if flat.dtype == torch.float32 else BLOCK)
        norms = [_norm(block.float().view(-1, ROW), norm_type) for block in blocks]
    if whole < flat.numel():
        norms.append(_norm(flat[whole:].float().view(1, -1), norm_type))
    return torch.cat(norms).double().pow_(norm_type).sum().item() if norms else 0.0


def _norm(rows: Tensor, norm_type: float) -> Tensor:
    return torch.linalg.vector_norm(rows, norm_type, dim=1)


def _add_small(
    sums: list[float], grads: list[Tensor], owners: list[int], sizes: list[int], norm_type: float
) -> None:
    """Concatenate small gradients and add the power sum of each to its slot."""
    buffer = torch.cat([grad if grad.ndim == 1 else _flat(grad) for grad in grads])
    if owners[0] == owners[-1]:
        sums[owners[0]] += _large(buffer, norm_type)
        return
    powers = buffer.double().abs_().pow_(norm_type)
    parts = torch.segment_reduce(powers, "sum", lengths=torch.tensor(sizes), unsafe=True)
    for owner, part in zip(owners, parts.tolist(), strict=True):
        sums[owner] += part


def _exact(slot: Sequence[Tensor], norm_type: float, factor: float = 1.0) -> float:
    """Sum of |factor * g|^p in float64, a block at a time."""
    total = 0.0
    for grad in slot:
        for block in _flat(grad).split(BATCH // 2):
            wide = block.double() if factor == 1.0 else block.double() * factor
            total += wide.abs().pow_(norm_type).sum().item()
    return total


def _peak(slot: Sequence[Tensor]) -> Tensor:
    peaks = [torch.stack(torch.aminmax(grad)).abs_().amax().double() for grad in slot]
    return torch.stack(peaks).amax() if peaks else torch.zeros((), dtype=torch.float64)
