"""EmaClip and AdaGC beside the same formulas in plain Python, and what their options change."""

import math
import statistics

import pytest
import torch
from support.norms import clipped, decided, steady

from gradclip import AdaGC, EmaClip, Schedule


def eventful(slots):
    """300 steps of several slots: spikes, two changes of level, zeros, a slot that starts late."""
    norms = steady(300, noise=0.4, slots=slots) * torch.tensor([1.0, 30.0, 0.02, 4.0])[:slots]
    norms[40::17, 0] *= 9.0
    norms[120:] *= 3.0
    norms[220:, 1:] *= 0.1
    norms[10:14] = 0.0
    norms[150:155, 1] = 0.0
    norms[:60, slots - 1] = 0.0
    return norms


def ema_in_plain_python(norms, policy):
    """One slot: its limits, by the formulas."""
    history, sums, limits, seen, outside = [], [0.0, 1.0], [], 0, 0
    for n in norms:
        ready = seen >= policy.warmup_steps
        mean = sums[0] / (1 - sums[1]) if ready else math.inf
        own = policy.factor * mean
        ceiling = math.inf if policy.max_norm is None else policy.max_norm
        limits.append(min(own, ceiling))
        if n == 0:
            continue
        seen += 1
        history.append(n)
        u = {"clipped": min(n, own), "raw": n, "skip": None if n > own else n}[policy.update]
        if u is not None:
            sums = [policy.decay * sums[0] + (1 - policy.decay) * u, sums[1] * policy.decay]
        side = 1 if n > own else -1 if ready and n < mean / policy.factor else 0
        outside = 0 if side == 0 else side if outside * side <= 0 else outside + side
        if policy.escape_after and abs(outside) == policy.escape_after:
            sums, outside = [statistics.median(history[-policy.escape_after :]), 0.0], 0
    return limits


@pytest.mark.parametrize("update", ["clipped", "raw", "skip"])
@pytest.mark.parametrize("escape_after", [6, 7, None])
def test_ema_follows_its_formulas(update, escape_after):
    policy = EmaClip(
        warmup_steps=9, decay=0.9, factor=1.3, update=update, escape_after=escape_after, max_norm=60
    )
    norms = eventful(4)
    found = decided(policy, norms)
    for slot in range(4):
        want = ema_in_plain_python(norms[:, slot].tolist(), policy)
        torch.testing.assert_close(
            found.limit[:, slot], torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0
        )
    exact = torch.where(norms > found.limit, found.limit / (norms + 1e-6), 1.0)
    torch.testing.assert_close(found.coef, exact, rtol=1e-15, atol=0)


def adagc_in_plain_python(norms, policy):
    """All slots: their coefficients, by the formulas."""
    slots, coefs = len(norms[0]), []
    means, seen, outside = [0.0] * slots, [0] * slots, [[] for _ in range(slots)]
    for row in norms:
        whole = math.sqrt(sum(n * n for n in row))
        most = math.inf if policy.warmup_norm is None else policy.warmup_norm
        first = 1.0 if whole <= most else most / (whole + policy.eps)
        known = [mean for mean, count in zip(means, seen, strict=True) if count]
        floor = policy.mean_floor * statistics.median(known) if known else 0.0
        coefs.append([1.0] * slots)
        for i, n in enumerate(row):
            if seen[i] < max(1, policy.warmup_steps - 1):
                c = coefs[-1][i] = first
                if n:
                    seen[i] += 1
                    smallest = min(means[i], c * n) if seen[i] > 1 else c * n
                    average = means[i] + (c * n - means[i]) / seen[i]
                    means[i] = smallest if policy.warmup == "min" else average
                continue
            base = max(means[i], floor, policy.eps)
            c = coefs[-1][i] = min(1.0, policy.factor * base / n) if n else 1.0
            if not n:
                continue
            means[i] = policy.decay * means[i] + (1 - policy.decay) * c * n
            side = (n > policy.factor * base) - (n < base / policy.factor)
            same = bool(outside[i]) and outside[i][-1][0] == side
            outside[i] = [*(outside[i] if same else []), (side, n)] if side else []
            if policy.escape_after and len(outside[i]) == policy.escape_after:
                means[i] = statistics.geometric_mean(n for _, n in outside[i])
                outside[i] = []
    return coefs


@pytest.mark.parametrize("warmup", ["mean", "min"])
@pytest.mark.parametrize("escape_after", [6, None])
@pytest.mark.parametrize("warmup_norm", [10.0, None])
@pytest.mark.parametrize("mean_floor", [0.0, 0.2])
def test_adagc_follows_its_formulas(warmup, escape_after, warmup_norm, mean_floor):
    policy = AdaGC(
        warmup=warmup,
        warmup_norm=warmup_norm,
        escape_after=escape_after,
        mean_floor=mean_floor,
        warmup_steps=20,
        decay=0.9,
        factor=1.2,
    )
    norms = eventful(4)
    found = decided(policy, norms)
    want = torch.tensor(adagc_in_plain_python(norms.tolist(), policy), dtype=torch.float64)
    there = norms > 0
    torch.testing.assert_close(found.coef[there], want[there], rtol=1e-11, atol=0)
    assert (found.coef[~there] == 1).all()


