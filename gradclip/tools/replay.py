"""Running configurations over a trace: what they would have decided, without a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from gradclip.config import ClipConfig
from gradclip.errors import ConfigError
from gradclip.tools.curves import Curve, CurveBuilder, Steps, Thinned
from gradclip.tools.player import Player, refuse_unplayable
from gradclip.tools.trace import Chunk, StepSource, TraceHeader

__all__ = ["Outcome", "Replay", "kept_steps", "replay", "sparseness"]

_AT_ONCE = 4096
_MARKS = 5000
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """What one configuration would have done to all steps.

    Attributes:
        name: Of the configuration.
        steps: Steps with a gradient, up to where training would have ended.
        clipped: How many of them would have been scaled down.
        skipped: How many of them would have been withheld.
        clip_rate: clipped / steps.
        limit_first: The first limit; inf if there was none.
        limit_median: The median limit (of an even sample in a long trace).
        limit_last: The last limit.
        mean_coef: The mean of what gradients are multiplied by, over the steps not withheld.
        stopped_at: The step at which training would have ended with an error; None for none.
        why_stopped: That error.
        limit: The limit over the steps.
        clipped_steps: The clipped steps; an even choice of them where there are many.
        skipped_steps: The withheld steps, likewise.
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
        notes: Remarks for the reader, a sentence each.
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
    trace: StepSource,
    configs: Mapping[str, ClipConfig],
    *,
    start: int = 0,
    stop: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Replay:
    """Run configurations over the norms of a trace, as if each had been used in training.

    Every policy begins with nothing learnt at the first step that is read.

    Args:
        trace: A trace, or what a log gives. Its norms are those before clipping, so it doesn't
            matter what clipped them.
        configs: The configurations by the name to show.
        start: The first step.
        stop: The step after the last; None for all.
        progress: Called with the share of the file read so far.

    Raises:
        ConfigError: If a policy needs more than one norm a step, a norm of another p, or a loss
            that isn't there; or if no step is left.
    """
    for name, config in configs.items():
        refuse_unplayable(config, trace.header, name)
    watching = [n for n, c in configs.items() if any(p.watches_loss for p in c.policies)]
    scores = [_Score(name, config, trace.header) for name, config in configs.items()]
    norm = CurveBuilder()
    first = last = -1
    steps = nonfinite = left_out = 0
    for chunk, unknown in kept_steps(trace, start, stop, progress):
        left_out += unknown
        if not len(chunk):
            continue
        first, last = int(chunk.step[0]) if first < 0 else first, int(chunk.step[-1])
        steps += len(chunk)
        nonfinite += int(np.isnan(chunk.grad_norm).sum())
        norm.add(chunk.step, chunk.grad_norm)
        if watching:
            _refuse_lost_loss(chunk, watching[0])
        for score in scores:
            score.add(chunk)
    if not steps:
        end = "the end" if stop is None else str(stop)
        msg = f"{trace.path}: no step from {start} to {end} has a norm. Choose other steps."
        raise ConfigError(msg)
    notes = [
        "This is what would have happened to these gradients; a run that is clipped otherwise "
        "goes another way and has other gradients."
    ]
    notes += [f"Policies begin at step {first} with nothing learnt."] if first > 0 else []
    notes += sparseness(first, last, steps)
    notes += [f"{left_out} steps without a norm were left out."] if left_out else []
    outcomes = tuple(score.outcome() for score in scores)
    return Replay(first, last, steps, nonfinite, tuple(notes), norm.curve(), outcomes)


def kept_steps(
    trace: StepSource, start: int, stop: int | None, progress: Callable[[float], None] | None
) -> Iterator[tuple[Chunk, int]]:
    """The steps of a trace that have a norm, or are known not to be finite.

    A flight record is read from its last gap on: before it stand single steps that stood out.

    Args:
        trace: What to read.
        start: The first step.
        stop: The step after the last; None for all.
        progress: Called with the share of the file read so far.

    Yields:
        Such steps, and how many steps without a norm were left out between them.
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
        # A log's entry on several steps may hold the norm of those that were finite.
        norms = np.where(np.isfinite(chunk.grad_norm), chunk.grad_norm, np.nan)
        yield replace(chunk, grad_norm=norms).take(inside & known), int((inside & ~known).sum())
        if stop is not None and len(chunk) and chunk.step[-1] >= stop:
            return


def _after_last_gap(trace: StepSource) -> int:
    found, last = 0, -1
    for chunk in trace.chunks(_AT_ONCE):
        gap = chunk.last_gap(last)
        found = found if gap is None else int(chunk.step[gap])
        last = int(chunk.step[-1])
    return found


def sparseness(first: int, last: int, steps: int) -> Iterator[str]:
    """A remark where many steps between the first and the last have no norm."""
    if (apart := (last - first) / max(1, steps - 1)) >= 1.5:
        yield (
            f"There is a norm on one of {apart:.3g} steps; policies took them as steps in a row, "
            "so windows and warm-ups are that much longer than in training."
        )


class _Score:
    """What one configuration decided so far, in bounded memory."""

    def __init__(self, name: str, config: ClipConfig, header: TraceHeader) -> None:
        self._name, self._player = name, Player(config, header.norm_type)
        self._steps = self._clipped = self._skipped = self._taken = 0
        self._sum = 0.0
        self._first, self._last = math.inf, math.inf
        self._stopped: tuple[int, str] | None = None
        self._limit = CurveBuilder()
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
        self._steps += len(step)
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
