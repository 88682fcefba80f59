"""Quantiles of everything seen so far, in constant memory and time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["BINS", "quantile", "taken_in"]

ACCURACY = 0.0049
"""Relative error of a quantile; below the 0.5 % that is promised, so that rounding fits too."""
SMALLEST, LARGEST = 1e-12, 1e12
"""Norms that have bins of their own; what is outside counts for the nearest bin."""
_STEP = math.log((1 + ACCURACY) / (1 - ACCURACY))
_FIRST = math.ceil(math.log(SMALLEST) / _STEP)
BINS = math.ceil(math.log(LARGEST) / _STEP) - _FIRST + 1
"""One float64 count each: 44 KiB for a slot."""


def taken_in(counts: Tensor, values: Tensor) -> Tensor:
    """Counts with one more value for each slot.

    Bin i holds values in (g^(i-1), g^i] with g = (1 + a) / (1 - a): bins are equally wide in the
    logarithm, so that the middle of a bin is within a share a of every value in it.

    Args:
        counts: Float64 of shape (BINS, slots).
        values: Float64 of shape (slots,); those that are 0 or not finite are left out.

    Returns:
        New counts of the same shape.

    References: Masson, Rim, Lee, "DDSketch", https://www.vldb.org/pvldb/vol12/p2195-masson.pdf
    (2019).
    """
    usable = torch.isfinite(values) & (values > 0)
    index = (torch.where(usable, values, 1.0).log() / _STEP).ceil() - _FIRST
    index = index.clamp(0, BINS - 1).long().unsqueeze(0)
    return counts.scatter_add(0, index, usable.to(counts.dtype).unsqueeze(0))


def quantile(counts: Tensor, share: float) -> Tensor:
    """The value below which a share of those taken in lies, between ranks linearly.

    Args:
        counts: Float64 of shape (BINS, slots).
        share: From 0 to 1.

    Returns:
        Float64 of shape (slots,), within `ACCURACY` of `numpy.quantile` of the same values where
        they lie between `SMALLEST` and `LARGEST`; meaningless for a slot that has none.
    """
    # Whole numbers: on CUDA torch has no deterministic sum of others, and may be asked for one.
    below = counts.long().cumsum(0).double()
    rank = share * (below.select(0, BINS - 1) - 1).clamp(min=0)
    low = _middle((below <= rank.floor()).sum(0))
    high = _middle((below <= rank.ceil()).sum(0))
    return low + (high - low) * (rank - rank.floor())


def _middle(index: Tensor) -> Tensor:
    """The value in a bin that is relatively as far from its lower end as from its upper one."""
    top = ((index + _FIRST).double() * _STEP).exp()
    return top * (1 - ACCURACY)
