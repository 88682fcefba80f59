"""Sequences made by running the reference implementations, reproduced step by step.

`tests/vectors/FORMAT.md` says how the files are laid out and what each conformance mode asks.
`TABLE` has a row for each file of sequences: which policy the reference is in our words, and what
is compared at each step. Tensors clipped one by one, withheld steps, and the faults of references
that we don't reproduce follow below it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.vectors import (
    UNDERFLOW,
    case_of,
    cases,
    check_grads,
    check_norm_after,
    check_step,
    is_checked,
    load,
    norm_of,
    number,
    numbers,
    replay,
    sequence,
    tensor,
)
from support.withheld import withheld

from gradclip import (
    AGC,
    AdaGC,
    AutoClip,
    ClipByNorm,
    ClipByRMS,
    ClipByValue,
    GradientClipper,
    NonFiniteError,
    SkipLarge,
    SkipNonfinite,
    SkipSpike,
    Spam,
    SpikeMax,
    ZClip,
    clip_grad_norm_,
)

FAST = ("cpu", "accelerator")
KERNELS = (*FAST, "reference")


def norm(given):
    return ClipByNorm(max_norm=given["max_norm"], norm_type=number(given["norm_type"]))


def norm_step(step, given):
    if number(given["norm_type"]) == 2.0:
        check_step(step, given["max_norm"])
        return
    grad_norm = pytest.approx(step.want("grad_norm"), rel=1e-5, abs=UNDERFLOW)
    assert float(step.record.grad_norm) == grad_norm
    assert float(step.record.coef) == pytest.approx(step.want("coef") or 1.0, rel=1e-5)
    check_norm_after(step)  # the recorded norm after clipping is always a 2-norm


def zclip(given):
    same = ("eps", "warmup_steps", "mode", "clip_option", "clip_factor", "skip_update_on_spike")
    return ZClip(
        decay=given["alpha"],
        z_threshold=given["z_thresh"],
        max_norm=given["max_grad_norm"],
        escape_after=None,
        **{name: given[name] for name in same},
    )


def zclip_step(step, given):
    threshold = step.want("threshold")
    check_step(step, threshold)
    for name in ("mean", "var"):
        want = step.want_state(name)
        if want is not None:
            assert float(step.state(name)) == pytest.approx(want, rel=1e-4, abs=1e-9)
    if not step.record.coef < 1:
        return False
    assert float(step.record.limit) == pytest.approx(threshold, rel=1e-5)
    return step.want_state("adaptive_threshold") is not None


def simple(given):
    """By parameter, by group, or by value."""
    if "groups" in given:
        first, second = (group["max_norm"] for group in given["groups"])
        return {
            "policies": [{"type": "norm", "max_norm": first}],
            "groups": [{"match": "p[23]", "policies": [{"type": "norm", "max_norm": second}]}],
        }
    if "clip_value" in given:
        return ClipByValue(clip_value=given["clip_value"])
    return ClipByNorm(max_norm=given["max_norm"], scope="parameter")


def simple_step(step, given):
    check_norm_after(step)
    check_grads(step)


def spam(given):
    return Spam(
        theta=given["threshold"],
        decay=given["betas"][1],
        warmup_steps=given["grad_accu_steps"],
        reset_every=given["DeltaT"],
        bias_correction=False,
        moment="own",
        floor=0.0,
    )


def spam_step(step, given):
    simple_step(step, given)
    assert bool(step.record.clipped) == (step.want("coef") != 1)
    if step.at % 20 == 0:
        saved = step.clipper.state_dict()["policies"][0]["elements"]
        squares = sum(float(own["square"].double().sum()) for own in saved.values())
        assert squares == pytest.approx(step.want_state("v_sum"), rel=1e-4)
    return bool(step.record.clipped)


CLIPPED_LATER = 153
"""Where the sequence has its first inf, which AdamWClip clamps and takes in and we leave out."""


def adamwclip(given):
    return Spam(
        theta=given["clip_grad_adapt"] ** 2,
        decay=given["betas"][1],
        warmup_steps=given["clip_grad_warm_up"],
        moment="own",
    )


def adamwclip_step(step, given):
    simple_step(step, given)
    return bool(step.record.clipped)


def spike_max_step(step, given):
    """AdaGN, applied after it there, is one factor for each tensor, which is divided out."""
    raw = step.state("mean") * (1 - step.state("weight"))
    for i, grad in enumerate(step.grads):
        assert float(raw[i]) == pytest.approx(step.want_state(f"m_max_{i}"), rel=1e-4)
        largest = step.want_state(f"after_adaclip_max_{i}")
        if largest is not None:  # the port doesn't show it
            assert float(grad.abs().max()) == pytest.approx(largest, rel=1e-4)
    wanted = step.case["outputs"]["post_grads_at"].get(str(step.at), [])
    for got, want in zip(step.grads, wanted, strict=False):
        want = torch.tensor(numbers(want)).double().reshape(got.shape)
        got = got.double() * (want.norm() / got.double().norm())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    return bool(step.record.clipped)


def adagc(given):
    return AdaGC(
        scope="global" if "granularity" in given else "parameter",
        decay=given["beta"],
        factor=given["lambda_rel"],
        warmup_norm=given["lambda_abs"],
        warmup_steps=given["warmup_steps"],
        warmup="min",
        mean_floor=0.0,
        escape_after=None,
        eps=given["eps"],
    )


def adagc_step(step, given):
    norms = [grad.double().norm() for grad in step.grads]
    if "granularity" in given:
        norms = [torch.stack(norms).norm()]
        assert float(step.record.coef) == pytest.approx(step.want("coef"), rel=1e-5)
    clipped = 0
    ready = step.state("seen").min() >= given["warmup_steps"]
    for i, after in enumerate(norms):
        want = {
            name: step.want_state(f"{name}_{i}")
            for name in ("norm", "gamma_before", "gamma_after", "post_norm")
        }
        assert float(after) == pytest.approx(want["post_norm"], rel=1e-5, abs=1e-6)
        assert float(step.state("mean")[i]) == pytest.approx(want["gamma_after"], rel=1e-4)
        if ready:
            clipped += want["norm"] > given["lambda_rel"] * want["gamma_before"]
    assert float(step.record.clipped_norm) == pytest.approx(step.want("post_norm"), rel=1e-5)
    check_grads(step)
    return clipped


def paper(given, history):
    """AutoClip's own code: inclusive, over the whole run, which a window of 400 holds."""
    return AutoClip(
        percentile=given["clip_percentile"],
        history=history,
        window=400,
        warmup_steps=1,
        inclusive=True,
    )


