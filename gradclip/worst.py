"""The worst steps of a run, on the device: which parameters made them is told later."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradclip.records import COLUMNS

__all__ = ["WorstSteps"]

_DECAY = 0.99
_FIRST = 8


class WorstSteps:
    """The norm of every parameter in the steps that stood out, and the first not finite.

    A step stands out by its norm over the running mean of the norms before it, so that spikes are
    told from the large norms that most runs begin with.

    Args:
        worst: How many to keep, beside the first 8 that weren't finite.
        parameters: How many norms a step has.
        device: Where.
        waits: Reading a value on the host waits for the device.
    """

    def __init__(self, worst: int, parameters: int, device: torch.device, *, waits: bool) -> None:
        kept = worst + _FIRST + 1  # the last takes what isn't kept
        self._worst = worst
        self._waits = waits
        self._norms = torch.zeros(kept, parameters, dtype=torch.float64, device=device)
        self._rows = self._norms.new_full((kept, len(COLUMNS)), -1.0)
        self._scores = self._norms.new_full((kept,), -math.inf)
        self._usual = self._norms.new_zeros(2)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)

    def note(self, row: Tensor, norms: Tensor) -> None:
        """See a step.

        Args:
            row: Float64 of shape (columns,).
            norms: Float64 of shape (parameters,).
        """
        norm = row.select(0, COLUMNS.index("grad_norm"))
        odd = row.select(0, COLUMNS.index("nonfinite")) != 0
        total, number = self._usual.unbind()
        score = torch.where(number > 0, norm * number / total, 1.0)
        self._usual = torch.where(
            odd, self._usual, self._usual * _DECAY + torch.stack([norm, norm.new_ones(())])
        )
        least, place = self._scores.narrow(0, 0, self._worst).min(0)
        trash = len(self._scores) - 1
        first = torch.clamp(self._worst + self._nonfinite, max=trash)
        place = torch.where(odd, first, torch.where(score > least, place, trash))
        self._nonfinite = self._nonfinite + odd
        if not self._waits and int(place) == trash:
            return
        place = place.unsqueeze(0)
        self._scores.index_copy_(0, place, score.unsqueeze(0))
        self._rows.index_copy_(0, place, row.unsqueeze(0))
        self._norms.index_copy_(0, place, norms.unsqueeze(0))

    def kept(self) -> list[tuple[list[float], list[float]]]:
        """Row and norms of each step that is kept, read on the host, in order."""
        found = zip(self._rows[:-1].tolist(), self._norms[:-1].tolist(), strict=True)
        return sorted((row, norms) for row, norms in found if row[0] >= 0)
