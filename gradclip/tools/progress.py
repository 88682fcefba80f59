"""A progress bar on standard error, where someone may see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

__all__ = ["show_progress"]


@contextmanager
def show_progress(what: str) -> Iterator[Callable[[float], None]]:
    """Show how far a piece of work is; nothing if standard error isn't a terminal.

    Args:
        what: Stands before the bar, as plain text.

    Yields:
        A function to call with the share of the work that is done, 0 to 1.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what.replace("[", r"\["), total=1.0)
        yield lambda share: progress.update(task, completed=share)
