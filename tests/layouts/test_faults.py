"""What goes wrong on one rank: no rank hangs, all decide alike."""

import functools
import itertools
import math

import pytest
import torch
from support.cuts import CELLS, build, copied
from support.ranks import run_on_ranks
from torch.distributed.tensor import DTensor

from gradclip import ClipByNorm, GradientClipper, NonFiniteError

FAULTS = ("nan", "inf", "no gradients", "unused", "late")
POLICIES = {
    2.0: ClipByNorm(max_norm=0.5),
    math.inf: ClipByNorm(max_norm=0.05, norm_type=math.inf),
}
SKIPPED = {
    *("DDP", "FSDP1 NO_SHARD", "FSDP1 NO_SHARD flat", "partial sum"),
    *("EP, named group", "FSDP1 x TP"),
}
"""Where every rank holds a copy, a fault on one rank alone is a broken copy, not a gradient; and
where nothing on the gradient tells this test which they are."""
PLACES = [(name, worlds[-1]) for name, (*_, worlds) in CELLS.items() if name not in SKIPPED]


def is_cut(p, name):
    """Whether no other rank (no other shard, where shards are replicated) has what this one has."""
    if isinstance(p.grad, DTensor):
        placements = p.grad.placements[1:] if name == "HSDP" else p.grad.placements
        over_both = name != "FSDP2 x TP" or len(placements) == 2
        return over_both and not any(placement.is_replicate() for placement in placements)
    return name.startswith("PP") or getattr(p, "_fsdp_flattened", False)


def inject(fault, rank, world, named, name):
    """Change what the last rank holds of the gradients that are cut, in every replica of it."""
    cut = [p for _, p in named if p.grad is not None and is_cut(p, name)]
    parts = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in cut]
    hybrid = name == "HSDP" or "HYBRID" in name
    last = rank in (world // 2 - 1, world - 1) if hybrid else rank == world - 1
    shard, shards = (rank % (world // 2), world // 2) if hybrid else (rank, world)
    if fault in ("nan", "inf") and last:
        part = next(part for part in parts if part.numel())
        part.view(-1)[0] = math.nan if fault == "nan" else -math.inf
    if fault == "no gradients" and last:
        for _, p in named:
            p.grad = None
    if fault == "unused":
        for p in cut[shard::shards]:
            p.grad = None
    if fault == "late" and last:
        busy = torch.ones(1000, 1000)
        for _ in range(10):
            busy = busy @ busy / 1000


def faults(rank, world, name):
    """Per fault and norm what was recorded, on the first step of a clipper."""
    cell = build(name, rank, world)
    clean = [(p, copied(p.grad)) for _, p in cell.named]

    def broken(fault):
        for p, grad in clean:
            p.grad = copied(grad)
        inject(fault, rank, world, cell.named, name)

    found = {}
    for fault, (norm_type, policy) in itertools.product(FAULTS, POLICIES.items()):
        broken(fault)
        record = GradientClipper(policy, cell.named, **cell.options).clip()
        metrics = {key: float(value) for key, value in record.as_metrics().items()}
        found[fault, norm_type] = metrics, any(p.grad is not None for _, p in cell.named)
    broken("nan")
    before = [(p, p.grad, p.grad._version) for _, p in cell.named if p.grad is not None]
    config = {"policies": [{"type": "norm", "max_norm": 0.1}], "on_nonfinite": "raise"}
    with pytest.raises(NonFiniteError, match="gradients are unchanged"):
        GradientClipper(config, cell.named, **cell.options).clip()
    partial = "sequence" in name  # completing a partial sum is a write of what it stands for
    assert partial or all(p.grad is grad and grad._version == v for p, grad, v in before)
    return found


ranks = functools.cache(run_on_ranks)


@pytest.mark.parametrize(("name", "world"), PLACES)
def test_a_fault_on_one_rank_is_decided_by_all(name, world):
    answers = ranks(faults, world, name)
    clean = {p: metrics for (fault, p), (metrics, _) in answers[0].items() if fault == "late"}
    for key, (metrics, left) in answers[0].items():
        fault, norm_type = key
        for other in answers[1:]:
            assert repr(other[key][0]) == repr(metrics), key
        skipped = fault in ("nan", "inf")
        assert metrics["clip/skipped"] == skipped, key
        assert left == (not skipped), key
        if not skipped:
            assert 0 < metrics["clip/grad_norm"] <= clean[norm_type]["clip/grad_norm"], key
