"""The drop-ins against torch's own functions."""

import math
from itertools import product

import pytest
import torch
from support.gradients import assert_same_grads, fill, grads, parameters
from torch import nn

import gradclip

ORDERS = [1.0, 2.0, 3.0, math.inf]


def pair(seed=0, size=3.0, dtype=torch.float32):
    ours, theirs = parameters(dtype), parameters(dtype)
    fill(ours, seed, size)
    fill(theirs, seed, size)
    return ours, theirs


def test_clip_grad_norm(subtests):
    for p, limit in product(ORDERS, (0.0, 0.5, 2, 1e6)):
        with subtests.test(f"{p=}, {limit=}"):
            ours, theirs = pair()
            got = gradclip.clip_grad_norm_(ours.values(), limit, p)
            want = nn.utils.clip_grad_norm_(theirs.values(), limit, p)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
            torch.testing.assert_close(grads(ours), grads(theirs), rtol=1e-5, atol=1e-7)


def test_foreach_is_accepted_and_changes_nothing():
    found = []
    for foreach in (None, True, False):
        ours, _ = pair()
        gradclip.clip_grad_norm_(ours.values(), 0.5, foreach=foreach)
        gradclip.clip_grad_value_(ours.values(), 0.1, foreach=foreach)
        norm = gradclip.get_total_norm([p.grad for p in ours.values()], foreach=foreach)
        found.append(grads(ours) | {"norm": norm})
    assert_same_grads(found[0], found[1])
    assert_same_grads(found[0], found[2])


def test_the_formula_is_torchs_also_just_below_the_limit():
    ours, theirs = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    ours.grad, theirs.grad = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])
    gradclip.clip_grad_norm_(ours, 5.0)
    nn.utils.clip_grad_norm_(theirs, 5.0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1.2e-7, atol=0)
    assert (ours.grad < torch.tensor([3.0, 4.0])).all()


def test_nonfinite_gradients_are_scaled_as_torch_scales_them(subtests):
    for bad in (math.nan, math.inf):
        with subtests.test(f"{bad=}"):
            ours, theirs = pair()
            for params in (ours, theirs):
                params["layer.bias"].grad[0] = bad
            got = gradclip.clip_grad_norm_(ours.values(), 1.0)
            want = nn.utils.clip_grad_norm_(theirs.values(), 1.0)
            torch.testing.assert_close(got, want, equal_nan=True)
            torch.testing.assert_close(grads(ours), grads(theirs), equal_nan=True)


def test_error_if_nonfinite_comes_before_any_write():
    for bad in (math.nan, math.inf):
        ours, _ = pair()
        ours["scale"].grad.fill_(bad)
        before = grads(ours)
        with pytest.raises(RuntimeError, match=r"total norm of order 2\.0 for gradients is"):
            gradclip.clip_grad_norm_(ours.values(), 1.0, error_if_nonfinite=True)
        torch.testing.assert_close(grads(ours), before, rtol=0, atol=0, equal_nan=True)


def test_containers():
    ours, theirs = pair()
    assert gradclip.clip_grad_norm_([], 1.0) == nn.utils.clip_grad_norm_([], 1.0) == 0
    assert gradclip.get_total_norm([]) == 0
    single = gradclip.clip_grad_norm_(ours["embed.weight"], 1.0)
    torch.testing.assert_close(single, nn.utils.clip_grad_norm_(theirs["embed.weight"], 1.0))
    generated = gradclip.clip_grad_norm_((p for p in ours.values()), 1.0)
    torch.testing.assert_close(generated, nn.utils.clip_grad_norm_(theirs.values(), 1.0))
    torch.testing.assert_close(ours["scale"].grad, theirs["scale"].grad)
    ours["scale"].grad = None
    assert gradclip.clip_grad_norm_(ours["scale"], 1.0) == 0


def test_get_total_norm():
    tensors = [torch.randn(3, 4), torch.randn(()), torch.randn(0, 2), torch.randn(5000)]
    for p in ORDERS:
        got = gradclip.get_total_norm(tensors, p)
        full = [t for t in tensors if t.numel()] if p == math.inf else tensors
        want = nn.utils.get_total_norm(full, p)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0, msg=f"{p=}: {got} for {want}")
        assert got.dtype == torch.float32


def test_mixed_dtypes():
    tensors = [torch.randn(3).to(d) for d in (torch.float16, torch.bfloat16, torch.float32)]
    exact = torch.cat([t.double() for t in tensors]).norm()
    got = gradclip.get_total_norm(tensors)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)
    double = gradclip.get_total_norm([*tensors, torch.randn(3, dtype=torch.float64)])
    assert double.dtype == torch.float64


def test_clip_grad_value():
    ours, theirs = pair()
    gradclip.clip_grad_value_(ours.values(), 0.4)
    nn.utils.clip_grad_value_(theirs.values(), 0.4)
    assert_same_grads(grads(ours), grads(theirs))
    gradclip.clip_grad_value_([], 0.4)


def test_infinite_limit_only_measures():
    ours, _ = pair()
    ours["scale"].grad.fill_(math.inf)
    before = grads(ours)
    assert gradclip.clip_grad_norm_(ours.values(), math.inf) == math.inf
    assert_same_grads(grads(ours), before)


def test_limits_that_would_flip_or_erase_are_refused():
    ours, _ = pair()
    for wrong in (-1.0, math.nan):
        for clip in (gradclip.clip_grad_norm_, gradclip.clip_grad_value_):
            with pytest.raises(ValueError, match="it must be 0 or more"):
                clip(ours.values(), wrong)
    for p in (-1.0, 0.0):
        with pytest.raises(ValueError, match="it must be above 0"):
            gradclip.clip_grad_norm_(ours.values(), 1.0, norm_type=p)
