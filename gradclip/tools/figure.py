"""A run as an interactive figure: norms, limits, and what was clipped or withheld."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradclip.tools.charts import (
    COLORS,
    GREY,
    PURPLE,
    VERMILION,
    Clipping,
    clip_rate,
    colors_of,
    find_clip_marks,
    find_marks,
)
from gradclip.tools.curves import Curve, Steps

__all__ = ["Note", "draw_figure"]

_TOP = {"row": 1, "col": 1}


class Note(NamedTuple):
    """Text for a step; its norm is NaN if it wasn't finite."""

    step: int
    grad_norm: float
    lines: Sequence[str]

    @property
    def hover_text(self) -> str:
        """The text as plotly takes it."""
        return "<br>".join(map(_plain, self.lines))


class _Event(NamedTuple):
    label: str
    name: str
    steps: Steps
    color: str


def draw_figure(
    norm: Curve,
    made: Sequence[Clipping],
    *,
    loss: Curve | None = None,
    nonfinite: Steps | None = None,
    notes: Sequence[Note] = (),
) -> Any:
    """Draw a run, in rows that zoom together.

    Args:
        norm: The norm before clipping.
        made: One for each configuration.
        loss: Drawn in a row of its own.
        nonfinite: Int64, steps that were not finite.
        notes: Shown when the pointer is on their step, which is marked.

    Returns:
        A `plotly.graph_objects.Figure`. Names are shown as they are, never as markup.
    """
    from plotly.subplots import make_subplots

    events = [event for event in _name_events(made, nonfinite) if len(event.steps)]
    wanted = {
        "gradient norm": 0.55,
        "loss": 0.18 * (loss is not None),
        "clip rate": 0.15 * any(one.clipped is not None for one in made),
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
    _draw_limits(figure, norm, made)
    _draw_notes(figure, notes)
    if loss is not None:
        _draw_band(figure, loss, "loss", PURPLE, rows)
    for one, colors in zip(made, colors_of(len(made)), strict=True):
        if one.clipped is not None:
            ends, rate = clip_rate(norm, one)
            figure.add_scatter(
                x=np.concatenate([norm.step[:1], ends]),
                y=np.concatenate([rate[:1], rate]),
                mode="lines",
                line={"shape": "vh", "color": colors.clipped, "width": 1.6},
                fill="tozeroy" if len(made) == 1 else "none",
                name=_label("clip rate", one, made),
                hovertemplate="%{y:.1%}",
                showlegend=False,
                **rows["clip rate"],
            )
    if events:
        _draw_events(figure, norm, events, notes, rows[""])
    return figure


def _name_events(made: Sequence[Clipping], nonfinite: Steps | None) -> Iterator[_Event]:
    for one, colors in zip(made, colors_of(len(made)), strict=True):
        if one.skipped is not None:
            yield _Event("withheld", _label("withheld", one, made), one.skipped, colors.skipped)
    if nonfinite is not None:
        yield _Event("not finite", "not finite", nonfinite, VERMILION)


def _draw_events(
    figure: Any,
    norm: Curve,
    events: Sequence[_Event],
    notes: Sequence[Note],
    place: Mapping[str, int],
) -> None:
    """A line of marks for each kind of event, from the bottom up."""
    texts = {note.step: note.hover_text for note in notes}
    for height, event in enumerate(events):
        x = find_marks(norm, event.steps)[0]
        figure.add_scatter(
            x=x,
            y=[height] * len(x),
            mode="markers",
            marker={"symbol": "x", "size": 8, "color": event.color},
            name=event.name,
            hovertext=[texts.get(int(step), f"step {step:,}") for step in x],
            hovertemplate="%{hovertext}",
            showlegend=False,
            **place,
        )
    labels = [event.label for event in events]
    ticks = {"tickvals": list(range(len(events))), "ticktext": labels, "title_text": None}
    figure.update_yaxes(range=[-0.7, len(events) - 0.3], **ticks, **place)


def _draw_limits(figure: Any, norm: Curve, made: Sequence[Clipping]) -> None:
    """The limits, and marks on what they clipped."""
    drawn = zip(made, colors_of(len(made)), find_clip_marks(norm, made), strict=True)
    for one, colors, (x, y) in drawn:
        if one.limit is None:
            continue
        group = one.name if len(made) > 1 else None
        figure.add_scatter(
            x=one.limit.step,
            y=one.limit.last,
            mode="lines",
            line={"shape": "hvh", "color": colors.limit, "width": 2},
            name=_label("limit", one, made),
            hovertemplate="%{y:.4g}",
            legendgroup=group,
            **_TOP,
        )
        figure.add_scatter(
            x=x,
            y=y,
            mode="markers",
            marker={"symbol": "triangle-down", "size": 6, "color": colors.clipped},
            name=_label("clipped", one, made),
            hoverinfo="skip",
            legendgroup=group,
            showlegend=len(made) == 1 and len(x) > 0,
            **_TOP,
        )


def _draw_notes(figure: Any, notes: Sequence[Note]) -> None:
    finite = [note for note in notes if math.isfinite(note.grad_norm)]
    if finite:
        line = {"width": 1.5}
        figure.add_scatter(
            x=[note.step for note in finite],
            y=[note.grad_norm for note in finite],
            mode="markers",
            marker={"symbol": "circle-open", "size": 11, "color": VERMILION, "line": line},
            name="in the table",
            hovertext=[note.hover_text for note in finite],
            hovertemplate="%{hovertext}",
            **_TOP,
        )


def _draw_band(
    figure: Any, curve: Curve, name: str, color: str, rows: Mapping[str, Mapping[str, int]]
) -> None:
    """A line, with the range behind it where a bucket holds several steps."""
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


def _label(what: str, one: Clipping, made: Sequence[Clipping]) -> str:
    return what if len(made) == 1 else f"{what}, {_plain(one.name)}"


def _plain(text: str) -> str:
    """Text that plotly shows as it is; plotly reads some HTML in names and labels."""
    return html.escape(text, quote=False)


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
