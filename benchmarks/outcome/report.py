"""Tables and a picture of the results, into the README and files beside it.

python -m benchmarks.outcome.report
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.outcome.cells import CELLS, Cell
from benchmarks.outcome.regret import (
    Fixed,
    Floats,
    Summary,
    fixed_norms,
    interval,
    regret,
    sensitivity,
    summary,
    worth,
)
from benchmarks.outcome.rivals import CONSTANTS, GRID, PEERS
from benchmarks.outcome.rows import Row, read
from benchmarks.outcome.run import RESULTS
from benchmarks.outcome.train import Result

README = Path(__file__).with_name("README.md")
PICTURE = Path(__file__).with_name("regret.png")
BY_CELL = Path(__file__).with_name("regret.csv")
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
CONSTANT, ONE = "best constant", "norm 1"
HEADS = (
    *("rival", "cells", "mean", "95 % interval", "median", "worst", "within 2 %"),
    *("against norm 1", "diverged", "clips", "spikes", "rate matters", "follows"),
)


class Outcome(NamedTuple):
    """One rival's results.

    Attributes:
        regrets: (cells, seeds); NaN where it wasn't run.
        losses: The same of its losses.
        results: Its results by place.
    """

    regrets: Floats
    losses: Floats
    results: Mapping[tuple[int, int], Result]


@dataclass(frozen=True)
class Comparison:
    """All rivals over cells that every fixed norm was run in, on every seed."""

    cells: Sequence[Cell]
    seeds: Sequence[int]
    untrained: Floats
    fixed: Fixed
    outcomes: Mapping[str, Outcome]


def newest(rows: Sequence[Row]) -> dict[tuple[str, int, str], Row]:
    """The last row of each cell, seed and rival.

    Raises:
        ValueError: If a cell's rows come from several versions of the benchmark or torch, or a
            rival's from several of its own.
    """
    latest = {(row.job.cell, row.job.seed, row.job.rival): row for row in rows}
    versions = defaultdict[str, set[str]](set)
    for row in latest.values():
        versions[f"cell {row.job.cell}"].add(row.job.setup)
        versions[f"rival {row.job.rival}"].add(row.job.constants)
    mixed = [name for name, found in versions.items() if len(found) > 1]
    if mixed:
        msg = (
            f"{', '.join(mixed)}: rows come from different versions (columns setup, constants), so "
            "they can't be compared. Run the missing ones, or start a new file with --out."
        )
        raise ValueError(msg)
    return latest


def compare(rows: Sequence[Row], cells: Sequence[Cell]) -> Comparison | None:
    """What the rows say about these cells; None if no cell is complete on two seeds."""
    latest = newest(rows)
    there = latest.keys()
    cells = [cell for cell in cells if any(cell.name == name for name, _, _ in there)]
    seeds = sorted(
        seed
        for seed in {seed for _, seed, _ in there}
        if all((cell.name, seed, norm) in there for cell in cells for norm in CONSTANTS)
    )
    if not cells or len(seeds) < 2:
        return None
    results = defaultdict[str, dict[tuple[int, int], Result]](dict)
    untrained = np.full((len(cells), len(seeds)), np.nan)
    places = {cell.name: i for i, cell in enumerate(cells)}
    for (cell, seed, rival), row in latest.items():
        if cell in places and seed in seeds:
            at = places[cell], seeds.index(seed)
            results[rival][at] = row.result
            untrained[at] = row.result.untrained
    losses = {rival: _losses(found, untrained) for rival, found in results.items()}
    fixed = fixed_norms(np.stack([losses[name] for name in CONSTANTS]), untrained)
    losses[CONSTANT] = fixed.constant
    outcomes = {
        rival: Outcome(regret(loss, fixed), loss, results.get(rival, {}))
        for rival, loss in losses.items()
    }
    return Comparison(cells, seeds, untrained, fixed, outcomes)


def comparisons_of(rows: Sequence[Row]) -> dict[str, Comparison]:
    """By title: each half, and again with rivals that were run on fewer seeds, on these seeds."""
    found: dict[str, Comparison] = {}
    for half in ("tuning", "reporting"):
        cells = [cell for cell in CELLS.values() if cell.half == half]
        whole = compare(rows, cells)
        if whole is None:
            continue
        title = f"The {half} half"
        found[title] = whole
        ran = {name: _seeds_of(whole, o) for name, o in whole.outcomes.items() if o.results}
        common = set.intersection(*(seeds for seeds in ran.values() if len(seeds) > 1))
        if 1 < len(common) < len(whole.seeds):
            fewer = compare([row for row in rows if row.job.seed in common], cells)
            if fewer is not None:
                found[f"{title}, with rivals that were run on {len(common)} seeds"] = fewer
    return found


def _seeds_of(comparison: Comparison, outcome: Outcome) -> set[int]:
    """The seeds on which a rival was run in every cell in which it was run at all."""
    there = np.isfinite(outcome.regrets)
    complete = there[there.any(1)].all(0)
    return {seed for seed, is_there in zip(comparison.seeds, complete, strict=True) if is_there}


def _losses(results: Mapping[tuple[int, int], Result], untrained: Floats) -> Floats:
    raw = np.full(untrained.shape, np.nan)
    for at, result in results.items():
        raw[at] = np.inf if np.isnan(result.loss) else result.loss
    return np.where(np.isnan(raw), np.nan, worth(raw, untrained))


def table(comparison: Comparison) -> str:
    """One row a rival, best mean first."""
    whole = {name: o for name, o in comparison.outcomes.items() if _was_run(o).any()}
    found = {name: summary(outcome.regrets) for name, outcome in whole.items()}
    lines = [_line(HEADS), _line(["---"] + ["---:"] * (len(HEADS) - 1))]
    best_first = sorted(found, key=lambda name: found[name].mean)
    numbers = {name: _numbers(comparison, whole[name], found[name]) for name in best_first}
    return "\n".join([*lines, *(_line([name, *told]) for name, told in numbers.items())])


def _was_run(outcome: Outcome) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(outcome.regrets).all(1))


def _numbers(comparison: Comparison, outcome: Outcome, found: Summary) -> list[str]:
    run = _was_run(outcome)
    difference = (outcome.regrets - comparison.outcomes[ONE].regrets)[run]
    low, high = interval(difference)
    results = list(outcome.results.values())
    follow = [result.follow for result in results if result.follow >= 0]
    told = [
        str(run.sum()),
        _percent(found.mean),
        f"{_percent(found.low)} to {_percent(found.high)}",
        _percent(found.median),
        _percent(found.worst),
        _percent(found.close),
        f"{_percent(difference.mean())} ({_percent(low)} to {_percent(high)})",
    ]
    if not results:
        return [*told, "", "", "", _rate(comparison, outcome), ""]
    return [
        *told,
        str(sum(result.diverged for result in results)),
        _percent(np.mean([result.clip_rate for result in results])),
        f"{100 * np.mean([result.spike_score for result in results]):.2f} %",
        _rate(comparison, outcome),
        f"{np.mean(follow):.0f}" if follow else "",
    ]


def _rate(comparison: Comparison, outcome: Outcome) -> str:
    """Sensitivity to the rate, over families with more than one."""
    families = defaultdict[str, list[int]](list)
    for i, cell in enumerate(comparison.cells):
        if np.isfinite(outcome.regrets[i]).all():
            families[cell.family].append(i)
    several = {family: places for family, places in families.items() if len(places) > 1}
    if not several:
        return ""
    losses, untrained = (
        {family: loss[places] for family, places in several.items()}
        for loss in (outcome.losses, comparison.untrained)
    )
    return _percent(sensitivity(losses, untrained))


def by_optimizer(comparison: Comparison) -> str:
    """Mean and worst regret of each rival, apart by the optimizer's kind."""
    kinds = {
        "AdamW, Muon": [cell.optimizer != "sgd" for cell in comparison.cells],
        "SGD": [cell.optimizer == "sgd" for cell in comparison.cells],
    }
    heads = ["rival", *(f"{kind}, {number}" for kind in kinds for number in ("mean", "worst"))]
    lines = [_line(heads), _line(["---"] + ["---:"] * (len(heads) - 1))]
    for name, outcome in comparison.outcomes.items():
        if not _was_run(outcome).any():
            continue
        told = [name]
        for chosen in kinds.values():
            of_cells = outcome.regrets[np.array(chosen) & _was_run(outcome)].mean(1)
            told += (
                [_percent(of_cells.mean()), _percent(of_cells.max())] if len(of_cells) else ["", ""]
            )
        lines.append(_line(told))
    return "\n".join(lines)


