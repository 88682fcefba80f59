"""A replay and a recommendation as text for a terminal, as JSON, and drawn."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from gradclip.records.trace_file import null_unless_finite
from gradclip.tools.charts import Clipping, Counts, plot_png
from gradclip.tools.figure import draw_figure
from gradclip.tools.page import write_page
from gradclip.tools.plain import Listing, plain
from gradclip.tools.recommend import Option, Recommendation
from gradclip.tools.replay import Outcome, Replay

__all__ = [
    "draw_replay",
    "recommendation_as_json",
    "recommendation_as_text",
    "recommendation_as_yaml",
    "replay_as_json",
    "replay_as_text",
]


def replay_as_text(replay: Replay) -> RenderableType:
    """A table of the configurations, to print with rich."""
    rows = _rows(replay)
    name, *heads = rows[0]
    cells = [([row[head] for head in heads], [row[name]]) for row in rows]
    table = Listing("", heads, name, cells, names_first=True)
    ended = (
        plain(f"{o.name}: training would have ended at step {o.stopped_at}: {o.why_stopped}")
        for o in replay.outcomes
        if o.stopped_at is not None
    )
    return Group(plain(_extent(replay)), "", table, "", *ended, *map(plain, replay.notes))


def replay_as_json(replay: Replay) -> str:
    """Everything but the curves and steps; null is no limit, or no such step."""
    shown = [f.name for f in fields(Outcome) if f.repr]
    outcomes = [{name: getattr(o, name) for name in shown} for o in replay.outcomes]
    content = {
        "first_step": replay.first,
        "last_step": replay.last,
        "steps": replay.steps,
        "nonfinite": replay.nonfinite,
        "outcomes": outcomes,
        "notes": replay.notes,
    }
    return json.dumps(null_unless_finite(content), indent=2, allow_nan=False)


def draw_replay(replay: Replay, title: str, *, png: Path | None, html: Path | None) -> None:
    """Draw norms and limits to a PNG, a page, or both.

    Args:
        replay: What to draw.
        title: Plain text.
        png: The picture to write; None for none.
        html: The page to write; None for none.
    """
    clippings = [
        Clipping(
            name=o.name,
            counts=Counts(o.steps, o.clipped, o.skipped),
            limit=o.limit,
            clipped=o.clipped_steps,
            skipped=o.skipped_steps,
        )
        for o in replay.outcomes
    ]
    if png is not None:
        plot_png(png, title, replay.norm, clippings)
    if html is not None:
        rows, notes = _rows(replay), [_extent(replay), *replay.notes]
        figure = draw_figure(replay.norm, clippings)
        write_page(html, "replay.html", title, figure, rows=rows, notes=notes)


def recommendation_as_text(found: Recommendation) -> RenderableType:
    """What the run was like and a table of the options, to print with rich."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("option", no_wrap=True)
    for head in ("how\nsure", "clips", "eighths\nclip", "on\nsteps"):
        table.add_column(head, justify="right", no_wrap=True)
    for option in found.options:
        mark = "> " if option == found.taken else "  "
        table.add_row(
            plain(mark + option.name),
            option.confidence,
            f"{option.rate:.1%}",
            f"{min(option.parts):.1%} to {max(option.parts):.1%}",
            f"{option.first} to {option.last}",
        )
    return Group(*map(plain, found.facts), "", table)


def recommendation_as_yaml(found: Recommendation) -> str:
    """The option to take, ready to paste, then those that are sure too; all else as comments."""
    lead = f"To clip {found.clip_rate * 100:.3g} % of the steps take"
    blocks = [_block(found.taken, lead, [found.why, *found.taken.reasons])]
    blocks += [
        _block(option, "Or", option.reasons)
        for option in found.options
        if option != found.taken and option.confidence != "low"
    ]
    return "\n".join(blocks)


def recommendation_as_json(found: Recommendation) -> str:
    """Everything, with the settings of each option as YAML."""
    shown = [f.name for f in fields(Option) if f.name != "config"]
    options = [
        {**{name: getattr(o, name) for name in shown}, "yaml": o.yaml} for o in found.options
    ]
    content = {**asdict(found), "options": options, "taken": found.taken.name}
    return json.dumps(content, indent=2, allow_nan=False)


def _block(option: Option, lead: str, reasons: Sequence[str]) -> str:
    """An option as a YAML document of its own."""
    lines = [f"{lead} {option.name} (how sure: {option.confidence}).", *reasons]
    comments = [
        textwrap.fill(line, 98, initial_indent="# ", subsequent_indent="#   ") for line in lines
    ]
    return "\n".join(["---", *comments, option.yaml])


def _extent(replay: Replay) -> str:
    lost = f", {replay.nonfinite:,} not finite" if replay.nonfinite else ""
    return f"Steps {replay.first} to {replay.last}: {replay.steps:,} with a norm{lost}."


def _rows(replay: Replay) -> Sequence[dict[str, str]]:
    return [dict(_cells(outcome)) for outcome in replay.outcomes]


def _cells(outcome: Outcome) -> Iterator[tuple[str, str]]:
    yield "configuration", outcome.name
    yield "clipped", f"{outcome.clip_rate:.2%}"
    yield "withheld", f"{outcome.skipped:,}"
    yield "first limit", _limit(outcome.limit_first)
    yield "median limit", _limit(outcome.limit_median)
    yield "last limit", _limit(outcome.limit_last)
    yield "mean coef", f"{outcome.mean_coef:.4f}"
    yield "ended at", "-" if outcome.stopped_at is None else str(outcome.stopped_at)


def _limit(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "none"
