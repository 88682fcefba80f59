"""Limits that follow the step, policies that start later, floors and ceilings."""

import io
import math

import pytest
import torch
from support.gradients import SHAPES, SIZES, assert_same_grads, fill, grads, parameters
from support.vectors import cases
from torch._subclasses.fake_tensor import FakeTensorMode

from gradclip import (
    AdaGC,
    AutoClip,
    ClipByNorm,
    ClipByValue,
    ClipConfig,
    ConfigError,
    EmaClip,
    GradientClipper,
    Schedule,
    SkipNonfinite,
    Spam,
    SpikeMax,
    UClip,
    ZClip,
    after,
    load_yaml,
)

RISING = Schedule(schedule="linear", start=1.0, end=3.0, steps=8)
SCHEDULES = {
    "linear": RISING,
    "cosine": Schedule(schedule="cosine", start=4.0, end=0.5, steps=9, begin=3),
    "warmup_cosine": Schedule(
        schedule="warmup_cosine", start=0.5, peak=3.0, end=1.0, warmup_steps=3, steps=10
    ),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def from_optax(case):
    """The recorded case in our words."""
    given = case["params"]
    kind = case["policy"].removeprefix("threshold_schedule_")
    if kind != "warmup_cosine":
        steps, begin = given["transition_steps"], given["transition_begin"]
        return Schedule(
            schedule=kind, start=given["start"], end=given["end"], steps=steps, begin=begin
        )
    return Schedule(
        schedule=kind,
        start=given["init"],
        peak=given["peak"],
        end=given["end"],
        warmup_steps=given["warmup_steps"],
        steps=given["decay_steps_total"],
    )


def limit(policy):
    params = parameters()
    return params, GradientClipper(policy, params.items())


def step(params, clipper, index):
    fill(params, index, SIZES[index % len(SIZES)])
    return clipper.clip()


@pytest.mark.parametrize("case", cases("optax_threshold_schedules"))
def test_optax_at_every_step(case):
    schedule = from_optax(case)
    params, clipper = limit(ClipByNorm(max_norm=schedule))
    for index, want in enumerate(case["outputs"]["threshold"]):
        at = schedule.at(torch.tensor(float(index), dtype=torch.float64))
        assert at.dtype == torch.float64
        assert at.shape == ()
        assert float(at) == pytest.approx(want, rel=1e-5)
        record = step(params, clipper, index)
        assert record.limit == at
        assert record.clipped == (record.grad_norm > at)
        assert record.clipped_norm <= at * (1 + 1e-6)
    assert index == 59


def test_no_steps_is_the_end_at_once():
    for start in (0.1, 5.0):
        for kind in ("linear", "cosine"):
            schedule = Schedule(schedule=kind, start=start, end=2.0, steps=0)
            assert [float(schedule.at(torch.tensor(t))) for t in (0, 1, 50)] == [2.0] * 3
        short = Schedule(
            schedule="warmup_cosine", start=1.0, peak=start, end=2.0, warmup_steps=3, steps=3
        )
        assert float(short.at(torch.tensor(3))) == 2.0


def nothing_taken(params, clipper):
    """Steps that never reach the optimizer: not finite, withheld, without gradients."""
    for bad in (math.nan, math.inf):
        fill(params, 99)
        params["layer.weight"].grad[0, 0] = bad
        assert not clipper.clip().finite
    for parameter in params.values():
        parameter.grad = None
    assert clipper.clip().grad_norm == 0


@every_schedule
@pytest.mark.parametrize("on_nonfinite", ["skip", "ignore"])
def test_only_steps_that_are_taken_move_it(schedule, on_nonfinite):
    config = ClipConfig(policies=[ClipByNorm(max_norm=schedule)], on_nonfinite=on_nonfinite)
    params, clipper = limit(config)
    found = []
    for index in range(16):
        if index % 4 == 1:
            nothing_taken(params, clipper)
        found.append(step(params, clipper, index).limit)
    assert found == [schedule.at(torch.tensor(float(t))) for t in range(16)]


def test_a_withheld_step_is_not_taken():
    config = {
        "policies": [
            {"type": "norm", "max_norm": SCHEDULES["cosine"].model_dump()},
            {"type": "skip_nonfinite"},
        ],
        "on_nonfinite": "ignore",
    }
    params, clipper = limit(config)
    for index in range(6):
        step(params, clipper, index)
    nothing_taken(params, clipper)
    assert clipper.state_dict()["counts"]["skipped"] == 2
    assert step(params, clipper, 6).limit == SCHEDULES["cosine"].at(torch.tensor(6.0))


@every_schedule
def test_it_goes_on_where_it_was_saved(schedule):
    policy = ZClip(warmup_steps=3, max_norm=schedule, min_norm=0.2, after=2)
    params, clipper = limit(policy)
    for index in range(5):
        step(params, clipper, index)
    nothing_taken(params, clipper)
    buffer = io.BytesIO()
    torch.save(clipper.state_dict(), buffer)
    buffer.seek(0)
    others, restored = limit(policy)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    for index in range(5, 16):
        record, again = step(params, clipper, index), step(others, restored, index)
        assert again.limit == record.limit
        assert again.coef == record.coef
        assert_same_grads(grads(others), grads(params))


LATE = {
    "norm": ClipByNorm(max_norm=0.5),
    "value": ClipByValue(clip_value=0.05),
    "zclip": ZClip(warmup_steps=3, max_norm=1.0, escape_after=4),
    "zclip_parameter": ZClip(warmup_steps=3, max_norm=0.5, scope="parameter"),
    "ema": EmaClip(warmup_steps=3, factor=1.1),
    "adagc": AdaGC(warmup_steps=3),
    "autoclip": AutoClip(warmup_steps=3, window=8),
    "spam": Spam(theta=9.0, warmup_steps=2, moment="own"),
    "spike_max": SpikeMax(),
    "uclip": UClip(limit=0.5),
}


@pytest.mark.parametrize("policy", LATE.values(), ids=LATE.keys())
def test_before_its_step_a_policy_is_absent_then_it_starts_afresh(policy):
    for kernel in ("cpu", "accelerator", "reference"):
        params, late = parameters(), parameters()
        clipper = GradientClipper(policy, params.items(), kernel=kernel)
        waiting = GradientClipper(after(4, policy), late.items(), kernel=kernel)
        check_absent(late, waiting, steps=4)
        for index in range(14):
            record, delayed = step(params, clipper, index), step(late, waiting, index)
            assert delayed.limit == record.limit
            assert delayed.coef == record.coef
            assert_same_grads(grads(late), grads(params))
        assert clipper.state_dict()["counts"]["clipped"] > 0


def check_absent(params, clipper, steps):
    """For so many steps nothing is clipped and nothing learnt, whatever comes."""
    fresh = clipper.state_dict()["policies"][0]["state"]
    for index in range(steps):
        fill(params, index, 5.0)
        before = grads(params)
        record = clipper.clip()
        assert_same_grads(grads(params), before)
        assert record.limit == math.inf
        assert record.coef == 1
        assert not record.clipped
        assert record.clipped_norm == record.grad_norm
        nothing_taken(params, clipper)
        for name, value in clipper.state_dict()["policies"][0]["state"].items():
            assert torch.equal(value, fresh[name]), name


def test_what_withholds_waits_too():
    config = ClipConfig(policies=[after(2, SkipNonfinite())], on_nonfinite="ignore")
    params, clipper = limit(config)
    withheld = []
    for index in range(4):
        fill(params, index)
        params["scale"].grad.fill_(math.nan)
        withheld.append(bool(clipper.clip().skipped))
        step(params, clipper, index)
    assert withheld == [False, False, True, True]


def test_after_is_a_field_of_every_policy():
    assert after(3, ZClip(decay=0.9)) == ZClip(decay=0.9, after=3)
    for wrong in (-1, 1.5, True, "3"):
        with pytest.raises(ValueError, match="after"):
            after(wrong, ZClip())


@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_floor_and_ceiling_bound_the_limit_and_not_what_is_learnt(scope):
    size = 6.0 if scope == "global" else 2.0
    low = Schedule(schedule="linear", start=0.5 * size, end=3 * size, steps=25)
    high = Schedule(schedule="cosine", start=20.0 * size, end=size, steps=38)
    free = ZClip(warmup_steps=4, max_norm=None, scope=scope)
    params, clipper = limit(free)
    others, held = limit(free.model_copy(update={"min_norm": low, "max_norm": high}))
    floored = capped = 0
    for index in range(40):
        found, bounded = step(params, clipper, index), step(others, held, index)
        t = torch.tensor(float(index), dtype=torch.float64)
        want = torch.minimum(torch.maximum(found.limit, low.at(t)), high.at(t))
        if scope == "global":
            assert bounded.limit == want
        floored += bool(want > found.limit)
        capped += bool(want < found.limit)
        assert low.at(t) <= bounded.limit or high.at(t) < low.at(t)
        assert bounded.limit <= high.at(t)
        learnt, kept = (c.state_dict()["policies"][0]["state"] for c in (clipper, held))
        assert all(torch.equal(learnt[name], kept[name]) for name in learnt)
    assert floored > 3
    assert capped > 3


def test_a_floor_above_the_ceiling_is_refused():
    with pytest.raises(ValueError, match=r"min_norm 2.0 above max_norm 1.0; allowed: at most"):
        ZClip(min_norm=2.0)


FAULTS = [
    ("start: 10", "strat: 10", r"max_norm\.strat is not a known key; did you mean 'start'\?"),
    ("cosine", "cosin", r"max_norm\.schedule is 'cosin'; allowed: 'linear', 'cosine' or"),
    ("start: 10", "start: -1", r"max_norm\.start is -1; it must be greater than 0"),
    ("end: 1", "end: .inf", r"max_norm\.end is inf; it must be a finite number"),
    ("end: 1,", "", r"max_norm\.end is missing; add it"),
    ("steps: 5", "steps: 2.5", r"max_norm\.steps is 2.5; it must be a valid integer"),
    ("steps: 5", "steps: -5", r"max_norm\.steps is -5; it must be greater than or equal to 0"),
    ("steps: 5", "steps: 5, peak: 3", r"max_norm has peak or warmup_steps, and schedule 'cosine'"),
    ("cosine", "warmup_cosine", r"max_norm 'warmup_cosine' needs a peak"),
]


def test_a_fault_in_a_schedule_says_where_and_what(tmp_path):
    text = (
        "policies:\n  - type: norm\n    max_norm: {schedule: cosine, start: 10, end: 1, steps: 5}\n"
    )
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert isinstance(load_yaml(path).policies[0].max_norm, Schedule)
    for old, new, message in FAULTS:
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=rf"run\.yaml, line 3: policies\[0\]\.{message}"):
            load_yaml(path)


@every_schedule
def test_no_host_read(schedule):
    policies = [
        ZClip(warmup_steps=2, max_norm=schedule, min_norm=schedule, after=3),
        ClipByNorm(max_norm=schedule, scope="parameter"),
        ClipByValue(clip_value=0.1, after=2),
    ]
    with FakeTensorMode():  # a read of a value raises
        params = {
            name: torch.nn.Parameter(torch.empty(shape, device="cuda"))
            for name, shape in SHAPES.items()
        }
        config = ClipConfig(policies=policies, on_nonfinite="ignore")
        clipper = GradientClipper(config, params.items())
        for parameter in params.values():
            parameter.grad = torch.empty_like(parameter)
        for _ in range(2):
            record = clipper.clip()
        assert record.limit.device.type == "cuda"
