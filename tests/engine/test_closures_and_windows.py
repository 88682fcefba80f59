"""Closures that are evaluated several times, and windows that are cut short."""

import functools
import math

import pytest
import torch
from support.gradients import flat, small_model
from torch.optim import LBFGS

from gradclip import (
    AGC,
    AdaGC,
    AutoClip,
    ClipByNorm,
    ClipByRMS,
    ClipByValue,
    ConfigError,
    EmaClip,
    GradientClipper,
    Schedule,
    SkipLarge,
    UClip,
    ZClip,
)

LIMIT = 0.05


@pytest.mark.parametrize(
    ("search", "debug"), [(None, False), ("strong_wolfe", False), (None, True)]
)
def test_an_lbfgs_step_is_counted_once_and_clipped_at_every_evaluation(search, debug):
    model = small_model()
    optimizer = LBFGS(model.parameters(), lr=1e-4, max_iter=5, line_search_fn=search)
    policies = [ZClip(warmup_steps=2, max_norm=None), ClipByNorm(max_norm=LIMIT)]
    config = {"policies": policies, "debug": debug}
    clipper = GradientClipper(config, model.named_parameters(), optimizer)
    clipper.attach(optimizer)
    evaluations, records = [], []

    def closure():
        if evaluations:  # what the one before it left
            records.append(clipper.last_record)
            assert float(flat_grad(model).norm()) <= LIMIT * (1 + 1e-5)
        optimizer.zero_grad()
        loss = model(torch.ones(8, 4)).square().mean()
        loss.backward()
        evaluations.append(float(loss.detach()))
        return loss

    for step in range(1, 4):
        evaluations.clear()
        records.clear()
        optimizer.step(closure)
        assert len(evaluations) > 1
        assert all(record is records[0] for record in records)
        state = clipper.state_dict()
        assert state["counts"]["steps"] == state["counts"]["taken"] == step


