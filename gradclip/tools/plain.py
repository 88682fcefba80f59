"""Text that others wrote, as the commands print it: neither markup nor codes for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import typer
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from gradclip.errors import escaped

__all__ = ["Listing", "as_markup", "echo", "plain", "show", "whole"]


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print it; see `typer.echo`."""
    typer.echo(escaped(text), err=err, nl=nl)


def show(content: RenderableType) -> None:
    """Print it with rich; what is wider than the terminal isn't cut."""
    Console().print(content, crop=False)


def plain(text: object, style: str = "") -> Text:
    """It as a part of a table."""
    return Text(escaped(f"{text}"), style)


def whole(text: object) -> Text:
    """It in one line, however long, so that it can be copied."""
    line = escaped(f"{text}").replace("\n", r"\n")
    return Text(line, no_wrap=True, overflow="ignore")


def as_markup(text: str) -> str:
    """It for where rich takes markup alone."""
    return escape(escaped(text))


@dataclass(frozen=True)
class Listing:
    """A table of numbers with names, which are never broken.

    Where a line with its names is wider than the terminal, names have lines of their own.

    Attributes:
        title: Above the table; "" for none.
        heads: Over the columns of numbers; each word has a line.
        about: Over the names.
        rows: The numbers and the names of each row.
        left: Heads of columns that aren't numbers.
        names_first: Whether names stand before the numbers.
    """

    title: str
    heads: Sequence[str]
    about: str
    rows: Sequence[tuple[Sequence[str], Sequence[str]]]
    left: tuple[str, ...] = ()
    names_first: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines for a terminal of this width."""
        table, numbers = self._table(names=True), self._table(names=False)
        unbounded = options.update(max_width=1 << 16)
        fits = Measurement.get(console, unbounded, table).maximum <= options.max_width
        if self.title:
            below = "" if fits else f", below each its {self.about}"
            yield Text(f"\n{self.title}{below}", style="bold")
        if fits:
            yield table
            return
        width = max(Measurement.get(console, unbounded, numbers).maximum, options.max_width)
        lines = console.render_lines(numbers, options.update(width=width), pad=False)
        first = len(lines) - len(self.rows)
        for index, line in enumerate(lines):
            names = self.rows[index - first][1] if index >= first else ()
            if self.names_first:
                yield from map(whole, names)
            yield from (*line, Segment.line())
            if not self.names_first:
                yield from (whole(f"    {name}") for name in names)

    def _table(self, *, names: bool) -> Table:
        table = Table(box=None, pad_edge=False)
        if names and self.names_first:
            table.add_column(self.about, no_wrap=True)
        for head in self.heads:
            table.add_column(
                head.replace(" ", "\n"),
                justify="left" if head in self.left else "right",
                no_wrap=True,
            )
        if names and not self.names_first:
            table.add_column(self.about, no_wrap=True)
        for numbers, given in self.rows:
            cells = [plain(number) for number in numbers]
            joined = [whole(", ".join(given))] if names else []
            table.add_row(*(joined + cells if self.names_first else cells + joined))
        return table
