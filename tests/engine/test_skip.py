"""Withheld steps: which, how many in a row, and what they leave behind."""

import math
import statistics

import numpy as np
import pytest
import torch
from support.gradients import backward, small_model
from support.vectors import cases, load, number, numbers

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


def clipper_of(policy):
    p = torch.nn.Parameter(torch.zeros(1))
    return p, GradientClipper(policy, [("p", p)])


def withheld(policy, norms, losses=None):
    """Whether each step was withheld, from scalar gradients."""
    p, clipper = clipper_of(policy)
    found = []
    for norm, loss in zip(norms, losses or [None] * len(norms), strict=True):
        p.grad = torch.tensor([norm])
        found.append(bool(clipper.clip(loss=loss).skipped))
    return found


REFERENCE = {"include_skipped": True, "max_consecutive": None, "sigma_floor": 0.0}


def olmo(case):
    given = case["params"]
    window = given["rolling_interval_length"]
    return SkipSpike(
        window=window,
        z_threshold=float(given["sigma_factor"]),
        watch="both" if "grad_norm" in given["uses"] else "loss",
        warmup_steps=max(2, window // 2) - 1,
        **REFERENCE,
    )


@pytest.mark.parametrize("case", cases("olmo_skip_step"))
def test_olmo(case):
    sequence = load("olmo_skip_step")["inputs"]["sequences"][case["sequence"]]
    norms, losses = ([number(v) for v in sequence[key]] for key in ("grad_norm", "loss"))
    found = withheld(olmo(case), norms, losses)
    mode, seen = case["conformance"], 0
    for step, factor in enumerate(case["outputs"]["step_factor"]):
        if mode["mode"] == "match_until" and step >= mode["step"]:
            break
        if factor is None:  # a step that isn't finite, which the reference wasn't shown
            assert found[step]
            continue
        assert found[step] == (number(factor) == 0), step
        seen += 1
    assert seen > 100


def test_one_bad_value_withholds_one_step_where_the_reference_withholds_a_window_full():
    case = next(c.values[0] for c in cases("olmo_skip_step") if c.id == "L32-s3/nonfinite")
    sequence = load("olmo_skip_step")["inputs"]["sequences"]["nonfinite"]
    start = case["conformance"]["step"]
    factors = [number(f) for f in case["outputs"]["step_factor"]]
    assert sum(f == 0 for f in factors[start : start + 32]) > 25
    norms, losses = ([number(v) for v in sequence[key]] for key in ("grad_norm", "loss"))
    found = withheld(SkipSpike(window=32, watch="both"), norms, losses)
    assert sum(found[start : start + 32]) <= 3


def olmo_rule(norms, window, sigma):
    """The reference's rule, on norms alone: withheld values and NaN stay in the window."""
    found = []
    for step, norm in enumerate(norms):
        past = torch.tensor(norms[max(0, step - window) : step], dtype=torch.float64)
        ready = len(past) + 1 >= max(2, window // 2)
        spread = past.std() if len(past) > 1 else torch.tensor(math.nan)
        found.append(ready and not bool(norm - past.mean() <= sigma * spread))
    return found


def test_a_small_window_does_not_withhold_step_two():
    norms = [1.0, 1.01, 0.99, 1.0]
    assert olmo_rule(norms, 5, 6.0) == [False, True, False, False]
    assert not any(withheld(SkipSpike(window=5), norms))
    assert not any(withheld(SkipSpike(window=5, warmup_steps=2), norms))


def test_a_spike_does_not_hide_the_next():
    norms = [1.0, 1.02, 0.98, 1.01, 0.99] * 4 + [1e3, 1.0, 20.0]
    assert olmo_rule(norms, 20, 6.0)[-3:] == [True, False, False]
    assert withheld(SkipSpike(window=20), norms)[-3:] == [True, False, True]


def test_norms_that_all_stand_at_a_limit_are_no_spikes():
    """Clipped norms differ by eps alone, of which a spread can be made all the same."""
    norms = [5.0 + 0.01 * (step % 5) for step in range(20)] + [1e3]
    policies = [ClipByNorm(max_norm=1.0), SkipSpike(window=8)]
    assert not any(withheld(policies, norms))
    policies[1] = SkipSpike(window=8, sigma_floor=0.0)
    assert withheld(policies, norms)[-1]


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


class TestOptax:
    def updates(self):
        return numbers(load("optax_conditionality")["inputs"]["updates"])

    def replayed(self, policy):
        p = torch.nn.Parameter(torch.zeros(3))
        clipper = GradientClipper(policy, [("p", p)])
        for update in self.updates():
            p.grad = torch.tensor(update)
            yield clipper.clip()

    @pytest.mark.parametrize("case", [c for c in cases("optax_conditionality") if "large" in c.id])
    def test_large(self, case):
        limit = math.sqrt(case["params"]["max_squared_norm"])
        policy = SkipLarge(limit=limit, max_consecutive=None)
        found = [bool(record.skipped) for record in self.replayed(policy)]
        assert found == case["outputs"]["should_skip"]

    def test_not_finite(self):
        case = next(c.values[0] for c in cases("optax_conditionality") if "accumulate" in c.id)
        found = [bool(record.skipped) for record in self.replayed(SkipNonfinite())]
        assert found == case["outputs"]["should_skip"]

    def test_the_bound_stops_where_optax_applies_what_is_bad(self):
        case = next(c.values[0] for c in cases("optax_conditionality") if c.id.endswith("finite-3"))
        bad = [not all(map(math.isfinite, update)) for update in self.updates()]
        applied = case["outputs"]["applied"]
        first = next(i for i, (b, a) in enumerate(zip(bad, applied, strict=True)) if b and a)
        records = self.replayed(SkipNonfinite(max_consecutive=3))
        for step in range(first):
            assert bool(next(records).skipped) == bad[step]
        with pytest.raises(NonFiniteError):
            next(records)


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