def check_limit(step, rel):
    threshold = number(step.case["outputs"]["threshold"][step.at] or math.inf)
    if math.isfinite(threshold):
        assert float(step.record.limit) == pytest.approx(threshold, rel=rel)


def exact_step(step, given):
    check_step(step, number(step.case["outputs"]["threshold"][step.at] or math.inf))
    check_limit(step, 1e-5)


def windowed(given):
    return AutoClip(
        percentile=given["quantile"] * 100,
        window=given["history_length"],
        warmup_steps=1,
        scope="global" if given["global_threshold"] else "parameter",
    )


def windowed_step(step, given):
    if given["global_threshold"]:
        exact_step(step, given)
    else:
        after = pytest.approx(step.want("post_norm"), rel=1e-5)
        assert float(step.record.clipped_norm) == after


def trellis(given):
    return AutoClip(
        percentile=given["clip_percentile"],
        window=given["buffer_size"],
        warmup_steps=given["buffer_size"],
        max_norm=given["max_norm"],
    )


class Row(NamedTuple):
    """A file of sequences, and how we reproduce it.

    Attributes:
        file: Its name.
        policy: From the parameters of a case, the policy that is the reference.
        check: What holds at one step; returns whether (or how often) the rule clipped there.
        kernels: Each of them must give it.
        steps: A case compares more steps than this.
        clips: Over a case the rule clips more often than this; by the number of its steps and its
            parameters.
        without: Beginnings of the names of cases that a test below looks at in place of this one.
        until: Compare no step from here on in cases of mode match_until.
        mark: Tells rows of one file apart.
    """

    file: str
    policy: Callable[[dict[str, Any]], Any]
    check: Callable[..., Any]
    kernels: tuple[str | None, ...] = (None,)
    steps: int = 100
    clips: Callable[[int, dict[str, Any]], int] = lambda _, __: -1
    without: str = "nothing"
    until: float = math.inf
    mark: str = ""


