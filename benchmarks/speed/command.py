"""The command: what to measure, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatch
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.speed import report as tables
from benchmarks.speed.alone import alone, found, machine
from benchmarks.speed.cases import CASES, MODULES
from benchmarks.speed.pairs import FULL, QUICK, Effort
from benchmarks.speed.rows import Results, code_of, read, write

app = typer.Typer(add_completion=False)


def wanted(results: Results, only: str | None, *, anew: bool, code: str) -> list[str]:
    """Names of the cases to measure.

    Args:
        results: What is there.
        only: A pattern of names: these, whether they are there or not.
        anew: All, whether they are there or not.
        code: The hash of today's code; what other code gave is measured again.

    Raises:
        ValueError: If the pattern fits no case.
    """
    if only is not None:
        names = [name for name in CASES if fnmatch(name, only)]
        if not names:
            msg = f"{only}: no case fits; allowed are patterns of {'; '.join(CASES)}"
            raise ValueError(msg)
        return names
    there = {name for name, held in results.cases.items() if held.code == code}
    return [name for name in CASES if anew or name not in there]


def run(names: Iterable[str], effort: Effort, results: Results, *, keep: bool) -> list[str]:
    """Measure cases, each in a process of its own, and keep what each found as it ends.

    Returns:
        Those that failed, with their errors.
    """
    names, failed, cases = list(names), list[str](), dict(results.cases)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("machine", total=len(names))
        results = replace(results, machine=alone(machine))
        for name in names:
            progress.update(bar, description=name)
            try:
                cases[name] = alone(found, MODULES[name], name, effort)
                progress.console.print(f"{name}: {cases[name].seconds:.1f} s", markup=False)
            except Exception as error:  # the other cases are still worth their time
                failed.append(f"{name}: {type(error).__name__}: {error}")
                progress.console.print(failed[-1], markup=False)
            results = replace(results, cases={n: cases[n] for n in CASES if n in cases})
            if keep:
                write(results)
            progress.advance(bar)
    if not keep:
        console.print(Markdown(tables.tables(results)))
    return failed


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    only: Annotated[str | None, typer.Option(help="cases whose name fits this pattern")] = None,
    quick: Annotated[
        bool, typer.Option(help="try the code: few repeats, small gradients, nothing is written")
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="for one row, once it has enough pairs of calls")
    ] = 1.0,
    anew: Annotated[bool, typer.Option(help="all cases, also those that are there")] = False,
) -> None:
    """Measure what results.json doesn't hold of today's code, then write the tables."""
    if context.invoked_subcommand is not None:
        return
    results = Results() if quick else read()
    try:
        names = wanted(results, only, anew=anew, code=code_of())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    effort = QUICK if quick else FULL._replace(seconds=seconds)
    failed = run(names, effort, results, keep=not quick)
    if not quick:
        report()
    if failed:
        raise typer.Exit(1)


@app.command()
def report() -> None:
    """Write the tables and the picture from results.json, without measuring."""
    for path in tables.write_all(read()):
        print(path.relative_to(tables.ROOT))
