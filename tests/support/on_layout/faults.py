"""What goes wrong on one rank: no rank waits for ever, all decide alike."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from gradclip import ClipByNorm, NonFiniteError

FAULTS = ("late", "nan", "inf", "no gradients", "unused")
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


def is_sharded(p, name):
    """Whether no other rank (no other shard, where shards are replicated) has what this one has."""
    if isinstance(p.grad, DTensor):
        placements = p.grad.placements[1:] if name == "HSDP" else p.grad.placements
        over_both = name != "FSDP2 x TP" or len(placements) == 2
        return over_both and not any(placement.is_replicate() for placement in placements)
    return name.startswith("PP") or getattr(p, "_fsdp_flattened", False)


def inject(fault, built, name):
    """Change what the last rank holds of the gradients that are sharded, in every replica of it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sharded = [p for _, p in built.named if p.grad is not None and is_sharded(p, name)]
    parts = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in sharded]
    hybrid = name == "HSDP" or "HYBRID" in name
    last = rank in (world // 2 - 1, world - 1) if hybrid else rank == world - 1
    shard, shards = (rank % (world // 2), world // 2) if hybrid else (rank, world)
    if fault in ("nan", "inf") and last:
        part = next(part for part in parts if part.numel())
        part.view(-1)[0] = math.nan if fault == "nan" else -math.inf
    if fault == "no gradients" and last:
        for _, p in built.named:
            p.grad = None
    if fault == "unused":
        for p in sharded[shard::shards]:
            p.grad = None
    if fault == "late" and last:
        busy = torch.ones(1000, 1000)
        for _ in range(10):
            busy = busy @ busy / 1000


def check(built, name):
    """Per fault and norm what was recorded, on the first step of a clipper."""
    if name in SKIPPED:
        return None
    found = {}
    for fault, norm_type in itertools.product(FAULTS, POLICIES):
        built.renew()
        inject(fault, built, name)
        record = built.clipper(POLICIES[norm_type]).clip()
        metrics = {key: float(value) for key, value in record.as_metrics().items()}
        found[fault, norm_type] = metrics
        skipped = fault in ("nan", "inf")
        assert metrics["clip/skipped"] == skipped, fault
        if dist.get_rank() == 0:
            assert any(p.grad is not None for _, p in built.named) == (not skipped), fault
        if not skipped:
            clean = found["late", norm_type]["clip/grad_norm"]
            assert 0 < metrics["clip/grad_norm"] <= clean, fault
    built.renew()
    inject("nan", built, name)
    before = [(p, p.grad, p.grad._version) for _, p in built.named if p.grad is not None]
    config = {"policies": [{"type": "norm", "max_norm": 0.1}], "on_nonfinite": "raise"}
    with pytest.raises(NonFiniteError, match="gradients are unchanged"):
        built.clipper(config).clip()
    partial = "sequence" in name  # completing a partial sum is a write of what it stands for
    assert partial or all(p.grad is grad and grad._version == v for p, grad, v in before)
    return found
