"""What holds for every policy. A new policy is added to `support.gradients.POLICIES`."""

import io
import math
from contextlib import contextmanager, nullcontext
from typing import get_args

import pytest
import torch
from support.gradients import (
    POLICIES,
    SIZES,
    assert_same_grads,
    fill,
    flat,
    grads,
    optimizer_for,
    parameters,
)
from support.malformed import REFUSED, answer, malformed

from gradclip import ClipConfig, GradientClipper, LogConfig, ZClip
from gradclip.adapters import ClipperSet
from gradclip.policies import AnyPolicy, ElementPolicy

every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
FAST = ("cpu", "accelerator")


def make(policy, **options):
    params = parameters()
    clipper = GradientClipper(policy, params.items(), optimizer_for(params), **options)
    return params, clipper


def run(params, clipper, steps, first=0):
    records = []
    for step in range(first, first + steps):
        fill(params, step, SIZES[step % len(SIZES)])
        records.append(clipper.clip())
    return records


def test_no_policy_is_missing_here():
    union = get_args(AnyPolicy)[0]
    assert {type(policy) for policy in POLICIES.values()} == set(get_args(union))


@every_policy
def test_state_round_trip_is_bitwise(policy):
    params, clipper = make(policy)
    run(params, clipper, 7)
    buffer = io.BytesIO()
    torch.save(clipper.state_dict(), buffer)
    buffer.seek(0)
    others, restored = make(policy)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    for record, again in zip(
        run(params, clipper, 50, first=7), run(others, restored, 50, first=7), strict=True
    ):
        for key, value in record.as_metrics().items():
            torch.testing.assert_close(
                again.as_metrics()[key], value, rtol=0, atol=0, equal_nan=True
            )
        assert_same_grads(grads(params), grads(others))


@every_policy
def test_the_clipper_of_a_new_optimizer_goes_on_as_if_it_were_the_same(policy):
    params, clipper = make(policy)
    run(params, clipper, 7)
    again = GradientClipper(policy, params.items(), optimizer_for(params))
    assert again.go_on_from([clipper]) is clipper
    whole, expected = make(policy)
    run(whole, expected, 7)
    for step in range(7, 19):
        [record], [wanted] = run(params, again, 1, step), run(whole, expected, 1, step)
        assert repr(record.as_metrics()) == repr(wanted.as_metrics())
        assert_same_grads(grads(params), grads(whole))
    assert repr(again.state_dict()) == repr(expected.state_dict())


@every_policy
def test_every_state_that_steps_lead_to_is_taken_in(policy):
    for on_nonfinite in ("skip", "ignore"):
        config = ClipConfig(policies=[policy], on_nonfinite=on_nonfinite)
        params, clipper = make(config)
        _, other = make(config)
        other.load_state_dict(clipper.state_dict())
        for step in range(40):
            fill(params, step, 10.0 ** ((7 * step) % 11 - 5))
            if step % 7 == 5:
                params["layer.weight"].grad[0, 0] = (math.nan, math.inf)[step % 2]
            if step % 6 == 4:
                params["embed.weight"].grad = None
            if step % 13 == 12:
                fill(params, step, 0.0)
            clipper.clip(share=(1.0, 0.5)[step % 2])
            other.load_state_dict(clipper.state_dict())
        assert set(other.state_dict()["policies"][0]["state"]) <= set(policy.ranges)


@every_policy
def test_a_state_that_no_steps_lead_to_is_refused_whole(policy):
    params, clipper = make(policy)
    run(params, clipper, 7)
    params, other = make(policy)
    run(params, other, 5)
    before, tried = repr(other.state_dict()), 0
    has_slots = bool(clipper.state_dict()["policies"][0]["state"])
    for where, state in malformed(clipper.state_dict()):
        if ".slots" in where and not has_slots:  # a fixed rule may have another scope
            continue
        found = answer(other.load_state_dict, state)
        assert found.startswith(REFUSED), (where, found)
        assert "fresh state" in found, where
        tried += 1
    assert tried > 80
    assert repr(other.state_dict()) == before
    assert other.flush()["clip/nonfinite"] == 0
    assert other.recorder.tally.made == 5


