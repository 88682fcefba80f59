"""What clipping did in a run: how often, to which steps, and which parameters made them large."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradclip.records.culprits import not_finite, shares
from gradclip.tools.charts import Clipping, Counts
from gradclip.tools.curves import Curve, CurveBuilder, Steps, Thinned
from gradclip.tools.run import Run
from gradclip.tools.trace import Chunk

__all__ = ["Report", "Spike", "summarize", "with_clipped"]

MOST_SPIKES = 16
MOST_MARKS = 5000


@dataclass(frozen=True)
class Spike:
    """A step that stood out.

    Attributes:
        step: The optimizer step.
        batch: The batch or micro-batch; None if unknown.
        grad_norm: Before clipping; NaN if not finite.
        limit: Infinity if there was none, NaN if unknown.
        coef: What gradients were multiplied by; NaN if unknown.
        clipped: Whether they were changed.
        skipped: Whether the step was withheld.
        finite: Whether all gradients were finite.
        shares: Parameters and their shares of the norm, largest first; empty if unknown.
        not_finite: Parameters that weren't finite, nearest the loss first.
    """

    step: int
    batch: int | None
    grad_norm: float
    limit: float
    coef: float
    clipped: bool
    skipped: bool
    finite: bool
    shares: tuple[tuple[str, float], ...]
    not_finite: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """A summary of a run; its size doesn't depend on the run's length.

    A flight record holds the last steps and single steps before them that stood out. Curves and
    counts are of the last steps then; `worst` and `broken` are of all steps.

    Attributes:
        run: What was read.
        first: Number of the first step.
        last: Number of the last step.
        clipping: Counts, and over the steps the limit and what was clipped and withheld.
        nonfinite: How many steps were not finite.
        norm: The norm before clipping.
        loss: The loss; None if unknown.
        nonfinite_steps: Int64; an even choice of them where there are many.
        largest: The step with the largest finite norm, if any.
        worst: Steps with known norms of their parameters, else those with the largest norms;
            largest first.
        broken: The first steps that were not finite.
    """

    run: Run
    first: int
    last: int
    clipping: Clipping
    nonfinite: int
    norm: Curve
    loss: Curve | None
    nonfinite_steps: Steps
    largest: Spike | None
    worst: tuple[Spike, ...]
    broken: tuple[Spike, ...]


def summarize(run: Run, progress: Callable[[float], None] | None = None) -> Report | None:
    """Read a run once, in bounded memory.

    Args:
        run: Its chunks are read once.
        progress: Called with the share of the file read so far.

    Returns:
        None if the run has no step.
    """
    norm, limit, loss = (CurveBuilder() for _ in range(3))
    marks = [Thinned(MOST_MARKS, np.int64) for _ in range(3)]
    totals = np.zeros(4, dtype=np.int64)
    columns: set[str] = set()
    spikes = _Spikes(run.header.norm_type)
    first = last = -1
    for chunk in map(with_clipped, run.chunks()):
        if progress is not None:
            progress(chunk.bytes_read / max(1, run.size_hint))
        if not len(chunk):
            continue
        spikes.add(chunk)
        if first < 0 and run.header.source == "recorder":
            # Before the last gap, a flight record holds single steps that stood out.
            chunk = chunk.take(slice(chunk.last_gap(int(chunk.step[0])), None))
        first, last = int(chunk.step[0]) if first < 0 else first, int(chunk.step[-1])
        columns |= chunk.columns
        for curve, values in ((norm, chunk.grad_norm), (limit, chunk.limit), (loss, chunk.loss)):
            curve.add(chunk.step, values)
        happened = (chunk.clipped, chunk.skipped, ~chunk.finite)
        for mark, which in zip(marks, happened, strict=True):
            mark.add(chunk.step[which])
        totals += [len(chunk), *(int(which.sum()) for which in happened)]
    if first < 0:
        return None
    steps, clipped, skipped, nonfinite = totals.tolist()
    clipped_steps, skipped_steps, nonfinite_steps = (mark.values for mark in marks)
    return Report(
        run=run,
        first=first,
        last=last,
        clipping=Clipping(
            name="gradclip",
            counts=Counts(steps, clipped, skipped),
            limit=limit.curve() if "limit" in columns else None,
            clipped=clipped_steps if "clipped" in columns else None,
            skipped=skipped_steps if columns & {"clipped", "skipped"} else None,
        ),
        nonfinite=nonfinite,
        norm=norm.curve(),
        loss=loss.curve() if "loss" in columns else None,
        nonfinite_steps=nonfinite_steps,
        largest=spikes.largest,
        worst=spikes.worst,
        broken=tuple(spikes.broken),
    )


def with_clipped(chunk: Chunk) -> Chunk:
    """In a log of norms and limits only, the steps with a norm above the limit were clipped."""
    if "clipped" in chunk.columns or "limit" not in chunk.columns:
        return chunk
    clipped = (chunk.grad_norm > chunk.limit) & ~chunk.skipped
    return replace(chunk, clipped=clipped, columns=chunk.columns | {"clipped"})


class _Spikes:
    """The largest norms so far, and the largest of those whose parameters are known."""

    def __init__(self, norm_type: float) -> None:
        self._norm_type = norm_type
        self._all: list[Spike] = []
        self._named: list[Spike] = []
        self.broken: list[Spike] = []

    def add(self, chunk: Chunk) -> None:
        ranked = np.where(np.isfinite(chunk.grad_norm), chunk.grad_norm, -math.inf)
        named = np.flatnonzero(np.isin(chunk.step, list(chunk.per_parameter)))
        self._keep(self._all, chunk, np.argsort(ranked)[-MOST_SPIKES:])
        self._keep(self._named, chunk, named[np.argsort(ranked[named])][-MOST_SPIKES:])
        room = MOST_SPIKES - len(self.broken)
        self.broken += [self._spike(chunk, i) for i in np.flatnonzero(~chunk.finite)[:room]]

    @property
    def largest(self) -> Spike | None:
        return self._all[0] if self._all else None

    @property
    def worst(self) -> tuple[Spike, ...]:
        return tuple(self._named or self._all)

    def _keep(self, kept: list[Spike], chunk: Chunk, indices: NDArray[np.intp]) -> None:
        new = [self._spike(chunk, index) for index in indices if chunk.finite[index]]
        new = [spike for spike in new if not math.isnan(spike.grad_norm)]
        kept[:] = heapq.nlargest(MOST_SPIKES, kept + new, key=lambda spike: spike.grad_norm)

    def _spike(self, chunk: Chunk, index: np.intp) -> Spike:
        step, batch = int(chunk.step[index]), int(chunk.batch[index])
        norms = chunk.per_parameter.get(step, {})
        return Spike(
            step=step,
            batch=None if batch < 0 else batch,
            grad_norm=float(chunk.grad_norm[index]),
            limit=float(chunk.limit[index]),
            coef=float(chunk.coef[index]),
            clipped=bool(chunk.clipped[index]),
            skipped=bool(chunk.skipped[index]),
            finite=bool(chunk.finite[index]),
            shares=tuple(shares(norms, self._norm_type)),
            not_finite=tuple(not_finite(norms)),
        )
