"""What a command is to write is looked at before the work that it waits for."""

from __future__ import annotations

from pathlib import Path

from gradclip.errors import ConfigError

__all__ = ["refuse_input", "refuse_lost_folder", "refuse_other_than_png"]


def refuse_input(out: Path | None, *inputs: Path) -> None:
    """Refuse to write over what the command reads.

    Raises:
        ConfigError: If `out` is the same file as an input, also by another name.
    """
    if out is not None and out.exists() and any(map(out.samefile, inputs)):
        msg = f"{out} is what is read here, and would be lost. Name another file to write."
        raise ConfigError(msg)


def refuse_lost_folder(out: Path | None) -> None:
    """Refuse a file that couldn't be written.

    Raises:
        ConfigError: If its folder doesn't exist.
    """
    if out is not None and not out.parent.is_dir():
        msg = f"{out}: the folder {out.parent} doesn't exist. Make it, or name another file."
        raise ConfigError(msg)


def refuse_other_than_png(out: Path | None) -> None:
    """Refuse a picture of another kind.

    Raises:
        ConfigError: If its name doesn't end in `.png`.
    """
    if out is not None and out.suffix.lower() != ".png":
        msg = f"{out}: a picture is a PNG file; allowed: a name in .png, such as {out.stem}.png."
        raise ConfigError(msg)
