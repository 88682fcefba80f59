"""Power sums at memory speed on a CPU, where reading the host is free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradclip.kernels.scaling import scale_slots_
from gradclip.types import Grads

__all__ = ["CpuKernel"]

# Elements per float32 partial norm. A row adds 64 values into each of 8 lanes, which bounds its
# rounding error below 1e-6 for any values; whole tensors drift by 1e-2 at 1e8 elements.
ROW = 512
# Elements converted or concatenated at a time: temporaries stay below 1 MiB.
BLOCK = 1 << 17
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
        small: list[tuple[int, Tensor]] = []
        for index, slot in enumerate(grads):
            for grad in slot:
                if grad.numel() < SMALL and grad.dtype != torch.float64:
                    small.append((index, grad))
                else:
                    sums[index] += _large(grad, norm_type)
        for batch in _batches(small):
            for index, partial in _small(batch, norm_type):
                sums[index] += partial
        for index, total in enumerate(sums):
            if grads[index] and not TRUSTED < total < float("inf"):
                sums[index] = _exact(grads[index], norm_type)
        return torch.tensor(sums, dtype=torch.float64)

    def scale_(self, grads: Grads, coef: Tensor) -> None:
        """Multiply in place, leaving slots with a coefficient of 1 unread."""
        wanted = (factor != 1.0 for factor in coef.tolist())
        slots = zip(grads, coef.unbind(), wanted, strict=True)
        scale_slots_((slot, factor) for slot, factor, needed in slots if slot and needed)

    def clamp_(self, grads: Sequence[Tensor], limit: float | Tensor) -> None:
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
    if flat.dtype == torch.float32:
        return _rows(flat, norm_type)
    if flat.dtype == torch.float64:
        return _exact([flat], norm_type)
    return sum(_rows(block.float(), norm_type) for block in flat.split(BLOCK))


def _rows(flat: Tensor, norm_type: float) -> float:
    """Sum of powers of a 1-D float32 tensor: a float32 norm per row, then float64."""
    whole = flat.numel() - flat.numel() % ROW
    total = 0.0
    if whole:
        rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), norm_type, dim=1)
        total += rows.double().pow_(norm_type).sum().item()
    if whole < flat.numel():
        total += torch.linalg.vector_norm(flat[whole:], norm_type).double().pow(norm_type).item()
    return total


def _batches(small: Sequence[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Cut the small tensors into runs of one dtype and at most BLOCK elements."""
    batch: list[tuple[int, Tensor]] = []
    room = BLOCK
    for item in small:
        size = item[1].numel()
        if batch and (size > room or item[1].dtype != batch[0][1].dtype):
            yield batch
            batch, room = [], BLOCK
        batch.append(item)
        room -= size
    if batch:
        yield batch


def _small(batch: Sequence[tuple[int, Tensor]], norm_type: float) -> Iterator[tuple[int, float]]:
    """Slot and power sum of the tensors of one batch, concatenated into one buffer."""
    flats = [grad if grad.ndim == 1 else _flat(grad) for _, grad in batch]
    buffer = torch.cat(flats).float()
    first, last = batch[0][0], batch[-1][0]
    if first == last:
        yield first, _rows(buffer, norm_type)
        return
    lengths = torch.tensor([flat.numel() for flat in flats])
    powers = buffer.double().abs_().pow_(norm_type)
    sums = torch.segment_reduce(powers, "sum", lengths=lengths, unsafe=True)
    yield from zip((index for index, _ in batch), sums.tolist(), strict=True)


def _exact(slot: Sequence[Tensor], norm_type: float, factor: float = 1.0) -> float:
    """Sum of |factor * g|^p in float64, a block at a time."""
    total = 0.0
    for grad in slot:
        for block in _flat(grad).split(BLOCK):
            wide = block.double() if factor == 1.0 else block.double() * factor
            total += wide.abs().pow_(norm_type).sum().item()
    return total


def _peak(slot: Sequence[Tensor]) -> Tensor:
    peaks = [torch.stack(torch.aminmax(grad)).abs_().amax().double() for grad in slot]
    return torch.stack(peaks).amax() if peaks else torch.zeros((), dtype=torch.float64)
