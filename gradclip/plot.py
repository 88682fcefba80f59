"""A picture of the last steps, for a notebook."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradclip.errors import ConfigError

__all__ = ["plot_steps"]


def plot_steps(steps: Sequence[Mapping[str, Any]], axes: Any | None = None) -> Any:
    """Draw the norm of each step, the limit, and marks on what was clipped or withheld.

    Args:
        steps: As `Recorder.steps` gives them.
        axes: Of matplotlib, to draw on; None makes new ones.

    Returns:
        The axes.

    Raises:
        ConfigError: If there are no steps, or matplotlib isn't installed.
    """
    found = [step for step in steps if math.isfinite(step.get("grad_norm", math.nan))]
    if not found:
        msg = (
            "plot: no step with a finite norm was made yet; allowed: after the first clip(). Call "
            "plot() later."
        )
        raise ConfigError(msg)
    if axes is None:
        axes = _new_axes()
    numbers = [step["step"] for step in found]
    norms = [step["grad_norm"] for step in found]
    limits = [step["limit"] if math.isfinite(step["limit"]) else math.nan for step in found]
    axes.plot(numbers, norms, color="0.55", linewidth=0.9, label="gradient norm")
    if not all(map(math.isnan, limits)):
        axes.plot(numbers, limits, drawstyle="steps-mid", color="C0", label="limit")
    for flag, shape, color, label in (
        ("clipped", "v", "C0", "clipped"),
        ("skipped", "X", "C3", "withheld"),
    ):
        marked = [
            (n, norm) for n, norm, step in zip(numbers, norms, found, strict=True) if step[flag]
        ]
        if marked:
            axes.plot(*zip(*marked, strict=True), shape, color=color, markersize=4, label=label)
    for step in steps:
        if not step["finite"]:
            axes.axvline(step["step"], color="C3", linewidth=0.6, linestyle=":")
    if any(norm > 0 for norm in norms):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("gradient norm")
    axes.legend(loc="best")
    return axes


def _new_axes() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError:
        msg = "plot needs matplotlib, which isn't installed: pip install 'gradclip[tools]'."
        raise ConfigError(msg) from None
    return pyplot.subplots(figsize=(9, 4))[1]
