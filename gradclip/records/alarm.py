"""Norms that rise, norms that don't come back, and runs that withhold too many steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from gradclip.records.record import COLUMNS

if TYPE_CHECKING:
    from gradclip.config import AlarmConfig

__all__ = ["Spike", "SpikeDetector"]

_COLUMNS = [
    COLUMNS.index(name) for name in ("step", "grad_norm", "has_gradient", "skipped", "nonfinite")
]
_SLACK = 1.0  # half of the shift to find, of two deviations (Montgomery, section 9.1)
_MOST = 4.0  # what a single step counts for, so that one spike alone is no alarm
_SPAN = 200  # steps that the usual norm is a mean over
_LEAST = 0.1  # a deviation of the log norm; norms that hardly vary may vary by so much
_STEPS = 1000  # over which withheld steps are counted


@dataclass(frozen=True, slots=True)
class Spike:
    """What an alarm tells: plain numbers, the same on every rank.

    Attributes:
        kind: "rise": norms have been above the usual one for some steps (early warning).
            "lingering": after a rise they didn't come back. "withheld": too many of the last
            1000 steps were withheld.
        step: Where it began, counted as in a flight record: the first step of the rise, or the
            first of the withheld ones.
        norm: The gradient norm of the last step that was looked at, before clipping.
        usual: The usual one before the rise, a geometric mean; NaN where it isn't known yet.
        checkpoint: The newest checkpoint from before `step`, of those that the clipper was told
            of (`saved_to`) and this process can still see; None if there is none.
    """

    kind: Literal["rise", "lingering", "withheld"]
    step: int
    norm: float
    usual: float
    checkpoint: str | None = None

    def __str__(self) -> str:
        """What happened, as part of a message."""
        norms = f"norm {self.norm:.4g}, usually {self.usual:.4g}"
        saved = "no checkpoint from before is known"
        if self.checkpoint is not None:
            saved = f"the last checkpoint from before is {self.checkpoint}"
        return f"{_HAPPENED[self.kind].format(step=self.step)} ({norms}); {saved}."


_HAPPENED = {
    "rise": "gradient norms have risen since step {step}",
    "lingering": "gradient norms rose at step {step} and haven't come back",
    "withheld": f"too many of the last {_STEPS} steps were withheld, since step {{step}}",
}


class SpikeDetector:
    """Looks at norms in order, on the host, and says where one of three things is the matter.

    A one-sided CUSUM (Page, "Continuous inspection schemes", Biometrika 1954) on the logarithm of
    the norm: with z the deviations of a step above the usual norm, at most 4,
    `score = max(0, score + z - 1)`, and an alarm begins where the score is above `alarm.rise`.
    It began after the last step whose score was 0, and is over when the score is 0 again; after
    `alarm.lingers` steps it is told that it lingers, and what is usual is learnt anew.

    The usual norm and the deviation are running mean and deviation of log norms over some 200
    steps, which learn only while no alarm is up. Only norms of steps that are finite, taken and
    not 0 count.

    For independent Gaussian log norms a false alarm comes once in 15 000 steps at `rise` 4, and in
    800 000 at 6; at 8, the default, in 46 million (Siegmund's approximation, as in Montgomery,
    "Introduction to Statistical Quality Control", chapter 9: (exp(2b) - 2b - 1) / 2 with
    b = rise + 1.166). With tails as heavy as Student's t with 5 degrees of freedom it is one in
    1.5 million, measured over 48 million.

    Args:
        config: When to tell.
    """

    def __init__(self, config: AlarmConfig) -> None:
        self._config = config
        self._counted = 0
        self._withheld: deque[tuple[int, int]] = deque()  # number among those counted, and step
        self.learn_anew()

    def learn_anew(self) -> None:
        """Forget what is usual, as where parameters are others now."""
        self._known = 0
        self._mean = self._variance = self._score = 0.0
        self._began = 0
        self._up_since: int | None = None

    def follow(self, rows: Tensor) -> list[Spike]:
        """Take in steps.

        Args:
            rows: Float64 of shape (steps, columns), in order, as in `COLUMNS`.

        Returns:
            What was found in them, in order, without a checkpoint.
        """
        return [
            spike
            for step, norm, has_gradient, skipped, nonfinite in rows[:, _COLUMNS].tolist()
            if has_gradient or skipped
            for spike in self._see(
                int(step), norm, skipped=bool(skipped), counts=not (skipped or nonfinite)
            )
        ]

    def _see(self, step: int, norm: float, *, skipped: bool, counts: bool) -> Iterator[Spike]:
        self._counted += 1
        if skipped:
            yield from self._see_withheld(step, norm)
        if not counts or norm <= 0:
            return
        log, usual = math.log(norm), self._usual
        if self._known < self._config.warmup_steps:
            self._learn(log)
            return
        z = min((log - self._mean) / self._deviation, _MOST)
        if self._score == 0:
            self._began = step
        score = max(0.0, self._score + z - _SLACK)
        if self._up_since is None:
            self._score = score
            if score <= self._config.rise:
                self._learn(log)
                return
            self._up_since = step
            yield Spike("rise", self._began, norm, usual)
            return
        self._score = min(score, self._config.rise)  # else a long alarm would be long over
        if score == 0:
            self._up_since = None
        elif step - self._up_since >= self._config.lingers:
            yield Spike("lingering", self._began, norm, usual)
            self.learn_anew()

    def _see_withheld(self, step: int, norm: float) -> Iterator[Spike]:
        withheld = self._withheld
        withheld.append((self._counted, step))
        while withheld[0][0] <= self._counted - _STEPS:
            withheld.popleft()
        if len(withheld) > self._config.withheld * _STEPS:
            yield Spike("withheld", withheld[0][1], norm, self._usual)
            withheld.clear()

    @property
    def _usual(self) -> float:
        return math.exp(self._mean) if self._known else math.nan

    @property
    def _deviation(self) -> float:
        return max(math.sqrt(self._variance), _LEAST)

    def _learn(self, log: float) -> None:
        """Bring mean and variance up to date: of all steps at first, then of the last ones."""
        self._known += 1
        weight = max(1 / self._known, 1 / _SPAN)
        change = log - self._mean
        if self._known > self._config.warmup_steps:
            most = _MOST * self._deviation
            change = min(max(change, -most), most)
        self._mean += weight * change
        self._variance = (1 - weight) * (self._variance + weight * change * change)
