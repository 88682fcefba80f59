"""Sequences of norms, and what a policy answers to them."""

import math
from types import SimpleNamespace

import torch
from torch import nn

from gradclip import GradientClipper
from gradclip.types import Stats


def steady(count, level=1.0, seed=0, noise=0.1, slots=None):
    """Log-normal norms about a level; `noise` is their deviation as a share of their mean."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count,) if slots is None else (count, slots)
    spread = math.sqrt(math.log1p(noise**2))
    return level * torch.exp(spread * torch.randn(shape, generator=generator, dtype=torch.float64))


def decided(policy, norms):
    """Ask a policy itself, step by step, every step finite.

    Args:
        norms: Shape (steps,) or (steps, slots), float64.

    Returns:
        `limit` and `coef` of the shape of `norms`, and the last `state`.
    """
    rows = norms.reshape(len(norms), -1)
    state = policy.init(rows.shape[1], torch.device("cpu"))
    decisions = []
    for step, row in enumerate(rows):
        stats = Stats(row, torch.tensor(True), torch.tensor(float(step), dtype=torch.float64))
        decision, state = policy.decide(stats, state)
        decisions.append(decision)
    limit = torch.stack([d.limit for d in decisions]).reshape(norms.shape)
    coef = torch.stack([d.coef for d in decisions]).reshape(norms.shape)
    return SimpleNamespace(limit=limit, coef=coef, state=state)


def clipped(policy, norms):
    """The records of a clipper with one parameter of one element, which may be inf or NaN."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    clipper = GradientClipper(policy, [("p", parameter)])
    records = []
    for norm in norms:
        parameter.grad = norm.reshape(1).clone()
        records.append(clipper.clip())
    return records
