"""What befalls a run, and what every policy with a limit of its own makes of it.

Beside each stands the rule of its reference, in plain Python, to show the fault where it has it.
A new policy is one more entry of `SUBJECTS`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.norms import clipped, decided, steady

from gradclip import AdaGC, AutoClip, EmaClip, ZClip
from gradclip.policies import AdaptivePolicy

CHANGE = 300
UP, DOWN = (2.0, 5.0), (0.2,)
EVENTS = {"inf in warm-up": (7, math.inf), "NaN": (150, math.nan), "zero in warm-up": (7, 0.0)}


@dataclass(frozen=True)
class Subject:
    """A policy, and its reference as a function from norms to limits.

    Attributes:
        within: Steps after a change of level in which the limit is back.
        late: Changes after which the reference's limit isn't back in as many.
        much_later: Changes after which it isn't back after `CHANGE` steps either.
        dies_of: Events after which the reference's limit is no longer one.
    """

    policy: AdaptivePolicy
    within: int
    reference: Callable[[Sequence[float]], list[float]]
    late: Sequence[float] = (*UP, *DOWN)
    much_later: Sequence[float] = ()
    dies_of: Sequence[str] = ("inf in warm-up", "NaN")


def zclip_reference(norms):
    limits, warm, mean, var = [], [], None, None
    for n in norms:
        if mean is None:
            limits.append(math.inf)
            warm.append(n)
            if len(warm) == 25:
                mean = sum(warm) / 25
                var = sum((x - mean) ** 2 for x in warm) / 25
            continue
        z = (n - mean) / (math.sqrt(var) + 1e-6)
        held = mean + 2.5**2 * math.sqrt(var) / z if z > 2.5 else n
        limits.append(held if z > 2.5 else mean + 2.5 * (math.sqrt(var) + 1e-6))
        mean = 0.97 * mean + 0.03 * held
        var = 0.97 * var + 0.03 * (held - mean) ** 2
    return limits


def adagc_reference(norms, decay=0.98, factor=1.05, most=10.0, eps=1e-8):
    limits, gamma = [], math.inf
    for step, n in enumerate(norms, start=1):
        if step < 100:
            limits.append(most)
            held = min(1.0, most / (n + eps)) * n
            gamma = math.nan if math.isnan(held) else min(gamma, held)
        else:
            limits.append(factor * max(gamma, eps))
            gamma = decay * gamma + (1 - decay) * (n if math.isnan(n) else min(n, limits[-1]))
    return limits


def autoclip_reference(norms):
    with np.errstate(invalid="ignore"):  # inf - inf
        return [float(np.percentile(norms[: t + 1], 90)) for t in range(len(norms))]


SUBJECTS = {
    "zclip": Subject(ZClip(max_norm=None), 25, zclip_reference, much_later=UP),
    "zclip percentile": Subject(
        ZClip(max_norm=None, mode="percentile", warmup="median", variance="exact"),
        25,
        zclip_reference,
        much_later=UP,
    ),
    "ema": Subject(  # which has no reference but AdaGC's rule for one tensor
        EmaClip(),
        25,
        lambda norms: adagc_reference(norms, decay=0.99, factor=2.0),
        late=(5.0, *DOWN),
        much_later=DOWN,
        dies_of=("inf in warm-up", "NaN", "zero in warm-up"),
    ),
    "adagc": Subject(
        AdaGC(scope="global", warmup_norm=10.0),
        50,
        adagc_reference,
        much_later=UP,
        dies_of=("inf in warm-up", "NaN", "zero in warm-up"),
    ),
    "autoclip": Subject(
        AutoClip(window=250, percentile=90),
        250,
        autoclip_reference,
        late=DOWN,
        much_later=DOWN,
        dies_of=("NaN",),
    ),
}
every_subject = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS.keys())


def is_back(limit, level):
    """Whether a limit, a number or a tensor of them, is one for norms about a level."""
    return (limit > 0.9 * level) & (limit < 2.2 * level)


def changed(factor):
    return torch.cat([steady(CHANGE), steady(CHANGE, factor, seed=1)])


@every_subject
def test_the_limit_follows_a_lasting_change_of_level(subject, subtests):
    for factor in (*UP, *DOWN):
        with subtests.test(f"{factor=}"):
            norms = changed(factor)
            limit = decided(subject.policy, norms).limit
            assert is_back(limit[CHANGE - 100 : CHANGE], 1.0).all()
            assert is_back(limit[CHANGE + subject.within :], factor).all()
            reference = subject.reference(norms.tolist())
            assert is_back(reference[CHANGE + subject.within], factor) == (
                factor not in subject.late
            )
            assert is_back(reference[-1], factor) == (factor not in subject.much_later)
            in_a_clipper(subject, norms, limit)


def in_a_clipper(subject, norms, limit):
    """The same limits, and soon no more steps are clipped than before the change."""
    records = clipped(subject.policy, norms)
    limits = torch.stack([record.limit for record in records])
    torch.testing.assert_close(limits, limit, rtol=1e-9, atol=0)
    settled = [bool(record.clipped) for record in records[CHANGE + subject.within :]]
    before = [bool(record.clipped) for record in records[CHANGE // 2 : CHANGE]]
    assert sum(settled) / len(settled) < sum(before) / len(before) + 0.2


@every_subject
def test_an_event_leaves_no_trace(subject, subtests):
    norms = steady(2 * CHANGE)
    clean = torch.stack([r.limit for r in clipped(subject.policy, norms)])
    for event, (step, value) in EVENTS.items():
        with subtests.test(event):
            with_event = torch.cat([norms[:step], torch.tensor([value]).double(), norms[step:]])
            records = clipped(subject.policy, with_event)
            limits = torch.stack([r.limit for i, r in enumerate(records) if i != step])
            torch.testing.assert_close(limits, clean, rtol=0, atol=0)
            assert is_back(limits[-200:], 1.0).all()
            reference = subject.reference(with_event.tolist())
            assert is_back(reference[-1], 1.0) == (event not in subject.dies_of)


@every_subject
def test_rare_spikes_never_look_like_a_new_level(subject):
    norms = steady(6000, slots=4)
    generator = torch.Generator().manual_seed(2)
    spikes = torch.rand(norms.shape, generator=generator) < 0.03
    spikes[:100] = False  # a start on spikes is another matter
    norms = torch.where(spikes, norms * 40, norms)
    policy = subject.policy
    found = decided(policy, norms)
    assert is_back(found.limit[200:], 1.0).all()
    assert ((norms * found.coef)[200:] < 2.2).all()
    if policy.type != "autoclip":
        never = decided(policy.model_copy(update={"escape_after": None}), norms)
        torch.testing.assert_close(found.limit, never.limit, rtol=0, atol=0)
        eager = decided(policy.model_copy(update={"escape_after": 2}), norms[:1500])
        assert not torch.equal(eager.limit, never.limit[:1500])
