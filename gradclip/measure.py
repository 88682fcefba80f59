"""Measure and reduce: from local gradients to norms that are equal on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gradclip.types import Grads, Kernel, Layout, Measurable, Units

__all__ = ["Source", "is_wide", "measure"]

Source = Grads | Units | Measurable
"""What can be measured."""


def is_wide(norm_type: float, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether |g|^p of a gradient of these dtypes can leave the range of float64.

    Float32 gradients fit up to p = 6 (1.4e-45^6 and 3.4e38^6 are both doubles).
    """
    double = not {torch.float64, torch.complex128}.isdisjoint(dtypes)
    return math.isfinite(norm_type) and (norm_type > 6 or double)


def measure(
    sources: Sequence[tuple[Source, Mapping[float, bool]]], layout: Layout, kernel: Kernel
) -> list[dict[float, Tensor]]:
    """The p-norm of each slot, for each p, over all ranks.

    Sums of powers are added over ranks in one message and rooted once. A maximum (p = inf) is
    one more, as is the scale that a wide p needs to stay in range.

    Args:
        sources: What this rank counts, one list per slot or cut into units, and for each p
            whether it is wide (see `is_wide`); the same on every rank. The gradients, the
            parameters where their norms are asked for, and what element policies make of both.
        layout: How measures combine over ranks.
        kernel: What measures this rank's tensors.

    Returns:
        For each source and p a float64 tensor of shape (slots,) on the layout's first device; NaN
        or inf where an element is.
    """
    home = layout.devices[0]
    norms: list[dict[float, Tensor]] = [{} for _ in sources]
    ranged = [i for i, (_, p) in enumerate(sources) if math.inf in p or any(p.values())]
    if ranged:
        peaks = torch.stack([_peaks(sources[i][0], kernel).to(home) for i in ranged])
        for i, peak in zip(ranged, layout.max(peaks.view(-1)).view_as(peaks), strict=True):
            norms[i][math.inf] = peak
    exponents = {i: _exponent(norms[i][math.inf]) for i in ranged}
    summed = [(i, p) for i, (_, types) in enumerate(sources) for p in types if p != math.inf]
    parts = [
        _power_sums(
            sources[i][0], kernel, p, torch.exp2(-exponents[i]) if sources[i][1][p] else None
        )
        for i, p in summed
    ]
    if parts:
        sums = layout.sum(torch.stack([part.to(home) for part in parts]))
        for (i, p), total in zip(summed, sums.unbind(), strict=True):
            root = total.sqrt() if p == 2.0 else total.pow(1.0 / p)
            norms[i][p] = root * torch.exp2(exponents[i]) if sources[i][1][p] else root
    return [{p: found[p] for p in types} for (_, types), found in zip(sources, norms, strict=True)]


def _peaks(source: Source, kernel: Kernel) -> Tensor:
    return kernel.peaks(source) if isinstance(source, Sequence | Units) else source.peaks(kernel)


def _power_sums(source: Source, kernel: Kernel, norm_type: float, scale: Tensor | None) -> Tensor:
    if isinstance(source, Sequence | Units):
        return kernel.power_sums(source, norm_type, scale)
    return source.power_sums(kernel, norm_type, scale)


def _exponent(peaks: Tensor) -> Tensor:
    """Powers of two that bring each peak to about 1; 0 where there is nothing to scale."""
    usable = torch.isfinite(peaks) & (peaks > 0)
    return torch.where(usable, peaks, 1.0).log2().floor().clamp(-1000, 1000)
