"""Element policies: the faults of the references, what is remembered, what is refused."""

import copy
import io

import numpy as np
import pytest
import torch
from support.gradients import fill, flat, parameters
from torch._subclasses.fake_tensor import FakeTensorMode

from gradclip import (
    ClipByNorm,
    ClipByValue,
    ConfigError,
    GradientClipper,
    SkipNonfinite,
    Spam,
    SpikeMax,
    UClip,
)


def test_an_element_that_had_no_gradient_yet_is_not_dead():
    """Rows of an embedding seen for the first time after the warm-up."""
    theta, decay, square = 5000.0, 0.999, np.zeros(2)
    p = torch.nn.Parameter(torch.zeros(2))
    clipper = GradientClipper(Spam(theta=theta, decay=decay), [("p", p)])
    for step in range(60):
        seen = np.array([1.0, 0.0 if step < 30 else 1.0])
        p.grad = torch.tensor(seen, dtype=torch.float32)
        clipper.clip()
        assert torch.equal(p.grad, torch.tensor(seen, dtype=torch.float32))
        over = (step >= 20) & (seen**2 > theta * square)  # as the reference has it
        reference = np.where(over, np.sqrt(theta * square), seen)
        square = decay * square + (1 - decay) * reference**2
        assert reference[1] == 0


def test_a_new_element_is_left_alone_beside_one_that_is_clipped():
    p = torch.nn.Parameter(torch.zeros(2))
    clipper = GradientClipper(Spam(theta=100.0), [("p", p)])
    for step in range(31):
        p.grad = torch.tensor([1.0, 0.0] if step < 30 else [1e3, 7.0])
        record = clipper.clip()
    assert record.clipped
    assert torch.allclose(p.grad, torch.tensor([10.0, 7.0]))


def test_a_new_element_is_held_from_its_second_gradient_on():
    p = torch.nn.Parameter(torch.zeros(2))
    clipper = GradientClipper(Spam(theta=100.0), [("p", p)])
    for step in range(40):
        p.grad = torch.tensor([1.0, float(step >= 30)])
        clipper.clip()
    p.grad = torch.tensor([1.0, 1e4])
    assert clipper.clip().clipped
    assert p.grad[0] == 1
    assert 0.5 < p.grad[1] < 10


def test_a_reset_does_not_turn_spike_max_off():
    """Stable-SPAM restarts the count of its correction every `gap` steps and keeps the mean."""
    decay, gap, raw, count = 0.999, 50, 0.0, 0
    p = torch.nn.Parameter(torch.zeros(2))
    clipper = GradientClipper(SpikeMax(decay=decay), [("p", p)])
    for step in range(80):
        largest = 100.0 if step == 60 else 1.0
        p.grad = torch.tensor([largest, 0.5])
        clipper.clip()
        count = 1 if step and step % gap == 0 else count + 1
        raw = decay * raw + (1 - decay) * largest
        reference = min(largest, raw / (1 - decay**count))
        if step == 60:
            assert reference > 10
            assert p.grad[0] < 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "policy", [Spam(theta=4.0, warmup_steps=3), UClip(limit=0.3)], ids=lambda p: p.type
)
def test_memory_of_half_precision_gradients_is_single(policy, dtype):
    """Each square of 1e-3 would be lost beside 1 in half precision, and underflow in float16."""
    params, single = parameters(dtype), parameters()
    clipper = GradientClipper(policy, params.items())
    other = GradientClipper(policy, single.items())
    for step in range(30):
        fill(params, step, 1e-4 if policy.type == "spam" else 1.0)
        for name, p in params.items():
            single[name].grad = p.grad.float()
        clipper.clip()
        other.clip()
        for name, p in params.items():
            torch.testing.assert_close(p.grad, single[name].grad.to(dtype), rtol=2e-2, atol=1e-3)
    for name, own in clipper.state_dict()["policies"][0]["elements"].items():
        (value,) = own.values()
        (want,) = other.state_dict()["policies"][0]["elements"][name].values()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, want, rtol=1e-2, atol=1e-10)


def test_gradients_of_any_layout_are_cut_alike():
    torch.manual_seed(0)
    values = torch.randn(3, 200, 300)
    found = []
    for grad in (values, values.transpose(1, 2).contiguous().transpose(1, 2)):
        p = torch.nn.Parameter(torch.zeros(3, 200, 300))
        clipper = GradientClipper(UClip(limit=0.5), [("p", p)])
        for _ in range(2):
            p.grad = grad.clone()
            clipper.clip()
        found.append((p.grad, clipper.state_dict()["policies"][0]["elements"]["p"]["carry"]))
    assert all(map(torch.equal, *found))


def test_what_is_before_it_in_the_list_scales_first():
    norm = ClipByNorm(max_norm=3.0)
    for last in (Spam(theta=4.0, warmup_steps=3), SpikeMax(decay=0.9)):
        params, others = parameters(), parameters()
        both = GradientClipper([SkipNonfinite(), norm, last], params.items())
        first, second = (GradientClipper(p, others.items()) for p in (norm, last))
        clipped = 0
        for step in range(40):
            size = 20.0 if step % 13 == 12 else 1.0
            fill(params, step, size)
            fill(others, step, size)
            both.clip()
            first.clip()
            clipped += bool(second.clip().clipped)
            torch.testing.assert_close(flat(params), flat(others), rtol=1e-6, atol=1e-7)
        assert clipped > 5


