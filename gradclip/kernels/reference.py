"""The formulas, plainly, in float64: what the other kernels are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradclip.types import Grads, Units

__all__ = ["ReferenceKernel"]


class ReferenceKernel:
    """Sums in float64, one tensor at a time, on any device that has float64.

    Uses memory for float64 copies of a tensor and reads the host freely: for tests and checks.
    """

    reads_block = False

    def peaks(self, grads: Grads | Units) -> Tensor:
        """Largest |g| per slot; see `gradclip.types.Kernel`."""
        if isinstance(grads, Units):
            return _by_unit(grads, lambda rows, _: rows.abs().amax(1))
        return torch.stack([_peak(slot) for slot in grads])

    def power_sums(
        self, grads: Grads | Units, norm_type: float, scale: Tensor | None = None
    ) -> Tensor:
        """Sum of |scale * g|^p per slot; see `gradclip.types.Kernel`."""
        if isinstance(grads, Units):
            ones = scale
            if ones is None:
                ones = torch.ones(grads.count, dtype=torch.float64, device="cpu")
            return _by_unit(
                grads,
                lambda rows, at: (rows * ones[at].unsqueeze(1)).abs().pow(norm_type).sum(1),
            )
        factors = [1.0] * len(grads) if scale is None else scale.tolist()
        return torch.stack(
            [
                sum(
                    ((grad.double() * factor).abs().pow(norm_type).sum() for grad in slot),
                    torch.zeros((), dtype=torch.float64, device="cpu"),
                )
                for slot, factor in zip(grads, factors, strict=True)
            ]
        )

    def scale_(self, grads: Grads | Units, coef: Tensor) -> None:
        """Multiply in place; see `gradclip.types.Kernel`."""
        if isinstance(grads, Units):
            for tensor, span in grads:
                factors = coef[span.start : span.start + span.units]
                shape = tensor.shape[slice(*span.unit_dims)]
                within = [1] * (tensor.ndim - span.unit_dims[1])
                tensor.copy_(tensor.double() * factors.view((*shape, *within)))
            return
        for slot, factor in zip(grads, coef.tolist(), strict=True):
            for grad in slot:
                grad.copy_(grad.double() * factor)

    def clamp_(self, grads: list[Tensor], limit: float | Tensor) -> None:
        """Clamp in place; see `gradclip.types.Kernel`."""
        for grad in grads:
            grad.copy_(grad.double().clamp(-float(limit), float(limit)))


def _by_unit(units: Units, measure: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """What `measure` gives for the float64 rows of each span; 0 for units that aren't here."""
    found = torch.zeros(units.count, dtype=torch.float64, device="cpu")
    for tensor, span in units:
        inside = [d for d in range(tensor.ndim) if not span.unit_dims[0] <= d < span.unit_dims[1]]
        rows = tensor.double().permute((*range(*span.unit_dims), *inside)).reshape(span.units, -1)
        at = slice(span.start, span.start + span.units)
        found[at] = measure(rows, at)
    return found


def _peak(slot: Sequence[Tensor]) -> Tensor:
    peaks = [grad.double().abs().amax() for grad in slot]
    none = torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack(peaks or [none]).amax()
