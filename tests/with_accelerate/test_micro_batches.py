"""`stage: after_backward`: each `accelerator.backward` is clipped before it accumulates."""

import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from support.accelerate_cpu import fresh, with_scaler
from support.prepared import batch, net, norm_of, prepared
from support.ranks import run_on_ranks
from support.trainers import trainer
from torch.utils.data import DataLoader, TensorDataset

import accelerate_clip
from gradclip import ClipByNorm, ClipConfig, ConfigError, ZClip

LIMIT = 0.2
WINDOW = 3


def config_of(*policies, **options):
    policies = list(policies) or [ClipByNorm(max_norm=LIMIT)]
    return ClipConfig(policies=policies, stage="after_backward", **options)


def loss_of(model, rows):
    return model(rows).float().square().mean()


def alone(rows):
    model = net()
    grads = torch.autograd.grad(loss_of(model, rows), list(model.parameters()))
    return [grad * min(1.0, LIMIT / (norm_of(grads) + 1e-6)) for grad in grads]


def window(accelerator, clip, model, opt, batches, calls):
    """The gradients and the record of each step; parameters don't move."""
    opt.param_groups[0]["lr"] = 0.0
    rows = torch.cat(batches)
    size = len(batches[0])
    data = accelerator.prepare(DataLoader(TensorDataset(rows), batch_size=size))
    seen = []
    for (inputs,) in data:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, inputs))
            if calls:
                accelerator.clip_grad_norm_(model.parameters(), LIMIT)
            opt.step()
            if accelerator.sync_gradients:
                seen.append(([p.grad.clone() for p in model.parameters()], clip.last_record))
            opt.zero_grad()
    return seen


def test_each_batch_of_a_window_is_clipped_by_itself():
    for calls in (True, False):
        clipped_by_itself(calls)


def clipped_by_itself(calls):
    batches = [batch(seed) * size for seed, size in enumerate([1, 5, 1, 2, 3])]
    start = prepared(config_of(), gradient_accumulation_steps=WINDOW)
    steps = window(*start, batches, calls)
    for (grads, record), some in zip(steps, (batches[:3], batches[3:]), strict=True):
        for grad, *parts in zip(grads, *map(alone, some), strict=True):
            torch.testing.assert_close(grad, sum(parts) / WINDOW, rtol=1e-5, atol=1e-7)
        assert record.dropped == 0
    assert start[1].clippers[0].state_dict()["counts"]["steps"] == 2


def test_a_bad_batch_is_left_out_of_its_window():
    batches = [batch(0), batch(1) * float("nan"), batch(2)]
    start = prepared(config_of(), gradient_accumulation_steps=WINDOW)
    ((grads, record),) = window(*start, batches, calls=False)
    for grad, *parts in zip(grads, alone(batches[0]), alone(batches[2]), strict=True):
        torch.testing.assert_close(grad, sum(parts) / WINDOW, rtol=1e-5, atol=1e-7)
    assert record.dropped == 1
    assert not record.skipped


@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step.* has been overridden")
@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_backs_off_at_an_overflow(fused):
    accelerator = with_scaler()
    clip = accelerate_clip.enable(accelerator, config_of(ClipByNorm(max_norm=LIMIT)))
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    model, opt = accelerator.prepare(model, optimizer)
    skipped, scales = [], []
    for factor in (1.0, float("inf"), 1.0):
        for size in (1.0, factor):
            accelerator.backward(loss_of(model, batch()) / 2 * size)
        opt.step()
        opt.zero_grad()
        skipped.append(bool(clip.last_record.skipped))
        scales.append(accelerator.scaler.get_scale())
        assert all(p.isfinite().all() for p in model.parameters())
    assert skipped == [False, True, False]
    assert scales[1] == scales[0] / 2


def test_a_backward_that_accelerate_does_not_see_is_refused():
    _, _, model, opt = prepared(config_of())
    loss_of(model, batch()).backward()
    with pytest.raises(ConfigError, match="outside of micro_batch"):
        opt.step()


def test_several_optimizers_are_refused():
    accelerator, _, _, _ = prepared(config_of())
    other = net()
    with pytest.raises(
        ConfigError, match="'after_backward', and a backward doesn't tell which of 2 optimizers"
    ):
        accelerator.prepare(other, torch.optim.SGD(other.parameters(), lr=0.1))


def test_the_trainer_clips_each_batch_of_its_windows(tmp_path):
    policies = [ZClip(warmup_steps=2, max_norm=None), ClipByNorm(max_norm=0.05)]
    callback = accelerate_clip.GradientClipCallback(config_of(*policies))
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    run = trainer(tmp_path, callbacks=[callback], max_grad_norm=0, max_steps=3, **options)
    run.train()
    saved = callback.clip.clippers[0].state_dict()
    assert saved["counts"]["steps"] == 3
    assert saved["policies"][0]["state"]["seen"] == 6
    rows = [row for row in run.state.log_history if "clip/dropped" in row]
    assert len(rows) == 3
    whole = accelerate_clip.GradientClipCallback(ClipConfig(policies=policies))
    other = trainer(tmp_path, callbacks=[whole], max_grad_norm=0, max_steps=1, **options)
    other.train()
    # Both batches of a step are equal, so each has the gradient of the whole step.
    norm = other.state.log_history[0]["clip/grad_norm"]
    assert rows[0]["clip/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert rows[0]["clip/clipped_norm"] == pytest.approx(0.05, rel=1e-4)


def on_ranks(rank, world):
    found = {}
    for each in (True, False):
        fresh()
        plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=each)
        accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
        clip = accelerate_clip.enable(accelerator, config_of())
        model = net()
        model, opt = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        try:
            for step in range(4):
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, batch(10 * step + rank)))
                    opt.step()
                    opt.zero_grad()
        except ConfigError as error:
            found[each] = str(error)
        else:
            found[each] = [p.detach().clone() for p in model.parameters()]
            assert clip.clippers[0].state_dict()["counts"]["steps"] == 2
    return found


def test_ranks_reduce_each_batch_or_are_refused():
    first, second = run_on_ranks(on_ranks, 2)
    assert all(map(torch.equal, first[True], second[True]))
    assert "sync_each_batch=True" in first[False]
    wanted = net()
    for step in (0, 2):
        parts = []
        for micro in (step, step + 1):
            rows = torch.cat([batch(10 * micro + rank) for rank in range(2)])
            grads = torch.autograd.grad(loss_of(wanted, rows), list(wanted.parameters()))
            factor = min(1.0, LIMIT / (norm_of(grads) + 1e-6))
            parts.append([grad * factor for grad in grads])
        for p, *grads in zip(wanted.parameters(), *parts, strict=True):
            p.data -= 0.1 * sum(grads) / 2
    for p, q in zip(first[True], wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)


def train_on_ranks(rank, world, folder):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    callback = accelerate_clip.GradientClipCallback(config_of())
    with pytest.raises(ConfigError) as error:
        trainer(
            folder,
            world,
            callbacks=[callback],
            gradient_accumulation_steps=2,
            save_strategy="no",
        ).train()
    return str(error.value)


def test_a_trainer_of_several_processes_that_accumulates_is_refused(tmp_path):
    for said in run_on_ranks(train_on_ranks, 2, str(tmp_path)):
        assert "sync_each_batch" in said
