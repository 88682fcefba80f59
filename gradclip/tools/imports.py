"""From a log of norms to a trace: which column means what, and which value of a step counts."""

from __future__ import annotations

import difflib
import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from gradclip.errors import ConfigError
from gradclip.tools.curves import Floats, Steps
from gradclip.tools.logs import Log, open_log
from gradclip.tools.trace import Chunk, TraceHeader

__all__ = ["ImportedLog", "import_log"]

Series = tuple[Steps, Floats]

_OURS = re.compile(r"(?:.*[/ ])?clip/grad_norm(?:/optimizer\d+)?")
_NORM = re.compile(
    r"(?:.*[/ .])?(?:(?:train(?:ing)?|total|global|l2)[_ -])*"
    r"(?:grad(?:ient)?s?[_ -]?(?:(?P<p>\d+(?:\.\d+)?|inf|l2)[_ -])?norm|gnorm|total_norm)"
    r"(?:[_ -](?:step|total|global|l2))*(?:/(?:total|global|all|optimizer\d+))?",
    re.IGNORECASE,
)
_LOSS = re.compile(r"(?:train(?:ing)?[/_ -])?loss(?:_step)?", re.IGNORECASE)
_STEPS = (
    "trainer/global_step",
    "train/global_step",
    "global_step",
    "optimizer_step",
    "step",
    "steps",
    "_step",
    "iteration",
    "iter",
)
_BESIDE = ("limit", "coef", "clipped_norm", "clipped", "skipped")


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

    def describe(self) -> str:
        """A summary of a few lines."""
        chunk = self.chunk
        lost = int(np.sum(~chunk.finite))
        lines = [f"{len(chunk)} steps from {chunk.step[0]} to {chunk.step[-1]}, {lost} not finite"]
        lines += [f"  {role}: {name}" for role, name in self.taken.items()]
        return "\n".join([*lines, *(f"Note: {note}." for note in self.notes)])

    def rows(self) -> Iterator[dict[str, Any]]:
        """The steps as `write_trace` takes them."""
        names = ["step", "finite", *(name for name in self.taken if name != "step")]
        columns = [getattr(self.chunk, name).tolist() for name in names]
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


