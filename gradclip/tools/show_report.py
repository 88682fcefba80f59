"""A report as JSON, as text for a terminal, and as a page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.table import Table

from gradclip.records.trace_file import null_unless_finite
from gradclip.tools.charts import plot_png
from gradclip.tools.figure import Note, draw_figure
from gradclip.tools.page import write_page
from gradclip.tools.plain import Listing, plain, whole
from gradclip.tools.report import Report, Spike

__all__ = ["describe_as_json", "describe_as_text", "write_report"]

SHOWN_PARAMETERS = 5


def describe_as_json(report: Report, page: Path) -> str:
    """Everything but the curves, as JSON; null is unknown, or not finite."""
    counts = report.clipping.counts
    steps, clipped, skipped, nonfinite = _totals(report)
    content = {
        "run": str(report.run.path),
        "page": str(page),
        "notes": report.run.notes,
        "norm_type": report.run.header.norm_type,
        "steps": steps,
        "clipped": clipped,
        "clip_rate": None if clipped is None else clipped / steps,
        "skipped": skipped,
        "nonfinite": nonfinite,
        "shown": {"first_step": report.first, "last_step": report.last, **counts._asdict()},
        "worst": [_spike_as_dict(spike) for spike in report.worst],
        "not_finite": [_spike_as_dict(spike) for spike in report.broken],
    }
    return json.dumps(null_unless_finite(content), indent=2, allow_nan=False)


def _spike_as_dict(spike: Spike) -> dict[str, Any]:
    shares = [{"parameter": n, "share": share} for n, share in spike.shares[:SHOWN_PARAMETERS]]
    shown = {**asdict(spike), "shares": shares}
    del shown["finite"]
    return shown


def describe_as_text(report: Report) -> RenderableType:
    """A summary and the steps that stood out, to print with rich."""
    facts = Table.grid(padding=(0, 2))
    for name, value, more in _facts(report):
        facts.add_row(name, plain(value, "bold"), plain(more))
    parts: list[RenderableType] = [whole(report.run.path), facts]
    parts += [plain(line) for line in _extent(report)]
    if report.broken:
        parts.append(
            _listing(
                "Steps that were not finite",
                ("step", "batch", "done"),
                "parameters that were not finite, nearest the loss first",
                [(_show(spike), _some(spike.not_finite)) for spike in report.broken],
            )
        )
    if report.worst:
        shown = [_show(spike) for spike in report.worst]
        parts.append(
            _listing(
                "Steps that stood out",
                ("step", "batch", "norm", "limit", "done"),
                "parameters by their share of the norm",
                [(each, [part["text"] for part in each["parts"][:2]]) for each in shown],
            )
        )
    return Group(*parts)


def _listing(
    title: str,
    heads: tuple[str, ...],
    about: str,
    rows: Sequence[tuple[Mapping[str, Any], Sequence[str]]],
) -> Listing:
    cells = [([str(shown[head]) for head in heads], names) for shown, names in rows]
    return Listing(title, heads, about, cells, left=("done",))


def write_report(report: Report, path: Path, png: Path | None = None) -> None:
    """Write the page, which is one file that needs nothing else, and a picture if one is named."""
    if png is not None:
        plot_png(png, report.run.path.name, report.norm, [report.clipping])
    notes = [Note(s.step, s.grad_norm, list(_lines(s))) for s in report.worst + report.broken]
    figure = draw_figure(
        report.norm,
        [report.clipping],
        loss=report.loss,
        nonfinite=report.nonfinite_steps,
        notes=notes,
    )
    config = report.run.header.config
    write_page(
        path,
        "report.html",
        f"Gradient clipping of {report.run.path.name}",
        figure,
        extent=_extent(report),
        facts=_facts(report),
        broken=[_show(spike) for spike in report.broken],
        worst=[_show(spike) for spike in report.worst],
        explained=_explain_shares(report),
        config=None if config is None else yaml.safe_dump(dict(config), sort_keys=False),
    )


def _totals(report: Report) -> tuple[int, int | None, int, int]:
    """Steps of the whole run: all, clipped (None if unknown), withheld, not finite."""
    if whole := report.run.header.counts:
        return whole["steps"], whole["clipped"], whole["skipped"], whole["nonfinite"]
    steps, clipped, skipped = report.clipping.counts
    known = report.clipping.clipped is not None
    return steps, clipped if known else None, skipped, report.nonfinite


def _facts(report: Report) -> list[tuple[str, str, str]]:
    """Names, values and remarks."""
    steps, clipped, skipped, nonfinite = _totals(report)
    rate, remark = "unknown", "the log doesn't say"
    if clipped is not None:
        rate = f"{clipped / max(1, steps):.2%}"
        remark = f"{clipped:,} {'step' if clipped == 1 else 'steps'}"
    facts = [
        ("steps", f"{steps:,}", ""),
        ("clipped", rate, remark),
        ("withheld", f"{skipped:,}", ""),
        ("not finite", f"{nonfinite:,}", ""),
    ]
    if largest := report.largest:
        facts.append(("largest norm", f"{largest.grad_norm:.4g}", f"step {largest.step:,}"))
    return facts


def _extent(report: Report) -> list[str]:
    """The steps that the numbers are of."""
    held, steps = report.clipping.counts.steps, _totals(report)[0]
    span = f"steps {report.first:,} to {report.last:,}"
    if held < steps:
        line = f"The chart shows the last {held:,}, {span}; the tables hold earlier ones too."
    else:
        line = span.capitalize() + "."
    return [line, *report.run.notes]


def _explain_shares(report: Report) -> str:
    norm_type = report.run.header.norm_type
    if not any(spike.shares for spike in report.worst):
        return "The trace doesn't hold the norms of parameters; a flight record does."
    if math.isinf(norm_type):
        return "A share is the parameter's largest element over that of all."
    return (
        f"A share is (norm of the parameter / norm of all) to the power {norm_type:g}; shares add "
        "up to 100 %."
    )


def _show(spike: Spike) -> dict[str, Any]:
    """Values of a step as text."""
    top = spike.shares[:SHOWN_PARAMETERS]
    return {
        "step": f"{spike.step:,}",
        "batch": "" if spike.batch is None else f"{spike.batch:,}",
        "norm": f"{spike.grad_norm:.4g}",
        "limit": "" if math.isnan(spike.limit) else f"{spike.limit:.4g}".replace("inf", "none"),
        "done": _action(spike),
        "parts": [{"percent": f"{part:.1%}", "text": f"{part:.1%} {name}"} for name, part in top],
        "names": ", ".join(_some(spike.not_finite)),
    }


def _action(spike: Spike) -> str:
    if spike.skipped:
        return "withheld"
    if not spike.clipped:
        return ""
    return f"scaled by {spike.coef:.3g}" if spike.coef < 1 else "clipped"


def _some(names: tuple[str, ...]) -> list[str]:
    more = len(names) - 2 * SHOWN_PARAMETERS
    shown = list(names[: 2 * SHOWN_PARAMETERS])
    return [*shown, f"and {more} more"] if more > 0 else shown or ["not recorded"]


def _lines(spike: Spike) -> Iterator[str]:
    """The text of a step in the figure."""
    shown = _show(spike)
    what = f"norm {shown['norm']}" if spike.finite else "not finite"
    action = f", {shown['done']}" if shown["done"] else ""
    yield f"step {shown['step']}: {what}{action}"
    yield from spike.not_finite[:SHOWN_PARAMETERS]
    if spike.finite:
        yield from (part["text"] for part in shown["parts"])
