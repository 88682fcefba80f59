"""What options of gradclip cost: with each against without it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.speed.gradients import GPT2, SMALL, Gradients, gradients, restoring
from benchmarks.speed.pairs import Effort, in_turn
from benchmarks.speed.rows import Row
from benchmarks.speed.steps import WORDS, Bench, norm_of
from gradclip import ClipByNorm, ClipConfig, GradientClipper, LogConfig, RecorderConfig

PART = "options"
TEN = 10


def fold(name: str, effort: Effort) -> Iterator[Row]:
    """Clipping folded into fused AdamW's step, against the same in place, the step included."""
    for clips in (False, True):
        calls, restores = [], []
        for apply in ("fold", "in_place"):
            model = gradients(name, effort.quick).parameters()
            limit = norm_of(model) * (0.9 if clips else 1e3)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
            config = ClipConfig(policies=[ClipByNorm(max_norm=limit)], apply=apply)
            GradientClipper(config, optimizer=optimizer).attach(optimizer)
            calls.append(optimizer.step)
            restores.append(restoring(model))
        timed = in_turn(*calls, effort, lambda both=restores: [restore() for restore in both])
        what = f"apply: fold, {name}, {WORDS[clips]}, with fused AdamW"
        yield timed.row(PART, what, "apply: in_place")


def recorder(name: str, effort: Effort) -> Iterator[Row]:
    """The flight recorder and an entry every ten steps, after the worst steps have settled."""
    bench = Bench(name, effort)
    policy = ClipByNorm(max_norm=1e6)
    plain = bench.ours(policy)
    recorded = bench.ours(ClipConfig(policies=[policy], recorder=RecorderConfig()))
    largest = max(bench.model.parameters(), key=torch.Tensor.numel).grad
    assert largest is not None
    generator = torch.Generator().manual_seed(0)

    def vary() -> None:
        largest.view(-1)[:1000].normal_(generator=generator)

    def ten(clipper: GradientClipper, *, flushes: bool) -> None:
        for _ in range(TEN):
            clipper.clip()
        if flushes:
            clipper.flush()

    for _ in range(20 if effort.quick else 3000 if name == SMALL else 100):
        vary()
        recorded.clip()
    with tempfile.TemporaryDirectory() as folder:
        recorded.recorder.folder = Path(folder)
        calls = (partial(ten, recorded, flushes=True), partial(ten, plain, flushes=False))
        timed = in_turn(*calls, effort, vary)
        recorded.recorder.close()
    yield timed.row(PART, f"recorder and entries, {name}", "neither", calls=TEN, aim=1.05)


def updates(every: int, effort: Effort) -> Iterator[Row]:
    """`log.update_norm_every`: steps with AdamW's, the first of them measured, or none."""
    shapes = [shape for _ in range(5) for shape in [(2048, 512), (2048,), (512, 2048), (512,)]]
    calls = []
    for measured in (every, None):
        model = Gradients(shapes).parameters()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        log = LogConfig(update_norm_every=measured)
        config = ClipConfig(policies=[ClipByNorm(max_norm=1e6)], log=log)
        GradientClipper(config, optimizer=optimizer).attach(optimizer)

        def steps(step: Callable[[], object] = optimizer.step) -> None:
            for _ in range(every):
                step()

        calls.append(steps)
    least = effort.least if every == 1 else 3  # a call is long
    timed = in_turn(*calls, effort._replace(least=least), warm=1)
    what = f"log.update_norm_every: {every}, 20 tensors of 10.5 M values, with AdamW"
    yield timed.row(PART, what, "none", calls=every)


def ten_policies(name: str, effort: Effort) -> Iterator[Row]:
    """Ten limits, each a little below the one before, against the last alone."""
    bench = Bench(name, effort)
    for clips in (False, True):
        limit = bench.norm * (0.9 if clips else 1e3)
        several = [ClipByNorm(max_norm=limit * 1.001**i) for i in reversed(range(TEN))]
        one = bench.ours(ClipByNorm(max_norm=limit))
        timed = in_turn(bench.ours(several).clip, one.clip, effort, bench.restore)
        what = f"ten policies, {name}, {WORDS[clips]}"
        yield timed.row(PART, what, "one policy", aim=1.3)


CASES: dict[str, Callable[[Effort], Iterator[Row]]] = {
    f"fold {GPT2}": partial(fold, GPT2),
    f"fold {SMALL}": partial(fold, SMALL),
    f"recorder {GPT2}": partial(recorder, GPT2),
    f"recorder {SMALL}": partial(recorder, SMALL),
    "updates 1": partial(updates, 1),
    "updates 50": partial(updates, 50),
    f"ten policies {SMALL}": partial(ten_policies, SMALL),
}
