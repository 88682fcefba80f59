"""The gradient noise scale: recorded sequence, formulas, known noise, and what leaves no trace."""

import io
import math

import numpy as np
import pytest
import torch
from support.vectors import cases, load
from torch._subclasses.fake_tensor import FakeTensorMode

from gradclip import (
    ClipByNorm,
    ClipConfig,
    ConfigError,
    GradientClipper,
    LayoutError,
    NoiseScale,
)

SIZES = {"small_batch": 4, "large_batch": 16}


class Oracle:
    """Written from the formulas, in plain float64."""

    def __init__(self, small, large, decay):
        self.small, self.large, self.decay = small, large, decay
        self.gradient_sq = self.variance = 0.0
        self.product = 1.0

    def step(self, micro):
        """Per-micro-batch gradients, of shape (B / b, elements)."""
        b, big, beta = self.small, self.large, self.decay
        small_sq = np.mean([g @ g for g in micro])
        mean = np.mean(micro, axis=0)
        large_sq = mean @ mean
        gradient_sq = (big * large_sq - b * small_sq) / (big - b)
        variance = (small_sq - large_sq) / (1 / b - 1 / big)
        self.gradient_sq = beta * self.gradient_sq + (1 - beta) * gradient_sq
        self.variance = beta * self.variance + (1 - beta) * variance
        self.product *= beta

    @property
    def estimate(self):
        weight = 1 - self.product
        return self.gradient_sq / weight, self.variance / weight


def found(noise):
    return float(noise.gradient_sq), float(noise.variance)


def feed(parameter, micro, divided_by=1.0, scale=1.0):
    """Backward through losses whose gradients are these rows."""
    for row in micro:
        (parameter @ torch.tensor(row, dtype=parameter.dtype) / divided_by * scale).backward()


def rows(random, count=4, width=30, mean=0.3, spread=1.0):
    return random.normal(mean, spread, (count, width))


@pytest.mark.parametrize("case", cases("gradient_noise_scale"))
def test_the_recorded_sequence(case):
    inputs = load("gradient_noise_scale")["inputs"]
    given, expected = case["params"], case["outputs"]
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    noise = NoiseScale(
        [weight],
        small_batch=given["n_small"],
        large_batch=given["n_large"],
        decay=given["beta"],
    )
    each = given["n_large"] // given["n_small"]
    shown = 0
    squares = zip(inputs["sq_norm_small"], inputs["sq_norm_large"], strict=True)
    for step, (small_sq, large_sq) in enumerate(squares):
        feed(weight, [[math.sqrt(small_sq)]] * each)
        noise.update(torch.tensor(math.sqrt(large_sq) * each, dtype=torch.float64))
        state = noise.state_dict()
        assert float(state["gradient_sq"]) == pytest.approx(expected["ema_sq_norm"][step], rel=1e-9)
        assert float(state["noise"]) == pytest.approx(expected["ema_var"][step], rel=1e-9)
        raw = float(state["noise"] / state["gradient_sq"])
        assert raw == pytest.approx(expected["gns"][step], rel=1e-9)
        if 1 - given["beta"] ** (step + 1) > 0.1:
            want = expected["debiased_sq_norm"][step], expected["debiased_var"][step]
            assert found(noise) == pytest.approx(want, rel=1e-9)
            assert float(noise.scale) == pytest.approx(expected["gns"][step], rel=1e-9)
            shown += 1
        else:
            assert all(math.isnan(value) for value in noise.as_metrics().values())
    assert shown > 190 or given["beta"] > 0.999


def test_the_recorded_micro_batches_have_the_recorded_norms():
    inputs = load("gradient_noise_scale")["inputs"]
    weight = torch.nn.Parameter(torch.zeros(12, dtype=torch.float64))
    noise = NoiseScale([weight], small_batch=4, large_batch=32, decay=0.95)
    case = load("gradient_noise_scale")["cases"][1]
    assert case["params"]["beta"] == 0.95
    for step, micro in enumerate(inputs["micro_batch_grads"]):
        weight.grad = None
        feed(weight, micro)
        noise.update(weight.grad.norm())
        want = case["outputs"]["ema_var"][step]
        assert float(noise.state_dict()["noise"]) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("kernel", ["cpu", "accelerator", "reference"])
