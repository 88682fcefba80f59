"""The norms of a run that settings are fitted to, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gradclip.errors import ConfigError
from gradclip.tools.curves import Thinned
from gradclip.tools.replay import kept_steps, sparseness
from gradclip.tools.trace import StepSource

__all__ = ["Recent"]

_SAMPLE = 1 << 17
_LEAD = 300
_FEWEST, _MOST = 1000, 4096


class Recent:
    """Norms of a trace: an even sample of all of them, and the last ones without a gap.

    Attributes:
        wanted: The wanted share of steps to clip.
        norm_type: p of the norms.
        steps: How many steps have a norm above 0.
        nonfinite: How many steps weren't finite.
        sample: The even sample, float64, and the steps it is from.
        tail: The last norms, float64, and their steps.
        counted: Rates are of this many last steps; policies learn from those before.
    """

    def __init__(
        self,
        trace: StepSource,
        wanted: float,
        start: int,
        stop: int | None,
        progress: Callable[[float], None],
    ) -> None:
        self.wanted, self.norm_type = wanted, trace.header.norm_type
        # So many that the standard deviation is a tenth of the wanted rate.
        self._enough = int(min(_MOST, max(_FEWEST, 100 * (1 - wanted) / wanted)))
        steps, norms = Thinned(_SAMPLE, np.int64), Thinned(_SAMPLE, np.float64)
        tail = np.empty((2, 0))
        self.nonfinite = 0
        for chunk, _ in kept_steps(trace, start, stop, progress):
            used = chunk.grad_norm > 0
            self.nonfinite += int(np.isnan(chunk.grad_norm).sum())
            steps.add(chunk.step[used])
            norms.add(chunk.grad_norm[used])
            rows = np.stack([chunk.step[used].astype(np.float64), chunk.grad_norm[used]])
            tail = np.concatenate([tail, rows], axis=1)[:, -(self._enough + _LEAD) :]
        self.steps = norms.seen
        if self.steps < 200:
            msg = (
                f"{trace.path}: {self.steps} steps have a norm; at least 200 are needed, and "
                f"{math.ceil(20 / wanted)} are better. Record a longer run."
            )
            raise ConfigError(msg)
        self.sample_steps, self.sample = steps.values, norms.values
        self.tail_steps, self.tail = tail[0].astype(np.int64), tail[1]
        self.counted = min(self._enough, self.steps - max(100, self.steps // 5))

    @property
    def ends(self) -> tuple[int, int]:
        """The first and the last of the counted steps."""
        return int(self.tail_steps[-self.counted]), int(self.tail_steps[-1])

    def facts(self) -> list[str]:
        """What the run was like."""
        norms = self.tail[-self.counted :]
        early, late = np.array_split(norms, 2)
        change = float(np.median(late) / np.median(early)) - 1
        spikes = int((norms > 10 * np.median(norms)).sum())
        first, last = self.ends
        there = int(self.sample_steps[0]), int(self.sample_steps[-1])
        return [
            f"{self.steps} steps with a norm, {self.nonfinite} not finite.",
            *sparseness(*there, self.steps + self.nonfinite),
            f"In steps {first} to {last} the usual norm changed by {change:+.1%} from the first "
            f"half to the second, and {spikes} norms were over 10 times the usual one.",
        ]
