"""A clipping step against `torch.nn.utils.clip_grad_norm_`, as ratios within one run.

    python benchmarks/bench_step.py [--repeats 15] [--json FILE]

Both clip the same gradients in turn (A B A B ...); the ratio is taken pair by pair and its median
is printed, so that a machine whose speed drifts changes both. Gradients are restored before
every call, outside the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import Parameter

from gradclip import ClipByNorm, ClipConfig, GradientClipper, LogConfig, RecorderConfig


def gpt2_small() -> list[torch.Size]:
    """Shapes of GPT-2 small: 148 tensors, 124 M values."""
    width, shapes = 768, [(50257, 768), (1024, 768)]
    for _ in range(12):
        shapes += [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width)]
        shapes += [(width,)]
    return [torch.Size(shape) for shape in [*shapes, (width,), (width,)]]


def many_small() -> list[torch.Size]:
    """2000 tensors of 64 values, where dispatch is all there is."""
    return [torch.Size((64,))] * 2000


def ten_million() -> list[torch.Size]:
    """Five blocks of two layers: 20 tensors, 10.5 M values."""
    return [torch.Size(shape) for shape in [(2048, 512), (2048,), (512, 2048), (512,)] * 5]


def parameters(shapes: list[torch.Size], dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return made


def restoring(params: list[Parameter]) -> Callable[[], None]:
    """A call that gives gradients the values they have now."""
    saved = [p.grad.clone() for p in params if p.grad is not None]
    return lambda: torch._foreach_copy_([p.grad for p in params], saved)


def timed(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def alternate(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    before: Callable[[], None],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float, float]:
    """Median ratio ours/theirs, and the median milliseconds of each, called in turn."""
    pairs = []
    for _ in range(repeats + 2):
        before()
        mine = timed(ours, clock)
        before()
        pairs.append((mine, timed(theirs, clock)))
    pairs = pairs[2:]
    medians = [statistics.median(column) * 1e3 for column in zip(*pairs, strict=True)]
    return statistics.median(a / b for a, b in pairs), *medians


def middle(
    runs: list[tuple[float, float, float]],
) -> tuple[tuple[float, float, float], tuple[float, float]]:
    """Medians over runs of what `alternate` returns, and the smallest and largest ratio."""
    ratios, ours, theirs = zip(*runs, strict=True)
    medians = statistics.median(ratios), statistics.median(ours), statistics.median(theirs)
    return medians, (min(ratios), max(ratios))


def compare(params: list[Parameter], clips: bool, repeats: int) -> tuple[float, float, float]:
    """A step against torch's on the same gradients."""
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))
    limit = norm * (0.9999 if clips else 1e3)
    clipper = GradientClipper(
        ClipByNorm(max_norm=limit), [(str(i), p) for i, p in enumerate(params)]
    )
    return alternate(
        clipper.clip,
        lambda: torch.nn.utils.clip_grad_norm_(params, limit),
        restoring(params),
        repeats,
    )


def compare_fold(shapes: list[torch.Size], clips: bool, repeats: int) -> tuple[float, float, float]:
    """A clipping step and fused AdamW's, folded into it against in place, on the same gradients."""
    runs, restores = [], []
    for apply in ("fold", "in_place"):
        params = parameters(shapes, torch.float32)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))
        optimizer = torch.optim.AdamW(params, lr=1e-6, fused=True)
        policy = ClipByNorm(max_norm=norm * (0.9999 if clips else 1e3))
        config = ClipConfig(policies=[policy], apply=apply)
        GradientClipper(config, optimizer=optimizer).attach(optimizer)
        runs.append(optimizer.step)
        restores.append(restoring(params))
    return alternate(*runs, lambda: [restore() for restore in restores], repeats)