TABLE = [
    Row("torch_clip_grad_norm", norm, norm_step, KERNELS),
    Row("zclip", zclip, zclip_step, steps=5, clips=lambda seen, _: -1 if seen < 100 else 0),
    Row("torch_per_param_group_value", simple, simple_step, steps=1),
    Row(
        "spam_official",
        spam,
        spam_step,
        KERNELS,
        clips=lambda _, given: -1 if given["threshold"] == 5000 else 0,
    ),
    Row(
        "adamwclip",
        adamwclip,
        adamwclip_step,
        clips=lambda _, __: 10,
        without="cfg0/clean",
        until=CLIPPED_LATER,
    ),
    *(
        Row(
            file,
            lambda given: SpikeMax(decay=given["theta"]),
            spike_max_step,
            steps=90,
            clips=lambda _, __: 30,
        )
        for file in ("stablespam_port", "stablespam_official")
    ),
    Row("adagc_port", adagc, adagc_step, FAST, clips=lambda _, __: 5),
    Row("autoclip_official", lambda given: paper(given, "window"), exact_step),
    Row(
        "autoclip_official",
        lambda given: paper(given, "all"),
        lambda step, _: check_limit(step, 0.005),
        mark="by sketch",
    ),
    Row("autoclip_pypi", windowed, windowed_step, without="standard"),
    Row("trellis_windowed_percentile", trellis, exact_step),
]


@pytest.mark.parametrize(
    ("row", "case"),
    [
        pytest.param(row, case, id=" ".join(filter(None, [row.file, row.mark, case["id"]])))
        for row in TABLE
        for case in load(row.file)["cases"]
        if not case["id"].startswith(row.without)
    ],
)
def test_every_step_of_the_reference(row, case):
    given = case["params"]
    for kernel in row.kernels:
        seen = clipped = 0
        for step in replay(row.file, case, row.policy(given), kernel):
            late = case["conformance"]["mode"] == "match_until" and step.at >= row.until
            if late or not is_checked(row.file, case, step.at):
                continue
            clipped += int(row.check(step, given) or 0)
            seen += 1
        assert seen > row.steps
        assert clipped > row.clips(seen, given)


# Tensors clipped one by one: by unit, tensor or whole model.

BY_VARIANT = {"clip_by_global_norm", "global_clipnorm-1.0", "norm"}
RULES = {
    "agc_unitwise": lambda given: AGC(
        clip_factor=given["clip_factor"],
        eps=given["eps"],
        norm_type=given.get("norm_type", 2.0),
        grad_floor=given["grad_floor"],
    ),
    "agc_unitwise_optax_layout": lambda given: AGC(
        clip_factor=given["clipping"], eps=given["eps"], axes="optax"
    ),
    "agc_unitwise_no_eps": lambda given: AGC(
        clip_factor=given["clipping_threshold"], eps=0.0, grad_floor=0.0
    ),
    "block_rms": lambda given: ClipByRMS(max_rms=given["threshold"]),
    "value": lambda given: ClipByValue(
        clip_value=given.get("threshold")
        or given.get("clipvalue")
        or given.get("clipping_threshold")
    ),
    "per_param_norm_no_eps": lambda given: ClipByNorm(
        max_norm=given["clipnorm"], scope="parameter", eps=0.0
    ),
    "global_norm_no_eps": lambda given: ClipByNorm(
        max_norm=given.get("max_norm") or given["clipnorm"], eps=0.0
    ),
    "global_norm": lambda given: ClipByNorm(max_norm=given["max_norm"]),
}
FILES = ("timm_agc", "optax_clipping", "composer_clipping", "keras_clipping")


def parameter(spec):
    found = torch.nn.Parameter(tensor(spec["weight"], spec["shape"]))
    found.grad = tensor(spec["grad"], spec["shape"])
    return found


