"""Fixes the constants of a rival under test, before it may run on the reporting half.

python -m benchmarks.outcome.freeze NAME
"""

from __future__ import annotations

import json
from pathlib import Path

import typer

from benchmarks.outcome.rivals import RIVALS

FROZEN = Path(__file__).with_name("frozen.json")


def is_frozen(name: str) -> bool:
    """Whether the rival is no candidate, or its code and constants are those that were frozen."""
    rival = RIVALS[name]
    return not rival.candidate or json.loads(FROZEN.read_text()).get(name) == rival.digest


def freeze(name: str) -> None:
    """Write the rival's hash into frozen.json; commit it before the reporting half is run."""
    frozen = json.loads(FROZEN.read_text()) | {name: RIVALS[name].digest}
    FROZEN.write_text(json.dumps(frozen, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(freeze)
