"""Withheld steps: which, how many in a row, and what they leave behind."""

import math
import statistics

import numpy as np
import pytest
import torch
from support.gradients import backward, small_model
from support.withheld import clipper_of, withheld

from gradclip import (
    ClipByNorm,
    ConfigError,
    GradientClipper,
    NonFiniteError,
    SkipLarge,
    SkipLimitError,
    SkipNonfinite,
    SkipSpike,
    ZClip,
)
from gradclip.config import parse_mapping


def plain(policy, norms):
    """The formulas in plain Python; steps in a row are bounded."""
    kept, held, streak, found, ready = [], [], 0, [], False
    warmup = policy.warmup_steps or min(policy.window, max(8, policy.window // 2))
    for norm in norms:
        last = kept[-policy.window :]
        spike = False
        if ready:
            if policy.statistic == "mean":
                center, spread = statistics.fmean(last), statistics.stdev(last)
            else:
                center = float(np.median(last))
                spread = 1.4826 * float(np.median(np.abs(np.array(last) - center)))
            spike = norm > center + policy.z_threshold * spread
        over = spike and streak >= policy.max_consecutive
        skip = spike and not over
        if skip:
            streak += 1
            held = [*held, norm][-policy.max_consecutive :]
        else:
            streak = 0
            kept.append(norm)
        if over:
            few = min(policy.max_consecutive, policy.window - 1)
            kept = [*held[-few:], norm]
        ready = ready or len(kept) >= warmup
        found.append(skip)
    return found


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("window", [4, 20])
def test_is_the_plain_formula(statistic, window):
    generator = np.random.default_rng(3)
    norms = generator.lognormal(0, 0.3, 400)
    norms[generator.random(400) < 0.05] *= 30
    norms[250:] *= 12  # a lasting change of level
    norms = np.float32(norms).astype(float).tolist()
    policy = SkipSpike(
        window=window, z_threshold=4.0, statistic=statistic, max_consecutive=6, sigma_floor=0.0
    )
    found = withheld(policy, norms)
    assert found == plain(policy, norms)
    assert 0 < sum(found) < 200


def plain_large(policy, norms):
    """What `skip_large` withholds, in plain Python."""
    kept, held, row, mean, weight, taken, found = [], [], 0, 0.0, 0.0, 0, []
    for norm in norms:
        bound = policy.limit
        if policy.relative_to == "ema":
            bound *= mean / weight if taken >= policy.warmup_steps else math.inf
        elif policy.relative_to == "percentile":
            known = kept[-policy.window :]
            bound *= (
                float(np.percentile(known, policy.percentile))
                if taken >= policy.warmup_steps
                else math.inf
            )
        over = norm >= bound and row >= policy.max_consecutive
        found.append(norm >= bound and not over)
        if found[-1]:
            row += 1
            held = [*held, norm][-min(policy.max_consecutive, policy.window - 1) :]
            continue
        row, taken = 0, taken + 1
        kept.append(norm)
        mean = norm if over else policy.decay * mean + (1 - policy.decay) * norm
        weight = 1.0 if over else policy.decay * weight + 1 - policy.decay
        if over:
            level = [*held, norm]
            kept = [norm] * max(0, policy.warmup_steps - len(level)) + level
            kept, taken = kept[-policy.warmup_steps :], policy.warmup_steps
    return found


@pytest.mark.parametrize("relative_to", ["fixed", "ema", "percentile"])
def test_large_is_the_plain_formula(relative_to):
    generator = np.random.default_rng(4)
    norms = generator.lognormal(0, 0.3, 400)
    norms[generator.random(400) < 0.05] *= 30
    norms[250:] *= 8  # a lasting change of level
    norms = np.float32(norms).astype(float).tolist()
    policy = SkipLarge(
        limit=6.0 if relative_to == "fixed" else 3.0,
        relative_to=relative_to,
        decay=0.9,
        percentile=80.0,
        window=30,
        warmup_steps=10,
        max_consecutive=6,
    )
    found = withheld(policy, norms)
    assert found == plain_large(policy, norms)
    assert 10 < sum(found) < 200


class TestBound:
    NORMS = [1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 1.05] + [50.0 + i % 3 for i in range(12)]

    def test_accept_starts_anew_from_the_new_level(self):
        found = withheld(SkipSpike(window=8, max_consecutive=3), self.NORMS)
        assert found == [False] * 8 + [True] * 3 + [False] * 9

    def test_without_a_bound_it_never_ends(self):
        found = withheld(SkipSpike(window=8, max_consecutive=None), self.NORMS)
        assert found == [False] * 8 + [True] * 12

    def test_clip_takes_the_step_scaled_down(self):
        p, clipper = clipper_of(SkipSpike(window=8, max_consecutive=3, fallback="clip"))
        for step, norm in enumerate(self.NORMS[:12]):
            p.grad = torch.tensor([norm])
            record = clipper.clip()
            assert bool(record.skipped) == (8 <= step < 11)
        assert 1.0 < float(p.grad) < 2.0
        assert float(p.grad) == pytest.approx(float(record.limit), rel=1e-5)

    def test_raise_leaves_everything_as_it_was(self):
        p, clipper = clipper_of(SkipSpike(window=8, max_consecutive=3, fallback="raise"))
        for norm in self.NORMS[:11]:
            p.grad = torch.tensor([norm])
            clipper.clip()
        before = clipper.state_dict()
        p.grad = torch.tensor([60.0])
        with pytest.raises(SkipLimitError, match=r"'skip_spike': max_consecutive 3\).* unchanged"):
            clipper.clip()
        assert float(p.grad) == 60.0
        for name, value in clipper.state_dict()["policies"][0]["state"].items():
            assert torch.equal(value, before["policies"][0]["state"][name])

    @pytest.mark.parametrize("relative_to", ["ema", "percentile"])
    def test_relative_bounds_follow(self, relative_to):
        policy = SkipLarge(
            limit=3.0, relative_to=relative_to, warmup_steps=4, window=6, max_consecutive=2
        )
        assert withheld(policy, self.NORMS) == [False] * 8 + [True] * 2 + [False] * 10

    def test_bad_steps_in_a_row_stop_the_run(self):
        p, clipper = clipper_of(SkipNonfinite(max_consecutive=2))
        for value in (1.0, math.nan, math.inf, 1.0, math.nan, math.nan):
            p.grad = torch.tensor([value])
            clipper.clip()
        p.grad = torch.tensor([math.nan])
        with pytest.raises(NonFiniteError, match=r"on this rank in p;.*max_consecutive 2\)"):
            clipper.clip()
        assert p.grad is not None

    def test_a_bad_step_is_no_spike_and_a_spike_no_bad_step(self):
        p, clipper = clipper_of([SkipSpike(window=8, max_consecutive=3), SkipNonfinite()])

        def rows():
            states = [entry["state"] for entry in clipper.state_dict()["policies"]]
            return [float(state["withheld"] - state["before"]) for state in states]

        for norm in [*self.NORMS[:8], math.nan, 50.0, 0.0, math.nan, 50.0, math.nan]:
            p.grad = torch.tensor([norm])
            clipper.clip()
        assert rows() == [2.0, 3.0]
        p.grad = torch.tensor([1.0])
        clipper.clip()
        assert rows() == [0.0, 0.0]

    def test_two_bounds_that_began_apart_let_the_same_step_pass(self):
        """Reset by steps that only the other withheld, they would take turns for ever."""
        policies = [
            SkipSpike(window=8, max_consecutive=3),
            SkipLarge(limit=40.0, max_consecutive=3),
        ]
        norms = [*self.NORMS[:8], 20.0, *([50.0] * 6)]
        assert withheld(policies, norms) == [False] * 8 + [True] * 4 + [False, True, True]


class TestLoss:
    def test_a_spike_of_the_loss(self):
        losses = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0, 2.1, 30.0, 2.0]
        found = withheld(SkipSpike(window=8, watch="loss"), [1.0] * 10, losses)
        assert found == [False] * 8 + [True, False]

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_bad_loss_withholds_even_before_the_warmup(self, bad):
        found = withheld(SkipSpike(watch="both"), [1.0] * 3, [1.0, bad, 1.0])
        assert found == [False, True, False]

    def test_bad_losses_are_no_spikes(self):
        """None of them is taken, however many come in a row, and none is a new level."""
        policy = SkipSpike(window=8, watch="loss", max_consecutive=2)
        losses = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0, 2.1, *[math.nan] * 5, 30.0, math.nan]
        found = withheld(policy, [1.0] * 19, [*losses, 30.0, 31.0, 30.5, 2.0])
        assert found == [False] * 8 + [True] * 8 + [False] * 3

    def test_a_loss_of_several_numbers_is_refused(self):
        p, clipper = clipper_of(SkipSpike(watch="loss"))
        p.grad = torch.ones(1)
        with pytest.raises(ConfigError, match=r"shape \(2,\); allowed: one number"):
            clipper.clip(loss=torch.ones(2))
        assert not clipper.clip(loss=torch.ones(1, requires_grad=True)).skipped

    def test_what_a_scaler_left_out_is_forgotten(self):
        p, clipper = clipper_of(SkipSpike(watch="loss"))
        p.grad = torch.ones(1)
        clipper.observe_loss(math.inf, first=True)
        clipper.observe_loss(3.0, first=True)
        assert not clipper.clip().skipped

    def test_micro_batches_are_averaged(self):
        p, clipper = clipper_of(SkipSpike(watch="loss"))
        p.grad = torch.ones(1)
        clipper.observe_loss(torch.tensor(1.0))
        clipper.observe_loss(3.0)
        clipper.clip()
        state = clipper.state_dict()["policies"][0]["state"]
        assert float(state["losses"][-1]) == 2.0

    def test_none_given(self):
        p, clipper = clipper_of(SkipSpike(watch="both"))
        p.grad = torch.ones(1)
        with pytest.raises(ConfigError, match=r"watches the loss.*clip\(loss=loss\)"):
            clipper.clip()

    def test_nobody_watches(self):
        p, clipper = clipper_of(ClipByNorm(max_norm=1.0))
        p.grad = torch.ones(1)
        clipper.observe_loss(1.0)
        assert not clipper.watches_loss
        assert not clipper.clip(loss=math.nan).skipped


