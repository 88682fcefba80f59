"""The worst steps of a run, with the norm of every parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradclip.records.record import COLUMNS

__all__ = ["WorstSteps"]

_DECAY = 0.99
_FIRST = 8
_NORM, _NONFINITE = COLUMNS.index("grad_norm"), COLUMNS.index("nonfinite")
_HAS_GRADIENT = COLUMNS.index("has_gradient")


class WorstSteps:
    """The norm of every parameter in the steps that stood out, and the first 8 not finite.

    A step stands out by its norm over the running mean of the norms before it, so that the
    large norms that most runs begin with aren't taken for spikes. All of it is decided on the
    device.

    Args:
        worst: How many to keep of those that stood out.
        names: Of the parameters.
        device: Where.
        reads_block: Reading a value on the host waits for the device. Where it doesn't, the norms
            are asked for only in steps that are kept, on every rank alike.
    """

    def __init__(
        self, worst: int, names: Sequence[str], device: torch.device, *, reads_block: bool
    ) -> None:
        rows = worst + _FIRST + 1  # the last one takes what isn't kept
        self._worst = worst
        self._reads_block = reads_block
        self._names = names
        self._earlier: dict[float, dict[str, float]] = {}
        self._norms = torch.zeros(rows, len(names), dtype=torch.float64, device=device)
        self._rows = self._norms.new_full((rows, len(COLUMNS)), -1.0)
        self._scores = self._norms.new_full((rows,), -math.inf)
        self._usual = self._norms.new_zeros(2)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)

    def follow(self, names: Sequence[str], device: torch.device) -> None:
        """Keep the norms of these parameters, from the next step on; each step has its own."""
        self._earlier = {row[0]: norms for row, norms in self.kept()}
        self._names = names
        self._rows, self._scores = self._rows.to(device), self._scores.to(device)
        self._usual, self._nonfinite = self._usual.to(device), self._nonfinite.to(device)
        self._norms = self._rows.new_zeros(len(self._rows), len(names))

    def note(self, row: Tensor, norms: Callable[[], Tensor]) -> None:
        """See a step.

        Args:
            row: Float64 of shape (columns,); equal on every rank but for the batch.
            norms: Gives float64 of shape (parameters,).
        """
        norm, nonfinite = row.select(0, _NORM), row.select(0, _NONFINITE)
        has_norm, nonfinite = row.select(0, _HAS_GRADIENT) > nonfinite, nonfinite != 0
        total, number = self._usual.unbind()
        score = torch.where(total > 0, norm * number / total, 1.0)
        later = self._usual * _DECAY + torch.stack([norm, torch.ones_like(norm)])
        self._usual = torch.where(has_norm, later, self._usual)
        least, index = self._scores.narrow(0, 0, self._worst).min(0)
        unused = len(self._scores) - 1
        index = torch.where(has_norm & (score > least), index, unused)
        index = torch.where(nonfinite, (self._worst + self._nonfinite).clamp(max=unused), index)
        self._nonfinite = self._nonfinite + nonfinite
        if not self._reads_block and int(index) == unused:
            return
        index = index.unsqueeze(0)
        self._scores.index_copy_(0, index, score.unsqueeze(0))
        self._rows.index_copy_(0, index, row.unsqueeze(0))
        self._norms.index_copy_(0, index, norms().unsqueeze(0))

    def kept(self) -> list[tuple[list[float], dict[str, float]]]:
        """Row and norms by name of each step that is kept, on the host."""
        found = zip(self._rows[:-1].tolist(), self._norms[:-1].tolist(), strict=True)
        return [
            (row, self._earlier.get(row[0]) or dict(zip(self._names, norms, strict=True)))
            for row, norms in found
            if row[0] >= 0
        ]
