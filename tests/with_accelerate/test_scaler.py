"""fp16 with a live loss scale: unscaled exactly once, limits in units of the real gradients."""

import math

import pytest
import torch
from support.accelerate_cpu import with_scaler
from torch import nn

import accelerate_clip
from gradclip import ClipByNorm, GradientClipper, SkipNonfinite

# Accelerate replaces the optimizer's step while a scaler is on, and silences this itself.
pytestmark = pytest.mark.filterwarnings("ignore:Seems like .optimizer.step.* has been overridden")


def start(fused, policy=None):
    accelerator = with_scaler()
    clip = accelerate_clip.enable(accelerator, policy or ClipByNorm(max_norm=0.3))
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=fused))
    schedule = accelerator.prepare(torch.optim.lr_scheduler.StepLR(opt.optimizer, 1, 0.5))
    return accelerator, clip, model, opt, schedule


def expected(weight, bias, inputs):
    """The gradient of mean((x w + b)^2), by hand in float64, and its norm."""
    x, w, b = inputs.double(), weight.detach().double(), bias.detach().double()
    error = 2 * (x @ w.T + b) / len(x)
    grads = [error.T @ x, error.sum(0)]
    return grads, math.sqrt(sum(float(g.square().sum()) for g in grads))


def step(accelerator, model, opt, schedule, inputs, calls, factor=1.0):
    opt.zero_grad()
    accelerator.backward(model(inputs).float().square().mean() * factor)
    if calls:
        accelerator.clip_grad_norm_(model.parameters(), 0.3)
    opt.step()
    schedule.step()


# Autocast computes the forward pass in bfloat16 or float16: gradients to three digits.
CLOSE = {"rtol": 2e-2, "atol": 2e-3}


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
def test_unscaled_once_and_clipped_once(fused, monkeypatch):
    done = []
    clip_once = GradientClipper.clip
    monkeypatch.setattr(
        GradientClipper, "clip", lambda self, **k: done.append(1) or clip_once(self, **k)
    )
    accelerator, clip, model, opt, schedule = start(fused)
    for index in range(3):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(index)) * 4
        grads, norm = expected(model.weight, model.bias, inputs)
        step(accelerator, model, opt, schedule, inputs, calls=index == 1)
        assert len(done) == index + 1
        assert norm > 0.4
        assert float(clip.last_record.grad_norm) == pytest.approx(norm, rel=2e-2)
        assert float(clip.last_record.clipped_norm) == pytest.approx(0.3, rel=1e-4)
        # A fused optimizer unscales while it steps, and leaves the unscaled gradients behind.
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad.double(), grad * 0.3 / norm, **CLOSE)
        assert accelerator.scaler.get_scale() == 1024.0


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
def test_an_overflow_skips_halves_the_scale_and_the_next_step_is_clipped(fused):
    for calls in (True, False):
        overflow_second(fused, calls)


def overflow_second(fused, calls):
    """Three steps, of which the second overflows."""
    accelerator, clip, model, opt, schedule = start(fused)
    inputs = torch.full((8, 4), 4.0)
    rates = []
    for index in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        overflows = index == 1
        step(accelerator, model, opt, schedule, inputs, calls, math.inf if overflows else 1.0)
        same = all(map(torch.equal, before, model.parameters()))
        assert same == overflows
        assert accelerator.optimizer_step_was_skipped == overflows
        rates.append(opt.param_groups[0]["lr"])
    assert accelerator.scaler.get_scale() == 512.0
    assert rates == pytest.approx([5e-4, 5e-4, 2.5e-4])
    assert float(clip.last_record.clipped_norm) == pytest.approx(0.3, rel=1e-4)
    counts = clip.clippers[0].state_dict()["counts"]
    assert (counts["steps"], counts["nonfinite"], counts["taken"]) == (3, 1, 2)
    assert clip.steps[0] == 3


def test_an_overflow_is_over_where_the_script_scales_by_itself():
    """No call of Accelerate's tells then that the next gradients are new."""
    accelerator, clip, model, opt, _ = start(False)
    for factor in (math.inf, 1.0):
        opt.zero_grad()
        loss = model(torch.full((8, 4), 4.0)).float().square().mean() * factor
        accelerator.scaler.scale(loss).backward()
        opt.step()
        assert bool(clip.last_record.skipped) == (factor != 1.0)
    assert float(clip.last_record.clipped_norm) == pytest.approx(0.3, rel=1e-4)


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
def test_a_step_withheld_for_other_reasons_holds_the_schedule_too(fused):
    class Never(SkipNonfinite):
        def decide(self, stats, state):
            decision, state = super().decide(stats, state)
            return type(decision)(decision.coef, decision.limit, torch.tensor(True)), state

    accelerator, _, model, opt, schedule = start(fused, Never())
    before = [p.detach().clone() for p in model.parameters()]
    step(accelerator, model, opt, schedule, torch.full((8, 4), 4.0), True)
    assert all(map(torch.equal, before, model.parameters()))
    assert accelerator.optimizer_step_was_skipped
    assert opt.param_groups[0]["lr"] == 1e-3
    assert accelerator.scaler.get_scale() == 1024.0


def test_the_norm_of_an_unfinished_accumulation_is_unscaled():
    accelerator, _, model, opt, _ = start(False)
    accelerator.gradient_accumulation_steps = 2
    inputs = torch.full((8, 4), 4.0)
    _, norm = expected(model.weight, model.bias, inputs)
    with accelerator.accumulate(model):
        accelerator.backward(model(inputs).float().square().mean())
        found = accelerator.clip_grad_norm_(model.parameters(), 0.3)
        opt.step()
    assert float(found) == pytest.approx(norm / 2, rel=2e-2)


def test_an_optimizer_that_is_prepared_anew_is_clipped_by_its_new_clipper_alone():
    accelerator, clip, model, opt, _ = start(False)
    old = clip.clippers[0]
    raw = opt.optimizer
    accelerator.free_memory()
    model, opt = accelerator.prepare(model, raw)
    for factor in (math.inf, 1.0):
        opt.zero_grad()
        accelerator.backward(model(torch.full((8, 4), 4.0)).float().square().mean() * factor)
        opt.step()
    assert old.last_record is None
    assert int(clip.clippers[0].state_dict()["counts"]["nonfinite"]) == 1
    assert float(clip.last_record.clipped_norm) == pytest.approx(0.3, rel=1e-4)
