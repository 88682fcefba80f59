"""Runs the benchmark, or what is missing of it, and writes one CSV row a run.

python -m benchmarks.outcome.run --quick
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.outcome.cells import CELLS, QUICK, Cell
from benchmarks.outcome.freeze import is_frozen
from benchmarks.outcome.rivals import NOT_INSTALLED, RIVALS
from benchmarks.outcome.rows import Job, Row, append, job_of, read
from benchmarks.outcome.tasks import Half
from benchmarks.outcome.train import run as train

RESULTS = Path("benchmarks/outcome/results.csv")
QUICK_SEEDS = 2


def jobs(cells: list[Cell], seeds: range, rivals: list[str]) -> Iterator[Job]:
    """Every run that is asked for; seed by seed, so that a break leaves whole seeds behind."""
    for seed in seeds:
        for cell in cells:
            for name in rivals:
                if cell.accumulate > 1 or not RIVALS[name].accumulating:
                    yield job_of(cell, seed, name, RIVALS[name])


def done(job: Job) -> Row:
    """Run one job."""
    torch.set_num_threads(1)
    return Row(job, train(CELLS[job.cell], job.seed, RIVALS[job.rival]))


def run_missing(wanted: list[Job], path: Path, workers: int) -> int:
    """Run what isn't in the file.

    Args:
        wanted: All jobs that the file should hold.
        path: The CSV file.
        workers: Processes, of one thread each; 0 for this process.

    Returns:
        How many were run.
    """
    there = {row.job for row in read(path)}
    missing = [job for job in wanted if job not in there]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("runs", total=len(missing))
        for row in _rows(missing, workers):
            append(path, [row])
            progress.update(bar, advance=1, description=f"{row.job.cell}, {row.job.rival}")
    return len(missing)


def _rows(missing: list[Job], workers: int) -> Iterator[Row]:
    if not workers:
        yield from map(done, missing)
        return
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=fresh) as pool:
        try:
            for future in as_completed([pool.submit(done, job) for job in missing]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def main(
    out: Annotated[Path, typer.Option(help="the CSV file")] = RESULTS,
    quick: Annotated[bool, typer.Option(help="five cells, two seeds")] = False,
    workers: Annotated[int, typer.Option(min=0, help="processes of one thread each")] = 2,
    half: Annotated[Half | None, typer.Option(help="cells of one half")] = None,
    cells: Annotated[str, typer.Option(help="pattern of cell names")] = "*",
    rivals: Annotated[str, typer.Option(help="pattern of rival names")] = "*",
    seeds: Annotated[int, typer.Option(min=2, help="how many")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="the first of them")] = 0,
) -> None:
    """Run every (cell, seed, rival) that the file doesn't hold yet."""
    chosen = [CELLS[name] for name in QUICK] if quick else list(CELLS.values())
    chosen = [cell for cell in chosen if half in (None, cell.half) and fnmatch(cell.name, cells)]
    names = [name for name in RIVALS if fnmatch(name, rivals)]
    if not chosen or not names:
        allowed = f"--rivals: {', '.join(RIVALS)}" if chosen else f"--cells: {', '.join(CELLS)}"
        msg = f"nothing matches; allowed are patterns of {allowed}"
        raise typer.BadParameter(msg)
    thawed = [name for name in names if not is_frozen(name)]
    if thawed and any(cell.half == "reporting" for cell in chosen):
        msg = (
            f"{', '.join(thawed)}: under test and not frozen, so it may run on --half tuning only. "
            "Once its constants are final, run python -m benchmarks.outcome.freeze NAME, and "
            "commit frozen.json."
        )
        raise typer.BadParameter(msg)
    if NOT_INSTALLED:
        Console(stderr=True).print(f"not installed, so not run: {', '.join(NOT_INSTALLED)}")
    count = QUICK_SEEDS if quick else seeds
    wanted = list(jobs(chosen, range(first_seed, first_seed + count), names))
    ran = run_missing(wanted, out, workers)
    print(f"{ran} of {len(wanted)} runs were missing; all are in {out}")


if __name__ == "__main__":
    typer.run(main)
