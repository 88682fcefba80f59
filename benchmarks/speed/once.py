"""What is paid once: imports, the first step; and the commands' pace."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.speed.gradients import MANY, gradients
from benchmarks.speed.pairs import Effort
from benchmarks.speed.rows import Row
from gradclip import ClipByNorm, GradientClipper
from gradclip.config import as_config
from gradclip.tools.replay import replay
from gradclip.tools.trace import Trace

PART = "once"


def imports(effort: Effort) -> Iterator[Row]:
    """A fresh process imports a package after what it needs anyway."""
    for package, after, times in (
        ("gradclip", "torch", 2 if effort.quick else 15),
        ("lightning_clip", "torch, lightning.pytorch", 2 if effort.quick else 7),
        ("accelerate_clip", "torch, accelerate", 2 if effort.quick else 7),
    ):
        code = (
            f"import time, {after}; start = time.perf_counter(); import {package}; "
            "print(time.perf_counter() - start)"
        )
        command = [sys.executable, "-W", "ignore", "-c", code]
        found = [
            float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(times)
        ]
        aim = None if package == "accelerate_clip" else 100.0
        what = f"import {package}, after {after.removeprefix('torch, ')}"
        yield Row(PART, what, "", "ms", 1e3 * statistics.median(found[1:]), aim=aim)


def first_step(effort: Effort) -> Iterator[Row]:
    """Building a clipper, and its first step without the second one's time."""
    model = gradients(MANY, effort.quick).parameters()
    found = []
    for _ in range(2 if effort.quick else 9):
        times = [time.perf_counter()]
        clipper = GradientClipper(ClipByNorm(max_norm=1.0), model.named_parameters())
        times.append(time.perf_counter())
        for _ in range(2):
            clipper.clip()
            times.append(time.perf_counter())
        built, first, second = map(float, np.diff(times))
        found.append(built + first - second)
    seconds = statistics.median(found)
    yield Row(PART, f"first step beyond the second, {MANY}", "", "ms", 1e3 * seconds, aim=50.0)


def replayed(effort: Effort) -> Iterator[Row]:
    """`gradclip replay` of one policy over a trace file. 200 000 steps a second are 5 us each."""
    steps = 2000 if effort.quick else 20_000
    norms = np.random.default_rng(0).lognormal(0.0, 0.5, steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        header = '{"format": "gradclip-trace", "version": 1, "norm_type": 2.0}\n'
        rows = (f'{{"step": {i}, "grad_norm": {norm:.6g}}}\n' for i, norm in enumerate(norms))
        path.write_text(header + "".join(rows), encoding="utf-8")
        for name in ("norm", "zclip", "auto"):
            config = as_config(
                {"policies": [{"type": name} | ({"max_norm": 1.0} if name == "norm" else {})]}
            )
            found = []
            for _ in range(2):
                start = time.perf_counter()
                replay(Trace.open(path), {name: config})
                found.append(time.perf_counter() - start)
            microseconds = 1e6 * min(found) / steps
            yield Row(PART, f"replay, {name}", "", "microseconds a step", microseconds, aim=5.0)


CASES = {"imports": imports, "first step": first_step, "replay": replayed}
