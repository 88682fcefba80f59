"""Running configurations over a trace: what they would have decided, without a model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradclip.config import ClipConfig
from gradclip.errors import ConfigError
from gradclip.tools.curves import Curve, CurveBuilder, Thinned
from gradclip.tools.player import Player, refuse_unplayable
from gradclip.tools.trace import Chunk, Trace, TraceHeader

__all__ = [
    "Outcome",
    "Replay",
    "kept_steps",
    "name_files",
    "parse_steps",
    "replay",
    "select",
    "sparseness",
]

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]

_AT_ONCE = 4096
_MARKS = 5000
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """What one configuration would have done to all steps.

    Attributes:
        name: Of the configuration.
        steps: Steps with a gradient, up to where it would have stopped.
        clipped: How many of them it would have scaled down.
        skipped: How many it would have withheld.
        clip_rate: clipped / steps.
        limit_first: Its first limit; inf if it never had one.
        limit_median: The middle of its limits, of an even sample where there are many.
        limit_last: Its last limit.
        mean_coef: What gradients would have been multiplied by, on average of steps not withheld.
        stopped_at: The step at which training would have ended with an error; None for none.
        why_stopped: That error.
        limit: Its limit over the steps.
        clipped_steps: Steps that were clipped; where there are many, evenly chosen of them.
        skipped_steps: Steps that were withheld, likewise.
    """

    name: str
    steps: int
    clipped: int
    skipped: int
    clip_rate: float
    limit_first: float
    limit_median: float
    limit_last: float
    mean_coef: float
    stopped_at: int | None
    why_stopped: str | None
    limit: Curve = field(repr=False)
    clipped_steps: Steps = field(repr=False)
    skipped_steps: Steps = field(repr=False)


@dataclass(frozen=True)
class Replay:
    """Configurations side by side, over the same steps.

    Attributes:
        first: Number of the first step.
        last: Number of the last step.
        steps: How many steps were replayed.
        nonfinite: How many of them weren't finite.
        notes: What a reader has to know.
        norm: The norm over the steps.
        outcomes: One for each configuration.
    """

    first: int
    last: int
    steps: int
    nonfinite: int
    notes: tuple[str, ...]
    norm: Curve = field(repr=False)
    outcomes: tuple[Outcome, ...]


def replay(
    trace: Trace,
    configs: Mapping[str, ClipConfig],
    *,
    start: int = 0,
    stop: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Replay:
    """Run configurations over the norms of a trace, as if each had been there in training.

    Every policy begins with nothing learnt at the first step that is read.

    Args:
        trace: Its norms are those before clipping, so it doesn't matter what clipped them.
        configs: By the name to show.
        start: The first step to take.
        stop: The first step not to take any more; None for all.
        progress: Called with the share of the file that was read so far.

    Raises:
        ConfigError: If a policy needs more than one norm a step, a norm of another p, or a loss
            that isn't there; or if no step is left.
    """
    for name, config in configs.items():
        refuse_unplayable(config, trace.header, name)
    watching = [n for n, c in configs.items() if any(p.watches_loss for p in c.policies)]
    scores = [_Score(name, config, trace.header) for name, config in configs.items()]
    survey = _Survey()
    for chunk in kept_steps(trace, start, stop, survey.unknown, progress):
        survey.add(chunk)
        if watching:
            _refuse_lost_loss(chunk, watching[0])
        for score in scores:
            score.add(chunk)
    if not survey.steps:
        end = "the end" if stop is None else str(stop)
        msg = f"{trace.path}: no step from {start} to {end} has a norm. Choose other steps."
        raise ConfigError(msg)
    return Replay(
        first=survey.first,
        last=survey.last,
        steps=survey.steps,
        nonfinite=survey.nonfinite,
        notes=tuple(survey.notes()),
        norm=survey.norm.curve(),
        outcomes=tuple(score.outcome() for score in scores),
    )


def parse_steps(text: str) -> tuple[int, int | None]:
    """The first step and the one after the last (None for all) from "A:B", "A:" or ":B".

    Raises:
        ConfigError: If it is none of them.
    """
    found = re.fullmatch(r"(\d*):(\d*)", text.strip())
    if found is None:
        msg = f"--steps is {text!r}; allowed: A:B, A: or :B with numbers of steps, as 1000:2000."
        raise ConfigError(msg)
    first, stop = found.groups()
    return int(first or 0), int(stop) if stop else None


def name_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Short names for files: without folder and suffix where those tell them apart."""
    stems = [path.stem for path in paths]
    return {str(p) if stems.count(p.stem) > 1 else p.stem: p for p in paths}


def kept_steps(
    trace: Trace,
    start: int,
    stop: int | None,
    unknown: Callable[[int], None],
    progress: Callable[[float], None] | None,
) -> Iterator[Chunk]:
    """The steps of a trace from `start` to `stop` that have a norm, or are known not to be finite.

    Of a flight record the last ones in a row, without the few before them that stood out.

    Args:
        trace: What to read.
        start: The first step.
        stop: The one after the last; None for all.
        unknown: Called with the number of steps in between that were left out.
        progress: Called with the share of the file that was read so far.
    """
    if trace.header.source == "recorder":
        start = max(start, _after_last_gap(trace))
    for chunk in trace.chunks(_AT_ONCE):
        if progress is not None:
            progress(chunk.bytes_read / max(1, trace.size_hint))
        inside = chunk.step >= start
        if stop is not None:
            inside &= chunk.step < stop
        known = ~(np.isnan(chunk.grad_norm) & chunk.finite)
        unknown(int((inside & ~known).sum()))
        taken = inside & known
        if taken.any():
            norms = np.where(chunk.finite, chunk.grad_norm, np.nan)
            yield select(replace(chunk, grad_norm=norms), taken)
        if stop is not None and len(chunk) and chunk.step[-1] >= stop:
            return


