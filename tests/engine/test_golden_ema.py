"""AdaGC beside the port that made the recorded sequences, per tensor and all in one."""

import pytest
import torch
from support.vectors import cases, checked, load, number, numbers, replay

from gradclip import AdaGC


def as_in_the_reference(given):
    """The options that make our policy the reference's."""
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


@pytest.mark.parametrize("kernel", ["cpu", "accelerator"])
@pytest.mark.parametrize("case", cases("adagc_port"))
def test_adagc(case, kernel):
    data, expected = load("adagc_port"), case["outputs"]
    policy = as_in_the_reference(case["params"])
    slots = sum(name.startswith("norm_") for name in expected["state"])
    seen = clipped = 0
    for step, record, grads, clipper in replay(data, case, policy, kernel=kernel):
        if not checked(case, step, data):
            continue
        norms = [grad.double().norm() for grad in grads]
        if slots == 1:
            norms = [torch.stack(norms).norm()]
            assert float(record.coef) == pytest.approx(expected["coef"][step], rel=1e-5)
        mean = clipper.state_dict()["policies"][0]["state"]["mean"]
        for i, norm in enumerate(norms):
            want = {
                name: number(expected["state"][f"{name}_{i}"][step])
                for name in ("norm", "gamma_before", "gamma_after", "post_norm")
            }
            assert float(norm) == pytest.approx(want["post_norm"], rel=1e-5, abs=1e-6)
            assert float(mean[i]) == pytest.approx(want["gamma_after"], rel=1e-4)
            if seen + 1 >= policy.warmup_steps:
                clipped += want["norm"] > policy.factor * want["gamma_before"]
        want = number(expected["post_norm"][step])
        assert float(record.clipped_norm) == pytest.approx(want, rel=1e-5)
        for got, want in zip(grads, expected["post_grads_at"].get(str(step), []), strict=False):
            want = torch.tensor(numbers(want)).reshape(got.shape)
            largest = float(want.abs().amax())
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * largest)
        seen += 1
    assert seen > 100
    assert clipped > 5


def test_by_default_fewer_steps_are_clipped_than_by_the_reference():
    data = load("adagc_port")
    case = next(c for c in data["cases"] if c["id"] == "cfg0/clean")
    reference = as_in_the_reference(case["params"])
    share = {}
    for policy in (reference, AdaGC()):
        clipped = []
        norms = [case["outputs"]["state"][f"norm_{i}"] for i in range(4)]
        for step, _, grads, _ in replay(data, case, policy):
            if step + 1 >= policy.warmup_steps:
                pairs = zip(grads, norms, strict=True)
                clipped += [float(g.double().norm()) < n[step] * (1 - 1e-5) for g, n in pairs]
        share[policy.warmup] = sum(clipped) / len(clipped)
    assert share["min"] > 0.85  # the smallest norm of 99 is far below the usual one
    assert share["mean"] < share["min"] - 0.1
