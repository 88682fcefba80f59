"""What Accelerate 1.15 alone shows at its hooks: an upgrade that changes it fails here first."""

import math

import pytest
import torch
from accelerate import Accelerator
from support.accelerate_cpu import fresh, with_scaler
from support.accelerate_layouts import LAYOUTS
from support.nets import parallel_net
from support.prepared import batch, grads_of, net, norm_of
from support.ranks import run_on_ranks
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.utils.data import DataLoader, TensorDataset

# Accelerate replaces the optimizer's step while a scaler is on, and silences this itself.
pytestmark = pytest.mark.filterwarnings("ignore:Seems like .optimizer.step.* has been overridden")

FUSED = pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])


def hooked(accelerator, fused, model=None):
    """A prepared model and optimizer, its schedule, and what the raw optimizer's hooks saw."""
    model = model or nn.Linear(4, 1)
    raw = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    seen = []

    def look(_, args, kwargs):
        found = (getattr(raw, name, None) for name in ("grad_scale", "found_inf"))
        scale, inf = (None if value is None else float(value) for value in found)
        seen.append((norm_of(grads_of(model)), scale, inf, args[1:], kwargs))

    raw.register_step_pre_hook(look)
    raw.register_step_post_hook(lambda *_: seen.append("after"))
    model, opt = accelerator.prepare(model, raw)
    return model, opt, accelerator.prepare(torch.optim.lr_scheduler.StepLR(raw, 1, 0.5)), seen


def loss_of(model, inputs):
    return model(inputs).float().square().mean()


@FUSED
@pytest.mark.parametrize("scaled", [False, True])
def test_the_raw_optimizers_hooks_run_on_syncing_batches_alone(fused, scaled):
    accelerator = with_scaler() if scaled else Accelerator(cpu=True)
    accelerator.gradient_accumulation_steps = 2
    model, opt, _, seen = hooked(accelerator, fused)
    for step in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch(step)))
            opt.step()
            assert len(seen) == 2 * (step // 2 + step % 2)
            if seen:
                (_, _, _, args, kwargs), after = seen[-2:]
                assert (args, kwargs, after) == ((None,), {}, "after")
            opt.zero_grad()


def test_the_prepared_optimizer_takes_no_hooks():
    _, opt, _, _ = hooked(Accelerator(cpu=True), False)
    with pytest.raises(AttributeError, match="_optimizer_step_pre_hooks"):
        opt.register_step_pre_hook(lambda *_: None)


@FUSED
@pytest.mark.parametrize("clips", [False, True])
def test_gradients_are_unscaled_before_the_hook_unless_a_fused_step_does_it(fused, clips):
    accelerator = with_scaler()
    model, opt, _, seen = hooked(accelerator, fused)
    accelerator.backward(loss_of(model, batch()))
    norm = norm_of(grads_of(model))
    if clips:
        accelerator.clip_grad_norm_(model.parameters(), math.inf)
    opt.step()
    held, scale, inf, _, _ = seen[0]
    if fused and not clips:
        assert (held, scale, inf) == (norm, 1024.0, 0.0)
    else:
        assert (held, scale) == (pytest.approx(norm / 1024, rel=1e-6), None)
        assert inf == (0.0 if fused else None)
    assert norm_of(grads_of(model)) == pytest.approx(norm / 1024, rel=1e-6)


@FUSED
@pytest.mark.parametrize("clips", [False, True])
def test_an_overflow_reaches_the_hooks_of_fused_optimizers_alone(fused, clips):
    accelerator = with_scaler()
    model, opt, schedule, seen = hooked(accelerator, fused)
    accelerator.backward(loss_of(model, batch()) * math.inf)
    if clips:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    schedule.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert accelerator.scaler.get_scale() == 512.0
    assert accelerator.optimizer_step_was_skipped == (not fused)
    assert opt.param_groups[0]["lr"] == (0.05 if fused else 0.1)
    if fused:
        (_, scale, inf, _, _), after = seen
        assert (scale, inf, after) == (None if clips else 1024.0, 1.0, "after")
    else:
        assert seen == []


def test_every_backward_is_divided_by_the_full_count_in_a_short_window_too():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = net()
    model, opt, data = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        DataLoader(TensorDataset(batch(0, size=1).expand(5, 4)), batch_size=1),
    )
    norms = []
    for (inputs,) in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).square().mean())
            if accelerator.sync_gradients:
                norms.append(norm_of(grads_of(model)))
            opt.step()
            opt.zero_grad()
    assert norms[1] == pytest.approx(norms[0] * 2 / 3, rel=1e-6)
    assert accelerator.gradient_accumulation_steps == 3


def test_a_second_unscaling_is_an_error():
    accelerator = with_scaler()
    model, _, _, _ = hooked(accelerator, False)
    accelerator.backward(loss_of(model, batch()))
    accelerator.unscale_gradients()
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0)


def test_clipping_some_parameters_unscales_every_optimizer():
    accelerator = with_scaler()
    (first, *_), (second, *_) = (hooked(accelerator, False) for _ in range(2))
    accelerator.backward(loss_of(first, batch()) + loss_of(second, batch()))
    before = [norm_of(grads_of(model)) for model in (first, second)]
    weight = norm_of([first.weight.grad]) / 1024
    found = accelerator.clip_grad_norm_([first.weight], 1e9)
    assert float(found) == pytest.approx(weight, rel=1e-6)
    after = [norm_of(grads_of(model)) for model in (first, second)]
    assert after == pytest.approx([norm / 1024 for norm in before], rel=1e-6)


def test_a_step_forgets_what_was_unscaled_for_other_optimizers():
    """`scaler.update` after each step: the next optimizer's gradients are divided a second time."""
    accelerator = with_scaler()
    (first, one, *_), (second, two, *_) = (hooked(accelerator, False) for _ in range(2))
    accelerator.backward(loss_of(first, batch()) + loss_of(second, batch()))
    accelerator.unscale_gradients()
    norm = norm_of(grads_of(second))
    one.step()
    two.step()
    assert norm_of(grads_of(second)) == pytest.approx(norm / 1024, rel=1e-6)


def with_fsdp1(fused):
    fresh()
    accelerator = LAYOUTS["fsdp1"][0](mixed_precision="fp16")
    accelerator.native_amp = True
    accelerator.scaler = ShardedGradScaler(device="cpu", init_scale=64.0)
    model = parallel_net()
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=fused))
    accelerator.backward(loss_of(model, batch()))
    return accelerator, model, opt


def partial_list(rank, world):
    accelerator, model, _ = with_fsdp1(False)
    with pytest.raises(RuntimeError) as error:
        accelerator.clip_grad_norm_(list(model.parameters())[:2], 1.0)
    return str(error.value)


def test_a_partial_list_under_fsdp1_is_unscaled_twice():
    for message in run_on_ranks(partial_list, 2):
        assert "unscale_() has already been called" in message


def fused_step(rank, world):
    accelerator, _, opt = with_fsdp1(True)
    accelerator.unscale_gradients()
    with pytest.raises(RuntimeError) as error:
        opt.step()
    return str(error.value)


def test_unscaled_by_fsdps_scaler_fused_steps_refuse_the_shape_of_found_inf():
    for message in run_on_ranks(fused_step, 2):
        assert "output with shape [] doesn't match the broadcast shape [1]" in message
