"""From a log of norms to a trace: which value of a step counts."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from gradclip.errors import ConfigError
from gradclip.tools.curves import Floats, Steps
from gradclip.tools.logs import Log, open_log
from gradclip.tools.names import Columns, choose_columns
from gradclip.tools.trace import Chunk, TraceHeader

__all__ = ["ImportedLog", "import_log"]

Series = tuple[Steps, Floats]


@dataclass(frozen=True)
class ImportedLog:
    """The norms in a log, and what was logged with them.

    Attributes:
        path: The log.
        header: The header of a trace made from it.
        chunk: All its steps.
        taken: Column of the log by column of the trace.
        notes: Remarks for the reader, such as values that were changed.
    """

    path: Path
    header: TraceHeader
    chunk: Chunk
    taken: Mapping[str, str]
    notes: Sequence[str]

    @property
    def size_hint(self) -> int:
        """How many steps there are, which `bytes_read` of its chunks counts up to."""
        return len(self.chunk)

    def describe(self) -> str:
        """A summary of a few lines."""
        chunk = self.chunk
        lost = int(np.sum(~chunk.finite))
        lines = [f"{len(chunk)} steps from {chunk.step[0]} to {chunk.step[-1]}, {lost} not finite"]
        lines += [f"  {role}: {name}" for role, name in self.taken.items()]
        return "\n".join([*lines, *(f"Note: {note}." for note in self.notes)])

    def rows(self) -> Iterator[dict[str, Any]]:
        """The steps as `write_trace` takes them."""
        names = ["step", *sorted(self.chunk.columns - {"step"})]
        columns = [getattr(self.chunk, name).tolist() for name in names]
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))

    def chunks(self, size: int = 16384) -> Iterator[Chunk]:
        """The steps as `Trace.chunks` gives them; `bytes_read` counts steps."""
        for first in range(0, len(self.chunk), size):
            part = self.chunk.take(slice(first, first + size))
            yield replace(part, bytes_read=first + len(part))


def import_log(
    path: str | Path,
    *,
    norm_column: str | None = None,
    step_column: str | None = None,
    limit_column: str | None = None,
    loss_column: str | None = None,
    limit: float | None = None,
) -> ImportedLog:
    """Read norms, and what was logged with them, from a log.

    A step is taken if it has a norm, or is known to be withheld or not finite, under its number in
    the log. If a step was logged several times, as in a resumed run, its last value counts. Where
    the numbers begin again with each epoch, they go on instead.

    Args:
        path: A file, or a folder that holds one log.
        norm_column: Column of the norm before clipping; None looks for a usual name.
        step_column: Column of the step; None looks for a usual name.
        limit_column: Column of the limit; None takes `clip/limit` if there is one.
        loss_column: Column of the loss; None takes a training loss if there is one.
        limit: The limit of all steps, for a log that doesn't hold it.

    Raises:
        ConfigError: If the log can't be read, its names don't tell which column is meant, or a
            value isn't a number.
    """
    log = open_log(path)
    given = {
        "grad_norm": norm_column,
        "step": step_column,
        "limit": limit_column,
        "loss": loss_column,
    }
    chosen = choose_columns(log, {role: name for role, name in given.items() if name is not None})
    logged, notes = _collect(log, chosen)
    notes = [*chosen.notes, *notes]
    norms = logged["grad_norm"][0]
    step = np.unique(np.concatenate([norms, *(_marked(logged, role) for role in _HAPPENED)]))
    if not len(step):
        msg = (
            f"{log.path}: {chosen.taken['grad_norm']!r} has no values. Name another: "
            "gradclip import LOG --norm-column NAME."
        )
        raise ConfigError(msg)
    columns = {role: _last_values(step, *series) for role, series in logged.items()}
    norm, has_norm = columns["grad_norm"], np.isin(step, norms)
    if repeated := len(norms) - len(np.unique(norms)):
        notes.append(f"{repeated} steps were logged again; the last value of each stands")
    if negative := int(np.sum(norm < 0)):
        notes.append(f"{negative} norms are below 0, a mark for an overflow: taken as not finite")
    if without := int(np.sum(~has_norm)):
        notes.append(f"{without} of the steps have no norm: withheld or not finite")
    usable = np.isfinite(norm) & (norm >= 0)
    blank = np.full(len(step), math.nan)
    flags = {role: columns.get(role, blank) > 0 for role in ("clipped", "skipped", "nonfinite")}
    chunk = Chunk(
        step=step,
        batch=np.full(len(step), -1),
        grad_norm=np.where(usable, norm, math.nan),
        limit=columns.get("limit", blank),
        coef=columns.get("coef", blank),
        clipped_norm=columns.get("clipped_norm", blank),
        loss=columns.get("loss", blank),
        clipped=flags["clipped"],
        skipped=flags["skipped"],
        finite=~flags["nonfinite"] & (usable | ~has_norm),
        per_parameter={},
        columns=frozenset({"step", "finite", *columns} - {"nonfinite"}),
    )
    if limit is not None:
        chunk = chunk.with_limit(limit, f"{log.path}")
    header = TraceHeader(
        norm_type=chosen.norm_type,
        source=f"import:{log.kind}",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    return ImportedLog(log.path, header, chunk, chosen.taken, notes)


_HAPPENED = ("skipped", "nonfinite")
_INSTEAD = "norm on other steps"


def _marked(logged: Mapping[str, Series], role: str) -> Steps:
    """The steps at which something happened, which have a norm or not."""
    steps, values = logged.get(role, (np.empty(0, np.int64), np.empty(0)))
    return steps[values > 0]


def _collect(log: Log, chosen: Columns) -> tuple[dict[str, Series], list[str]]:
    """Steps and values of each column, in the order of the log, and remarks."""
    roles = {role: name for role, name in chosen.taken.items() if role != "step"}
    if chosen.instead is not None:
        roles[_INSTEAD] = chosen.instead
    steps = {role: array("q") for role in roles}
    values = {role: array("d") for role in roles}
    wanted = {*roles.values(), chosen.taken.get("step"), chosen.epoch} - {None}
    counted, with_norm = chosen.taken.get("step"), 0
    numbers = _Numbers()
    for where, row in log.rows([name for name in wanted if name is not None]):
        place = f"{log.path}, {where}"
        here = {role: row[name] for role, name in roles.items() if row.get(name) not in _BLANK}
        has_norm = "grad_norm" in here or _INSTEAD in here
        if counted is None:
            here = here if has_norm else {}
            step = with_norm
        elif here and (has_norm or row.get(counted) not in _BLANK):
            step = _step(row.get(counted), counted, place)
            if log.in_order:
                epoch = row.get(chosen.epoch) if chosen.epoch is not None else None
                step = numbers.number(step, _epoch(epoch), moves=has_norm)
        else:
            continue
        with_norm += has_norm
        for role, value in here.items():
            steps[role].append(step)
            values[role].append(_number(value, roles[role], place))
    notes = [f"{counted!r} begins again {numbers.restarts} times, as with each epoch: it goes on"]
    series = {role: (np.array(steps[role]), np.array(values[role])) for role in roles}
    if _INSTEAD in series:
        has, (other, instead) = series["grad_norm"], series.pop(_INSTEAD)
        lacking = ~np.isin(other, has[0])
        series["grad_norm"] = (
            np.concatenate([has[0], other[lacking]]),
            np.concatenate([has[1], instead[lacking]]),
        )
    return series, notes if numbers.restarts else []


class _Numbers:
    """Numbers of steps that go on where those of a log begin again with each epoch.

    They begin again where the number falls while the epoch rises; without a column of epochs,
    where it falls to the first number of the log. Elsewhere a lower number is one logged again.
    """

    def __init__(self) -> None:
        self.restarts = 0
        self._first = self._last = self._number = -1
        self._apart = 1
        self._epoch = math.nan
        self._begun = [(-math.inf, 0)]  # each epoch that began again, and what is added in it

    def number(self, step: int, epoch: float, *, moves: bool) -> int:
        """The number of a step.

        Args:
            step: Its number in the log.
            epoch: Its epoch; NaN if unknown.
            moves: Whether later steps are compared with it; not with those of an evaluation.
        """
        if moves:
            fell = self._last >= 0 and step < self._last
            known = not (math.isnan(epoch) or math.isnan(self._epoch))
            if known and epoch < self._epoch:  # a resumed run goes back to an earlier epoch
                while self._begun[-1][0] > epoch:
                    self._begun.pop()
            elif fell and (epoch > self._epoch if known else step <= self._first):
                self.restarts += 1
                self._begun.append(
                    (epoch if known else -math.inf, self._number + self._apart - step)
                )
            elif step > self._last >= 0:
                self._apart = step - self._last
            self._first = step if self._first < 0 else self._first
            self._last = step
            self._epoch = self._epoch if math.isnan(epoch) else epoch
        number = step + self._begun[-1][1]
        self._number = number if moves else self._number
        return number


_BLANK = (None, "")


def _epoch(value: Any) -> float:
    try:
        return math.nan if value in _BLANK else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _last_values(step: Steps, steps: Steps, values: Floats) -> Floats:
    """The last value on each of these rising steps; NaN where there is none."""
    unique, from_end = np.unique(steps[::-1], return_index=True)
    last = values[::-1][from_end]
    _, to, of = np.intersect1d(step, unique, assume_unique=True, return_indices=True)
    found = np.full(len(step), math.nan)
    found[to] = last[of]
    return found


def _step(value: Any, name: str, place: str) -> int:
    # ms-swift writes 10/500.
    number = _number(value.partition("/")[0] if isinstance(value, str) else value, name, place)
    if not 0 <= number < 2**53 or not number.is_integer():
        msg = f"{place}: the step {name!r} is {value!r}; allowed: whole numbers from 0."
        raise ConfigError(msg)
    return int(number)


def _number(value: Any, name: str, place: str) -> float:
    flags = {"true": 1.0, "false": 0.0}
    try:
        return flags[word] if (word := str(value).lower()) in flags else float(value)
    except (TypeError, ValueError, OverflowError):
        msg = (
            f"{place}: {name!r} is {value!r:.80}; allowed: a number. Name another column, or "
            "correct the log."
        )
        raise ConfigError(msg) from None
