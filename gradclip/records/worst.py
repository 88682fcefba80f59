"""The worst steps of a run: which parameters made them is told later."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gradclip.records.record import COLUMNS

__all__ = ["WorstOnDevice", "WorstOnHost", "WorstSteps"]

_DECAY = 0.99
_FIRST = 8
_NORM, _ODD = COLUMNS.index("grad_norm"), COLUMNS.index("nonfinite")

UnitDims = tuple[list[float], list[float]]


class WorstSteps(Protocol):
    """The norm of every parameter in the steps that stood out, and the first 8 not finite.

    A step stands out by its norm over the running mean of the norms before it, so that spikes are
    told from the large norms that most runs begin with.
    """

    def note(self, row: Tensor, norms: Callable[[], Tensor]) -> None:
        """See a step.

        Args:
            row: Float64 of shape (columns,); equal on every rank but for the batch.
            norms: Gives float64 of shape (parameters,).
        """
        ...

    def kept(self) -> list[UnitDims]:
        """Row and norms of each step that is kept, on the host."""
        ...


class WorstOnHost:
    """Where reading is free: norms are asked for only in steps that are kept, on every rank.

    Args:
        worst: How many to keep.
    """

    def __init__(self, worst: int) -> None:
        self._room = worst
        self._worst: list[tuple[float, list[float], list[float]]] = []
        self._first: list[UnitDims] = []
        self._total = self._number = 0.0

    def note(self, row: Tensor, norms: Callable[[], Tensor]) -> None:
        """See `WorstSteps.note`."""
        values = row.tolist()
        norm = values[_NORM]
        if values[_ODD]:
            if len(self._first) < _FIRST:
                self._first.append((values, norms().tolist()))
            return
        score = norm * self._number / self._total if self._total else 1.0
        self._total, self._number = self._total * _DECAY + norm, self._number * _DECAY + 1
        if len(self._worst) < self._room:
            heapq.heappush(self._worst, (score, values, norms().tolist()))
        elif score > self._worst[0][0]:
            heapq.heapreplace(self._worst, (score, values, norms().tolist()))

    def kept(self) -> list[UnitDims]:
        """See `WorstSteps.kept`."""
        return [*self._first, *((row, norms) for _, row, norms in self._worst)]


class WorstOnDevice:
    """Where reading waits: what is kept is decided and stays on the device.

    Args:
        worst: How many to keep.
        parameters: How many norms a step has.
        device: Where.
    """

    def __init__(self, worst: int, parameters: int, device: torch.device) -> None:
        kept = worst + _FIRST + 1  # the last takes what isn't kept
        self._room = worst
        self._norms = torch.zeros(kept, parameters, dtype=torch.float64, device=device)
        self._rows = self._norms.new_full((kept, len(COLUMNS)), -1.0)
        self._scores = self._norms.new_full((kept,), -math.inf)
        self._usual = self._norms.new_zeros(2)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)

    def note(self, row: Tensor, norms: Callable[[], Tensor]) -> None:
        """See `WorstSteps.note`."""
        norm, odd = row.select(0, _NORM), row.select(0, _ODD) != 0
        total, number = self._usual.unbind()
        score = torch.where(total > 0, norm * number / total, 1.0)
        later = self._usual * _DECAY + torch.stack([norm, torch.ones_like(norm)])
        self._usual = torch.where(odd, self._usual, later)
        least, place = self._scores.narrow(0, 0, self._room).min(0)
        trash = len(self._scores) - 1
        place = torch.where(score > least, place, trash)
        place = torch.where(odd, (self._room + self._nonfinite).clamp(max=trash), place)
        self._nonfinite = self._nonfinite + odd
        place = place.unsqueeze(0)
        self._scores.index_copy_(0, place, score.unsqueeze(0))
        self._rows.index_copy_(0, place, row.unsqueeze(0))
        self._norms.index_copy_(0, place, norms().unsqueeze(0))

    def kept(self) -> list[UnitDims]:
        """See `WorstSteps.kept`."""
        found = zip(self._rows[:-1].tolist(), self._norms[:-1].tolist(), strict=True)
        return [(row, norms) for row, norms in found if row[0] >= 0]
