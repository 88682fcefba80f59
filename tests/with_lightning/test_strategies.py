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


def on_rank(rank, world, name):
    module, strategy, _ = STRATEGIES[name]
    return {
        policy: fit(policy, module(), strategy(), world) for policy in POLICIES if can(name, policy)
    }


CASES = [(name, policy) for name in STRATEGIES for policy in POLICIES if can(name, policy)]


ranks = functools.cache(run_on_ranks)


@functools.cache
def alone(policy):
    return fit(policy, Plain(), "auto", 1)


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_every_strategy_does_what_one_process_does(name, policy):
    answers = [found[policy] for found in ranks(on_rank, STRATEGIES[name][2], name)]
    assert_as_one(answers, alone(policy))
