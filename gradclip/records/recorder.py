"""What happened: kept as it was found, read in one copy for loggers and for a file."""

from __future__ import annotations

import errno
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradclip.errors import AlarmError, ConfigError
from gradclip.norms import combine
from gradclip.plan.plan import Plan
from gradclip.records.alarm import Spike, SpikeDetector
from gradclip.records.ends import close_at_end
from gradclip.records.interval import Interval, Streaks
from gradclip.records.record import (
    COLUMNS,
    ByName,
    ClipRecord,
    Facts,
    Value,
    either,
    negated,
)
from gradclip.records.trace_file import TraceHeader, import_pyarrow, probe, write_trace
from gradclip.records.worst import WorstSteps
from gradclip.types import Step, Verdict

if TYPE_CHECKING:
    from gradclip.config import ClipConfig

__all__ = ["TAKEN", "Recorder", "Tally"]

_logger = logging.getLogger("gradclip")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ROWS = 512  # without a flight record: more than a log entry spans
_FLAGS = COLUMNS.index("has_gradient")


class Tally:
    """Counts over the run, and a row for each of the last steps.

    A step is taken if it was finite, not withheld, and had a gradient: schedules follow those.
    Rows are made when they are read, so that of a step nothing but `taken` is made.

    Args:
        device: Where steps are decided.
        length: Steps that have a row.

    Attributes:
        rows: Those that were read, as in `COLUMNS`, the latest one last.
        taken: Steps that were taken, 0-d float64 on the device; a number where the host decides.
        made: Steps so far, those without a gradient too.
        first: Number of the first of them.
    """

    NAMES = ("steps", "clipped", "skipped", "nonfinite", "taken")
    """`steps` are those with a gradient; `taken`, of these, those that moved parameters."""

    def __init__(self, device: torch.device, length: int) -> None:
        self.rows: deque[list[float]] = deque(maxlen=length)
        self.made = self.first = 0
        self.taken: Value = 0.0
        self._taken_before: Value = 0.0
        self._counts = [0.0] * len(self.NAMES)  # of the steps that were read
        self._pending: list[Facts] = []
        self._device = device

    def follow(self, device: torch.device, *, on_host: bool) -> None:
        """Say where steps are decided from now on: there, or by the host in its own numbers."""
        self.read()
        self._device, self.taken = device, self._counts[TAKEN]
        if not on_host:
            self.taken = torch.full((), self.taken, dtype=torch.float64, device=device)

    def restart(self, step: int, counts: Tensor) -> None:
        """Go on from saved counts, as `Recorder.restart`; `follow` comes after it."""
        self.rows.clear()
        self._pending = []
        self.first, self.made, self._counts = step, 0, counts.tolist()

    @property
    def counts(self) -> Tensor:
        """Float64 of shape (5,), as in `NAMES`, on the host: waits for the device."""
        self.read()
        return torch.tensor(self._counts, dtype=torch.float64, device="cpu")

    def count(self, facts: Facts) -> None:
        """Count a step.

        One without any gradient is not counted. Zeros are gradients: momentum and weight decay
        move parameters then.
        """
        self._taken_before, self.taken = self.taken, self.taken + facts.taken
        steps, clipped, *_ = self._counts
        facts.before = self._pending[-1] if self._pending else (steps, clipped)
        self._pending.append(facts)
        self.made += 1

    def amend(self, facts: Facts, verdict: Verdict) -> Facts:
        """Join to the last step what one more evaluation of its closure found.

        Args:
            facts: Of that step.
            verdict: On the evaluation: it may be withheld, or not finite.
        """
        facts = replace(
            facts,
            late_skip=either(facts.late_skip, verdict.skip),
            late_nonfinite=either(facts.late_nonfinite, negated(verdict.finite)),
        )
        if self._pending:
            self._pending.pop()
        else:  # its row was made, and is made again
            self._add(self.rows.pop(), -1)
        self._pending.append(facts)
        self.taken = self._taken_before + facts.taken
        return facts

    def uncount(self) -> None:
        """Take the last step out of the counts; its row stays."""
        self.read()
        self._add(self.rows[-1], -1)

    def read(self, beside: Tensor | None = None) -> list[float]:
        """Make the rows of steps that have none yet: one copy from the device for all of them.

        Args:
            beside: Float64 of shape (n,), to be read in the same copy.

        Returns:
            What was read beside.
        """
        pending, self._pending = self._pending, []
        found, rest = _read([one.tensors for one in pending], beside)
        first = self.first + self.made - len(pending)
        for number, (facts, values) in enumerate(zip(pending, found, strict=True), first):
            row = _row(number, replace(facts, keeps=None, **values) if values else facts)
            self._add(row, 1)
            steps, clipped, *_ = self._counts
            facts.counted, facts.before = (steps, clipped), None
            row[COLUMNS.index("clip_rate")] = clipped / max(steps, 1.0)
            self.rows.append(row)
        return rest

    def row(self, facts: Facts) -> Tensor:
        """The row of the last step, float64 of shape (columns,) on the device."""
        number = self.first + self.made - 1
        if not facts.tensors:
            return torch.tensor(_row(number, facts), dtype=torch.float64, device=self._device)
        record = ClipRecord(facts, self._device, {}, 2.0)
        row = torch.zeros(len(COLUMNS), dtype=torch.float64, device=self._device)
        row.select(0, 0).fill_(number)
        row.select(0, 1).fill_(-1 if facts.batch is None else facts.batch)
        loss = torch.full_like(record.grad_norm, math.nan) if facts.loss is None else facts.loss
        numbers = (loss, record.grad_norm, record.limit, record.coef, record.clipped_norm)
        flags = (record.has_gradient, record.clipped, record.skipped, record.finite.logical_not())
        # Not `copy_`, which fake tensors of a device that isn't there don't have.
        row.narrow(0, COLUMNS.index("loss"), len(numbers)).add_(torch.stack(numbers))
        row.narrow(0, COLUMNS.index("has_gradient"), len(flags)).add_(torch.stack(flags))
        return row

    def _add(self, row: Sequence[float], sign: int) -> None:
        """Add a row to the counts, whose flags stand in their order."""
        flags = row[_FLAGS : _FLAGS + len(self._counts)]
        self._counts = [n + sign * flag for n, flag in zip(self._counts, flags, strict=True)]


