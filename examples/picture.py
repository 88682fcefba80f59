"""The picture: what the corrupted batches did to each run, and what `auto` did about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from runs import Run

# Okabe and Ito's palette, told apart also by colour-blind readers; line styles differ as well.
VERMILION, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#595959"
STYLES = ((VERMILION, "-"), (BLUE, "--"), (GREEN, "-"), ("black", ":"))
WINDOW = 15  # steps that the loss is averaged over


def draw(runs: Mapping[str, Run], auto: str, path: Path) -> None:
    """Write the picture.

    Args:
        runs: By name, at most four.
        auto: The name of the run whose gradient norms to show.
        path: A PNG file.
    """
    mpl.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(9, 8), dpi=110, layout="constrained")
    figure.suptitle("A small GPT learns English; some of its batches are corrupted", size=14)
    above, below = figure.subplots(2, 1, sharex=True)
    _losses(above, runs)
    _norms(below, runs[auto])
    figure.savefig(path)


def _losses(axes: Axes, runs: Mapping[str, Run]) -> None:
    for (name, run), (color, line) in zip(runs.items(), STYLES, strict=False):
        steps, losses = _smooth(run)
        label = f"{name} (held-out loss {run.validation_loss:.2f})"
        axes.plot(steps, losses, color=color, linestyle=line, linewidth=2, label=label)
    used = 0.76  # what lies above this share of the panel is for the legend
    _mark(axes, next(iter(runs.values())), used)
    low, high = axes.get_ylim()
    axes.set_ylim(low, low + (high - low) / used)
    axes.set_title("Training loss on the clean batches, smoothed", loc="left", weight="bold")
    axes.set_ylabel("loss, lower is better")
    axes.legend(loc="upper right", ncols=2, frameon=False)


def _norms(axes: Axes, run: Run) -> None:
    norms, clipped = np.array(run.grad_norm), np.array(run.clipped_norm)
    limit = np.where(np.isfinite(run.limit), run.limit, np.nan)
    used = 0.88
    _mark(axes, run, used)
    axes.plot(norms, color=VERMILION, linewidth=1.3, label="before clipping")
    axes.plot(clipped, color=GREEN, linewidth=1.8, label="after clipping")
    axes.plot(limit, color=GREY, linestyle="--", linewidth=1.2, label="its limit")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** (1 / used - 1))
    worst = int(norms.argmax())
    fate = f"the largest, {norms[worst]:.0f}, was clipped to {clipped[worst]:.1f}"
    axes.set_title(f"Gradient norms of the run with auto: {fate}", loc="left", weight="bold")
    axes.set_ylabel("gradient norm (log scale)")
    axes.set_xlabel("training step")
    axes.legend(loc="upper right", ncols=4, frameon=False)


def _mark(axes: Axes, run: Run, height: float) -> None:
    """Shade the steps whose batch was corrupted."""
    label: str | None = "corrupted batch"
    for step in np.flatnonzero(run.corrupted):
        axes.axvspan(step - 1, step + 1, 0, height, color="0.85", label=label, zorder=0)
        label = None


def _smooth(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Running mean of the loss over the batches that were not corrupted."""
    steps = np.flatnonzero(~np.array(run.corrupted))
    losses = np.array(run.loss)[steps]
    width = min(WINDOW, len(losses))
    means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    return steps[width - 1 :], means
