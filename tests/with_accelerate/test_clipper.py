"""Steps on one process: who clips, how often, and what a withheld step leaves behind."""

import math

import pytest
import torch
from accelerate import Accelerator
from support.prepared import batch, grads_of, net, norm_of, prepared
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import accelerate_clip
from accelerate_clip import GradientClipCallback
from gradclip import (
    Auto,
    ClipByNorm,
    ClipByValue,
    ClipConfig,
    GradientClipper,
    GroupConfig,
    LogConfig,
    NonFiniteError,
)


@pytest.fixture
def counted(monkeypatch):
    """Every clipping the engine really does."""
    records = []
    clip = GradientClipper.clip

    def clip_and_count(self, **options):
        records.append(clip(self, **options))
        return records[-1]

    monkeypatch.setattr(GradientClipper, "clip", clip_and_count)
    return records


def messages(caplog):
    """What was logged, without the rank that newer versions of Accelerate put before it."""
    return [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]


def test_without_a_policy_it_is_auto_and_knows_the_optimizer():
    assert GradientClipCallback().config.policies == [Auto()]
    accelerator, clip, model, opt = prepared(None, before=False)
    assert clip.config.policies == [Auto()]
    [rate] = {group["lr"] for group in opt.param_groups}
    size = torch.cat([p.detach().flatten() for p in model.parameters()]).norm()
    accelerator.backward(1e6 * model(batch(0)).sum())
    opt.step()
    # SGD: what moves the parameters by 7 % of their size.
    assert float(clip.last_record.limit) == pytest.approx(0.07 * float(size) / rate, rel=1e-5)


@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
def test_an_unchanged_loop_is_clipped_by_the_configuration(before, counted, caplog):
    accelerator, clip, model, opt = prepared(ClipByNorm(max_norm=0.3), before=before)
    for step in range(3):
        opt.zero_grad()
        accelerator.backward(model(batch(step)).square().mean())
        raw = grads_of(model)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        assert type(norm) is torch.Tensor
        assert norm.ndim == 0
        assert float(norm) == pytest.approx(norm_of(raw), rel=1e-6)
        assert float(norm) > 0.3
        clipped = [g * (0.3 / (norm_of(raw) + 1e-6)) for g in raw]
        start = [p.detach().clone() for p in model.parameters()]
        opt.step()
        for parameter, old, grad in zip(model.parameters(), start, clipped, strict=True):
            torch.testing.assert_close(parameter, old - 0.1 * grad)
        assert clip.last_record is counted[-1]
    assert len(counted) == 3
    said = [text for text in messages(caplog) if "clip_grad_norm_" in text]
    assert said == [
        "accelerator.clip_grad_norm_ was called with max_norm=1.0; the gradclip "
        "configuration decides instead: norm(max_norm=0.3). Pass math.inf "
        "(transformers' Trainer: max_grad_norm=0) to leave it to the configuration."
    ]


@pytest.mark.parametrize(
    ("config", "arguments", "silent"),
    [
        (ClipByNorm(max_norm=1.0), (1.0,), True),
        (ClipByNorm(max_norm=1.0, norm_type=1.0), (1.0, 1), True),
        (ClipByNorm(max_norm=1.0), (1.0, math.inf), False),
        (ClipByNorm(max_norm=2.0), (1.0,), False),
        (ClipByNorm(max_norm=1.0, scope="parameter"), (1.0,), False),
        ([ClipByNorm(max_norm=1.0), ClipByValue(clip_value=1.0)], (1.0,), False),
    ],
)
def test_a_replaced_limit_is_said_only_if_it_differs(config, arguments, silent, caplog):
    accelerator, _, model, _ = prepared(config)
    accelerator.backward(model(batch()).square().mean())
    accelerator.clip_grad_norm_(model.parameters(), *arguments)
    assert (not caplog.records) == silent


def test_a_loop_that_never_clips_is_clipped_once_a_step(counted):
    accelerator, clip, model, opt = prepared(ClipByNorm(max_norm=0.3))
    for step in range(3):
        opt.zero_grad()
        accelerator.backward(model(batch(step)).square().mean())
        assert norm_of(grads_of(model)) > 0.3
        opt.step()
        assert norm_of(grads_of(model)) == pytest.approx(0.3, rel=1e-5)
    assert [bool(record.clipped) for record in counted] == [True] * 3
    assert clip.last_record is counted[-1]
    assert [type(clipper) for clipper in clip.clippers] == [GradientClipper]


