"""DDP and FSDP2 on two processes: what one process does with the same batches."""

import shutil
import tempfile

import pytest
import torch
from accelerate import Accelerator
from support.accelerate_cpu import fresh, joined, with_fsdp
from support.accelerate_layouts import sharding
from support.nets import uneven_net
from support.ranks import run_on_ranks
from torch.distributed.tensor import DTensor

import accelerate_clip
from gradclip import ClipByNorm, ZClip

POLICIES = [ZClip(warmup_steps=3, max_norm=20.0), ClipByNorm(max_norm=4.0)]
STEPS = 12


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def train(accelerator, clip, model, opt, steps, calls=True):
    """Norms, limits and gradients as the optimizer sees them; a spike, and a NaN on one rank."""
    seen = []
    rank, world = accelerator.process_index, accelerator.num_processes
    for step in steps:
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        mine = inputs.view(world, -1, 5)[rank]
        factor = {5: 60.0, 8: float("nan")}.get(step, 1.0) if rank == 0 or step == 5 else 1.0
        opt.zero_grad()
        accelerator.backward(model(mine).square().mean() * factor)
        if calls:
            accelerator.clip_grad_norm_(model.parameters(), 4.0)
        opt.step()
        record = clip.last_record
        grads = [whole(p.grad) for p in model.parameters() if p.grad is not None]
        seen.append((record.grad_norm, record.limit, record.skipped, grads))
    return seen, [whole(p) for p in model.parameters()]


def prepare(accelerator, enable_after=False):
    clip = None if enable_after else accelerate_clip.enable(accelerator, POLICIES)
    model = uneven_net()
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.02))
    return clip or accelerate_clip.enable(accelerator, POLICIES), model, opt


def on_ranks(rank, world, kind, after, calls):
    accelerator = joined() if kind == "ddp" else with_fsdp(sharding(2))
    clip, model, opt = prepare(accelerator, after)
    kinds = {type(p).__name__ for p in model.parameters()}
    return kinds, train(accelerator, clip, model, opt, range(STEPS), calls)


def assert_same(answers, one):
    for step, (norm, limit, skipped, grads) in enumerate(one[0]):
        rows = [answer[0][step] for answer in answers]
        for row in rows:
            torch.testing.assert_close(row[:3], rows[0][:3], rtol=0, atol=0, equal_nan=True)
            assert bool(row[2]) == bool(skipped) == (step == 8)
            torch.testing.assert_close(row[0], norm, rtol=1e-6, atol=0, equal_nan=True)
            torch.testing.assert_close(row[1], limit, rtol=1e-6, atol=0)
            assert len(row[3]) == len(grads)
            for got, first, expected in zip(row[3], rows[0][3], grads, strict=True):
                assert torch.equal(got, first)
                torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for parameters in zip(*(answer[1] for answer in answers), one[1], strict=True):
        assert torch.equal(parameters[0], parameters[1])
        torch.testing.assert_close(parameters[0], parameters[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("after", [False, True], ids=["enabled first", "enabled last"])
def test_two_ranks_do_what_one_does(kind, after):
    answers = run_on_ranks(on_ranks, 2, kind, after, not after)
    expected = {"ddp": {"Parameter"}, "fsdp2": {"DTensor"}}[kind]
    assert all(kinds == expected for kinds, _ in answers)
    accelerator = Accelerator(cpu=True)
    one = train(accelerator, *prepare(accelerator), range(STEPS))
    clipped = [bool(norm > limit) for norm, limit, *_ in one[0]]
    assert any(clipped)
    assert not all(clipped)
    assert_same([answer for _, answer in answers], one)


def saved_and_resumed(rank, world, kind, folder):
    accelerator = joined() if kind == "ddp" else with_fsdp(sharding(2))
    clip, model, opt = prepare(accelerator)
    train(accelerator, clip, model, opt, range(7))
    accelerator.save_state(folder)
    straight = train(accelerator, clip, model, opt, range(7, STEPS))
    fresh()
    accelerator = joined() if kind == "ddp" else with_fsdp(sharding(2))
    clip, model, opt = prepare(accelerator)
    accelerator.load_state(folder)
    resumed = train(accelerator, clip, model, opt, range(7, STEPS))
    return straight, resumed, clip.steps[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_resumed_run_goes_on_bitwise(kind):
    folder = tempfile.mkdtemp()
    try:
        for straight, resumed, steps in run_on_ranks(saved_and_resumed, 2, kind, folder):
            assert steps == STEPS
            for before, after in zip(straight[0], resumed[0], strict=True):
                torch.testing.assert_close(before, after, rtol=0, atol=0, equal_nan=True)
            assert all(map(torch.equal, straight[1], resumed[1]))
    finally:
        shutil.rmtree(folder)
