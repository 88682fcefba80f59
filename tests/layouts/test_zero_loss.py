"""DeepSpeed engines whose steps are withheld by their loss, or stopped by a policy's bound."""

import functools

import pytest
import torch
from support.ranks import run_on_ranks

from gradclip import GradientClipper, SkipLarge, SkipLimitError, SkipSpike

pytest.importorskip("deepspeed")

from support.zero_engines import WORLD, backward, gradients, snapshot, start, step

NAMES = ("stage 0", "zero 2", "zero 3", "bf16 zero 1 fp32 accumulation", "fp16 zero 2")


def attached(name, policy):
    engine = start(name, optimizer=torch.optim.Adam)
    clipper = GradientClipper(policy, optimizer=engine)
    clipper.attach(engine)
    return engine, clipper


def spike(rank, name):
    """A loss that stands out on one rank withholds the step on both."""
    policy = SkipSpike(window=4, watch="loss", warmup_steps=3)
    engine, clipper = attached(name, policy)
    found = []
    for number in range(6):
        clipper.observe_loss(90.0 if (number, rank) == (4, 1) else 2.0 + 0.1 * (number % 2))
        before = snapshot(engine)
        step(engine, rank, number)
        withheld = bool(clipper.last_record.skipped)
        assert withheld == all(map(torch.equal, before, snapshot(engine)))
        assert withheld is not engine.was_step_applied()
        found.append(withheld)
    return found


def stopped(rank, name):
    """The error leaves parameters, moments, gradients and the clipper's state as they were."""
    policy = SkipLarge(limit=1e-9, max_consecutive=2, fallback="raise")
    engine, clipper = attached(name, policy)
    for number in range(2):
        step(engine, rank, number)
        assert clipper.last_record.skipped
    backward(engine, rank, 2)
    before, state, held = snapshot(engine), clipper.state_dict(), gradients(engine)
    with pytest.raises(SkipLimitError, match=r"'skip_large': max_consecutive 2"):
        engine.step()
    assert all(map(torch.equal, before, snapshot(engine)))
    assert held
    assert all(map(torch.equal, held, gradients(engine)))
    for part, old in zip(clipper.state_dict()["policies"], state["policies"], strict=True):
        assert all(torch.equal(value, old["state"][key]) for key, value in part["state"].items())
    assert clipper.state_dict()["counts"] == state["counts"]
    return True


def each(rank, world):
    return {name: (spike(rank, name), stopped(rank, name)) for name in NAMES}


@functools.cache
def answers():
    return run_on_ranks(each, WORLD, timeout=300, fresh=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_on_one_rank_withholds_the_step_on_all_and_a_bound_stops_before_a_write(name):
    for answer in answers():
        withheld, unchanged = answer[name]
        assert withheld == [False] * 4 + [True, False]
        assert unchanged
