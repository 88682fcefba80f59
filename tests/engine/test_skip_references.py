"""Withheld steps beside those of OLMo and optax, recorded, and their faults."""

import math

import pytest
import torch
from support.vectors import cases, load, number, numbers
from support.withheld import withheld

from gradclip import (
    ClipByNorm,
    GradientClipper,
    NonFiniteError,
    SkipLarge,
    SkipNonfinite,
    SkipSpike,
)

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
