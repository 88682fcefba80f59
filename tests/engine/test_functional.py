"""The drop-ins against torch's own functions."""

import math

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


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("limit", [0.0, 0.5, 2, 1e6])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_clip_grad_norm(p, limit, foreach):
    ours, theirs = pair()
    got = gradclip.clip_grad_norm_(ours.values(), limit, p, foreach=foreach)
    want = nn.utils.clip_grad_norm_(theirs.values(), limit, p, foreach=foreach)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for name, grad in grads(ours).items():
        torch.testing.assert_close(grad, theirs[name].grad, rtol=1e-5, atol=1e-7)


def test_the_formula_is_torchs_also_just_below_the_limit():
    ours, theirs = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    ours.grad, theirs.grad = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])
    gradclip.clip_grad_norm_(ours, 5.0)
    nn.utils.clip_grad_norm_(theirs, 5.0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1.2e-7, atol=0)
    assert (ours.grad < torch.tensor([3.0, 4.0])).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_gradients(bad):
    ours, theirs = pair()
    for params in (ours, theirs):
        params["layer.bias"].grad[0] = bad
    got = gradclip.clip_grad_norm_(ours.values(), 1.0)
    want = nn.utils.clip_grad_norm_(theirs.values(), 1.0)
    torch.testing.assert_close(got, want, equal_nan=True)
    for name, grad in grads(ours).items():
        torch.testing.assert_close(grad, theirs[name].grad, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_error_if_nonfinite_comes_before_any_write(bad):
    ours, _ = pair()
    ours["scale"].grad.fill_(bad)
    before = grads(ours)
    with pytest.raises(RuntimeError, match=r"total norm of order 2\.0 for gradients is"):
        gradclip.clip_grad_norm_(ours.values(), 1.0, error_if_nonfinite=True)
    for name, grad in grads(ours).items():
        torch.testing.assert_close(grad, before[name], rtol=0, atol=0, equal_nan=True)


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


@pytest.mark.parametrize("p", ORDERS)
def test_get_total_norm(p):
    tensors = [torch.randn(3, 4), torch.randn(()), torch.randn(0, 2), torch.randn(5000)]
    got = gradclip.get_total_norm(tensors, p)
    full = [t for t in tensors if t.numel()] if p == math.inf else tensors
    torch.testing.assert_close(got, nn.utils.get_total_norm(full, p), rtol=1e-5, atol=0)
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


@pytest.mark.parametrize("limit", [-1.0, math.nan])
def test_limits_that_would_flip_or_erase_are_refused(limit):
    ours, _ = pair()
    with pytest.raises(ValueError, match="it must be 0 or more"):
        gradclip.clip_grad_norm_(ours.values(), limit)
    with pytest.raises(ValueError, match="it must be 0 or more"):
        gradclip.clip_grad_value_(ours.values(), limit)
    with pytest.raises(ValueError, match="it must be above 0"):
        gradclip.clip_grad_norm_(ours.values(), 1.0, norm_type=limit if limit < 0 else 0)