def test_a_withheld_step_leaves_no_trace():
    """Parameters, Adam's moments, and other policies' state are bit-identical."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    policies = [SkipSpike(window=8), ZClip(warmup_steps=3)]
    clipper = GradientClipper(policies, model.named_parameters(), optimizer)
    for step in range(12):
        backward(model, step)
        clipper.clip()
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    moments = [v.clone() for s in optimizer.state.values() for v in s.values()]
    state = clipper.state_dict()["policies"][1]["state"]
    backward(model, 12, size=1e4)
    assert clipper.clip().skipped
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    now = [v for s in optimizer.state.values() for v in s.values()]
    assert all(map(torch.equal, moments, now))
    for name, value in clipper.state_dict()["policies"][1]["state"].items():
        assert torch.equal(value, state[name])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"type": "skip_spike", "window": 8, "warmup_steps": 9}, "warmup_steps 9 above window 8"),
        ({"type": "skip_spike", "watch": "loss", "fallback": "clip"}, "no norm to clip to"),
        ({"type": "skip_large", "limit": 1.0, "relative_to": "percentile", "window": 9}, "above"),
        ({"type": "skip_spike", "scope": "parameter"}, "scope is 'parameter'"),
    ],
)
def test_what_makes_no_sense(policy, message):
    with pytest.raises(ConfigError, match=message):
        parse_mapping({"policies": [policy]})