def test_a_state_whose_entries_contradict_each_other_is_refused():
    """Each entry might be, but not beside the others."""
    for name, entry, number in CONTRADICTIONS:
        params, clipper = make(POLICIES[name])
        run(params, clipper, 12)
        state = clipper.state_dict()
        clipper.load_state_dict(state)
        where = state["counts"] if entry in state["counts"] else state["policies"][0]["state"]
        where[entry] = torch.full_like(where[entry], number)
        found = answer(clipper.load_state_dict, state)
        assert found.startswith(REFUSED), (name, entry, found)


def test_of_several_clippers_all_states_are_taken_in_or_none():
    policy = ZClip(warmup_steps=3)

    def made():
        params = parameters()
        optimizers = [torch.optim.SGD([p], lr=0.1) for p in list(params.values())[:2]]
        return params, ClipperSet.build(policy, params.items(), optimizers)

    params, clippers = made()
    for clipper in clippers:
        run(params, clipper, 5)
    saved = clippers.state_dict([5, 5])
    _, other = made()
    before = repr(other.state_dict([0, 0]))
    for where, state in malformed(saved):
        found = answer(lambda s: other.checked(s, with_steps=True)(), state)
        assert found.startswith((REFUSED, "ConfigError: The saved clip state")), (where, found)
        assert ("clippers[1]" in found) or not where.startswith(".clippers[1]."), found
    assert repr(other.state_dict([0, 0])) == before
    assert other.checked(saved, with_steps=True)() == [5, 5]
    assert (after := repr(other.state_dict([5, 5]))) == repr(saved)
    for entry in saved["clippers"]:
        entry["policies"][0]["state"]["mean"].fill_(math.nan)
    assert repr(other.state_dict([5, 5])) == after  # nothing is shared with what was loaded


CONTRADICTIONS = (
    ("norm", "clipped", 13),
    ("norm", "taken", 13),
    ("norm", "steps", 3),
    ("norm", "nonfinite", 13),
    ("zclip", "recent", 0),
    ("zclip", "mean", 0),
    ("zclip", "streak", -13),
    ("ema", "mean", 0),
    ("ema", "weight", 0),
    ("ema", "streak", 13),
    ("ema", "recent", 0),
    ("autoclip", "recent", 0),
    ("autoclip_all", "seen", 11),
    ("autoclip_all", "counts", 0),
    ("adagc", "mean", 0),
    ("adagc", "streak", 13),
    ("spike_max", "mean", 0),
    ("skip_nonfinite", "before", 1),
    ("skip_large", "before", 9),
    ("skip_spike", "seen", 1),
    ("skip_large_ema", "mean", 0),
    ("skip_large_ema", "weight", 0),
    ("skip_large_percentile", "norms", 0),
)
"""A policy, the entry of its state that is set, and to what."""


BAD_STEPS = {2: math.nan, 5: math.inf, 7: -math.inf}
"""What one element is before which step: in the warm-up, and after it."""


@every_policy
def test_a_nonfinite_step_leaves_no_trace(policy):
    for on_nonfinite in ("skip", "ignore"):
        config = ClipConfig(policies=[policy], on_nonfinite=on_nonfinite)
        params, clipper = make(config)
        others, clean = make(config)
        withholds = on_nonfinite == "skip" or policy.type == "skip_nonfinite"
        for step in range(16):
            if step in BAD_STEPS:
                fill(params, 99)
                params["layer.weight"].grad[0, 0] = BAD_STEPS[step]
                record = clipper.clip()
                assert not record.finite
                assert not torch.isfinite(record.grad_norm)
                assert record.coef > 0
                assert bool(record.skipped) == withholds
                assert (params["scale"].grad is None) == withholds
            [after], [expected] = run(params, clipper, 1, step), run(others, clean, 1, step)
            assert after.limit == expected.limit
            assert after.coef == expected.coef
            assert_same_grads(grads(params), grads(others))


