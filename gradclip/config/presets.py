"""Presets: the configurations that come with gradclip, by the names of their files."""

from __future__ import annotations

from functools import cache
from pathlib import Path

__all__ = ["preset_file", "preset_text", "presets"]

_FOLDER = Path(__file__).parents[1] / "presets"


@cache
def presets() -> dict[str, str]:
    """What each preset does, in a line, by its name in alphabetical order."""
    return {
        path.stem: _lines(path)[1].removeprefix("# ") for path in sorted(_FOLDER.glob("*.yaml"))
    }


def preset_file(name: str) -> Path:
    """Where a preset is."""
    return _FOLDER / f"{name}.yaml"


def preset_text(name: str) -> str:
    """A preset as a file to copy: without its first line, which leads an editor to our schema."""
    return "\n".join(_lines(preset_file(name))[1:]) + "\n"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
