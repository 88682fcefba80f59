"""A model of a step's time on an H100: launches and bytes, each with a price. Nothing is measured.

The check is a public measurement: norm and scaling of one bfloat16 tensor of 1.54 G values take
7.3 ms on an H100 (NeMo Automodel, pull request 3685, its Triton kernel).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.speed.counts import Counted, counted, torchs_step
from benchmarks.speed.gradients import Gradients
from benchmarks.speed.pairs import Effort
from benchmarks.speed.rows import Row

PART = "model"
BANDWIDTH = 3.35e12
"""Bytes a second, by the data sheet of the SXM5 board. Kernels reach less."""
LAUNCH = 4e-6
"""Seconds from one small kernel to the next: what the host needs to start it."""
MEASURED = 7.32e-3
CHECKED = Gradients([(1_540_000_000,)], torch.bfloat16)


def seconds(step: Counted) -> float:
    """A lower bound: each launch at its price, all bytes at the bandwidth of the data sheet."""
    return step.launches * LAUNCH + step.bytes / BANDWIDTH


def row(what: str, steps: tuple[Counted, Counted]) -> Row:
    """Ours and torch's, in microseconds."""
    ours, theirs = (1e6 * seconds(step) for step in steps)
    return Row(PART, what, "torch", "microseconds, modelled", ours, theirs, ours / theirs)


def check(effort: Effort) -> Iterator[Row]:
    """The model's time for the step that was measured elsewhere, and that measurement."""
    del effort
    step = counted(CHECKED, torchs_step)
    modelled = 1e6 * seconds(step)
    what = "check: 1.54 G bfloat16 values"
    unit = "microseconds, modelled"
    yield Row(PART, what, "measured by others", unit, modelled, 1e6 * MEASURED)
