"""Folding and withholding on the device where parameters are sharded."""

import pytest
import torch
from support.layouts import LAYOUTS, build
from support.ranks import run_on_ranks

from gradclip import ClipByNorm, ClipConfig, GradientClipper, SkipLarge

# Under TP a fused step of torch 2.13 refuses plain tensors beside DTensors, whoever clips.
NAMES = ("DDP", "FSDP1", "FSDP1 flat", "FSDP2", "HSDP")


def local(p):
    p = p.detach()
    return (p.to_local() if hasattr(p, "to_local") else p).clone()


def ends(name, rank, world, apply, kernel):
    """This rank's parameters after a clipped step, a withheld one, and one more."""
    model = build(name, rank, world)
    named = list(model.named)
    optimizer = torch.optim.AdamW([p for _, p in named], lr=0.01, fused=True)
    policies = [SkipLarge(limit=1e3), ClipByNorm(max_norm=0.02)]
    config = ClipConfig(policies=policies, apply=apply)
    clipper = GradientClipper(config, named, optimizer, kernel=kernel)
    clipper.attach(optimizer)
    held = [None if p.grad is None else p.grad.clone() for _, p in named]
    skipped = []
    for size in (1.0, 1e8, 2.0):
        for (_, p), grad in zip(named, held, strict=True):
            p.grad = None if grad is None else grad * size
        optimizer.step()
        skipped.append(bool(clipper.last_record.skipped))
    return skipped, [local(p) for _, p in named]


def every_layout(rank, world):
    found = {}
    for name in NAMES:
        if world in LAYOUTS[name].worlds:
            ways = [("in_place", None), ("fold", None), ("auto", "accelerator")]
            found[name] = [ends(name, rank, world, *way) for way in ways]
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_a_folded_step_ends_where_one_in_place_does(world):
    for found in run_on_ranks(every_layout, world):
        assert len(found) >= 4
        for name, ((skipped, wanted), *others) in found.items():
            assert skipped == [False, True, False], name
            for also_skipped, parts in others:
                assert also_skipped == skipped, name
                for part, other in zip(parts, wanted, strict=True):
                    torch.testing.assert_close(part, other, rtol=1e-6, atol=1e-6, msg=name)