def compare_recorded(
    shapes: list[torch.Size], repeats: int, warm: int = 1000
) -> tuple[float, float, float]:
    """A step with the flight recorder and a log entry every ten, against one with neither.

    After so many steps that few are still among the worst; norms vary from step to step.
    """
    params = parameters(shapes, torch.float32)
    named = [(str(i), p) for i, p in enumerate(params)]
    policy = ClipByNorm(max_norm=1e6)
    plain = GradientClipper(policy, named)
    recorded = GradientClipper(ClipConfig(policies=[policy], recorder=RecorderConfig()), named)
    generator = torch.Generator().manual_seed(0)

    def vary() -> None:
        largest = max(params, key=Parameter.numel).grad
        assert largest is not None
        largest.view(-1)[:1000].normal_(generator=generator)

    for _ in range(warm):
        vary()
        recorded.clip()

    def ten(clipper: GradientClipper, *, flushes: bool) -> None:
        for _ in range(10):
            clipper.clip()
        if flushes:
            clipper.flush()

    runs = (partial(ten, recorded, flushes=True), partial(ten, plain, flushes=False))
    with tempfile.TemporaryDirectory() as folder:
        recorded.recorder.folder = Path(folder)
        found = alternate(*runs, vary, repeats)
        recorded.recorder.close()
    return found


def compare_updates(
    shapes: list[torch.Size],
    every: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float, float]:
    """So many clipping steps with AdamW's, the first of them measured, against none measured."""
    runs = []
    for measured in (every, None):
        params = parameters(shapes, torch.float32)
        optimizer = torch.optim.AdamW(params, lr=1e-6)
        log = LogConfig(update_norm_every=measured)
        config = ClipConfig(policies=[ClipByNorm(max_norm=1e6)], log=log)
        GradientClipper(config, optimizer=optimizer).attach(optimizer)

        def steps(step: Callable[[], object] = optimizer.step) -> None:
            for _ in range(every):
                step()

        runs.append(steps)
    return alternate(*runs, lambda: None, repeats, clock)


def print_heads(other: str = "torch") -> None:
    heads = ("gradients", "clips", "ratio", "ours ms", f"{other} ms", "aim")
    print("{:32s} {:>6s} {:>7s} {:>9s} {:>9s} {:>6s}".format(*heads))


def print_row(
    name: str, clips: bool, found: tuple[float, float, float], aim: float | None, note: str = ""
) -> None:
    ratio, ours, theirs = found
    shown = "" if aim is None else f"{aim:.2f}"
    print(f"{name:32s} {clips!s:>6s} {ratio:7.3f} {ours:9.2f} {theirs:9.2f} {shown:>6s} {note}")


def write_json(rows: list[dict[str, object]], path: str | None) -> None:
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    rows = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print_heads()
    for name, shapes, dtype, aims in (
        ("GPT-2 small, float32", gpt2_small(), torch.float32, (0.5, 0.8)),
        ("GPT-2 small, bfloat16", gpt2_small(), torch.bfloat16, (None, None)),
        ("2000 x 64, float32", many_small(), torch.float32, (0.25, 0.25)),
    ):
        params = parameters(shapes, dtype)
        for clips, aim in zip((False, True), aims, strict=True):
            found = compare(params, clips, options.repeats)
            rows.append({"gradients": name, "clips": clips, "ratio": found[0], "aim": aim})
            print_row(name, clips, found, aim)
    print_heads("in place")
    for name, shapes in (("GPT-2 small", gpt2_small()), ("2000 x 64", many_small())):
        for clips in (False, True):
            found = compare_fold(shapes, clips, options.repeats)
            name_of = f"{name}, with fused AdamW"
            rows.append({"gradients": name_of, "clips": clips, "ratio": found[0], "aim": None})
            print_row(name_of, clips, found, None)
    print_heads("neither")
    for name, shapes, warm in (
        ("GPT-2 small", gpt2_small(), 100),
        ("2000 x 64", many_small(), 5000),
    ):
        found = compare_recorded(shapes, options.repeats, warm)
        name_of = f"{name}, recorder, entries"
        rows.append({"gradients": name_of, "clips": False, "ratio": found[0], "aim": 1.05})
        print_row(name_of, False, found, 1.05)
    print_heads("unseen")
    for every in (1, 50):
        found = compare_updates(ten_million(), every, options.repeats)
        name_of = f"10 M, AdamW, update of 1 in {every}"
        rows.append({"gradients": name_of, "clips": False, "ratio": found[0], "aim": None})
        print_row(name_of, False, found, None)
    write_json(rows, options.json)


if __name__ == "__main__":
    main()