TAKEN = Tally.NAMES.index("taken")
"""Which of the counts says how many optimizer steps were taken so far."""


def _row(number: int, facts: Facts) -> list[float]:
    """The row of a step of which the host knows everything, but for the clip rate."""
    coef, after = facts.outcome
    return [
        number,
        -1 if facts.batch is None else facts.batch,
        math.nan if facts.loss is None else facts.loss,
        facts.grad_norm,
        facts.limit,
        coef,
        after,
        0.0,
        facts.has_gradient,
        facts.clipped,
        facts.skipped,
        facts.nonfinite,
        facts.taken,
        facts.dropped or 0.0,
    ]


def _read(
    steps: Sequence[Mapping[str, Tensor]], beside: Tensor | None
) -> tuple[list[dict[str, Any]], list[float]]:
    """0-d tensors of steps by name as numbers, and what is read beside; one copy for all."""
    kinds = (torch.bool, torch.float64)
    held = [[v for step in steps for v in step.values() if v.dtype == kind] for kind in kinds]
    parts = [torch.stack(values).double() for values in held if values]
    if beside is not None:
        parts.append(beside)
    read = torch.cat(parts).cpu().tolist() if parts else []
    flags, start = iter(map(bool, read)), len(held[0])
    numbers = iter(read[start:])
    found = [
        {name: next(flags if v.dtype == torch.bool else numbers) for name, v in step.items()}
        for step in steps
    ]
    return found, list(numbers)


