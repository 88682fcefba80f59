"""Recorded sequences of the reference implementations (`tests/vectors/FORMAT.md`), and checks."""

import json
import math
from pathlib import Path

import pytest
import torch

from gradclip import GradientClipper

UNDERFLOW = 1e-19
"""Below this the float32 squares of the reference are 0."""
VECTORS = Path(__file__).parents[1] / "vectors"


def number(value):
    return float(value) if isinstance(value, str) else value


def load(name):
    return json.loads((VECTORS / f"{name}.json").read_text())


def cases(name):
    return [pytest.param(case, id=case["id"]) for case in load(name)["cases"]]


def replay(data, case, policy, kernel=None):
    """Feed a recorded sequence to a clipper; yields step, record, gradients after, clipper."""
    shapes = [spec["shape"] for spec in data["inputs"]["model"]["params"]]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    named = [(f"p{i}", parameter) for i, parameter in enumerate(parameters)]
    clipper = GradientClipper(policy, named, kernel=kernel)
    for step, grads in enumerate(data["inputs"]["sequences"][case["sequence"]]["grads"]):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = torch.tensor(numbers(grad), dtype=torch.float32).reshape(
                parameter.shape
            )
        record = clipper.clip()
        yield step, record, [p.grad for p in parameters], clipper


def numbers(nested):
    return [numbers(item) for item in nested] if isinstance(nested, list) else number(nested)


def checked(case, step, data):
    """Whether the mode asks for this step."""
    mode = case["conformance"]
    nonfinite = data["inputs"]["sequences"][case["sequence"]]["nonfinite_steps"]
    if mode["mode"] == "match_until":
        return step < mode["step"]
    if mode["mode"] in ("match_finite", "filtered"):
        return str(step) not in nonfinite
    return mode["mode"] == "match" or step not in mode.get("steps", [])


def check_step(case, step, record, grads, threshold):
    expected = case["outputs"]
    norm = number(expected["grad_norm"][step])
    coef = expected["coef"][step]
    assert float(record.grad_norm) == pytest.approx(norm, rel=1e-5, abs=UNDERFLOW)
    if coef is not None:
        slack = 1e-6 / threshold if math.isfinite(threshold) else 0.0
        near = abs(norm - threshold) <= 1e-6
        assert float(record.coef) == pytest.approx(coef, rel=1e-5, abs=slack if near else 0.0)
    clipped = number(expected["post_norm"][step])
    assert float(record.clipped_norm) == pytest.approx(clipped, rel=1e-5, abs=1e-6 * norm)
    for got, want in zip(grads, expected["post_grads_at"].get(str(step), []), strict=False):
        want = torch.tensor(numbers(want)).reshape(got.shape)
        largest = float(want.abs().amax())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * largest)
