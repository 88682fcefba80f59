"""What is recommended from the first half of the recorded runs, tried on the second half.

PYTHONPATH=.:tests python -m support.second_half  # prints the table of docs/recommend.md
"""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path

import numpy as np

from gradclip.config import ClipConfig, parse_mapping
from gradclip.tools.player import Player
from gradclip.tools.recommend import Recommendation, recommend
from gradclip.tools.trace import Chunk, Trace

TRACES = Path(__file__).parents[1] / "traces"
RUNS = ("gpt", "mlp", "late", "conv", "lstm")
RATES = (0.01, 0.05, 0.1, 0.2)
LEAD = 400
"""Steps of the first half that policies learn from before the second half begins."""


@cache
def read(run: str) -> tuple[Trace, Chunk]:
    trace = Trace.open(TRACES / f"{run}.jsonl")
    return trace, trace.read()


def chance(run: str, rate: float) -> float:
    """One standard deviation of a rate over the second half, if steps are independent."""
    return math.sqrt(rate * (1 - rate) / (len(read(run)[1]) // 2))


@cache
def recommended(run: str, rate: float, *, every_policy: bool = False) -> Recommendation:
    trace, seen = read(run)
    return recommend(trace, rate, stop=int(seen.step[len(seen) // 2]), every_policy=every_policy)


def rates_later(run: str, config: ClipConfig, slots: int = 1) -> list[float]:
    """The share of the second half that a configuration clips or withholds, in each slot."""
    trace, seen = read(run)
    first = len(seen) // 2 - LEAD
    made = Player(config, trace.header.norm_type, slots).decide(
        seen.step[first:], seen.grad_norm[first:], seen.loss[first:]
    )
    touched = (made.coef < 1) | made.skipped[:, None]
    return [float(rate) for rate in np.mean(touched[LEAD:], axis=0)]


def main() -> None:
    marks = {"high": "", "medium": " ?", "low": " ??"}
    names: list[str] = []
    for run in RUNS:
        for rate in RATES:
            found = recommended(run, rate, every_policy=True)
            if not names:
                names = [option.name for option in found.options]
                heads = ["run", "wanted", "chance", *names]
                sys.stdout.write(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
            cells = [run, f"{rate:.0%}", f"±{chance(run, rate) / rate:.0%}"]
            for option in found.options:
                (got,) = rates_later(run, parse_mapping(option.config))
                text = f"{got:.1%} ({got / rate - 1:+.0%}){marks[option.confidence]}"
                cells.append(f"**{text}**" if option == found.taken else text)
            sys.stdout.write(f"| {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
