"""Multi-tensor kernels for devices where a launch is dear and a host read is dearer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradclip.kernels.scaling import scale_slots_
from gradclip.types import Grads

__all__ = ["AcceleratorKernel"]


class AcceleratorKernel:
    """Never reads the host and never branches on a value.

    Norms are accumulated in float64 by asking the multi-tensor norm for a float64 result, which
    neither overflows nor underflows for any float32 or half precision gradient.
    """

    def peaks(self, grads: Grads) -> Tensor:
        """Largest |g| per slot; see `gradclip.types.Kernel`."""
        return _stack([_norms(slot, float("inf")).amax() if slot else None for slot in grads])

    def power_sums(self, grads: Grads, norm_type: float, scale: Tensor | None = None) -> Tensor:
        """Sum of |scale * g|^p per slot; see `gradclip.types.Kernel`."""
        if scale is not None:
            scaled = zip(grads, scale.unbind(), strict=True)
            return _stack([_scaled(slot, norm_type, s) if slot else None for slot, s in scaled])
        if all(len(slot) == 1 for slot in grads):
            return _norms([slot[0] for slot in grads], norm_type).pow(norm_type)
        return _stack(
            [_norms(slot, norm_type).pow(norm_type).sum() if slot else None for slot in grads]
        )

    def scale_(self, grads: Grads, coef: Tensor) -> None:
        """Multiply in place; see `gradclip.types.Kernel`. A coefficient of 1 changes no bit."""
        scale_slots_(pair for pair in zip(grads, coef.unbind(), strict=True) if pair[0])

    def clamp_(self, grads: list[Tensor], limit: float | Tensor) -> None:
        """Clamp in place; see `gradclip.types.Kernel`."""
        for grad in grads:
            grad.clamp_(-limit, limit)  # type: ignore[arg-type]  # either kind


def _norms(tensors: list[Tensor], norm_type: float) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, norm_type, dtype=torch.float64))


def _scaled(slot: list[Tensor], norm_type: float, scale: Tensor) -> Tensor:
    """One tensor at a time, since a scaled float64 copy is needed."""
    norms = [_norms([g.double() * scale.to(g.device)], norm_type) for g in slot]
    return torch.cat(norms).pow(norm_type).sum()


def _stack(measures: Sequence[Tensor | None]) -> Tensor:
    device = next((m.device for m in measures if m is not None), torch.device("cpu"))
    empty = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([empty if m is None else m for m in measures])
