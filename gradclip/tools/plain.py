"""Text that others wrote, as the commands print it: neither markup nor codes for a terminal."""

from __future__ import annotations

import typer
from rich.markup import escape
from rich.text import Text

from gradclip.errors import escaped

__all__ = ["as_markup", "echo", "plain"]


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print it; see `typer.echo`."""
    typer.echo(escaped(text), err=err, nl=nl)


def plain(text: object, style: str = "") -> Text:
    """It as a part of a table."""
    return Text(escaped(f"{text}"), style)


def as_markup(text: str) -> str:
    """It for where rich takes markup alone."""
    return escape(escaped(text))
