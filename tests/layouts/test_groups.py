"""`process_group=`: ranks that hold other parameters, which nothing on the tensors tells."""

import math

import pytest
import torch
import torch.distributed as dist
from support.layouts import Experts
from support.ranks import run_on_ranks

from gradclip import ClipByNorm, ConfigError, GradientClipper, ZClip


def parameter(*values):
    p = torch.nn.Parameter(torch.zeros(len(values)))
    p.grad = torch.tensor(values)
    return p


def stages(rank, world):
    """Each rank has a layer of its own, and both have the tied weight."""
    del world
    tied = parameter(3.0, 4.0)
    own = parameter(*([1.0, 2.0, 2.0] if rank == 0 else [5.0]))
    named = [("embed" if rank == 0 else "head", tied), (f"layer{rank}", own)]
    policies = {
        "global": ClipByNorm(max_norm=1.0),
        "parameter": ClipByNorm(max_norm=1.0, scope="parameter"),
        "adaptive": ZClip(warmup_steps=2, scope="parameter"),
    }
    groups = {"embed": None, "head": None, "*": dist.group.WORLD}
    found = {}
    for name, policy in policies.items():
        for p in (tied, own):
            p.grad = p.grad.clone()
        before = [p.grad.clone() for p in (tied, own)]
        record = GradientClipper(policy, named, process_group=groups).clip()
        found[name] = (record.grad_norm, record.coef, tied.grad / before[0], own.grad / before[1])
        tied.grad, own.grad = before
    twice = GradientClipper(policies["global"], named, process_group=dist.group.WORLD).clip()
    return found, twice.grad_norm


def test_stages_share_a_norm_and_tied_weights_count_once():
    answers = run_on_ranks(stages, 2)
    for found, twice in answers:
        norm, coef, tied, own = found["global"]
        assert float(norm) == pytest.approx(math.sqrt(9 + 25 + 25))
        assert float(twice) == pytest.approx(math.sqrt(9 + 2 * 25 + 25))
        assert torch.equal(norm, answers[0][0]["global"][0])
        torch.testing.assert_close(tied, torch.full((2,), float(coef)))
        torch.testing.assert_close(own, torch.full_like(own, float(coef)))
        assert float(found["parameter"][0]) == pytest.approx(math.sqrt(9 + 25 + 25))


def patterns(rank, world):
    """A pattern may match on another rank alone; one that matches nowhere is an error on all."""
    del world
    named = [(f"layer{rank}", parameter(3.0))]
    options = {"named_parameters": named, "process_group": dist.group.WORLD}
    policies = {"policies": [{"type": "norm", "max_norm": 100.0}]}
    slow = {"match": "layer1", "policies": [{"type": "norm", "max_norm": 1.0}]}
    clipper = GradientClipper(policies | {"groups": [slow]}, **options)
    clipper.clip()
    with pytest.raises(ConfigError, match=r"groups\[0\].match is 'layer2' and matches no"):
        GradientClipper(policies | {"groups": [slow | {"match": "layer2"}]}, **options)
    return float(named[0][1].grad), clipper.state_dict()["policies"]


def test_groups_are_matched_over_the_names_of_all_ranks():
    (first, state), (second, same) = run_on_ranks(patterns, 2)
    assert first == 3.0
    assert second == pytest.approx(1.0, rel=1e-5)
    assert state == same


def experts(rank, world):
    """Named experts inside a data-parallel world: two groups of ranks, each with its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    net = Experts(rank % 2)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    net.expert.weight.grad.fill_(2.0 + rank % 2)
    clipper = GradientClipper(
        ClipByNorm(max_norm=1.0),
        net.named_parameters(),
        process_group={"expert.*": groups[rank // 2]},
    )
    del world
    return clipper.clip().grad_norm


def test_copies_of_experts_count_once():
    norms = run_on_ranks(experts, 4)
    dense = 8 * 8 + 8 + 2 * 8 + 2
    assert float(norms[0]) == pytest.approx(math.sqrt(dense + 48 * 4 + 48 * 9))
    assert all(torch.equal(norm, norms[0]) for norm in norms)
