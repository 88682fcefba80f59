"""The same model under every layout: norms, coefficients and parameters of one process."""

import functools

import pytest
import torch
from accelerate import Accelerator
from support.accelerate_cpu import fresh
from support.accelerate_layouts import LAYOUTS, prepare, rows_of, share
from support.as_one import POLICIES, STEPS, assert_as_one, can
from support.nets import whole_parameters
from support.ranks import run_on_ranks


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


@functools.cache
def alone(policy):
    fresh()
    return train(Accelerator(cpu=True), policy)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_does_what_one_process_does(name):
    answers = run_on_ranks(on_rank, LAYOUTS[name][1], name)
    policies = [policy for policy in POLICIES if can(name, policy)]
    assert set(answers[0]) == set(policies)
    for policy in policies:
        assert_as_one([found[policy] for found in answers], alone(policy))
