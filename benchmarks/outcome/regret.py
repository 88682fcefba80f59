"""How much worse than the best fixed norm: pure functions over arrays of losses.

Every array is (cells, seeds); NaN stands for what wasn't run. Seeds at even places are one half
of them, seeds at odd places the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEAST_SHARE = 0.05
CLOSE = 0.02
DRAWS = 2000


class Fixed(NamedTuple):
    """What fixed norms can reach.

    Attributes:
        oracle: The loss on each seed with the norm that was best in this cell on the other seeds.
        unit: What regret is divided by: the oracle's mean loss over the half of the seed, but at
            least 5 % of the untrained loss.
        rerun: (cells,), what the oracle loses against the norm that turns out best on its own
            seeds, in units. Nobody could choose that one beforehand: it is the noise floor.
        constant: The loss on each seed with the one norm that was best over all cells on the
            other seeds.
        chosen: That norm's place in the grid, by half of the seeds.
    """

    oracle: Floats
    unit: Floats
    rerun: Floats
    constant: Floats
    chosen: tuple[int, int]


class Summary(NamedTuple):
    """One rival over all cells; regrets are of cells, that is means over seeds.

    Attributes:
        low: Lower end of the 95 % interval of the mean.
        high: Its upper end.
        close: Share of the cells with a regret of at most 2 %.
    """

    mean: float
    low: float
    high: float
    median: float
    worst: float
    close: float


def worth(loss: Floats, untrained: Floats) -> Floats:
    """Losses of runs that diverged count as untrained: nobody would keep such a model."""
    bounded = np.fmin(np.where(np.isposinf(loss), untrained, loss), untrained)
    return np.asarray(bounded, dtype=np.float64)


def fixed_norms(grid: Floats, untrained: Floats) -> Fixed:
    """Choose on half of the seeds, score on the other, and swap.

    Args:
        grid: (norms, cells, seeds), the loss of each fixed norm. At least two seeds.
        untrained: The loss before training.
    """
    oracle, unit, constant = (np.empty_like(untrained) for _ in range(3))
    rerun, chosen = [], []
    even = np.arange(untrained.shape[1]) % 2 == 0
    for scored in (even, ~even):
        least = LEAST_SHARE * untrained[:, scored].mean(1)
        before, after = (grid[:, :, part].mean(2) for part in (~scored, scored))
        best = before.argmin(0)
        cells = np.arange(len(best))
        oracle[:, scored] = grid[best, cells][:, scored]
        mean = np.maximum(after[best, cells], least)
        unit[:, scored] = mean[:, None]
        rerun.append((after[best, cells] - after.min(0)) / mean)
        known = np.maximum(before.min(0), LEAST_SHARE * untrained[:, ~scored].mean(1))
        for_all = int(((before - before.min(0)) / known).mean(1).argmin())
        constant[:, scored] = grid[for_all][:, scored]
        chosen.append(for_all)
    return Fixed(oracle, unit, np.mean(rerun, axis=0), constant, (chosen[0], chosen[1]))


def regret(loss: Floats, fixed: Fixed) -> Floats:
    """What a rival loses against the oracle, seed by seed, in units."""
    return (loss - fixed.oracle) / fixed.unit


def summary(regrets: Floats) -> Summary:
    """Over the cells that the rival was run in."""
    regrets = regrets[np.isfinite(regrets).all(1)]
    of_cells = regrets.mean(1)
    low, high = interval(regrets)
    return Summary(
        mean=float(of_cells.mean()),
        low=low,
        high=high,
        median=float(np.median(of_cells)),
        worst=float(of_cells.max()),
        close=float((of_cells <= CLOSE).mean()),
    )


def interval(regrets: Floats, draws: int = DRAWS) -> tuple[float, float]:
    """95 % bootstrap interval of the mean: cells are drawn anew, and seeds within each."""
    random = np.random.default_rng(0)
    cells, seeds = regrets.shape
    drawn = random.integers(cells, size=(draws, cells, 1))
    means = regrets[drawn, random.integers(seeds, size=(draws, cells, seeds))].mean((1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def sensitivity(losses: Mapping[str, Floats], untrained: Mapping[str, Floats]) -> float:
    """How much the learning rate matters: mean excess over the rival's own best rate, in units.

    Args:
        losses: By family, (rates, seeds).
        untrained: The same of the untrained loss.
    """
    excess = []
    for family, loss in losses.items():
        of_rates = loss.mean(1)
        best = of_rates.min()
        least = LEAST_SHARE * untrained[family].mean()
        excess.append((of_rates - best).mean() / max(best, least))
    return float(np.mean(excess))
