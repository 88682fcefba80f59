"""What ZClip does over a run, and where it departs from the reference on purpose."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from gradclip import GradientClipper, ZClip


def limits(policy, norms):
    parameter = nn.Parameter(torch.zeros(1))
    clipper = GradientClipper(policy, [("p", parameter)])
    records = []
    for norm in norms:
        parameter.grad = torch.tensor([norm])
        records.append(clipper.clip())
    return records


def steady(count, level=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (level * torch.exp(0.1 * torch.randn(count, generator=generator))).tolist()


@pytest.mark.parametrize("factor", [2.0, 5.0, 0.2])
def test_a_lasting_change_of_level_is_followed(factor):
    norms = steady(200) + steady(200, factor, seed=1)
    policy = ZClip(max_norm=None)
    after = limits(policy, norms)[200 + 30 :]
    assert sum(bool(r.clipped) for r in after) < 20
    if factor >= 2:
        locked = limits(policy.model_copy(update={"escape_after": None}), norms)
        assert all(r.clipped for r in locked[230:])


def test_rare_spikes_never_look_like_a_new_level():
    norms = steady(1500)
    spikes = range(30, 1500, 33)
    for step in spikes:
        norms[step] *= 40
    records = limits(ZClip(max_norm=None), norms)
    for step in spikes:
        assert records[step].clipped
        assert records[step].clipped_norm < 2.0


def test_a_spike_in_the_warmup_does_not_blind_a_median_start():
    norms = steady(25)
    norms[7] = 500.0
    later = [*norms, 1.0, 1.1, 8.0]
    assert not limits(ZClip(max_norm=None), later)[-1].clipped
    assert limits(ZClip(max_norm=None, warmup="median"), later)[-1].clipped


def test_a_larger_spike_is_pulled_closer_to_the_mean():
    records = [limits(ZClip(max_norm=None), [*steady(25), x])[-1] for x in (2.0, 4.0, 16.0)]
    assert all(r.clipped for r in records)
    assert all(a.clipped_norm > b.clipped_norm for a, b in pairwise(records))


def test_exact_variance_is_the_exponentially_weighted_one():
    norms = steady(60)
    parameter = nn.Parameter(torch.zeros(1))
    policy = ZClip(max_norm=None, variance="exact", z_threshold=100.0, decay=0.9)
    clipper = GradientClipper(policy, [("p", parameter)])
    for norm in norms:
        parameter.grad = torch.tensor([norm])
        clipper.clip()
    values = torch.tensor(norms, dtype=torch.float32).double()
    mean, var = values[:25].mean(), values[:25].var(correction=0)
    for value in values[25:]:
        second = 0.9 * (var + mean**2) + 0.1 * value**2
        mean = 0.9 * mean + 0.1 * value
        var = second - mean**2
    state = clipper.state_dict()["policies"][0]["state"]
    torch.testing.assert_close(state["mean"][0], mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(state["var"][0], var, rtol=1e-6, atol=0)


def test_fields_are_checked():
    for field, value in (
        ("decay", 1.0),
        ("z_threshold", 0.0),
        ("z_threshold", math.nan),
        ("max_norm", -1.0),
        ("max_norm", True),
        ("warmup_steps", 1),
        ("warmup_steps", 2.5),
        ("escape_after", 0),
        ("mode", "zcore"),
        ("alpha", 0.9),
    ):
        with pytest.raises(ValueError, match=field):
            ZClip(**{field: value})
