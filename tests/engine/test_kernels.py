"""Each kernel against float64, where float32 sums, half precision and squares go wrong."""

import math
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip import get_total_norm
from gradclip.kernels import kernel_for
from gradclip.kernels.split import SplitKernel

CPU = torch.device("cpu")
FAST = ["cpu", "accelerator", "single"]
RTOL = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-12}


def awkward(dtype):
    """Slots with large, small, empty, scalar, strided, channels-last and no tensors at all."""
    make = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=make).to(dtype)  # noqa: E731
    return [
        [normal(37, 19), normal(601, 700), normal(5)],
        [normal()],
        [],
        [torch.zeros(3, dtype=dtype)],
        [normal(4, 6, 5, 5).to(memory_format=torch.channels_last), normal(80, 90)[:, ::2]],
        [normal(200, 301).t(), normal(7, 8).t()],
    ]


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_power_sums(kernel, dtype):
    grads = awkward(dtype)
    for p in (0.5, 1.0, 1.5, 2.0, 3.0, 6.0):
        got = kernel_for([CPU], kernel).power_sums(grads, p)
        want = kernel_for([CPU], "reference").power_sums(grads, p)
        torch.testing.assert_close(got, want, rtol=RTOL[dtype], atol=0)


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_peaks_scale_and_clamp(kernel, dtype):
    fast, reference = kernel_for([CPU], kernel), kernel_for([CPU], "reference")
    ours, exact = awkward(dtype), awkward(dtype)
    assert torch.equal(fast.peaks(ours), reference.peaks(exact))
    coef = torch.tensor([0.3, 0.7, 0.5, 1.0, 0.123456789, 1e-3], dtype=torch.float64)
    fast.scale_(ours, coef)
    reference.scale_(exact, coef)
    for got, want in zip(chain(*ours), chain(*exact), strict=True):
        torch.testing.assert_close(got, want)
    fast.clamp_(ours[0], 0.1)
    reference.clamp_(exact[0], 0.1)
    for got, want in zip(ours[0], exact[0], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scaling_rounds_once(kernel, dtype):
    coef = 0.7001953
    values = torch.randn(5000).to(dtype)
    expected = (values.double() * coef).to(dtype)
    several = [values.clone(), values.clone()]
    kernel_for([CPU], kernel).scale_([several], torch.tensor([coef], dtype=torch.float64))
    for scaled in several:
        off = (scaled.double() - expected.double()).abs() / expected.double().abs()
        assert off.max() <= torch.finfo(dtype).eps
        if dtype is not torch.float32:
            assert (scaled == expected).float().mean() > 0.999


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_element_shows_in_its_slot_alone(kernel, bad):
    grads = [[torch.ones(10), torch.ones(6000)], [torch.ones(4)]]
    grads[0][1][5000] = bad
    assert torch.isfinite(kernel_for([CPU], kernel).peaks(grads)).tolist() == [False, True]
    for p in (1.0, 2.0, 3.0):
        sums = kernel_for([CPU], kernel).power_sums(grads, p)
        assert torch.isfinite(sums).tolist() == [False, True]
        assert math.isnan(sums[0]) == math.isnan(bad)


@pytest.mark.parametrize("value", [1e25, 3e38, 1e-30, 1e-42])
@pytest.mark.parametrize("kernel", FAST)
def test_squares_outside_float32(value, kernel):
    grad = torch.full((1000,), value)
    sums = kernel_for([CPU], kernel).power_sums([[grad]], 2.0)
    exact = float(grad[0].double()) ** 2 * 1000
    assert float(sums) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("p", [2.0, 7.0, 60.0])
@pytest.mark.parametrize("value", [1e300, 1e-300, 1.0])
def test_float64_and_high_orders_stay_in_range(value, p):
    grads = [torch.full((8,), value, dtype=torch.float64), torch.zeros(3)]
    assert float(get_total_norm(grads, p)) == pytest.approx(value * 8 ** (1 / p), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "constant"])
def test_a_hundred_million_elements(dtype, kind):
    count = 10**8
    if kind == "normal":
        tensor = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    else:
        tensor = torch.full((count,), 1e-3, dtype=dtype)
    exact = math.sqrt(sum(float(b.double().square().sum()) for b in tensor.split(1 << 22)))
    assert float(get_total_norm([tensor])) == pytest.approx(exact, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=12),
    cut=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_any_cut_of_the_same_values_gives_the_same_sum(sizes, cut, seed):
    make = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=make) for size in sizes]
    whole = kernel_for([CPU]).power_sums([tensors], 2.0).sum()
    parts = kernel_for([CPU]).power_sums([tensors[:cut], tensors[cut:]], 2.0).sum()
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)


def test_gradients_on_several_devices_are_combined():
    cpu = kernel_for([CPU])
    split = SplitKernel({CPU: cpu, torch.device("meta"): cpu})
    grads = awkward(torch.float32)
    torch.testing.assert_close(split.power_sums(grads, 2.0), cpu.power_sums(grads, 2.0))
    assert torch.equal(split.peaks(grads), cpu.peaks(grads))
