"""A run as an interactive figure: norms, limits, and what was clipped or withheld."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradclip.tools.charts import (
    COLORS,
    GREY,
    PURPLE,
    VERMILION,
    Counts,
    Steps,
    clip_rate,
    colors_by_name,
    find_clip_marks,
    find_marks,
)
from gradclip.tools.curves import Curve

__all__ = ["Note", "draw_figure"]


class Note(NamedTuple):
    """What to say of a step; its norm is NaN if it wasn't finite."""

    step: int
    grad_norm: float
    lines: Sequence[str]


def draw_figure(
    norm: Curve,
    limits: Mapping[str, Curve],
    clipped: Mapping[str, Steps],
    skipped: Mapping[str, Steps],
    *,
    counts: Mapping[str, Counts],
    loss: Curve | None = None,
    nonfinite: Steps | None = None,
    notes: Sequence[Note] = (),
) -> Any:
    """Draw a run; its rows are zoomed together.

    Args:
        norm: The norm before clipping.
        limits: The limit by name of the configuration.
        clipped: Int64, the clipped steps by the same names, or an even choice of them.
        skipped: Int64, the withheld steps by the same names, likewise.
        counts: Of the run, by the same names.
        loss: A row of its own, if given.
        nonfinite: Int64, steps that were not finite.
        notes: Shown where the pointer is on a step; those steps are marked.

    Returns:
        A `plotly.graph_objects.Figure`. Names are shown as they are, never as markup.
    """
    from plotly.subplots import make_subplots

    events = _name_events(skipped, nonfinite)
    wanted = {
        "gradient norm": 0.55,
        "loss": 0.18 * (loss is not None),
        "clip rate": 0.15 * bool(clipped),
        "": (0.06 + 0.03 * len(events)) * bool(events),
    }
    heights = {name: height for name, height in wanted.items() if height}
    rows = {name: {"row": row, "col": 1} for row, name in enumerate(heights, 1)}
    figure = make_subplots(
        rows=len(rows),
        shared_xaxes=True,
        vertical_spacing=0.03,
        row_heights=list(heights.values()),
    )
    _shape_figure(figure, rows, norm)
    _draw_band(figure, norm, "gradient norm", GREY, rows)
    _draw_limits(figure, norm, limits, clipped)
    _draw_notes(figure, notes)
    if loss is not None:
        _draw_band(figure, loss, "loss", PURPLE, rows)
    for name, steps in clipped.items():
        ends, rate = clip_rate(norm, steps, counts[name])
        at = {"x": np.concatenate([norm.step[:1], ends]), "y": np.concatenate([rate[:1], rate])}
        line = {"shape": "vh", "color": colors_by_name(clipped)[name].clipped, "width": 1.6}
        text = {"name": _label("clip rate", name, clipped), "hovertemplate": "%{y:.1%}"}
        fill = {"mode": "lines", "fill": "tozeroy" if len(clipped) == 1 else "none"}
        figure.add_scatter(**at, line=line, showlegend=False, **fill, **text, **rows["clip rate"])
    if events:
        _draw_events(figure, norm, events, notes, rows[""])
    return figure


class _Event(NamedTuple):
    label: str
    name: str
    steps: Steps
    color: str


def _name_events(skipped: Mapping[str, Steps], nonfinite: Steps | None) -> list[_Event]:
    colors = colors_by_name(skipped)
    events = [
        _Event("withheld", _label("withheld", name, skipped), steps, colors[name].skipped)
        for name, steps in skipped.items()
    ]
    if nonfinite is not None:
        events.append(_Event("not finite", "not finite", nonfinite, VERMILION))
    return [event for event in events if len(event.steps)]


def _draw_events(
    figure: Any,
    norm: Curve,
    events: Sequence[_Event],
    notes: Sequence[Note],
    place: Mapping[str, int],
) -> None:
    """A line of marks for each kind, from the bottom up."""
    texts = {note.step: _hover_text(note) for note in notes}
    for height, event in enumerate(events):
        x = find_marks(norm, event.steps)[0]
        hover = [texts.get(int(step), f"step {step:,}") for step in x]
        marker = {"symbol": "x", "size": 8, "color": event.color}
        figure.add_scatter(
            x=x,
            y=[height] * len(x),
            mode="markers",
            marker=marker,
            name=event.name,
            hovertext=hover,
            hovertemplate="%{hovertext}",
            showlegend=False,
            **place,
        )
    labels = [event.label for event in events]
    ticks = {"tickvals": list(range(len(events))), "ticktext": labels, "title_text": None}
    figure.update_yaxes(range=[-0.7, len(events) - 0.3], **ticks, **place)


