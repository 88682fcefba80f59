"""Memory: what happened in a step, kept on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gradclip.types import Verdict

__all__ = ["COLUMNS", "ByName", "ClipRecord", "Tally"]

COLUMNS = (
    *("step", "batch", "loss", "grad_norm", "limit", "coef", "clipped_norm", "clip_rate"),
    *("some", "clipped", "skipped", "nonfinite", "taken", "dropped"),
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
        dropped: Float64. Micro-batches that were left out; None but for `stage: after_backward`,
            whose steps are described by their worst micro-batch (docs/step.md).
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
    dropped: Tensor | None = None

    def as_metrics(self) -> dict[str, Tensor]:
        """Float 0-d tensors by metric key, still on the device.

        Returns:
            `clip/grad_norm`, `clip/limit`, `clip/coef`, `clip/clipped_norm`, `clip/clipped`,
            `clip/skipped`, `clip/clip_rate`, and where recorded `clip/dropped` and
            `clip/grad_norms/<parameter>`.
        """
        keys = ("grad_norm", "limit", "coef", "clipped_norm", "clipped", "skipped", "clip_rate")
        metrics = {f"clip/{key}": getattr(self, key).double() for key in keys}
        if self.dropped is not None:
            metrics["clip/dropped"] = self.dropped
        norms = {f"clip/grad_norms/{name}": norm for name, norm in self.per_parameter.items()}
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
        self._clip_rate = self.counts.new_zeros(())

    @property
    def taken(self) -> Tensor:
        """Optimizer steps taken so far, 0-d float64."""
        return self.counts.select(0, self.NAMES.index("taken"))

    def to(self, device: torch.device) -> None:
        """Move to where decisions are made now."""
        self.counts, self.rows = self.counts.to(device), self.rows.to(device)
        self._unknown = self._unknown.to(device)

    def describe(
        self,
        grad_norm: Tensor,
        clipped_norm: Tensor,
        verdict: Verdict,
        per_parameter: Mapping[str, Tensor],
        norm_type: float = 2.0,
    ) -> ClipRecord:
        """What happened, before it is counted; `clip_rate` is of the steps before."""
        skipped = torch.zeros_like(verdict.finite) if verdict.skip is None else verdict.skip
        coef = torch.where(skipped, 1.0, verdict.coef.min())
        clipped = coef < 1
        if verdict.edited is not None:
            edited = verdict.edited & skipped.logical_not()
            clipped = clipped | edited
            clipped_norm = torch.where(edited, torch.nan, clipped_norm)
        return ClipRecord(
            grad_norm=grad_norm,
            limit=verdict.limit,
            coef=coef,
            clipped_norm=torch.where(skipped, grad_norm, clipped_norm),
            clipped=clipped,
            skipped=skipped,
            finite=verdict.finite,
            clip_rate=self._clip_rate,
            per_parameter=per_parameter,
            norm_type=norm_type,
        )

    def count(
        self,
        record: ClipRecord,
        *,
        batch: int | None = None,
        loss: Tensor | None = None,
        sound: Tensor | None = None,
    ) -> ClipRecord:
        """Count a step, make its row, and say how many were clipped up to it.

        A step without any gradient (norm 0) is not counted.

        Args:
            record: What happened.
            batch: Index of the step's last batch, if known.
            loss: 0-d, if known.
            sound: 0-d bool, what the optimizer steps with is finite; `record.finite` if None.
        """
        some, clean = record.grad_norm != 0, record.finite if sound is None else sound
        taken = some & clean & record.skipped.logical_not()
        flags = (some, record.clipped, record.skipped, record.finite.logical_not(), taken)
        happened = torch.stack(flags)
        self.counts = self.counts + happened
        steps, total = self.counts.narrow(0, 0, 2).unbind()
        self._clip_rate = rate = total / steps.clamp(min=1)
        numbers = (record.grad_norm, record.limit, record.coef, record.clipped_norm, rate)
        row = self.rows.select(0, self.made % len(self.rows))
        row.select(0, 0).fill_(self.first + self.made)
        row.select(0, 1).fill_(-1 if batch is None else batch)
        loss = self._unknown if loss is None else loss
        # Not `copy_`, which fake tensors of a device that isn't there don't have.
        row.narrow(0, _NUMBERS, _FLAGS - _NUMBERS).zero_().add_(torch.stack((loss, *numbers)))
        row.narrow(0, _FLAGS, len(happened)).zero_().add_(happened)
        if record.dropped is not None:
            row.select(0, COLUMNS.index("dropped")).zero_().add_(record.dropped)
        self.made += 1
        return replace(record, clip_rate=rate)
