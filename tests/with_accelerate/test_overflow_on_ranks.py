"""A loss scale that overflows on one rank of a sharded model: the step is skipped on all."""

import math

import pytest
import torch
from support.accelerate_cpu import fresh
from support.accelerate_layouts import LAYOUTS, rows_of, share
from support.nets import parallel_net, whole_parameters
from support.ranks import run_on_ranks
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import accelerate_clip
from gradclip import ClipByNorm

CASES = [(fused, calls) for fused in (False, True) for calls in (False, True)]


def train(name, fused, calls):
    """Whether each step moved the parameters, was skipped, and at which scale; its record."""
    fresh()
    accelerator = LAYOUTS[name][0](mixed_precision="fp16")
    accelerator.native_amp = True
    accelerator.scaler = ShardedGradScaler(device="cpu", init_scale=64.0)
    clip = accelerate_clip.enable(accelerator, ClipByNorm(max_norm=0.5))
    net = parallel_net()
    net, opt = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused))
    seen = []
    for step in range(3):
        opt.zero_grad()
        before = whole_parameters(net)
        overflows = step == 1 and accelerator.process_index == 1
        loss = net(share(accelerator, rows_of(step))).float().square().mean()
        accelerator.backward(loss * (math.inf if overflows else 1.0))
        if calls:
            accelerator.clip_grad_norm_(net.parameters(), 0.5)
        opt.step()
        moved = not all(map(torch.equal, before, whole_parameters(net)))
        skipped = accelerator.optimizer_step_was_skipped
        seen.append((moved, skipped, accelerator.scaler.get_scale()))
    record = clip.last_record
    return seen, float(record.grad_norm), float(record.clipped_norm)


def on_rank(rank, world, name):
    return [train(name, *case) for case in CASES]


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_all_ranks_skip_with_ordinary_and_fused_optimizers(name):
    one, other = run_on_ranks(on_rank, 2, name)
    assert one == other
    for seen, norm, clipped in one:
        assert seen == [(True, False, 64.0), (False, True, 32.0), (True, False, 32.0)]
        assert norm == pytest.approx(one[0][1], rel=1e-2)
        assert norm > 0.5
        assert clipped == pytest.approx(0.5, rel=1e-4)
