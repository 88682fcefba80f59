"""Gradients on several devices: each device's kernel measures its own, results are on the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gradclip.devices import decided_on, moved
from gradclip.types import Grads, Kernel, Units

__all__ = ["SplitKernel"]


class SplitKernel:
    """Hands each gradient to the kernel of the device it is on.

    Numbers for it, as coefficients, are in float64 there too, or on the CPU where that can't be.
    """

    def __init__(self, kernels: Mapping[torch.device, Kernel]) -> None:
        self._kernels = kernels
        self._near = {device: decided_on([device])[0] for device in kernels}
        self._device = next(iter(kernels))
        self.reads_block = any(kernel.reads_block for kernel in kernels.values())

    def peaks(self, grads: Grads | Units) -> Tensor:
        """Largest |g| per slot; see `gradclip.types.Kernel`."""
        measured = [kernel.peaks(here).to(self._device) for _, kernel, here in self._split(grads)]
        return torch.stack(measured).amax(0)

    def power_sums(
        self, grads: Grads | Units, norm_type: float, scale: Tensor | None = None
    ) -> Tensor:
        """Sum of |scale * g|^p per slot; see `gradclip.types.Kernel`."""
        measured = [
            kernel.power_sums(
                here, norm_type, None if scale is None else scale.to(self._near[device])
            )
            for device, kernel, here in self._split(grads)
        ]
        return torch.stack([values.to(self._device) for values in measured]).sum(0)

    def scale_(self, grads: Grads | Units, coef: Tensor) -> None:
        """Multiply in place; see `gradclip.types.Kernel`."""
        for device, kernel, here in self._split(grads):
            kernel.scale_(here, coef.to(self._near[device]))

    def clamp_(self, grads: list[Tensor], limit: float | Tensor) -> None:
        """Clamp in place; see `gradclip.types.Kernel`."""
        for device, kernel in self._kernels.items():
            here = [grad for grad in grads if grad.device == device]
            kernel.clamp_(here, moved(limit, device) if isinstance(limit, Tensor) else limit)

    def _split(self, grads: Grads | Units) -> Iterator[tuple[torch.device, Kernel, Grads | Units]]:
        for device, kernel in self._kernels.items():
            if isinstance(grads, Units):
                here = [(x, span) for x, span in grads if x.device == device]
                tensors, spans = [x for x, _ in here], [span for _, span in here]
                yield device, kernel, Units(tensors, spans, grads.count, self._near[device])
            else:
                yield device, kernel, [[g for g in slot if g.device == device] for slot in grads]