def variant(name):
    return name.split("/")[0]


def expected(case, specs):
    """The reference's clipped gradient of each tensor by name."""
    if case["id"] not in BY_VARIANT:
        return {
            spec["tensor"]: tensor(out["grad"])
            for spec, out in zip(specs, case["outputs"], strict=True)
        }
    found = {}
    for out in case["outputs"]:
        own = [spec["tensor"] for spec in specs if variant(spec["tensor"]) == out["variant"]]
        found |= {name: tensor(grad) for name, grad in zip(own, out["grads"], strict=True)}
    return found


@pytest.mark.parametrize(
    ("file", "case"),
    [pytest.param(f, c.values[0], id=f"{f}-{c.id}") for f in FILES for c in cases(f)],
)
def test_clipped_tensors(file, case):
    specs = load(file)["inputs"]["tensors"]
    given = {**case["params"]}
    if "global_clipnorm" in given:
        given["max_norm"] = given["global_clipnorm"]
    wanted = expected(case, specs)
    for kernel in KERNELS:
        params = {spec["tensor"]: parameter(spec) for spec in specs}
        finite = {name for name, p in params.items() if bool(torch.isfinite(p.grad).all())}
        groups = [{name: p for name, p in params.items() if name in finite}]
        if case["id"] in BY_VARIANT:
            names = dict.fromkeys(map(variant, params))
            groups = [{n: p for n, p in params.items() if variant(n) == own} for own in names]
            groups = [group for group in groups if group.keys() <= finite]
        changed = 0
        for group in groups:
            before = {name: p.grad.clone() for name, p in group.items()}
            GradientClipper(RULES[case["policy"]](given), group.items(), kernel=kernel).clip()
            for name, p in group.items():
                want = wanted[name].reshape(p.shape)
                largest = float(want.abs().max())
                torch.testing.assert_close(p.grad, want, rtol=1e-5, atol=1e-6 * largest, msg=name)
                changed += not torch.equal(p.grad, before[name])
        assert changed > 5


@pytest.mark.parametrize(
    "case", [c for c in cases("trainer_formulas") if c.id != "deepspeed-nonfinite"]
)
def test_trainers_norms(case):
    given = case["params"]
    scale = given.get("loss_scale")
    policy = ClipByNorm(
        max_norm=given.get("max_norm") or given["clip_grad"],
        norm_type=number(given.get("norm_type", 2.0)),
    )
    batches = load("trainer_formulas")["inputs"]["batches"]
    for batch, out in zip(batches, case["outputs"], strict=True):
        params = [torch.nn.Parameter(torch.zeros(torch.tensor(g).shape)) for g in batch]
        for p, grad in zip(params, batch, strict=True):
            p.grad = torch.tensor(grad) * (scale or 1.0)
        clipper = GradientClipper(policy, [(str(i), p) for i, p in enumerate(params)])
        clipper.clip(grad_scale=None if scale is None else torch.tensor(scale))
        for p, want in zip(params, out["grads"], strict=True):
            got = p.grad / (scale or 1.0)
            torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", cases("half_precision"))
def test_half_precision(case):
    index = int(case["id"].split("-")[0])
    given = load("half_precision")["inputs"]["gradient_sets"][index]
    dtype = getattr(torch, given["dtype"])
    parameters = []
    for grad in given["grads"]:
        parameters.append(torch.nn.Parameter(torch.zeros(torch.tensor(grad).shape, dtype=dtype)))
        parameters[-1].grad = torch.tensor(grad, dtype=dtype)
    exact = number(case["outputs"]["exact_norm_float64"])
    found = clip_grad_norm_(parameters, case["params"]["max_norm"])
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(exact, rel=1e-6)
    assert norm_of([p.grad for p in parameters]) == pytest.approx(min(exact, 1.0), rel=4e-3)


# Withheld steps.


