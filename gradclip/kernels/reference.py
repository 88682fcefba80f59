"""The formulas, plainly, in float64: what the other kernels are held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradclip.types import Grads

__all__ = ["ReferenceKernel"]


class ReferenceKernel:
    """Sums in float64, one tensor at a time, on any device that has float64.

    Uses memory for float64 copies of a tensor and reads the host freely: for tests and checks.
    """

    def peaks(self, grads: Grads) -> Tensor:
        """Largest |g| per slot; see `gradclip.types.Kernel`."""
        return torch.stack([_peak(slot) for slot in grads])

    def power_sums(self, grads: Grads, norm_type: float, scale: Tensor | None = None) -> Tensor:
        """Sum of |scale * g|^p per slot; see `gradclip.types.Kernel`."""
        factors = [1.0] * len(grads) if scale is None else scale.tolist()
        return torch.stack(
            [
                sum(
                    ((grad.double() * factor).abs().pow(norm_type).sum() for grad in slot),
                    torch.zeros((), dtype=torch.float64),
                )
                for slot, factor in zip(grads, factors, strict=True)
            ]
        )

    def scale_(self, grads: Grads, coef: Tensor) -> None:
        """Multiply in place; see `gradclip.types.Kernel`."""
        for slot, factor in zip(grads, coef.tolist(), strict=True):
            for grad in slot:
                grad.copy_(grad.double() * factor)

    def clamp_(self, grads: list[Tensor], limit: float | Tensor) -> None:
        """Clamp in place; see `gradclip.types.Kernel`."""
        for grad in grads:
            grad.copy_(grad.double().clamp(-float(limit), float(limit)))


def _peak(slot: Sequence[Tensor]) -> Tensor:
    peaks = [grad.double().abs().amax() for grad in slot]
    return torch.stack(peaks).amax() if peaks else torch.zeros((), dtype=torch.float64)
