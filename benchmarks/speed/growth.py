"""How time grows with tensors, with bytes, and with the steps taken."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.speed import rivals
from benchmarks.speed.gradients import Gradients, restoring
from benchmarks.speed.pairs import Effort, in_turn
from benchmarks.speed.rows import Point
from benchmarks.speed.steps import after_steps, norm_of
from gradclip import ClipByNorm, GradientClipper

TENSORS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
MEGABYTES = (1, 3, 10, 30, 100, 300, 1000)
STEPS = (10, 100, 1000, 10_000, 100_000, 1_000_000)


def against_torch(axis: str, x: int, held: Gradients, effort: Effort) -> Iterator[Point]:
    """`norm` and `clip_grad_norm_` on gradients that aren't clipped."""
    model = held.parameters()
    effort = effort._replace(seconds=effort.seconds / 2)
    limit = 1e3 * norm_of(model)
    clipper = GradientClipper(ClipByNorm(max_norm=limit), model.named_parameters())
    timed = in_turn(clipper.clip, rivals.torchs(model, limit), effort, restoring(model))
    yield Point(axis, "gradclip", x, 1e3 * timed.ours)
    yield Point(axis, "torch", x, 1e3 * timed.theirs)


def with_tensors(effort: Effort) -> Iterator[Point]:
    """Tensors of 64 values."""
    for count in TENSORS[::3] if effort.quick else TENSORS:
        yield from against_torch("tensors", count, Gradients([(64,)] * count), effort)


def with_bytes(effort: Effort) -> Iterator[Point]:
    """Sixteen tensors, together of so many bytes."""
    for megabytes in MEGABYTES[:3] if effort.quick else MEGABYTES:
        held = Gradients([(megabytes * 1_000_000 // 64,)] * 16)
        yield from against_torch("megabytes", megabytes, held, effort)


def with_steps(effort: Effort) -> Iterator[Point]:
    """AutoClip over the whole run on 20 tensors, after so many steps, beside `clip_grad_norm_`.

    The steps aren't run: the state is made from as many norms, as `after_steps` says.
    """
    model = Gradients([(64,)] * 20).parameters()
    norm, restore = norm_of(model), restoring(model)
    for count in STEPS[:3] if effort.quick else STEPS:
        seen = np.random.default_rng(0).lognormal(0.0, 0.3, count) * norm
        clipper = after_steps(model, 95.0, seen)
        handler = rivals.autoclip_handler(model, 95.0, seen.tolist())
        timed = in_turn(clipper.clip, handler, effort, restore)
        yield Point("steps", "gradclip, autoclip", count, 1e3 * timed.ours)
        yield Point("steps", "its paper's handler", count, 1e3 * timed.theirs)
        timed = in_turn(clipper.clip, rivals.torchs(model, 1e3 * norm), effort, restore)
        yield Point("steps", "torch, a fixed norm", count, 1e3 * timed.theirs)


CASES = {
    "growth with tensors": with_tensors,
    "growth with bytes": with_bytes,
    "growth with steps": with_steps,
}
