"""The last norms of each slot, their level, and runs of norms on one side of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["level", "median", "median_of", "pushed", "run"]


def pushed(recent: Tensor, norms: Tensor) -> Tensor:
    """The last norms with this one behind them; a norm of 0 is none.

    Args:
        recent: Shape (history, slots), the oldest first.
        norms: Shape (slots,).
    """
    moved = torch.cat([recent.narrow(0, 1, recent.shape[0] - 1), norms.unsqueeze(0)])
    return torch.where(norms > 0, moved, recent)


def run(length: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """Norms in a row above (counted up from 0) or below (counted down); else 0.

    Args:
        length: Shape (slots,), the run so far.
        above: Shape (slots,), bool. Whether this norm is above.
        below: Whether it is below; never both.
    """
    up = torch.where(above, length.clamp(min=0.0) + 1, 0.0)
    return torch.where(below, length.clamp(max=0.0) - 1, up)


def level(recent: Tensor, count: int, kind: str) -> tuple[Tensor, Tensor]:
    """Centre and variance of the last `count` rows of `recent`, each of shape (slots,)."""
    last = recent.narrow(0, recent.shape[0] - count, count)
    if kind == "mean":
        return last.mean(0), last.var(0, correction=0)
    center = median(last)
    return center, (1.4826 * median((last - center).abs())).square()


def median(rows: Tensor) -> Tensor:
    """The middle of each column, the mean of both middles for an even count."""
    ordered = rows.sort(0).values
    count = rows.shape[0]
    return ordered.narrow(0, (count - 1) // 2, 2 - count % 2).mean(0)


def median_of(values: Tensor, chosen: Tensor) -> Tensor:
    """The median of the chosen ones of some values, 0-d; inf if none is chosen.

    `torch.nanmedian` reads the host on an accelerator.
    """
    ordered = torch.where(chosen, values, math.inf).sort().values
    count = chosen.sum()
    middles = torch.stack([(count - 1).clamp(min=0) // 2, count // 2])
    return ordered.take(middles).mean()
