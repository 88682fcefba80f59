"""A step of adaptive policies against the way others take it, as ratios within one run.

    python benchmarks/bench_policies.py [--runs 3] [--repeats 11] [--only zclip] [--json FILE]

As in bench_step.py: both sides clip the same gradients in turn. Before anything is timed, both
have to leave gradients of the same norm. The other sides are written from their descriptions:

- `autoclip`: a norm read by the host for each tensor, appended to a list of 100 000 whose
  percentile numpy takes, then `torch.nn.utils.clip_grad_norm_` (pseeth/autoclip's handler);
- `zclip`: norms of all tensors stacked, one read by the host, numbers in Python, and a
  multiplication for each tensor if the norm is too large (the zclip package 1.0.0);
- `agc`: norms of the units of weight and gradient, and a selection, tensor by tensor (timm);
- `ten`: ours against ours, a list of ten policies against one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from bench_step import (
    alternate,
    gpt2_small,
    many_small,
    middle,
    parameters,
    print_heads,
    print_row,
    restoring,
    write_json,
)
from torch import Tensor, nn

from gradclip import AGC, AutoClip, ClipByNorm, GradientClipper, ZClip
from gradclip.policies.sketch import BINS, taken_in

OBSERVED = 100_000
WARMUP = 2  # alternate() drops as many rounds


class Clips(Protocol):
    """Whatever clips the gradients of a model, one step a call."""

    def clip(self) -> object:
        """One step."""


class Case(NamedTuple):
    """Two ways to clip the same gradients.

    Attributes:
        clips: Whether gradients exceed the limit.
        ours: Ours.
        theirs: What it is compared with.
        aim: Largest ratio wanted.
    """

    clips: bool
    ours: GradientClipper
    theirs: Clips
    aim: float


class ListedPercentile:
    """The AutoClip paper's way: every norm in a list, whose percentile is the limit."""

    def __init__(self, model: nn.Module, percentile: float, norms: list[float]) -> None:
        self.model, self.percentile, self.norms = model, percentile, norms

    def clip(self) -> None:
        """One step."""
        squares = 0.0
        for p in self.model.parameters():
            if p.grad is not None:
                squares += p.grad.norm(2).item() ** 2
        self.norms.append(squares**0.5)
        limit = np.percentile(self.norms, self.percentile)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)


class HostZScore:
    """The zclip package's way: the norm goes to the host, where mean and variance are floats."""

    def __init__(self, model: nn.Module, max_norm: float) -> None:
        self.model, self.max_norm = model, max_norm
        self.seen: list[float] = []
        self.mean = self.var = 0.0

    def clip(self) -> None:
        """One step."""
        norm = self._norm()
        if len(self.seen) < WARMUP:
            self.seen.append(norm)
            self.mean, self.var = float(np.mean(self.seen)), float(np.var(self.seen))
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
            return
        sigma = self.var**0.5
        z = (norm - self.mean) / (sigma + 1e-6)
        taken = self.mean + 2.5**2 * sigma / z if z > 2.5 else norm
        limit = min(taken, self.max_norm)
        if norm > limit:
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad.mul_(limit / (norm + 1e-6))
        self.mean = 0.97 * self.mean + 0.03 * taken
        self.var = 0.97 * self.var + 0.03 * (taken - self.mean) ** 2

    def _norm(self) -> float:
        dtype = next(self.model.parameters()).dtype
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norms = torch.stack([grad.to(dtype).norm(2) for grad in grads])
        return norms.pow(2).sum().sqrt().item()


class UnitLoop:
    """timm's way: a loop over tensors, which computes both branches and selects one."""

    def __init__(self, model: nn.Module, clip_factor: float) -> None:
        self.model, self.clip_factor = model, clip_factor

    def clip(self) -> None:
        """One step."""
        for p in self.model.parameters():
            if p.grad is None:
                continue
            limit = self._norms(p.detach()).clamp_(min=1e-3).mul_(self.clip_factor)
            norms = self._norms(p.grad)
            clipped = p.grad * (limit / norms.clamp(min=1e-6))
            p.grad.copy_(torch.where(norms < limit, p.grad, clipped))

    @staticmethod
    def _norms(x: Tensor) -> Tensor:
        if x.ndim <= 1:
            return x.norm(2)
        return x.norm(2, dim=tuple(range(1, x.ndim)), keepdim=True)