def test_clip_grad_value_is_the_configuration_too_and_once(counted, caplog):
    accelerator, _, model, opt = prepared(ClipByNorm(max_norm=0.3))
    for _ in range(2):
        opt.zero_grad()
        accelerator.backward(model(batch()).square().mean())
        assert accelerator.clip_grad_value_(model.parameters(), 1e-4) is None
        accelerator.clip_grad_norm_(model.parameters(), 0.3)
        assert norm_of(grads_of(model)) == pytest.approx(0.3, rel=1e-5)
        opt.step()
    assert len(counted) == 2
    assert messages(caplog) == [
        "accelerator.clip_grad_value_ was called with clip_value=0.0001; the gradclip "
        "configuration decides instead: norm(max_norm=0.3)."
    ]


def test_accumulation_clips_with_the_step_and_not_before(counted):
    accelerator, _, model, opt = prepared(ClipByNorm(max_norm=0.01), gradient_accumulation_steps=4)
    data = accelerator.prepare(DataLoader(TensorDataset(batch(size=10)), batch_size=1))
    start = [p.detach().clone() for p in model.parameters()]
    changes = 0
    for (inputs,) in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).square().mean())
            raw = grads_of(model)
            norm = accelerator.clip_grad_norm_(model.parameters(), 0.01)
            assert float(norm) == pytest.approx(norm_of(raw), rel=1e-6)
            if not accelerator.sync_gradients:
                assert all(map(torch.equal, raw, grads_of(model)))
            opt.step()
            opt.zero_grad()
        now = [p.detach().clone() for p in model.parameters()]
        changes += not all(map(torch.equal, now, start))
        start = now
    assert changes == 3
    assert len(counted) == 3


def test_abandoned_steps_and_other_backwards_keep_it_at_once_a_step(counted):
    accelerator, _, model, opt = prepared(ClipByNorm(max_norm=0.3))
    accelerator.backward(model(batch(0)).square().mean())
    accelerator.clip_grad_norm_(model.parameters(), 0.3)
    opt.zero_grad()
    accelerator.backward(model(batch(1)).square().mean())
    opt.step()
    assert norm_of(grads_of(model)) == pytest.approx(0.3, rel=1e-5)
    assert len(counted) == 2

    opt.zero_grad()
    accelerator.backward(model(batch(2)).square().mean())
    accelerator.clip_grad_norm_(model.parameters(), 0.3)
    for parameter in model.parameters():
        parameter.grad.add_(1.0)
    opt.step()
    assert norm_of(grads_of(model)) > 1
    assert len(counted) == 3


def test_without_accelerator_backward_each_step_is_clipped(counted):
    _, _, model, opt = prepared(ClipByNorm(max_norm=0.3))
    for step in range(2):
        opt.zero_grad()
        model(batch(step)).square().mean().backward()
        opt.step()
        assert norm_of(grads_of(model)) == pytest.approx(0.3, rel=1e-5)
    assert len(counted) == 2


def test_without_accelerator_backward_each_call_clips(counted):
    accelerator, _, model, opt = prepared(ClipByNorm(max_norm=0.3))
    for _ in range(2):
        opt.zero_grad()
        model(batch()).square().mean().backward()
        accelerator.clip_grad_norm_(model.parameters(), 0.3)
        assert norm_of(grads_of(model)) == pytest.approx(0.3, rel=1e-5)
    opt.step()
    assert len(counted) == 2


def test_each_optimizer_has_its_own_clipper(counted):
    accelerator = Accelerator(cpu=True)
    clip = accelerate_clip.enable(accelerator, ClipByNorm(max_norm=0.3))
    first, second = net(0), net(1)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (first, second)]
    first, second, *opts = accelerator.prepare(first, second, *opts)
    assert len(clip.clippers) == 2

    accelerator.backward(first(batch()).square().mean())
    norm = accelerator.clip_grad_norm_(first.parameters(), 0.3)
    accelerator.backward(second(batch()).square().mean())
    untouched = grads_of(second)
    assert len(counted) == 1
    assert norm == counted[0].grad_norm
    opts[0].step()
    assert len(counted) == 1
    assert all(map(torch.equal, untouched, grads_of(second)))
    opts[1].step()
    assert len(counted) == 2
    assert norm_of(grads_of(second)) == pytest.approx(0.3, rel=1e-5)

    for opt in opts:
        opt.zero_grad()
    accelerator.backward(first(batch()).square().mean() + second(batch()).square().mean())
    expected = norm_of(grads_of(first) + grads_of(second))
    both = accelerator.clip_grad_norm_([*first.parameters(), *second.parameters()], 0.3)
    assert float(both) == pytest.approx(expected, rel=1e-6)


