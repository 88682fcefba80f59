"""What was measured, and the JSON file that holds it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
SOURCES = ("gradclip", "lightning_clip", "accelerate_clip", "benchmarks/speed")


@dataclass(frozen=True)
class Row:
    """One line of a table: gradclip against one other way to do the same.

    Attributes:
        part: The table it stands in.
        what: What is clipped, and how.
        peer: What gradclip is compared with; empty for nothing.
        unit: Of `ours` and `theirs`.
        ours: Gradclip's number. Smaller is better, in every row.
        theirs: The peer's.
        ratio: Ours divided by the peer's; for times the median over pairs of calls.
        low: Lower end of the interval that holds this median with 95 % certainty.
        high: Its upper end.
        aim: Largest ratio wanted, or, where there is no ratio, the largest `ours`.
        bandwidth: Bytes that must be moved, divided by our time, as a share of how fast this
            machine reads memory.
    """

    part: str
    what: str
    peer: str
    unit: str
    ours: float
    theirs: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    aim: float | None = None
    bandwidth: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the aim is met, by a ratio as a table shows it; None if there is no aim."""
        if self.aim is None:
            return None
        return (self.ours if self.ratio is None else round(self.ratio, 2)) <= self.aim


@dataclass(frozen=True)
class Point:
    """One point of a line in a picture.

    Attributes:
        axis: What grows.
        line: Whose line it is.
        x: How many there are of what grows.
        y: Milliseconds, or what the axis says.
    """

    axis: str
    line: str
    x: float
    y: float


@dataclass(frozen=True)
class Found:
    """What one case found.

    Attributes:
        code: Hash of the code that was measured and of the code that measured it.
        rows: Of tables.
        points: Of the picture.
        seconds: How long it took.
    """

    code: str
    rows: Sequence[Row] = ()
    points: Sequence[Point] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Results:
    """Everything that was measured.

    Attributes:
        machine: Processor, threads, bandwidth, versions of packages: names and values.
        cases: What each case found.
    """

    machine: Mapping[str, Any] = field(default_factory=dict)
    cases: Mapping[str, Found] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """Of all cases."""
        return [row for found in self.cases.values() for row in found.rows]

    @property
    def points(self) -> list[Point]:
        """Of all cases."""
        return [point for found in self.cases.values() for point in found.points]


def code_of() -> str:
    """Hash of the code that is measured and of the code that measures."""
    paths = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    texts = [
        path.read_bytes() for path in sorted(paths) if path.name not in ("report.py", "command.py")
    ]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:12]


def read(path: Path = RESULTS) -> Results:
    """What the file holds; nothing, if there is none."""
    if not path.exists():
        return Results()
    content = json.loads(path.read_text(encoding="utf-8"))
    cases = {
        name: Found(
            found["code"],
            [Row(**row) for row in found["rows"]],
            [Point(**point) for point in found["points"]],
            found["seconds"],
        )
        for name, found in content["cases"].items()
    }
    return Results(content["machine"], cases)


def write(results: Results, path: Path = RESULTS) -> None:
    """Replace the file, one line a row; a break leaves the old one or the new one."""
    lines = [f'{{"machine": {json.dumps(results.machine)},', '"cases": {']
    for i, (name, found) in enumerate(results.cases.items()):
        lines.append(f'{"," * (i > 0)}{json.dumps(name)}: {{"code": "{found.code}",')
        lines.append(f'"seconds": {found.seconds:.1f}, "rows": [')
        lines.append(",\n".join(json.dumps(_rounded(asdict(row))) for row in found.rows))
        lines.append('], "points": [')
        lines.append(",\n".join(json.dumps(_rounded(asdict(point))) for point in found.points))
        lines.append("]}")
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join([*lines, "}}"]) + "\n", encoding="utf-8")
    partial.replace(path)


def _rounded(content: dict[str, Any]) -> dict[str, Any]:
    """Numbers with the places that mean something; what is not known is left out."""
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in content.items()
        if value is not None
    }
