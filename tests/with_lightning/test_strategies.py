"""The same module under every strategy: norms, coefficients and parameters of one process."""

import functools

import pytest
import torch
from support.lit import Logged, trainer_of
from support.lit_layouts import STRATEGIES, Plain
from support.nets import whole_parameters
from support.ranks import run_on_ranks

from lightning_clip import GradientClip

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


def fit(policy, module, strategy, world, **options):
    logged = Logged()
    trainer = trainer_of(
        GradientClip(POLICIES[policy]), logged, strategy=strategy, devices=world, **options
    )
    trainer.fit(module, range(STEPS))
    assert trainer.world_size == world
    return logged.metrics, whole_parameters(trainer.strategy.model)


def on_rank(rank, world, name):
    module, strategy, _ = STRATEGIES[name]
    return {
        policy: fit(policy, module(), strategy(), world) for policy in POLICIES if can(name, policy)
    }


def can(name, policy):
    """Flat parameters can't be told apart: refused, see test_fsdp1.py."""
    return (name, policy) != ("fsdp1 flat", "parameter")


CASES = [(name, policy) for name in STRATEGIES for policy in POLICIES if can(name, policy)]


ranks = functools.cache(run_on_ranks)


@functools.cache
def alone(policy):
    return fit(policy, Plain(), "auto", 1)


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_every_strategy_does_what_one_process_does(name, policy):
    want_metrics, want_parameters = alone(policy)
    assert any(step["clip/clipped"] for step in want_metrics)
    answers = [found[policy] for found in ranks(on_rank, STRATEGIES[name][2], name)]
    for metrics, parameters in answers:
        for step, first, want in zip(metrics, answers[0][0], want_metrics, strict=True):
            assert step.keys() == want.keys()
            for key, value in step.items():
                assert torch.equal(value, first[key]) or value.isnan(), key
                torch.testing.assert_close(value, want[key], rtol=1e-5, atol=1e-6, equal_nan=True)
        for got, first, want in zip(parameters, answers[0][1], want_parameters, strict=True):
            assert torch.equal(got, first)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