def total_norm(model: nn.Module) -> float:
    clipper = GradientClipper(ClipByNorm(max_norm=float("inf")), model.named_parameters())
    return float(clipper.clip().grad_norm)


def autoclip(model: nn.Module, small: bool) -> Iterator[Case]:
    """Norms around today's: it is below their 95th percentile, and above their 10th."""
    del small
    seen = np.random.default_rng(0).lognormal(0.0, 0.3, OBSERVED) * total_norm(model)
    counts = torch.zeros(BINS, 1000, dtype=torch.float64)
    for norms in torch.from_numpy(seen).view(-1, 1000):
        counts = taken_in(counts, norms)
    for percentile, clips in ((95.0, False), (10.0, True)):
        policy = AutoClip(percentile=percentile, history="all")
        clipper = GradientClipper(policy, model.named_parameters())
        state = clipper.state_dict()
        state["policies"][0]["state"]["seen"].fill_(OBSERVED)
        state["policies"][0]["state"]["counts"].copy_(counts.sum(1, keepdim=True))
        clipper.load_state_dict(state)
        theirs = ListedPercentile(model, percentile, seen.tolist())
        yield Case(clips, clipper, theirs, 0.1)


def zclip(model: nn.Module, small: bool) -> Iterator[Case]:
    """Norms are no spikes; the ceiling clips them, or is out of reach."""
    norm = total_norm(model)
    for limit, clips in ((1e3 * norm, False), (0.9 * norm, True)):
        policy = ZClip(max_norm=limit, warmup_steps=WARMUP)
        clipper = GradientClipper(policy, model.named_parameters())
        yield Case(clips, clipper, HostZScore(model, limit), 0.2 if small else 0.65)


def agc(model: nn.Module, small: bool) -> Iterator[Case]:
    """No unit is above its share of the weights, or every one is."""
    del small
    for factor, clips in ((1e6, False), (0.01, True)):
        clipper = GradientClipper(AGC(clip_factor=factor), model.named_parameters())
        yield Case(clips, clipper, UnitLoop(model, factor), 0.5)


def ten(model: nn.Module, small: bool) -> Iterator[Case]:
    """Ten limits, each a little below the one before, against the last alone."""
    del small
    norm = total_norm(model)
    for first, clips in ((1e3 * norm, False), (norm, True)):
        limits = [first * 0.99**k for k in range(1, 11)]
        clippers = [
            GradientClipper(
                [ClipByNorm(max_norm=limit) for limit in some], model.named_parameters()
            )
            for some in (limits, limits[-1:])
        ]
        yield Case(clips, clippers[0], clippers[1], 1.3)


COMPARISONS = {"autoclip": autoclip, "zclip": zclip, "agc": agc, "ten": ten}


def check(case: Case, model: nn.Module, restore: Callable[[], None]) -> None:
    """Both do the same: torch's float32 norms are off by up to 1 %, a sketch by half of that."""
    left = []
    for call in (case.ours.clip, case.theirs.clip):
        restore()
        call()
        left.append(total_norm(model))
    assert case.ours.last_record is not None
    assert bool(case.ours.last_record.clipped) == case.clips
    assert abs(left[0] / left[1] - 1) < 0.015, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--only", choices=COMPARISONS, help="one of the comparisons")
    parser.add_argument(
        "--busy", action="store_true", help="CPU time of one thread, for a busy machine"
    )
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    clock = time.process_time if options.busy else time.perf_counter
    if options.busy:
        torch.set_num_threads(1)
    rows = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print_heads("theirs")
    for name, shapes in (("GPT-2 small", gpt2_small()), ("2000 x 64", many_small())):
        model = nn.ParameterList(parameters(shapes, torch.float32))
        for p in model:
            nn.init.normal_(p, std=0.02)
        restore = restoring(list(model))
        for policy in [options.only] if options.only else COMPARISONS:
            for case in COMPARISONS[policy](model, small=name != "GPT-2 small"):
                check(case, model, restore)
                runs = [
                    alternate(case.ours.clip, case.theirs.clip, restore, options.repeats, clock)
                    for _ in range(options.runs)
                ]
                restore()
                found, (low, high) = middle(runs)
                rows.append(
                    {"policy": policy, "gradients": name, "clips": case.clips}
                    | {"ratio": found[0], "range": [low, high], "aim": case.aim}
                )
                note = f"{low:.3f} to {high:.3f}"
                print_row(f"{policy}, {name}", case.clips, found, case.aim, note)
    write_json(rows, options.json)


if __name__ == "__main__":
    main()
