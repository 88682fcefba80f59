"""The same module under every strategy: norms, coefficients and parameters of one process."""

import functools

import pytest
from support.as_one import POLICIES, STEPS, assert_as_one, can
from support.lit import Logged, trainer_of
from support.lit_layouts import STRATEGIES, Plain
from support.nets import whole_parameters
from support.ranks import run_on_ranks

from lightning_clip import GradientClip


def fit(policy, module, strategy, world, **options):
    logged = Logged()
    trainer = trainer_of(
        GradientClip(POLICIES[policy]), logged, strategy=strategy, devices=world, **options
    )
    trainer.fit(module, range(STEPS))
    assert trainer.world_size == world
    return logged.metrics, whole_parameters(trainer.strategy.model)


def on_rank(rank, world):
    """Every strategy of this many ranks, one after another in the same processes."""
    found = {}
    for name, (module, strategy, ranks) in STRATEGIES.items():
        if ranks == world:
            policies = [policy for policy in POLICIES if can(name, policy)]
            found[name] = {policy: fit(policy, module(), strategy(), world) for policy in policies}
    return found


ranks = functools.cache(run_on_ranks)


@functools.cache
def alone(policy):
    return fit(policy, Plain(), "auto", 1)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_does_what_one_process_does(name):
    found = [answer[name] for answer in ranks(on_rank, STRATEGIES[name][2], timeout=300)]
    assert found[0].keys() == {policy for policy in POLICIES if can(name, policy)}
    for policy in found[0]:
        assert_as_one([answer[policy] for answer in found], alone(policy))