def text_of(title: str, comparison: Comparison) -> str:
    """The part of the README about these cells."""
    fixed = comparison.fixed
    norms = " and ".join(f"{GRID[i]:g}" for i in sorted(set(fixed.chosen)))
    count, seeds = len(comparison.cells), len(comparison.seeds)
    peers = [package for package in PEERS if f"{package} package" not in comparison.outcomes]
    missing = f" Not installed, so not run: {', '.join(peers)}." if peers else ""
    mean, worst = _percent(fixed.rerun.mean()), _percent(fixed.rerun.max())
    return f"""### {title}

{count} cells, {seeds} seeds each. Best constant: {norms}. Noise floor (the oracle's own rerun):
mean {mean}, worst {worst}.{missing}

{table(comparison)}

{by_optimizer(comparison)}
"""


def draw(comparisons: Mapping[str, Comparison], path: Path) -> None:
    """The share of cells in which a rival's regret is at most so much."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(comparisons), figsize=(6 * len(comparisons) + 2, 5), sharey=True, squeeze=False
    )
    colors = plt.get_cmap("tab20").colors
    for axis, (title, comparison) in zip(axes[0], comparisons.items(), strict=True):
        shown = [name for name in comparison.outcomes if name == ONE or name not in CONSTANTS]
        for i, name in enumerate(shown):
            outcome = comparison.outcomes[name]
            if _was_run(outcome).all():
                style = "--" if name in (ONE, CONSTANT, "none") else "-"
                color = colors[i % len(colors)]
                axis.ecdf(100 * outcome.regrets.mean(1), label=name, ls=style, color=color)
        axis.axvspan(0, 100 * comparison.fixed.rerun.mean(), color="0.9")
        axis.set(title=title, xlabel="regret, %", ylabel="share of cells")
        axis.set_xscale("symlog", linthresh=2)
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_cells(comparisons: Mapping[str, Comparison], path: Path) -> None:
    """One CSV row a cell and comparison: the oracle's loss, its rerun's, every rival's regret."""
    rivals = list({name: None for found in comparisons.values() for name in found.outcomes})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["cell", "seeds", "oracle's loss", "rerun", *rivals])
        for found in comparisons.values():
            fixed = found.fixed
            for i, cell in enumerate(found.cells):
                numbers = [fixed.oracle[i].mean(), fixed.rerun[i]]
                numbers += [
                    found.outcomes[name].regrets[i].mean() if name in found.outcomes else np.nan
                    for name in rivals
                ]
                writer.writerow(
                    [cell.name, len(found.seeds), *(f"{number:.4f}" for number in numbers)]
                )


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _percent(share: float | np.floating) -> str:
    return f"{round(100 * float(share), 1) + 0.0:.1f} %"  # + 0.0: no minus before a zero


def main(results: Annotated[Path, typer.Argument(help="the CSV file")] = RESULTS) -> None:
    """Write the tables into README.md between its markers, regret.png, and regret.csv by cell."""
    rows = read(results)
    comparisons = comparisons_of(rows)
    if not comparisons:
        msg = f"{results}: no half has every fixed norm of a cell on two seeds. Run the rest first."
        raise typer.BadParameter(msg)
    told = "\n".join(text_of(title, found) for title, found in comparisons.items())
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n\n{told}\n{END}{after}", encoding="utf-8")
    draw(comparisons, PICTURE)
    write_cells(comparisons, BY_CELL)
    print(told)


if __name__ == "__main__":
    typer.run(main)