def _draw_limits(
    figure: Any, norm: Curve, limits: Mapping[str, Curve], clipped: Mapping[str, Steps]
) -> None:
    """The limits, and a mark above what they clipped."""
    clip_marks = find_clip_marks(norm, clipped)
    for name, colors in colors_by_name(limits).items():
        group = name if len(limits) > 1 else None
        figure.add_scatter(
            x=limits[name].step,
            y=limits[name].last,
            mode="lines",
            line={"shape": "hvh", "color": colors.limit, "width": 2},
            name=_label("limit", name, limits),
            hovertemplate="%{y:.4g}",
            legendgroup=group,
            row=1,
            col=1,
        )
        x, y = clip_marks[name]
        figure.add_scatter(
            x=x,
            y=y,
            mode="markers",
            marker={"symbol": "triangle-down", "size": 6, "color": colors.clipped},
            name=_label("clipped", name, limits),
            hoverinfo="skip",
            legendgroup=group,
            showlegend=len(limits) == 1 and len(x) > 0,
            row=1,
            col=1,
        )


def _draw_notes(figure: Any, notes: Sequence[Note]) -> None:
    finite = [note for note in notes if math.isfinite(note.grad_norm)]
    if finite:
        figure.add_scatter(
            x=[note.step for note in finite],
            y=[note.grad_norm for note in finite],
            mode="markers",
            marker={
                "symbol": "circle-open",
                "size": 11,
                "color": VERMILION,
                "line": {"width": 1.5},
            },
            name="in the table",
            hovertext=[_hover_text(note) for note in finite],
            hovertemplate="%{hovertext}",
            row=1,
            col=1,
        )


def _draw_band(
    figure: Any, curve: Curve, name: str, color: str, rows: Mapping[str, Mapping[str, int]]
) -> None:
    """A line, and behind it what it reached where a bucket holds several steps."""
    if np.any(curve.high > curve.low):
        edge = {"mode": "lines", "line": {"width": 0}, "showlegend": False}
        low = {"name": "lowest", "hoverinfo": "skip"}
        figure.add_scatter(x=curve.step, y=curve.low, **edge, **low, **rows[name])
        fill = {"fill": "tonexty", "fillcolor": f"{color}55", "hovertemplate": "%{y:.4g}"}
        figure.add_scatter(
            x=curve.step, y=curve.high, name=f"highest {name}", **fill, **edge, **rows[name]
        )
    figure.add_scatter(
        x=curve.step,
        y=curve.last,
        mode="lines" if len(curve.step) > 1 else "markers",
        line={"color": color, "width": 1},
        name=name,
        hovertemplate="%{y:.4g}",
        showlegend=name == "gradient norm",
        **rows[name],
    )


def _label(what: str, name: str, names: Mapping[str, Any]) -> str:
    return what if len(names) == 1 else f"{what}, {_plain(name)}"


def _plain(text: str) -> str:
    """Text that plotly, which reads some HTML in names and labels, shows as it is."""
    return html.escape(text, quote=False)


def _hover_text(note: Note) -> str:
    return "<br>".join(_plain(line) for line in note.lines)


def _shape_figure(figure: Any, rows: Mapping[str, Mapping[str, int]], norm: Curve) -> None:
    grid = {"gridcolor": "rgba(128, 136, 150, 0.25)", "zeroline": False, "showline": False}
    if len(norm.step) > 1:
        first, last = int(norm.step[0]), int(norm.step[-1])
        margin = 0.01 * (last - first)  # for marks on the last step
        figure.update_xaxes(range=[first - margin, last + margin])
    figure.update_xaxes(**grid)
    figure.update_yaxes(**grid, fixedrange=True)
    figure.update_xaxes(title_text="optimizer step", tickformat=",", row=len(rows), col=1)
    for name, place in rows.items():
        figure.update_yaxes(title_text=name, **place)
    positive = norm.low[norm.low > 0]
    wide = len(positive) > 0 and np.nanmax(norm.high) > 1e3 * positive.min()
    scale = {"type": "log", "dtick": 1 if wide else "D2", "tickformat": "~g"}
    figure.update_yaxes(**scale, fixedrange=False, row=1, col=1)
    if "clip rate" in rows:
        percent = {"tickformat": ".0%", "rangemode": "tozero", "nticks": 4}
        figure.update_yaxes(**percent, **rows["clip rate"])
    clear = "rgba(0, 0, 0, 0)"
    figure.update_layout(
        template="none",
        height=600 + 130 * ("loss" in rows),
        margin={"l": 80, "r": 16, "t": 8, "b": 48},
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        modebar={"bgcolor": clear, "color": GREY, "activecolor": COLORS[0]},
        hovermode="x unified",
        hoverlabel={"namelength": -1},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    )
