"""p-norms: of unions of slots from those of the slots, and whether their powers stay in range."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["combine", "combine_runs", "is_wide"]


def is_wide(norm_type: float, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether |g|^p of a gradient of these dtypes can leave the range of float64.

    Float32 gradients fit up to p = 6 (1.4e-45^6 and 3.4e38^6 are both doubles).
    """
    double = not {torch.float64, torch.complex128}.isdisjoint(dtypes)
    return math.isfinite(norm_type) and (norm_type > 6 or double)


def combine(norms: Tensor, norm_type: float, members: Tensor | None = None) -> Tensor:
    """The p-norm of unions of slots from the p-norms of the slots, without overflow.

    Args:
        norms: Shape (n,), float64.
        norm_type: p, or inf.
        members: Int64 of shape (m, k), the slots of each union, filled up with n; None for one of
            all. A table of m times n would grow with the square of a model's parameters.

    Returns:
        Shape (m,), or 0-d for one union. Sums run over a dim, in one order on every device, so
        that ranks agree bitwise.
    """
    united = norms if members is None else torch.cat([norms, norms.new_zeros(1)]).take(members)
    if united.shape[-1] == 1:
        return united.squeeze(-1)
    peak = united.amax(-1)
    if norm_type == math.inf:
        return peak
    scale = torch.where((peak > 0) & torch.isfinite(peak), peak, 1.0)
    return scale * (united / scale.unsqueeze(-1)).pow(norm_type).sum(-1).pow(1.0 / norm_type)


def combine_runs(norms: Tensor, norm_type: float, lengths: Tensor) -> Tensor:
    """The p-norm of runs of units, one after the other, from the p-norms of the units.

    Args:
        norms: Shape (units,), float64.
        norm_type: p, or inf.
        lengths: Int64 of shape (runs,), at least 1 each; their sum is the number of units.

    Returns:
        Shape (runs,). Each run is added up in one order on every device, so that ranks agree
        bitwise.
    """
    peak = torch.segment_reduce(norms, "max", lengths=lengths, unsafe=True)
    if norm_type == math.inf:
        return peak
    scale = torch.where((peak > 0) & torch.isfinite(peak), peak, 1.0)
    each = torch.repeat_interleave(scale, lengths, output_size=norms.numel())
    powers = (norms / each).pow(norm_type)
    total = torch.segment_reduce(powers, "sum", lengths=lengths, unsafe=True)
    return scale * total.pow(1.0 / norm_type)
