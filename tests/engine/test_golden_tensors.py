"""Single tensors clipped by the reference implementations, by unit, tensor or whole model."""

import math

import pytest
import torch
from support.vectors import cases, load, number, numbers

from gradclip import AGC, ClipByNorm, ClipByRMS, ClipByValue, GradientClipper

BY_VARIANT = {"clip_by_global_norm", "global_clipnorm-1.0", "norm"}

POLICIES = {
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
    found = torch.nn.Parameter(torch.tensor(numbers(spec["weight"])).reshape(spec["shape"]))
    found.grad = torch.tensor(numbers(spec["grad"])).reshape(spec["shape"])
    return found


def finite(grad):
    return bool(torch.isfinite(grad).all())


def variant(name):
    return name.split("/")[0]


@pytest.mark.parametrize("kernel", ["cpu", "accelerator", "reference"])
@pytest.mark.parametrize(
    ("file", "case"),
    [pytest.param(f, c.values[0], id=f"{f}-{c.id}") for f in FILES for c in cases(f)],
)
def test_clipped_tensors(file, case, kernel):
    specs = load(file)["inputs"]["tensors"]
    params = {spec["tensor"]: parameter(spec) for spec in specs}
    groups = [{name: p for name, p in params.items() if finite(p.grad)}]
    if case["id"] in BY_VARIANT:
        names = dict.fromkeys(map(variant, params))
        groups = [{n: p for n, p in params.items() if variant(n) == own} for own in names]
        groups = [group for group in groups if all(finite(p.grad) for p in group.values())]
    given = {**case["params"]}
    if "global_clipnorm" in given:
        given["max_norm"] = given["global_clipnorm"]
    changed = 0
    for group in groups:
        before = {name: p.grad.clone() for name, p in group.items()}
        GradientClipper(POLICIES[case["policy"]](given), group.items(), kernel=kernel).clip()
        wanted = expected(case, specs)
        for name, p in group.items():
            want = wanted[name].reshape(p.shape)
            largest = float(want.abs().max())
            torch.testing.assert_close(p.grad, want, rtol=1e-5, atol=1e-6 * largest, msg=name)
            changed += not torch.equal(p.grad, before[name])
    assert changed > 5


def expected(case, specs):
    """The reference's clipped gradient of each tensor by name."""
    if case["id"] not in BY_VARIANT:
        return {
            spec["tensor"]: torch.tensor(numbers(out["grad"]))
            for spec, out in zip(specs, case["outputs"], strict=True)
        }
    found = {}
    for out in case["outputs"]:
        own = [spec["tensor"] for spec in specs if variant(spec["tensor"]) == out["variant"]]
        found |= {
            name: torch.tensor(numbers(grad)) for name, grad in zip(own, out["grads"], strict=True)
        }
    return found


@pytest.mark.parametrize(
    "case", [c for c in cases("trainer_formulas") if c.id != "deepspeed-nonfinite"]
)
def test_trainers_norms(case):
    data = load("trainer_formulas")
    given = case["params"]
    scale = given.get("loss_scale")
    policy = ClipByNorm(
        max_norm=given.get("max_norm") or given["clip_grad"],
        norm_type=number(given.get("norm_type", 2.0)),
    )
    for batch, out in zip(data["inputs"]["batches"], case["outputs"], strict=True):
        params = [torch.nn.Parameter(torch.zeros(torch.tensor(g).shape)) for g in batch]
        for p, grad in zip(params, batch, strict=True):
            p.grad = torch.tensor(grad) * (scale or 1.0)
        clipper = GradientClipper(policy, [(str(i), p) for i, p in enumerate(params)])
        clipper.clip(grad_scale=None if scale is None else torch.tensor(scale))
        for p, want in zip(params, out["grads"], strict=True):
            got = p.grad / (scale or 1.0)
            torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=1e-7)


def test_a_bad_gradient_never_flips_signs():
    """DeepSpeed's sentinel of -1 for a norm that isn't finite turned (1, 2, 3) round."""
    case = next(
        c.values[0] for c in cases("trainer_formulas") if c.values[0]["id"] == "deepspeed-nonfinite"
    )
    assert case["conformance"]["mode"] == "document"
    first, second = (torch.nn.Parameter(torch.zeros(n)) for n in (3, 2))
    first.grad, second.grad = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([math.inf, 1.0])
    policy = {"policies": [{"type": "norm", "max_norm": 1.0}], "on_nonfinite": "ignore"}
    GradientClipper(policy, [("a", first), ("b", second)]).clip()
    assert torch.equal(first.grad, torch.tensor([1.0, 2.0, 3.0]))


def test_without_eps_zero_weights_never_train():
    """composer's rule, against the default, which lets them."""
    for eps, trains in ((0.0, False), (1e-3, True)):
        p = torch.nn.Parameter(torch.zeros(2, 3))
        p.grad = torch.ones(2, 3)
        GradientClipper(AGC(eps=eps), [("p", p)]).clip()
        assert bool(p.grad.any()) == trains


def test_a_tiny_gradient_is_divided_by_no_less_than_the_floor():
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