@every_policy
def test_raise_leaves_everything_as_it_was(policy):
    params, clipper = make(ClipConfig(policies=[policy], on_nonfinite="raise"))
    run(params, clipper, 6)
    fill(params, 99, 50.0)
    params["layer.bias"].grad[1] = math.nan
    before, state = grads(params), clipper.state_dict()
    with pytest.raises(RuntimeError, match=r"NaN or infinite, on this rank in layer\.bias;"):
        clipper.clip()
    for name, value in grads(params).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert_same_states(clipper, state)


def assert_same_states(clipper, state):
    """Policies remember what this saved state holds, bit by bit."""
    for entry, old in zip(clipper.state_dict()["policies"], state["policies"], strict=True):
        for name, value in entry["state"].items():
            assert torch.equal(value, old["state"][name])
        for name, own in entry.get("elements", {}).items():
            for key, value in own.items():
                assert torch.equal(value, old["elements"][name][key])


@every_policy
def test_coefficient_direction_and_limit(policy):
    for kernel in FAST:
        params, clipper = make(policy, kernel=kernel)
        for step in range(12):
            fill(params, step, SIZES[step])
            before = flat(params)
            record = clipper.clip()
            assert 0 < record.coef <= 1
            if record.skipped:
                assert policy.withholds
                assert all(p.grad is None for p in params.values())
            else:
                check_scaled(policy, record, before, flat(params))


def check_scaled(policy, record, before, after):
    """A step that is taken has its direction, its limit and the norm that the record says."""
    assert record.clipped == (not torch.equal(before, after))
    if isinstance(policy, ElementPolicy):
        assert record.coef == 1
        if policy.type == "value":
            assert after.abs().max() <= policy.clip_value + 1e-7
    elif policy.measured[0] == "global":
        torch.testing.assert_close(after, before * record.coef, rtol=1e-6, atol=1e-9)
        norm = torch.linalg.vector_norm(after, policy.measured[1] or 2.0)
        assert norm <= record.limit * (1 + 1e-6)
        torch.testing.assert_close(record.clipped_norm, norm, rtol=1e-6, atol=0)


@every_policy
def test_at_or_below_the_limit_bits_stay(policy):
    for kernel in FAST:
        params, clipper = make(policy, kernel=kernel)
        for step in range(8):
            fill(params, step, 1e-3)
            before = grads(params)
            record = clipper.clip()
            if not record.clipped:
                assert_same_grads(grads(params), before)
        assert record.coef <= 1


@every_policy
def test_zero_and_missing_gradients(policy):
    params, clipper = make(policy)
    run(params, clipper, 6)
    state = clipper.state_dict()
    for parameter in params.values():
        parameter.grad = torch.zeros_like(parameter)
    record = clipper.clip()
    assert record.grad_norm == 0
    assert record.coef == 1
    assert record.limit > 0
    assert all((p.grad == 0).all() for p in params.values())
    assert_same_states(clipper, state)
    counts = {**state["counts"], "steps": 7, "taken": state["counts"]["taken"] + 1}
    assert clipper.state_dict()["counts"] == counts
    for parameter in params.values():
        parameter.grad = None
    assert clipper.clip().grad_norm == 0
    assert_same_states(clipper, state)
    assert clipper.state_dict()["counts"] == counts


@every_policy
def test_grad_scale_changes_nothing_but_the_gradients(policy):
    scale = 65536.0
    params, clipper = make(policy)
    others, scaled = make(policy)
    for step in range(10):
        fill(params, step, SIZES[step])
        fill(others, step, SIZES[step] * scale)
        record = clipper.clip()
        other = scaled.clip(grad_scale=torch.tensor(scale))
        torch.testing.assert_close(other.limit, record.limit, rtol=1e-9, atol=0)
        torch.testing.assert_close(other.grad_norm, record.grad_norm, rtol=1e-6, atol=0)
        assert other.skipped == record.skipped
        for name, grad in grads(others).items() if not record.skipped else ():
            torch.testing.assert_close(grad / scale, params[name].grad, rtol=1e-6, atol=1e-7)