def flat_grad(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def test_a_further_evaluation_is_held_to_the_limit_of_the_first():
    model = small_model()
    policy = EmaClip(factor=2.0, decay=0.5, warmup_steps=2)
    clipper = GradientClipper(policy, model.named_parameters())
    for _ in range(4):
        gradients(model, 1.0)
        clipper.clip()
    gradients(model, 100.0)
    first = clipper.clip()
    state = clipper.state_dict()["policies"][0]["state"]
    gradients(model, 100.0)
    assert clipper.clip(repeat=True) is first
    assert float(flat_grad(model).norm()) == pytest.approx(float(first.limit), rel=1e-5)
    after = clipper.state_dict()["policies"][0]["state"]
    assert all(torch.equal(after[name], value) for name, value in state.items())


def test_a_withheld_first_evaluation_leaves_lbfgs_where_it_was():
    model = small_model()
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=5)
    clipper = GradientClipper(ClipByNorm(max_norm=LIMIT), model.named_parameters(), optimizer)
    clipper.attach(optimizer)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = model(torch.full((8, 4), torch.nan)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert clipper.last_record.skipped
    assert all(map(torch.equal, before, model.parameters()))


def gradients(model, norm):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    scale = norm / float(flat_grad(model).norm())
    for p in model.parameters():
        p.grad.mul_(scale)


def windows(shares, *, tell=True):
    """The state of a clipper after windows whose gradients are as large as their share."""
    model = small_model()
    clipper = GradientClipper(ZClip(warmup_steps=5, max_norm=None), model.named_parameters())
    for share in shares:
        gradients(model, 2.0 * share)
        clipper.clip(share=share if tell else 1.0)
    return clipper.state_dict()


def test_a_short_window_leaves_statistics_as_a_full_one_would():
    short = [1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.25, 1.0, 1.0, 1.0, 0.5]
    wanted, found, unaware = (
        state["policies"][0]["state"]
        for state in (windows([1.0] * 12), windows(short), windows(short, tell=False))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert any(not torch.allclose(unaware[name], value) for name, value in wanted.items())


def test_a_spike_in_a_short_window_is_held_to_its_share_of_the_limit():
    state = windows([1.0] * 10)
    model = small_model()
    clipper = GradientClipper(ZClip(warmup_steps=5, max_norm=None), model.named_parameters())
    clipper.load_state_dict(state)
    gradients(model, 100.0)
    full = clipper.clip()
    clipper.load_state_dict(state)
    gradients(model, 50.0)
    half = clipper.clip(share=0.5)
    assert float(half.grad_norm) == pytest.approx(50.0)
    assert float(half.limit) == pytest.approx(float(full.limit) / 2, rel=1e-5)
    assert float(flat_grad(model).norm()) == pytest.approx(float(half.limit), rel=1e-4)


STEADY = Schedule(schedule="linear", start=LIMIT, end=LIMIT, steps=9)
ELEMENT = LIMIT / 7  # of 49 equal elements
LARGE, SMALL = 10 * LIMIT, 0.1 * LIMIT
SOON = {"scope": "global", "warmup_steps": 3}
FIXED = {  # each number that is a norm of gradients, and the norm of full windows before
    "norm": (ClipByNorm(max_norm=LIMIT), None),
    "norm, schedule": (ClipByNorm(max_norm=STEADY), LARGE),
    "norm, budget": (ClipByNorm(max_norm=LIMIT, scope="parameter", budget="size"), LARGE),
    "rms": (ClipByRMS(max_rms=ELEMENT, scope="global"), LARGE),
    "value": (ClipByValue(clip_value=ELEMENT), LARGE),
    "uclip": (UClip(limit=LIMIT, kind="norm"), None),
    "agc, ceiling": (AGC(clip_factor=1e9, scope="global", max_norm=LIMIT), LARGE),
    "agc, floor": (AGC(clip_factor=1e-9, scope="global", min_norm=LIMIT), LARGE),
    "autoclip, warm-up": (AutoClip(max_norm=LIMIT), LARGE),
    "autoclip, ceiling": (AutoClip(**SOON, max_norm=LIMIT), LARGE),
    "autoclip, floor": (AutoClip(**SOON, min_norm=LIMIT), SMALL),
    "zclip, warm-up": (ZClip(max_norm=LIMIT), LARGE),
    "zclip, ceiling": (ZClip(**SOON, max_norm=STEADY), LARGE),
    "zclip, floor": (ZClip(**SOON, max_norm=None, min_norm=LIMIT), SMALL),
    "ema, warm-up": (EmaClip(max_norm=LIMIT), LARGE),
    "ema, ceiling": (EmaClip(**SOON, max_norm=LIMIT), LARGE),
    "ema, floor": (EmaClip(**SOON, min_norm=STEADY), SMALL),
    "adagc, warm-up": (AdaGC(warmup_norm=LIMIT), LARGE),
    "adagc, ceiling": (AdaGC(**SOON, warmup_norm=None, max_norm=LIMIT), LARGE),
    "adagc, floor": (AdaGC(**SOON, min_norm=LIMIT), SMALL),
    "skip_large": (SkipLarge(limit=LIMIT), SMALL),
    "skip_large, schedule": (SkipLarge(limit=STEADY), LARGE),
}


@pytest.mark.parametrize(("policy", "usual"), FIXED.values(), ids=FIXED.keys())
def test_a_fixed_limit_is_of_the_gradients_as_they_are(policy, usual):
    """In a short window too, whose norm is learnt as that of a full one."""
    model = small_model()
    clipper = GradientClipper(policy, model.named_parameters())
    for share in () if usual is None else (1.0, 0.5, 1.0, 0.25, 1.0, 1.0):
        gradients(model, usual * share)
        clipper.clip(share=share)
    gradients(model, 0.75 * LIMIT)
    before = flat_grad(model)
    record = clipper.clip(share=0.5)
    assert not record.clipped
    assert not record.skipped
    assert torch.equal(flat_grad(model), before)
    gradients(model, 1.5 * LIMIT)
    record = clipper.clip(share=0.5)
    assert bool(record.skipped) == policy.withholds
    if not policy.withholds:
        assert float(flat_grad(model).norm()) == pytest.approx(LIMIT, rel=1e-4)


def test_what_is_no_share_is_refused_before_anything_is_written():
    model = small_model()
    clipper = GradientClipper(ClipByNorm(max_norm=1.0), model.named_parameters())
    gradients(model, 1.5)
    before = flat(dict(model.named_parameters()))
    for share in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=f"share is {share}"):
            clipper.clip(share=share)
    assert torch.equal(flat(dict(model.named_parameters())), before)


@pytest.mark.parametrize("kernel", ["cpu", "accelerator"])
def test_a_later_evaluation_that_is_not_finite_joins_the_record_of_its_step(kernel):
    """Its gradients are dropped, and the step leaves no trace in adaptive state."""
    model = small_model()
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=4)
    policy = ZClip(warmup_steps=2, max_norm=None)
    clipper = GradientClipper(policy, model.named_parameters(), optimizer, kernel=kernel)
    clipper.attach(optimizer)
    evaluations = []

    def closure(spoilt):
        optimizer.zero_grad()
        loss = model(torch.ones(8, 4)).square().mean()
        evaluations.append(loss)
        (loss * (math.nan if spoilt and len(evaluations) > 1 else 1.0)).backward()
        return loss

    for spoilt, withheld in ((False, 0), (True, 1), (False, 1)):
        evaluations.clear()
        before = clipper.state_dict()["policies"][0]["state"]
        optimizer.step(functools.partial(closure, spoilt))
        record, counts = clipper.last_record, clipper.state_dict()["counts"]
        assert len(evaluations) > 1
        assert bool(record.skipped) == spoilt
        assert bool(record.finite) == (not spoilt)
        assert (counts["skipped"], counts["nonfinite"]) == (withheld, withheld)
        after = clipper.state_dict()["policies"][0]["state"]
        assert all(torch.equal(after[key], before[key]) for key in before) == spoilt
    assert (counts["steps"], counts["taken"]) == (3, 2)
