"""Gradients that are still sums over ranks: completed in place, whoever has one."""

import functools
import math

import pytest
import torch
from support.ranks import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from gradclip import ClipByNorm, GradientClipper
from gradclip.layouts.partial import BUCKET


def replicated(mesh, *shape):
    return nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, [Replicate()]))


def give(parameter, value, placement):
    part = torch.full(parameter.shape, value)
    mesh = parameter.device_mesh
    parameter.grad = DTensor.from_local(part, mesh, [placement], run_check=False)


def steps(rank, world):
    """Per step the norm, and what is left of each gradient on this rank."""
    mesh = init_device_mesh("cpu", (world,))
    total, mean, large = replicated(mesh, 2), replicated(mesh, 2), replicated(mesh, BUCKET + 1)
    named = [("total", total), ("mean", mean), ("large", large)]
    clipper = GradientClipper(ClipByNorm(max_norm=math.inf), named)
    seen = []
    for missing in (None, 1, 0, "everywhere"):
        for p, placement in ((total, Partial("sum")), (mean, Partial("avg")), (large, Partial())):
            give(p, 1.0 + rank, placement)
            if missing in (rank, "everywhere"):
                p.grad = None
        norm = clipper.clip().grad_norm
        left = [
            None if p.grad is None else (p.grad.placements, p.grad.to_local()) for _, p in named
        ]
        seen.append((norm, left))
    return seen


ranks = functools.cache(run_on_ranks)


@pytest.mark.parametrize("step", range(4))
def test_sums_and_means_whoever_has_them(step):
    # Rank 0 gives ones, rank 1 twos.
    total = [3.0, 1.0, 2.0, None][step]
    answers = [seen[step] for seen in ranks(steps, 2)]
    for norm, left in answers:
        if total is None:
            assert norm == 0
            assert left == [None, None, None]
            continue
        for found, value in zip(left, (total, total / 2, total), strict=True):
            placements, grad = found
            assert placements == (Replicate(),)
            assert (grad == value).all()
        exact = math.sqrt(total**2 * (2 + BUCKET + 1) + (total / 2) ** 2 * 2)
        assert float(norm) == pytest.approx(exact, rel=1e-6)
