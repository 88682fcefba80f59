"""Policies that watch the loss see what `accelerator.backward` is called on."""

import itertools
import math

import pytest
import torch
from accelerate import Accelerator
from support.accelerate_cpu import with_scaler
from torch import nn

import accelerate_clip
from gradclip import ConfigError, SkipSpike

POLICY = SkipSpike(window=8, watch="loss", warmup_steps=4)


def start(accelerator):
    clip = accelerate_clip.enable(accelerator, POLICY)
    model = nn.Linear(4, 1)
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return clip, model, opt


def loss_of(model, size):
    """A loss of this size whose gradient is small, or not finite as the size."""
    loss = model(torch.ones(2, 4)).float().mean()
    return loss * (1e-3 if math.isfinite(size) else size) + (size - loss.detach() * 1e-3)


def losses(clip, count):
    return clip.clippers[0].state_dict()["policies"][0]["state"]["losses"][-count:, 0].tolist()


def test_a_spike_of_the_loss_is_withheld():
    for calls, keyword in itertools.product((True, False), repeat=2):
        withheld_at_a_spike(calls, keyword)


def withheld_at_a_spike(calls, keyword):
    accelerator = Accelerator(cpu=True)
    clip, model, opt = start(accelerator)
    for step in range(12):
        opt.zero_grad()
        loss = loss_of(model, 50.0 if step == 9 else 1.0 + 0.01 * (step % 3))
        if keyword:
            accelerator.backward(loss=loss)
        else:
            accelerator.backward(loss)
        if calls:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        before = [p.detach().clone() for p in model.parameters()]
        opt.step()
        assert bool(clip.last_record.skipped) == (step == 9)
        assert all(map(torch.equal, before, model.parameters())) == (step == 9)
        assert accelerator.optimizer_step_was_skipped == (step == 9)


def test_micro_batches_are_averaged_undivided():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    clip, model, opt = start(accelerator)
    for size in (1.0, 3.0, 5.0, 7.0):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, size))
            opt.step()
            opt.zero_grad()
    assert losses(clip, 2) == pytest.approx([2.0, 6.0])


@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step.* has been overridden")
def test_the_loss_of_a_step_that_the_scaler_left_out_is_forgotten():
    """Averaged into the next step's, the infinite loss would withhold that one too."""
    accelerator = with_scaler()
    clip, model, opt = start(accelerator)
    for size in (1.0, math.inf, 3.0):
        opt.zero_grad()
        accelerator.backward(loss_of(model, size))
        opt.step()
    assert accelerator.scaler.get_scale() == 512.0
    assert losses(clip, 3) == pytest.approx([0.0, 1.0, 3.0])
    assert not clip.last_record.skipped


def test_the_loss_of_a_batch_that_the_script_leaves_out_is_forgotten():
    accelerator = Accelerator(cpu=True)
    clip, model, opt = start(accelerator)
    for size in (9.0, 3.0):
        opt.zero_grad()
        accelerator.backward(loss_of(model, size))
    opt.step()
    assert losses(clip, 2) == pytest.approx([0.0, 3.0])


def test_several_optimizers_are_refused_when_prepared():
    accelerator = Accelerator(cpu=True)
    accelerate_clip.enable(accelerator, POLICY)
    models = [nn.Linear(4, 1), nn.Linear(4, 1)]
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    with pytest.raises(ConfigError, match=r"2 optimizers .* Set watch to 'norm'"):
        accelerator.prepare(*models, *opts)


def test_a_backward_that_is_not_seen_is_an_error():
    clip, model, opt = start(Accelerator(cpu=True))
    loss_of(model, 1.0).backward()
    with pytest.raises(
        ConfigError, match=r"no rank has given one; call clipper\.clip\(loss=loss\)"
    ):
        opt.step()
    assert clip.last_record is None
