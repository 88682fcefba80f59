"""Recorded sequences of the reference implementations (`tests/vectors/FORMAT.md`), and checks."""

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gradclip import ClipRecord, GradientClipper

UNDERFLOW = 1e-19
"""Below this the float32 squares of the reference are 0."""
VECTORS = Path(__file__).parents[1] / "vectors"


def number(value):
    return float(value) if isinstance(value, str) else value


def numbers(nested):
    return [numbers(item) for item in nested] if isinstance(nested, list) else number(nested)


def tensor(nested, shape=None):
    found = torch.tensor(numbers(nested), dtype=torch.float32)
    return found if shape is None else found.reshape(shape)


@functools.cache
def load(name):
    return json.loads((VECTORS / f"{name}.json").read_text())


def cases(name):
    return [pytest.param(case, id=case["id"]) for case in load(name)["cases"]]


def case_of(name, case_id):
    return next(case for case in load(name)["cases"] if case["id"] == case_id)


@functools.cache
def sequence(name, key):
    """The gradients of a recorded sequence: per step one tensor for each parameter."""
    inputs = load(name)["inputs"]
    shapes = [spec["shape"] for spec in inputs["model"]["params"]]
    return [
        [tensor(grad, shape) for grad, shape in zip(grads, shapes, strict=True)]
        for grads in inputs["sequences"][key]["grads"]
    ]


class Step(NamedTuple):
    """One step of a replay: what the reference has for it, and what we made of it."""

    case: dict[str, Any]
    at: int
    record: ClipRecord
    grads: list[torch.Tensor]
    clipper: GradientClipper

    def want(self, name):
        """An output of the reference."""
        return number(self.case["outputs"][name][self.at])

    def want_state(self, name):
        return number(self.case["outputs"]["state"][name][self.at])

    def state(self, name):
        return self.clipper.state_dict()["policies"][0]["state"][name]


def replay(name, case, policy, kernel=None):
    """Feed a recorded sequence to a clipper, and yield every step."""
    recorded = sequence(name, case["sequence"])
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in recorded[0]]
    named = [(f"p{i}", parameter) for i, parameter in enumerate(parameters)]
    clipper = GradientClipper(policy, named, kernel=kernel)
    for at, grads in enumerate(recorded):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        yield Step(case, at, clipper.clip(), [p.grad for p in parameters], clipper)


def is_checked(name, case, at):
    """Whether the conformance mode of a case asks for this step."""
    mode = case["conformance"]
    if mode["mode"] == "match_until":
        return at < mode["step"]
    if mode["mode"] in ("match_finite", "filtered"):
        nonfinite = load(name)["inputs"]["sequences"][case["sequence"]]["nonfinite_steps"]
        return str(at) not in nonfinite
    return mode["mode"] == "match" or at not in mode.get("steps", [])


def norm_of(grads):
    return float(torch.cat([grad.double().reshape(-1) for grad in grads]).norm())


def check_grads(step):
    """The gradients after clipping, at the few steps that have them."""
    wanted = step.case["outputs"]["post_grads_at"].get(str(step.at), [])
    for got, want in zip(step.grads, wanted, strict=False):
        want = tensor(want, got.shape)
        largest = min(1.0, float(want.abs().amax()))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * largest)


def check_norm_after(step):
    assert norm_of(step.grads) == pytest.approx(step.want("post_norm"), rel=1e-5, abs=UNDERFLOW)


def check_step(step, threshold):
    """Norms before and after, coefficient and gradients of a rule with one limit."""
    norm, coef = step.want("grad_norm"), step.want("coef")
    assert float(step.record.grad_norm) == pytest.approx(norm, rel=1e-5, abs=UNDERFLOW)
    if coef is not None:
        slack = 1e-6 / threshold if math.isfinite(threshold) else 0.0
        near = abs(norm - threshold) <= 1e-6
        assert float(step.record.coef) == pytest.approx(coef, rel=1e-5, abs=slack if near else 0.0)
    after = pytest.approx(step.want("post_norm"), rel=1e-5, abs=1e-6 * norm)
    assert float(step.record.clipped_norm) == after
    check_grads(step)
