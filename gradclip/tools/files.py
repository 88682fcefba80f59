"""A text file as a log has it: compressed or not, in any usual encoding, cut off or whole."""

from __future__ import annotations

import gzip
import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import rich.progress
from rich.console import Console

from gradclip.errors import ConfigError
from gradclip.tools.plain import as_markup

__all__ = [
    "first_line",
    "is_text",
    "is_whole",
    "open_text",
    "refuse_pointer",
    "suffix_of",
    "warn_of_cut",
]

_GZIP = b"\x1f\x8b"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # as PowerShell's > writes
_POINTER = b"version https://git-lfs.github.com/spec/"
_START = 4096


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The file as text, with a progress bar if standard error is a terminal.

    Line ends are kept as they are, so that `is_whole` can tell a line that was cut off.

    Raises:
        ConfigError: If compressed data ends early or is damaged.
        OSError: If it can't be opened.
    """
    console = Console(stderr=True)
    shown = as_markup(f"Reading {path.name}")
    hidden = not console.is_terminal
    with rich.progress.open(
        path, "rb", description=shown, console=console, transient=True, disable=hidden
    ) as raw:
        file = gzip.GzipFile(fileobj=raw) if _raw_start(path).startswith(_GZIP) else raw
        encoding = _encoding(_start(path))
        try:
            with io.TextIOWrapper(file, encoding=encoding, errors="replace", newline="") as text:
                yield text
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            msg = f"{path}: the compressed file is damaged or was cut off ({error}). Copy it anew."
            raise ConfigError(msg) from None


def first_line(path: Path) -> str:
    """The first line, or the start of it.

    Raises:
        OSError: If the file can't be read.
    """
    start = _start(path)
    encoding = _encoding(start)
    lines = start.decode(encoding, errors="replace").splitlines(keepends=True)
    return lines[0] if lines else ""


def is_text(path: Path) -> bool:
    """Whether the start of a file is text.

    Raises:
        OSError: If the file can't be read.
    """
    start = _start(path)
    return b"\0" not in start or start.startswith(_UTF16)


def suffix_of(path: Path) -> str:
    """The end of the name that tells the kind of file: `.csv` also of `run.csv.gz`."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def is_whole(line: str) -> bool:
    """Whether a line has its end; only the last line of a file may lack it."""
    return line.endswith(("\n", "\r"))


def warn_of_cut(path: Path, where: str) -> None:
    """Warn that the last line is left out."""
    text = f"{path}, {where}: the file was cut off here; it is read up to this line."
    warnings.warn(text, stacklevel=3)


def refuse_pointer(path: Path) -> None:
    """Refuse what Git LFS leaves in place of a file that it didn't fetch.

    Raises:
        ConfigError: If it is one.
        OSError: If the file can't be read.
    """
    if _raw_start(path).startswith(_POINTER):
        msg = (
            f"{path}: this is a pointer of Git LFS, not the file itself. Fetch the file: "
            f'git lfs pull --include "{path}"'
        )
        raise ConfigError(msg)


def _encoding(start: bytes) -> str:
    return "utf-16" if start.startswith(_UTF16) else "utf-8-sig"


def _raw_start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_START)


def _start(path: Path) -> bytes:
    """The first bytes; of a compressed file those of its content."""
    start = _raw_start(path)
    if not start.startswith(_GZIP):
        return start
    try:
        return zlib.decompressobj(wbits=31).decompress(start, _START)  # a cut file's too
    except zlib.error as error:
        msg = f"{path}: the compressed file is damaged ({error}). Copy it anew."
        raise ConfigError(msg) from None
