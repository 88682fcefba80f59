"""One HTML file that needs nothing else: an interactive figure, tables, and text."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradclip.tools.charts import Counts, Steps
from gradclip.tools.curves import Curve
from gradclip.tools.figure import draw_figure

__all__ = ["replay_html", "write_page"]

PAGES = Path(__file__).parent / "pages"


def replay_html(
    path: str | Path,
    title: str,
    norm: Curve,
    limits: Mapping[str, Curve],
    clipped: Mapping[str, Steps],
    skipped: Mapping[str, Steps],
    rows: Sequence[Mapping[str, str]],
    *,
    counts: Mapping[str, Counts],
    notes: Sequence[str] = (),
) -> None:
    """Write a page that compares configurations over one run.

    Args:
        path: The HTML file to write.
        title: Plain text.
        norm: The norm before clipping.
        limits: The limit by name of the configuration.
        clipped: Int64, the clipped steps by the same names, or an even choice of them.
        skipped: Int64, the withheld steps by the same names, likewise.
        rows: A table to stand above the figure: cells by the head of their column.
        counts: Of the run, by the same names.
        notes: What a reader has to know, a paragraph each.
    """
    figure = draw_figure(norm, limits, clipped, skipped, counts=counts)
    write_page(path, "replay.html", title, figure, rows=rows, notes=notes)


def write_page(path: str | Path, template: str, title: str, figure: Any, **content: Any) -> None:
    """Write a page.

    Args:
        path: The HTML file to write.
        template: Name of a file in `pages/`.
        title: Plain text.
        figure: A plotly figure.
        **content: What the template shows; escaped where it is put in.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = {"plotly": get_plotlyjs(), "own": (PAGES / "page.js").read_text(encoding="utf-8")}
    text = environment.get_template(template).render(
        content,
        **scripts,
        title=title,
        allowed=" ".join(f"'sha256-{_checksum(script)}'" for script in scripts.values()),
        figure=figure.to_json(),  # writes < as \u003c, so that no name ends the element
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8", newline="\n")


def _checksum(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
