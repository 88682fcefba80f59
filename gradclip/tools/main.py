"""The command `gradclip`: one function for each of its words."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from gradclip.errors import ConfigError

try:
    import numpy  # noqa: F401
    import typer
except ImportError as error:
    sys.stderr.write(
        f"gradclip: {error.name} isn't installed, which the commands need. "
        "Install it: pip install 'gradclip[tools]'\n"
    )
    raise SystemExit(2) from None

__all__ = ["app", "main"]

app = typer.Typer(
    help="See what gradient clipping did, and choose how to clip.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback()
def _gradclip() -> None:
    """See what gradient clipping did, and choose how to clip."""


def main(argv: Sequence[str] | None = None) -> None:
    """The console command. Exit code 0: fine, 1: a problem was found, 2: it was called wrongly.

    Args:
        argv: What follows `gradclip`; taken from the command line if None.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app(None if argv is None else list(argv), prog_name="gradclip")
        except ConfigError as error:
            sys.stderr.write(f"gradclip: {error}\n")
            sys.exit(2)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"gradclip: warning: {message}\n")


if __name__ == "__main__":
    main()