def test_parameters_of_several_models_keep_their_own_names():
    accelerator = Accelerator(cpu=True)
    config = ClipConfig(policies=[ClipByNorm(max_norm=9.0)], log=LogConfig(per_parameter=True))
    clip = accelerate_clip.enable(accelerator, config)
    first, second = nn.Linear(4, 1), nn.Linear(4, 1)
    opt = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    first, second, opt = accelerator.prepare(first, second, opt)
    accelerator.backward((first(batch()) + second(batch())).sum())
    opt.step()
    assert list(clip.last_record.per_parameter) == [
        "model0.weight",
        "model0.bias",
        "model1.weight",
        "model1.bias",
    ]


def test_names_are_the_models_own_and_groups_match_them():
    config = ClipConfig(
        policies=[ClipByNorm(max_norm=9.0)],
        groups=[GroupConfig(match="2.*", policies=[])],
        log=LogConfig(per_parameter=True),
    )
    accelerator, clip, model, opt = prepared(config)
    accelerator.backward(model(batch()).sum())
    opt.step()
    assert set(clip.last_record.per_parameter) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_raise_stops_with_the_gradients_as_they_were():
    config = ClipConfig(policies=[ClipByNorm(max_norm=0.3)], on_nonfinite="raise")
    accelerator, _, model, _ = prepared(config)
    accelerator.backward(model(batch()).square().mean())
    model[0].weight.grad[0, 0] = math.inf
    raw = grads_of(model)
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        accelerator.clip_grad_norm_(model.parameters(), 0.3)
    assert all(map(torch.equal, raw, grads_of(model)))


def test_free_memory_lets_go_of_the_old_optimizers(counted):
    accelerator, clip, model, opt = prepared(ClipByNorm(max_norm=0.3))
    old = clip.clippers[0]
    accelerator.free_memory()
    new = net(1)
    new, new_opt = accelerator.prepare(new, torch.optim.SGD(new.parameters(), lr=0.1))
    assert len(clip.clippers) == 1
    assert clip.clippers[0] is not old
    accelerator.backward(model(batch()).square().mean())
    opt.step()
    assert not counted
    accelerator.backward(new(batch()).square().mean())
    new_opt.step()
    assert len(counted) == 1


def test_added_parameter_groups_are_clipped_too():
    accelerator, _, model, opt = prepared(ClipByNorm(max_norm=0.3))
    extra = nn.Linear(4, 1)
    opt.add_param_group({"params": list(extra.parameters())})
    accelerator.backward((model(batch()) + extra(batch())).square().mean())
    accelerator.clip_grad_norm_(extra.parameters(), 0.3)
    assert norm_of(grads_of(model) + grads_of(extra)) == pytest.approx(0.3, rel=1e-5)


def test_a_schedule_made_from_the_prepared_optimizer_binds_its_step_anew():
    """As transformers' Trainer makes one."""
    _, clip, model, opt = prepared(ClipByNorm(max_norm=0.3))
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    (model(batch()) * 9).square().mean().backward()
    opt.step()
    schedule.step()
    assert float(clip.last_record.clipped_norm) == pytest.approx(0.3, rel=1e-5)
    assert opt.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("first", [True, False], ids=["before enable", "after enable"])
def test_a_clip_that_others_put_on_the_class_never_decides(first, monkeypatch):
    """As axolotl does with expert parallelism."""

    def others(*_, **__):
        raise AssertionError

    if first:
        monkeypatch.setattr(Accelerator, "clip_grad_norm_", others)
    accelerator = Accelerator(cpu=True)
    accelerate_clip.enable(accelerator, ClipByNorm(max_norm=0.25))
    if not first:
        monkeypatch.setattr(Accelerator, "clip_grad_norm_", others)
    net = torch.nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.0))
    accelerator.backward(model(torch.full((2, 4), 9.0)).sum())
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert float(norm) == pytest.approx(0.25, rel=1e-5)
