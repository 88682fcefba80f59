"""Draw docs/images/policies/: what every policy does over one recorded run with spikes.

make pictures
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from gradclip import (
    AGC,
    AdaGC,
    Auto,
    AutoClip,
    ClipByNorm,
    ClipByRMS,
    ClipByValue,
    EmaClip,
    GradientClipper,
    Schedule,
    SkipLarge,
    SkipNonfinite,
    SkipSpike,
    Spam,
    SpikeMax,
    UClip,
    ZClip,
)
from gradclip.policies import Policy

FOLDER = Path(__file__).parent / "images" / "policies"


@dataclass(frozen=True)
class Picture:
    """The picture of one policy.

    Attributes:
        policy: The policy, with settings as on its page.
        title: What there is to see.
        shown: The slot whose norm and limit are drawn: a parameter, or a unit as `name[row]`; None
            for all parameters together.
        norm_type: The p of the norm.
        quantity: The name of this norm.
        shows_after: Whether to draw the norm after clipping as a line, too.
        bad: Steps in which one element of the recorded gradients becomes NaN.
    """

    policy: Policy
    title: str
    shown: str | None = None
    norm_type: float = 2.0
    quantity: str = "gradient norm"
    shows_after: bool = False
    bad: Sequence[int] = field(default=())


LAYER = "attention.weight"  # the layer that also has spikes which the others don't have
PICTURES = {
    "auto": Picture(
        Auto(),
        "The limit starts at 0.12 of the first norm, rises slowly, and meets the norms from below",
    ),
    "norm": Picture(
        ClipByNorm(max_norm=2.0),
        "A fixed limit catches spikes, but also the first steps and a new level",
    ),
    "value": Picture(
        ClipByValue(clip_value=0.3),
        "No element leaves [-0.3, 0.3]; the others keep their size",
        norm_type=float("inf"),
        quantity="largest element",
    ),
    "rms": Picture(
        ClipByRMS(max_rms=0.1),
        "A fixed limit on the root mean square, here of one layer: 0.1 x sqrt(144)",
        shown=LAYER,
    ),
    "agc": Picture(
        AGC(),
        "A row's gradient is held to 0.01 of the norm of its weights, which grow",
        shown=f"{LAYER}[5]",
    ),
    "autoclip": Picture(
        AutoClip(percentile=95, window=100, warmup_steps=25),
        "The limit is the 95th percentile of the last 100 norms; it follows a new level",
    ),
    "zclip": Picture(
        ZClip(max_norm=None),
        "Spikes are pulled back to the mean; after 25 in a row the level is taken as new",
    ),
    "spam": Picture(
        Spam(theta=25.0, decay=0.98),
        "Single elements are held to five times their own running root mean square",
        shows_after=True,
        shown=LAYER,
        norm_type=float("inf"),
        quantity="largest element",
    ),
    "spike_max": Picture(
        SpikeMax(decay=0.98),
        "Elements above the running mean of their parameter's largest are scaled down",
        shown=LAYER,
        norm_type=float("inf"),
        quantity="largest element",
    ),
    "uclip": Picture(
        UClip(limit=0.3),
        "What is cut off is given back later: after a spike, steps stay at the limit",
        shows_after=True,
        norm_type=float("inf"),
        quantity="largest element",
    ),
    "ema": Picture(
        EmaClip(warmup_steps=25),
        "The limit is twice a running mean: it follows a new level, and spikes barely move it",
    ),
    "adagc": Picture(
        AdaGC(warmup_norm=10.0, warmup_steps=25),
        "1.05 x this layer's own mean: much is clipped a little; 50 in a row are a new level",
        shown=LAYER,
    ),
    "skip_nonfinite": Picture(
        SkipNonfinite(),
        "Steps with a NaN are withheld; spikes pass",
        bad=(90, 205, 300),
    ),
    "skip_spike": Picture(
        SkipSpike(window=64, z_threshold=6.0, max_consecutive=10),
        "Spikes are withheld; a new level is, too, for ten steps, then it is the level",
    ),
    "skip_large": Picture(
        SkipLarge(limit=3.0, relative_to="ema", decay=0.95, warmup_steps=25),
        "Steps whose norm is three times the running mean, or more, are withheld",
    ),
}
CURVES = {
    "linear": Schedule(schedule="linear", start=6.0, end=1.0, steps=250),
    "cosine": Schedule(schedule="cosine", start=6.0, end=1.0, steps=250),
    "warmup_cosine": Schedule(
        schedule="warmup_cosine", start=0.5, peak=6.0, end=1.0, warmup_steps=60, steps=250
    ),
}

# The recorded run.
STEPS = 360
SHAPES = {
    "embed.weight": (24, 8),
    "attention.weight": (12, 12),
    "mlp.weight": (16, 12),
    "mlp.bias": (16,),
    "head.weight": (12, 8),
}
SIZES = (0.5, 0.5, 0.6, 0.15, 0.35)  # norms of the parameters' gradients; together about 1
SPIKES = {55: 9.0, 110: 14.0, 160: 30.0, 185: 6.0, 290: 8.0, 330: 18.0}  # in all parameters
LOCAL = {80: 20.0, 135: 12.0, 215: 25.0, 310: 15.0}  # in LAYER
POINTS = {70: 40.0, 145: 60.0, 270: 50.0, 345: 40.0}  # in one element of LAYER
NEW_LEVEL, RISE = 225, 2.5  # a lasting change of level: from which step, by which factor
GROWTH = 1.003  # factor on the weights at each step

# Okabe and Ito's palette, which colour-blind readers can tell apart. Marks also differ in shape.
GREY, BLUE, VERMILION, BLACK = "#6E7B8B", "#0072B2", "#D55E00", "#222222"
GREEN = "#009E73"


def record_run() -> list[list[torch.Tensor]]:
    """Gradients of every step: a drift, a lasting change of level, isolated spikes."""
    random = np.random.default_rng(7)
    run = []
    for step in range(STEPS):
        level = (1 + 3 * np.exp(-step / 35)) * (RISE if step >= NEW_LEVEL else 1.0)
        level *= SPIKES.get(step, 1.0) * random.lognormal(0, 0.1)
        grads = []
        for (name, shape), size in zip(SHAPES.items(), SIZES, strict=True):
            values = random.normal(size=shape)
            norm = size * level * random.lognormal(0, 0.12)
            if name == LAYER:
                norm *= LOCAL.get(step, 1.0)
                values.flat[step % values.size] *= POINTS.get(step, 1.0)
            values *= norm / np.sqrt(values.size)
            grads.append(torch.tensor(values, dtype=torch.float32))
        run.append(grads)
    return run


def weights() -> dict[str, torch.nn.Parameter]:
    """Parameters at the start; `replay` lets them grow, as without weight decay."""
    random = np.random.default_rng(8)
    return {
        name: torch.nn.Parameter(torch.tensor(random.normal(0, 8, shape), dtype=torch.float32))
        for name, shape in SHAPES.items()
    }


@dataclass(frozen=True)
class Replay:
    """One value per step; NaN if there is none."""

    before: np.ndarray
    after: np.ndarray
    limit: np.ndarray
    skipped: np.ndarray


def replay(picture: Picture, run: Sequence[Sequence[torch.Tensor]]) -> Replay:
    """Clip the recorded gradients, and note their norms before and after."""
    parameters = weights()
    clipper = GradientClipper(picture.policy, parameters.items())
    slots = clipper.state_dict()["policies"][0]["slots"]
    slot = slots.index(picture.shown) if picture.shown in slots else 0
    rows = []
    with limits_of(picture.policy) as limits:
        for step, grads in enumerate(run):
            for parameter, grad in zip(parameters.values(), grads, strict=True):
                parameter.grad = grad.clone()
                parameter.data *= GROWTH
            before = norm_of(parameters, picture)
            if step in picture.bad:
                next(iter(parameters.values())).grad.flatten()[3] = float("nan")  # type: ignore[union-attr]
            record = clipper.clip()
            rows.append((before, norm_of(parameters, picture), limits[-1][slot], record.skipped))
    before, after, limit, skipped = np.array(rows, dtype=float).T
    return Replay(before, after, np.where(np.isfinite(limit), limit, np.nan), skipped > 0)


def norm_of(parameters: Mapping[str, torch.nn.Parameter], picture: Picture) -> float:
    """The norm of the gradients that are shown; NaN if they were dropped."""
    name, _, row = (picture.shown or "").rstrip("]").partition("[")
    grads = [p.grad for n, p in parameters.items() if name in ("", n)]
    parts = [(g[int(row)] if row else g).double().flatten() for g in grads if g is not None]
    if not parts:
        return np.nan
    return float(torch.linalg.vector_norm(torch.cat(parts), picture.norm_type))


@contextmanager
def limits_of(policy: Policy) -> Iterator[list[list[float]]]:
    """For every step decided inside, the limit of each slot of the policy."""
    decide, found = type(policy).decide, []

    def noted(self: Policy, stats: Any, state: Any) -> Any:
        decision, new = decide(self, stats, state)
        found.append(decision.limit.tolist())
        return decision, new

    with mock.patch.object(type(policy), "decide", noted):
        yield found


def draw(picture: Picture, run: Replay, path: Path) -> None:
    """Norm, limit, and what was clipped or withheld."""
    figure, axes = canvas(picture.title)
    steps = np.arange(STEPS)
    axes.plot(steps, run.before, color=GREY, linewidth=0.9)
    factor = run.before / run.after
    clipped = factor > 1 + 1e-6
    axes.hlines(run.limit, steps - 0.6, steps + 0.6, BLUE, linewidth=2.6)
    for marked, size in ((clipped & (factor < 1.5), 1.8), (clipped & (factor >= 1.5), 4.5)):
        axes.vlines(steps[marked], run.after[marked], run.before[marked], VERMILION, linewidth=0.9)
        axes.plot(steps[marked], run.before[marked], "v", color=VERMILION, markersize=size)
    skipped = run.skipped
    axes.plot(steps[skipped], run.before[skipped], "x", color=BLACK, markersize=7, mew=1.8)
    ends = {picture.quantity: (float(np.median(run.before[-15:])), GREY)}
    ends["limit"] = float(np.median(run.limit[-15:])), BLUE
    if picture.shows_after:
        axes.plot(steps, run.after, color=GREEN, linewidth=1.6)
        ends["after clipping"] = float(np.median(run.after[-15:])), GREEN
    label(axes, ends)
    marks = {f"▼ {clipped.sum()} clipped": VERMILION, f"✕ {skipped.sum()} withheld": BLACK}
    for row, (text, color) in enumerate(m for m in marks.items() if " 0 " not in m[0]):
        axes.text(1.01, 0.97 - 0.08 * row, text, color=color, transform=axes.transAxes)
    axes.set_ylabel(
        f"{picture.quantity}\nof {picture.shown}" if picture.shown else picture.quantity
    )
    figure.savefig(path, metadata={"Software": None})


def draw_curves(run: Sequence[Sequence[torch.Tensor]], path: Path) -> None:
    """Three limits, each of which follows a schedule."""
    figure, axes = canvas("One limit, three curves: linear, cosine, and cosine after a warm-up")
    places = {"linear": (240, 1.3), "cosine": (147, 1.7), "warmup_cosine": (62, 7.2)}
    for (name, schedule), color in zip(CURVES.items(), (BLUE, VERMILION, GREEN), strict=True):
        found = replay(Picture(ClipByNorm(max_norm=schedule), ""), run)
        axes.plot(found.before, color=GREY, linewidth=0.6)
        axes.plot(found.limit, color=color, linewidth=2.6)
        ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
        axes.text(*places[name], name, color=color, weight="bold", bbox=ground)
    label(axes, {"gradient norm": (float(np.median(found.before[-15:])), GREY)})
    axes.set_ylabel("gradient norm")
    figure.savefig(path, metadata={"Software": None})


def canvas(title: str) -> tuple[Figure, Axes]:
    """An empty picture of 900 x 360 pixels; y is logarithmic, and labels stand at the right."""
    mpl.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(9, 3.6), dpi=100)
    axes = figure.add_axes((0.085, 0.125, 0.765, 0.785))
    axes.set_title(title, loc="left", weight="bold", size=11.5, color=BLACK)
    axes.set_yscale("log")
    axes.set_xlim(0, STEPS)
    axes.set_xlabel("optimizer step")
    axes.yaxis.set_label_coords(-0.06, 0.5)
    axes.axvline(NEW_LEVEL - 0.5, color="0.75", linewidth=0.9, linestyle=":")
    axes.text(
        NEW_LEVEL + 2, 0.02, "a new level", color="0.45", transform=axes.get_xaxis_transform()
    )
    axes.grid(axis="y", color="0.93")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    return figure, axes


def label(axes: Axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Name each line where it ends, from the bottom up, so that names don't overlap."""
    last = -1.0
    low, high = np.log(axes.get_ylim())
    for name, (value, color) in sorted(ends.items(), key=lambda item: item[1][0]):
        if np.isfinite(value):
            last = max((np.log(value) - low) / (high - low), last + 0.07)
            style: dict[str, Any] = {"color": color, "weight": "bold", "va": "center"}
            axes.text(1.01, last, name, transform=axes.transAxes, **style)


def main() -> None:
    """Draw the pictures that the command line names, or all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    run = record_run()
    for name in sys.argv[1:] or [*PICTURES, "schedules"]:
        path = FOLDER / f"{name}.png"
        if name == "schedules":
            draw_curves(run, path)
        else:
            draw(PICTURES[name], replay(PICTURES[name], run), path)
        print(f"{path.relative_to(FOLDER.parents[2])}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
