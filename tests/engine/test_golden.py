"""Sequences made by running the reference implementations, reproduced step by step.

`tests/vectors/FORMAT.md` says how the files are laid out and what each conformance mode asks.
"""

import pytest
import torch
from support.vectors import UNDERFLOW, cases, check_step, checked, load, number, replay

from gradclip import ClipByNorm, ClipByValue, ZClip, clip_grad_norm_


@pytest.mark.parametrize("kernel", ["cpu", "accelerator", "reference"])
@pytest.mark.parametrize("case", cases("torch_clip_grad_norm"))
def test_norm(case, kernel):
    data = load("torch_clip_grad_norm")
    p, limit = number(case["params"]["norm_type"]), case["params"]["max_norm"]
    policy = ClipByNorm(max_norm=limit, norm_type=p)
    seen = 0
    for step, record, grads, _ in replay(data, case, policy, kernel=kernel):
        if not checked(case, step, data):
            continue
        if p == 2.0:
            check_step(case, step, record, grads, limit)
        else:  # the recorded norm after clipping is always a 2-norm
            after = torch.cat([g.double().reshape(-1) for g in grads]).norm()
            expected = case["outputs"]
            norm = number(expected["grad_norm"][step])
            assert float(record.grad_norm) == pytest.approx(norm, rel=1e-5, abs=UNDERFLOW)
            assert float(record.coef) == pytest.approx(expected["coef"][step] or 1.0, rel=1e-5)
            after_norm = number(expected["post_norm"][step])
            assert float(after) == pytest.approx(after_norm, rel=1e-5, abs=UNDERFLOW)
        seen += 1
    assert seen > 100


def test_norm_that_overflowed_the_reference_is_finite():
    data = load("torch_clip_grad_norm")
    case = next(c for c in data["cases"] if c["conformance"]["mode"] == "match_except")
    overflowing = case["conformance"]["steps"]
    assert overflowing
    for step, record, _, _ in replay(data, case, ClipByNorm(max_norm=1.0)):
        if step in overflowing:
            assert case["outputs"]["grad_norm"][step] == "inf"
            assert record.finite
            assert torch.isfinite(record.grad_norm)
            assert float(record.clipped_norm) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("case", cases("zclip"))
def test_zclip(case):
    data = load("zclip")
    given = case["params"]
    policy = ZClip(
        decay=given["alpha"],
        z_threshold=given["z_thresh"],
        max_norm=given["max_grad_norm"],
        eps=given["eps"],
        warmup_steps=given["warmup_steps"],
        mode=given["mode"],
        clip_option=given["clip_option"],
        clip_factor=given["clip_factor"],
        skip_update_on_spike=given["skip_update_on_spike"],
        escape_after=None,
    )
    expected = case["outputs"]
    seen = spikes = 0
    for step, record, grads, clipper in replay(data, case, policy):
        if not checked(case, step, data):
            continue
        threshold = number(expected["threshold"][step])
        check_step(case, step, record, grads, threshold)
        state = clipper.state_dict()["policies"][0]["state"]
        for name in ("mean", "var"):
            want = expected["state"][name][step]
            if want is not None:
                assert float(state[name]) == pytest.approx(number(want), rel=1e-4, abs=1e-9)
        if record.coef < 1:
            assert float(record.limit) == pytest.approx(threshold, rel=1e-5)
            spikes += expected["state"]["adaptive_threshold"][step] is not None
        seen += 1
    assert seen > 5
    assert spikes or seen < 100


@pytest.mark.parametrize("case", cases("torch_per_param_group_value"))
def test_per_parameter_per_group_and_value(case):
    data = load("torch_per_param_group_value")
    given = case["params"]
    if case["id"] == "per_param":
        policy = ClipByNorm(max_norm=given["max_norm"], scope="parameter")
    elif case["id"] == "per_group":
        first, second = (group["max_norm"] for group in given["groups"])
        policy = {
            "policies": [{"type": "norm", "max_norm": first}],
            "groups": [{"match": "p[23]", "policies": [{"type": "norm", "max_norm": second}]}],
        }
    else:
        policy = ClipByValue(clip_value=given["clip_value"])
    for step, _, grads, _ in replay(data, case, policy):
        after = torch.cat([g.double().reshape(-1) for g in grads]).norm()
        want = case["outputs"]["post_norm"][step]
        assert float(after) == pytest.approx(want, rel=1e-5)
        for got, grad in zip(
            grads, case["outputs"]["post_grads_at"].get(str(step), []), strict=False
        ):
            grad = torch.tensor(grad).reshape(got.shape)
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", cases("half_precision"))
def test_half_precision(case):
    data = load("half_precision")
    index = int(case["id"].split("-")[0])
    given = data["inputs"]["gradient_sets"][index]
    dtype = getattr(torch, given["dtype"])
    parameters = []
    for grad in given["grads"]:
        parameter = torch.nn.Parameter(torch.zeros(torch.tensor(grad).shape, dtype=dtype))
        parameter.grad = torch.tensor(grad, dtype=dtype)
        parameters.append(parameter)
    exact = number(case["outputs"]["exact_norm_float64"])
    norm = clip_grad_norm_(parameters, case["params"]["max_norm"])
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(exact, rel=1e-6)
    after = torch.cat([p.grad.double().reshape(-1) for p in parameters]).norm()
    assert float(after) == pytest.approx(min(exact, 1.0), rel=4e-3)
