"""The picture: what the corrupted batches did to each run, and what ZClip did about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from runs import Run

# Okabe and Ito's palette, told apart also by colour-blind readers; line styles differ as well.
VERMILION, BLUE, GREEN, PURPLE, GREY = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#595959"
STYLES = ((VERMILION, "-"), (BLUE, "--"), (GREEN, "-"), (PURPLE, ":"))
WINDOW = 15


def draw(runs: Mapping[str, Run], zclip: str, path: Path) -> None:
    """Write the picture.

    Args:
        runs: By name, at most four.
        zclip: The name of the run whose gradient norms to show.
        path: A PNG file.
    """
    mpl.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(9, 8.4), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _losses(above, runs)
    _norms(below, runs[zclip])
    figure.savefig(path)


def _losses(axes: Axes, runs: Mapping[str, Run]) -> None:
    for (name, run), (color, line) in zip(runs.items(), STYLES, strict=False):
        steps, losses = _smooth(run)
        label = f"{name}: {run.validation_loss:.2f} on held-out text"
        axes.plot(steps, losses, color=color, linestyle=line, linewidth=2, label=label)
    _mark(axes, next(iter(runs.values())))
    axes.set_title("Training loss: lower is better", loc="left", weight="bold")
    axes.set_ylabel("loss (nats per character)")
    axes.legend(frameon=False)


def _norms(axes: Axes, run: Run) -> None:
    steps = np.arange(len(run.grad_norm))
    limit = np.where(np.isfinite(run.limit), run.limit, np.nan)
    _mark(axes, run)
    axes.plot(steps, run.grad_norm, color=VERMILION, linewidth=1.3, label="before clipping")
    axes.plot(steps, run.clipped_norm, color=GREEN, linewidth=1.8, label="after clipping")
    axes.plot(steps, limit, color=GREY, linestyle="--", linewidth=1.2, label="ZClip's limit")
    axes.set_yscale("log")
    axes.set_title("Gradient norm in the ZClip run", loc="left", weight="bold")
    axes.set_ylabel("gradient norm (log scale)")
    axes.set_xlabel("training step")
    axes.legend(frameon=False, loc="upper right", ncols=3)


def _mark(axes: Axes, run: Run) -> None:
    """Shade the steps whose batch was corrupted."""
    label: str | None = "corrupted batch"
    for step in np.flatnonzero(run.corrupted):
        axes.axvspan(step - 1, step + 1, color="0.85", label=label, zorder=0)
        label = None


def _smooth(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Running mean of the loss over the batches that were not corrupted."""
    steps = np.flatnonzero(~np.array(run.corrupted))
    losses = np.array(run.loss)[steps]
    width = min(WINDOW, len(losses))
    means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    return steps[width - 1 :], means