def test_spike_max_after_units():
    unit = ClipByNorm(max_norm=1.5, scope="unit")
    params, others = parameters(), parameters()
    both = GradientClipper([unit, SpikeMax(decay=0.9)], params.items())
    first, second = (GradientClipper(p, others.items()) for p in (unit, SpikeMax(decay=0.9)))
    for step in range(20):
        fill(params, step)
        fill(others, step)
        both.clip()
        first.clip()
        second.clip()
        torch.testing.assert_close(flat(params), flat(others), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("policy", [Spam(theta=4.0, warmup_steps=3), UClip(limit=0.4)])
def test_before_it_starts_it_neither_acts_nor_learns(policy):
    params, others = parameters(), parameters()
    late = GradientClipper(policy.model_copy(update={"after": 5}), params.items())
    clipper = GradientClipper(policy, others.items())
    for step in range(5):
        fill(params, step)
        assert not late.clip().clipped
    for step in range(5, 20):
        fill(params, step)
        fill(others, step)
        late.clip()
        clipper.clip()
        assert torch.equal(flat(params), flat(others))


def test_without_save_it_starts_anew():
    for policy in (UClip(limit=0.4, save=False), Spam(theta=4.0, warmup_steps=3, save=False)):
        params, others = parameters(), parameters()
        clipper = GradientClipper(policy, params.items())
        for step in range(10):
            fill(params, step)
            clipper.clip()
        buffer = io.BytesIO()
        torch.save(clipper.state_dict(), buffer)
        assert "elements" not in clipper.state_dict()["policies"][0]
        clipper.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        fresh = GradientClipper(policy, others.items())
        for step in range(10):
            fill(params, step)
            fill(others, step)
            assert clipper.clip().clipped == fresh.clip().clipped
            assert torch.equal(flat(params), flat(others))


def test_memory_of_another_shape_is_refused_and_changes_nothing():
    params = parameters()
    clipper = GradientClipper(UClip(limit=0.4), params.items())
    fill(params, 0)
    clipper.clip()
    state = clipper.state_dict()
    other = copy.deepcopy(state)
    other["policies"][0]["elements"]["scale"]["carry"] = torch.zeros(3)
    other["policies"][0]["state"]["carrying"].zero_()
    with pytest.raises(ConfigError, match=r"\.scale\.carry of 'uclip' has shape \(3,\)"):
        clipper.load_state_dict(other)
    assert clipper.state_dict()["policies"][0]["state"] == state["policies"][0]["state"]


def test_orders_and_neighbours_that_are_refused():
    norm, unit = ClipByNorm(max_norm=1.0), ClipByNorm(max_norm=1.0, scope="unit")
    with pytest.raises(ConfigError, match=r"has 'spam' before another policy; .*Move it"):
        GradientClipper([Spam(), ClipByValue(clip_value=1.0)], parameters().items())
    with pytest.raises(ConfigError, match=r"has 'norm' before 'uclip', .*Remove 'norm'"):
        GradientClipper([norm, UClip(limit=1.0)], parameters().items())
    GradientClipper([SkipNonfinite(), UClip(limit=1.0)], parameters().items())
    with pytest.raises(ConfigError, match="'spam' stands beside a policy of scope 'unit'"):
        GradientClipper([unit, Spam()], parameters().items())
    with pytest.raises(ConfigError, match="reset_every with moment 'optimizer'"):
        GradientClipper({"policies": [{"type": "spam", "reset_every": 5}]}, parameters().items())


def test_a_clamp_reads_nothing_again_where_nothing_exceeds_it():
    params = parameters()
    for policy in (ClipByValue(clip_value=1e3), Spam(theta=1e9), UClip(limit=1e3)):
        clipper = GradientClipper(policy, params.items())
        for step in range(3):
            fill(params, step)
            versions = [p.grad._version for p in params.values()]
            clipper.clip()
            assert [p.grad._version for p in params.values()] == versions


def step_with_moments(device, **options):
    """A step of SPAM beside an optimizer that has a second moment."""
    p = torch.nn.Parameter(torch.empty(4, 3, device=device))
    optimizer = torch.optim.AdamW([p], foreach=False)
    config = {"policies": [Spam()], "on_nonfinite": "ignore"}
    clipper = GradientClipper(config, [("p", p)], optimizer, **options)
    p.grad = torch.ones_like(p)
    moments = {"step": torch.tensor(30.0), "exp_avg_sq": torch.ones_like(p)}
    optimizer.state[p] = moments
    return clipper, clipper.clip()


def test_the_optimizers_moment_on_an_accelerator_is_not_waited_for():
    with FakeTensorMode():
        _, record = step_with_moments("cuda")
        assert record.clipped.device.type == "cuda"
    clipper, _ = step_with_moments("cpu", kernel="accelerator")
    assert "elements" not in clipper.state_dict()["policies"][0]
