"""Measure and reduce: from local gradients to norms that are equal on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gradclip.types import Grads, Kernel, Layout

__all__ = ["is_wide", "measure"]


def is_wide(norm_type: float, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether |g|^p of a gradient of these dtypes can leave the range of float64.

    Float32 gradients fit up to p = 6 (1.4e-45^6 and 3.4e38^6 are both doubles).
    """
    return math.isfinite(norm_type) and (norm_type > 6 or torch.float64 in dtypes)


def measure(
    grads: Grads, norm_types: Mapping[float, bool], layout: Layout, kernel: Kernel
) -> dict[float, Tensor]:
    """The p-norm of each slot, for each p, over all ranks.

    Sums of powers are added over ranks in one message and rooted once. A maximum (p = inf) is
    one more, as is the scale that a wide p needs to stay in range.

    Args:
        grads: The gradients this rank counts, one list per slot.
        norm_types: For each p, whether it is wide (see `is_wide`); the same on every rank.
        layout: How measures combine over ranks.
        kernel: What measures this rank's gradients.

    Returns:
        For each p a float64 tensor of shape (slots,) on the layout's first device; NaN or inf
        where a gradient element is.
    """
    home = layout.devices[0]
    norms: dict[float, Tensor] = {}
    exponent = torch.zeros((), dtype=torch.float64, device=home)
    if math.inf in norm_types or any(norm_types.values()):
        norms[math.inf] = layout.max(kernel.peaks(grads).to(home))
        exponent = _exponent(norms[math.inf])
    finite = [p for p in norm_types if p != math.inf]
    if finite:
        scales = {p: torch.exp2(-exponent) if norm_types[p] else None for p in finite}
        sums = torch.stack([kernel.power_sums(grads, p, scales[p]).to(home) for p in finite])
        for p, total in zip(finite, layout.sum(sums).unbind(), strict=True):
            root = total.sqrt() if p == 2.0 else total.pow(1.0 / p)
            norms[p] = root * torch.exp2(exponent) if norm_types[p] else root
    return {p: norms[p] for p in norm_types}


def _exponent(peaks: Tensor) -> Tensor:
    """Powers of two that bring each peak to about 1; 0 where there is nothing to scale."""
    usable = torch.isfinite(peaks) & (peaks > 0)
    return torch.where(usable, peaks, 1.0).log2().floor().clamp(-1000, 1000)
