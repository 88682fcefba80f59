"""Element policies against formulas in numpy, and the sum identity of U-Clip."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.gradients import SHAPES, fill, grads, optimizer_for, parameters

from gradclip import (
    GradientClipper,
    Spam,
    SpikeMax,
    UClip,
)

STEPS = 300
RNG = np.random.default_rng(0)
SPIKES = {int(step): 4.0 + 30 * RNG.random() for step in RNG.integers(20, STEPS, 30)}


def run(policy, optimizer=None, **options):
    """A run with spikes; per step the gradients before and after, float64 numpy by name."""
    params = parameters()
    steps = optimizer(params) if optimizer else None
    clipper = GradientClipper(policy, params.items(), steps, **options)
    for step in range(STEPS):
        fill(params, step)
        for name, grad in grads(params).items():
            params[name].grad = torch.where(grad.abs() > 1.5, grad * SPIKES.get(step, 1.0), grad)
        came = {name: p.grad.double().numpy().copy() for name, p in params.items()}
        record = clipper.clip()
        yield step, came, {n: p.grad.double().numpy() for n, p in params.items()}, record, clipper
        if steps is not None:
            steps.step()


def close(got, want):
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def spam_oracle(came, square, t, theta, decay, warmup):
    clipped = {}
    for name, grad in came.items():
        hat = square[name] / (1 - decay**t) if t else square[name]
        bound = np.sqrt(theta * hat)
        held = np.where(hat > 0, np.clip(grad, -bound, bound), grad)
        clipped[name] = held if t >= warmup else grad
        square[name] = decay * square[name] + (1 - decay) * clipped[name] ** 2
    return clipped


@pytest.mark.parametrize("options", [{}, {"kernel": "accelerator"}])
def test_spam_with_its_own_moment(options):
    square = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    policy = Spam(theta=9.0, decay=0.95, warmup_steps=10)
    clipped = 0
    for step, came, after, record, _ in run(policy, **options):
        want = spam_oracle(came, square, step, 9.0, 0.95, 10)
        close(after, want)
        changed = max(np.abs(want[n] - came[n]).max() for n in want)
        assert bool(record.clipped) == (changed > 1e-9)
        clipped += bool(record.clipped)
    assert 20 < clipped < STEPS


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
def test_spam_takes_the_optimizers_moment(cls):
    square = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    clipped = 0
    policy = Spam(theta=9.0, decay=0.5, warmup_steps=10)

    made = []

    def adam(params):
        made.append(optimizer_for(params, cls, betas=(0.9, 0.95)))
        return made[0]

    for step, came, after, record, clipper in run(policy, adam):
        if step == 15:  # as where a checkpoint is loaded: its state and groups are others then
            made[0].load_state_dict(copy.deepcopy(made[0].state_dict()))
        close(after, spam_oracle(came, square, step, 9.0, 0.95, 10))
        assert "elements" not in clipper.state_dict()["policies"][0]
        clipped += bool(record.clipped)
    assert clipped > 20


def test_spam_keeps_its_own_where_the_optimizer_has_none():
    class Lion(torch.optim.Optimizer):
        """Has betas and a state, and no second moment."""

        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["exp_avg"] = p.grad

    params = parameters()
    lion = Lion(params.values(), {"betas": (0.9, 0.99)})
    clipper = GradientClipper(Spam(), params.items(), lion)
    for step in range(3):
        fill(params, step)
        clipper.clip()
        lion.step()
        saved = clipper.state_dict()["policies"][0].get("elements", {})
        assert len(saved) == (len(SHAPES) if step else 0)
    silent = Lion(params.values(), {"betas": (0.9, 0.99)})  # whoever steps keeps state elsewhere
    clipper = GradientClipper(Spam(), params.items(), silent)
    for step in range(22):
        fill(params, step)
        clipper.clip()
    assert clipper.state_dict()["policies"][0]["elements"].keys() == SHAPES.keys()


@pytest.mark.parametrize("options", [{}, {"kernel": "accelerator"}])
def test_spike_max(options):
    decay, raw, weight, clipped = 0.97, dict.fromkeys(SHAPES, 0.0), 1.0, 0
    for _, came, after, record, _ in run(SpikeMax(decay=decay), **options):
        weight *= decay
        want = {}
        for name, grad in came.items():
            largest = np.abs(grad).max()
            raw[name] = decay * raw[name] + (1 - decay) * largest
            mean = raw[name] / (1 - weight)
            want[name] = np.where(np.abs(grad) > mean, grad * (mean / largest), grad)
        close(after, want)
        changed = max(np.abs(want[n] - came[n]).max() for n in want)
        assert bool(record.clipped) == (changed > 1e-9)
        clipped += bool(record.clipped)
    assert clipped > 20


@pytest.mark.parametrize("kind", ["value", "norm"])
@pytest.mark.parametrize(("cap", "fade"), [(None, 1.0), (3.0, 1.0), (2.0, 0.8)])
def test_uclip(kind, cap, fade):
    limit = 0.9 if kind == "value" else 4.0
    policy = UClip(limit=limit, kind=kind, max_carry=cap, carry_decay=fade)
    most = math.inf if cap is None else cap * limit
    carry = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    used = came_so_far = 0.0
    for _, came, after, record, _ in run(policy):
        whole = {name: grad + carry[name] for name, grad in came.items()}
        norm = math.sqrt(sum((w**2).sum() for w in whole.values()))
        coef = 1.0 if norm <= limit else limit / (norm + 1e-6)
        for name, value in whole.items():
            want = np.clip(value, -limit, limit) if kind == "value" else value * coef
            np.testing.assert_allclose(after[name], want, rtol=1e-4, atol=2e-4)
            carry[name] = (value - want) * fade
            if kind == "value":
                carry[name] = np.clip(carry[name], -most, most)
        size = math.sqrt(sum((c**2).sum() for c in carry.values()))
        if kind == "norm" and size > most:
            carry = {name: c * (most / size) for name, c in carry.items()}
        total = math.sqrt(sum((grad**2).sum() for grad in came.values()))
        assert float(record.grad_norm) == pytest.approx(total, rel=1e-6)
        used += sum(a.sum() for a in after.values())
        came_so_far += sum(g.sum() for g in came.values())
    if cap is None:
        left = sum(c.sum() for c in carry.values())
        assert used == pytest.approx(came_so_far - left, abs=1e-2)


@given(
    values=st.lists(
        st.lists(st.integers(-1024, 1024), min_size=3, max_size=3), min_size=1, max_size=30
    ),
    power=st.integers(-3, 6),
)
def test_all_that_uclip_lets_through_is_all_that_came_less_what_it_carries(values, power):
    p = torch.nn.Parameter(torch.zeros(3))
    clipper = GradientClipper(UClip(limit=2.0**power, max_carry=None), [("p", p)])
    used = torch.zeros(3, dtype=torch.float64)
    for row in values:
        p.grad = torch.tensor(row, dtype=torch.float32) / 8
        clipper.clip()
        assert p.grad.abs().max() <= 2.0**power
        used += p.grad
    saved = clipper.state_dict()["policies"][0].get("elements", {})
    carry = saved["p"]["carry"].double() if saved else torch.zeros(3)
    came = torch.tensor(values, dtype=torch.float64).sum(0) / 8
    if (torch.tensor(values) != 0).any():
        assert torch.equal(used, came - carry)


def test_uclip_carries_nothing_below_its_limit_and_no_more_than_its_cap():
    params = parameters()
    clipper = GradientClipper(UClip(limit=math.inf), params.items())
    for step in range(5):
        fill(params, step)
        before = grads(params)
        assert not clipper.clip().clipped
        assert all(torch.equal(p.grad, before[name]) for name, p in params.items())
    p = torch.nn.Parameter(torch.zeros(2))
    for cap in (None, 10.0):
        clipper = GradientClipper(UClip(limit=1.0, max_carry=cap), [("p", p)])
        for _ in range(50):
            p.grad = torch.full((2,), 2.0)
            clipper.clip()
        carry = clipper.state_dict()["policies"][0]["elements"]["p"]["carry"]
        assert torch.equal(carry, torch.full((2,), 50.0 if cap is None else cap))
