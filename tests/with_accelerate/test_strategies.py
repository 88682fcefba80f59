"""The same model under every layout: norms, coefficients and parameters of one process."""

import functools

import pytest
import torch
from accelerate import Accelerator
from support.accelerate_layouts import LAYOUTS, fresh, prepare, rows_of, share
from support.nets import whole_parameters
from support.ranks import run_on_ranks

STEPS = 8
POLICIES = {
    "norm": {"policies": [{"type": "norm", "max_norm": 2.0}]},
    "zclip": {"policies": [{"type": "zclip", "warmup_steps": 3, "max_norm": 8.0}]},
    "value": {"policies": [{"type": "value", "clip_value": 0.2}]},
    "parameter": {
        "policies": [{"type": "norm", "max_norm": 0.6, "scope": "parameter"}],
        "log": {"per_parameter": True},
    },
}


def train(accelerator, policy):
    clip, net, optimizer = prepare(accelerator, POLICIES[policy])
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(net(share(accelerator, rows_of(step))).square().mean())
        if policy == "value":
            accelerator.clip_grad_value_(net.parameters(), 0.2)
        elif step % 2:  # every other step is clipped by the optimizer's hook
            norm = accelerator.clip_grad_norm_(net.parameters(), 2.0)
            assert torch.equal(norm, clip.last_record.grad_norm)
        optimizer.step()
        seen.append({key: value.clone() for key, value in clip.last_record.as_metrics().items()})
    return seen, whole_parameters(net)


def on_rank(rank, world, name):
    found = {}
    for policy in POLICIES:
        if can(name, policy):
            fresh()
            found[policy] = train(LAYOUTS[name][0](), policy)
    return found


def can(name, policy):
    """Flat parameters can't be told apart."""
    return (name, policy) != ("fsdp1 flat", "parameter")


CASES = [(name, policy) for name in LAYOUTS for policy in POLICIES if can(name, policy)]

ranks = functools.cache(run_on_ranks)


@functools.cache
def alone(policy):
    fresh()
    return train(Accelerator(cpu=True), policy)


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_every_layout_does_what_one_process_does(name, policy):
    want_metrics, want_parameters = alone(policy)
    assert any(step["clip/clipped"] for step in want_metrics)
    answers = [found[policy] for found in ranks(on_rank, LAYOUTS[name][1], name)]
    for metrics, parameters in answers:
        for step, first, want in zip(metrics, answers[0][0], want_metrics, strict=True):
            assert step.keys() == want.keys()
            for key, value in step.items():
                assert torch.equal(value, first[key]) or value.isnan(), key
                torch.testing.assert_close(value, want[key], rtol=1e-5, atol=1e-6, equal_nan=True)
        for got, first, want in zip(parameters, answers[0][1], want_parameters, strict=True):
            assert torch.equal(got, first)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
