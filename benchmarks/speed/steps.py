"""Single clipping steps on the same gradients, ours and others' in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.speed import rivals
from benchmarks.speed.gradients import (
    GPT2,
    GPT2_BF16,
    LORA,
    MANY,
    SMALL,
    Gradients,
    gradients,
    restoring,
)
from benchmarks.speed.pairs import WARM, Effort, in_turn, read_seconds
from benchmarks.speed.rows import Row
from gradclip import AGC, AutoClip, ClipByNorm, GradientClipper, ZClip
from gradclip.policies.sketch import BINS, taken_in

PART = "steps"
WORDS = {False: "not clipped", True: "clipped"}
LARGE = 50_000_000
"""Bytes from which on gradients come from memory, and not from a cache."""
OBSERVED = 100_000


def norm_of(model: nn.Module) -> float:
    """The norm of all gradients."""
    clipper = GradientClipper(ClipByNorm(max_norm=float("inf")), model.named_parameters())
    return float(clipper.clip().grad_norm)


class Bench:
    """Gradients, and rows that compare steps on them."""

    def __init__(self, name: str, effort: Effort) -> None:
        self.name, self.effort = name, effort
        self.set: Gradients = gradients(name, effort.quick)
        self.model = self.set.parameters()
        self.norm = norm_of(self.model)
        self.restore = restoring(self.model)
        self.read = read_seconds(self.set.bytes) if self.set.bytes >= LARGE else None

    def row(
        self,
        clipper: GradientClipper,
        theirs: rivals.Clip,
        peer: str,
        *,
        clips: bool | None,
        aim: float | None = None,
        what: str = "",
    ) -> Row:
        """Ours against a peer.

        Args:
            clipper: Ours.
            theirs: The peer's.
            peer: Its name.
            clips: Whether both clip; they are checked to leave gradients of the same norm. None
                if they decide by rules that differ.
            aim: Largest ratio wanted.
            what: Said of the policy, before the gradients.
        """
        if clips is not None:
            self._check(clipper, theirs, clips)
        timed = in_turn(clipper.clip, theirs, self.effort, self.restore)
        self.restore()
        bandwidth = None
        if self.read is not None and clips is not None:
            bandwidth = self.read * (3 if clips else 1) / timed.ours
        words = [what, self.name, WORDS.get(clips, "") if clips is not None else ""]
        name = ", ".join(word for word in words if word)
        return timed.row(PART, name, peer, aim=aim, bandwidth=bandwidth)

    def _check(self, clipper: GradientClipper, theirs: rivals.Clip, clips: bool) -> None:
        """Both do the same: torch's float32 norms are off by up to 1 %, a sketch by half of it."""
        left = []
        for call in (clipper.clip, theirs):
            self.restore()
            call()
            left.append(norm_of(self.model))
        assert clipper.last_record is not None
        assert bool(clipper.last_record.clipped) == clips, self.name
        assert abs(left[0] / left[1] - 1) < 0.015, left

    def ours(self, policy: object) -> GradientClipper:
        """A clipper of these parameters."""
        return GradientClipper(policy, self.model.named_parameters())


def against_torch(
    name: str, aims: tuple[float | None, float | None], effort: Effort, *, each: bool = False
) -> Iterator[Row]:
    """The policy `norm` against `clip_grad_norm_`, and with `each` against its loop."""
    bench = Bench(name, effort)
    for clips, aim in zip((False, True), aims, strict=True):
        limit = bench.norm * (0.9 if clips else 1e3)
        clipper = bench.ours(ClipByNorm(max_norm=limit))
        theirs = rivals.torchs(bench.model, limit)
        yield bench.row(clipper, theirs, "torch", clips=clips, aim=aim)
        if each:
            theirs = rivals.torchs(bench.model, limit, foreach=False)
            yield bench.row(clipper, theirs, "torch, foreach=False", clips=clips)


def against_zclip(name: str, aim: float, effort: Effort) -> Iterator[Row]:
    """No norm is a spike; a ceiling clips them all, or is out of reach."""
    if rivals.installed("zclip") is None:
        return
    bench = Bench(name, effort)
    for clips in (False, True):
        limit = bench.norm * (0.9 if clips else 1e3)
        clipper = bench.ours(ZClip(max_norm=limit, warmup_steps=WARM))
        theirs = rivals.zclip_package(bench.model, limit, WARM)
        yield bench.row(clipper, theirs, "zclip package", clips=clips, aim=aim, what="zclip")


