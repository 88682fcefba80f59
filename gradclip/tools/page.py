"""One HTML file that needs nothing else: an interactive figure, tables, and text."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

__all__ = ["write_page"]

PAGES = Path(__file__).parent / "pages"


def write_page(path: str | Path, template: str, title: str, figure: Any, **content: Any) -> None:
    """Write a page.

    Args:
        path: The HTML file to write. Missing folders are made.
        template: Name of a file in `pages/`.
        title: Plain text.
        figure: A plotly figure.
        **content: The values that the template shows; they are escaped there.
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
    sums = [hashlib.sha256(script.encode()).digest() for script in scripts.values()]
    text = environment.get_template(template).render(
        content,
        **scripts,
        title=title,
        allowed=" ".join(f"'sha256-{base64.b64encode(each).decode()}'" for each in sums),
        figure=figure.to_json(),  # writes < as \u003c, so that no name ends the element
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8", newline="\n")