@pytest.mark.parametrize("divided_by", [1.0, 4.0])
def test_accumulated_clipped_and_scaled_is_the_formula(kernel, divided_by):
    """Losses divided or not, a loss scale that moves, records from before clipping."""
    random = np.random.default_rng(0)
    weight = torch.nn.Parameter(torch.zeros(30))
    other = torch.nn.Parameter(torch.zeros(()))
    frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    parameters = [weight, other, frozen]
    noise = NoiseScale(parameters, **SIZES, decay=0.9, loss_divided_by=divided_by, kernel=kernel)
    clipper = GradientClipper(ClipByNorm(max_norm=0.1), enumerated(parameters), kernel=kernel)
    oracle = Oracle(4, 16, 0.9)
    for step in range(300):
        micro = rows(random, width=31, spread=1.0 + step / 100)
        scale = 2.0 ** (step % 5)
        weight.grad = other.grad = None
        for row in torch.tensor(micro, dtype=torch.float32):
            ((weight @ row[:30] + other * row[30]) / divided_by * scale).backward()
        record = clipper.clip(grad_scale=torch.tensor(scale))
        assert record.clipped
        noise.update(record, grad_scale=torch.tensor(scale) if step % 2 else scale)
        oracle.step(micro.astype(np.float32).astype(np.float64))
        if step > 1:
            near = 1e-7 * oracle.estimate[1]  # |G|^2 is a small difference of such terms
            assert found(noise) == pytest.approx(oracle.estimate, rel=2e-6, abs=near)
    ratio = oracle.estimate[1] / oracle.estimate[0]
    assert float(noise.scale) == pytest.approx(ratio, rel=1e-4)


def enumerated(parameters):
    return [(f"p{i}", parameter) for i, parameter in enumerate(parameters)]


def test_it_finds_noise_that_is_known():
    """Quadratic loss |w - x|^2 / 2 with x ~ N(0, diag(s^2)): G = w, and S is the sum of s^2.

    With 2000 steps of 8 samples at decay 0.999 the standard error of S is below 1 % and that of
    |G|^2 about 1.5 %; the bands are some four of them.
    """
    generator = torch.Generator().manual_seed(3)
    spread = torch.linspace(0.2, 1.5, 20, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.full((20,), 0.4, dtype=torch.float64))
    noise = NoiseScale([weight], small_batch=2, large_batch=8, decay=0.999)
    for _ in range(2000):
        weight.grad = None
        for _ in range(4):
            samples = torch.randn(2, 20, generator=generator, dtype=torch.float64) * spread
            ((weight - samples).square().sum(1) / 2).mean().backward()
        noise.update(weight.grad.norm())
    gradient_sq, variance = 20 * 0.4**2, float(spread.square().sum())
    assert float(noise.variance) == pytest.approx(variance, rel=0.03)
    assert float(noise.gradient_sq) == pytest.approx(gradient_sq, rel=0.06)
    assert float(noise.scale) == pytest.approx(variance / gradient_sq, rel=0.08)


def short_run(spoil=None, steps=20):
    random = np.random.default_rng(5)
    weight = torch.nn.Parameter(torch.zeros(30))
    noise = NoiseScale([weight], **SIZES, decay=0.9)
    clipper = GradientClipper(ClipByNorm(max_norm=0.5), [("w", weight)])
    for step in range(steps):
        if step == 7 and spoil is not None:
            weight.grad = None
            spoil(weight, noise, clipper)
        weight.grad = None
        feed(weight, rows(random))
        noise.update(clipper.clip())
    return noise


def one_nan(weight, noise, clipper):
    feed(weight, [np.ones(30), np.full(30, math.nan), np.ones(30), np.ones(30)])
    record = clipper.clip()
    assert not record.finite
    noise.update(record)


def hidden_infinity(weight, noise, clipper):
    """Infinite in a micro-batch; the norm given is finite."""
    feed(weight, [np.ones(30), np.full(30, math.inf), np.ones(30), np.ones(30)])
    noise.update(torch.tensor(1.0))


def no_gradient(weight, noise, clipper):
    noise.update(torch.tensor(0.0))


def zeros(weight, noise, clipper):
    feed(weight, np.zeros((4, 30)))
    noise.update(clipper.clip())


def fewer(weight, noise, clipper):
    """The last step of an epoch has fewer micro-batches."""
    feed(weight, np.ones((3, 30)))
    noise.update(clipper.clip())


def withheld(weight, noise, clipper):
    config = ClipConfig(policies=[{"type": "skip_nonfinite"}], on_nonfinite="ignore")
    feed(weight, np.ones((4, 30)))
    weight.grad[0] = math.inf
    record = GradientClipper(config, [("w", weight)]).clip()
    assert record.skipped
    noise.update(record)


@pytest.mark.parametrize("spoil", [one_nan, hidden_infinity, no_gradient, zeros, fewer, withheld])
def test_what_is_no_observation_leaves_no_trace(spoil):
    clean, spoiled = short_run(), short_run(spoil)
    for name, value in clean.state_dict().items():
        assert torch.equal(spoiled.state_dict()[name], value), name
    assert math.isfinite(float(clean.scale))


