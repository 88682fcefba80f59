"""What the last steps were, read from the device in one copy: for loggers, and for a file."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradclip.config import ClipConfig
from gradclip.errors import ConfigError
from gradclip.layouts import is_first_rank
from gradclip.measure import combine
from gradclip.plan.plan import Plan
from gradclip.records.interval import Runs, Window
from gradclip.records.record import COLUMNS, ByName, ClipRecord, Tally
from gradclip.records.trace_file import TraceHeader, write_trace
from gradclip.records.worst import WorstOnDevice, WorstOnHost, WorstSteps
from gradclip.types import Verdict

__all__ = ["Recorder", "Seen"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a step is told by, beside its verdict.

    Attributes:
        norms: Float64 of shape (measured slots or units,), as recorded.
        batch: Index of the step's last batch, if known.
        loss: 0-d, if known.
        measure: Gives the norm of each parameter, float64 of shape (parameters,).
    """

    norms: Tensor
    batch: int | None
    loss: Tensor | None
    measure: Callable[[], Tensor]


class Recorder:
    """Reads the rows of the last steps when a log entry is due, and keeps the flight record.

    Rows stay on the device. They are read, in one copy, by `flush`, when they would be
    overwritten, and, with a flight record, every `log.every_n_steps` (10) steps; on a CPU, where
    reading is free, also at a step that isn't finite.

    With `recorder:` in the configuration the first rank writes the last steps to a file: when a
    step isn't finite, when a bound or `on_nonfinite: raise` stops the run, when the clipper or the
    program ends, and on request.

    Args:
        config: What to log and record.
        tally: Where the rows are.
        owner: With whose end the file is written, if not before.

    Attributes:
        folder: Where a file with a relative path goes; at first the working directory.
        tag: Part of the file's name, to tell clippers apart.
        norms: Those of the finite steps of the last `flush`, with `log.histograms`.
    """

    def __init__(self, config: ClipConfig, tally: Tally, owner: object) -> None:
        self.folder: Path = Path.cwd()
        self.tag = ""
        self.norms: list[float] = []
        self._config = config
        self._tally = tally
        self._is_first = is_first_rank()
        self._runs = Runs(config.log) if self._is_first else None
        self._read = self._written = self._alarms = 0
        self._path: Path | None = None
        self._window = Window(())
        self._sums = torch.zeros(1)
        self._names: Sequence[str] = ()
        if config.recorder is not None:
            weakref.finalize(owner, self.close)

    def begin(self, step: int) -> None:
        """Go on with a step of this number; those before it were another run's, with its file."""
        self._drain()
        self.close()
        self._path = None
        self._tally.first, self._tally.made = step, 0
        self._read = self._written = self._alarms = 0
        self.lay(self._plan, self._tally.rows.device, reads_block=self._reads_block)

    def lay(self, plan: Plan, device: torch.device, *, reads_block: bool) -> None:
        """Follow these parameters from the next step on.

        Args:
            plan: Of the parameters.
            device: Where decisions are made.
            reads_block: Reading a value on the host waits for the device.
        """
        log, flight = self._config.log, self._config.recorder
        self._drain()
        self._tally.to(device)
        self._plan, self._reads_block = plan, reads_block
        self._names = list(plan.each or plan.slot_names)
        self._places = {name: place for place, name in enumerate(self._names)}
        logged = [f"grad_norms/{name}" for name in plan.slot_names if log.per_parameter]
        if log.per_group:
            logged += [f"grad_norms/group/{name}" for name in plan.group_names]
        drops = self._config.stage == "after_backward"
        keeps = log.histograms and self._is_first
        self._window = Window(logged, keeps=keeps, drops=drops)
        self._sums = torch.zeros(1 + len(logged), dtype=torch.float64, device=device)
        self._worst: WorstSteps | None = None
        if flight is not None:
            on_device = (flight.worst, len(self._names), device)
            self._worst = WorstOnDevice(*on_device) if reads_block else WorstOnHost(flight.worst)

    def record(self, verdict: Verdict, seen: Seen) -> ClipRecord:
        """Count a step and describe it."""
        record, slots = self.describe(verdict, seen.norms)
        each = seen.measure if self._plan.each else slots
        return self.note(record, slots, each, seen.batch, seen.loss)

    @property
    def keeps_worst(self) -> bool:
        """Whether the norm of each parameter is kept for some steps."""
        return self._worst is not None

    def describe(self, verdict: Verdict, norms: Tensor) -> tuple[ClipRecord, Callable[[], Tensor]]:
        """What happened, not counted, and what gives the norm of each slot."""
        plan = self._plan
        grad_norm = combine(norms, plan.recorded)
        clipped_norm = combine(norms * verdict.coef, plan.recorded)
        slots = partial(plan.by_slot, norms)
        named = self.named(slots)
        return self._tally.describe(grad_norm, clipped_norm, verdict, named, plan.recorded), slots

    def named(self, slots: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        """The norm of each parameter by name, where they are logged."""
        return ByName(self._places, slots()) if self._config.log.per_parameter else {}

    def note(
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
            slots: Gives the norm of each slot.
            each: Gives the norm of each parameter.
            batch: Index of the step's last batch, if known.
            loss: 0-d, if known.
            sound: As for `Tally.count`.
        """
        record = self._tally.count(record, batch=batch, loss=loss, sound=sound)
        row = self._last(1).select(0, 0)
        if self._worst is not None:
            self._worst.note(row, each)
        if len(self._sums) > 1:
            self._add(row, slots())
        if self._is_due(row):
            self._drain()
        return record

    def witness(self, verdict: Verdict, seen: Seen) -> None:
        """Write a step that stops the run to the file, where alone it is counted."""
        if self._config.recorder is not None:
            counts = self._tally.counts
            self.record(replace(verdict, skip=torch.ones_like(verdict.finite)), seen)
            self.close()
            self._tally.counts = counts

    def flush(self) -> dict[str, float]:
        """What to log of the steps since the last call; see `GradientClipper.flush`."""
        self._drain()
        metrics, self.norms = self._window.metrics(), self._window.norms
        self._window = self._window.next()
        return metrics

    def give_histogram(self, writer: Any, key: str, step: int | None) -> None:
        """Give `norms` to what has histograms; anything else is left alone.

        Args:
            writer: TensorBoard's `SummaryWriter`, or a W&B run.
            key: Under which name.
            step: At which step, if known.
        """
        if self.norms and hasattr(writer, "add_histogram"):
            writer.add_histogram(key, torch.tensor(self.norms), step)
        elif self.norms and type(writer).__module__.startswith("wandb"):
            import wandb

            writer.log({key: wandb.Histogram(self.norms)}, commit=False)

    def write(self, path: str | Path | None = None) -> Path | None:
        """Write the flight record: the last steps, and the worst ones with every parameter's norm.

        Args:
            path: Instead of the configured one. `.parquet` needs pyarrow.

        Returns:
            Where; None on other ranks than the first, and before the first step.

        Raises:
            ConfigError: If there is no path, neither here nor in the configuration.
        """
        if path is None and self._config.recorder is None:
            msg = (
                "recorder.write: no path is given, and the configuration has no section recorder; "
                "give a path, or add `recorder: {}` to record the worst steps too."
            )
            raise ConfigError(msg)
        if not self._is_first or not self._tally.made:
            return None
        path = self._own_path() if path is None else Path(path)
        counts = dict(zip(Tally.NAMES, map(int, self._tally.counts.tolist()), strict=True))
        del counts["taken"]
        header = TraceHeader(
            norm_type=self._plan.recorded,
            config=self._config.model_dump(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            parameters=tuple(self._names) if self._worst is not None else None,
            counts=counts,
        )
        write_trace(path, header, self._steps())
        self._written = self._tally.made
        return path

    def close(self) -> None:
        """Write what the file doesn't have yet."""
        if self._config.recorder is not None and self._written < self._tally.made:
            self.write()

    def _is_due(self, row: Tensor) -> bool:
        """Whether rows have to be read now."""
        length, pending = len(self._tally.rows), self._tally.made - self._read
        if self._config.recorder is None:
            return pending == length
        odd = not self._reads_block and bool(row.select(0, COLUMNS.index("nonfinite")))
        return odd or pending == min(length, self._config.log.every_n_steps or 10)

    def _add(self, row: Tensor, norms: Tensor) -> None:
        parts = [norms] if self._config.log.per_parameter else []
        if self._config.log.per_group:
            parts.append(combine(norms, self._plan.recorded, self._plan.group_members))
        some, odd = (row.select(0, COLUMNS.index(name)) for name in ("some", "nonfinite"))
        steady = (some != 0) & (odd == 0)
        self._sums += torch.where(steady, torch.cat([some.unsqueeze(0), *parts]), 0.0)

    def _last(self, steps: int) -> Tensor:
        """The rows of the last steps, in order."""
        rows, made = self._tally.rows, self._tally.made
        steps = min(steps, made, len(rows))
        stop = made % len(rows)
        if steps <= stop:
            return rows.narrow(0, stop - steps, steps)
        early = steps - stop
        return torch.cat([rows.narrow(0, len(rows) - early, early), rows.narrow(0, 0, stop)])

    def _drain(self) -> None:
        """Read what is new."""
        if self._read == self._tally.made:
            return
        rows = self._last(self._tally.made - self._read)
        read = torch.cat([rows.flatten(), self._sums]).cpu()
        self._read = self._tally.made
        self._sums.zero_()
        rows = read[: rows.numel()].view_as(rows)
        self._window.add(rows, read[rows.numel() :])
        if self._runs is not None:
            self._runs.follow(rows, self.tag)
        odd = bool(rows[:, COLUMNS.index("nonfinite")].any())
        # Ever rarer, since a run may stay so for good.
        rare = self._tally.made - self._written >= self._alarms
        if odd and rare and self._config.recorder is not None:
            self._alarms += 1
            self.write()

    def _steps(self) -> list[dict[str, Any]]:
        """What the file has, in rising order."""
        found = {row["step"]: row for row in map(_as_step, self._last(self._tally.made).tolist())}
        for values, norms in () if self._worst is None else self._worst.kept():
            row = found.setdefault(int(values[0]), _as_step(values))
            row["per_parameter"] = dict(zip(self._names, norms, strict=True))
        return [found[step] for step in sorted(found)]

    def _own_path(self) -> Path:
        """The configured file, under a name that no other run's file has."""
        if self._path is None:
            assert self._config.recorder is not None
            wanted = self.folder / self._config.recorder.file
            stem, dot, rest = wanted.name.partition(".")
            stem += self.tag
            names = (f"{stem}{'' if i == 0 else f'-{i}'}{dot}{rest}" for i in range(10**6))
            self._path = next(p for name in names if not (p := wanted.with_name(name)).exists())
        return self._path


def _as_step(values: Sequence[float]) -> dict[str, Any]:
    row: Mapping[str, float] = dict(zip(COLUMNS, values, strict=True))
    step: dict[str, Any] = {"step": int(row["step"])}
    if row["batch"] >= 0:
        step["batch"] = int(row["batch"])
    if not math.isnan(row["loss"]):
        step["loss"] = row["loss"]
    step |= {name: row[name] for name in ("grad_norm", "limit", "coef", "clipped_norm")}
    flags = {name: bool(row[name]) for name in ("clipped", "skipped")}
    return step | flags | {"finite": not row["nonfinite"]}
