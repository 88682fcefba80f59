"""What training frameworks print, as rows of named values.

A row is what one line says. These lines are understood, in any mixture with others:

- `{'loss': 2.31, 'grad_norm': 1.7, 'epoch': 0.1}`: transformers, TRL, axolotl, ms-swift
- `... | train_inner | {"loss": "9.4", "num_updates": "300", "gnorm": "1.7"}`: fairseq
- `iteration  10/ 500 | lm loss: 7.4E+00 | grad norm: 2.9 | ...`: Megatron
- `step: 10  loss:  7.40  grad_norm:  2.90  ...`: torchtitan
- `step:10 - actor/grad_norm:0.12 - ...`: verl
- `[metric][batch=10]: l2_norm/grad/global: 2.9`: a file of composer's; and its console, with a
  line for each value
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from gradclip.tools.files import open_text

__all__ = ["read_console"]

# Colours, and levels of log lines, which else would seem to be the beginning of a name.
_NOISE = re.compile(r"\x1b\[[\d;]*[A-Za-z]|\b(?:DEBUG|INFO|WARNING|ERROR)\b:?")
# Bounded, so that a long line of other text takes no longer than its length tells.
_PAIR = re.compile(
    r"""
    (?<!\w) (?P<name> [a-z_][\w./()%-]{0,99} (?:[ ][a-z(][\w./()%-]{0,99}){0,7} ) ['"]?
    \s*[:=]\s* ['"]?
    (?P<value> [+-]? (?: (?:\d+\.?\d*|\.\d+) (?:e[+-]?\d+)? | nan | inf(?:inity)? ) )
    (?:/\s*\d+)? (?![\w.]|,\d)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_STEP = re.compile(r"\b(?P<name>step|iter|iteration|update)\s+(?P<value>\d+)\b", re.IGNORECASE)


def read_console(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of what was printed, with where each stands.

    Raises:
        ConfigError, OSError: If the file can't be read.
    """
    where, row = "", dict[str, str]()
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            found = _values(line)
            if line.startswith("\t"):  # composer: a line for each value, below one for the batch
                row |= found
                continue
            if row:
                yield where, row
            where, row = f"line {number}", found
    if row:
        yield where, row


def _values(line: str) -> dict[str, str]:
    line = _NOISE.sub("  ", line)
    found = {match["name"].lower(): match["value"] for match in _STEP.finditer(line)}
    return found | {match["name"]: match["value"] for match in _PAIR.finditer(line)}
