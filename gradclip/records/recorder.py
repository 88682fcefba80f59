"""What happened: counted on the device, read in one copy for loggers and for a file."""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradclip.errors import ConfigError
from gradclip.norms import combine
from gradclip.plan.plan import Plan
from gradclip.records.ends import close_at_end
from gradclip.records.interval import Interval, Streaks
from gradclip.records.record import COLUMNS, ByName, ClipRecord
from gradclip.records.trace_file import TraceHeader, import_pyarrow, probe, write_trace
from gradclip.records.worst import WorstSteps
from gradclip.types import Step, Verdict

if TYPE_CHECKING:
    from gradclip.config import ClipConfig

__all__ = ["TAKEN", "Recorder", "Tally"]

_logger = logging.getLogger("gradclip")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ROWS = 512  # without a flight record: more than a log entry spans
_NUMBERS, _FLAGS = COLUMNS.index("loss"), COLUMNS.index("has_gradient")


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
    """`steps` are those with a gradient; `taken`, of these, those that moved parameters."""

    def __init__(self, device: torch.device, length: int) -> None:
        self.counts = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.rows = self.counts.new_zeros(length, len(COLUMNS))
        self.made = self.first = 0
        self._unknown = self.counts.new_full((), math.nan)
        self._clip_rate = self.counts.new_zeros(())

    def to(self, device: torch.device) -> None:
        """Move to where decisions are made now."""
        self.counts, self.rows = self.counts.to(device), self.rows.to(device)
        self._unknown = self._unknown.to(device)

    def describe(
        self,
        grad_norm: Tensor,
        clipped_norm: Tensor,
        verdict: Verdict,
        has_gradient: Tensor,
        per_parameter: Mapping[str, Tensor],
        norm_type: float,
    ) -> ClipRecord:
        """What happened, before it is counted; `clip_rate` is that of the steps before.

        Args:
            grad_norm: 0-d float64, before clipping.
            clipped_norm: 0-d float64, once slots are multiplied by their coefficients.
            verdict: What was decided.
            has_gradient: 0-d bool, some rank has a gradient.
            per_parameter: Norm before clipping by name.
            norm_type: p of the norms.
        """
        skipped = torch.zeros_like(verdict.finite) if verdict.skip is None else verdict.skip
        coef = torch.where(skipped, 1.0, verdict.coef.min())
        clipped = coef < 1
        if verdict.edits:
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
            has_gradient=has_gradient,
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

        One without any gradient is not counted. Zeros are gradients: momentum and weight decay
        move parameters then.

        Args:
            record: What happened.
            batch: Index of the step's last batch, if known.
            loss: 0-d, if known.
            sound: 0-d bool, what the optimizer steps with is finite; `record.finite` if None.
        """
        has_gradient = record.has_gradient
        clean = record.finite if sound is None else sound
        taken = has_gradient & clean & record.skipped.logical_not()
        flags = (has_gradient, record.clipped, record.skipped, record.finite.logical_not(), taken)
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

    def amend(self, record: ClipRecord, verdict: Verdict) -> ClipRecord:
        """Join to the last step what one more evaluation of its closure found.

        Args:
            record: Of that step.
            verdict: On the evaluation: it may be withheld, or not finite.
        """
        none = torch.zeros_like(record.skipped)
        skipped = none if verdict.skip is None else verdict.skip & record.skipped.logical_not()
        nonfinite = record.finite & verdict.finite.logical_not()
        row = self.rows.select(0, (self.made - 1) % len(self.rows))
        taken = row.select(0, COLUMNS.index("taken")) != 0
        untaken = -(taken & (skipped | nonfinite)).double()
        change = torch.stack([none.double(), none.double(), skipped, nonfinite, untaken])
        self.counts = self.counts + change
        row.narrow(0, _FLAGS, len(change)).add_(change)  # flags stand in the order of the counts
        return replace(
            record, skipped=record.skipped | skipped, finite=record.finite & verdict.finite
        )


TAKEN = Tally.NAMES.index("taken")
"""Which of the counts says how many optimizer steps were taken so far."""


class Recorder:
    """Counts and describes each step, reads the rows when a log entry is due, writes the file.

    Rows stay on the device. They are read, in one copy, by `flush`, when they would be
    overwritten, and, with a flight record, every `log.every_n_steps` (10) steps; on a CPU, where
    reading is free, also at a step that isn't finite.

    With `recorder:` in the configuration the first rank writes the last steps to a file: when a
    step isn't finite, when a bound or `on_nonfinite: raise` stops the run, when the clipper or the
    program ends, and on request. If that fails, one warning says so and training goes on.

    The steps of a file are of one process and one recorder: a forked process, or a copy, has a
    file of its own.

    Args:
        config: What to log and record.
        device: Where decisions are made.
        is_first: This process writes files and warnings.

    Attributes:
        folder: Where a file with a relative path goes; at first the working directory (`place`).
        tag: Part of the file's name, which names the clipper.
        norms: Those of the finite steps of the last `flush`, with `log.histograms`.
        tally: The counts and rows.

    Raises:
        ConfigError: If the configured file is Parquet and pyarrow is missing, or if its path can't
            be written, as far as that is known before `place`.
    """

    _owner = (0, 0)

    def __init__(self, config: ClipConfig, device: torch.device, *, is_first: bool) -> None:
        self.folder: Path = Path()
        self.tag = ""
        self.norms: list[float] = []
        self.tally = Tally(device, _ROWS if config.recorder is None else config.recorder.steps)
        self._config = config
        self._is_first = is_first
        self._streaks = Streaks(config.log) if is_first else None
        self._read = self._written = self._tried = self._alarms = 0
        self._path: Path | None = None
        self._warned = False
        keeps, drops = config.log.histograms and is_first, config.stage == "after_backward"
        self._interval = Interval(keeps=keeps, drops=drops)
        self._worst: WorstSteps | None = None
        self._sums = torch.zeros(1, dtype=torch.float64, device=device)
        self._names: Sequence[str] = ()
        if (flight := config.recorder) is not None:
            if flight.file.endswith(".parquet"):
                import_pyarrow()
            self._move_to(".", is_final=Path(flight.file).is_absolute())

    def __del__(self) -> None:
        self.close()

    @property
    def keeps_worst(self) -> bool:
        """Whether the norm of each parameter is kept for some steps."""
        return self._worst is not None

    def follow(self, plan: Plan, device: torch.device, *, reads_block: bool) -> None:
        """Follow these parameters from the next step on; what is known of the steps before stays.

        Args:
            plan: Of the parameters.
            device: Where decisions are made.
            reads_block: Reading a value on the host waits for the device.
        """
        log, flight = self._config.log, self._config.recorder
        self._drain()
        self.tally.to(device)
        self._plan, self._reads_block = plan, reads_block
        self._names = list(plan.each or plan.slot_names)
        self._indices = {name: index for index, name in enumerate(self._names)}
        logged = [f"grad_norms/{name}" for name in plan.slot_names if log.per_parameter]
        if log.per_group:
            logged += [f"grad_norms/group/{name}" for name in plan.group_names]
        self._interval.follow(logged)
        self._sums = torch.zeros(1 + len(logged), dtype=torch.float64, device=device)
        if self._worst is not None:
            self._worst.follow(self._names, device)
        elif flight is not None:
            self._worst = WorstSteps(flight.worst, self._names, device, reads_block=reads_block)

    def restart(self, step: int, counts: Tensor) -> None:
        """Go on from saved counts; the steps before were another run's, with its file.

        Args:
            step: Number of the next step.
            counts: Float64 of shape (5,), as in `Tally.NAMES`.
        """
        self._drain()
        self.close()
        self._path = None
        self.tally.first, self.tally.made, self.tally.counts = step, 0, counts
        self._read = self._written = self._tried = self._alarms = 0
        self._interval, self._worst = self._interval.next(), None
        self.follow(self._plan, self.tally.rows.device, reads_block=self._reads_block)

    def record(self, step: Step) -> ClipRecord:
        """Count a step and describe it."""
        slots = partial(self._plan.by_slot, step.norms)
        each = step.measure_each if self._plan.each else slots
        record = self.describe(step)
        return self.count(record, slots, each, step.given.batch, step.given.loss)

    def describe(self, step: Step) -> ClipRecord:
        """What happened, not counted."""
        plan, verdict = self._plan, step.verdict
        grad_norm = _total(step.norms, plan.recorded)
        clipped_norm = _total(step.norms * verdict.coef, plan.recorded)
        named = self.named(partial(plan.by_slot, step.norms))
        return self.tally.describe(
            grad_norm, clipped_norm, verdict, step.has_gradient, named, plan.recorded
        )

    def named(self, slots: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        """The norm of each parameter by name, where they are logged.

        Args:
            slots: Gives the norm of each slot, float64 of shape (slots,).
        """
        return ByName(self._indices, slots()) if self._config.log.per_parameter else {}

    def count(
        self,
        record: ClipRecord,
        slots: Callable[[], Tensor],
        each: Callable[[], Tensor],
        batch: int | None,
        loss: Tensor | None,
        sound: Tensor | None = None,
    ) -> ClipRecord:
        """Count a step that was described, and keep what is asked for of it.

        Args:
            record: What happened.
            slots: Gives the norm of each slot, float64 of shape (slots,).
            each: Gives the norm of each parameter, float64 of shape (parameters,).
            batch: Index of the step's last batch, if known.
            loss: 0-d, if known.
            sound: As for `Tally.count`.
        """
        if self._config.recorder is not None and self._is_first:
            self._own()
        record = self.tally.count(record, batch=batch, loss=loss, sound=sound)
        row = self._last(1).select(0, 0)
        if self._worst is not None:
            self._worst.note(row, each)
        if len(self._sums) > 1:
            self._add(row, slots())
        if self._is_due(row):
            self._drain()
        return record

    def amend(self, record: ClipRecord, verdict: Verdict) -> ClipRecord:
        """Join to the last step what one more evaluation of its closure found."""
        return self.tally.amend(record, verdict)

    def witness(self, step: Step) -> None:
        """Write a step that stops the run to the file, where alone it is counted."""
        if self._config.recorder is not None:
            counts = self.tally.counts
            skip = torch.ones_like(step.verdict.finite)
            self.record(replace(step, verdict=replace(step.verdict, skip=skip)))
            self.close()
            self.tally.counts = counts

    def flush(self) -> dict[str, float]:
        """What to log of the steps since the last call; see `GradientClipper.flush`."""
        self._drain()
        metrics, self.norms = self._interval.metrics(), self._interval.norms
        self._interval = self._interval.next()
        return metrics

    def write(self, path: str | Path | None = None) -> Path | None:
        """Write the flight record: the last steps, and the worst ones with every parameter's norm.

        Args:
            path: Instead of the configured one. `.parquet` needs pyarrow.

        Returns:
            Where; None on other ranks than the first, and before the first step.

        Raises:
            ConfigError: If there is no path, neither here nor in the configuration.
            OSError: If the file can't be written.
        """
        if path is None and self._config.recorder is None:
            msg = (
                "recorder.write: no path is given, and the configuration has no section recorder; "
                "give a path, or add `recorder: {}` to record the worst steps too."
            )
            raise ConfigError(msg)
        if not self._is_first or not self.tally.made:
            return None
        counts = dict(zip(Tally.NAMES, map(int, self.tally.counts.tolist()), strict=True))
        del counts["taken"]
        header = TraceHeader(
            norm_type=self._plan.recorded,
            config=self._config.model_dump(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            parameters=tuple(self._names) if self._worst is not None else None,
            counts=counts,
        )
        if path is None:
            self._own()
            wanted, is_new = self._path or self._wanted(), self._path is None
            path = self._path = write_trace(wanted, header, self.steps(), anew=is_new)
        else:
            path = write_trace(path, header, self.steps())
        self._written = self.tally.made
        return path

    def place(self, folder: str | Path, tag: str = "") -> None:
        """Say where a file with a relative path goes.

        Args:
            folder: Made when it is needed.
            tag: Part of the file's name, which names the clipper.

        Raises:
            ConfigError: If the configured file can't be written there.
        """
        self.tag = tag
        self._move_to(folder, is_final=True)

    def close(self) -> None:
        """Write what the file doesn't have yet; if that fails, one warning says so."""
        if self._owner == (os.getpid(), id(self)) and self._written < self.tally.made:
            self._save()

    def _save(self) -> None:
        """Write the file. No run ends, and no error of the user's is replaced, if that fails."""
        self._tried = self.tally.made
        try:
            self.write()
        except Exception as error:
            if not self._warned:
                self._warned = True
                _logger.warning(
                    "clip%s: the flight record wasn't written to %s (%s: %s). Training goes on, "
                    "and the file is tried again; this is said once. Make room, or have "
                    "recorder.file name a place that can be written.",
                    self.tag,
                    self._path or self._wanted(),
                    type(error).__name__,
                    error,
                )

    def _own(self) -> None:
        """From here on steps belong in this recorder's own file.

        Those before are the parent's in a forked process, and the original's in a copy.
        """
        owner = (os.getpid(), id(self))
        if self._owner != owner:
            self._owner, self._path, self._written = owner, None, self.tally.made
            close_at_end(self)

    def _move_to(self, folder: str | Path, *, is_final: bool) -> None:
        """See `place`; `is_final`: no other folder can be named later."""
        flight = self._config.recorder
        if flight is None:
            return
        try:
            self.folder = Path(folder).absolute()
            if self._is_first:
                probe(self._wanted())
        except (OSError, ValueError) as error:
            code = getattr(error, "errno", None)
            may_change = isinstance(error, PermissionError) or code == errno.EROFS
            if code in _FULL or (may_change and not is_final):
                return
            msg = (
                f"recorder.file: {Path(folder, flight.file)} can't be written ({error}); allowed: "
                "a file in a folder that is there or can be made. Change recorder.file, or the "
                "folder of the trainer's logs."
            )
            raise ConfigError(msg) from None

    def _is_due(self, row: Tensor) -> bool:
        """Whether rows have to be read now."""
        length, pending = len(self.tally.rows), self.tally.made - self._read
        if self._config.recorder is None:
            return pending == length
        nonfinite = not self._reads_block and bool(row.select(0, COLUMNS.index("nonfinite")))
        return nonfinite or pending == min(length, self._config.log.every_n_steps or 10)

    def _add(self, row: Tensor, norms: Tensor) -> None:
        parts = [norms] if self._config.log.per_parameter else []
        if self._config.log.per_group:
            parts.append(combine(norms, self._plan.recorded, self._plan.group_members))
        has_gradient = row.select(0, COLUMNS.index("has_gradient"))
        steady = (has_gradient != 0) & (row.select(0, COLUMNS.index("nonfinite")) == 0)
        self._sums += torch.where(steady, torch.cat([has_gradient.unsqueeze(0), *parts]), 0.0)

    def _last(self, steps: int) -> Tensor:
        """The rows of the last steps, in order."""
        rows, made = self.tally.rows, self.tally.made
        steps = min(steps, made, len(rows))
        stop = made % len(rows)
        if steps <= stop:
            return rows.narrow(0, stop - steps, steps)
        early = steps - stop
        return torch.cat([rows.narrow(0, len(rows) - early, early), rows.narrow(0, 0, stop)])

    def _drain(self) -> None:
        """Read what is new."""
        if self._read == self.tally.made:
            return
        rows = self._last(self.tally.made - self._read)
        read = torch.cat([rows.flatten(), self._sums]).cpu()
        self._read = self.tally.made
        self._sums.zero_()
        rows = read[: rows.numel()].view_as(rows)
        self._interval.add(rows, read[rows.numel() :])
        if self._streaks is not None:
            self._streaks.follow(rows, self.tag)
        nonfinite = bool(rows[:, COLUMNS.index("nonfinite")].any())
        # Ever rarer, since a run may stay so for good.
        rare = self.tally.made - self._tried >= self._alarms
        if nonfinite and rare and self._config.recorder is not None:
            self._alarms += 1
            self._save()

    def steps(self) -> list[dict[str, Any]]:
        """The last steps in rising order, as a flight record has them; read on the host.

        Returns:
            For each step `step`, `grad_norm`, `limit`, `coef`, `clipped_norm`, `clipped`,
            `skipped`, `finite`, and where known `batch`, `loss` and `per_parameter`.
        """
        found = {row["step"]: row for row in map(_as_step, self._last(self.tally.made).tolist())}
        for values, norms in () if self._worst is None else self._worst.kept():
            row = found.setdefault(int(values[0]), _as_step(values))
            row["per_parameter"] = norms
        return [found[step] for step in sorted(found)]

    def _wanted(self) -> Path:
        """The configured file, if no other run's has its name."""
        assert self._config.recorder is not None
        path = self.folder / self._config.recorder.file
        stem, dot, rest = path.name.partition(".")
        return path.with_name(f"{stem}{self.tag}{dot}{rest}")


def _total(norms: Tensor, norm_type: float) -> Tensor:
    """The norm of all slots, 0-d; that of a single one as it is."""
    return norms.squeeze(0) if len(norms) == 1 else combine(norms, norm_type)


def _as_step(values: Sequence[float]) -> dict[str, Any]:
    row: Mapping[str, float] = dict(zip(COLUMNS, values, strict=True))
    step: dict[str, Any] = {"step": int(row["step"])}
    if row["batch"] >= 0:
        step["batch"] = int(row["batch"])
    if not math.isnan(row["loss"]):
        step["loss"] = row["loss"]
    if row["has_gradient"]:  # else there is no norm, which isn't a norm of 0
        step |= {name: row[name] for name in ("grad_norm", "limit", "coef", "clipped_norm")}
    flags = {name: bool(row[name]) for name in ("clipped", "skipped")}
    return step | flags | {"finite": not row["nonfinite"]}
