"""What the kernels for CPUs and accelerators share: units as rows, and writes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from gradclip.types import Grads, Units, UnitSpan

__all__ = [
    "FastKernel",
    "assembled",
    "holding",
    "rows_of",
    "scale_slots_",
    "scale_units_",
    "unit_norms",
    "unit_peaks",
]

_dtype = attrgetter("dtype")


class FastKernel:
    """What is the same on a CPU and on an accelerator."""

    def clamp_(self, grads: list[Tensor], limit: float | Tensor) -> None:
        """Clamp in place; see `gradclip.types.Kernel`."""
        for grad in grads:
            grad.clamp_(-limit, limit)  # type: ignore[arg-type]  # either kind


def scale_slots_(slots: Grads, coef: Tensor) -> None:
    """Multiply the gradients of each slot in place by its coefficient, float64 of shape (slots,).

    `torch._foreach_mul_` would round the coefficient to the gradients' dtype (a bfloat16
    coefficient is off by up to 0.4 %), so a slot in single or half precision takes the loss
    scaler's kernel: it multiplies in float32 and launches once for all tensors (0.43 ms against
    0.77 for 2000 small tensors on a CPU). Slots of one tensor each, where a launch per slot
    would dominate, share one `_foreach_mul_` where their dtype loses nothing.
    """
    lone: list[Tensor] = []
    factors: list[Tensor] = []
    found_inf = torch.zeros((), dtype=torch.float32, device=coef.device)
    for slot, exact, rounded in zip(slots, coef.unbind(), coef.float().unbind(), strict=True):
        if not slot:
            continue
        if len(slot) == 1 and slot[0].dtype == torch.float32:
            lone.append(slot[0])
            factors.append(rounded)
            continue
        single, double = slot, list[Tensor]()
        if torch.float64 in map(_dtype, slot):
            single = [grad for grad in slot if grad.dtype != torch.float64]
            double = [grad for grad in slot if grad.dtype == torch.float64]
        if single:
            torch._amp_foreach_non_finite_check_and_unscale_(single, found_inf, rounded)
        if double:
            torch._foreach_mul_(double, exact)
    if lone:
        torch._foreach_mul_(lone, factors)


def rows_of(
    tensor: Tensor, span: UnitSpan, views: int, copies: int
) -> Iterator[tuple[int, Tensor]]:
    """The units of a tensor as rows, a bounded number of elements at a time.

    Args:
        tensor: The elements of at least one unit.
        span: Which units it holds.
        views: Elements at a time where units lie one after the other in memory.
        copies: Elements at a time where they don't, and rows have to be copied.

    Yields:
        The index of the first unit, and rows of shape (units, elements of one).
    """
    outside, inside = _dims(tensor, span)
    ordered = tensor.permute((*outside, *inside)) if outside and outside[0] else tensor
    limit = views if ordered.is_contiguous() else copies
    if not outside:
        yield span.start, ordered.reshape(1, -1)
        return
    step = max(1, limit * ordered.shape[0] // ordered.numel())
    per = span.units // ordered.shape[0]
    for at in range(0, ordered.shape[0], step):
        chunk = ordered.narrow(0, at, min(step, ordered.shape[0] - at))
        yield span.start + at * per, chunk.reshape(chunk.shape[0] * per, -1)


def unit_norms(
    tensor: Tensor, span: UnitSpan, norm_type: float, dtype: torch.dtype | None = None
) -> Tensor:
    """The norm of each unit of a tensor, of shape (units,), accumulated in a dtype."""
    _, inside = _dims(tensor, span)
    if not inside:  # every element is a unit
        return tensor.abs().to(dtype or tensor.dtype).reshape(-1)
    return torch.linalg.vector_norm(tensor, norm_type, dim=inside, dtype=dtype).reshape(-1)


def unit_peaks(units: Units) -> Tensor:
    """Largest |g| of each unit, float64 of shape (units,)."""
    runs = [(span.start, unit_norms(x, span, math.inf).double()) for x, span in units]
    return assembled(runs, units)


def assembled(runs: Sequence[tuple[int, Tensor]], units: Units) -> Tensor:
    """One value for each unit, float64 of shape (units,), from runs of values.

    Args:
        runs: The index of a run's first unit, and a value for each of its units.
        units: How many there are in all. Those that only other ranks hold get 0.
    """
    zero = torch.zeros(1, dtype=torch.float64, device=units.device)
    filled: list[Tensor] = []
    at = 0
    for start, values in sorted(runs, key=lambda run: run[0]):
        if start > at:
            filled.append(zero.expand(start - at))
        filled.append(values)
        at = start + values.numel()
    if at < units.count:
        filled.append(zero.expand(units.count - at))
    return torch.cat(filled)


def holding(units: Units, wanted: Tensor) -> Units:
    """The tensors that hold a wanted unit.

    Args:
        units: Of which tensors.
        wanted: Bool of shape (all units,), on the CPU: one host read tells it of all tensors.
    """
    # `before[i]` counts the wanted units below i.
    before = torch.cat([wanted.new_zeros(1, dtype=torch.int64), wanted.cumsum(0)])
    ends = [(span.start, span.start + span.units) for span in units.spans]
    bounds = torch.tensor(ends, dtype=torch.int64, device="cpu").view(-1, 2)
    first, last = before[bounds].unbind(1)
    kept = [i for i, holds in enumerate((last > first).tolist()) if holds]
    tensors = [units.tensors[i] for i in kept]
    return Units(tensors, [units.spans[i] for i in kept], units.count, units.device)


def scale_units_(units: Units, coef: Tensor) -> None:
    """Multiply units in place by their coefficients, in float32 or wider, rounding once.

    Args:
        units: Which of them to write.
        coef: Float64 of shape (all units,).
    """
    single = coef.float()
    lone: list[Tensor] = []
    factors: list[Tensor] = []
    for tensor, span in units:
        if span.units == 1 and tensor.dtype == torch.float32:
            lone.append(tensor)
            factors.append(single.select(0, span.start))
            continue
        factor = coef if tensor.dtype == torch.float64 else single
        first, last = span.unit_dims
        shape = [n if first <= d < last else 1 for d, n in enumerate(tensor.shape)]
        tensor.mul_(factor.narrow(0, span.start, span.units).view(shape))
    if lone:
        torch._foreach_mul_(lone, factors)


def _dims(tensor: Tensor, span: UnitSpan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dims that distinguish units, and those within a unit."""
    first, last = span.unit_dims
    return tuple(range(first, last)), (*range(first), *range(last, tensor.ndim))
