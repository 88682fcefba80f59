"""A tracker for Accelerate that needs no service: everything logged goes into one text file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker


class JsonLines(GeneralTracker):
    """Writes whatever is logged, one JSON object a line."""

    name = "json_lines"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    def start(self) -> None:
        """Begin an empty file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("", encoding="utf-8")

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Write one line."""
        numbers = {key: float(value) for key, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
