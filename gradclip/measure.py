"""Measure and reduce: from local gradients to norms that are equal on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from gradclip.types import Grads, Kernel, Kernels, Layout

__all__ = ["is_wide", "measure"]


def is_wide(norm_type: float, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether |g|^p of a gradient of these dtypes can leave the range of float64.

    Float32 gradients fit up to p = 6 (1.4e-45^6 and 3.4e38^6 are both doubles).
    """
    return math.isfinite(norm_type) and (norm_type > 6 or torch.float64 in dtypes)


def measure(
    grads: Grads,
    norm_types: Mapping[float, bool],
    layout: Layout,
    kernels: Kernels,
) -> dict[float, Tensor]:
    """The p-norm of each slot, for each p, over all ranks.

    Sums of powers are added over ranks in one message and rooted once. A maximum (p = inf) is
    one more, as is the scale that a wide p needs to stay in range.

    Args:
        grads: The gradients this rank counts, one sequence per slot.
        norm_types: For each p, whether it is wide (see `is_wide`); the same on every rank.
        layout: How measures combine over ranks.
        kernels: Gives the kernel for a device.

    Returns:
        For each p a float64 tensor of shape (slots,) on the layout's device; NaN or inf where a
        gradient element is.
    """
    norms: dict[float, Tensor] = {}
    exponent = torch.zeros((), dtype=torch.float64, device=layout.device)
    if math.inf in norm_types or any(norm_types.values()):
        local = _on_each_device(grads, layout.device, kernels, torch.maximum, _peaks)
        norms[math.inf] = layout.max(local)
        exponent = _exponent(norms[math.inf])
    finite = [p for p in norm_types if p != math.inf]
    if finite:
        sums = [
            _on_each_device(
                grads,
                layout.device,
                kernels,
                torch.add,
                partial(_power_sums, p=p, scale=torch.exp2(-exponent) if norm_types[p] else None),
            )
            for p in finite
        ]
        reduced = layout.sum(torch.cat(sums)).view(len(finite), -1)
        for p, total in zip(finite, reduced.unbind(), strict=True):
            root = total.sqrt() if p == 2.0 else total.pow(1.0 / p)
            norms[p] = root * torch.exp2(exponent) if norm_types[p] else root
    return {p: norms[p] for p in norm_types}


def _peaks(kernel: Kernel, grads: Grads) -> Tensor:
    return kernel.peaks(grads)


def _power_sums(kernel: Kernel, grads: Grads, p: float, scale: Tensor | None) -> Tensor:
    return kernel.power_sums(grads, p, scale)


def _on_each_device(
    grads: Grads,
    device: torch.device,
    kernels: Kernels,
    combine: Callable[[Tensor, Tensor], Tensor],
    run: Callable[[Kernel, Grads], Tensor],
) -> Tensor:
    """Run a measure where the gradients are and combine the results on one device."""
    devices = {grad.device for slot in grads for grad in slot} or {device}
    total = torch.zeros(len(grads), dtype=torch.float64, device=device)
    for place in sorted(devices, key=str):
        here = grads
        if len(devices) > 1:
            here = [[grad for grad in slot if grad.device == place] for slot in grads]
        total = combine(total, run(kernels(place), here).to(device))
    return total


def _exponent(peaks: Tensor) -> Tensor:
    """Powers of two that bring each peak to about 1; 0 where there is nothing to scale."""
    usable = torch.isfinite(peaks) & (peaks > 0)
    return torch.where(usable, peaks, 1.0).log2().floor().clamp(-1000, 1000)
