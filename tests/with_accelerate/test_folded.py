"""Clipping and withholding inside a fused optimizer's step; the schedule at withheld steps."""

import copy
import functools

import pytest
import torch
from accelerate import Accelerator
from support.accelerate_cpu import with_scaler
from support.prepared import batch, grads_of, net, norm_of

import accelerate_clip
from gradclip import ClipByNorm, ClipConfig, SkipLarge

# Accelerate replaces the optimizer's step while a scaler is on, and silences this itself.
pytestmark = pytest.mark.filterwarnings("ignore:Seems like .optimizer.step.* has been overridden")

OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
    "sgd": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.01),
}
SCALED = pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])


def start(policy, optimizer, *, scaled, fused=True, **options):
    accelerator = with_scaler(16.0) if scaled else Accelerator(cpu=True)
    clip = accelerate_clip.enable(accelerator, ClipConfig(policies=[policy], **options))
    model = net()
    opt = OPTIMIZERS[optimizer](model.parameters(), fused=fused)
    model, opt = accelerator.prepare(model, opt)
    return accelerator, clip, model, opt


def step(accelerator, model, opt, calls, seed, factor=9.0):
    opt.zero_grad()
    accelerator.backward(model(batch(seed)).float().square().mean() * factor)
    if calls:
        accelerator.clip_grad_norm_(model.parameters(), 0.3)
    opt.step()


@SCALED
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fifty_folded_steps_are_those_in_place(optimizer, scaled):
    ends, clipped = [], []
    for apply in ("in_place", "fold"):
        policy = ClipByNorm(max_norm=0.3)
        accelerator, clip, model, opt = start(policy, optimizer, scaled=scaled, apply=apply)
        for seed in range(50):
            step(accelerator, model, opt, seed // 2 % 2, seed)
        ends.append([p.detach() for p in model.parameters()])
        clipped.append(int(clip.clippers[0].state_dict()["counts"]["clipped"]))
    assert clipped[0] == clipped[1] > 25
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)


@SCALED
@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "folded"])
@pytest.mark.parametrize("rule", [None, "advance"])
def test_a_withheld_step_changes_nothing_and_the_schedule_does_as_told(fused, scaled, rule):
    for calls in (True, False):
        withheld_second(fused, scaled, rule, calls)


def test_to_hold_the_schedule_is_the_default():
    withheld_second(fused=True, scaled=False, rule="hold", calls=False)


def withheld_second(fused, scaled, rule, calls):
    """Three steps, of which a policy withholds the second."""
    options = {"schedule_on_skip": rule, "apply": "fold" if fused else "auto"}
    policy = SkipLarge(limit=20.0)
    accelerator, clip, model, opt = start(policy, "adamw", scaled=scaled, fused=fused, **options)
    schedule = accelerator.prepare(torch.optim.lr_scheduler.StepLR(opt.optimizer, 1, 0.5))
    rates, skipped = [], []
    for index, factor in enumerate((1.0, 50.0, 1.0)):
        before = copy.deepcopy(([*model.parameters()], opt.state_dict()["state"]))
        step(accelerator, model, opt, calls, index, factor)
        schedule.step()
        same = all(map(torch.equal, before[0], model.parameters()))
        assert same == bool(clip.last_record.skipped) == (index == 1)
        assert bool(clip.last_record.finite)
        if same:
            torch.testing.assert_close(opt.state_dict()["state"], before[1], rtol=0, atol=0)
        rates.append(opt.param_groups[0]["lr"])
        skipped.append(bool(accelerator.optimizer_step_was_skipped))
    advances = rule == "advance"
    assert skipped == [False, not advances, False]
    assert rates == pytest.approx([5e-3, 2.5e-3, 1.25e-3] if advances else [5e-3, 5e-3, 2.5e-3])


def test_one_backward_of_two_losses_is_unscaled_by_the_scale_it_was_made_with():
    """The first optimizer's step doubles the scale, before the second's takes it off."""
    accelerator = with_scaler()
    accelerator.scaler.set_growth_interval(1)
    config = ClipConfig(policies=[ClipByNorm(max_norm=0.3)], apply="fold")
    accelerate_clip.enable(accelerator, config)
    models = [net(0), net(1)]
    opts = [OPTIMIZERS["sgd"](m.parameters(), fused=True) for m in models]
    *models, first, second = accelerator.prepare(*models, *opts)
    accelerator.backward(sum(m(batch() * 4).float().square().mean() for m in models))
    for model in models:
        accelerator.clip_grad_norm_(model.parameters(), 0.3)
    for opt in (first, second):
        opt.step()
    for model in models:
        assert norm_of(grads_of(model)) == pytest.approx(0.3, rel=1e-4)
