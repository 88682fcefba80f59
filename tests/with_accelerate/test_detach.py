"""`detach` undoes `enable`: what follows is a stock accelerator's, and can be enabled anew."""

import copy
import json
import math
import pickle
from functools import partial
from types import MethodType

import pytest
import torch
from accelerate import Accelerator
from support.accelerate_cpu import fresh, with_scaler
from support.freed import kept
from support.prepared import batch, net, norm_of, prepared

import accelerate_clip
from gradclip import ClipByNorm, ClipConfig, ConfigError, RecorderConfig, SkipSpike, UClip

SMALL = ClipByNorm(max_norm=1e-3)


def train(accelerator, model, opt, steps):
    for step in steps:
        opt.zero_grad()
        accelerator.backward(model(batch(step)).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()


def test_nothing_of_it_is_left_on_the_accelerator():
    accelerator = Accelerator(cpu=True)
    before = dict(vars(accelerator))
    clip = accelerate_clip.enable(accelerator, SMALL)
    assert accelerator.gradient_clip is clip
    clip.detach()
    clip.detach()
    assert vars(accelerator) == before


def copied(value):
    return copy.deepcopy(value)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copy_of", [copied, pickled])
def test_copies_of_what_it_clips_are_stock_ones(copy_of, tmp_path, caplog):
    accelerator, clip, model, opt = prepared(SMALL)
    train(accelerator, model, opt, range(2))
    other, other_opt = copy_of((model, opt))
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    moved = [p.detach() - 0.1 for p in other.parameters()]
    other_opt.step()
    assert all(map(torch.equal, other.parameters(), moved))  # by more than the limit
    assert all(map(torch.equal, model.parameters(), before))
    assert clip.steps == [2]
    step = vars(other_opt)["step"]
    assert getattr(step, "__wrapped__", step) == MethodType(type(opt).step, other_opt)

    second = pickled(accelerator)  # a deep copy is the accelerator itself
    assert second.gradient_clip is None
    assert caplog.text.count("The copy is a stock one and doesn't clip") == 1
    for hook in second._save_model_state_pre_hook.values():
        hook([], [], tmp_path)
    assert not any(tmp_path.iterdir())
    train(accelerator, model, opt, range(2, 3))
    assert clip.steps == [3]


def fit(clips, policy=SMALL, start=None, make=torch.optim.SGD, before=True, scheduled=False, **how):
    """Three steps, and the parts that a script holds."""
    fresh()
    accelerator = (start or Accelerator)(**({} if start else {"cpu": True}))
    if clips and before:
        accelerate_clip.enable(accelerator, policy)
    model = net()
    opt = make(model.parameters(), lr=0.1, **how)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
    model, opt, *rest = accelerator.prepare(model, opt, *([schedule] if scheduled else []))
    if clips and not before:
        accelerate_clip.enable(accelerator, policy)
    for step in range(3):
        train(accelerator, model, opt, [step])
        for one in rest:
            one.step()
    parts = {"accelerator": accelerator, "model": model, "opt": opt, "raw": opt.optimizer}
    parts["parameter"] = next(model.parameters())
    return parts | ({"clip": accelerator.gradient_clip} if clips else {})


def ended(clips):
    parts = fit(clips)
    parts["accelerator"].end_training()
    return parts


def detached(clips):
    parts = fit(clips)
    if clips:
        parts["clip"].detach()
    return parts


def with_a_copy(copy_of, clips):
    parts = fit(clips)
    model, opt = copy_of((parts["model"], parts["opt"]))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    opt.step()
    return parts | {"copied": model, "copied opt": opt, "copied raw": opt.optimizer}


DROPPED = {
    "before prepare": fit,
    "after prepare": partial(fit, before=False),
    "scheduled": partial(fit, scheduled=True),
    "with a scaler": partial(fit, start=with_scaler),
    "fused": partial(fit, make=torch.optim.AdamW, fused=True),
    "loss": partial(fit, policy=SkipSpike(watch="loss")),
    "micro-batches": partial(fit, policy={"policies": [SMALL], "stage": "after_backward"}),
    "elements": partial(fit, policy=UClip(limit=0.1)),
    "ended": ended,
    "detached": detached,
    "deep copies": partial(with_a_copy, copied),
    "a copy of a copy": partial(with_a_copy, lambda value: copied(copied(value))),
}


@pytest.mark.parametrize("case", DROPPED)
def test_what_is_dropped_is_freed_at_once_as_without_it(case):
    def made(clips):
        parts = DROPPED[case](clips)
        fresh()  # Accelerate's singletons
        return parts

    ours, stock = kept(made, True), kept(made, False)
    assert ours <= stock
    assert "accelerator" not in stock


def test_prepared_optimizers_are_clipped_without_their_accelerator():
    accelerator, clip, model, opt = prepared(SMALL)
    del accelerator, clip
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    opt.step()
    moved = norm_of([p.detach() - q for p, q in zip(model.parameters(), before, strict=True)])
    assert moved == pytest.approx(1e-4, rel=1e-3)


def test_what_it_tells_once_the_accelerator_is_gone(tmp_path):
    config = ClipConfig(policies=[SMALL], recorder=RecorderConfig())
    accelerator, clip, model, opt = prepared(config, project_dir=tmp_path)
    backward = accelerator.backward
    train(accelerator, model, opt, range(3))
    del accelerator, opt
    assert clip.steps == [3]
    assert clip.flush()["clip/clipped"] == 3
    with pytest.raises(ConfigError, match="the Accelerator that enable was called with is gone"):
        clip.clip_grad_norm_(model.parameters(), math.inf)
    with pytest.raises(ConfigError, match="backward was called, and the object whose method"):
        backward(model(batch(0)).sum())
    clip.detach()
    _, *rows = (tmp_path / "gradclip.trace.jsonl").read_text().splitlines()
    assert len(rows) == 3


def test_a_schedule_of_torch_follows_the_step_that_clips():
    """Which takes `__func__` out of it, and binds that anew."""
    accelerator, clip, model, opt = prepared(SMALL)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    for step in range(2):
        train(accelerator, model, opt, [step])
        schedule.step()  # warns if it sees no step before it
    assert clip.steps == [2]
    assert opt.param_groups[0]["lr"] == pytest.approx(0.025)


def test_steps_and_checkpoints_are_stock_ones_from_then_on(tmp_path):
    config = ClipConfig(policies=[SMALL], recorder=RecorderConfig())
    accelerator, clip, model, opt = prepared(config, project_dir=tmp_path)
    train(accelerator, model, opt, range(3))
    record = clip.last_record
    clip.detach()
    accelerator.save_state(tmp_path / "saved")
    assert not (tmp_path / "saved/gradient_clip.bin").exists()
    _, *rows = (tmp_path / "gradclip.trace.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1, 2]
    start = [p.detach().clone() for p in model.parameters()]
    train(accelerator, model, opt, range(3, 6))
    assert clip.steps[0] == 3
    assert clip.last_record is record

    fresh()
    stock, other = Accelerator(cpu=True), net()
    other, opt = stock.prepare(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with torch.no_grad():
        for parameter, value in zip(other.parameters(), start, strict=True):
            parameter.copy_(value)
    train(stock, other, opt, range(3, 6))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_another_policy_can_be_enabled_then():
    accelerator, clip, model, opt = prepared(SMALL)
    clip.detach()
    second = accelerate_clip.enable(accelerator, ClipByNorm(max_norm=1e-2))
    clip.detach()
    before = [p.detach().clone() for p in model.parameters()]
    train(accelerator, model, opt, range(1))
    moved = norm_of([p.detach() - q for p, q in zip(model.parameters(), before, strict=True)])
    assert moved == pytest.approx(1e-3, rel=1e-3)
    assert clip.last_record is None
    assert second.steps[0] == 1


def test_what_somebody_else_wrapped_since_stays_theirs():
    accelerator, clip, model, opt = prepared(SMALL)
    ours, calls = accelerator.backward, []

    def theirs(loss):
        calls.append(loss)
        ours(loss)

    accelerator.backward = theirs
    clip.detach()
    assert accelerator.backward is theirs
    train(accelerator, model, opt, range(2))
    assert len(calls) == 2
    assert clip.clippers[0].batch is None
    assert clip.last_record is None