def test_a_warm_up_limits_all_parameters_together():
    norms = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)
    found = decided(AdaGC(warmup_norm=1.0), norms)
    torch.testing.assert_close(found.coef[0] * norms[0], norms[0] / 5, rtol=1e-8, atol=0)
    assert (found.coef[1] == 1).all()
    rising = Schedule(schedule="linear", start=1.0, end=10.0, steps=1)
    later = decided(AdaGC(warmup_norm=rising), norms[[0, 0]])
    assert (later.coef[0] < 1).all()
    assert (later.coef[1] == 1).all()


def test_a_parameter_that_starts_late_has_a_warm_up_of_its_own():
    norms = steady(400, slots=2, noise=0.3)
    norms[:150, 1] = 0.0
    found = decided(AdaGC(warmup_norm=None), norms)
    start = norms[150:249, 1]
    assert found.limit[248, 1] == math.inf
    torch.testing.assert_close(found.limit[249, 1], 1.05 * start.mean(), rtol=1e-12, atol=0)


def test_a_parameter_far_below_the_others_is_not_clipped_to_nothing():
    norms = torch.ones(120, 5, dtype=torch.float64)
    norms[:100, 0] = 1e-9
    for floor, limit in ((1e-3, 1.05e-3), (0.0, 1.05e-8)):
        found = decided(AdaGC(warmup_norm=None, mean_floor=floor), norms)
        assert found.limit[100, 0] == pytest.approx(limit)


def test_without_an_escape_the_mean_grows_as_slowly_as_is_written():
    for policy, steps in (
        (EmaClip(escape_after=None), 110),
        (AdaGC(escape_after=None, warmup_norm=None, scope="global"), 1100),
    ):
        norms = torch.cat([torch.ones(1500), torch.full((1200,), 100.0)]).double()
        limit = decided(policy, norms).limit[1500:]
        reached = int((limit >= 3 * policy.factor).nonzero()[0])
        assert reached == pytest.approx(steps, rel=0.01)


@pytest.mark.parametrize(("update", "share"), [("clipped", 1.01), ("raw", 1.99), ("skip", 1.0)])
def test_what_a_spike_adds_to_the_mean(update, share):
    norms = torch.cat([torch.ones(2000), torch.tensor([100.0, 1.0])]).double()
    limit = decided(EmaClip(update=update), norms).limit
    assert limit[-1] / limit[-2] == pytest.approx(share)


def test_the_mean_starts_without_a_bias():
    norms = torch.full((20,), 3.0, dtype=torch.float64)
    limit = decided(EmaClip(warmup_steps=5), norms).limit
    assert (limit[:5] == math.inf).all()
    torch.testing.assert_close(limit[5:], torch.full_like(limit[5:], 6.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [EmaClip, AdaGC])
def test_a_ceiling_does_not_move_the_mean(kind):
    norms = steady(300)
    policy = kind(scope="global", escape_after=None)
    free = decided(policy, norms).limit
    capped = decided(policy.model_copy(update={"max_norm": 0.5}), norms).limit
    torch.testing.assert_close(capped, free.clamp(max=0.5), rtol=0, atol=0)
    floored = decided(policy.model_copy(update={"min_norm": 7.0}), norms).limit
    torch.testing.assert_close(floored, free.clamp(min=7.0), rtol=0, atol=0)


def test_fields_are_checked():
    for kind, field, value in (
        (EmaClip, "factor", 0.9),
        (EmaClip, "decay", 1.0),
        (EmaClip, "warmup_steps", 0),
        (EmaClip, "update", "none"),
        (EmaClip, "escape_after", 1),
        (AdaGC, "factor", math.inf),
        (AdaGC, "warmup_norm", 0.0),
        (AdaGC, "warmup", "median"),
        (AdaGC, "mean_floor", 1.0),
        (AdaGC, "escape_after", 0),
        (AdaGC, "eps", 0.0),
    ):
        with pytest.raises(ValueError, match=field):
            kind(**{field: value})


def test_ema_in_a_clipper_clips_what_it_says():
    norms = torch.cat([steady(120), torch.tensor([50.0], dtype=torch.float64)])
    records = clipped(EmaClip(), norms)
    assert not any(record.clipped for record in records[:-1])
    assert records[-1].clipped
    assert float(records[-1].clipped_norm) == pytest.approx(float(records[-1].limit), rel=1e-6)
