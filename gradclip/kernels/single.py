"""For devices without float64: float32 there, float64 on the host, and one copy between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gradclip.kernels.common import FastKernel, holding, rows_of, scale_units_
from gradclip.tensors import aligned_chunks, flat_chunks
from gradclip.types import Grads, Units

__all__ = ["SingleKernel"]

# Elements taken at a time: 16 MiB for each temporary.
CHUNK_SIZE = 1 << 22
# How many values are added up at once, and how often, before sums go to the host. In any order of
# addition that is at most 12 roundings up for each element, which bounds the error of a sum of
# 256 below 12 * 2**-24, or 0.8e-6, whatever the device does.
FEW, ROUNDS = 4, 4
# Devices may take what is below the smallest normal float32 for 0. Below this sum that, and above
# float32 an overflow, is told from the true sum by measuring once more, scaled.
TRUSTED = 1e-18


class SingleKernel(FastKernel):
    """Adds up few elements at a time on the device, and their sums in float64 on the host.

    A call makes one copy to the host; two more where squares leave the range of float32.
    """

    reads_block = False

    def peaks(self, grads: Grads | Units) -> Tensor:
        """Largest |g| per slot; see `gradclip.types.Kernel`."""
        runs = [(start, _largest(rows)) for start, rows in _rows(grads)]
        return _on_host(runs, _count(grads), torch.maximum)

    def power_sums(
        self, grads: Grads | Units, norm_type: float, scale: Tensor | None = None
    ) -> Tensor:
        """Sum of |scale * g|^p per slot; see `gradclip.types.Kernel`."""
        if scale is not None:
            return _sums(grads, norm_type, scale.cpu())
        sums = _sums(grads, norm_type, None)
        doubted = ~((sums > TRUSTED) & (sums < math.inf)) & ~sums.isnan()
        if not bool(doubted.any()):
            return sums
        again = _only(grads, doubted)
        peaks = self.peaks(again)
        doubted &= torch.isfinite(peaks) & (peaks > 0)
        if not bool(doubted.any()):
            return sums
        exponents = torch.where(doubted, peaks, 1.0).log2().floor()
        scaled = _sums(_only(again, doubted), norm_type, torch.exp2(-exponents))
        return torch.where(doubted, scaled * torch.exp2(exponents * norm_type), sums)

    def scale_(self, grads: Grads | Units, coef: Tensor) -> None:
        """Multiply in place, leaving what has a coefficient of 1 unread."""
        if isinstance(grads, Units):
            if (clipped := holding(grads, coef != 1.0)).tensors:
                scale_units_(clipped, coef.float().to(clipped.tensors[0].device))
            return
        single: list[Tensor] = []
        factors: list[float] = []
        for slot, factor in zip(grads, coef.tolist(), strict=True):
            for grad in slot if factor != 1 else ():
                if grad.element_size() >= 4:
                    single.append(grad)
                    factors.append(factor)
                    continue
                for (chunk,) in aligned_chunks([grad], CHUNK_SIZE):
                    chunk.copy_(chunk.float().mul_(factor))  # else the factor is rounded, too
        if single:
            torch._foreach_mul_(single, factors)


def _rows(grads: Grads | Units) -> Iterator[tuple[int, Tensor]]:
    """Rows, one for each slot or unit that follows the first, whose index comes first.

    A slot, or a unit, may be cut into several.
    """
    if isinstance(grads, Units):
        for tensor, span in grads:
            if span.units == 1:
                for chunk in flat_chunks(tensor, CHUNK_SIZE):
                    yield span.start, _single(chunk).view(1, -1)
            else:
                for start, rows in rows_of(tensor, span, CHUNK_SIZE, CHUNK_SIZE):
                    yield start, _single(rows)
        return
    for index, slot in enumerate(grads):
        for chunk in _joined(slot):
            yield index, chunk.view(1, -1)


def _joined(slot: Sequence[Tensor]) -> Iterator[Tensor]:
    """All elements in one-dimensional tensors; small tensors together, since a launch is dear."""
    batch: list[Tensor] = []
    held = 0
    for grad in slot:
        for chunk in flat_chunks(grad, CHUNK_SIZE):
            if held + chunk.numel() > CHUNK_SIZE:
                yield torch.cat(batch)
                batch, held = [], 0
            batch.append(_single(chunk))
            held += chunk.numel()
    if batch:
        yield batch[0] if len(batch) == 1 else torch.cat(batch)


def _single(part: Tensor) -> Tensor:
    """In single precision or better."""
    return part if part.element_size() >= 4 else part.float()


def _sums(grads: Grads | Units, norm_type: float, scale: Tensor | None) -> Tensor:
    """Sum of |scale * g|^p of each slot, float64 on the CPU; the scale is a power of two there."""
    runs: list[tuple[int, Tensor]] = []
    for start, rows in _rows(grads):
        if scale is not None:
            # In two halves, since the largest power of two is beyond float32.
            whole = scale.narrow(0, start, rows.shape[0]).unsqueeze(1)
            half = whole.log2().div(2).floor().exp2()
            for factor in (half, whole / half):
                rows = rows * factor.to(rows.dtype).to(rows.device)
        runs.append((start, _partial_sums(_powers(rows, norm_type))))
    return _on_host(runs, _count(grads), torch.add)


def _powers(rows: Tensor, norm_type: float) -> Tensor:
    if norm_type == 2:
        return rows * rows
    return rows.abs() if norm_type == 1 else rows.abs().pow(norm_type)


def _partial_sums(powers: Tensor) -> Tensor:
    """Sums of at most `FEW**ROUNDS` neighbours in each row, of shape (rows, sums)."""
    for _ in range(ROUNDS):
        sums, rest = divmod(powers.shape[1], FEW)
        if not sums:
            break
        whole, over = powers.split([sums * FEW, rest], 1)
        added = whole.reshape(-1, FEW, sums).sum(1)
        powers = torch.cat([added, over], 1) if rest else added
    return powers


def _largest(rows: Tensor) -> Tensor:
    """The largest magnitude of each row, of shape (rows, 1); NaN where one is, on any device."""
    largest = rows.abs().amax(1, keepdim=True)
    return torch.where(rows.isnan().any(1, keepdim=True), math.nan, largest)


def _on_host(
    runs: Sequence[tuple[int, Tensor]], count: int, join: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """What rows say of each slot or unit, float64 of shape (count,) on the CPU, by one copy.

    Args:
        runs: The index of the first row's slot or unit, and values of shape (rows, values).
        count: Slots or units in all; 0 for those without a row.
        join: `torch.add` or `torch.maximum`.
    """
    found = torch.zeros(count, dtype=torch.float64, device="cpu")
    if not runs:
        return found
    shapes = [values.shape for _, values in runs]
    copied = torch.cat([values.reshape(-1) for _, values in runs]).cpu().double()
    parts = copied.split([shape.numel() for shape in shapes])
    for (start, _), shape, part in zip(runs, shapes, parts, strict=True):
        values = part.view(shape)
        here = found.narrow(0, start, shape[0])
        here.copy_(join(here, values.sum(1) if join is torch.add else values.amax(1)))
    return found


def _count(grads: Grads | Units) -> int:
    return grads.count if isinstance(grads, Units) else len(grads)


def _only(grads: Grads | Units, wanted: Tensor) -> Grads | Units:
    """Those that hold something of wanted slots or units; of others nothing, if that is cheap."""
    if isinstance(grads, Units):
        return holding(grads, wanted)
    return [slot if w else [] for slot, w in zip(grads, wanted.tolist(), strict=True)]
