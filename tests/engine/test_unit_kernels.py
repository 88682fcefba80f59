"""Every kernel measures and scales units as the formulas say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip.kernels import kernel_for
from gradclip.types import Units, UnitSpan

CPU = torch.device("cpu")
KERNELS = [kernel_for([CPU], name) for name in ("cpu", "accelerator", "single", "reference")]
names = ["cpu", "accelerator", "single", "reference"]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=names)

# Shape and unit dims: rows, one unit, columns, a conv's filters, optax's rank 3, elements.
CASES = [
    ((40, 700), (0, 1)),
    ((5,), (0, 0)),
    ((), (0, 0)),
    ((300, 90), (1, 2)),
    ((6, 3, 2, 2), (0, 1)),
    ((4, 3, 5), (1, 3)),
    ((7,), (0, 1)),
    ((2, 9000), (0, 1)),
    ((3, 30, 210), (1, 2)),
]


def units_of(dtype=torch.float32, gap=2, size=1.0):
    """Random tensors with units of other ranks between them."""
    generator = torch.Generator().manual_seed(0)
    tensors, spans, at = [], [], 0
    for shape, dims in CASES:
        at += gap
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * size
        count = math.prod(shape[dims[0] : dims[1]])
        tensors.append(value.to(dtype))
        spans.append(UnitSpan(dims, at, count, value.numel() // count))
        at += count
    return Units(tensors, spans, at + gap, CPU)


def expected(units, measure):
    found = torch.zeros(units.count, dtype=torch.float64)
    for tensor, span in units:
        for index in range(span.units):
            found[span.start + index] = measure(unit(tensor, span, index).double())
    return found


def unit(tensor, span, index):
    """One unit, by plain indexing."""
    first, last = span.unit_dims
    at = torch.unravel_index(torch.tensor(index), tensor.shape[first:last])
    return tensor[(slice(None),) * first + tuple(int(i) for i in at)]


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms(kernel, dtype):
    units = units_of(dtype)
    for p in (1.0, 2.0, 3.0, math.inf):
        want = expected(units, lambda g, p=p: torch.linalg.vector_norm(g.reshape(-1), p))
        got = kernel.peaks(units) if p == math.inf else kernel.power_sums(units, p).pow(1 / p)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@every_kernel
@pytest.mark.parametrize("size", [1e-25, 1e25, 1e-40])
def test_squares_beyond_float32(kernel, size):
    units = units_of(size=size)
    want = expected(units, lambda g: torch.linalg.vector_norm(g.reshape(-1)))
    got = kernel.power_sums(units, 2.0).sqrt()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@every_kernel
def test_a_scale_for_each_unit(kernel):
    units = units_of(torch.float64, size=1e200)
    scale = torch.linspace(0.5e-200, 1e-200, units.count, dtype=torch.float64)
    norms = expected(units, lambda g: torch.linalg.vector_norm(g.reshape(-1) * 1e-200))
    got = kernel.power_sums(units, 2.0, scale)
    torch.testing.assert_close(got, (norms * (scale * 1e200)).square(), rtol=1e-12, atol=0)


@every_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_element_shows_in_its_unit_alone(kernel, bad):
    units = units_of()
    big = units.tensors[0]
    big[3, 5] = bad
    for found in (kernel.power_sums(units, 2.0), kernel.peaks(units)):
        finite = torch.isfinite(found)
        assert not finite[units.spans[0].start + 3]
        assert finite.sum() == units.count - 1


@every_kernel
def test_rows_of_zeros_are_zero(kernel):
    units = units_of()
    units.tensors[0][1:30].zero_()
    found = kernel.power_sums(units, 2.0)
    start = units.spans[0].start
    assert (found[start + 1 : start + 30] == 0).all()
    assert (found[start + 30 : start + 40] > 0).all()


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scaling(kernel, dtype):
    units = units_of(dtype)
    before = [tensor.clone() for tensor in units.tensors]
    coef = torch.linspace(0.1, 0.9, units.count, dtype=torch.float64)
    first = units.spans[0]
    coef[first.start : first.start + first.units] = 1.0
    kernel.scale_(units, coef)
    assert torch.equal(units.tensors[0], before[0])
    for (tensor, span), old in zip(units, before, strict=True):
        for index in range(span.units):
            was = unit(old, span, index)
            want = (was.double() * coef[span.start + index]).to(dtype)
            rtol = 8e-3 if dtype == torch.bfloat16 else 2e-7
            torch.testing.assert_close(unit(tensor, span, index), want, rtol=rtol, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=4),
    data=st.data(),
    p=st.sampled_from([1.0, 2.0, 2.5, math.inf]),
)
def test_any_shape_and_any_dims(shape, data, p):
    first = data.draw(st.integers(0, len(shape)))
    last = data.draw(st.integers(first, len(shape))) if first < len(shape) else first
    dims = (first, last) if last > first else (0, 0)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    count = math.prod(tensor.shape[dims[0] : dims[1]])
    units = Units([tensor], [UnitSpan(dims, 0, count, tensor.numel() // count)], count, CPU)
    want = expected(units, lambda g: torch.linalg.vector_norm(g.reshape(-1), p))
    for kernel in KERNELS:
        got = kernel.peaks(units) if p == math.inf else kernel.power_sums(units, p).pow(1 / p)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)