def import_log(
    path: str | Path,
    *,
    norm_column: str | None = None,
    step_column: str | None = None,
    limit_column: str | None = None,
    loss_column: str | None = None,
) -> ImportedLog:
    """Read norms, and what was logged with them, from a log.

    Only steps with a norm are taken, under their numbers in the log. If a step was logged several
    times, as in a resumed run, its last value counts.

    Args:
        path: A file, or a folder that holds one log.
        norm_column: Column of the norm before clipping; None looks for a usual name.
        step_column: Column of the step; None looks for a usual name.
        limit_column: Column of the limit; None takes `clip/limit` if there is one.
        loss_column: Column of the loss; None takes a training loss if there is one.

    Raises:
        ConfigError: If the log can't be read, its names don't tell which column is meant, or a
            value isn't a number.
    """
    log = open_log(path)
    asked = {
        "grad_norm": norm_column,
        "step": step_column,
        "limit": limit_column,
        "loss": loss_column,
    }
    taken, notes = _choose(log, {role: name for role, name in asked.items() if name is not None})
    logged = _collect(log, taken)
    steps = logged["grad_norm"][0]
    if not len(steps):
        msg = (
            f"{log.path}: {taken['grad_norm']!r} has no values. Name another: "
            "gradclip import LOG --norm-column NAME."
        )
        raise ConfigError(msg)
    step = np.unique(steps)
    columns = {role: _on(step, *series) for role, series in logged.items()}
    norm = columns["grad_norm"]
    if repeated := len(steps) - len(step):
        notes.append(f"{repeated} steps were logged again; the last value of each stands")
    if negative := int(np.sum(norm < 0)):
        notes.append(f"{negative} norms are below 0, a mark for an overflow: taken as not finite")
    finite = np.isfinite(norm) & (norm >= 0)
    blank = np.full(len(step), math.nan)
    given: dict[str, Any] = {
        **{name: columns.get(name, blank) for name in ("limit", "coef", "clipped_norm", "loss")},
        **{name: columns.get(name, blank) > 0 for name in ("clipped", "skipped")},
    }
    chunk = Chunk(
        step=step,
        batch=np.full(len(step), -1),
        grad_norm=np.where(finite, norm, math.nan),
        finite=finite,
        **given,
        per_parameter={},
        columns=frozenset({"step", "finite", *columns}),
    )
    header = TraceHeader(
        norm_type=_norm_type(taken["grad_norm"]),
        source=f"import:{log.kind}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return ImportedLog(log.path, header, chunk, taken, notes)


def _choose(log: Log, asked: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Column of the log by column of the trace, and what to say about it."""
    for role, name in asked.items():
        if name not in log.names:
            close = difflib.get_close_matches(name, log.names, n=3, cutoff=0.3)
            near = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            msg = f"{log.path}: there is no column {name!r} for {role}; {near}{_listed(log)}"
            raise ConfigError(msg)
    norm = asked.get("grad_norm") or _find_norm(log)
    run = norm[: norm.rfind(" - ") + 3] if " - " in norm else ""
    taken = {"grad_norm": norm, **asked}
    notes = []
    if "step" not in taken:
        lower = {name.lower(): name for name in reversed(log.names)}
        found = [lower[name] for name in _STEPS if name in lower]
        if found:
            taken["step"] = found[0]
        else:
            notes.append("no column names the step: rows with a norm are counted from 0")
    if _OURS.fullmatch(norm):
        beside = {role: norm.replace("clip/grad_norm", f"clip/{role}") for role in _BESIDE}
        taken = {**{role: name for role, name in beside.items() if name in log.names}, **taken}
        largest = norm.replace("clip/grad_norm", "clip/grad_norm_max")
        if largest in log.names:
            notes.append(
                f"{norm} is a mean over the steps between two entries; {largest} is their largest. "
                "Single steps stand in a flight record"
            )
    elif (limit := f"{run}clip/limit") in log.names:
        taken.setdefault("limit", limit)
    if "loss" not in taken:
        losses = [n for n in log.names if n.startswith(run) and _LOSS.fullmatch(n[len(run) :])]
        losses = [n for n in losses if n[len(run) :] == "loss"] or losses
        if len(losses) == 1:
            taken["loss"] = losses[0]
        elif losses:
            notes.append(f"no loss is taken, since several may be meant: {', '.join(losses)}")
    return taken, notes


def _find_norm(log: Log) -> str:
    found = [name for name in log.names if _OURS.fullmatch(name)]
    found = found or [name for name in log.names if _NORM.fullmatch(name)]
    if len(found) == 1:
        return found[0]
    if found:
        msg = (
            f"{log.path}: several columns may be the gradient norm: "
            f"{', '.join(map(repr, found))}. Name one and make a trace of it: gradclip import "
            f"LOG --norm-column {found[0]!r}."
        )
    else:
        msg = (
            f"{log.path}: no column is named like a gradient norm. Name it and make a trace of it: "
            f"gradclip import LOG --norm-column NAME; {_listed(log)}"
        )
    raise ConfigError(msg)


def _listed(log: Log) -> str:
    more = f" and {len(log.names) - 30} more" if len(log.names) > 30 else ""
    return f"found: {', '.join(map(repr, log.names[:30])) or 'no columns'}{more}."


def _collect(log: Log, taken: Mapping[str, str]) -> dict[str, Series]:
    """Steps and values of each column, in the order of the log."""
    roles = {role: name for role, name in taken.items() if role != "step"}
    steps = {role: array("q") for role in roles}
    values = {role: array("d") for role in roles}
    for where, row in log.rows(set(taken.values())):
        place = f"{log.path}, {where}"
        here = {role: row[name] for role, name in roles.items() if row.get(name) not in (None, "")}
        if "step" not in taken:
            here = here if "grad_norm" in here else {}
            step = len(steps["grad_norm"])
        elif here:
            step = _step(row.get(taken["step"]), taken["step"], place)
        for role, value in here.items():
            steps[role].append(step)
            values[role].append(_number(value, roles[role], place))
    return {role: (np.array(steps[role]), np.array(values[role])) for role in roles}


def _on(step: Steps, steps: Steps, values: Floats) -> Floats:
    """The last value on each of these rising steps; NaN where there is none."""
    unique, from_end = np.unique(steps[::-1], return_index=True)
    last = values[::-1][from_end]
    _, to, of = np.intersect1d(step, unique, assume_unique=True, return_indices=True)
    found = np.full(len(step), math.nan)
    found[to] = last[of]
    return found


def _step(value: Any, name: str, place: str) -> int:
    number = _number(value, name, place)
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


def _norm_type(name: str) -> float:
    """The p of the norms, from a name such as `grad_2.0_norm_total`; else 2."""
    match = _NORM.fullmatch(name)
    said = match.group("p") if match else None
    return float(said.lower().replace("l2", "2")) if said else 2.0
