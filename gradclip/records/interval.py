"""The steps between two log entries, on the host: what to log of them, and what to warn of."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradclip.records.record import COLUMNS

if TYPE_CHECKING:
    from gradclip.config import LogConfig

__all__ = ["Interval", "Streaks"]

_logger = logging.getLogger("gradclip")
_MEANS = ("grad_norm", "limit", "coef", "clipped_norm")
_COUNTS = ("has_gradient", "clipped", "skipped", "nonfinite")


class Interval:
    """Sums over the steps since the last log entry.

    Args:
        keeps: Keep the norm of every step, for a histogram.
        drops: Count micro-batches that were left out.

    Attributes:
        norms: Those that are kept, of finite steps.
    """

    def __init__(self, *, keeps: bool, drops: bool) -> None:
        self.norms: list[float] = []
        self._keeps, self._drops = keeps, drops
        self.rows = 0
        self._counted = (*_COUNTS, "dropped") if drops else _COUNTS
        self._counts = torch.zeros(len(self._counted), dtype=torch.float64, device="cpu")
        self._means = torch.zeros(2, len(_MEANS), dtype=torch.float64, device="cpu")
        self._updates = torch.zeros(3, dtype=torch.float64, device="cpu")
        self._largest = math.nan
        self._clip_rate = 0.0
        self._earlier: dict[str, tuple[float, float]] = {}
        self.follow(())

    def follow(self, names: Sequence[str]) -> None:
        """Sum the norms of these keys beside the rows, from the next step on.

        What was summed of others before is part of this interval, too.
        """
        self._earlier = self._totals() if self.rows else {}
        self._names = names
        self._sums = torch.zeros(1 + len(names), dtype=torch.float64, device="cpu")

    def add(self, rows: Tensor, sums: Tensor, updates: Tensor) -> None:
        """Take in steps.

        Args:
            rows: Float64 of shape (steps, columns), in order, as in `COLUMNS`.
            sums: Float64 of shape (1 + names,): the number of finite steps with a gradient, and
                the sum of each norm over those.
            updates: Float64 of shape (3,): the number of steps whose update was measured, and the
                sums of the norms of the update and of the parameters before it.
        """
        self._updates += updates
        if not len(rows):
            return
        self.rows += len(rows)
        self._counts += rows[:, [COLUMNS.index(name) for name in self._counted]].sum(0)
        steady = (_column(rows, "has_gradient") != 0) & (_column(rows, "nonfinite") == 0)
        kept = rows[steady][:, [COLUMNS.index(name) for name in _MEANS]]
        known = torch.isfinite(kept)  # a limit may be none, a clipped norm may be unknown
        self._means += torch.stack([torch.where(known, kept, 0.0).sum(0), known.sum(0)])
        if self._keeps:
            self.norms += kept[:, 0].tolist()
        if len(kept):
            self._largest = max(float(kept[:, 0].max()), self._largest)
        self._clip_rate = float(_column(rows, "clip_rate")[-1])
        self._sums += sums

    def next(self) -> Interval:
        """An empty one like this."""
        new = Interval(keeps=self._keeps, drops=self._drops)
        new.follow(self._names)
        return new

    def metrics(self) -> dict[str, float]:
        """What to log; empty without a step. Means are over finite steps, NaN if there is none."""
        if not self.rows:
            return {}
        steps, *counts = self._counts.tolist()
        sums, numbers = self._means.tolist()
        means = dict(zip(_MEANS, map(_mean, sums, numbers), strict=True))
        if not numbers[_MEANS.index("limit")]:
            means["limit"] = math.inf
        metrics = {f"clip/{name}": mean for name, mean in means.items()}
        metrics["clip/grad_norm_max"] = self._largest
        named = zip(self._counted[1:], counts, strict=True)
        metrics |= {f"clip/{name}": count for name, count in named}
        metrics["clip/clip_rate"] = self._clip_rate
        metrics["clip/clip_rate_window"] = counts[0] / max(steps, 1)
        number, moved, weights = self._updates.tolist()
        if number:
            metrics["clip/update_norm"] = moved / number
            metrics["clip/update_ratio"] = _mean(moved, weights)
        named_totals = self._totals().items()
        return metrics | {f"clip/{name}": _mean(*total) for name, total in named_totals}

    def _totals(self) -> dict[str, tuple[float, float]]:
        """Of each key the sum of its norms, and over how many steps."""
        number, *totals = self._sums.tolist()
        found = dict(self._earlier)
        for name, total in zip(self._names, totals, strict=True):
            total_before, number_before = found.get(name, (0.0, 0.0))
            found[name] = (total_before + total, number_before + number)
        return found


class Streaks:
    """Steps in a row that were all clipped, never clipped, or withheld; warns of each once.

    Args:
        config: How many are worth a warning.
    """

    def __init__(self, config: LogConfig) -> None:
        after, skips = config.warn_after, config.warn_skips
        self._bounds = {"never": after, "always": after, "withheld": skips}
        self._lengths = dict.fromkeys(("never", "always", "withheld"), 0)
        self._said: set[str] = set()

    def follow(self, rows: Tensor, tag: str) -> None:
        """Take in steps, as `Interval.add`; `tag` names the clipper."""
        names = ("has_gradient", "clipped", "skipped", "limit", "grad_norm")
        wanted = rows[:, [COLUMNS.index(name) for name in names]]
        for has_gradient, clipped, skipped, limit, norm in wanted.tolist():
            if not has_gradient and not skipped:
                continue
            self._count("withheld", bool(skipped))
            if math.isfinite(limit):  # no limit is there yet in a warm-up
                self._count("never", not clipped and not skipped)
                self._count("always", bool(clipped or skipped))
            for run, bound in self._bounds.items():
                if self._lengths[run] == bound and run not in self._said:
                    self._said.add(run)
                    _logger.warning(_ADVICE[run], tag, bound, norm, limit)

    def _count(self, run: str, goes_on: bool) -> None:
        self._lengths[run] = self._lengths[run] + 1 if goes_on else 0


_SEEN = "(the last norm is %.4g and the limit %.4g)"
_ADVICE = {
    "never": f"clip%s: the limit bound in none of the last %d steps {_SEEN}. It changes nothing; "
    "lower it, or have `gradclip recommend` propose one from a trace. log.warn_after sets after "
    "how many steps this is said.",
    "always": f"clip%s: the limit bound in each of the last %d steps {_SEEN}. It sets the length "
    "of every step; raise it, or have `gradclip recommend` propose one from a trace. "
    "log.warn_after sets after how many steps this is said.",
    "withheld": f"clip%s: %d steps in a row were withheld {_SEEN}. Nothing is learnt in such a "
    "step; look at data, learning rate and loss scale. log.warn_skips sets after how many this is "
    "said.",
}


def _column(rows: Tensor, name: str) -> Tensor:
    return rows[:, COLUMNS.index(name)]


def _mean(total: float, number: float) -> float:
    return total / number if number else math.nan