def test_negative_signal_is_an_infinite_scale_and_recovers():
    weight = torch.nn.Parameter(torch.zeros(2))
    noise = NoiseScale([weight], small_batch=1, large_batch=2, decay=0.5)
    feed(weight, [[1.0, 0.0], [-1.0, 0.0]])
    noise.update(weight.grad.norm())
    assert float(noise.gradient_sq) < 0
    assert float(noise.scale) == math.inf
    for _ in range(12):
        weight.grad = None
        feed(weight, [[1.0, 0.5], [1.0, -0.5]])
        noise.update(weight.grad.norm())
    # |G|^2: A = 1.25, C = 1; (2 C - A) / 1 = 0.75. S = 0.25 / 0.5 = 0.5.
    assert float(noise.scale) == pytest.approx(0.5 / 0.75, rel=1e-2)


def test_state_goes_on_bitwise_even_with_another_batch_size():
    noise = short_run()
    buffer = io.BytesIO()
    torch.save(noise.state_dict(), buffer)
    buffer.seek(0)
    weight = torch.nn.Parameter(torch.zeros(30))
    again = NoiseScale([weight], small_batch=2, large_batch=6, decay=0.9)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for name, value in noise.as_metrics().items():
        assert torch.equal(again.as_metrics()[name], value)
    feed(weight, rows(np.random.default_rng(1), count=3))
    again.update(weight.grad.norm())
    assert float(again.variance) != float(noise.variance)


def test_removed_hooks_see_nothing():
    weight = torch.nn.Parameter(torch.zeros(30))
    noise = NoiseScale([weight], **SIZES)
    feed(weight, np.ones((2, 30)))
    noise.remove()
    assert not weight._backward_hooks
    feed(weight, np.ones((2, 30)))
    with pytest.raises(ConfigError, match=r"4 micro-batches a step on each of 1 ranks, .* saw 2"):
        noise.update(weight.grad.norm())


def test_parameters_used_twice_are_seen_once():
    weight = torch.nn.Parameter(torch.zeros(2))
    noise = NoiseScale([weight], small_batch=1, large_batch=2, decay=0.5)
    for row in torch.tensor([[1.0, 0.0], [0.0, 1.0]]):
        (weight @ row + 2 * (weight @ row)).backward()
    noise.update(weight.grad.norm())
    # A = 9, C = |(1.5, 1.5)|^2 = 4.5: |G|^2 = 0, S = 4.5 / 0.5.
    assert found(noise) == pytest.approx((0.0, 9.0), abs=1e-6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"small_batch": 8, "large_batch": 8}, "small_batch 8 and large_batch 8 on 1 ranks; all"),
        ({"small_batch": 8, "large_batch": 4}, "accumulate gradients over two"),
        ({"small_batch": 3, "large_batch": 8}, "a large_batch of 2, 3, ... times the small_batch"),
        ({"small_batch": 0, "large_batch": 8}, "small_batch 0"),
        ({**SIZES, "decay": 1.0}, "decay 1.0 .* allowed: .* a decay between 0 and 1"),
        ({**SIZES, "loss_divided_by": 0.0}, "loss_divided_by 0.0; allowed: .* finite divisor"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        NoiseScale([torch.nn.Parameter(torch.zeros(2))], **sizes)


def test_used_up_generators_and_other_norms_are_refused():
    with pytest.raises(ConfigError, match="got 0 parameters that need a gradient"):
        NoiseScale(iter(()), **SIZES)
    weight = torch.nn.Parameter(torch.ones(2))
    noise = NoiseScale([weight], **SIZES)
    feed(weight, np.ones((4, 2)))
    clipper = GradientClipper(ClipByNorm(max_norm=1.0, norm_type=math.inf), [("w", weight)])
    with pytest.raises(ConfigError, match=r"update got a record of the inf-norm, .* put a policy"):
        noise.update(clipper.clip())


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(4, 2, sparse=True)
    NoiseScale(table.parameters(), **SIZES)
    with pytest.raises(LayoutError, match=r"sparse=False"):
        table(torch.tensor([1])).sum().backward()


def test_no_host_read():
    with FakeTensorMode():  # a read of a value raises
        weight = torch.nn.Parameter(torch.empty(8, 4, device="cuda"))
        noise = NoiseScale([weight], small_batch=1, large_batch=2)
        clipper = GradientClipper(
            ClipConfig(policies=[ClipByNorm(max_norm=1.0)], on_nonfinite="ignore"), [("w", weight)]
        )
        for _ in range(3):
            for _ in range(2):
                noise._see(0, torch.empty(8, 4, device="cuda"))
            weight.grad = torch.empty_like(weight)
            scale = torch.empty((), device="cuda")
            noise.update(clipper.clip(grad_scale=scale), grad_scale=scale)
        assert noise.scale.device.type == "cuda"
        assert noise.state_dict()["product"].device.type == "cuda"
