"""Memory: what happened in a step, kept on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradclip.types import Verdict

__all__ = ["COLUMNS", "ByName", "ClipRecord", "Tally"]

COLUMNS = (
    *("step", "batch", "loss", "grad_norm", "limit", "coef", "clipped_norm", "clip_rate"),
    *("some", "clipped", "skipped", "nonfinite", "taken"),
)
"""What a row of the last steps holds. Batch is -1 and loss NaN where nobody told."""
_NUMBERS, _FLAGS = COLUMNS.index("loss"), COLUMNS.index("some")


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """One clipping step. Plain 0-d tensors on the device, equal on every rank.

    Reading one on the host (`float(record.grad_norm)`) waits for the device; when to do that is
    the caller's choice.

    Attributes:
        grad_norm: Float64. Norm of all gradients before clipping; NaN or inf if they are.
        limit: Float64. The tightest limit any slot was held to; inf if there was none.
        coef: Float64. The smallest factor any slot was multiplied by; 1 if nothing was scaled.
        clipped_norm: Float64. Norm after clipping. NaN if elements were changed one by one: that
            norm isn't known without reading the gradients again.
        clipped: Bool. Some gradient was changed.
        skipped: Bool. The optimizer step was withheld.
        finite: Bool. Every gradient element on every rank was finite.
        clip_rate: Float64. Share of the steps so far that were clipped.
        per_parameter: Norm before clipping by parameter name; empty unless asked for.
        norm_type: p of these norms, that of the first policy that has one.
    """

    grad_norm: Tensor
    limit: Tensor
    coef: Tensor
    clipped_norm: Tensor
    clipped: Tensor
    skipped: Tensor
    finite: Tensor
    clip_rate: Tensor
    per_parameter: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    norm_type: float = 2.0

    def as_metrics(self) -> dict[str, Tensor]:
        """Float 0-d tensors by metric key, still on the device.

        Returns:
            `clip/grad_norm`, `clip/limit`, `clip/coef`, `clip/clipped_norm`, `clip/clipped`,
            `clip/skipped`, `clip/clip_rate`, and `clip/grad_norm/<parameter>` where recorded.
        """
        keys = ("grad_norm", "limit", "coef", "clipped_norm", "clipped", "skipped", "clip_rate")
        metrics = {f"clip/{key}": getattr(self, key).double() for key in keys}
        norms = {f"clip/grad_norm/{name}": norm for name, norm in self.per_parameter.items()}
        return metrics | norms


class ByName(Mapping[str, Tensor]):
    """Values of one tensor by name, of which a view is made when one is asked for.

    Args:
        places: Where the value of each name is.
        values: Shape (names,).
    """

    def __init__(self, places: Mapping[str, int], values: Tensor) -> None:
        self._places = places
        self._values = values

    def __getitem__(self, name: str) -> Tensor:
        return self._values.select(0, self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Tally:
    """Counts over the run, and a row for each of the last steps; all on the device.

    A step is taken if it was finite, not withheld, and had a gradient: schedules follow those.

    Args:
        device: Where.
        length: Steps that have a row.

    Attributes:
        counts: Float64 of shape (5,), as in `NAMES`: steps, clipped, skipped, not finite, taken.
        rows: Float64 of shape (length, columns), the latest one at `made - 1` modulo length.
        made: Rows so far, those of steps without a gradient too.
        first: Number of the step that the first row was of.
    """

    NAMES = ("steps", "clipped", "skipped", "nonfinite", "taken")

    def __init__(self, device: torch.device, length: int) -> None:
        self.counts = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.rows = self.counts.new_zeros(length, len(COLUMNS))
        self.made = self.first = 0
        self._unknown = self.counts.new_full((), math.nan)

    @property
    def taken(self) -> Tensor:
        """Optimizer steps taken so far, 0-d float64."""
        return self.counts.select(0, self.NAMES.index("taken"))

    def to(self, device: torch.device) -> None:
        """Move to where decisions are made now."""
        self.counts, self.rows = self.counts.to(device), self.rows.to(device)
        self._unknown = self._unknown.to(device)

    def append(
        self,
        grad_norm: Tensor,
        clipped_norm: Tensor,
        verdict: Verdict,
        per_parameter: Mapping[str, Tensor],
        norm_type: float = 2.0,
        *,
        batch: int | None = None,
        loss: Tensor | None = None,
    ) -> ClipRecord:
        """Count a step and describe it.

        A step without any gradient (norm 0) is not counted.
        """
        skipped = torch.zeros_like(verdict.finite) if verdict.skip is None else verdict.skip
        coef = torch.where(skipped, 1.0, verdict.coef.min())
        clipped = coef < 1
        if verdict.edited is not None:
            edited = verdict.edited & skipped.logical_not()
            clipped = clipped | edited
            clipped_norm = torch.where(edited, torch.nan, clipped_norm)
        clipped_norm = torch.where(skipped, grad_norm, clipped_norm)
        some = grad_norm != 0
        taken = some & verdict.finite & skipped.logical_not()
        happened = torch.stack([some, clipped, skipped, verdict.finite.logical_not(), taken])
        self.counts = self.counts + happened
        steps, total = self.counts.narrow(0, 0, 2).unbind()
        clip_rate = total / steps.clamp(min=1)
        numbers = (grad_norm, verdict.limit, coef, clipped_norm, clip_rate)
        row = self.rows.select(0, self.made % len(self.rows))
        row.select(0, 0).fill_(self.first + self.made)
        row.select(0, 1).fill_(-1 if batch is None else batch)
        loss = self._unknown if loss is None else loss
        # Not `copy_`, which fake tensors of a device that isn't there don't have.
        row.narrow(0, _NUMBERS, _FLAGS - _NUMBERS).zero_().add_(torch.stack((loss, *numbers)))
        row.narrow(0, _FLAGS, len(happened)).zero_().add_(happened)
        self.made += 1
        return ClipRecord(
            grad_norm=grad_norm,
            limit=verdict.limit,
            coef=coef,
            clipped_norm=clipped_norm,
            clipped=clipped,
            skipped=skipped,
            finite=verdict.finite,
            clip_rate=clip_rate,
            per_parameter=per_parameter,
            norm_type=norm_type,
        )
