"""Tables of what is counted, not timed: operations, launches, bytes, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.speed import h100
from benchmarks.speed.counts import POLICIES, counted, our_step, torchs_step
from benchmarks.speed.gradients import GPT2, GPT2_BF16, LORA, MANY, SMALL, TWENTY, gradients
from benchmarks.speed.pairs import Effort, in_turn
from benchmarks.speed.rows import Row
from benchmarks.speed.steps import norm_of
from gradclip import ClipByNorm, GradientClipper
from tests.support.memory import peak_bytes

PART = "counted"
MIB = 1 << 20
OPERATIONS = {"norm": 14, "zclip": 30, "a list of three": 50}
NAMES = (TWENTY, GPT2, GPT2_BF16, SMALL, LORA)


def on_an_accelerator(name: str, effort: Effort) -> Iterator[Row]:
    """Each policy against torch, on fake CUDA tensors."""
    held = gradients(name, effort.quick)
    theirs = counted(held, torchs_step)
    for policy, policies in POLICIES.items() if name == TWENTY else [("norm", POLICIES["norm"])]:
        ours = counted(held, partial(our_step, policies))
        what = f"{name}, {policy}"
        aim = OPERATIONS[policy] if name == TWENTY else None
        yield Row(PART, what, "torch", "operations", ours.operations, theirs.operations, aim=aim)
        for unit, scale in (("launches", 1), ("bytes", 1e6)):
            mine, other = getattr(ours, unit) / scale, getattr(theirs, unit) / scale
            shown, aim = ("MB", 1.0) if scale > 1 else (unit, 1.0)
            aim = aim if name == GPT2 and policy == "norm" else None
            yield Row(PART, what, "torch", shown, mine, other, mine / other, aim=aim)
        yield memory(f"{what}, accelerator", ours.peak, theirs.peak, len(held.shapes))
        yield from (h100.row(what, step) for step in ((ours, theirs),))


def memory(what: str, ours: int, theirs: int, tensors: int) -> Row:
    """Extra memory at its peak, of which 2 MiB and 64 bytes a tensor are allowed."""
    aim = (2 * MIB + 64 * tensors) / 1024
    return Row("memory", what, "torch", "KiB", ours / 1024, theirs / 1024, aim=aim)


def on_a_cpu(name: str, effort: Effort) -> Iterator[Row]:
    """Memory at its peak, by torch's profiler; and the host's time, on as many tensors."""
    held = gradients(name, effort.quick)
    model = held.parameters()
    ours = GradientClipper(ClipByNorm(max_norm=norm_of(model) / 2), model.named_parameters())
    theirs = torchs_step(model)
    for call in (ours.clip, theirs):
        call()
    yield memory(f"{name}, CPU", peak_bytes(ours.clip), peak_bytes(theirs), len(held.shapes))


def host(name: str, effort: Effort) -> Iterator[Row]:
    """A step on as many tensors of one value each: what is left is the host's work."""
    torch.set_num_threads(1)
    model = gradients(name, effort.quick).of_one_value().parameters()
    for policy, policies in POLICIES.items() if name == TWENTY else [("norm", POLICIES["norm"])]:
        clipper = GradientClipper(policies, model.named_parameters())
        calls = 20 if name == TWENTY else 1

        def several(call: Callable[[], object], calls: int = calls) -> None:
            for _ in range(calls):
                call()

        theirs = torchs_step(model)
        timed = in_turn(partial(several, clipper.clip), partial(several, theirs), effort)
        ours, others = (1e6 * seconds / calls for seconds in (timed.ours, timed.theirs))
        interval = (timed.ratio, timed.low, timed.high)
        yield Row(PART, f"{name}, {policy}", "torch", "host microseconds", ours, others, *interval)


def everything(name: str, effort: Effort) -> Iterator[Row]:
    """Of one set of gradients."""
    for rows in (host, on_an_accelerator, on_a_cpu):
        yield from rows(name, effort)


CASES: dict[str, Callable[[Effort], Iterator[Row]]] = {
    **{f"counted {name}": partial(everything, name) for name in NAMES},
    f"host {MANY}": partial(host, MANY),
    "model check": h100.check,
}