class Recorder:
    """Counts and describes each step, reads the rows when a log entry is due, writes the file.

    What was found of a step stays on the device. It is read, in one copy, by `flush`, when many
    steps wait, and, with a flight record, every `log.every_n_steps` (10) steps; on a CPU, where
    reading is free, also at a step that isn't finite.

    With `alarm:` in the configuration rows are also read every so many steps, on every rank, by
    what looks for spikes (`spikes`): always at the same steps, whichever rank logs.

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
        self._device = device
        self._is_first = is_first
        self._streaks = Streaks(config.log) if is_first else None
        self._detector = None if config.alarm is None else SpikeDetector(config.alarm)
        self._looks_every = min(config.log.every_n_steps or 10, self.tally.rows.maxlen or 1)
        self._spikes: list[Spike] = []
        self._saved: dict[str, int] = {}  # checkpoints, with the number of the step after them
        self._looked_at = 0
        self._read = self._written = self._tried = self._saves = 0
        self._path: Path | None = None
        self._warned = False
        keeps, drops = config.log.histograms and is_first, config.stage == "after_backward"
        self._interval = Interval(keeps=keeps, drops=drops)
        self._worst: WorstSteps | None = None
        self._sums = torch.zeros(1, dtype=torch.float64, device=device)
        self._updates = torch.zeros(3, dtype=torch.float64, device=device)
        self._has_updates = False
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

    def follow(self, plan: Plan, device: torch.device, *, reads_block: bool, on_host: bool) -> None:
        """Follow these parameters from the next step on; what is known of the steps before stays.

        Args:
            plan: Of the parameters.
            device: Where decisions are made.
            reads_block: Reading a value on the host waits for the device.
            on_host: The host decides, in numbers of its own.
        """
        log, flight = self._config.log, self._config.recorder
        self._drain()
        if self._detector is not None:
            self._look()
            self._detector.learn_anew()  # other parameters have other norms
        self.tally.follow(device, on_host=on_host)
        self._device, self._on_host = device, on_host
        self._plan, self._reads_block = plan, reads_block
        self._names = list(plan.each or plan.slot_names)
        self._indices = {name: index for index, name in enumerate(self._names)}
        logged = [f"grad_norms/{name}" for name in plan.slot_names if log.per_parameter]
        if log.per_group:
            logged += [f"grad_norms/group/{name}" for name in plan.group_names]
        self._interval.follow(logged)
        self._sums = torch.zeros(1 + len(logged), dtype=torch.float64, device=device)
        self._updates = torch.zeros(3, dtype=torch.float64, device=device)
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
        self.tally.restart(step, counts)
        self._read = self._written = self._tried = self._saves = self._looked_at = 0
        if self._config.alarm is not None:
            self._detector, self._spikes = SpikeDetector(self._config.alarm), []
        self._saved = {path: after for path, after in self._saved.items() if after <= step}
        self._interval, self._worst = self._interval.next(), None
        reads_block, on_host = self._reads_block, self._on_host
        self.follow(self._plan, self._device, reads_block=reads_block, on_host=on_host)

    def record(self, step: Step) -> ClipRecord:
        """Count a step and describe it."""
        return self.count(self.describe(step), *self._norms_of(step))

    def _norms_of(self, step: Step) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """What gives the norm of each slot, and of each parameter."""
        slots = partial(self._plan.by_slot, step.norms)
        return slots, step.measure_each if self._plan.each else slots

    def described(self, step: Step) -> ClipRecord:
        """The record of a step that isn't counted."""
        return ClipRecord(self.describe(step), self._device, {}, self._plan.recorded)

    def describe(self, step: Step) -> Facts:
        """What was found of a step, not counted."""
        given, has_gradient = step.given, step.has_gradient
        if step.known is not None:
            norm, limit, coef, finite, skip = step.known
            loss = None if given.loss is None else float(given.loss)
            batch = given.batch
            return Facts(norm, limit, coef, finite, has_gradient, skip=skip, loss=loss, batch=batch)
        verdict, norms, p = step.verdict, step.norms, self._plan.recorded
        facts = Facts(
            grad_norm=_total(norms, p),
            limit=verdict.limit,
            coef=verdict.coef.squeeze(0) if len(norms) == 1 else verdict.coef.min(),
            finite=verdict.finite,
            has_gradient=has_gradient,
            skip=verdict.skip,
            keeps=verdict.keeps,
            loss=given.loss,
            batch=given.batch,
        )
        if len(norms) > 1:
            facts.clipped_norm = _total(norms * verdict.coef, p)
        if verdict.edits:
            facts.changed = verdict.edited
            facts.clipped_norm = torch.where(verdict.edited, math.nan, _total(norms, p))
        return facts

    def count(
        self, facts: Facts, slots: Callable[[], Tensor], each: Callable[[], Tensor]
    ) -> ClipRecord:
        """Count a step that was described, and keep what is asked for of it.

        Args:
            facts: What was found.
            slots: Gives the norm of each slot, float64 of shape (slots,).
            each: Gives the norm of each parameter, float64 of shape (parameters,).
        """
        if self._config.recorder is not None and self._is_first:
            self._own()
        self.tally.count(facts)
        if self._worst is not None:
            self._worst.note(self.tally.row(facts), each)
        if len(self._sums) > 1:
            self._add(facts, slots())
        if self._is_due(facts):
            self._drain()
        named = ByName(self._indices, slots()) if self._config.log.per_parameter else {}
        self._facts = facts
        return ClipRecord(facts, self._device, named, self._plan.recorded)

    def amend(self, record: ClipRecord, verdict: Verdict) -> ClipRecord:
        """Join to the last step what one more evaluation of its closure found."""
        self._facts = self.tally.amend(self._facts, verdict)
        return ClipRecord(self._facts, self._device, record.per_parameter, record.norm_type)

    def add_update(self, norms: Tensor) -> None:
        """Take in how far a step moved the parameters.

        One that moved nothing, as a withheld one, is left out, and so is one whose norm isn't
        finite.

        Args:
            norms: Float64 of shape (2,), of the change, and of the parameters before it.
        """
        moved = torch.isfinite(norms).all() & (norms.select(0, 0) > 0)
        self._updates += torch.where(moved, torch.cat([norms.new_ones(1), norms]), 0.0)
        self._has_updates = True

    def witness(self, step: Step) -> None:
        """Write a step that stops the run to the file, where alone it is counted."""
        if self._config.recorder is not None:
            facts = self.describe(step)
            facts.skip = torch.ones_like(step.verdict.finite) if step.known is None else True
            facts.keeps = None
            self.count(facts, *self._norms_of(step))
            self.close()
            self.tally.uncount()

    def spikes(self) -> list[Spike]:
        """What alarms found since the last call.

        They look every `log.every_n_steps` (10) steps; the answer is the same on every rank if
        each of them asks between the same steps.
        """
        if self._detector is None:
            return []
        if self.tally.made - self._looked_at >= self._looks_every:
            self._look()
        found, self._spikes = self._spikes, []
        return [replace(spike, checkpoint=self._last_before(spike.step)) for spike in found]

    def report(self, spike: Spike, *, is_told: bool) -> None:
        """Warn of a spike on the first rank, or end the run on every rank.

        Args:
            spike: As `spikes` gave it.
            is_told: Somebody else was told, in place of a warning.

        Raises:
            AlarmError: If it ends the run; the flight record is written before.
        """
        text = f"clip{self.tag}: {spike} Look at data, learning rate and loss scale before that."
        ending = self._ending(spike)
        if not ending:
            if self._is_first and not is_told:
                _logger.warning(text)
            return
        self.close()
        if self._is_first:  # Python shows nothing of an error that is a SystemExit
            _logger.error(text + " " + ending)
        raise AlarmError(text + " " + ending, spike.checkpoint)

    def _ending(self, spike: Spike) -> str:
        """Why a spike ends the run; empty if it doesn't."""
        alarm = self._config.alarm
        assert alarm is not None
        if spike.kind == "withheld":
            rule = f"alarm.withheld is {alarm.withheld:g}", "raise alarm.withheld (1 never ends it)"
        elif alarm.stop in ("rise", spike.kind):
            rule = f"alarm.stop is {alarm.stop!r}", "set alarm.stop to null to be told only"
        else:
            return ""
        return f"{rule[0]}, so the run ends, with exit code {AlarmError.code}; {rule[1]}."

    def saved_to(self, path: str) -> None:
        """Remember a checkpoint of the steps so far."""
        self._saved[path] = self.tally.first + self.tally.made

    def flush(self) -> dict[str, float]:
        """What to log of the steps since the last call; see `GradientClipper.flush`."""
        self._drain()
        metrics, self.norms = self._interval.metrics(), self._interval.norms
        if metrics:
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
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
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

    def _is_due(self, facts: Facts) -> bool:
        """Whether rows have to be read now."""
        length, pending = self.tally.rows.maxlen or 0, self.tally.made - self._read
        if self._config.recorder is None:
            return pending == length
        nonfinite = not self._reads_block and not bool(facts.finite)
        return nonfinite or pending == min(length, self._config.log.every_n_steps or 10)

    def _add(self, facts: Facts, norms: Tensor) -> None:
        parts = [norms] if self._config.log.per_parameter else []
        if self._config.log.per_group:
            parts.append(combine(norms, self._plan.recorded, self._plan.group_members))
        one = torch.cat([norms.new_ones(1), *parts])
        steady = facts.finite & facts.has_gradient
        if isinstance(steady, Tensor):
            self._sums += torch.where(steady, one, 0.0)
        elif steady:
            self._sums += one

    def _look(self) -> None:
        """Let the detector see the steps that it hasn't seen, in one copy with what is new."""
        assert self._detector is not None
        unseen = self.tally.made - self._looked_at
        rows = self._drain(unseen)
        self._looked_at = self.tally.made
        self._spikes += self._detector.follow(rows[len(rows) - unseen :])

    def _last_before(self, step: int) -> str | None:
        """The newest checkpoint from before a step; one in the cloud is taken to be there."""
        older = {path: after for path, after in self._saved.items() if after <= step}
        there = [path for path in older if "://" in path or Path(path).exists()]
        return max(there, key=older.__getitem__, default=None)

    def _drain(self, at_least: int = 0) -> Tensor:
        """Read what is new, and give the rows that were read: these and `at_least` so many."""
        new = self.tally.made - self._read
        if not max(new, at_least) and not self._has_updates:
            return torch.zeros(0, len(COLUMNS), dtype=torch.float64, device="cpu")
        beside = self.tally.read(torch.cat([self._sums, self._updates]))
        held = self.tally.rows
        last = islice(held, max(0, len(held) - max(new, at_least)), None)
        found = torch.tensor(list(last), dtype=torch.float64, device="cpu")
        found = found.view(-1, len(COLUMNS))
        self._read, self._has_updates = self.tally.made, False
        sums, updates = torch.tensor(beside, dtype=torch.float64, device="cpu").split(
            [len(self._sums), len(self._updates)]
        )
        self._sums.zero_()
        self._updates.zero_()
        rows = found[len(found) - new :]
        self._interval.add(rows, sums, updates)
        if self._streaks is not None:
            self._streaks.follow(rows, self.tag)
        nonfinite = bool(rows[:, COLUMNS.index("nonfinite")].any())
        # Ever rarer, since a run may stay so for good.
        rare = self.tally.made - self._tried >= self._saves
        if nonfinite and rare and self._config.recorder is not None:
            self._saves += 1
            self._save()
        return found

    def steps(self) -> list[dict[str, Any]]:
        """The last steps in rising order, as a flight record has them; read on the host.

        Returns:
            For each step `step`, `grad_norm`, `limit`, `coef`, `clipped_norm`, `clipped`,
            `skipped`, `finite`, and where known `batch`, `loss` and `per_parameter`.
        """
        self.tally.read()
        found = {row["step"]: row for row in map(_as_step, self.tally.rows)}
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
