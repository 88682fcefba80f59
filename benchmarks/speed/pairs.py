"""Two calls in turn: their ratio, and how sure it is."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks.speed.rows import Row

Call = Callable[[], object]


class Effort(NamedTuple):
    """How long to measure.

    Attributes:
        pairs: At most so many pairs of calls for one row.
        seconds: No new pair after so long, once there are enough.
        least: Enough.
        quick: Whether gradients are to be small too, for trying the code.
    """

    pairs: int
    seconds: float
    least: int
    quick: bool


FULL = Effort(pairs=41, seconds=4.0, least=11, quick=False)
QUICK = Effort(pairs=5, seconds=0.5, least=2, quick=True)
WARM = 2


class Timed(NamedTuple):
    """Ours against a peer.

    Attributes:
        ours: Seconds of one call, the median.
        theirs: The same of the peer's.
        ratio: Median of the ratios of pairs.
        low: Lower end of the interval that holds this median with 95 % certainty.
        high: Its upper end.
    """

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float

    def row(
        self,
        part: str,
        what: str,
        peer: str,
        *,
        calls: int = 1,
        aim: float | None = None,
        bandwidth: float | None = None,
    ) -> Row:
        """As a row, in milliseconds; `calls` steps are one call."""
        ours, theirs = (1e3 * seconds / calls for seconds in (self.ours, self.theirs))
        interval = (self.ratio, self.low, self.high)
        return Row(part, what, peer, "ms", ours, theirs, *interval, aim, bandwidth)


def in_turn(
    ours: Call, theirs: Call, effort: Effort, before: Call = lambda: None, warm: int = WARM
) -> Timed:
    """Call both in turn, A B B A A B ..., and take the ratio of each pair.

    A machine whose speed drifts then changes both.

    Args:
        ours: Ours.
        theirs: The peer's.
        effort: How often.
        before: Called before each, outside the clock.
        warm: How many first pairs don't count.
    """
    found: list[tuple[float, float]] = []
    gc.collect()
    until = math.inf
    for index in range(-warm, effort.pairs):
        if index == 0:
            found.clear()
            until = time.perf_counter() + effort.seconds
        if index >= effort.least and time.perf_counter() > until:
            break
        if index % 2:
            second = _seconds(theirs, before)
            found.append((_seconds(ours, before), second))
        else:
            found.append((_seconds(ours, before), _seconds(theirs, before)))
    mine, others = zip(*found, strict=True)
    ratios = [a / b for a, b in found]
    return Timed(statistics.median(mine), statistics.median(others), *with_interval(ratios))


def _seconds(call: Call, before: Call) -> float:
    before()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the interval that holds it with at least 95 % certainty.

    The interval ends at two of the values: how many lie below the median is binomial, whatever
    they are distributed like. Below six values it can't be that certain, and spans them all.
    """
    ordered = sorted(values)
    count, drop, below = len(ordered), 0, 0.0
    while drop < count // 2:
        below += math.comb(count, drop) / 2**count  # P(at most `drop` values below the median)
        if 2 * below > 0.05:
            break
        drop += 1
    inside = ordered[max(drop - 1, 0) : count - max(drop - 1, 0)]
    return statistics.median(ordered), inside[0], inside[-1]


def read_seconds(size: int, times: int = 7) -> float:
    """Seconds in which this machine reads so many bytes from memory: the median of sums.

    Each thread adds up a part of a float32 buffer, which is at least 256 MB so that no cache
    holds it.
    """
    buffer = torch.ones(max(size, 1 << 28) // 4)
    buffer.sum()
    found = [_seconds(buffer.sum, lambda: None) for _ in range(times)]
    return statistics.median(found) * size / (buffer.numel() * 4)
