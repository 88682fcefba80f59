"""Multi-tensor kernels for devices where a launch is dear and a host read is dearer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from gradclip.kernels.common import (
    FastKernel,
    assembled,
    rows_of,
    scale_slots_,
    scale_units_,
    unit_norms,
    unit_peaks,
)
from gradclip.tensors import flat_chunks
from gradclip.types import Grads, Units

__all__ = ["AcceleratorKernel"]

# The orders that torch's multi-tensor norm has kernels for; others it measures one by one, each
# from a float64 copy.
FUSED = (1.0, 2.0, math.inf)
# Its scratch memory: a float64 for each chunk of the largest tensor, times the tensors of a call,
# and a block of 512 bytes for each result. These bounds keep both at half a MiB.
CHUNK, CHUNKS, RESULTS = 1 << 16, 1 << 16, 1 << 10
# Elements taken in float64 at a time: 1 MiB.
CHUNK_SIZE = 1 << 17


class AcceleratorKernel(FastKernel):
    """Never reads the host and never branches on a value.

    Norms are accumulated in float64 by asking the multi-tensor norm for a float64 result, which
    neither overflows nor underflows for any float32 or half precision gradient.
    """

    reads_block = True

    def peaks(self, grads: Grads | Units) -> Tensor:
        """Largest |g| per slot; see `gradclip.types.Kernel`."""
        if isinstance(grads, Units):
            return unit_peaks(grads)
        if all(len(slot) == 1 for slot in grads):
            return _norms([slot[0] for slot in grads], math.inf)
        found = _zeros(grads)
        for slot, peak in zip(grads, found.unbind(), strict=True):
            if slot:
                peak += _norms(slot, math.inf).amax()
        return found

    def power_sums(
        self, grads: Grads | Units, norm_type: float, scale: Tensor | None = None
    ) -> Tensor:
        """Sum of |scale * g|^p per slot; see `gradclip.types.Kernel`."""
        if isinstance(grads, Units):
            return _unit_power_sums(grads, norm_type, scale)
        fused = scale is None and norm_type in FUSED
        if fused and all(len(slot) == 1 for slot in grads):
            return _norms([slot[0] for slot in grads], norm_type).pow(norm_type)
        if fused and len(grads) == 1 and grads[0]:
            norms = _norms(grads[0], norm_type)
            total = norms.dot(norms) if norm_type == 2.0 else norms.pow(norm_type).sum()
            return total.unsqueeze(0)
        sums = _zeros(grads)
        scales = [None] * len(grads) if scale is None else scale.unbind()
        for slot, total, factor in zip(grads, sums.unbind(), scales, strict=True):
            if slot and fused:
                total += _norms(slot, norm_type).pow(norm_type).sum()
                continue
            for grad in slot:
                for chunk in flat_chunks(grad, CHUNK_SIZE):
                    total += _wide(chunk, norm_type, factor)
        return sums

    def scale_(self, grads: Grads | Units, coef: Tensor) -> None:
        """Multiply in place; see `gradclip.types.Kernel`. A coefficient of 1 changes no bit."""
        if isinstance(grads, Units):
            scale_units_(grads, coef)
            return
        scale_slots_(grads, coef)


def _unit_power_sums(units: Units, norm_type: float, scale: Tensor | None) -> Tensor:
    """One launch for each tensor of several units, and few for all tensors of one."""
    runs: list[tuple[int, Tensor]] = []
    fused = scale is None and norm_type in FUSED
    lone = [(x, span.start) for x, span in units if fused and span.units == 1]
    if lone:
        sums = _norms([tensor for tensor, _ in lone], norm_type).pow(norm_type)
        runs.extend(zip((start for _, start in lone), sums.split(1), strict=True))
    for tensor, span in units:
        if fused and span.units > 1:
            norms = unit_norms(tensor, span, norm_type, torch.float64)
            runs.append((span.start, norms.pow(norm_type)))
        elif not fused:
            for start, rows in rows_of(tensor, span, CHUNK_SIZE, CHUNK_SIZE):
                wide = rows.to(torch.float64, copy=True)
                if scale is not None:
                    wide.mul_(scale.narrow(0, start, rows.shape[0]).unsqueeze(1))
                norms = torch.linalg.vector_norm(wide, norm_type, dim=1)
                runs.append((start, norms.pow(norm_type)))
    return assembled(runs, units)


def _norms(tensors: list[Tensor], norm_type: float) -> Tensor:
    """The norm of each tensor, float64, by as few calls as memory allows."""
    batches = list(_batches(tensors))
    # A maximum is exact in the gradients' own type.
    kind = None if norm_type == math.inf else torch.float64
    by_batch = [
        torch.stack(torch._foreach_norm([tensors[i] for i in batch], norm_type, kind)).double()
        for batch in batches
    ]
    norms = by_batch[0] if len(by_batch) == 1 else torch.cat(by_batch)
    order = list(chain.from_iterable(batches))
    if order == sorted(order):
        return norms
    # Indexing by a list would copy the list to the device, and wait for it.
    found = dict(zip(order, norms.unbind(), strict=True))
    return torch.stack([found[index] for index in range(len(tensors))])


def _batches(tensors: list[Tensor]) -> Iterator[list[int]]:
    """Indices of tensors of one dtype, as many as the multi-tensor norm may take at once."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_dtype.setdefault(tensor.dtype, []).append(index)
    for indices in by_dtype.values():
        batch: list[int] = []
        widest = 1
        for index in indices:
            wider = max(widest, -(-tensors[index].numel() // CHUNK))
            if batch and (len(batch) == RESULTS or (len(batch) + 1) * wider > CHUNKS):
                yield batch
                batch, wider = [], -(-tensors[index].numel() // CHUNK)
            batch.append(index)
            widest = wider
        yield batch


def _wide(chunk: Tensor, norm_type: float, factor: Tensor | None) -> Tensor:
    """The power sum of a (scaled) float64 copy, which is freed on return."""
    wide = chunk.to(torch.float64, copy=True)
    if factor is not None:
        wide.mul_(factor)
    return torch.linalg.vector_norm(wide, norm_type).pow(norm_type)


def _zeros(grads: Grads) -> Tensor:
    """One float64 per slot: results written here one by one share a block of memory."""
    device = next((grad.device for slot in grads for grad in slot), torch.device("cpu"))
    return torch.zeros(len(grads), dtype=torch.float64, device=device)
