"""A run as a PNG: norms, limits, and what was clipped or withheld."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradclip.tools.curves import Curve, Floats, Steps

__all__ = ["Clipping", "Counts", "clip_rate", "plot_png"]

# From Okabe and Ito's palette, told apart also by colour-blind readers and on black as on white.
GREY, VERMILION, PURPLE = "#7A8698", "#D55E00", "#9B4FC4"
COLORS = ("#1F83C6", "#009E73", "#D55E00", "#CC79A7", "#B58900", "#9B4FC4")
RATE_BINS = 60
MOST_MARKS = 300


class Counts(NamedTuple):
    """Numbers of steps over a run."""

    steps: int
    clipped: int
    skipped: int


class Clipping(NamedTuple):
    """What one configuration did over a run, to be drawn.

    Attributes:
        name: The configuration, as plain text.
        counts: How many steps there were, and how many of them were clipped and withheld.
        limit: The limit over the steps; None if unknown.
        clipped: Clipped steps in rising order; an even choice of them will do. None if unknown.
        skipped: Withheld steps, likewise.
    """

    name: str
    counts: Counts
    limit: Curve | None
    clipped: Steps | None
    skipped: Steps | None


class Colors(NamedTuple):
    """Of one configuration."""

    limit: str
    clipped: str
    skipped: str


def colors_of(count: int) -> list[Colors]:
    """Colours of so many configurations; for a single one, marks stand out from the limit."""
    if count == 1:
        return [Colors(COLORS[0], VERMILION, PURPLE)]
    return [Colors(color, color, color) for color in islice(cycle(COLORS), count)]


def clip_rate(norm: Curve, made: Clipping) -> tuple[Steps, Floats]:
    """The share of steps that were clipped, over the run.

    Args:
        norm: Any curve of the run; its buckets say where the steps are.
        made: Its clipped steps must be known.

    Returns:
        Int64 of shape (bins,), the last step of each bin, and float64 of that shape, the share.
    """
    steps, clipped = made.counts.steps, _known(made.clipped)
    buckets = max(1, len(norm.step))
    # All buckets but the last hold equally many steps, a power of two.
    width = 2 ** math.ceil(math.log2(max(1.0, steps / buckets)))
    together = math.ceil(buckets / RATE_BINS)
    ends = norm.step[together - 1 :: together]
    if buckets % together:
        ends = np.append(ends, norm.step[-1])
    held = np.full(len(ends), width * together)
    held[-1:] = max(1, steps - width * together * (len(ends) - 1))
    found = np.bincount(np.searchsorted(ends, clipped), minlength=len(ends))[: len(ends)]
    return ends, np.minimum(1.0, found * (made.counts.clipped / max(1, len(clipped))) / held)


def find_marks(norm: Curve, steps: Steps | None) -> tuple[Steps, Floats]:
    """Where to mark steps: at most one mark per bucket, at its highest norm.

    A bucket without a finite norm has its mark at the top.
    """
    steps = _known(steps)
    if not len(norm.step) or not len(steps):
        return np.empty(0, np.int64), np.empty(0)
    place = np.minimum(np.searchsorted(norm.step, steps), len(norm.step) - 1)
    place, first = np.unique(place, return_index=True)
    high = norm.high[place]
    top = np.nanmax(norm.high) if np.isfinite(norm.high).any() else 1.0
    return steps[first], np.where(np.isfinite(high), high, top)


def find_clip_marks(norm: Curve, made: Sequence[Clipping]) -> list[tuple[Steps, Floats]]:
    """Marks of each configuration; none where several configurations would hide the norm."""
    found = [find_marks(norm, one.clipped) for one in made]
    most = MOST_MARKS if len(found) > 1 else math.inf
    return [marks if len(marks[0]) <= most else find_marks(norm, None) for marks in found]


def _known(steps: Steps | None) -> Steps:
    return np.empty(0, np.int64) if steps is None else steps


def _describe(made: Clipping) -> str:
    counts = made.counts
    text = f"{made.name}\n{counts.clipped / max(1, counts.steps):.2%} clipped"
    return f"{text}\n{counts.skipped:,} withheld" if counts.skipped else text


def plot_png(path: str | Path, title: str, norm: Curve, made: Sequence[Clipping]) -> None:
    """Draw a run: the norm with the limits above it, and the clip rate below.

    Args:
        path: The PNG file to write.
        title: Plain text.
        norm: The norm before clipping.
        made: One for each configuration, with limits and steps.
    """
    from matplotlib.figure import Figure
    from matplotlib.transforms import offset_copy

    figure = Figure(figsize=(10, 5), dpi=110, facecolor="white")
    grid = {"left": 0.075, "right": 0.79, "top": 0.915, "bottom": 0.1, "hspace": 0.1}
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1), gridspec_kw=grid)
    upper.set_title(title, loc="left", weight="bold", size=12, pad=10, parse_math=False)
    upper.fill_between(norm.step, norm.low, norm.high, color=GREY, alpha=0.35, linewidth=0)
    upper.plot(norm.step, norm.last, color=GREY, linewidth=0.8)
    line = {"drawstyle": "steps-mid", "linewidth": 1.8, "solid_joinstyle": "round"}
    entries = [("gradient norm", GREY)]
    drawn = zip(made, colors_of(len(made)), find_clip_marks(norm, made), strict=True)
    for row, (one, colors, clip_marks) in enumerate(drawn):
        if one.limit is not None:
            upper.plot(one.limit.step, one.limit.last, color=colors.limit, **line)
        for marks, shape, size, color in (
            (clip_marks, "v", 3.5, colors.clipped),
            (find_marks(norm, one.skipped), "X", 6.5, colors.skipped),
        ):
            style = {"markersize": size, "markeredgecolor": "white", "markeredgewidth": 0.3}
            shift = offset_copy(upper.transData, figure, y=4 + 6 * row, units="points")
            upper.plot(*marks, shape, color=color, transform=shift, clip_on=False, **style)
        ends, rate = clip_rate(norm, one)
        edges = np.concatenate([norm.step[:1], ends])
        lower.stairs(100 * rate, edges, color=colors.clipped, linewidth=1.5, fill=len(made) == 1)
        entries.append((_describe(one), colors.limit))
    _name_lines(upper, entries)
    _shape_axes(upper, lower, norm)
    legend = "▼ clipped   ✖ withheld" if any(one.counts.skipped for one in made) else "▼ clipped"
    upper.text(1.02, 0.0, legend, color="0.35", size=9, transform=upper.transAxes)
    figure.savefig(path, metadata={"Software": None})


def _name_lines(axes: Any, entries: list[tuple[str, str]]) -> None:
    """Write what each colour means at the right."""
    height = 1.0
    for text, color in entries:
        name, *rest = text.split("\n")
        shown = "\n".join([name if len(name) <= 24 else f"…{name[-23:]}", *rest])
        style = {"weight": "bold", "va": "top", "size": 9, "linespacing": 1.35}
        place = {"transform": axes.transAxes, "parse_math": False}
        axes.text(1.02, height, shown, color=color, **style, **place)
        height -= 0.08 + 0.06 * len(rest)


def _shape_axes(upper: Any, lower: Any, norm: Curve) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    positive = norm.high[norm.high > 0]
    if len(positive):
        upper.set_yscale("log", nonpositive="mask")
        low, high = upper.get_ylim()
        upper.set_ylim(low, high * (high / low) ** 0.06)
        upper.yaxis.set_minor_locator(NullLocator())
        wide = high / low > 1e3
        near = LogLocator(subs=(1, 2, 5)) if high / low > 5 else MaxNLocator(5)
        upper.yaxis.set_major_locator(LogLocator() if wide else near)
        upper.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    upper.set_ylabel("gradient norm")
    lower.set_ylabel("clip rate")
    lower.set_ylim(bottom=0)
    lower.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    lower.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    lower.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    lower.set_xlabel("optimizer step")
    if len(norm.step) > 1:
        lower.set_xlim(norm.step[0], norm.step[-1])
    for axes in (upper, lower):
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_label_coords(-0.07, 0.5)