def olmo(case):
    given = case["params"]
    window = given["rolling_interval_length"]
    return SkipSpike(
        window=window,
        z_threshold=float(given["sigma_factor"]),
        watch="both" if "grad_norm" in given["uses"] else "loss",
        warmup_steps=max(2, window // 2) - 1,
        include_skipped=True,
        max_consecutive=None,
        sigma_floor=0.0,
    )


def olmo_values(name):
    recorded = load("olmo_skip_step")["inputs"]["sequences"][name]
    return [[number(value) for value in recorded[key]] for key in ("grad_norm", "loss")]


@pytest.mark.parametrize("case", cases("olmo_skip_step"))
def test_olmo(case):
    found = withheld(olmo(case), *olmo_values(case["sequence"]))
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


OPTAX = "optax_conditionality"


def optax_updates():
    return numbers(load(OPTAX)["inputs"]["updates"])


def optax_skips(policy):
    """Whether each recorded update is withheld, one by one."""
    p = torch.nn.Parameter(torch.zeros(3))
    clipper = GradientClipper(policy, [("p", p)])
    for update in optax_updates():
        p.grad = torch.tensor(update)
        yield bool(clipper.clip().skipped)


@pytest.mark.parametrize(
    "case", [c for c in cases(OPTAX) if "large" in c.id or "accumulate" in c.id]
)
def test_optax(case):
    policy = SkipNonfinite()
    if "large" in case["id"]:
        limit = math.sqrt(case["params"]["max_squared_norm"])
        policy = SkipLarge(limit=limit, max_consecutive=None)
    assert list(optax_skips(policy)) == case["outputs"]["should_skip"]


# Faults of references that we don't reproduce.


def test_norm_that_overflowed_the_reference_is_finite():
    file = "torch_clip_grad_norm"
    case = next(c for c in load(file)["cases"] if c["conformance"]["mode"] == "match_except")
    overflowing = case["conformance"]["steps"]
    assert overflowing
    for step in replay(file, case, ClipByNorm(max_norm=1.0)):
        if step.at in overflowing:
            assert case["outputs"]["grad_norm"][step.at] == "inf"
            assert step.record.finite
            assert torch.isfinite(step.record.grad_norm)
            assert float(step.record.clipped_norm) == pytest.approx(1.0, rel=1e-6)


def test_the_first_gradient_that_adamwclip_clips_to_nothing_is_left_alone():
    case = case_of("adamwclip", "cfg0/clean")
    given = case["params"]
    policy = Spam(theta=given["clip_grad_adapt"] ** 2, decay=given["betas"][1], warmup_steps=1)
    ratios = []
    for step in replay("adamwclip", case, policy):
        before = norm_of(sequence("adamwclip", "clean")[step.at])
        ratios.append((step.want("post_norm") / before, norm_of(step.grads) / before))
    assert ratios[0][0] < 1e-9
    assert ratios[0][1] == pytest.approx(1.0, rel=1e-6)
    assert sum(reference < 0.5 for reference, _ in ratios) > 20
    assert all(ours > 0.5 for _, ours in ratios[:50])


def test_by_default_fewer_steps_are_clipped_than_by_adagcs_reference():
    case = case_of("adagc_port", "cfg0/clean")
    norms = [case["outputs"]["state"][f"norm_{i}"] for i in range(4)]
    share = {}
    for policy in (adagc(case["params"]), AdaGC()):
        clipped = []
        for step in replay("adagc_port", case, policy):
            if step.at + 1 >= policy.warmup_steps:
                pairs = zip(step.grads, norms, strict=True)
                clipped += [float(g.double().norm()) < n[step.at] * (1 - 1e-5) for g, n in pairs]
        share[policy.warmup] = sum(clipped) / len(clipped)
    assert share["min"] > 0.85  # the smallest norm of 99 is far below the usual one
    assert share["mean"] < share["min"] - 0.1


def test_one_nan_is_forgotten_where_autoclips_own_code_keeps_it():
    file = "autoclip_official"
    case = case_of(file, "pct10/nonfinite")
    assert "nan" in case["outputs"]["post_norm"][case["conformance"]["step"] + 60 :]
    nonfinite = load(file)["inputs"]["sequences"]["nonfinite"]["nonfinite_steps"]
    for history in ("all", "window"):
        policy = AutoClip(history=history, percentile=10, warmup_steps=1, inclusive=True)
        for step in replay(file, case, policy):
            if str(step.at) not in nonfinite:
                assert torch.isfinite(step.record.clipped_norm)


def test_the_second_step_of_autoclip_is_a_number():
    """PyPI's StandardClip turns every gradient into NaN there."""
    case = next(c for c in load("autoclip_pypi")["cases"] if c["id"].startswith("standard"))
    assert case["outputs"]["post_norm"][1] == "nan"
    p = torch.nn.Parameter(torch.zeros(3))
    clipper = GradientClipper(AutoClip(warmup_steps=1), [("p", p)])
    for size in (1.0, 5.0):
        p.grad = torch.full((3,), size)
        clipper.clip()
        assert torch.isfinite(p.grad).all()


def test_a_bad_gradient_never_flips_signs():
    """DeepSpeed's sentinel of -1 for a norm that isn't finite turned (1, 2, 3) round."""
    assert case_of("trainer_formulas", "deepspeed-nonfinite")["conformance"]["mode"] == "document"
    first, second = (torch.nn.Parameter(torch.zeros(n)) for n in (3, 2))
    first.grad, second.grad = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([math.inf, 1.0])
    policy = {"policies": [{"type": "norm", "max_norm": 1.0}], "on_nonfinite": "ignore"}
    GradientClipper(policy, [("a", first), ("b", second)]).clip()
    assert torch.equal(first.grad, torch.tensor([1.0, 2.0, 3.0]))


def test_agc_without_eps_never_trains_zero_weights():
    """composer's rule, against the default, which lets them."""
    for eps, trains in ((0.0, False), (1e-3, True)):
        p = torch.nn.Parameter(torch.zeros(2, 3))
        p.grad = torch.ones(2, 3)
        GradientClipper(AGC(eps=eps), [("p", p)]).clip()
        assert bool(p.grad.any()) == trains


def test_agc_divides_a_tiny_gradient_by_no_less_than_the_floor():
    for floor, coef in ((1e-6, 0.1), (0.0, 0.2)):
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([3e-7, 4e-7])
        GradientClipper(AGC(clip_factor=1e-4, grad_floor=floor), [("p", p)]).clip()
        assert float(p.grad.norm()) == pytest.approx(5e-7 * coef, rel=1e-5)


def test_an_infinite_unit_is_withheld_and_not_spread():
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    p.grad[0, 1] = math.inf
    config = {"policies": [{"type": "agc"}], "on_nonfinite": "ignore"}
    GradientClipper(config, [("p", p)]).clip()
    assert torch.equal(p.grad[0], torch.tensor([1.0, math.inf, 1.0]))


def test_one_bad_value_withholds_one_step_where_olmo_withholds_a_window_full():
    case = case_of("olmo_skip_step", "L32-s3/nonfinite")
    start = case["conformance"]["step"]
    factors = [number(f) for f in case["outputs"]["step_factor"]]
    assert sum(f == 0 for f in factors[start : start + 32]) > 25
    found = withheld(SkipSpike(window=32, watch="both"), *olmo_values("nonfinite"))
    assert sum(found[start : start + 32]) <= 3


def olmo_rule(norms, window, sigma):
    """OLMo's rule, on norms alone: withheld values and NaN stay in the window."""
    found = []
    for step, value in enumerate(norms):
        past = torch.tensor(norms[max(0, step - window) : step], dtype=torch.float64)
        ready = len(past) + 1 >= max(2, window // 2)
        spread = past.std() if len(past) > 1 else torch.tensor(math.nan)
        found.append(ready and not bool(value - past.mean() <= sigma * spread))
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


def test_the_bound_stops_where_optax_applies_what_is_bad():
    case = next(c for c in load(OPTAX)["cases"] if c["id"].endswith("finite-3"))
    bad = [not all(map(math.isfinite, update)) for update in optax_updates()]
    applied = case["outputs"]["applied"]
    first = next(i for i, (b, a) in enumerate(zip(bad, applied, strict=True)) if b and a)
    skips = optax_skips(SkipNonfinite(max_consecutive=3))
    for step in range(first):
        assert next(skips) == bad[step]
    with pytest.raises(NonFiniteError):
        next(skips)