def select(chunk: Chunk, which: slice | NDArray[np.bool_]) -> Chunk:
    """Some of the steps of a chunk."""
    columns = {f.name: getattr(chunk, f.name) for f in fields(chunk)}
    chosen: dict[str, Any] = {
        name: v[which] for name, v in columns.items() if isinstance(v, np.ndarray)
    }
    return replace(chunk, **chosen)


def _after_last_gap(trace: Trace) -> int:
    found, last = 0, -1
    for chunk in trace.chunks(_AT_ONCE):
        steps = np.concatenate([[last], chunk.step])
        gaps = np.flatnonzero(np.diff(steps) > 1)
        if len(gaps):
            found = int(steps[gaps[-1] + 1])
        last = int(steps[-1])
    return found


def sparseness(first: int, last: int, steps: int) -> Iterator[str]:
    """What a reader has to know where steps are missing between the first and the last."""
    if (apart := (last - first + 1) / steps) >= 1.5:
        yield (
            f"There is a norm on one of {apart:.3g} steps; policies took them as steps in a row, "
            "so windows and warm-ups are that much longer than in training."
        )


class _Survey:
    """What the steps themselves are like."""

    def __init__(self) -> None:
        self.first = self.last = -1
        self.steps = self.nonfinite = self._left_out = 0
        self.norm = CurveBuilder("grad_norm")

    def unknown(self, count: int) -> None:
        self._left_out += count

    def add(self, chunk: Chunk) -> None:
        self.first = int(chunk.step[0]) if self.first < 0 else self.first
        self.last = int(chunk.step[-1])
        self.steps += len(chunk)
        self.nonfinite += int(np.isnan(chunk.grad_norm).sum())
        self.norm.add(chunk.step, chunk.grad_norm)

    def notes(self) -> Iterator[str]:
        yield (
            "This is what would have happened to these gradients; a run that is clipped otherwise "
            "goes another way and has other gradients."
        )
        if self.first > 0:
            yield f"Policies begin at step {self.first} with nothing learnt."
        yield from sparseness(self.first, self.last, self.steps)
        if self._left_out:
            yield f"{self._left_out} steps without a norm were left out."


class _Score:
    """One configuration, and what it decided so far, in bounded memory."""

    def __init__(self, name: str, config: ClipConfig, header: TraceHeader) -> None:
        self._name, self._player = name, Player(config, header.norm_type)
        self._steps = self._clipped = self._skipped = self._taken = 0
        self._sum = 0.0
        self._first, self._last = math.inf, math.inf
        self._stopped: tuple[int, str] | None = None
        self._limit = CurveBuilder(name)
        self._limits = Thinned(_SAMPLE, np.float64)
        self._marks = Thinned(_MARKS, np.int64), Thinned(_MARKS, np.int64)

    def add(self, chunk: Chunk) -> None:
        if self._stopped is not None:
            return
        made = self._player.decide(chunk.step, chunk.grad_norm, chunk.loss)
        step = chunk.step[: len(made.limit)]
        if made.stopped is not None:
            self._stopped = int(chunk.step[len(step)]), made.stopped
        coef = made.coef[:, 0]
        clipped = coef < 1
        limited = made.limit[np.isfinite(made.limit)]
        if len(limited) and self._first == math.inf:
            self._first = float(limited[0])
        if len(step):
            self._last = float(made.limit[-1])
        self._steps += int((chunk.grad_norm[: len(step)] != 0).sum())
        self._clipped += int(clipped.sum())
        self._skipped += int(made.skipped.sum())
        self._taken += int((~made.skipped).sum())
        self._sum += float(coef[~made.skipped].sum())
        self._limit.add(step, made.limit)
        self._limits.add(limited)
        for marks, which in zip(self._marks, (clipped, made.skipped), strict=True):
            marks.add(step[which])

    def outcome(self) -> Outcome:
        limits = self._limits.values
        stopped_at, why = self._stopped or (None, None)
        return Outcome(
            name=self._name,
            steps=self._steps,
            clipped=self._clipped,
            skipped=self._skipped,
            clip_rate=self._clipped / max(1, self._steps),
            limit_first=self._first,
            limit_median=float(np.median(limits)) if len(limits) else math.inf,
            limit_last=self._last,
            mean_coef=self._sum / max(1, self._taken),
            stopped_at=stopped_at,
            why_stopped=why,
            limit=self._limit.curve(),
            clipped_steps=self._marks[0].values,
            skipped_steps=self._marks[1].values,
        )


def _refuse_lost_loss(chunk: Chunk, name: str) -> None:
    lost = np.isnan(chunk.loss) & chunk.finite
    if lost.any():
        msg = (
            f"{name}: a policy watches the loss, and step {chunk.step[lost][0]} of the trace has "
            "none. Set watch to 'norm', or record the loss too."
        )
        raise ConfigError(msg)
