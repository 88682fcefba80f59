"""The CSV of results: one row for each run, appended as runs end, so that a break loses nothing."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from benchmarks.outcome.cells import Cell
from benchmarks.outcome.rivals import Rival
from benchmarks.outcome.train import Result, setup_of


class Job(NamedTuple):
    """What decides a run: names and hashes. A run whose job is in the file isn't run again."""

    cell: str
    seed: int
    rival: str
    setup: str
    constants: str


def job_of(cell: Cell, seed: int, name: str, rival: Rival) -> Job:
    """The job of a run; `name` is the rival's."""
    return Job(cell.name, seed, name, setup_of(cell), rival.digest)


@dataclass(frozen=True)
class Row:
    """A job and its result."""

    job: Job
    result: Result


HEADS = (*Job._fields, *(field.name for field in fields(Result)))


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to the file, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(HEADS)
        writer.writerows([*row.job, *asdict(row.result).values()] for row in rows)


def read(path: Path) -> list[Row]:
    """All rows; a last line that a break cut short is taken out of the file."""
    if not path.exists():
        return []
    content = path.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]
    if whole != content:
        path.write_text(whole, encoding="utf-8")
    return [_row(line) for line in csv.DictReader(whole.splitlines())]


def _row(line: dict[str, str]) -> Row:
    job = Job(line["cell"], int(line["seed"]), line["rival"], line["setup"], line["constants"])
    result = Result(
        loss=float(line["loss"]),
        untrained=float(line["untrained"]),
        diverged=line["diverged"] == "True",
        clip_rate=float(line["clip_rate"]),
        skipped=int(line["skipped"]),
        spike_score=float(line["spike_score"]),
        follow=int(line["follow"]),
        seconds=float(line["seconds"]),
    )
    return Row(job, result)
