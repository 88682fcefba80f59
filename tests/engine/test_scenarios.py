"""What befalls a run: the limit of every adaptive policy survives it, or follows it.

What references of these policies do is in their golden vectors and in docs/. A new policy is one
more entry of `SUBJECTS`.
"""

import math

import pytest
import torch
from support.norms import clipped, decided, steady

from gradclip import AdaGC, AutoClip, EmaClip, ZClip

CHANGE = 300
FACTORS = (2.0, 5.0, 0.2)
EVENTS = {"inf in warm-up": (7, math.inf), "NaN": (150, math.nan), "zero in warm-up": (7, 0.0)}
SUBJECTS = {  # with the steps after a change of level in which the limit is back
    "zclip": (ZClip(max_norm=None), 25),
    "zclip percentile": (
        ZClip(max_norm=None, mode="percentile", warmup="median", variance="exact"),
        25,
    ),
    "ema": (EmaClip(), 25),
    "adagc": (AdaGC(scope="global", warmup_norm=10.0), 50),
    "autoclip": (AutoClip(window=250, percentile=90), 250),
}
every_subject = pytest.mark.parametrize(("policy", "within"), SUBJECTS.values(), ids=SUBJECTS)


def is_back(limit, level):
    """Whether a limit, a number or a tensor of them, is one for norms about a level."""
    return (limit > 0.9 * level) & (limit < 2.2 * level)


def changed(factor):
    return torch.cat([steady(CHANGE), steady(CHANGE, factor, seed=1)])


@every_subject
def test_the_limit_follows_a_lasting_change_of_level(policy, within):
    found = decided(policy, torch.stack(list(map(changed, FACTORS)), dim=1))
    clips = (found.coef < 1).double()
    for factor, limit, clip in zip(FACTORS, found.limit.T, clips.T, strict=True):
        assert is_back(limit[CHANGE - 100 : CHANGE], 1.0).all(), factor
        assert is_back(limit[CHANGE + within :], factor).all(), factor
        assert clip[CHANGE + within :].mean() < clip[CHANGE // 2 : CHANGE].mean() + 0.2, factor


@every_subject
def test_a_clipper_has_the_limits_that_its_policy_decides(policy, within):
    norms = changed(max(FACTORS))
    found, records = decided(policy, norms), clipped(policy, norms)
    limits = torch.stack([record.limit for record in records])
    torch.testing.assert_close(limits, found.limit, rtol=1e-9, atol=0)
    assert [bool(record.clipped) for record in records] == (found.coef < 1).tolist()


@every_subject
def test_an_event_leaves_no_trace(policy, within, subtests):
    norms = steady(CHANGE)
    clean = torch.stack([r.limit for r in clipped(policy, norms)])
    assert is_back(clean[-100:], 1.0).all()
    for event, (step, value) in EVENTS.items():
        with subtests.test(event):
            with_event = torch.cat([norms[:step], torch.tensor([value]).double(), norms[step:]])
            records = clipped(policy, with_event)
            limits = torch.stack([r.limit for i, r in enumerate(records) if i != step])
            torch.testing.assert_close(limits, clean, rtol=0, atol=0)


@every_subject
def test_rare_spikes_never_look_like_a_new_level(policy, within):
    norms = steady(1000, slots=24)
    generator = torch.Generator().manual_seed(2)
    spikes = torch.rand(norms.shape, generator=generator) < 0.03
    spikes[:100] = False  # a start on spikes is another matter
    norms = torch.where(spikes, norms * 40, norms)
    found = decided(policy, norms)
    assert is_back(found.limit[200:], 1.0).all()
    assert ((norms * found.coef)[200:] < 2.2).all()
    if policy.type != "autoclip":
        never = decided(policy.model_copy(update={"escape_after": None}), norms)
        torch.testing.assert_close(found.limit, never.limit, rtol=0, atol=0)
        eager = decided(policy.model_copy(update={"escape_after": 2}), norms)
        assert not torch.equal(eager.limit, never.limit)
