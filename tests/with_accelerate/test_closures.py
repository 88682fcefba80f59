"""A closure that the optimizer evaluates: each evaluation is clipped, the step is one."""

import functools

import pytest
import torch
from support.accelerate_cpu import with_scaler
from support.prepared import batch, grads_of, net, norm_of, prepared

import accelerate_clip
from gradclip import ClipByNorm, ConfigError, ZClip

LBFGS = functools.partial(torch.optim.LBFGS, max_iter=4, tolerance_change=0.0)


def test_lbfgs_is_clipped_at_every_evaluation_and_counted_once():
    for calls in (True, False):
        train_with_closures(calls)


def train_with_closures(calls):
    policies = [ZClip(warmup_steps=3), ClipByNorm(max_norm=0.01)]
    accelerator, clip, model, opt = prepared(policies, optimizer=LBFGS)
    before, after = [], []

    def closure():
        if before:
            after.append(norm_of(left[-1]))
        opt.zero_grad()
        loss = model(batch()).square().mean()
        accelerator.backward(loss)
        before.append(norm_of(grads_of(model)))
        left.append([p.grad for p in model.parameters()])
        if calls:
            accelerator.clip_grad_norm_(model.parameters(), 0.01)
        return loss

    left = []
    for step in range(2):
        first = len(before)
        opt.step(closure)
        assert len(before) - first >= 3
        assert float(clip.last_record.grad_norm) == pytest.approx(before[first], rel=1e-5)
        [counts] = [clipper.state_dict()["counts"] for clipper in clip.clippers]
        assert counts["steps"] == clip.steps[0] == step + 1
    assert min(before) > 0.01
    assert after == pytest.approx([0.01] * len(after), rel=1e-4)


def test_a_closure_with_a_loss_scale_is_refused():
    accelerator = with_scaler()
    accelerate_clip.enable(accelerator, ClipByNorm(max_norm=0.3))
    model = net()
    model, opt = accelerator.prepare(model, LBFGS(model.parameters()))
    with pytest.raises(ConfigError, match=r"LBFGS.step was given a closure.*Set mixed_precision"):
        opt.step(lambda: None)
