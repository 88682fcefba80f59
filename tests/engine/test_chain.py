"""Several policies read the gradients once and write them once, as if each had done both."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gradients import SIZES, fill, flat, grads, optimizer_for, parameters

from gradclip import ClipByNorm, ClipByValue, ConfigError, GradientClipper, ZClip
from gradclip.norms import combine

norms = st.builds(
    ClipByNorm,
    max_norm=st.floats(0.01, 20.0),
    norm_type=st.sampled_from([1.0, 1.5, 2.0, 3.0, 7.0, math.inf]),
    scope=st.sampled_from(["global", "group", "parameter", "unit"]),
    eps=st.just(0.0),
)


def clip_once(policies, seed, size):
    params = parameters()
    fill(params, seed, size)
    GradientClipper(policies, params.items(), optimizer_for(params)).clip()
    return params


@settings(max_examples=60, deadline=None)
@given(chain=st.lists(norms, min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_a_list_equals_one_after_the_other(chain, seed):
    together = clip_once(chain, seed, 3.0)
    apart = parameters()
    fill(apart, seed, 3.0)
    for policy in chain:
        GradientClipper(policy, apart.items(), optimizer_for(apart)).clip()
    torch.testing.assert_close(flat(together), flat(apart), rtol=2e-6, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(policy=norms, seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_scaling_gradients_and_limit_scales_the_result(policy, seed, scale):
    scaled = policy.model_copy(update={"max_norm": policy.max_norm * scale})
    left, right = clip_once(policy, seed, 1.0), clip_once(scaled, seed, scale)
    torch.testing.assert_close(flat(left) * scale, flat(right), rtol=3e-6, atol=1e-6 * scale)


@settings(max_examples=40, deadline=None)
@given(policy=norms, seed=st.integers(0, 10**6))
def test_clipping_twice_changes_nothing_more(policy, seed):
    params = clip_once(policy, seed, 5.0)
    once = flat(params)
    GradientClipper(policy, params.items(), optimizer_for(params)).clip()
    torch.testing.assert_close(flat(params), once, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0, 1e200), min_size=1, max_size=6),
    p=st.sampled_from([1.0, 2.0, 3.0, 40.0, math.inf]),
)
def test_combining_slots_is_the_norm_of_their_norms(values, p):
    slots = torch.tensor(values, dtype=torch.float64)
    largest = max(values)
    scaled = slots / largest if largest else slots
    expected = torch.linalg.vector_norm(scaled, p) * (largest or 1.0)
    torch.testing.assert_close(combine(slots, p), expected, rtol=1e-12, atol=0)


def test_zclip_under_a_ceiling_sees_norms_before_the_ceiling():
    params, alone = parameters(), parameters()
    both = GradientClipper(
        [ZClip(warmup_steps=3, max_norm=None), ClipByNorm(max_norm=0.1)], params.items()
    )
    only = GradientClipper(ZClip(warmup_steps=3, max_norm=None), alone.items())
    for step, size in enumerate(SIZES):
        fill(params, step, size)
        fill(alone, step, size)
        record = both.clip()
        only.clip()
        assert record.clipped_norm <= 0.1 * (1 + 1e-6)
    first, second = both.state_dict()["policies"][0], only.state_dict()["policies"][0]
    assert torch.equal(first["state"]["mean"], second["state"]["mean"])


def test_value_stands_last():
    with pytest.raises(ConfigError, match=r"policies has 'value' before another policy; .*Move it"):
        GradientClipper(
            [ClipByValue(clip_value=1.0), ClipByNorm(max_norm=1.0)], parameters().items()
        )


def test_value_after_a_norm_clamps_what_the_norm_left():
    params = parameters()
    fill(params, 0, 10.0)
    before = flat(params)
    clipper = GradientClipper(
        [ClipByNorm(max_norm=2.0, eps=0.0), ClipByValue(clip_value=0.3)], params.items()
    )
    record = clipper.clip()
    expected = (before * (2.0 / before.norm())).clamp(-0.3, 0.3)
    torch.testing.assert_close(flat(params), expected, rtol=1e-6, atol=1e-8)
    assert record.clipped
    assert torch.isnan(record.clipped_norm)
    assert record.limit == 0.3


def test_groups_leave_the_others_as_if_they_were_absent():
    params = parameters()
    fill(params, 0, 3.0)
    before = grads(params)
    config = {
        "policies": [{"type": "norm", "max_norm": 1.0}],
        "groups": [
            {"match": "embed*", "policies": [{"type": "norm", "max_norm": 0.5}]},
            {"match": "*.bias", "policies": []},
            {"match": "*", "policies": [{"type": "value", "clip_value": 0.01}]},
        ],
    }
    # Everything the first two patterns leave matches the third, so the main list has nothing.
    GradientClipper(config, params.items()).clip()
    embed = before["embed.weight"]
    torch.testing.assert_close(params["embed.weight"].grad, embed * (0.5 / embed.norm()))
    assert torch.equal(params["layer.bias"].grad, before["layer.bias"])
    assert params["layer.weight"].grad.abs().max() <= 0.01 + 1e-9

    config["groups"].pop()
    fill(params, 0, 3.0)
    GradientClipper(config, params.items()).clip()
    rest = torch.cat([before["layer.weight"].reshape(-1), before["scale"].reshape(-1)])
    torch.testing.assert_close(
        params["layer.weight"].grad, before["layer.weight"] / rest.norm(), rtol=1e-5, atol=1e-7
    )


def test_a_pattern_that_matches_nothing_names_the_nearest():
    config = {
        "policies": [{"type": "norm", "max_norm": 1.0}],
        "groups": [{"match": "embd.weight", "policies": []}],
    }
    expected = r"groups\[0\]\.match is 'embd.weight' and matches no parameter; nearest names: embed"
    with pytest.raises(ConfigError, match=expected):
        GradientClipper(config, parameters().items())