@every_policy
def test_kernels_agree(policy):
    runs = []
    for kernel in ("reference", *FAST):
        params, clipper = make(policy, kernel=kernel)
        runs.append([record.as_metrics() for record in run(params, clipper, 12)])
    for reference, *others in zip(*runs, strict=True):
        for metrics in others:
            for key, value in metrics.items():
                torch.testing.assert_close(
                    value, reference[key], rtol=1e-6, atol=1e-9, equal_nan=True, msg=key
                )


def test_configuration_survives_json():
    for policy in POLICIES.values():
        config = ClipConfig(policies=[policy])
        assert ClipConfig.model_validate_json(config.model_dump_json()) == config


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "device": lambda: torch.device("meta"),  # whatever follows it loses its data
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "inference": torch.inference_mode,
}
"""What a script may set for its own tensors, around some of our calls and not around others."""


def lazy_or_not(first, policy):
    """Records and parameters of a run whose first layer may have no shape before it begins."""
    params = torch.nn.ModuleDict({"first": first, "last": torch.nn.Linear(4, 2)})
    optimizer = optimizer_for(dict(params.named_parameters()))
    groups = [{"match": "first.bias", "counted": False}]
    policy = policy.model_copy(update={"exclude": ["last.bias"]}) if policy.excluded else policy
    clipper = GradientClipper(ClipConfig(policies=[policy], groups=groups), params, optimizer)
    clipper.attach(optimizer)
    first(torch.ones(1, 3))  # gives a lazy layer its shape
    for parameter in params.parameters():
        torch.nn.init.ones_(parameter)
    found = []
    for step, size in enumerate(SIZES):
        fill(dict(params.named_parameters()), step, size)
        clipper.observe_loss(size)
        optimizer.step()
        found += clipper.last_record.as_metrics().values()
        found += grads(dict(params.named_parameters())).values()
    return found


@every_policy
def test_a_lazy_model_is_clipped_as_any_other_from_the_first_step(policy):
    lazy = lazy_or_not(torch.nn.LazyLinear(4), policy)
    ordinary = lazy_or_not(torch.nn.Linear(3, 4), policy)
    torch.testing.assert_close(lazy, ordinary, rtol=0, atol=0, equal_nan=True)


def seen_under(policy, kernel, setting):
    """Everything a run shows: records, gradients, metrics and state."""
    log = LogConfig(per_parameter=policy.measured[0] != "global", per_group=True, histograms=True)
    config = ClipConfig(policies=[policy], log=log)
    params = parameters()
    optimizer = optimizer_for(params)
    with setting():
        clipper = GradientClipper(config, params.items(), optimizer, kernel=kernel)
    found = []
    for step in range(12):
        fill(params, step, SIZES[step])
        around = setting if step % 3 else nullcontext
        with around():
            if clipper.watches_loss:
                clipper.observe_loss(0.1 * step)
            record = clipper.clip()
        found += [*record.as_metrics().values(), *grads(params).values()]
        if step in (4, 8):
            with around():
                found += clipper.flush().values()
                state = clipper.state_dict()
                clipper.load_state_dict(state)
            for entry in state["policies"]:
                found += entry["state"].values()
    return found


@every_policy
def test_defaults_for_new_tensors_change_nothing(policy):
    for kernel in FAST:
        plain = seen_under(policy, kernel, nullcontext)
        for name, setting in SETTINGS.items():
            under = seen_under(policy, kernel, setting)
            torch.testing.assert_close(under, plain, rtol=0, atol=0, equal_nan=True, msg=name)