def after_steps(model: nn.Module, percentile: float, norms: np.ndarray) -> GradientClipper:
    """AutoClip over the whole run, as it is after it saw these norms.

    Its state is made, instead of running so many steps: the counts of its sketch are those that
    the norms give.
    """
    clipper = GradientClipper(
        AutoClip(percentile=percentile, history="all"), model.named_parameters()
    )
    clipper.clip()
    counts = torch.zeros(BINS, 1, dtype=torch.float64)
    for chunk in torch.from_numpy(norms).split(1000):
        counts = counts + taken_in(torch.zeros(BINS, len(chunk)).double(), chunk).sum(1, True)
    state = clipper.state_dict()
    state["policies"][0]["state"]["seen"].fill_(len(norms))
    state["policies"][0]["state"]["counts"].copy_(counts)
    clipper.load_state_dict(state)
    return clipper


def against_autoclip(name: str, effort: Effort) -> Iterator[Row]:
    """After 100 000 steps; today's norm is below their 95th percentile and above their 10th."""
    bench = Bench(name, effort)
    count = 1000 if effort.quick else OBSERVED
    seen = np.random.default_rng(0).lognormal(0.0, 0.3, count) * bench.norm
    for percentile, clips in ((95.0, False), (10.0, True)):
        clipper = after_steps(bench.model, percentile, seen)
        theirs = rivals.autoclip_handler(bench.model, percentile, seen.tolist())
        what = "autoclip after 100 000 steps"
        aim = None if clips else 0.25
        yield bench.row(clipper, theirs, "its paper's handler", clips=clips, aim=aim, what=what)


def against_packages(name: str, effort: Effort) -> Iterator[Row]:
    """Packages whose rules for the percentile differ, at their defaults after a full window."""
    bench = Bench(name, effort)
    for package, start in (
        ("smartclip", rivals.smartclip_package),
        ("autoclip", rivals.autoclip_package),
    ):
        if rivals.installed(package) is None:
            continue
        clipper, theirs = bench.ours(AutoClip()), start(bench.model)
        for _ in range(20 if effort.quick else 1000 if name == SMALL else 100):
            theirs()
        yield bench.row(clipper, theirs, f"{package} package", clips=None, what="autoclip")


def against_agc(name: str, effort: Effort) -> Iterator[Row]:
    """No unit is above its share of the weights, or every one is."""
    bench = Bench(name, effort)
    for factor, clips in ((1e6, False), (0.01, True)):
        clipper = bench.ours(AGC(clip_factor=factor))
        for peer, start, aim in (
            ("loop as in timm", rivals.timm_agc, None if clips else 0.20),
            ("loop as in composer", rivals.composer_agc, None),
        ):
            theirs = start(bench.model, factor)
            yield bench.row(clipper, theirs, peer, clips=clips, aim=aim, what="agc")


def against_titan(name: str, effort: Effort) -> Iterator[Row]:
    """One process: torch's two halves, one after the other."""
    bench = Bench(name, effort)
    limit = bench.norm * 1e3
    clipper = bench.ours(ClipByNorm(max_norm=limit))
    theirs = rivals.titan(bench.model, limit)
    yield bench.row(clipper, theirs, "loop as in torchtitan", clips=False)


CASES: dict[str, Callable[[Effort], Iterator[Row]]] = {
    f"step {GPT2}": partial(against_torch, GPT2, (0.36, 0.75), each=True),
    f"step {GPT2_BF16}": partial(against_torch, GPT2_BF16, (0.9, 1.2)),
    f"step {SMALL}": partial(against_torch, SMALL, (0.18, 0.30), each=True),
    f"step {LORA}": partial(against_torch, LORA, (0.18, 0.30)),
    f"step {MANY}": partial(against_torch, MANY, (0.18, 0.30)),
    f"zclip {GPT2}": partial(against_zclip, GPT2, 0.85),
    f"zclip {SMALL}": partial(against_zclip, SMALL, 0.18),
    f"autoclip {GPT2}": partial(against_autoclip, GPT2),
    f"autoclip {SMALL}": partial(against_autoclip, SMALL),
    f"packages {SMALL}": partial(against_packages, SMALL),
    f"agc {GPT2}": partial(against_agc, GPT2),
    f"agc {SMALL}": partial(against_agc, SMALL),
    f"torchtitan {SMALL}": partial(against_titan, SMALL),
}
